"""Augmentation, crops and hiding of objects."""
