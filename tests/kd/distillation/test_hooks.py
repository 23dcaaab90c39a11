"""Feature taps: what they give, refuse and leave."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from kd.distillation.hooks import FeatureTaps
from kd.errors import UserError


class Pyramid(nn.Module):
    """Two maps by name, as a feature pyramid gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 1)
        self.coarse = nn.Conv2d(3, 4, 1, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.fine(images), "pool": self.coarse(images)}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.neck = Pyramid()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps: dict[str, Tensor] = self.neck(self.stem(images))
        return maps["0"].mean() + maps["pool"].mean()


class Holder(nn.Module):
    """What holds a model and its taps, as an adapted student does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Network()
        self.taps = FeatureTaps(self.model, ["stem.0"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.model(images)
        return self.taps.collect()


IMAGES = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize("training", [True, False])
def test_taps_collect_by_path_and_by_key_in_train_and_eval(training: bool) -> None:
    model = Network().train(training)
    taps = FeatureTaps(model, ["stem.0", "neck.0", "neck.pool", "neck.fine"])
    model(IMAGES)
    found = taps.collect()
    assert list(found) == ["stem.0", "neck.0", "neck.pool", "neck.fine"]
    torch.testing.assert_close(found["stem.0"], model.get_submodule("stem.0")(IMAGES))
    torch.testing.assert_close(found["neck.0"], found["neck.fine"])
    assert found["neck.pool"].shape == (2, 4, 2, 2)


def test_gradients_flow_through_what_is_collected() -> None:
    model = Network()
    taps = FeatureTaps(model, ["neck.pool"])
    model(IMAGES)
    taps.collect()["neck.pool"].sum().backward()
    gradient = model.get_parameter("stem.0.weight").grad
    assert gradient is not None and gradient.any()


def test_collecting_and_clearing_empty_the_taps() -> None:
    model = Network()
    taps = FeatureTaps(model, ["stem.0"])
    for empty in (taps.collect, taps.clear):
        model(IMAGES)
        empty()
        with pytest.raises(UserError, match=r"layer 'stem.0' did not run"):
            taps.collect()


def test_the_last_of_several_passes_counts() -> None:
    model = Network()
    taps = FeatureTaps(model, ["stem"])
    model(IMAGES)
    model(IMAGES[:1])
    assert len(taps.collect()["stem"]) == 1


def test_removed_taps_collect_nothing_and_leave_no_hooks() -> None:
    model = Network()
    taps = FeatureTaps(model, ["stem.0", "neck.pool"])
    taps.remove()
    model(IMAGES)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match="did not run"):
        taps.collect()


def test_two_taps_on_one_model_do_not_disturb_each_other() -> None:
    model = Network()
    first, second = FeatureTaps(model, ["stem.0"]), FeatureTaps(model, ["stem.0", "stem.2"])
    first.remove()
    model(IMAGES)
    assert list(second.collect()) == ["stem.0", "stem.2"]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("stem.9", "stem"),
        ("layer4", "known"),
        ("nek.pool", "neck"),
        ("neck.fien", "'neck.fine'"),
        ("stem.0.weight", "'stem.0'"),
        ("module.stem.0", "'stem.0'"),
        ("", "known"),
    ],
)
def test_an_unknown_layer_lists_the_nearest_before_anything_runs(wrong: str, hint: str) -> None:
    with pytest.raises(UserError, match="unknown layer") as caught:
        FeatureTaps(Network(), [wrong])
    assert hint in str(caught.value)


def test_messages_say_whose_layer_it_is() -> None:
    with pytest.raises(UserError, match=r"^teacher RUN \(cnn\): unknown layer 'layer4'"):
        FeatureTaps(Network(), ["layer4"], called="teacher RUN (cnn)")
    model = Network()
    taps = copy.deepcopy(FeatureTaps(model, ["neck.2"], called="student"))
    taps.model(IMAGES)
    said = r"^student: layer 'neck' has no output '2'; known: 0, pool\. .*`levels`.*both pyramids"
    with pytest.raises(UserError, match=said):
        taps.collect()


def test_a_missing_key_lists_the_keys() -> None:
    model = Network()
    taps = FeatureTaps(model, ["neck.p5"])
    model(IMAGES)
    with pytest.raises(UserError, match=r"layer 'neck' has no output 'p5'; known: 0, pool"):
        taps.collect()


def test_a_dict_without_a_key_says_which_there_are() -> None:
    model = Network()
    taps = FeatureTaps(model, ["neck"])
    model(IMAGES)
    with pytest.raises(UserError, match="returns a dict, not a tensor; select one of 0, pool"):
        taps.collect()


def test_a_layer_that_does_not_run_is_named() -> None:
    model = Network()
    taps = FeatureTaps(model, ["unused"])
    model(IMAGES)
    with pytest.raises(UserError, match="layer 'unused' did not run"):
        taps.collect()


def test_a_copy_of_a_tapped_model_does_not_write_into_the_originals_taps() -> None:
    model = Network()
    taps = FeatureTaps(model, ["stem.0"])
    model(IMAGES)
    copied = copy.deepcopy(model)
    copied(IMAGES[:1])
    assert len(taps.collect()["stem.0"]) == 2
    copied(IMAGES)
    with pytest.raises(UserError, match="did not run"):
        taps.collect()


def test_a_copy_of_model_and_taps_together_has_taps_of_its_own() -> None:
    holder = Holder()
    copied = copy.deepcopy(holder)
    with torch.no_grad():
        copied.model.get_parameter("stem.0.weight").zero_()
    assert copied.taps.model is copied.model
    found = copied(IMAGES)["stem.0"]
    torch.testing.assert_close(found, copied.model.get_submodule("stem.0")(IMAGES))
    torch.testing.assert_close(
        holder(IMAGES)["stem.0"], holder.model.get_submodule("stem.0")(IMAGES)
    )
    holder.taps.clear()
    copied.model(IMAGES)
    with pytest.raises(UserError, match="did not run"):
        holder.taps.collect()


def test_a_dropped_model_is_freed_although_it_was_tapped() -> None:
    model = Network()
    taps = FeatureTaps(model, ["stem.0"])
    model(IMAGES)
    taps.collect()
    freed: list[bool] = []
    finalizer = weakref.finalize(model, freed.append, True)
    del model, taps
    gc.collect()
    assert freed and not finalizer.alive
