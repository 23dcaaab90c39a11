"""Datasets: download, resize and open them; samples of images and their loader."""
