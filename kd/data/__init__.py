"""Data: COCO-format sets, the embedded scenes, hiding, augmentation, loading."""
