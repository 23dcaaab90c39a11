"""Out-of-context test images: objects pasted where they do not belong."""
