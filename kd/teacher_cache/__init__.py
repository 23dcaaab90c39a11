"""Compute teacher outputs once and store them."""
