"""A model's hash is that of its weights; a trunk's weights out of a whole model of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd.errors import UserError
from kd.nn.trunk import build_trunk
from kd.nn.weights import weights_hash

QUICK = "shufflenet_v2_x0_5"


def run_with(folder: Path, parts: dict[str, nn.Module]) -> Path:
    """A finished run whose model has these parts, and a head."""
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"trunk": part}) for name, part in parts.items()}
        | {"head": nn.Linear(3, 2)}
    )
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def test_a_trunk_starts_from_the_part_of_a_runs_model_that_has_its_names(tmp_path: Path) -> None:
    source = build_trunk(QUICK)
    run = run_with(tmp_path / "run", {"trunk": source})
    for weights in (run, run / "model.safetensors"):
        state = build_trunk(QUICK, weights=str(weights)).state_dict()
        for name, value in source.state_dict().items():
            assert torch.equal(state[name], value), name


def test_a_run_of_another_trunk_does_not_fit(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"trunk": build_trunk(QUICK)})
    with pytest.raises(UserError, match=r"run does not fit resnet18: missing "):
        build_trunk("resnet18", weights=str(run))
    twice = run_with(tmp_path / "twice", {"a": build_trunk(QUICK), "b": build_trunk(QUICK)})
    with pytest.raises(UserError, match=r"twice does not fit"):
        build_trunk(QUICK, weights=str(twice))


def test_a_run_without_weights_says_what_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        build_trunk(QUICK, weights=str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"not finished, it has no model\.safetensors.*--resume"):
        build_trunk(QUICK, weights=str(tmp_path))


def test_the_hash_follows_weights_and_buffers() -> None:
    linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    model = nn.Sequential(linear, norm)
    first = weights_hash(model)
    assert weights_hash(model) == first
    with torch.no_grad():
        linear.weight[0, 0] += 1
    second = weights_hash(model)
    assert second != first
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    assert weights_hash(model) not in (first, second)


def test_the_hash_follows_names_shapes_and_kind() -> None:
    model = nn.Linear(2, 3, bias=False)
    turned = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        turned.weight.copy_(model.weight.reshape(2, 3))
    hashes = {weights_hash(model), weights_hash(turned), weights_hash(nn.Sequential(model))}
    assert len(hashes | {weights_hash(model, "stride 16")}) == 4
