"""Load weights of whole detectors: a run's, or torchvision's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from kd.nn.weights import load_state, read_weights

# torchvision's COCO weights have a row for each id from 0 to 90, of which 80 are classes.
_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_IDS = tuple(n for n, name in enumerate(_NAMES) if name not in ("__background__", "N/A"))
# Layers with rows for classes: numbers per row, and whether the first row is the background.
_CLASS_LAYERS = {
    "roi_heads.box_predictor.cls_score": (1, True),
    "roi_heads.box_predictor.bbox_pred": (4, True),
    "head.classification_head.cls_logits": (1, False),
}
# Old names in the pyramid, the proposal head, and RetinaNet's heads, which counted activations.
_OLDER: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (re.compile(r"(.*\.(?:inner|layer)_blocks\.\d+)\.(\w+)"), "{}.0.{}".format),
    (re.compile(r"(rpn\.head\.conv)\.(\w+)"), "{}.0.0.{}".format),
    (
        re.compile(r"(head\.\w+\.conv)\.(\d+)\.(\w+)"),
        lambda path, number, kind: f"{path}.{int(number) // 2}.0.{kind}",
    ),
)


def load_detector(model: nn.Module, file: str | None, *, num_classes: int, what: str) -> None:
    """Load all weights of a detector whose torchvision network is `model.network`.

    `file` may also be one of torchvision's detectors of the same trunk and levels. From those
    trained on COCO, 80 classes are taken, in the order of their ids. For the other arguments and
    errors see `kd.nn.weights.load_network`.
    """
    if file is None:
        return
    state = read_weights(Path(file))
    network = model
    if not any(name.removeprefix("module.").startswith("network.") for name in state):
        network = model.get_submodule("network")
        expected = network.state_dict().keys()
        state = {_modern(name, expected): tensor for name, tensor in state.items()}
        if num_classes == len(COCO_IDS):
            state = {name: _of_coco(name, tensor) for name, tensor in state.items()}
    load_state(network, state, source=file, what=what)


def _modern(name: str, expected: Collection[str]) -> str:
    """Today's name of a tensor of an older torchvision file."""
    for old, new in _OLDER:
        found = old.fullmatch(name)
        if name not in expected and found is not None:
            return new(*found.groups())
    return name


def _of_coco(name: str, tensor: Tensor) -> Tensor:
    """Select the rows of COCO's 80 classes, and of the background, from a layer with 91 rows."""
    layer = name.rpartition(".")[0]
    if layer not in _CLASS_LAYERS:
        return tensor
    numbers, background = _CLASS_LAYERS[layer]
    ids = [0, *COCO_IDS] if background else list(COCO_IDS)
    if len(tensor) % (len(_NAMES) * numbers):
        return tensor
    rows = tensor.reshape(-1, len(_NAMES), numbers, *tensor.shape[1:])[:, ids]
    return rows.reshape(-1, *tensor.shape[1:])
