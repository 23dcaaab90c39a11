"""Detectors against torchvision's own: the same weights give the same losses and detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kd.errors import UserError
from kd.losses import anchor_grid
from kd.nn.networks import DETECTORS
from kd.nn.weights import COCO_IDS

CLASSES = 5
SIZES = [(128, 128), (90, 128)]  # height, width of the images in a frame of 128
TARGETS = [
    {
        "boxes": torch.tensor([[10.0, 12.0, 50.0, 44.0], [60.0, 30.0, 120.0, 120.0]]),
        "labels": torch.tensor([1, 4]),
    },
    {"boxes": torch.tensor([[3.0, 5.0, 90.0, 80.0]]), "labels": torch.tensor([0])},
]
# Our names of the losses to torchvision's.
LOSSES = {
    "fasterrcnn": {
        "objectness": "loss_objectness",
        "proposal_boxes": "loss_rpn_box_reg",
        "classes": "loss_classifier",
        "boxes": "loss_box_reg",
    },
    "retinanet": {"classes": "classification", "boxes": "bbox_regression"},
    "fcos": {
        "classes": "classification",
        "boxes": "bbox_regression",
        "centres": "bbox_ctrness",
    },
}
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "fasterrcnn": detection.fasterrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
}


class Padded(nn.Module):
    """In place of torchvision's transform: pads to the frame, and resizes nothing."""

    def forward(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        sizes = [(one.shape[1], one.shape[2]) for one in images]
        return ImageList(framed(images), sizes), targets

    def postprocess(self, result: object, *_: object) -> object:
        return result


def framed(images: Sequence[Tensor]) -> Tensor:
    frame = images[0].new_zeros(len(images), 3, 128, 128)
    for image, one in enumerate(images):
        frame[image, :, : one.shape[1], : one.shape[2]] = one
    return frame


def published(name: str) -> Any:
    """Torchvision's network on its ResNet-18 pyramid, all its own but the transform."""
    extra: dict[str, Any] = {}
    if name != "fasterrcnn":
        extra = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    trunk = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d,
        **extra,
    )  # fmt: skip
    if name == "fasterrcnn":
        network = detection.FasterRCNN(
            trunk, CLASSES + 1, rpn_batch_size_per_image=32, box_batch_size_per_image=24,
            box_score_thresh=0.0, rpn_post_nms_top_n_train=80, rpn_post_nms_top_n_test=60,
        )  # fmt: skip
    elif name == "retinanet":
        network = detection.RetinaNet(trunk, CLASSES, score_thresh=0.0, detections_per_img=100)
    else:
        network = detection.FCOS(trunk, CLASSES, score_thresh=0.0)
    network.transform = Padded()
    return network


def ours(name: str, theirs: nn.Module) -> Any:
    options: dict[str, Any] = {"least_score": 0.0}
    if name == "fasterrcnn":
        options |= {"sampled_anchors": 32, "sampled_regions": 24, "proposals": (80, 60)}
    model: Any = DETECTORS[f"{name}_resnet18"].load()(CLASSES, **options)
    model.network.load_state_dict(theirs.state_dict())  # strict: the same names
    return model


def pictures() -> list[Tensor]:
    return [torch.randn(3, height, width) for height, width in SIZES]


def flat_targets() -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.cat([one["boxes"] for one in TARGETS])
    labels = torch.cat([one["labels"] for one in TARGETS])
    return boxes, labels, torch.tensor([0, 0, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_torchvision(name: str) -> None:
    theirs = published(name).train()
    model, images = ours(name, theirs).train(), pictures()
    first = 1 if name == "fasterrcnn" else 0
    targets = [{**one, "labels": one["labels"] + first} for one in TARGETS]
    torch.manual_seed(3)  # of the samplers
    expected = theirs(images, targets)
    torch.manual_seed(3)
    found = model(framed(images), torch.tensor(SIZES), *flat_targets())
    names = LOSSES[name]
    assert {f"loss.{one}" for one in names} == {one for one in found if one.startswith("loss.")}
    for one, other in names.items():
        torch.testing.assert_close(found[f"loss.{one}"], expected[other])
        assert expected[other] > 0
    torch.stack([found[f"loss.{one}"] for one in names]).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    for path in ("backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight"):
        here = model.network.get_parameter(path).grad
        there = theirs.get_parameter(path).grad
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_detections_are_those_of_torchvision(name: str) -> None:
    theirs = published(name).eval()
    model, images = ours(name, theirs).eval(), pictures()
    with torch.no_grad():
        expected = theirs(images)
        found = model(framed(images), torch.tensor(SIZES))["detections"]
    first = 1 if name == "fasterrcnn" else 0
    for rows, one in zip(found, expected, strict=True):
        count = len(one["boxes"])
        assert 10 < count <= 100
        torch.testing.assert_close(rows[:count, :4], one["boxes"])
        torch.testing.assert_close(rows[:count, 4], one["scores"])
        assert rows[:count, 5].tolist() == (one["labels"] - first).tolist()
        assert not rows[count:].any()


def test_what_the_second_stage_says_of_boxes_is_what_its_parts_say() -> None:
    theirs = published("fasterrcnn").eval()
    model, images = ours("fasterrcnn", theirs).eval(), framed(pictures())
    boxes, _, image_of = flat_targets()
    shuffled = torch.tensor([2, 0, 1])
    with torch.no_grad():
        heads = theirs.roi_heads
        lists = [one["boxes"] for one in TARGETS]
        regions = heads.box_roi_pool(theirs.backbone(images), lists, [(128, 128)] * 2)
        logits, deltas = heads.box_predictor(heads.box_head(regions))
        # Rows follow the batch's order, whatever it is.
        asked = boxes[shuffled]
        found = model(images, boxes=asked + 3.0, image_of=image_of[shuffled], near_boxes=asked)
    torch.testing.assert_close(found["object_logits"], logits[shuffled])
    torch.testing.assert_close(found["object_deltas"], deltas[shuffled])


def test_regions_of_wide_images_are_pooled_where_they_are() -> None:
    """Torchvision takes the scale from the first images without padding, and keeps it."""
    model: Any = DETECTORS["fasterrcnn_resnet18"].load()(CLASSES, channels=16, hidden=8).eval()
    image, boxes = torch.randn(1, 3, 64, 64), torch.tensor([[10.0, 10.0, 30.0, 20.0]])
    asked = {"boxes": boxes, "image_of": torch.tensor([0]), "near_boxes": boxes}
    with torch.no_grad():
        before = model(image, **asked)["object_logits"]
        model(image, torch.tensor([[20, 64]]))
        after = model(image, **asked)["object_logits"]
    torch.testing.assert_close(after, before)
    assert model.network.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("name", BUILDERS)
def test_parameters_are_those_of_torchvision_s_builders(name: str) -> None:
    with torch.device("meta"):
        theirs = BUILDERS[name](weights=None, weights_backbone=None, num_classes=91)
        classes = 90 if name == "fasterrcnn" else 91
        model: Any = DETECTORS[f"{name}_resnet50"].load()(classes)
    shapes = {path: tuple(one.shape) for path, one in model.network.state_dict().items()}
    assert shapes == {path: tuple(one.shape) for path, one in theirs.state_dict().items()}
    count = sum(one.numel() for one in model.parameters())
    # As published, and the batch norms' 53,120, which are frozen there.
    known = {"fasterrcnn": 41_755_286, "retinanet": 34_014_999, "fcos": 32_269_600}
    assert count == known[name] + 53_120


@pytest.mark.parametrize(
    ("name", "generator"),
    [
        (
            "fasterrcnn",
            AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        ),
        (
            "retinanet",
            AnchorGenerator(
                tuple(
                    (x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3)))
                    for x in (32, 64, 128, 256, 512)
                ),
                ((0.5, 1.0, 2.0),) * 5,
            ),
        ),
    ],
)
def test_levels_give_torchvision_s_anchors_to_the_last_bit(
    name: str, generator: AnchorGenerator
) -> None:
    with torch.device("meta"):
        model: Any = DETECTORS[f"{name}_resnet18"].load()(CLASSES)
    images = torch.zeros(1, 3, 128, 256)
    maps = [torch.zeros(1, 1, 128 // one.stride, 256 // one.stride) for one in model.levels]
    expected = generator(ImageList(images, [(128, 256)]), maps)[0]
    own = [
        anchor_grid(*grid.shape[2:], stride=one.stride, sides=one.sides, offset=one.offset)
        for one, grid in zip(model.levels, maps, strict=True)
    ]
    found = torch.cat([one.reshape(-1, 4) for one in own])
    assert torch.equal(found, expected)


def test_anchors_stay_on_their_stride_where_it_does_not_divide_the_image() -> None:
    model: Any = DETECTORS["fasterrcnn_resnet18"].load()(CLASSES, channels=16, hidden=8)
    maps = [torch.zeros(1, 1, -(-80 // one.stride), -(-80 // one.stride)) for one in model.levels]
    listed = ImageList(torch.zeros(1, 3, 80, 80), [(80, 80)])
    anchors = model.network.rpn.anchor_generator(listed, maps)[0]
    middles = (anchors[:, :2] + anchors[:, 2:]) / 2
    counts = [3 * one.shape[2:].numel() for one in maps]
    across = middles.split(counts)[3][:, 0].unique()  # of stride 32; torchvision has 26 here
    assert across.tolist() == [0.0, 32.0, 64.0]


def old_names(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's files of COCO have them: older than the modules, without counters."""
    renamed = {}
    for path, tensor in state.items():
        old = path.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if ".fpn." in old and "_blocks." in old and "extra" not in old:
            old = old.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if name == "retinanet":  # convolutions and activations, one after the other
            for layer in (3, 2, 1, 0):
                old = old.replace(f"_head.conv.{layer}.0.", f"_head.conv.{2 * layer}.")
        if not path.endswith("num_batches_tracked"):
            renamed[old] = tensor
    return renamed


@pytest.mark.parametrize("name", LOSSES)
def test_a_file_of_torchvision_s_loads_under_its_older_names(name: str, tmp_path: Path) -> None:
    theirs = published(name).eval()
    state = old_names(name, theirs.state_dict())
    assert len(state.keys() - theirs.state_dict().keys()) >= 10
    torch.save(state, tmp_path / "coco.pth")
    model: Any = DETECTORS[f"{name}_resnet18"].load()(CLASSES, file=str(tmp_path / "coco.pth"))
    for path, tensor in theirs.state_dict().items():
        assert torch.equal(model.network.state_dict()[path], tensor), path
    with pytest.raises(UserError, match=rf"coco\.pth does not fit {name} on resnet18: shapes"):
        DETECTORS[f"{name}_resnet18"].load()(CLASSES + 1, file=str(tmp_path / "coco.pth"))
    with pytest.raises(UserError, match=r"missing backbone\.body\.layer1\.2\."):
        DETECTORS[name].load()(CLASSES, trunk="resnet34", file=str(tmp_path / "coco.pth"))


@pytest.mark.parametrize("name", LOSSES)
def test_eighty_classes_are_taken_from_torchvision_s_ninety_one_of_coco(
    name: str, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"trunk": "shufflenet_v2_x0_5", "channels": 64}
    small |= {"hidden": 8, "region_size": 2} if name == "fasterrcnn" else {}
    whole: Any = DETECTORS[name].load()(90 if name == "fasterrcnn" else 91, **small).eval()
    torch.save(whole.network.state_dict(), tmp_path / "coco.pth")
    part = DETECTORS[name].load()(80, file=str(tmp_path / "coco.pth"), **small).eval()
    image, boxes = torch.randn(1, 3, 64, 64), torch.tensor([[10.0, 10.0, 50.0, 40.0]])
    with torch.no_grad():
        wide, narrow = (
            model(image, boxes=boxes, image_of=torch.tensor([0]), near_boxes=boxes)
            for model in (whole, part)
        )
    ids = torch.tensor([0, *COCO_IDS] if name == "fasterrcnn" else COCO_IDS)
    assert len(COCO_IDS) == 80 and COCO_IDS[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    torch.testing.assert_close(narrow["object_logits"], wide["object_logits"][:, ids])
    if name == "fasterrcnn":
        deltas = wide["object_deltas"].view(1, 91, 4)[:, ids]
        torch.testing.assert_close(narrow["object_deltas"].view(1, 81, 4), deltas)
