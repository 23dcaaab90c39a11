"""Tasks: one kind of problem each."""

from kd.problems.detection.task import Detection
from kd.problems.objects.classification import Classification
from kd.problems.objects.context import Context, ContextMap, ContextPixels, ContextScene
from kd.problems.objects.context_tokens import SceneTokens
from kd.problems.objects.scene_labels import SceneLabels
from kd.problems.saliency.task import Saliency
from kd.problems.segmentation.task import Segmentation

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
