"""CenterNet: its maps, how it starts, its weights' gradients, and boxes read off planted peaks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.distillation.hooks import FeatureTaps
from kd.errors import ConfigError, UserError
from kd.losses.centernet import center_targets, centernet_losses
from kd.nn.detectors.centernet import CenterNet, bilinear_, centernet, decode_centers
from kd.nn.networks import DETECTORS
from kd.problems.recipes import load_recipe
from kd.registry import build

CLASSES = 3
SMALL = {"trunk": "shufflenet_v2_x0_5", "widths": (8, 8, 8), "hidden": 8}
LOW = -20.0


def small(**options: object) -> nn.Module:
    chosen = SMALL | options
    built: nn.Module = build(DETECTORS, "centernet", chosen, what="student", num_classes=CLASSES)
    return built


def confident(output: dict[str, Tensor], least: float = 0.5) -> Tensor:
    """Detections (k, 6) with scores above `least` in the first image."""
    found = decode_centers(output)[0]
    return found[found[:, 4] > least]


def blank(images: int = 1, height: int = 6, width: int = 8) -> dict[str, Tensor]:
    """Maps without a peak above the rest: boxes of 2 x 1 cells around the corners of cells."""
    size = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(images, 2, height, width)
    return {
        "heatmap": torch.full((images, CLASSES, height, width), LOW),
        "size": size.clone(),
        "offset": torch.zeros(images, 2, height, width),
    }


@pytest.mark.parametrize(("height", "width"), [(64, 96), (37, 51), (32, 33)])
def test_maps_have_a_cell_for_each_four_pixels(height: int, width: int) -> None:
    model = small().eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, height, width))
    grid = (-(-height // 4), -(-width // 4))
    shapes = {name: tuple(one.shape) for name, one in output.items()}
    assert shapes == {
        "features.0": (2, 8, *grid),
        "class_maps.0": (2, CLASSES, *grid),
        "box_maps.0": (2, 4, *grid),
    }


def test_what_its_heads_read_is_a_layer_that_fits_other_detectors_maps() -> None:
    recipe = load_recipe(DistillRecipe, find_config("distill", "centernet_resnet18"), data="voc")
    (layer,) = {term.student for term in recipe.losses}
    model = small().eval()
    taps = FeatureTaps(model, [str(layer)])
    with torch.no_grad():
        output = model(torch.randn(1, 3, 37, 51))
    (tapped,) = taps.collect().values()
    assert tapped.shape == (1, 8, 10, 13) and torch.equal(tapped, output["features.0"])


@pytest.mark.parametrize(
    ("trunk", "steps"),
    [
        ("resnet18", 3),
        ("mobilenet_v2", 3),
        ("squeezenet1_1", 2),
        ("vit_b_16", 2),
        ("vgg11_bn", 3),
        ("timm/resnet10t", 3),
    ],
)
def test_any_trunk_will_do(trunk: str, steps: int) -> None:
    with torch.device("meta"):
        model = centernet(CLASSES, trunk=trunk).eval()
        output = model(torch.empty(2, 3, 64, 96))
    assert output["class_maps.0"].shape == (2, CLASSES, 16, 24)
    assert len(model.up) == steps and model.channels == 64


def test_resnet18_has_its_parameters() -> None:
    with torch.device("meta"):
        model = centernet(80)
    trunk = 11_176_512  # torchvision's 11,689,512 without the classifier's 513,000
    ups = sum(9 * a * b + 16 * b * b + 4 * b for a, b in ((512, 256), (256, 128), (128, 64)))
    heads = sum(64 * 64 * 9 + 64 + 64 * outputs + outputs for outputs in (80, 2, 2))
    assert sum(one.numel() for one in model.parameters()) == trunk + ups + heads == 14_219_092


def test_a_new_network_sees_an_object_at_one_place_in_ten() -> None:
    model = small().eval()
    assert isinstance(model, CenterNet)
    nn.init.zeros_(model.heatmap.get_parameter("2.weight"))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 32))
    probability = output["class_maps.0"].sigmoid()
    torch.testing.assert_close(probability, torch.full_like(probability, 0.1), atol=1e-3, rtol=0)
    assert output["box_maps.0"].abs().max() < 0.1


def test_a_step_up_starts_as_bilinear_interpolation() -> None:
    maps = torch.randn(2, 5, 4, 6)
    up = bilinear_(nn.ConvTranspose2d(5, 5, 4, 2, padding=1, bias=False))
    expected = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
    inner = (..., slice(1, -1), slice(1, -1))  # the border is half of zeros
    torch.testing.assert_close(up(maps)[inner], expected[inner])


def test_a_saved_network_comes_back_from_its_file(tmp_path: Path) -> None:
    first, images = small().eval(), torch.randn(1, 3, 32, 32)
    torch.save(first.state_dict(), tmp_path / "model.pth")
    second = small(file=str(tmp_path / "model.pth")).eval()
    with torch.no_grad():
        torch.testing.assert_close(second(images), first(images), rtol=0, atol=0)


def test_options_out_of_range_are_refused() -> None:
    for options, said in (
        ({"widths": ()}, "widths must be 1 or more each"),
        ({"widths": (8, 0, 8)}, "widths must be 1 or more each"),
        ({"hidden": 0}, "hidden must be at least 1"),
        (
            {"widths": (8, 8)},
            "has a stride of 32, but 2 up-sampling steps reach a stride of 4 only from 8, 16;",
        ),
        ({"trunk": "vit_h_14"}, "has a stride of 14"),
    ):
        with torch.device("meta"), pytest.raises(UserError, match=said):
            small(**options)
    with pytest.raises(ConfigError, match="student 'centernet': unknown option 'trnk'"):
        small(trnk="resnet18")


def test_a_planted_peak_is_the_box_worked_by_hand() -> None:
    output = blank(images=2)
    output["heatmap"][1, 2, 3, 5] = 0.0
    output["size"][1, :, 3, 5] = torch.tensor([4.0, 3.0])
    output["offset"][1, :, 3, 5] = torch.tensor([0.5, 0.25])
    found = decode_centers(output, top=5)
    assert found.shape == (2, 5, 6)
    # The middle is (22, 13) pixels, the box 16 x 12; the score is 0.5, the label 2.
    assert found[1, 0].tolist() == [14.0, 7.0, 30.0, 19.0, 0.5, 2.0]
    assert (found[..., 4] > 0.1).sum(dim=1).tolist() == [0, 1]


def test_a_neighbour_of_a_peak_is_none_however_high() -> None:
    output = blank()
    output["heatmap"][0, 0, 2, 2:6] = torch.tensor([3.0, 2.9, 2.8, 2.9])
    found = confident(output)
    assert found[:, 4].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (3.0, 2.9)])
    assert found[:, 0].tolist() == [4.0, 16.0]  # of the cells 2 and 5


def test_peaks_of_other_classes_at_one_place_are_kept() -> None:
    output = blank()
    output["heatmap"][0, :, 1, 1] = torch.tensor([1.0, 3.0, 2.0])
    assert confident(output)[:, 5].tolist() == [1, 2, 0]


def test_equal_peaks_come_in_order_of_class_and_place_and_plateaus_are_all_peaks() -> None:
    output = blank()
    output["heatmap"][0, 1, 4, 6] = 2.0
    output["heatmap"][0, 0, 4, 1:3] = 2.0  # a plateau of two
    output["heatmap"][0, 1, 0, 3] = 2.0
    found = confident(output)
    places = (found[:, :2] / 4 + torch.tensor([1.0, 0.5])).tolist()
    assert places == [[1.0, 4.0], [2.0, 4.0], [3.0, 0.0], [6.0, 4.0]]
    assert found[:, 5].tolist() == [0, 0, 1, 1]


def test_rows_without_a_peak_have_no_score() -> None:
    output = blank()
    rising = torch.arange(CLASSES * 48.0).view(1, CLASSES, 6, 8)  # one peak a class
    found = decode_centers({**output, "heatmap": rising})
    assert (found[..., 4] > 0).sum().item() == CLASSES
    assert found.shape == (1, 100, 6) and found[0, :3, 5].tolist() == [2, 1, 0]
    assert decode_centers(output, top=9999).shape == (1, 9999, 6)


def test_no_number_is_no_peak() -> None:
    output = blank()
    output["heatmap"][0, 0, 2, 2] = math.nan
    output["heatmap"][0, 0, 5, 6] = 3.0
    found = decode_centers(output)
    assert found.isfinite().all()
    assert found[0, 0, :4].tolist() == [20.0, 18.0, 28.0, 22.0]


def test_boxes_end_where_the_image_does_and_sides_are_not_negative() -> None:
    output = blank()
    output["heatmap"][0, 0, 5, 7] = output["heatmap"][0, 0, 0, 0] = 2.0
    output["size"][0, :, 5, 7] = 20.0
    output["size"][0, :, 0, 0] = torch.tensor([-3.0, 2.0])
    found = decode_centers(output, sizes=torch.tensor([[22, 30]]))
    # The box of the first cell has no width, and is left out.
    assert found[0, 0, :4].tolist() == [0.0, 0.0, 30.0, 22.0]
    assert found[0, 0, 4] > 0.5 and found[0, 1:, 4].max() < 0.5


def test_no_image_gives_no_box() -> None:
    assert decode_centers(blank(images=0)).shape == (0, 100, 6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),  # image
            st.integers(0, CLASSES - 1),
            st.floats(0, 95.9),
            st.floats(0, 63.9),
            st.floats(0.5, 80),
            st.floats(0.5, 80),
        ),
        max_size=30,
        # Of two of a class in one cell only one can be drawn.
        unique_by=lambda one: (one[0], one[1], int(one[2] / 4), int(one[3] / 4)),
    )
)
def test_perfect_maps_decode_to_the_boxes(objects: list[tuple[float, ...]]) -> None:
    objects = sorted(objects)
    table = torch.tensor(objects).view(-1, 6)
    image_of, labels = table[:, 0].long(), table[:, 1].long()
    boxes = torch.cat([table[:, 2:4] - table[:, 4:] / 2, table[:, 2:4] + table[:, 4:] / 2], dim=1)
    targets = center_targets(boxes, labels, image_of, 2, CLASSES, (16, 24), 4)
    assert targets.valid.all()
    peaks = targets.heatmap.logit(eps=1e-4)
    y, x = targets.cell // 24, targets.cell % 24
    # Classes share the numbers of a cell, so that each class is decoded by itself.
    for label in range(CLASSES):
        own = labels == label
        output = blank(2, 16, 24) | {"heatmap": torch.full_like(peaks, LOW)}
        output["heatmap"][:, label] = peaks[:, label]
        for name, numbers in (("size", targets.size), ("offset", targets.offset)):
            output[name][image_of[own], :, y[own], x[own]] = numbers[own]
        for image, rows in enumerate(decode_centers(output)):
            found = rows[rows[:, 4] > 0.999]
            true = boxes[own & (image_of == image)]
            assert len(found) == len(true) and (found[:, 5] == label).all()
            if len(true):
                gaps = (found[:, None, :4] - true).abs().amax(dim=2)
                assert gaps.amin(dim=0).max() < 1e-3 and gaps.amin(dim=1).max() < 1e-3


def test_its_losses_are_those_of_its_maps_and_targets() -> None:
    model, images = small().train(), torch.randn(2, 3, 64, 96)
    sizes = torch.tensor([[64, 96], [40, 90]])
    boxes = torch.tensor([[4.0, 6.0, 30.0, 33.0], [50.0, 10.0, 80.0, 20.0], [3.0, 3.0, 9.0, 9.0]])
    labels, image_of = torch.tensor([0, 2, 1]), torch.tensor([0, 0, 1])
    output = model(images, sizes, boxes, labels, image_of)
    size, offset = output["box_maps.0"].split(2, dim=1)
    maps = {"heatmap": output["class_maps.0"], "size": size, "offset": offset}
    targets = center_targets(boxes, labels, image_of, 2, CLASSES, (16, 24), 4)
    for name, value in centernet_losses(maps, targets).items():
        torch.testing.assert_close(output[f"loss.{name}"], value)
    # The cells of the middles: (17, 19.5), (65, 15) and (6, 6) pixels.
    middles = torch.stack(
        [
            output["class_maps.0"][0, :, 4, 4],
            output["class_maps.0"][0, :, 3, 16],
            output["class_maps.0"][1, :, 1, 1],
        ]
    )
    torch.testing.assert_close(output["object_logits"], middles)


def test_what_is_found_in_a_crowd_is_not_blamed() -> None:
    model, images = small().train(), torch.randn(1, 3, 64, 64)
    boxes, labels = torch.tensor([[2.0, 2.0, 20.0, 20.0]]), torch.tensor([1])
    objects = (torch.tensor([[64, 64]]), boxes, labels, torch.tensor([0]))
    crowd = torch.tensor([[24.0, 24.0, 64.0, 64.0]])

    def blame(*crowds: Tensor) -> Tensor:
        output = model(images, *objects, *crowds)
        maps = output["class_maps.0"]
        maps.retain_grad()
        output["loss.heatmap"].backward()
        assert maps.grad is not None
        blamed: Tensor = maps.grad
        return blamed

    assert blame()[..., 6:, 6:].count_nonzero() > 0
    crowded = blame(crowd, torch.tensor([0]))
    assert crowded[..., 6:, 6:].count_nonzero() == 0
    assert crowded[..., :6, :6].count_nonzero() == CLASSES * 36
    none = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    torch.testing.assert_close(blame(*none), blame())


def test_detections_have_an_area_and_the_best_come_first() -> None:
    output = blank()
    output["heatmap"][0, 0, 0, 0] = 3.0
    output["size"][0, :, 0, 0] = 0.0  # the surest has no area
    output["heatmap"][0, 1, 3, 4] = 1.0
    output["heatmap"][0, 2, 5, 1] = 2.0
    found = decode_centers(output, top=4)
    assert found.shape == (1, 4, 6) and found[0, :2, 5].tolist() == [2.0, 1.0]
    assert not found[0, found[0, :, 4] == 0].any()
    assert decode_centers(output, top=2).shape == (1, 2, 6)
