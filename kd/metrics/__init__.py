"""Metrics, with confidence intervals of values and of paired differences."""
