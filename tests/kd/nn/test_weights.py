"""Weights of trunks out of whole models, of whole networks, and their hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd.errors import UserError
from kd.nn.trunk import build_trunk
from kd.nn.weights import load_network, weights_hash

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


class Small(nn.Module):
    """A batch norm and a classifier of so many classes."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Conv2d(4, classes, 1)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_network_is_read_as_other_programs_write_it(
    wrapper: str | None, prefix: str, tmp_path: Path
) -> None:
    saved, network = Small(), Small()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "net.pth")
    load_network(network, str(tmp_path / "net.pth"), what="small")
    for name, value in saved.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_no_file_leaves_a_network_as_it_is() -> None:
    network = Small()
    before = weights_hash(network)
    load_network(network, None, what="small")
    assert weights_hash(network) == before


def test_a_batch_norms_counter_may_be_missing_from_a_file(tmp_path: Path) -> None:
    saved, network = Small(), Small()
    state = saved.state_dict()
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    load_network(network, str(tmp_path / "old.pth"), what="small")
    assert torch.equal(network.classifier.weight, saved.classifier.weight)


def test_what_does_not_fit_a_network_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"

    def message(state: dict[str, torch.Tensor]) -> str:
        torch.save(state, file)
        with pytest.raises(UserError) as caught:
            load_network(Small(), str(file), what="small")
        return str(caught.value)

    state, value = Small().state_dict(), torch.zeros(1)
    surplus = {f"extra.{place}": value for place in range(6)}
    assert message(state | surplus) == (
        f"{file} does not fit small: unexpected extra.0, extra.1, extra.2, extra.3 and 2 more"
    )
    lacking = {name: tensor for name, tensor in state.items() if "weight" not in name}
    assert message(lacking | {"head": value}) == (
        f"{file} does not fit small: missing norm.weight, classifier.weight; unexpected head"
    )
    assert message(Small(7).state_dict()) == (
        f"{file} does not fit small: shapes differ: classifier.weight (7, 4, 1, 1) for "
        "(3, 4, 1, 1), classifier.bias (7,) for (3,); the file has 7 classes, the network 3"
    )
    wide = state | {"norm.weight": torch.zeros(8)}
    assert message(wide) == (f"{file} does not fit small: shapes differ: norm.weight (8,) for (4,)")
    assert "does not hold a state dict" in message({"weight": 3})  # type: ignore[dict-item]
    file.write_bytes(b"PK no such thing")
    with pytest.raises(UserError, match=r"net\.pth cannot be read"):
        load_network(Small(), str(file), what="small")
