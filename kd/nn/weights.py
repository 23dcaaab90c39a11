"""Files of weights into a trunk or a network; nothing here runs code from a file."""

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

# Keys of torchvision's heads and auxiliary classifiers, which a trunk has no use for.
HEAD_PREFIXES = ("classifier.", "fc.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")
# torchvision's densenet files are older than its module names: "norm.1" there is "norm1" here.
OLD_DENSE = ("norm.1.", "norm.2.", "relu.1.", "relu.2.", "conv.1.", "conv.2.")

_PARALLEL = "module."  # what torch's data-parallel wrappers put before every name


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, a torch file or a run's folder, read as data only.

    Raises:
        UserError: The file is missing, damaged, or holds something other than named tensors.
    """
    if path.is_dir():
        folder, path = path, path / "model.safetensors"
        if not path.is_file():
            raise UserError(
                f"{folder}: a run that is not finished, it has no {path.name}; go on with --resume"
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


def load_trunk_weights(
    trunk: nn.Module,
    weights: Path | Mapping[str, Any],
    *,
    source: str,
    what: str | None = None,
) -> None:
    """Load torchvision weights; strict, but for the classifier's keys.

    Of a bigger model, a context teacher say, the part with the trunk's names is taken.

    Args:
        trunk: What to load into.
        weights: A file, a run's folder, or a state dict.
        source: What to call the weights in a message.
        what: What to call the trunk there, by default its `name` or its class.

    Raises:
        UserError: Keys are missing or unexpected, or shapes differ; names the first few.
    """
    state = read_weights(weights) if isinstance(weights, Path) else dict(weights)
    expected = trunk.state_dict()
    state = _part({_modern(key): value for key, value in state.items()}, set(expected))
    state = {key: v for key, v in state.items() if not key.startswith(HEAD_PREFIXES)}
    what = what or str(getattr(trunk, "name", type(trunk).__name__))
    _same_names(state, expected, source=source, what=what)
    _take_positions(trunk, state)
    _same_shapes(state, trunk.state_dict(), source=source, what=what)
    trunk.load_state_dict(state, strict=False)


def load_timm_weights(trunk: nn.Module, path: Path, *, source: str) -> None:
    """Load timm's weights, or a run's with the same trunk inside; strict, but for the head's keys.

    Args:
        trunk: Of timm, whose extractor writes some dots of a path as underscores.
        path: A file or a run's folder.
        source: What to call it in a message.

    Raises:
        UserError: Keys are missing, or shapes differ; names the first few.
    """
    expected = trunk.state_dict()
    state = _part(read_weights(path), set(expected))
    names = {_folded(key): key for key in expected}
    state = {names[_folded(key)]: value for key, value in state.items() if _folded(key) in names}
    what = str(getattr(trunk, "name", ""))
    _same_names(state, expected, source=source, what=what)
    _same_shapes(state, expected, source=source, what=what)
    trunk.load_state_dict(state, strict=False)


def _folded(key: str) -> str:
    return key.removeprefix("network.").removeprefix("model.").replace(".", "_")


def load_network(network: nn.Module, file: str | None, *, what: str) -> None:
    """Load all weights of a network from a file; strict.

    Args:
        network: What to load into.
        file: `model.safetensors` of a run, the run's folder, or a torch file of a state dict, which
            may lie under "state_dict" or "model" and have "module." before its names. None leaves
            the network as it is.
        what: What to call the network in a message.

    Raises:
        UserError: The file cannot be read; tensors are missing or unexpected, or of other shapes,
            those of a classifier of another number of classes say; names the first few.
    """
    if file is not None:
        load_state(network, read_weights(Path(file)), source=file, what=what)


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, what: str) -> None:
    """Load all weights of a network from tensors by name; strict, as `load_network` says.

    Args:
        network: What to load into.
        state: The tensors.
        source: What to call them in a message.
        what: What to call the network there.

    Raises:
        UserError: Tensors are missing or unexpected, or of other shapes; names the first few.
    """
    if state and all(key.startswith(_PARALLEL) for key in state):
        state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    expected = network.state_dict()
    _same_names(state, expected, source=source, what=what)
    _same_shapes(state, expected, source=source, what=what)
    network.load_state_dict(state, strict=False)  # a batch norm's counter may be missing


def _same_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    """Refuse missing and unexpected tensors."""
    # Batch norm's counters came after some of the files did, and change nothing in use.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in expected]
    mistakes = []
    if missing:
        mistakes.append(f"missing {_few(missing)}")
    if unexpected:
        mistakes.append(f"unexpected {_few(unexpected)}")
    if mistakes:
        raise UserError(f"{source} does not fit {what}: {'; '.join(mistakes)}")


def _same_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    """Refuse tensors of other shapes; a classifier of other classes is called so."""
    wrong = {key: (value.shape, expected[key].shape) for key, value in state.items()}
    wrong = {key: (there, here) for key, (there, here) in wrong.items() if there != here}
    if not wrong:
        return
    shapes = [f"{key} {tuple(there)} for {tuple(here)}" for key, (there, here) in wrong.items()]
    classes = next(
        (
            f"; the file is of {there[0]} classes, the network of {here[0]}"
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

    Pretrained weights are kept: for grey images (`grey`, or one channel) the first channel gets the
    sum over RGB, else the first three get RGB; the other channels get zeros.
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
    """The tensors below the one prefix that has all that is expected; all where none is such."""
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
    """A transformer trained at another size brings position embeddings of that size; keep them."""
    key = "encoder.pos_embedding"
    if key in state and state[key].shape != trunk.get_parameter(key).shape:
        encoder = trunk.get_submodule("encoder")
        encoder.pos_embedding = nn.Parameter(torch.empty_like(state[key]))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    tail = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + tail


def weights_hash(model: nn.Module, kind: str = "") -> str:
    """A short hash of a model's weights and buffers: names, types, shapes and values.

    Args:
        model: On any device.
        kind: What else tells it from others.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# No way there, an answer cut off, another hash than the name says, a file that is no weights.
_FAILURES = (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError)


def imagenet_weights(name: str) -> dict[str, Any]:
    """The state dict of a torchvision classifier's default weights.

    Args:
        name: Of `torchvision.models.list_models`.

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
        there = "is damaged: remove it" if file.is_file() else f"cannot be had from {url}"
        raise UserError(
            f"weights: imagenet: torchvision's weights of {name}: {file} {there} ({reason}). "
            "Without a connection put the file there from another machine, or say in the model's "
            "options weights: FILE, any file of such weights, or weights: null, random ones"
        ) from error
    return state
