"""The embedded synthetic scenes and their exact posterior."""
