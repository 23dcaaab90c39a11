"""Saliency prediction."""
