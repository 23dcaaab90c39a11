"""One training run: set up, train, load and read back."""
