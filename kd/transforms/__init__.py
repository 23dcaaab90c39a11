"""Augment and crop images, and hide objects in them."""
