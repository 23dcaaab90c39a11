"""Object detection: datasets, samples, task, metric and drawing."""
