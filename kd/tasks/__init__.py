"""Tasks: one kind of problem each."""

from kd.tasks.classification import Classification
from kd.tasks.context import Context, ContextPixels

TASKS = {
    "context": Context,
    "context_pixels": ContextPixels,
    "classification": Classification,
}
