"""Checkpoints: whole or not at all, exact, and never code."""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd.engine.checkpoint import (
    Progress,
    config_differences,
    load_checkpoint,
    load_model,
    load_state,
    rng_state,
    save_checkpoint,
    save_model,
    set_rng_state,
)
from kd.errors import UserError


def save(path: Path, **parts: Any) -> None:
    save_checkpoint(path, Progress(1, 2, 3), {"train": {"epochs": 2}}, parts)


def test_a_checkpoint_gives_back_what_went_in(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "last.pt"
    save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), streams=[rng_state()])
    place, config, parts = load_checkpoint(path)
    assert place == Progress(epoch=1, batch=2, step=3)
    assert config == {"train": {"epochs": 2}}
    assert torch.equal(parts["model"]["weight"], model.weight)
    twin = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=0.1)
    twin.load_state_dict(parts["optimizer"])
    assert torch.equal(
        twin.state_dict()["state"][0]["exp_avg"], optimizer.state[model.weight]["exp_avg"]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_random_streams_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.gauss(0, 1),  # draws two and keeps one: the kept one is state as well
            random.random(),
            float(np.random.standard_normal()),
            float(torch.randn(())),
            float(torch.nn.functional.dropout(torch.ones(8), 0.5).sum()),
        ]

    draw()
    path = tmp_path / "last.pt"
    save(path, streams=[rng_state()])
    expected = [draw(), draw()]
    draw()
    set_rng_state(load_checkpoint(path)[2]["streams"][0])
    assert [draw(), draw()] == expected


class Attack:
    """Its pickle makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, trap = tmp_path / "last.pt", tmp_path / "trap"
    content = {"format": 1, "parts": {"model": Attack(trap)}}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"last\.pt: not loaded: .* could run code") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert not trap.exists()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_missing_broken_or_foreign_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match=r"last\.pt: no such checkpoint"):
        load_checkpoint(path)
    save(path, model={"w": torch.ones(1000)})
    whole = path.read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pt: (not a checkpoint|not loaded)") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="checkpoint format 99; this version reads only 1"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="checkpoint format list"):
        load_checkpoint(path)
    torch.save({"format": 1, "progress": {"epoch": 1}}, path)
    with pytest.raises(UserError, match="incomplete checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path)


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, model={"w": torch.ones(2), "n": torch.tensor(3)})
    good = path.read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"last\.pt: .* b is not finite after step 3"):
            save(path, model={"w": torch.ones(2), "b": torch.tensor([1.0, bad])})
    assert path.read_bytes() == good


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file above 100 kB: writing more fails as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))  # Python ignores the signal
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


WRITERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": lambda path: save(path, model={"w": torch.ones(1_000_000)}),
    # Small enough for the last write to be the one that fails.
    "nearly": lambda path: save(path, model={"w": torch.ones(24_950)}),
    "model": lambda path: save_model(path, nn.Linear(1000, 1000), {}),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    tmp_path: Path, what: str, little_room: None
) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(UserError) as caught:
        WRITERS[what](path)
    assert str(caught.value).startswith(f"{path}: cannot be written: ")
    assert "File too large" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result"]


def test_a_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    save_model(tmp_path / "m.safetensors", model, {"format": "x"})
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    load_model(tmp_path / "m.safetensors", twin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)


def test_a_model_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(
        UserError, match=r"m\.safetensors: no such file; if the run has not finished"
    ):
        load_model(path, nn.Linear(2, 2))
    save_model(path, nn.Linear(2, 2), {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"m\.safetensors: not a safetensors file"):
        load_model(path, nn.Linear(2, 2))


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, nn.Linear(2, 3, bias=False), {})
    with pytest.raises(UserError) as caught:
        load_model(path, nn.Linear(2, 2))
    assert "weights of another model: missing bias; weight is (3, 2), expected (2, 2)" in str(
        caught.value
    )
    many = {str(number): torch.ones(1) for number in range(9)}
    with pytest.raises(UserError, match=r"unexpected 1 and 7 more$"):
        load_state(nn.Linear(2, 2), many, path)


def test_differing_places_are_dotted_with_both_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert config_differences(old, {"a": {"b": 1, "c": (1, 2)}, "d": 3}) == []
    assert config_differences(old, {"a": {"b": 2, "c": [1]}, "e": 4}) == [
        "a.b: 1 there, 2 now",
        "a.c: [1, 2] there, [1] now",
        "d: 3 there, None now",
        "e: None there, 4 now",
    ]
