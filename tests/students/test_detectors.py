"""The contract of the detectors, as students and as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import box_iou

import students
import teachers
from kd.errors import UserError
from kd.losses import anchor_grid, imitation_mask
from kd.nn.detectors.contract import Level
from kd.nn.networks import DETECTORS
from kd.registry import build

CLASSES = 3
NARROW: dict[str, object] = {"trunk": "shufflenet_v2_x0_5", "channels": 32}
SECOND: dict[str, object] = {
    "hidden": 16, "region_size": 3, "sampled_anchors": 32, "sampled_regions": 16,
    "candidates": (50, 50), "proposals": (20, 20),
}  # fmt: skip
# Small ones of each family; and Wang et al.'s single map of stride 16.
SMALL: dict[str, dict[str, object]] = {
    "fasterrcnn": NARROW | SECOND | {"scales": (4,)},
    "fasterrcnn_single": NARROW | SECOND | {"levels": (4,), "scales": (1, 2)},
    "retinanet": NARROW | {"levels": (2, 3, 4, 5)},
    "retinanet_single": NARROW | {"levels": (4,)},
    "fcos": NARROW | {"channels": 64},
    "centernet": {"trunk": "shufflenet_v2_x0_5", "widths": (8, 8, 8), "hidden": 8},
}
STRIDES = {
    "fasterrcnn": (4, 8, 16, 32, 64),
    "fasterrcnn_single": (16,),
    "retinanet": (4, 8, 16, 32),
    "retinanet_single": (16,),
    "fcos": (8, 16, 32, 64, 128),
    "centernet": (4,),
}
LOSSES = {
    "fasterrcnn": ["objectness", "proposal_boxes", "classes", "boxes"],
    "retinanet": ["classes", "boxes"],
    "fcos": ["classes", "boxes", "centres"],
    "centernet": ["heatmap", "size", "offset"],
}
SIZES = torch.tensor([[64, 96], [40, 50], [64, 64]])
BOXES = torch.tensor(
    [[20.0, 30.0, 28.0, 38.0], [2.0, 3.0, 20.0, 15.0], [5.0, 5.0, 60.0, 60.0], [0.0, 0.0, 9.0, 7.0]]
)
LABELS = torch.tensor([0, 2, 1, 1])
IMAGE_OF = torch.tensor([0, 1, 0, 1])  # in no order; the last image has none
OBJECTS = (SIZES, BOXES, LABELS, IMAGE_OF)
NOTHING = (SIZES, BOXES[:0], LABELS[:0], IMAGE_OF[:0])


def family(name: str) -> str:
    return name.partition("_")[0]


def make(name: str, /, num_classes: int = CLASSES, **options: object) -> Any:
    chosen = SMALL[name] | options
    return build(DETECTORS, family(name), chosen, what="student", num_classes=num_classes)


def finding(name: str, /, **options: Any) -> Any:
    """One that finds something at random weights, were it nothing in particular."""
    if name != "centernet":
        return make(name, least_score=0.0, **options)
    model = make(name, **options)
    nn.init.constant_(model.size.get_parameter("2.bias"), 3.0)
    return model


def pictures(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(3, 3, height, width)


def losses_of(output: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("loss."): value
        for name, value in output.items()
        if name.startswith("loss.")
    }


def maps_of(name: str, model: Any) -> list[str]:
    kinds = ["features", "class_maps", "box_maps"] + ["centre_maps"] * (family(name) == "fcos")
    return [f"{kind}.{level}" for kind in kinds for level in range(len(model.levels))]


def test_every_detector_is_in_both_registries() -> None:
    assert {family(name) for name in DETECTORS} == LOSSES.keys()
    assert DETECTORS.keys() <= students.STUDENTS.keys()
    assert DETECTORS.keys() <= teachers.TEACHERS.keys()


@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith("resnet18") else pytest.param(name, marks=pytest.mark.slow)
        for name in DETECTORS
    ],
)
def test_every_name_builds_and_gives_its_maps_without_running_it(name: str) -> None:
    with torch.device("meta"):
        model: Any = build(DETECTORS, name, {}, what="teacher", num_classes=CLASSES).eval()
        output = model(torch.empty(2, 3, 256, 384))
    for number, level in enumerate(model.levels):
        grid = (256 // level.stride, 384 // level.stride)
        assert output[f"features.{number}"].shape[2:] == grid
    if family(name) != "centernet":  # of networks on a pyramid no head runs
        assert len(output) == len(model.levels)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (50, 75)])
def test_raw_maps_lie_on_the_levels_grids(name: str, height: int, width: int) -> None:
    model = make(name).eval()
    assert tuple(level.stride for level in model.levels) == STRIDES[name]
    assert all(isinstance(level, Level) for level in model.levels)
    with torch.no_grad():
        images = pictures(height, width)
        output = model(images, boxes=BOXES[:0], image_of=IMAGE_OF[:0])
        alone = model(images)
    assert [kind for kind in output if not kind.startswith("object_")] == maps_of(name, model)
    assert all(torch.equal(maps, output[kind]) for kind, maps in alone.items())
    for number, level in enumerate(model.levels):
        grid = (-(-height // level.stride), -(-width // level.stride))
        for kind in ("features", "class_maps", "box_maps"):
            assert output[f"{kind}.{number}"].shape[2:] == grid
        kinds, classes = max(1, len(level.sides)), 1 if family(name) == "fasterrcnn" else CLASSES
        assert output[f"class_maps.{number}"].shape[1] == kinds * classes
        assert output[f"box_maps.{number}"].shape[1] == kinds * 4


@pytest.mark.parametrize("name", SMALL)
def test_a_teacher_without_sizes_runs_neither_second_stage_nor_suppression(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name).eval()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("not asked for")

    if family(name) == "fasterrcnn":
        monkeypatch.setattr(model.network.rpn, "filter_proposals", never)
        monkeypatch.setattr(model.network.roi_heads, "forward", never)
    elif family(name) != "centernet":
        monkeypatch.setattr(model.network, "postprocess_detections", never)
    with torch.no_grad():
        images = pictures()
        output = model(images, boxes=BOXES, image_of=IMAGE_OF, near_boxes=BOXES + 1.0)
        if family(name) == "fasterrcnn":  # unasked it says nothing, asked it is asked there
            elsewhere = model(images, boxes=BOXES, image_of=IMAGE_OF, near_boxes=BOXES + 3.0)
            assert not torch.allclose(elsewhere["object_deltas"], output["object_deltas"])
            monkeypatch.setattr(model.network.roi_heads.box_head, "forward", never)
            unasked = model(images, boxes=BOXES, image_of=IMAGE_OF)
            assert output.keys() - unasked.keys() == {"object_logits", "object_deltas"}
    assert "detections" not in output and not losses_of(output)
    more = family(name) == "fasterrcnn"
    assert output["object_logits"].shape == (4, CLASSES + more)
    assert ("object_deltas" in output) == more
    if more:
        assert output["object_deltas"].shape == (4, 4 * (CLASSES + 1))


@pytest.mark.parametrize("name", SMALL)
def test_training_gives_named_losses_from_which_every_parameter_learns(name: str) -> None:
    model = make(name).train()
    output = model(pictures(), *OBJECTS)
    losses = losses_of(output)
    assert list(losses) == LOSSES[family(name)] == list(model.loss_units)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    assert "detections" not in output
    assert set(maps_of(name, model)) <= output.keys()
    torch.stack(list(losses.values())).sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
    trunk = model.trunk if family(name) == "centernet" else model.network.backbone
    assert all(one.grad.count_nonzero() > 0 for one in trunk.parameters() if one.ndim > 1)


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_without_an_object_is_all_background(name: str) -> None:
    model = make(name).train()
    output = model(pictures(), *NOTHING, near_boxes=BOXES[:0])
    losses = losses_of(output)
    for loss, value in losses.items():
        background = loss in ("objectness", "classes", "heatmap")
        assert value.isfinite() and (value > 0 if background else value == 0), loss
    assert len(output["object_logits"]) == 0
    torch.stack(list(losses.values())).sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_the_best_boxes_first_within_their_images(name: str) -> None:
    model = finding(name, top=20).eval()
    output = model(pictures(), SIZES)
    found = output["detections"]
    assert found.shape == (3, 20, 6) and found.dtype == torch.float32
    assert not found.requires_grad and not losses_of(output)
    boxes, scores, labels = found[..., :4], found[..., 4], found[..., 5]
    assert (scores[:, 0] > 0).all() and (scores[:, 1:] <= scores[:, :-1]).all()
    assert (boxes >= 0).all() and (boxes <= SIZES[:, None, [1, 0, 1, 0]]).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert ((labels >= 0) & (labels < CLASSES) & (labels == labels.round())).all()
    assert (found[scores == 0] == 0).all()


@pytest.mark.parametrize("name", SMALL)
def test_what_an_image_gives_does_not_hang_on_the_others(name: str) -> None:
    model, images = finding(name, top=20).eval(), pictures()
    with torch.no_grad():
        whole = model(images, *OBJECTS, near_boxes=BOXES)
        own = SIZES[1:2], BOXES[[1, 3]], LABELS[[1, 3]], IMAGE_OF[[1, 3]] - 1
        alone = model(images[1:2], *own, near_boxes=BOXES[[1, 3]])
    expected = whole["object_logits"][[1, 3]]
    torch.testing.assert_close(alone["object_logits"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        alone["detections"][0, 0], whole["detections"][1, 0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_detector_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    first, images = make(name).eval(), pictures()
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second = make(name, file=str(tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        torch.testing.assert_close(second(images), first(images), rtol=0, atol=0)
    with pytest.raises(UserError, match="does not fit"):
        make(name, num_classes=5, file=str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", SMALL)
def test_mistakes_name_the_image_and_the_box(name: str) -> None:
    model, images = make(name).train(), pictures()
    flat, lost, high = BOXES.clone(), BOXES.clone(), LABELS.clone()
    flat[3, 3] = flat[3, 1]
    lost[2, 0] = float("nan")
    high[1] = CLASSES
    for objects, said in (
        ((SIZES, flat, LABELS, IMAGE_OF), r"x1 < x2 and y1 < y2; box 1 of image 1 .* \(row 3\)"),
        ((SIZES, lost, LABELS, IMAGE_OF), r"must be finite, .*; box 1 of image 0 .* is \[nan"),
        ((SIZES, BOXES, high, IMAGE_OF), r"labels must be in 0\.\.2; box 0 of image 1 .* label 3"),
        ((SIZES, BOXES, LABELS - 1, IMAGE_OF), r"labels must be in 0\.\.2; .* label -1"),
        ((SIZES, BOXES, LABELS, IMAGE_OF + 2), r"image_of must be in 0\.\.2; .* of image 3"),
        ((SIZES, BOXES[:, :3], LABELS, IMAGE_OF), r"boxes must be \(M, 4\), got \(4, 3\)"),
        ((SIZES, BOXES, LABELS.int(), IMAGE_OF), r"labels must be int64 \(4,\), got int32"),
        ((SIZES[:2], BOXES, LABELS, IMAGE_OF), r"sizes must be \(3, 2\), got \(2, 2\)"),
        ((SIZES, BOXES), "training needs labels, image_of too"),
    ):
        with pytest.raises(UserError, match=said):
            model(images, *objects)
    with pytest.raises(UserError, match="boxes need image_of"):
        model.eval()(images, boxes=BOXES)


@pytest.mark.parametrize("name", SMALL)
def test_autocast_keeps_losses_and_boxes_in_float32(name: str) -> None:
    model, images = finding(name), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(images, *OBJECTS)
        found = model.eval()(images, SIZES)["detections"]
    assert output["features.0"].dtype == torch.bfloat16
    for loss, value in losses_of(output).items():
        assert value.dtype == torch.float32 and value.isfinite(), loss
    # bfloat16 has whole pixels only from 128 on, and 0.25 of one at 32.
    coarse = found[..., :4].bfloat16().float()
    assert (found[..., :4] != coarse).any()


@pytest.mark.parametrize(
    "name", [name for name in SMALL if family(name) in ("fasterrcnn", "retinanet")]
)
def test_levels_are_what_imitation_needs(name: str) -> None:
    model = make(name).eval()
    boxes = [BOXES[IMAGE_OF == image] for image in range(3)]
    with torch.no_grad():
        output = model(pictures())
    marked = 0
    for number, level in enumerate(model.levels):
        features = output[f"features.{number}"]
        anchors = anchor_grid(
            *features.shape[2:], stride=level.stride, sides=level.sides, offset=level.offset
        )
        mask = imitation_mask(boxes, anchors)
        assert mask.shape == (3, *features.shape[2:])
        assert not mask[2].any()
        marked += int(mask.sum())
    assert marked


HEART: dict[str, dict[str, object]] = {
    "fasterrcnn": SECOND | {"levels": (2, 3, 4), "scales": (4,), "canonical": 56, "hidden": 64},
    "fcos": {"levels": (3, 4)},
    "centernet": {"widths": (32, 32, 32), "hidden": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEART)
def test_a_few_steps_learn_two_images_by_heart(name: str) -> None:
    options = HEART[name] | {"trunk": "resnet18", "width": 0.25}
    options |= {} if name == "centernet" else {"channels": 64}
    model = build(DETECTORS, name, options, what="student", num_classes=2)
    boxes = torch.tensor(
        [[6.0, 8.0, 30.0, 28.0], [36.0, 20.0, 60.0, 60.0], [10.0, 4.0, 50.0, 60.0]]
    )
    labels, image_of = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    sizes = torch.full((3, 2), 64)
    images = torch.zeros(3, 3, 64, 64)  # nothing is on the last
    for image, label, (x1, y1, x2, y2) in zip(image_of, labels, boxes.int().tolist(), strict=True):
        images[image, label, y1:y2, x1:x2] = 1.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # At a constant rate the last step is a good one or a bad one as a processor's rounding has it.
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=140)
    for _ in range(140):
        losses = losses_of(model.train()(images, sizes, boxes, labels, image_of))
        weights = {"size": 0.1}
        total = torch.stack([weights.get(one, 1.0) * losses[one] for one in losses]).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
    found = model.eval()(images, sizes)["detections"]
    for image, rows in enumerate(found):
        own = image_of == image
        sure = rows[rows[:, 4] > 0.5]
        assert sorted(sure[:, 5].tolist()) == labels[own].tolist()
        if own.any():
            assert box_iou(boxes[own], sure[:, :4]).amax(dim=1).min() > 0.5
