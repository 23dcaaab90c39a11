"""Tasks: one kind of problem each."""

from kd.tasks.classification import Classification
from kd.tasks.context import Context, ContextPixels
from kd.tasks.scene_labels import SceneLabels

TASKS = {
    "context": Context,
    "context_pixels": ContextPixels,
    "classification": Classification,
    "scene_labels": SceneLabels,
}
