"""Storage of teacher outputs and class maps in sharded files."""
