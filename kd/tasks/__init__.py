"""Tasks: one kind of problem each."""

from kd.tasks.classification import Classification
from kd.tasks.context import Context, ContextPixels
from kd.tasks.tokens import SceneTokens

TASKS = {
    "context": Context,
    "context_pixels": ContextPixels,
    "scene_tokens": SceneTokens,
    "classification": Classification,
}
