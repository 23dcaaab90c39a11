"""Tasks: one kind of problem each."""

from kd.tasks.classification import Classification
from kd.tasks.context import Context, ContextPixels
from kd.tasks.context_map import ContextMap
from kd.tasks.context_scene import ContextScene
from kd.tasks.detection import Detection
from kd.tasks.saliency import Saliency
from kd.tasks.scene_labels import SceneLabels
from kd.tasks.segmentation import Segmentation
from kd.tasks.tokens import SceneTokens

TASKS = {
    "context": Context,
    "context_pixels": ContextPixels,
    "scene_tokens": SceneTokens,
    "context_map": ContextMap,
    "context_scene": ContextScene,
    "classification": Classification,
    "scene_labels": SceneLabels,
    "segmentation": Segmentation,
    "detection": Detection,
    "saliency": Saliency,
}
