"""Readers and writers of dataset files: COCO, VOC, KITTI, label maps, fixations."""
