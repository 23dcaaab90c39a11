"""A student in several variants and seeds: what kd.distill and kd.transfer run."""
