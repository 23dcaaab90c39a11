"""Load weights of trunks, networks and detectors from files, without executing code in them."""

from __future__ import annotations

import copy
import hashlib
import http.client
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from kd.errors import UserError

# Prefixes of the keys of torchvision's heads and auxiliary classifiers, which trunks do not have.
HEAD_PREFIXES = ("classifier.", "fc.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")
# Parts of keys in torchvision's DenseNet files that differ from the current names of the modules:
# "norm.1" in a file is now "norm1".
OLD_DENSE = ("norm.1.", "norm.2.", "relu.1.", "relu.2.", "conv.1.", "conv.2.")

_PARALLEL = "module."  # prefix added by torch's data-parallel wrappers


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, a torch file or a run's folder.

    Raises:
        UserError: The file is missing or corrupt, or contains something other than named tensors.
    """
    if path.is_dir():
        folder, path = path, path / "model.safetensors"
        if not path.is_file():
            raise UserError(
                f"{folder}: not finished, it has no {path.name}; resume it with --resume"
                if (folder / "config.yaml").is_file()
                else f"{folder}: not a run folder, it has neither config.yaml nor {path.name}"
            )
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"weights file {path} cannot be read: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(one, Tensor) for one in state.values()):
        raise UserError(f"weights file {path} does not hold a state dict of tensors")
    return dict(state)


def load_trunk_weights(trunk: nn.Module, weights: str, name: str, *, what: str) -> None:
    """Load torchvision weights into a trunk; all keys except the classifier's must match.

    If the file belongs to a larger model that contains the trunk, such as a context teacher, only
    the tensors of the trunk are loaded.

    Args:
        trunk: The module to load into.
        weights: "imagenet", a file or a run's folder.
        name: Name of the torchvision classifier, for "imagenet".
        what: Name of the trunk in error messages.

    Raises:
        UserError: The weights cannot be downloaded, keys are missing or unexpected, or shapes
            differ.
    """
    published = weights == "imagenet"
    source = f"torchvision's weights of {name}" if published else weights
    state = imagenet_weights(name) if published else read_weights(Path(weights))
    expected = trunk.state_dict()
    state = _part({_modern(key): value for key, value in state.items()}, set(expected))
    state = {key: v for key, v in state.items() if not key.startswith(HEAD_PREFIXES)}
    _same_names(state, expected, source=source, what=what)
    _take_positions(trunk, state)
    _same_shapes(state, trunk.state_dict(), source=source, what=what)
    trunk.load_state_dict(state, strict=False)


def load_timm_weights(trunk: nn.Module, weights: str, *, what: str) -> None:
    """Load timm weights from a file or a run's folder; all keys except the head's must match.

    Raises:
        UserError: Keys are missing, or shapes differ.
    """
    expected = trunk.state_dict()
    state = _part(read_weights(Path(weights)), set(expected))
    names = {_folded(key): key for key in expected}
    state = {names[_folded(key)]: value for key, value in state.items() if _folded(key) in names}
    load_state(trunk, state, source=weights, what=what)


def _folded(key: str) -> str:
    """Replace all dots in a key by underscores, because timm's extractor replaces some of them."""
    return key.removeprefix("network.").removeprefix("model.").replace(".", "_")


def load_network(network: nn.Module, file: str | None, *, what: str) -> None:
    """Load all weights of a network from a file; all keys must match.

    Args:
        network: The module to load into.
        file: `model.safetensors` of a run, the run's folder, or a torch file with a state dict. The
            state dict may be nested under "state_dict" or "model", and the keys may begin with
            "module.". None leaves the network unchanged.
        what: Name of the network in error messages.

    Raises:
        UserError: The file cannot be read, keys are missing or unexpected, or shapes differ, for
            example because the number of classes differs.
    """
    if file is not None:
        load_state(network, read_weights(Path(file)), source=file, what=what)


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, what: str) -> None:
    """Load all weights of a network from a state dict; all keys must match.

    `source` is the file that the state dict was read from, for error messages.
    """
    if state and all(key.startswith(_PARALLEL) for key in state):
        state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    expected = network.state_dict()
    _same_names(state, expected, source=source, what=what)
    _same_shapes(state, expected, source=source, what=what)
    # Not strict, because the counters of batch norms may be missing.
    network.load_state_dict(state, strict=False)


def _same_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    # The counters of batch norms are not used, and old files lack them.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in expected]
    found = (("missing", missing), ("unexpected", unexpected))
    if mistakes := [f"{kind} {_few(keys)}" for kind, keys in found if keys]:
        raise UserError(f"{source} does not fit {what}: {'; '.join(mistakes)}")


def _same_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    wrong = {key: (value.shape, expected[key].shape) for key, value in state.items()}
    wrong = {key: (there, here) for key, (there, here) in wrong.items() if there != here}
    if not wrong:
        return
    shapes = [f"{key} {tuple(there)} for {tuple(here)}" for key, (there, here) in wrong.items()]
    classes = next(
        (
            f"; the file has {there[0]} classes, the network {here[0]}"
            for key, (there, here) in wrong.items()
            if "classifier" in key and len(there) > 1 and there[1:] == here[1:]
        ),
        "",
    )
    raise UserError(f"{source} does not fit {what}: shapes differ: {_few(shapes)}{classes}")


def widen_first_convolution(
    trunk: nn.Module, in_channels: int, *, pretrained: bool, grey: bool = False
) -> None:
    """Replace the first convolution by one with another number of input channels, in place.

    Args:
        trunk: The network to change.
        in_channels: Number of input channels of the new convolution.
        pretrained: Whether to reuse the old weights. The first three channels then get the weights
            of RGB, and all other channels get zeros. If false, the new weights are random.
        grey: Whether the first channel is a grey image, as it always is with one channel. It then
            gets the sum of the weights of RGB, and all other channels get zeros.
    """
    path, old = next(
        (path, module) for path, module in trunk.named_modules() if isinstance(module, nn.Conv2d)
    )
    new = copy.deepcopy(old)
    new.in_channels = in_channels
    new.weight = nn.Parameter(old.weight.new_empty(len(old.weight), in_channels, *old.kernel_size))
    new.reset_parameters()
    with torch.no_grad():
        if pretrained:
            grey = grey or in_channels == 1
            known = old.weight.sum(dim=1, keepdim=True) if grey else old.weight[:, :in_channels]
            new.weight.zero_()
            new.weight[:, : known.shape[1]] = known
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
    parent, _, child = path.rpartition(".")
    setattr(trunk.get_submodule(parent), child, new)


def _part(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Select the part of a state dict that belongs to a module of a larger model.

    Returns:
        The tensors under a prefix, without the prefix, if there is exactly one prefix under which
        all `expected` keys exist; otherwise the whole state dict.
    """
    first = min(expected)
    wanted = [key for key in expected if not key.endswith("num_batches_tracked")]
    ends = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    fitting = [prefix for prefix in ends if all(prefix + key in state for key in wanted)]
    if first in state or len(fitting) != 1:
        return state
    prefix = fitting[0]
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _modern(key: str) -> str:
    for old in OLD_DENSE:
        if ".denselayer" in key and f".{old}" in key:
            return key.replace(f".{old}", f".{old.replace('.', '', 1)}")
    return key


def _take_positions(trunk: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resize a vision transformer's position embeddings to the number in a state dict, in place.

    The number differs if the weights were trained on images of another size.
    """
    key = "encoder.pos_embedding"
    if key in state and state[key].shape != trunk.get_parameter(key).shape:
        encoder = trunk.get_submodule("encoder")
        encoder.pos_embedding = nn.Parameter(torch.empty_like(state[key]))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    tail = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + tail


def weights_hash(model: nn.Module, kind: str = "") -> str:
    """Hash the weights and buffers of a model: their names, dtypes, shapes and values.

    The string `kind` is hashed, too; it distinguishes models with equal weights but other options.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Raised if there is no connection, a download is truncated, a hash is wrong, or a file is corrupt.
_FAILURES = (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError)


def imagenet_weights(name: str) -> dict[str, Any]:
    """Load the state dict of a torchvision classifier's default weights, from the cache or the web.

    Raises:
        UserError: The weights cannot be downloaded or read.
    """
    published = models.get_model_weights(name)["DEFAULT"]
    try:
        state: dict[str, Any] = published.get_state_dict(progress=False, check_hash=True)
    except _FAILURES as error:
        url = str(published.url)
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        there = "is corrupt: remove it" if file.is_file() else f"cannot be downloaded from {url}"
        raise UserError(
            f"weights: imagenet: torchvision's weights of {name}: {file} {there} ({reason}). "
            "Without a connection copy the file there from another machine, or set in the model's "
            "options weights: FILE, to use another file with these weights, or weights: null, to "
            "start from random weights"
        ) from error
    return state


# The last layers of torchvision's COCO weights have a row for each category id from 0 to 90, but
# only 80 of these ids are classes.
_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_IDS = tuple(n for n, name in enumerate(_NAMES) if name not in ("__background__", "N/A"))
# Last layers of detectors: number of rows for each class, and whether row 0 is the background.
_CLASS_LAYERS = {
    "roi_heads.box_predictor.cls_score": (1, True),
    "roi_heads.box_predictor.bbox_pred": (4, True),
    "head.classification_head.cls_logits": (1, False),
}
# Patterns of keys in older files of torchvision, with functions that return the current key. The
# keys are those of the pyramid, the proposal head, and RetinaNet's heads, in which layers and
# activations were once numbered together.
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

    `file` may also contain torchvision's weights of a detector with the same trunk and levels. If
    these were trained on COCO and `num_classes` is 80, the rows of COCO's 80 classes are loaded, in
    the order of COCO's ids. For the other arguments and errors see `load_network`.
    """
    if file is None:
        return
    state = read_weights(Path(file))
    network = model
    if not any(name.removeprefix(_PARALLEL).startswith("network.") for name in state):
        network = model.get_submodule("network")
        expected = network.state_dict().keys()
        state = {_modern_detector(name, expected): tensor for name, tensor in state.items()}
        if num_classes == len(COCO_IDS):
            state = {name: _of_coco(name, tensor) for name, tensor in state.items()}
    load_state(network, state, source=file, what=what)


def _modern_detector(name: str, expected: Collection[str]) -> str:
    """Return the current key of a tensor from a file of torchvision, which may be an older one."""
    for old, new in _OLDER:
        found = old.fullmatch(name)
        if name not in expected and found is not None:
            return new(*found.groups())
    return name


def _of_coco(name: str, tensor: Tensor) -> Tensor:
    """Select the rows of COCO's 80 classes from the tensor of a last layer that has 91 classes.

    The row of the background is included. Tensors of other layers are returned unchanged.
    """
    layer = name.rpartition(".")[0]
    if layer not in _CLASS_LAYERS:
        return tensor
    numbers, background = _CLASS_LAYERS[layer]
    ids = [0, *COCO_IDS] if background else list(COCO_IDS)
    if len(tensor) % (len(_NAMES) * numbers):
        return tensor
    rows = tensor.reshape(-1, len(_NAMES), numbers, *tensor.shape[1:])[:, ids]
    return rows.reshape(-1, *tensor.shape[1:])
