"""Blocks that teachers and students share."""
