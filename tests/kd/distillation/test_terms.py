"""Terms: built from names, weighted over training, summed to one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.config.recipes import TermSection, Weighted
from kd.distillation.registry import TERMS
from kd.distillation.terms import (
    Term,
    build_term,
    check_weights,
    distillation_losses,
    draw_modules,
    layer_masks,
    weighted_sum,
)
from kd.errors import UserError
from kd.losses import channel_wise, decoupled, hint, imitation, kl_logits, pair_wise
from kd.problems.base import Mean
from kd.problems.objects.task import Classification

TASK = Classification(num_classes=4)


def asked(image_of: list[int], labels: list[int] | None = None) -> dict[str, Tensor]:
    """What a batch says of its hidden objects: on which image each is, and its label."""
    return {
        "hidden": torch.arange(len(image_of)),
        "image_of": torch.tensor(image_of),
        "labels": torch.tensor(labels or image_of),
        "images": torch.randint(256, (image_of[-1] + 1, 3, 32, 32), dtype=torch.uint8),
    }


@pytest.mark.parametrize("name", TERMS)
def test_every_term_builds_and_computes(name: str) -> None:
    kind = TERMS[name]
    term = build_term(
        TermSection(
            name=name, weight=1.0, student="ours" if kind.maps else kind.student, teacher="theirs"
        )
    )
    if kind.maps:
        channels = 1 if name == "saliency" else 4
        ours = torch.rand(2, channels, 16, 16, requires_grad=True)
        theirs = torch.rand(3, channels, 16, 16)
    else:
        count = 12 if kind.own_class else 6  # numbers of four for each class and the background
        ours = torch.randn(3, count, requires_grad=True)
        theirs = torch.randn(3, count).log_softmax(1)
    names = ("ring", "imitation", "inside", "whole", "class_weights")
    masks = dict.fromkeys(names, lambda size: torch.ones(3, *size))
    losses = distillation_losses(
        draw_modules([term], {"theirs": theirs}),
        {term.student: ours},
        {"theirs": theirs},
        TASK,
        asked([0, 1, 1], [1, -1, 0]),
        masks,
    )
    value = losses[name].value
    assert value.ndim == 0
    assert value >= 0 or name == "holistic"  # a critic's liking has no zero
    value.backward()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


def test_logit_terms_compare_rows_of_hidden_objects() -> None:
    term = build_term(TermSection(name="context_logits", weight=2.0, options={"temperature": 2.0}))
    ours, theirs = torch.randn(3, 6), torch.randn(3, 6)
    losses = distillation_losses(
        [term], {"context": ours}, {"posterior": theirs}, TASK, asked([0, 1, 2]), {}
    )
    expected = kl_logits(ours, theirs, temperature=2.0)
    assert losses == {"context_logits": Mean(losses["context_logits"].value, "hidden")}
    assert torch.equal(losses["context_logits"].value, expected)


def test_a_feature_term_repeats_an_images_map_for_each_of_its_objects() -> None:
    ours, theirs = torch.rand(2, 4, 3, 3), torch.rand(3, 4, 3, 3)
    image_of = torch.tensor([0, 1, 1])
    ring = torch.rand(3, 3, 3)
    sizes = []

    def mask(size: tuple[int, int]) -> torch.Tensor:
        sizes.append(size)
        return ring

    terms = [
        build_term(
            TermSection(name="context_features", weight=1.0, student="layer4", teacher="neck")
        ),
        build_term(TermSection(name="pair_wise", weight=1.0, student="layer4", teacher="neck")),
    ]
    losses = distillation_losses(
        terms, {"layer4": ours}, {"neck": theirs}, TASK, asked(image_of.tolist()), {"ring": mask}
    )
    assert sizes == [(3, 3)]
    assert losses["context_features"].unit == "ring"
    assert torch.equal(losses["context_features"].value, imitation(ours[image_of], theirs, ring))
    assert losses["pair_wise"].unit == "hidden"
    assert torch.equal(losses["pair_wise"].value, pair_wise(ours[image_of], theirs))


def test_a_layer_is_looked_at_where_any_of_its_readers_masks_says_so() -> None:
    def term(name: str, layer: str) -> Term:
        return build_term(
            TermSection(
                name=name, label=f"{name}_{layer}", weight=1.0, student=layer, teacher="theirs"
            )
        )

    terms = [term("imitation", "both"), term("context_features", "both"), term("hint", "all"),
             term("imitation_inside", "all"), term("imitation_inside", "boxes")]  # fmt: skip
    masks = {
        "imitation": lambda grid: torch.tensor([[[True, False, False]]]),
        "ring": lambda grid: torch.tensor([[[0.0, 0.5, 0.0]]]),
        "inside": lambda grid: torch.tensor([[[False, False, True]]]),
    }
    found = layer_masks(terms, masks)
    assert found.keys() == {"both", "boxes"}
    assert found["both"]((1, 3)).tolist() == [[[True, True, False]]]
    assert found["boxes"]((1, 3)).tolist() == [[[False, False, True]]]


def test_an_output_that_is_not_there_is_named_with_those_that_are() -> None:
    term = build_term(TermSection(name="context_logits", weight=1.0))
    logits = torch.zeros(1, 2)
    with pytest.raises(UserError, match="the student has no output 'context'; it has: logits"):
        distillation_losses([term], {"logits": logits}, {"posterior": logits}, TASK, asked([0]), {})
    with pytest.raises(UserError, match="the teacher has no output 'posterior'; it has: neck"):
        distillation_losses([term], {"context": logits}, {"neck": logits}, TASK, asked([0]), {})


@pytest.mark.parametrize(("name", "ours"), [("object_logits", 6), ("object_boxes", 24)])
def test_what_is_said_of_boxes_is_compared_between_heads_of_one_kind(name: str, ours: int) -> None:
    term = build_term(TermSection(name=name, weight=1.0))
    given = {term.student: torch.randn(3, ours)}, {term.teacher: torch.randn(3, 5)}
    said = rf"{name}: student \(3, {ours}\) and teacher \(3, 5\) differ .*both two.*background"
    with pytest.raises(UserError, match=said):
        distillation_losses([term], *given, TASK, asked([0, 1, 1]), {})


def test_a_wrong_term_is_refused_when_it_is_built() -> None:
    with pytest.raises(UserError, match=r"unknown distillation term 'context_logit'.*did you mean"):
        build_term(TermSection(name="context_logit", weight=1.0))
    with pytest.raises(UserError, match="losses: context_logits: unknown option 'temprature'"):
        build_term(TermSection(name="context_logits", weight=1.0, options={"temprature": 2.0}))
    with pytest.raises(UserError, match="option 'temperature' must be a valid number, got '2'"):
        build_term(TermSection(name="context_logits", weight=1.0, options={"temperature": "2"}))
    with pytest.raises(UserError, match="losses: pair_wise: the keys `student` and `teacher`"):
        build_term(TermSection(name="pair_wise", weight=1.0, student="layer4"))


@pytest.mark.parametrize(
    ("ramp", "until", "start", "expected"),
    [
        ("constant", 1.0, 0.0, [2.0, 2.0, 2.0, 2.0]),
        ("linear", 0.5, 0.0, [0.0, 1.0, 2.0, 2.0]),
        ("linear", 1.0, 0.5, [1.0, 1.25, 1.5, 2.0]),
        ("cosine", 0.5, 0.0, [0.0, 1.0, 2.0, 2.0]),
        ("cosine", 1.0, 0.0, [0.0, 1.0 - math.sqrt(0.5), 1.0, 2.0]),
        ("off_after", 0.5, 0.0, [2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_a_weight_runs_over_training(
    ramp: Any, until: float, start: float, expected: list[float]
) -> None:
    term = build_term(
        TermSection(
            name="output_kd", weight=2.0, schedule=Weighted(name=ramp, until=until, start=start)
        )
    )
    weights = [term.weight_at(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert weights == pytest.approx(expected)


def test_a_weight_may_run_over_a_number_of_steps() -> None:
    off = build_term(
        TermSection(name="output_kd", weight=2.0, schedule=Weighted(name="off_after", until_step=3))
    )
    assert [off.weight_at(step / 9, step) for step in range(5)] == [2.0, 2.0, 2.0, 0.0, 0.0]
    rise = build_term(
        TermSection(name="output_kd", weight=2.0, schedule=Weighted(name="linear", until_step=4))
    )
    assert [rise.weight_at(0.9, step) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]


def test_the_total_is_each_loss_by_its_weight_and_its_units_scale() -> None:
    first, second = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    losses = {"a": Mean(first, "labelled"), "b": Mean(second, "hidden")}
    total = weighted_sum(
        losses, {"a": 1.0, "b": 10.0}, {"labelled": torch.tensor(0.5), "hidden": 2}
    )
    assert total.item() == 0.5 * 1.0 * 2.0 + 2 * 10.0 * 3.0
    total.backward()
    assert (first.grad, second.grad) == (torch.tensor(0.5), torch.tensor(20.0))


def test_a_loss_without_a_weight_or_the_reverse_is_refused() -> None:
    with pytest.raises(UserError, match=r"each loss needs one weight; unmatched: b, c"):
        check_weights({"a": 0, "b": 0}, {"a": 1.0, "c": 1.0})
    check_weights({"a": 0}, {"a": 1.0})


@pytest.mark.parametrize(("name", "loss"), [("channel_wise", channel_wise), ("hint", hint)])
def test_losses_between_maps_compare_each_hidden_object_with_its_image(
    name: str, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    term = build_term(TermSection(name=name, weight=1.0, student="layer4", teacher="neck"))
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)
    image_of = torch.tensor([0, 1, 1])
    losses = distillation_losses(
        [term], {"layer4": ours}, {"neck": theirs}, TASK, asked(image_of.tolist()), {}
    )
    assert losses[name].unit == "hidden"
    assert torch.equal(losses[name].value, loss(ours[image_of], theirs))


def test_a_term_that_needs_labels_speaks_for_the_labelled() -> None:
    term = build_term(TermSection(name="decoupled", weight=1.0, options={"beta": 2.0}))
    ours, theirs = torch.randn(2, 3, 4).unbind()
    labels = torch.tensor([3, -1, 0])
    batch = asked([0, 1, 2], labels.tolist())
    losses = distillation_losses([term], {"logits": ours}, {"posterior": theirs}, TASK, batch, {})
    assert losses["decoupled"].unit == "labelled"
    assert torch.equal(losses["decoupled"].value, decoupled(ours, theirs, labels, beta=2.0))
