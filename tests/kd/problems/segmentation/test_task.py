"""Segmentation: the loss of each pixel with a class, answers on the maps' grid, void nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.config.recipes import Optimizer, Schedule, TermSection, Train
from kd.distillation.registry import TERMS as TERMS_BY_NAME
from kd.distillation.registry import TermKind
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import Term, build_term, distillation_losses, draw_modules
from kd.engine.loop import train_step
from kd.engine.state import Objective
from kd.errors import UserError
from kd.losses import hint, pixel_wise
from kd.problems.base import Batch, Classes, Rows
from kd.problems.segmentation import task as segmentation
from kd.problems.segmentation.task import Segmentation, on_grid
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training
from kd.transforms.hide import normalise
from kd.utils.images import VOID

CLASSES, STRIDE = 4, 8
TASK = Segmentation(num_classes=CLASSES)
WEIGHTS = {"cross_entropy": 1.0, "auxiliary": 0.4}


def make_batch(images: int = 3, size: tuple[int, int] = (24, 32)) -> dict[str, Tensor]:
    """Images with label maps that are void in whole squares of 8 pixels, none of them entirely."""
    labels = torch.randint(CLASSES, (images, *size), dtype=torch.uint8)
    squares = torch.rand(images, 1, size[0] // STRIDE, size[1] // STRIDE) < 0.4
    squares[:, :, 0, 0] = False
    void = F.interpolate(squares.float(), size, mode="nearest")[:, 0] > 0
    return {
        "images": torch.randint(256, (images, 3, *size), dtype=torch.uint8),
        "sizes": torch.tensor([size] * images),
        "image_ids": torch.arange(images),
        "label_maps": labels.masked_fill(void, VOID),
    }


def by_hand(logits: Tensor, truth: Tensor, smoothing: float) -> float:
    """The mean cross-entropy of the pixels with a class, one by one."""
    found = []
    for image, row, column in (truth != VOID).nonzero().tolist():
        log_probs = logits[image, :, row, column].log_softmax(dim=0)
        own = log_probs[int(truth[image, row, column])]
        found.append(-(1 - smoothing) * own - smoothing * log_probs.mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_pixels_with_a_class(smoothing: float) -> None:
    batch = make_batch(size=(16, 24))
    task = Segmentation(num_classes=CLASSES, label_smoothing=smoothing)
    logits, earlier = torch.randn(2, 3, CLASSES, 16, 24).unbind()
    losses = task.losses({"logits": logits, "auxiliary": earlier}, batch)
    assert {name: loss.unit for name, loss in losses.items()} == dict.fromkeys(WEIGHTS, "pixels")
    for name, maps in (("cross_entropy", logits), ("auxiliary", earlier)):
        expected = by_hand(maps, batch["label_maps"], smoothing)
        assert losses[name].value.item() == pytest.approx(expected, rel=1e-5)
    assert task.losses({"logits": logits}, batch).keys() == {"cross_entropy"}


@pytest.mark.parametrize("stride", [8, 16])
def test_an_edge_stays_where_it_is_on_whole_places_and_other_crops_are_refused(stride: int) -> None:
    below, edge = 48, 32  # rows; above the edge a place is of class 0
    places = torch.full((1, 2, below // stride, 32 // stride), -1.0)
    places[:, 0, : edge // stride] = places[:, 1, edge // stride :] = 1.0
    rows = on_grid(places, (below, 32)).argmax(dim=1)[0, :, 0]
    assert rows.tolist() == [0] * edge + [1] * (below - edge)
    batch = {"label_maps": torch.zeros(1, 40, 32).byte()}
    logits = F.pad(places, (0, 0, 0, -(-40 // stride) - places.shape[2]))
    task = Segmentation(num_classes=2)
    if stride == 8:
        task.losses({"logits": logits}, batch)
        return
    with pytest.raises(UserError, match=r"data\.crop: crops are 40 pixels high.*48 or 32"):
        task.losses({"logits": logits}, batch)


def test_rare_classes_weigh_more_and_a_pixel_one_on_average() -> None:
    fractions = (0.7, 0.2, 0.08, 0.02)  # the median is 0.14
    batch = make_batch(size=(16, 24))
    logits = torch.randn(3, CLASSES, 16, 24)
    task = Segmentation(num_classes=CLASSES, class_weights=1.0, pixel_fractions=fractions)
    raw = [0.14 / 0.7, 0.14 / 0.2, 0.14 / 0.08, 0.14 / 0.02]
    scale = sum(w * s for w, s in zip(raw, fractions, strict=True))
    found, truth = [], batch["label_maps"]
    for image, row, column in (truth != VOID).nonzero().tolist():
        own = int(truth[image, row, column])
        log_prob = logits[image, :, row, column].log_softmax(dim=0)[own]
        found.append(-float(log_prob) * raw[own] / scale)
    loss = task.losses({"logits": logits}, batch)["cross_entropy"]
    assert loss.unit == "pixels"
    assert loss.value.item() == pytest.approx(sum(found) / len(found), rel=1e-5)
    with pytest.raises(UserError, match=r"class_weights must be in 0\.\.1, got 2"):
        Segmentation(num_classes=CLASSES, class_weights=2.0)


def test_a_divergence_may_weigh_pixels_as_cross_entropy_does() -> None:
    fractions, batch = (0.7, 0.2, 0.08, 0.02), make_batch()
    task = Segmentation(num_classes=CLASSES, class_weights=0.5, pixel_fractions=fractions)
    ours, theirs = torch.randn(2, 3, CLASSES, 24, 32).unbind()
    term = build_term(TermSection(name="pixel_wise_weighted", weight=1.0))
    both = {"logits": ours}, {"logits": theirs}
    found = distillation_losses([term], *both, task, batch, task.masks(batch))[
        "pixel_wise_weighted"
    ]
    truth, p, q = batch["label_maps"], ours.log_softmax(1), theirs.log_softmax(1)
    weights = F.one_hot(truth.long() % VOID, CLASSES).float() @ torch.tensor(fractions) ** -0.5
    weights = weights / sum(fraction**0.5 for fraction in fractions)
    expected = ((q.exp() * (q - p)).sum(1) * weights)[truth != VOID].mean()
    assert found.unit == "pixels"
    torch.testing.assert_close(found.value, expected)
    assert "class_weights" not in TASK.masks(batch)


def test_weights_of_classes_are_made_once_and_only_where_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def counted(fractions: Sequence[float], *, power: float) -> list[float]:
        made.append(power)
        return [fraction**-power for fraction in fractions]

    monkeypatch.setattr(segmentation, "median_frequency", counted)
    fractions = (0.6, 0.25, 0.1, 0.05)  # of no other test: they are kept
    task = Segmentation(num_classes=CLASSES, class_weights=0.25, pixel_fractions=fractions)
    for _ in range(3):
        masks = task.masks(make_batch())
    assert not made
    for _ in range(3):
        masks["class_weights"]((24, 32))
        batch = make_batch()
        images = len(batch["label_maps"])
        task.losses({"logits": torch.randn(images, CLASSES, 24, 32)}, batch)
    assert made == [0.25]


def test_coarse_logits_are_brought_to_the_maps_grid() -> None:
    # Two places of one row: between their middles a pixel's logits are between theirs.
    logits = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    truth = torch.tensor([[[0, 1, VOID, 1]]], dtype=torch.uint8)
    task = Segmentation(num_classes=2)
    loss = task.losses({"logits": logits}, {"label_maps": truth})["cross_entropy"].value
    expected = [math.log(2), math.log1p(math.e), math.log1p(math.exp(4.0))]
    assert loss.item() == pytest.approx(sum(expected) / 3)
    assert torch.equal(on_grid(logits, (1, 2)), logits)


def test_half_precision_is_summed_in_float32() -> None:
    batch = make_batch(4, size=(128, 128))
    logits = torch.randn(4, CLASSES, 128, 128)
    exact = TASK.losses({"logits": logits}, batch)["cross_entropy"].value
    low = TASK.losses({"logits": logits.bfloat16()}, batch)["cross_entropy"].value
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=2e-3)


def test_a_batch_without_a_class_costs_nothing_and_teaches_nothing() -> None:
    batch = make_batch()
    batch["label_maps"].fill_(VOID)
    logits = torch.randn(3, CLASSES, 3, 4, requires_grad=True)
    loss = TASK.losses({"logits": logits}, batch)["cross_entropy"].value
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_void_pixels_have_no_gradient() -> None:
    batch = make_batch()
    logits = torch.randn(3, CLASSES, 24, 32, requires_grad=True)
    TASK.losses({"logits": logits}, batch)["cross_entropy"].value.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(touched, batch["label_maps"] != VOID)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_wrong_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"label_smoothing must be in \[0, 1\), got"):
        Segmentation(num_classes=2, label_smoothing=fraction)


def test_inputs_are_whole_normalised_images() -> None:
    batch = make_batch()
    (images,) = TASK.inputs(batch)
    assert torch.equal(images, normalise(batch["images"]))


def test_answers_are_on_the_label_maps_grid() -> None:
    batch = {"label_maps": torch.zeros(2, 13, 17, dtype=torch.uint8),
             "own_sizes": torch.tensor([[13, 17]] * 2)}  # fmt: skip
    logits = torch.randn(2, CLASSES, 3, 4)
    found = TASK.decode({"logits": logits}, batch)
    finer = F.interpolate(logits, (13, 17), mode="bilinear", align_corners=False)
    assert found.dtype == torch.int64 and torch.equal(found, finer.argmax(dim=1))
    metric = TASK.metric(Classes(("a", "b", "c", "d")))
    metric.take(found, {**batch, "image_ids": torch.arange(2)})
    assert metric.compute()["pixel_accuracy"] == pytest.approx((found == 0).float().mean().item())


def test_answers_between_places_of_half_precision_are_no_ties() -> None:
    logits = torch.tensor([[[[100.0, 100.0]], [[100.0, 100.5]]]]).bfloat16()  # one digit apart
    batch = {"own_sizes": torch.tensor([[8, 16]])}
    answers = TASK.decode({"logits": logits}, batch)
    assert (answers[..., :4] == 0).all() and (answers[..., 4:] == 1).all()


def test_the_valid_mask_says_where_there_is_a_class_on_any_grid() -> None:
    batch = make_batch()
    valid = TASK.masks(batch)["valid"]
    assert torch.equal(valid((24, 32)), batch["label_maps"] != VOID)
    assert torch.equal(valid((3, 4)), batch["label_maps"][:, 4::8, 4::8] != VOID)
    assert valid((3, 4)).dtype == torch.bool and not valid((3, 4)).all()


def test_units_are_pixels_with_a_class_and_images() -> None:
    batch = make_batch()
    batch["label_maps"][2] = VOID
    counts = TASK.counts(batch)
    assert counts["images"] == 3 and counts["valid_images"] == 2
    assert counts["pixels"] == (batch["label_maps"] != VOID).sum()
    assert "hidden" not in counts


TERMS = ("pixel_wise", "pair_wise", "channel_wise", "hint", "holistic")


def term_of(name: str) -> Term:
    options: dict[str, Any] = {"widths": [4, 8]} if name == "holistic" else {}
    options |= {"kernel": 1} if name == "pair_wise" else {}
    return build_term(
        TermSection(name=name, weight=1.0, student="logits", teacher="logits", options=options)
    )


@pytest.mark.parametrize("name", TERMS)
def test_a_term_never_sees_void(name: str) -> None:
    batch = make_batch()
    ours, theirs = torch.randn(2, 3, CLASSES, 24, 32).unbind()
    [term] = draw_modules([term_of(name)], {"logits": theirs})
    void = (batch["label_maps"] == VOID)[:, None].expand_as(ours)

    def value_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        both = {"logits": leaf}, {"logits": teacher}
        loss = distillation_losses([term], *both, TASK, batch, TASK.masks(batch))[name].value
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    value, gradient = value_and_gradient(ours, theirs)
    assert not gradient[void].any() and gradient[~void].abs().sum() > 0
    other, again = value_and_gradient(ours.masked_fill(void, 1e4), theirs)
    assert torch.equal(value, other) and torch.equal(gradient, again)


def test_score_maps_of_another_grid_are_brought_to_the_teachers() -> None:
    batch = make_batch()
    ours, theirs = torch.randn(3, CLASSES, 12, 16), torch.randn(3, CLASSES, 3, 4)
    outputs = {"logits": ours, "norm3": ours}, {"logits": theirs, "pyramid": theirs}
    found = distillation_losses([term_of("pixel_wise")], *outputs, TASK, batch, TASK.masks(batch))
    small = F.interpolate(ours, (3, 4), mode="bilinear", align_corners=False, antialias=True)
    valid = TASK.masks(batch)["valid"]((3, 4))
    assert found["pixel_wise"].unit == "pixels"
    assert torch.equal(found["pixel_wise"].value, pixel_wise(small, theirs, valid=valid))
    layers = build_term(
        TermSection(name="pair_wise", weight=1.0, student="norm3", teacher="pyramid")
    )
    with pytest.raises(UserError, match=r"pair_wise: .*12.*16.*3.*4"):  # adapters are for that
        distillation_losses([layers], *outputs, TASK, batch, TASK.masks(batch))


class SmallNetwork(nn.Module):
    """Score maps and auxiliary ones from squares of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, STRIDE, stride=STRIDE)
        self.head, self.aside = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(6, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`logits` and `auxiliary`, (N, C, H/8, W/8)."""
        features = self.trunk(images).relu()
        return {"logits": self.head(features), "auxiliary": self.aside(features)}


class Hearsay:
    """A teacher whose maps follow from the images alone."""

    def __call__(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        pooled = F.avg_pool2d(normalise(batch["images"]), STRIDE)
        maps = torch.cat([torch.sin(3 * pooled), torch.cos(5 * pooled)], dim=1)
        return {"logits": 4 * maps[:, :CLASSES], "map": maps}


def after_one_step(batches: Sequence[Batch], names: tuple[str | Term, ...]) -> dict[str, Tensor]:
    """Weights after a step at rate 1 without momentum: the start less the gradient."""
    torch.manual_seed(3)
    terms = [
        build_term(TermSection(name="pair_wise", weight=9.0, student="trunk", teacher="map"))
        if name == "pair_wise"
        else name
        if isinstance(name, Term)
        else term_of(name)
        for name in names
    ]
    terms = draw_modules(terms, Hearsay()(batches[0], Rows()))
    train = Train(
        optimizer=Optimizer(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0),
        schedule=Schedule(name="constant", warmup=0.0),
        clip_norm=0.0,
        channels_last=False,
        precision="fp32",
    )
    layers = ["trunk"] if "pair_wise" in names else []
    model = AdaptedStudent(SmallNetwork(), layers)
    training = start_training(make_accelerator("fp32"), model, train, 10)
    objective = Objective(TASK, WEIGHTS, terms, Hearsay())
    training.model.train()
    train_step(training, batches, objective, objective.weights_at(0.0))
    return {name: tensor.clone() for name, tensor in training.unwrapped.state_dict().items()}


def copied_hint(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """A user's own loss, a mean over the valid places."""
    return hint(student, teacher, valid=valid)


OWN = TermKind(copied_hint, "a copy of hint", unit="place", valid=True)


def channel_means(student: Tensor, teacher: Tensor) -> Tensor:
    """A user's own loss, a mean over images, that says nothing of itself."""
    return (student.mean(dim=(2, 3)) - teacher.mean(dim=(2, 3))).square().mean()


def own_term(name: str, **more: Any) -> Term:
    return build_term(
        TermSection(name=name, weight=1.0, student="logits", teacher="logits", **more)
    )


@pytest.mark.parametrize("listed", [True, False], ids=["in TERMS", "by its path"])
def test_a_loss_of_the_users_own_has_the_whole_batchs_gradient(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mine" if listed else f"{__name__}:OWN"
    if listed:
        monkeypatch.setitem(TERMS_BY_NAME, "mine", OWN)
    whole = make_batch(4)
    whole["label_maps"][0, :, 8:] = VOID
    parts = [{key: value[part] for key, value in whole.items()}
             for part in (slice(0, 1), slice(1, 4))]  # fmt: skip
    built_in = after_one_step([whole], ("hint",))
    expected, found = (after_one_step(part, (own_term(name),)) for part in ([whole], parts))
    for key, value in built_in.items():
        assert torch.equal(expected[key], value)
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_a_plain_function_is_a_loss_if_the_recipe_says_what_its_mean_is_over() -> None:
    name = f"{__name__}:channel_means"
    with pytest.raises(UserError, match="set `unit`, what the loss is a mean over"):
        own_term(name)
    with pytest.raises(UserError, match="the unit is 'place'; remove the key `unit`"):
        own_term(f"{__name__}:OWN", unit="image")
    whole = make_batch(4)
    parts = [{key: value[part] for key, value in whole.items()}
             for part in (slice(0, 1), slice(1, 4))]  # fmt: skip
    term = own_term(name, unit="image")
    assert term.name == name
    expected, found = (after_one_step(part, (term,)) for part in ([whole], parts))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("empty", [False, True], ids=["", "one image all void"])
@pytest.mark.parametrize(
    "names", [(), ("pixel_wise",), ("pair_wise",), ("channel_wise",), ("hint",)]
)
def test_unequal_micro_batches_give_the_whole_batchs_gradient(
    names: tuple[str, ...], empty: bool
) -> None:
    whole = make_batch(4)
    whole["label_maps"][0, :, 8:] = VOID  # much less to learn from than the others
    if empty:
        whole["label_maps"][2] = VOID
    parts = [{key: value[part] for key, value in whole.items()}
             for part in (slice(0, 1), slice(1, 4))]  # fmt: skip
    expected, found = after_one_step([whole], names), after_one_step(parts, names)
    torch.manual_seed(3)
    start = SmallNetwork().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
        assert (value - start[key.removeprefix("student.")]).abs().max() > 1e-4
