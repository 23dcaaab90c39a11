"""Train a student in several variants and seeds, for kd.distill and kd.transfer."""
