"""Write and read checkpoints.

Files are written atomically. A resumed run gives the same result as an uninterrupted one. Reading a
file never runs code that it contains.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.errors import UserError
from kd.utils.io import write_atomic

FORMAT = 1
REMEDIES = (
    "Lower train.optimizer.lr (with a critic train.critic.optimizer.lr), raise "
    "train.schedule.warmup or set train.precision=fp32, and train again"
)


@dataclass
class Progress:
    """Position in training: the next step is batch `batch` of epoch `epoch`."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


def _torch_save(content: Any, partial: Path) -> None:
    """Call `torch.save`, but raise an OSError if the disk is full instead of its RuntimeError."""
    with open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from error


def rng_state() -> dict[str, Any]:
    """Return the state of every global random number generator of this process."""
    version, internal, next_gauss = random.getstate()
    name, key, place, has_gauss, gauss = np.random.get_state()
    state = {
        # Tensors and plain values only, as weights_only=True requires.
        "python": [version, torch.tensor(internal, dtype=torch.int64), next_gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(key).astype(np.int64)), int(place)],
        "numpy_gauss": [int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore every global random number generator of this process from a result of `rng_state`."""
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), next_gauss))
    name, key, place = state["numpy"]
    gauss = state["numpy_gauss"]
    np.random.set_state((name, key.numpy().astype(np.uint32), place, *gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    path: Path, progress: Progress, config: Mapping[str, Any], parts: Mapping[str, Any]
) -> None:
    """Write a checkpoint with everything that resuming needs, in place of the previous one.

    If the disk is full, or weights of the model or a critic are not finite, a UserError is raised
    and the previous checkpoint stays.

    Args:
        path: File to write.
        progress: Position in training.
        config: The resolved recipe.
        parts: State dicts and states of random number generators, by name.
    """
    weights = dict(parts.get("model", {}))
    for name, critic in parts.get("critics", {}).items():
        weights |= {f"{name}.{key}": tensor for key, tensor in critic["model"].items()}
    broken = _not_finite(weights)
    if broken is not None:
        last = "the previous one is unchanged" if path.is_file() else "there is no previous one"
        raise UserError(
            f"{path}: checkpoint not written, because {broken} is not finite after step "
            f"{progress.step}; {last}. {REMEDIES}"
        )
    content = {"format": FORMAT, "progress": asdict(progress),
               "config": dict(config), "parts": dict(parts)}  # fmt: skip
    write_atomic(path, lambda partial: _torch_save(content, partial))


def _not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None; synchronise only once."""
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    if not names:
        return None
    finite = torch.stack([state[name].isfinite().all() for name in names]).tolist()
    return None if all(finite) else names[finite.index(False)]


def load_checkpoint(path: Path) -> tuple[Progress, dict[str, Any], dict[str, Any]]:
    """Read a checkpoint: position in training, resolved recipe, and `parts` of `save_checkpoint`.

    Code in the file is not run.

    Raises:
        UserError: The file is missing, corrupt or not a checkpoint of this version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        # torch's own message recommends weights_only=False, which runs the code.
        raise UserError(
            f"{path}: not loaded: it is truncated, or it contains objects whose loading could run "
            "code (checkpoints of kd contain none)"
        ) from error
    except Exception as error:
        # Broken zips, truncated files and folders raise many types of exceptions.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or corrupt: {first}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: checkpoint format {got}; this version reads only {FORMAT}")
    try:
        return Progress(**content["progress"]), content["config"], content["parts"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: incomplete checkpoint: {error}") from error


def save_model(path: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a model's weights and a metadata dict to a safetensors file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomic(path, lambda partial: save_file(tensors, partial, metadata=dict(metadata)))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that `save_model` wrote.

    Raises:
        UserError: The file is missing or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error


def load_model(path: Path, model: nn.Module) -> None:
    """Load weights that `save_model` wrote.

    Raises:
        UserError: The file is missing or corrupt, or its weights do not fit the model.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        hint = "if the run has not finished, resume it with --resume"
        raise UserError(f"{path}: no such file; {hint}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
    load_state(model, state, path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict read from `path`; a UserError lists weights that do not fit the model."""
    own = model.state_dict()
    misfits = [f"missing {name}" for name in own if name not in state]
    misfits += [f"unexpected {name}" for name in state if name not in own]
    misfits += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if misfits:
        more = f" and {len(misfits) - 4} more" if len(misfits) > 4 else ""
        raise UserError(f"{path}: weights of another model: {'; '.join(misfits[:4])}{more}")
    model.load_state_dict(dict(state))


def config_differences(old: Any, new: Any, place: str = "") -> list[str]:
    """List the differences of two resolved configs, as "dotted.key: OLD there, NEW now"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: list[str] = []
        for key in [*old, *(key for key in new if key not in old)]:
            dotted = f"{place}.{key}" if place else str(key)
            found += config_differences(old.get(key), new.get(key), dotted)
        return found
    as_lists = [list(v) if isinstance(v, tuple) else v for v in (old, new)]
    return [] if as_lists[0] == as_lists[1] else [f"{place}: {old!r} there, {new!r} now"]
