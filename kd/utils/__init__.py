"""Helpers for image files, atomic writes, the cache folder and memory allocation."""
