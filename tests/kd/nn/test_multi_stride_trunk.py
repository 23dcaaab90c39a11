"""Trunks at several strides, and frozen ones that remember what they said."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn import multi_stride_trunk as levels_module
from kd.nn.freeze import freeze
from kd.nn.multi_stride_trunk import LevelledTrunk, RememberedTrunk, image_keys, levelled
from kd.nn.trunk import build_trunk

NAME = "mobilenet_v3_small"


def build_levels(name: str, *, stride: int | None = None, **options: Any) -> LevelledTrunk:
    return levelled(build_trunk(name, stride=stride), **options)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels_module, "_STORES", {})


def remembering(seed: int = 1, levels: int = 2, **options: object) -> RememberedTrunk:
    torch.manual_seed(seed)
    made = build_levels(NAME, levels=levels, frozen="all", remember=True, **options)  # type: ignore[arg-type]
    assert isinstance(made, RememberedTrunk)
    return made


def computing(like: RememberedTrunk) -> LevelledTrunk:
    trunk = copy.deepcopy(like.trunk)
    return LevelledTrunk(trunk, like.levels).eval()


def pictures(count: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 64, 48, generator=torch.Generator().manual_seed(seed))


class Runs:
    """Counts the images that go through a trunk's first convolution."""

    def __init__(self, model: LevelledTrunk) -> None:
        self.pictures = 0
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.pictures += len(inputs[0])


def held() -> int:
    """Bytes of all remembered maps."""
    return sum(
        level.untyped_storage().nbytes()
        for store in levels_module._STORES.values()
        for kept in store.maps.values()
        for level in kept
    )


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for float16's rounding."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_trunk_gives_its_last_maps_finest_first(levels: int) -> None:
    model = build_levels(NAME, levels=levels).eval()
    with torch.no_grad():
        found, whole = model(pictures()), model.trunk.forward_levels(pictures())
    assert len(found) == levels and model.level_strides == (8, 16, 32)[-levels:]
    assert [one.shape[1] for one in found] == list(model.level_channels)
    for ours, theirs in zip(found, whole[-levels:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("levels", [0, 9])
def test_a_trunk_has_only_so_many_levels(levels: int) -> None:
    with pytest.raises(UserError, match=rf"levels must be in 1\.\.\d, got {levels}"):
        build_levels(NAME, levels=levels)


@pytest.mark.parametrize("levels", [1, 2])
def test_what_is_remembered_is_what_the_trunk_computes(levels: int) -> None:
    model = remembering(levels=levels)
    with torch.no_grad():
        expected = computing(model)(pictures())
    first = model(pictures())
    assert_near(first, expected)
    for ours, again in zip(first, model(pictures()), strict=True):
        assert torch.equal(ours, again)


def test_an_image_runs_through_the_trunk_once() -> None:
    model = remembering()
    runs = Runs(model)
    model(pictures(3))
    assert runs.pictures == 3
    model(pictures(3).flip(0))
    assert runs.pictures == 3
    mixed = torch.cat([pictures(2), pictures(2, seed=6), pictures(2, seed=6)])
    found = model(mixed)  # two known ones, and two new ones that come twice
    assert runs.pictures == 5
    with torch.no_grad():
        assert_near(found, computing(model)(mixed))


def test_images_that_differ_a_little_are_told_apart() -> None:
    base = pictures(1)[0]
    moved, swapped = base.clone(), base.clone()
    moved[2, 63, 47] = torch.nextafter(base[2, 63, 47], torch.tensor(9.0))
    swapped[0, 0, :2] = base[0, 0, :2].flip(0)
    others = [moved, swapped, base.flip(2), base.flip(0), -base, base.roll(1, 2)]
    keys = image_keys(torch.stack([base, *others, base]))
    assert len(set(keys)) == len(others) + 1 and keys[0] == keys[-1]
    black = torch.zeros(1, 3, 6, 8)
    assert image_keys(black) != image_keys(black.view(1, 3, 8, 6))
    channels_last = base[None].to(memory_format=torch.channels_last)
    assert image_keys(channels_last) == keys[:1]


def test_no_image_gives_no_map() -> None:
    model = remembering()
    for _ in range(2):
        shapes = [tuple(one.shape) for one in model(pictures()[:0])]
        assert shapes == [(0, c, 64 // s, 48 // s + (48 % s > 0)) for c, s in levels_of(model)]
    assert held() == 0


def levels_of(model: LevelledTrunk) -> list[tuple[int, int]]:
    return list(zip(model.level_channels, model.level_strides, strict=True))


def test_memory_stays_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = remembering(seed=1), remembering(seed=2)
    first(pictures(1))
    one = held()
    assert one == sum(c * (64 // s) * -(-48 // s) * 2 for c, s in levels_of(first))
    monkeypatch.setattr(levels_module, "LIMIT_BYTES", 3 * one + 1)
    first(pictures(2))
    second(pictures(2))  # the limit is for both together
    assert held() == 3 * one
    runs = Runs(second)
    found = second(pictures(2))
    assert runs.pictures == 1 and held() == 3 * one
    with torch.no_grad():
        assert_near(found, computing(second)(pictures(2)))
    assert sum(store.held for store in levels_module._STORES.values()) == held()


def test_trunks_of_equal_weights_share_what_they_remember() -> None:
    first, second = remembering(seed=1), remembering(seed=1)
    first(pictures())
    size, runs = held(), Runs(second)
    second(pictures())
    assert runs.pictures == 0 and held() == size


@pytest.mark.parametrize("options", [{"seed": 2}, {"stride": 16}, {"levels": 1}])
def test_other_trunks_share_nothing(options: dict[str, int]) -> None:
    first, second = remembering(), remembering(**options)
    first(pictures())
    runs = Runs(second)
    with torch.no_grad():
        expected = computing(second)(pictures())
    runs.pictures = 0
    assert_near(second(pictures()), expected)
    assert runs.pictures == 3


def test_loading_other_weights_forgets_what_the_old_ones_said() -> None:
    model, other = remembering(seed=1), remembering(seed=2)
    before = model(pictures())
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_near(model(pictures()), computing(other)(pictures()))
    model.load_state_dict(remembering(seed=1).state_dict(), assign=True)
    for ours, theirs in zip(model(pictures()), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_remembering_trunk_has_the_state_of_one_that_computes() -> None:
    model = remembering()
    plain = build_levels(NAME, levels=2)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_shares_the_store_until_its_weights_change() -> None:
    model = remembering()
    before = model(pictures())
    size = held()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        runs = Runs(copied)
        copied(pictures())
        assert runs.pictures == 0 and held() == size
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(copied(pictures())[0], before[0])
    assert torch.equal(model(pictures())[0], before[0])


def test_the_trunk_stays_in_evaluation() -> None:
    model = remembering(levels=1)
    holder = nn.Sequential(model).train()
    assert holder.training and model.training
    assert not any(module.training for module in model.trunk.modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(pictures())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_autocast_and_large_features_are_remembered_in_full() -> None:
    model = remembering()
    with torch.no_grad():
        expected = computing(model)(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(model(pictures()), expected)
    loud = remembering(seed=3)
    with torch.no_grad():
        last = [m for m in loud.trunk.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        assert last.weight is not None
        last.bias.fill_(1e6)
    assert all(one.isfinite().all() for one in loud(pictures()))


@pytest.mark.parametrize("frozen", [None, "features.3"])
def test_a_trunk_that_learns_cannot_remember(frozen: str | None) -> None:
    with pytest.raises(UserError, match=f"trunk {NAME}: remember needs frozen: all"):
        build_levels(NAME, frozen=frozen, remember=True)
    trunk = build_trunk(NAME)
    freeze(trunk, "features.3")
    with pytest.raises(UserError, match="the trunk learns"):
        RememberedTrunk(trunk)
