"""Files of a whole detector's weights: a run's, or torchvision's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from kd.nn.weights import load_state, read_weights

# torchvision's files of COCO have a row for each of the ids 0 to 90, of which 80 are classes.
_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_IDS = tuple(n for n, name in enumerate(_NAMES) if name not in ("__background__", "N/A"))
# The layers with rows for classes: numbers of a row, and whether class 0 is the background.
_CLASS_LAYERS = {
    "roi_heads.box_predictor.cls_score": (1, True),
    "roi_heads.box_predictor.bbox_pred": (4, True),
    "head.classification_head.cls_logits": (1, False),
}
# Older names of the pyramid, the proposals' head, and RetinaNet's heads, which count activations.
_OLDER: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (re.compile(r"(.*\.(?:inner|layer)_blocks\.\d+)\.(\w+)"), "{}.0.{}".format),
    (re.compile(r"(rpn\.head\.conv)\.(\w+)"), "{}.0.0.{}".format),
    (
        re.compile(r"(head\.\w+\.conv)\.(\d+)\.(\w+)"),
        lambda path, number, kind: f"{path}.{int(number) // 2}.0.{kind}",
    ),
)


def load_detector(model: nn.Module, file: str | None, *, num_classes: int, what: str) -> None:
    """Load all weights of a detector whose torchvision network is `network`.

    Args:
        model: What to load into.
        file: As `kd.nn.weights.load_network` takes it; torchvision's own detectors fit too, where
            trunk and levels are theirs. Of those of COCO, 80 classes are its own in the order of
            their ids.
        num_classes: C.
        what: What to call it in a message.

    Raises:
        UserError: What `load_network` raises.
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
    """A name of torchvision's older files, before each convolution had a block of its own."""
    for old, new in _OLDER:
        found = old.fullmatch(name)
        if name not in expected and found is not None:
            return new(*found.groups())
    return name


def _of_coco(name: str, tensor: Tensor) -> Tensor:
    """Of a layer with 91 rows an anchor those of COCO's 80 classes, the background's before."""
    layer = name.rpartition(".")[0]
    if layer not in _CLASS_LAYERS:
        return tensor
    numbers, background = _CLASS_LAYERS[layer]
    ids = [0, *COCO_IDS] if background else list(COCO_IDS)
    if len(tensor) % (len(_NAMES) * numbers):
        return tensor
    rows = tensor.reshape(-1, len(_NAMES), numbers, *tensor.shape[1:])[:, ids]
    return rows.reshape(-1, *tensor.shape[1:])
