"""Load weights of trunks and networks from files; no code of a file is executed."""

from __future__ import annotations

import copy
import hashlib
import http.client
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from kd.errors import UserError

# Keys of torchvision's heads and auxiliary classifiers, which trunks do not have.
HEAD_PREFIXES = ("classifier.", "fc.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")
# torchvision's densenet files are older than its module names: "norm.1" there is "norm1" here.
OLD_DENSE = ("norm.1.", "norm.2.", "relu.1.", "relu.2.", "conv.1.", "conv.2.")

_PARALLEL = "module."  # prefix of torch's data-parallel wrappers


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, a torch file or a run's folder, read as data only.

    Raises:
        UserError: The file is missing, corrupt, or holds something other than named tensors.
    """
    if path.is_dir():
        folder, path = path, path / "model.safetensors"
        if not path.is_file():
            raise UserError(
                f"{folder}: not finished, it has no {path.name}; continue it with --resume"
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
    """Load torchvision weights strictly, except for the classifier's keys.

    From a file of a bigger model, such as a context teacher, the part with the trunk's names is
    taken.

    Args:
        trunk: The module to load into.
        weights: "imagenet", a file or a run's folder.
        name: Of the torchvision classifier, for "imagenet".
        what: Name of the trunk in messages.

    Raises:
        UserError: Weights that cannot be downloaded; keys are missing or unexpected, or shapes
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
    """Load a file of timm's weights or a run's folder strictly, except for the head's keys.

    Raises:
        UserError: Keys are missing, or shapes differ.
    """
    expected = trunk.state_dict()
    state = _part(read_weights(Path(weights)), set(expected))
    names = {_folded(key): key for key in expected}
    state = {names[_folded(key)]: value for key, value in state.items() if _folded(key) in names}
    load_state(trunk, state, source=weights, what=what)


def _folded(key: str) -> str:
    """A key without the dots of its path, some of which timm's extractor writes as underscores."""
    return key.removeprefix("network.").removeprefix("model.").replace(".", "_")


def load_network(network: nn.Module, file: str | None, *, what: str) -> None:
    """Load all weights of a network strictly.

    Args:
        network: The module to load into.
        file: `model.safetensors` of a run, the run's folder, or a torch file of a state dict, which
            may be nested under "state_dict" or "model" and have names with the prefix "module.".
            None leaves the network as it is.
        what: Name of the network in messages.

    Raises:
        UserError: The file cannot be read; tensors are missing, unexpected or of other shapes, such
            as those of a classifier of another number of classes.
    """
    if file is not None:
        load_state(network, read_weights(Path(file)), source=file, what=what)


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, what: str) -> None:
    """Load all weights of a network from a state dict, as `load_network`; `source` is its name."""
    if state and all(key.startswith(_PARALLEL) for key in state):
        state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    expected = network.state_dict()
    _same_names(state, expected, source=source, what=what)
    _same_shapes(state, expected, source=source, what=what)
    network.load_state_dict(state, strict=False)  # a batch norm's counter may be missing


def _same_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    # Batch norm's counters are missing in old files, and are not used.
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
    """Replace the first convolution by one for another number of input channels.

    Pretrained weights are reused: for grey images (`grey`, or one channel) the first channel gets
    the sum over RGB, else the first three get RGB; the other channels get zeros.
    """
    path, old = next(
        (path, module) for path, module in trunk.named_modules() if isinstance(module, nn.Conv2d)
    )
    new = copy.deepcopy(old)
    new.in_channels = in_channels
    new.weight = nn.Parameter(old.weight.new_empty(len(old.weight), in_channels, *old.kernel_size))
    new.reset_parameters()
    with torch.no_grad():
        if pretrained and (grey or in_channels == 1):
            new.weight.zero_()
            new.weight[:, :1] = old.weight.sum(dim=1, keepdim=True)
        elif pretrained:
            shared = min(in_channels, old.in_channels)
            new.weight.zero_()
            new.weight[:, :shared] = old.weight[:, :shared]
        if pretrained and new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, child = path.rpartition(".")
    setattr(trunk.get_submodule(parent), child, new)


def _part(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The tensors below the one prefix that all expected names are below, or else all tensors."""
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
    """Resize a transformer's position embeddings to those of a file trained at another size."""
    key = "encoder.pos_embedding"
    if key in state and state[key].shape != trunk.get_parameter(key).shape:
        encoder = trunk.get_submodule("encoder")
        encoder.pos_embedding = nn.Parameter(torch.empty_like(state[key]))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    tail = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + tail


def weights_hash(model: nn.Module, kind: str = "") -> str:
    """A short hash of weights and buffers (names, types, shapes, values) and of `kind`."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# No connection, a truncated download, a hash that does not match, a file without weights.
_FAILURES = (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError)


def imagenet_weights(name: str) -> dict[str, Any]:
    """The state dict of a torchvision classifier's default weights.

    Raises:
        UserError: They can neither be downloaded nor read.
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
            "options weights: FILE, any file of such weights, or weights: null, random ones"
        ) from error
    return state
