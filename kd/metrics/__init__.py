"""Metrics, and intervals of paired differences."""
