"""Semantic segmentation: datasets, samples, task, metric and drawing."""
