"""Evaluate finished runs: predict, score, write and draw."""
