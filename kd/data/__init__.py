"""Download, resize and open datasets, and load samples from them."""
