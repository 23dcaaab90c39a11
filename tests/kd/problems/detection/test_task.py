"""Detection: masks on the levels of a pyramid, what is counted, what a teacher is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from kd.config.recipes import Adapter, Optimizer, Schedule, TermSection, Train
from kd.distillation import adapters
from kd.distillation.student import AdaptedStudent, adapt_student
from kd.distillation.targets import CachedPosteriors, CachedTeacher, LiveTeacher, Teachers
from kd.distillation.terms import Term, build_term, distillation_losses
from kd.engine.loop import forward_losses, train_step
from kd.engine.state import Objective, Training
from kd.errors import UserError
from kd.losses.box_distillation import box_distance, own_class_deltas
from kd.losses.imitation import anchor_grid, imitation_mask
from kd.nn.detectors.contract import Level
from kd.nn.detectors.faster_rcnn import FasterRCNN
from kd.nn.networks import DETECTORS
from kd.problems.base import cached_masks
from kd.problems.detection.task import Detection, anchor_sides, assigned
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training
from kd.transforms.hide import normalise

SIZE, CLASSES = 64, 3
LEVELS = (Level(4, ((8.0, 8.0),), 0.0), Level(8, ((16.0, 16.0),), 0.0))
SMALL = {"trunk": "resnet18", "width": 0.25, "levels": [2, 3], "scales": [2.0],
         "canonical": 32.0, "hidden": 32, "region_size": 3, "candidates": [50, 50],
         "proposals": [40, 20], "sampled_anchors": 32, "sampled_regions": 32}  # fmt: skip
LOSSES = ("objectness", "proposal_boxes", "classes", "boxes")


def make_batch(boxes: list[list[list[float]]]) -> dict[str, Tensor]:
    """Random images with these boxes, 48 pixels high inside the frame."""
    flat = [box for image in boxes for box in image]
    owners = [place for place, image in enumerate(boxes) for _ in image]
    return {
        "images": torch.randint(256, (len(boxes), 3, SIZE, SIZE), dtype=torch.uint8),
        "sizes": torch.tensor([[48, SIZE]] * len(boxes)),
        "image_ids": torch.arange(len(boxes)),
        "boxes": torch.tensor(flat).view(-1, 4),
        "labels": torch.arange(len(flat)) % CLASSES,
        "image_of": torch.tensor(owners, dtype=torch.int64),
        "object_ids": torch.arange(len(flat)),
        "labelled": torch.ones(len(boxes), dtype=torch.bool),
    }


# A small object, a large one, none.
BOXES = [[[8.0, 8.0, 16.0, 17.0]], [[10.0, 4.0, 30.0, 26.0], [40.0, 20.0, 47.0, 27.0]], []]


def detector(channels: int = 16, **options: Any) -> FasterRCNN:
    chosen = SMALL | options
    network = DETECTORS["fasterrcnn"].load()(num_classes=CLASSES, channels=channels, **chosen)
    assert isinstance(network, FasterRCNN)
    return network


def task_of(
    model: FasterRCNN,
    *,
    wanted: Literal["detections", "objects", "features"] = "detections",
    near_boxes: bool = False,
) -> Detection:
    return Detection(
        num_classes=CLASSES, levels=model.levels, loss_units=model.loss_units, wanted=wanted,
        near_boxes=near_boxes,
    )  # fmt: skip


def test_a_box_belongs_to_the_level_with_an_anchor_of_its_shape() -> None:
    boxes = torch.tensor([[0, 0, 8, 9], [0, 0, 20, 22], [5, 5, 5.5, 5.5], [0, 0, 64, 64]])
    assert assigned(boxes, LEVELS).tolist() == [0, 1, 0, 1]
    # 8 x 16 has an IoU of a half with both: the finer one.
    assert assigned(torch.tensor([[0.0, 0.0, 8.0, 16.0]]), LEVELS).tolist() == [0]
    assert assigned(torch.empty(0, 4), LEVELS).shape == (0,)


def test_a_level_without_anchors_has_those_of_four_strides() -> None:
    assert anchor_sides(LEVELS[0]) == ((8.0, 8.0),)
    sides = torch.tensor(anchor_sides(Level(8)))
    torch.testing.assert_close(sides.prod(dim=1), torch.full((3,), 32.0**2))
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))


def test_the_imitation_mask_of_a_level_is_that_of_its_boxes_and_anchors() -> None:
    batch, task = make_batch(BOXES), Detection(num_classes=CLASSES, levels=LEVELS)
    found = task.masks(batch)["imitation"]
    for level, (stride, own) in enumerate(((4, [[0], [1], []]), (8, [[], [0], []]))):
        grid = (SIZE // stride, SIZE // stride)
        anchors = anchor_grid(*grid, stride=stride, sides=LEVELS[level].sides, offset=0.0)
        each = [torch.tensor([BOXES[n][b] for b in rows]).view(-1, 4) for n, rows in enumerate(own)]
        assert torch.equal(found(grid), imitation_mask(each, anchors))
        assert found(grid)[0].any().item() is (level == 0)
        assert not found(grid)[2].any()
    loose, strict = (
        Detection(num_classes=CLASSES, levels=LEVELS, psi=psi).masks(batch)["imitation"]((16, 16))
        for psi in (0.2, 0.9)
    )
    assert loose.sum() > found((16, 16)).sum() >= strict.sum() > 0
    assert (loose | strict).equal(loose)


def test_terms_of_a_psi_of_their_own_have_masks_of_their_own() -> None:
    layer: dict[str, Any] = dict.fromkeys(("student", "teacher"), "network.backbone.0")
    terms = [
        build_term(
            TermSection(
                name="imitation", weight=1.0, label=f"at {psi}", options={"psi": psi}, **layer
            )
        )
        for psi in (0.8, 0.2)
    ] + [build_term(TermSection(name="imitation", weight=1.0, **layer))]
    batch, plain = make_batch(BOXES), Detection(num_classes=CLASSES, levels=LEVELS)
    task = plain.for_terms(terms)
    assert task.psis == (0.2, 0.8)
    masks = task.masks(batch)
    for term, psi in zip(terms, (0.8, 0.2, 0.5), strict=True):
        assert term.mask is not None
        alone = replace(plain, psi=psi).masks(batch)["imitation"]((16, 16))
        assert torch.equal(masks[term.mask]((16, 16)), alone)
    counts = task.counts(batch, {term.mask or "" for term in terms})
    assert counts["imitation_0.2/4"] > counts["imitation/4"] >= counts["imitation_0.8/4"] > 0
    ours = torch.randn(3, 2, 16, 16)
    losses = distillation_losses(
        terms, {layer["student"]: ours}, {layer["teacher"]: 0 * ours}, task, batch, masks
    )
    for term in terms:
        where = masks[term.mask or ""]((16, 16))
        by_hand = ours.square().sum(dim=1)[where].sum() / (2 * where.sum())
        assert losses[term.name].value.item() == pytest.approx(by_hand.item(), rel=1e-5)
        assert losses[term.name].unit == f"{term.mask}/4"
    with pytest.raises(UserError, match=r"imitation: psi must be a number in 0\.\.1, got 2"):
        build_term(TermSection(name="imitation", weight=1.0, options={"psi": 2}, **layer))
    with pytest.raises(UserError, match="imitation_inside: unknown option 'psi'"):
        build_term(TermSection(name="imitation_inside", weight=1.0, options={"psi": 0.5}, **layer))


def test_inside_are_the_places_whose_middle_is_in_a_box_or_that_hold_its_middle() -> None:
    batch = make_batch([[[8.0, 8.0, 16.0, 17.0]], [[41.0, 21.0, 42.5, 22.0]]])
    inside = Detection(num_classes=CLASSES, levels=LEVELS).masks(batch)["inside"]((16, 16))
    expected = torch.zeros(2, 16, 16, dtype=torch.bool)
    expected[0, 2:4, 2:4] = True  # middles at 10 and 14; the next one down, 18, is outside
    expected[1, 5, 10] = True  # no middle is in so small a box
    assert torch.equal(inside, expected)


def test_the_whole_map_ends_with_the_images() -> None:
    whole = Detection(num_classes=CLASSES, levels=LEVELS).masks(make_batch(BOXES))["whole"]((8, 8))
    assert whole[:, :6].all() and not whole[:, 6:].any()


def test_places_of_each_level_are_counted() -> None:
    batch, task = make_batch(BOXES), Detection(num_classes=CLASSES, levels=LEVELS)
    own = task.counts(batch)
    counts = {k: v for k, v in task.counts(batch, {"whole", "inside"}).items() if k not in own}
    masks = task.masks(batch)
    assert counts.keys() == {"whole/4", "whole/8", "inside/4", "inside/8"}
    for name, count in counts.items():
        kind, stride = name.split("/")
        grid = (SIZE // int(stride), SIZE // int(stride))
        assert count == masks[kind](grid).sum()
    assert own.keys() == {"boxes", "images", "valid_images", "labelled", "labelled_images"}


def test_a_ring_is_near_a_box_and_in_none() -> None:
    # Two boxes of 8 pixels side by side, of which each is in the other's ring.
    batch = make_batch(
        [[[16.0, 16.0, 24.0, 24.0], [24.0, 16.0, 32.0, 24.0]], [[60.0, 0, 64, 6]], []]
    )
    task = Detection(num_classes=CLASSES, levels=LEVELS)
    ring = task.masks(batch)["ring"]((16, 16))
    expected = torch.zeros(16, 16)
    expected[3:7, 3:9] = 1.0
    expected[4:6, 4:8] = 0.0
    assert torch.equal(ring[0], expected)
    # Cut by the image: 58 to 64 across, 0 to 9 down; places of 4 are covered in part.
    rest = torch.zeros(16, 16)
    rest[0, 14:], rest[1, 14:], rest[2, 14:] = (
        torch.tensor(row) for row in ([0.5, 0.0], [0.5, 0.5], [0.125, 0.25])
    )
    assert torch.allclose(ring[1], rest) and not ring[2].any()
    assert task.counts(batch, {"ring"})["ring/4"] == pytest.approx(float(ring.sum()))
    with pytest.raises(
        UserError, match=r"has stride 16, but the student's levels have strides 4, 8"
    ):
        task.masks(batch)["ring"]((4, 4))


def test_valid_places_are_counted_on_every_grid() -> None:
    batch, task = make_batch(BOXES), Detection(num_classes=CLASSES, levels=LEVELS)
    batch["sizes"] = torch.tensor([[48, 64], [33, 21], [64, 64]])
    counts = task.counts(batch, {"valid"})
    for stride in (1, 4, 8, 32):
        grid = (SIZE // stride, SIZE // stride)
        assert counts[f"valid/{stride}"] == task.masks(batch)["valid"](grid).sum()


def test_masks_of_a_batch_are_computed_once() -> None:
    batch, calls = make_batch(BOXES), []

    def mask(grid: tuple[int, int]) -> Tensor:
        calls.append(grid)
        return torch.ones(3, *grid)

    made = cached_masks({"inside": mask})
    counts = Detection(num_classes=CLASSES, levels=LEVELS).counts(batch, {"inside"}, made)
    places = {name: count for name, count in counts.items() if "/" in name}
    assert places == {"inside/4": 3 * 256, "inside/8": 3 * 64}
    assert made["inside"]((8, 8)) is made["inside"]((8, 8))
    assert calls == [(16, 16), (8, 8)]


def test_a_map_of_another_stride_is_refused() -> None:
    task = Detection(num_classes=CLASSES, levels=LEVELS)
    with pytest.raises(
        UserError, match=r"has stride 16, but the student's levels have strides 4, 8"
    ):
        task.masks(make_batch(BOXES))["imitation"]((4, 4))
    with pytest.raises(UserError, match=r"psi must be in 0\.\.1, got 2"):
        Detection(num_classes=CLASSES, psi=2.0)


def test_padding_is_zero_after_normalising_and_a_teacher_is_asked_for_maps_alone() -> None:
    batch = make_batch(BOXES)
    images, sizes, *_ = Detection(num_classes=CLASSES).inputs(batch)
    assert images is not None and not images[:, :, 48:].any()
    assert torch.equal(images[:, :, :48], normalise(batch["images"])[:, :, :48])
    assert sizes is batch["sizes"]
    model = detector()
    task = task_of(model, wanted="objects", near_boxes=True)
    teacher = LiveTeacher(model, task, posterior=False)
    given = teacher(batch)
    assert "detections" not in given and given["object_logits"].shape == (3, CLASSES + 1)
    layer = "network.backbone.1"
    with LiveTeacher(model, task_of(model, wanted="features"), [layer], posterior=False) as source:
        alone = source(batch)
    assert alone.keys() == {"features.0", "features.1", layer}
    assert torch.equal(alone[layer], given["features.1"])


def test_a_second_stage_answers_about_the_same_moved_boxes_on_both_sides() -> None:
    student, teacher, batch = detector(context=True), detector(channels=24), make_batch(BOXES)
    ours = task_of(student).for_terms([TERMS[0], TERMS[7]])
    theirs = task_of(teacher).for_teaching(["object_logits"])
    (*_, asked), (*_, again) = ours.inputs(batch), theirs.inputs(batch)
    assert asked is not None and again is not None and torch.equal(asked, again)
    assert asked.shape == (3, 4)
    overlap = box_iou(asked, batch["boxes"]).diagonal()
    assert (overlap > 0.5).all() and (overlap < 0.98).all()
    # What a network that knew the truth would say of them: not to leave them as they are.
    network: Any = teacher.network
    (truth,) = network.roi_heads.box_coder.encode([batch["boxes"]], [asked])
    assert (truth.abs().amax(dim=1) > 0.2).all()
    known = {"boxes": batch["boxes"], "image_of": batch["image_of"], "near_boxes": asked}
    with torch.no_grad():
        said = teacher.eval()(theirs.inputs(batch)[0], **known)
    given = LiveTeacher(teacher, theirs, posterior=False)(batch)
    assert torch.equal(given["object_deltas"], said["object_deltas"])
    # Without such a term the heads do not run on them.
    assert ours.for_terms([TERMS[0], TERMS[8]]).inputs(batch)[-1] is None
    output = student.train()(*task_of(student).inputs(batch))
    assert "context" in output and "object_logits" not in output


def test_a_distance_of_boxes_is_the_mean_over_them() -> None:
    student = torch.tensor([[0.0, 2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = box_distance(student, torch.zeros(2, 4))
    assert loss.item() == pytest.approx((1.5 + 0.125) / 2)
    none = box_distance(student[:0], torch.zeros(0, 4))
    none.backward()
    assert none.item() == 0 and student.grad is not None and not student.grad.any()


def test_of_boxes_those_of_the_own_class_are_compared() -> None:
    batch = make_batch(BOXES)  # labels 0, 1, 2
    rows = torch.arange(3 * 4 * (CLASSES + 1)).view(3, -1).float()
    own = own_class_deltas(rows, batch["labels"])
    assert own.tolist() == [[4, 5, 6, 7], [24, 25, 26, 27], [44, 45, 46, 47]]
    assert own_class_deltas(rows[:0], batch["labels"][:0]).shape == (0, 4)
    other = rows + 7.0  # of all other classes; of the own one a number is 1 off
    for row in range(3):
        other[row, 4 * (row + 1) : 4 * (row + 2)] -= torch.tensor([7.0, 7.0, 6.0, 7.0])
    term = build_term(TermSection(name="object_boxes", weight=1.0))
    given = {"object_deltas": rows.requires_grad_()}
    losses = distillation_losses(
        [term], given, {"object_deltas": other}, Detection(num_classes=CLASSES), batch, {}
    )
    assert losses["object_boxes"].value.item() == pytest.approx(0.5)
    assert losses["object_boxes"].unit == "boxes"


TERMS = [
    build_term(
        TermSection(
            name="imitation",
            weight=0.3,
            label="near",
            student="network.backbone.0",
            teacher="network.backbone.0",
        )
    ),
    build_term(
        TermSection(
            name="imitation_inside",
            weight=0.2,
            label="inside",
            student="network.backbone.1",
            teacher="network.backbone.1",
        )
    ),
    build_term(
        TermSection(
            name="context_features",
            weight=0.2,
            label="around",
            student="network.backbone.1",
            teacher="network.backbone.1",
        )
    ),
    build_term(
        TermSection(
            name="hint", weight=0.2, student="network.backbone.0", teacher="network.backbone.0"
        )
    ),
    build_term(
        TermSection(
            name="pair_wise", weight=0.2, student="network.backbone.1", teacher="network.backbone.1"
        )
    ),
    build_term(
        TermSection(
            name="channel_wise",
            weight=0.2,
            student="network.backbone.0",
            teacher="network.backbone.0",
        )
    ),
    build_term(TermSection(name="object_logits", weight=1.0)),
    build_term(TermSection(name="object_boxes", weight=1.0)),
    build_term(
        TermSection(
            name="context_logits",
            weight=1.0,
            teacher="scene.posterior",
            options={"temperature": 1.0},
        )
    ),
]
SAID = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()  # of objects 0 and 2, not of 1


def assembled(taught: Sequence[Term] = TERMS) -> tuple[AdaptedStudent, Objective]:
    """A student with a context head, a wider teacher, one of context; what the one learns."""
    torch.manual_seed(0)
    student = detector(context=True, batch_norm_frozen=True)
    teacher = detector(channels=24)
    levels = ("network.backbone.0", "network.backbone.1")
    layers = [layer for layer in levels if any(term.student == layer for term in taught)]
    asked = task_of(teacher, wanted="objects", near_boxes=True)
    live = LiveTeacher(teacher, asked, layers, posterior=False)
    scene = CachedTeacher(CachedPosteriors(torch.tensor([0, 2]), SAID))
    source = Teachers(live, {"scene": scene}, [1.0, 1.0])
    task = task_of(student, near_boxes=True)
    own = {layer: Adapter(kind="conv3x3", to=layer) for layer in layers}
    model, terms = adapt_student(student, taught, own, source, task, make_batch(BOXES))
    return model, Objective(task, dict.fromkeys(LOSSES, 1.0), terms, source)


def training_of(model: AdaptedStudent) -> Training:
    train = Train(
        optimizer=Optimizer(name="sgd", lr=1e-3), schedule=Schedule(name="constant", warmup=0.0)
    )
    training = start_training(make_accelerator("fp32"), model, train, steps=3)
    training.model.train()
    return training


def test_a_step_with_every_term_moves_the_student_and_a_batch_without_boxes_is_harmless() -> None:
    model, objective = assembled()
    training = training_of(model)
    weights = objective.weights_at(0.0)
    sums, _ = train_step(training, [make_batch(BOXES)], objective, weights)
    assert {term.name for term in TERMS} | {*LOSSES} < sums.keys()
    assert all(torch.isfinite(value) and value > 0 for value in sums.values())
    sums, counts = train_step(training, [make_batch([[], []])], objective, weights)
    assert sums["near"] == sums["object_logits"] == sums["context_logits"] == 0
    assert counts["near"] == counts["around"] == counts["context_logits"] == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chosen", ["near", "inside", "around"])
def test_adapters_taken_where_a_mask_looks_teach_the_same(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for few in (-1.0, 1.0):  # everywhere, and place by place
        monkeypatch.setattr(adapters, "FEW", few)
        model, objective = assembled([term for term in TERMS if term.name == chosen])
        torch.manual_seed(1)  # of the image's pixels
        losses = forward_losses(model.train(), make_batch(BOXES), objective)
        losses[chosen].value.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses[chosen].value, grads))
    (value, grads), (again, others) = found
    assert value > 0
    torch.testing.assert_close(value, again)
    assert grads.keys() == others.keys() and "student.network.backbone.body.conv1.weight" in grads
    for name, one in grads.items():
        assert (one - others[name]).norm() <= 1e-4 * one.norm() + 1e-12, name


def parts_of(whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch's images one by one."""
    parts = []
    for image in range(len(whole["images"])):
        mine = whole["image_of"] == image
        parts.append(
            {key: whole[key][image : image + 1]
             for key in ("images", "sizes", "image_ids", "labelled")}
            | {key: whole[key][mine] for key in ("boxes", "labels", "object_ids")}
            | {"image_of": torch.zeros(int(mine.sum()), dtype=torch.int64)}
        )  # fmt: skip
    return parts


def test_micro_batches_add_up_for_every_term() -> None:
    # Losses of the network's own sample at random: only their weights are 0 here.
    batch, found = make_batch(BOXES), []
    batch["sizes"] = torch.tensor([[48, 64], [64, 64], [31, 64]])
    for group in ([batch], parts_of(batch)):
        model, objective = assembled()
        training = training_of(model)
        weights = {**objective.weights_at(0.0), **dict.fromkeys(LOSSES, 0.0)}
        sums, counts = train_step(training, group, objective, weights)
        means = {term.name: float(sums[term.name] / counts[term.name]) for term in TERMS}
        found.append((means, {name: one.clone() for name, one in model.state_dict().items()}))
    (whole, after), (parts, again) = found
    assert whole == pytest.approx(parts, rel=1e-4)
    assert all(value > 0 for value in whole.values())
    for name, one in after.items():
        torch.testing.assert_close(one, again[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [64, 100])
def test_trunks_that_round_their_maps_down_learn_from_maps(side: int) -> None:
    student, teacher = (detector(8, trunk="densenet121", width=1.0) for _ in range(2))
    layers = ["network.backbone.0", "network.backbone.1"]
    live = LiveTeacher(teacher, task_of(teacher, wanted="features"), layers, posterior=False)
    terms = [
        build_term(
            TermSection(name=name, label=f"{name}{layer}", weight=1.0, student=layer, teacher=layer)
        )
        for name in ("imitation", "imitation_whole", "hint", "context_features")
        for layer in layers
    ]
    batch = make_batch(BOXES)
    batch["images"] = torch.randint(256, (3, 3, side, side), dtype=torch.uint8)
    model = AdaptedStudent(student, layers)
    objective = Objective(task_of(student), dict.fromkeys(LOSSES, 1.0), terms, live)
    sums, counts = train_step(training_of(model), [batch], objective, objective.weights_at(0.0))
    assert all(sums[term.name] > 0 and counts[term.name] > 0 for term in terms)


def test_a_grid_without_a_power_of_two_is_refused() -> None:
    batch = make_batch(BOXES)
    masks = Detection(num_classes=CLASSES, levels=LEVELS).masks(batch)
    with pytest.raises(UserError, match="a feature map has stride 10"):
        masks["valid"]((7, 7))
    with pytest.raises(UserError, match="but the student's levels have strides"):
        masks["whole"]((7, 7))


def test_context_logits_are_of_the_boxes_that_have_a_posterior() -> None:
    said = torch.randn(3, CLASSES, requires_grad=True)
    term = build_term(TermSection(name="context_logits", weight=1.0, options={"temperature": 1.0}))
    batch, task = make_batch(BOXES), Detection(num_classes=CLASSES)
    rows = task.rows(batch)
    source = CachedPosteriors(torch.tensor([0, 2]), SAID)
    losses = distillation_losses([term], {"context": said}, source({}, rows), task, batch, {})
    value, unit, _ = losses["context_logits"]
    by_hand = (SAID.exp() * (SAID - said[[0, 2]].log_softmax(dim=1))).sum(dim=1).mean()
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5) and unit == "known"
    value.backward()
    assert said.grad is not None and said.grad[[0, 2]].all() and not said.grad[1].any()
    nobody = CachedPosteriors(torch.tensor([77]), SAID[:1])
    none = distillation_losses([term], {"context": said}, nobody({}, rows), task, batch, {})
    assert none["context_logits"].value == 0
