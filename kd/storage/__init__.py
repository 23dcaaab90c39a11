"""Sharded storage of teacher outputs."""
