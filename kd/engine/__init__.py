"""The training loop and what it needs: state, checkpoints, optimizers, tracking."""
