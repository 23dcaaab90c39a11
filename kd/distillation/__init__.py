"""Distillation terms, adapters, feature hooks and soft targets."""
