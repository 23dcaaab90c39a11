"""Data: downloads, prepared copies, the embedded scenes, samples and their loader."""
