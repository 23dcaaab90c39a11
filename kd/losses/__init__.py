"""Losses: one function each; student first, teacher second."""
