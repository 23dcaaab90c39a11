"""kd: knowledge distillation for scene understanding."""

__version__ = "0.1.0"
