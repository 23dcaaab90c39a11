"""Saliency prediction: datasets, samples, task, metric and drawing."""
