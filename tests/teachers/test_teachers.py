"""The contract of every context teacher, and what each promises beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kd.distillation.hooks import FeatureTaps
from kd.errors import ConfigError, UserError
from kd.nn.regions import BLACK
from kd.registry import build
from teachers import TEACHERS

# Small ones: options, a layer to tap and its channels.
SMALL: dict[str, tuple[dict[str, object], str, int]] = {
    "unet": ({"width": 4, "depth": 2}, "bottleneck", 16),
    "unet_ffc": ({"width": 4, "depth": 2}, "bottleneck", 8),
    "cnn": ({"width": 4, "downs": 3, "hidden": 8}, "features.3", 32),
    "trunk": ({"name": "shufflenet_v2_x0_5", "margins": [0.5, 1.5]}, "trunk.trunk", 1024),
    "timm/resnet10t": ({"margins": [0.5]}, "trunk.trunk", 512),
    "resnet_pixel": ({"name": "shufflenet_v2_x0_5", "until": "stage2", "width": 8}, "feature", 8),
    "resnet_multilabel": ({"name": "shufflenet_v2_x0_5"}, "trunk", 1024),
}
# Their inputs are scenes as tokens: tests/teachers/test_token_teachers.py.
TOKEN_TEACHERS = {"scene_transformer", "cooccurrence", "prior"}
CLASSES = 5


def make(name: str, /, **options: object) -> nn.Module:
    chosen = SMALL[name][0] | options
    built: nn.Module = build(TEACHERS, name, chosen, what="teacher", num_classes=CLASSES)
    return built


def hidden_scene(count: int, height: int, width: int) -> Tensor:
    """Scenes with a box hidden in each."""
    images = torch.randn(count, 4, height, width)
    images[:, 3] = 0
    images[:, 3, height // 4 : height // 2, width // 3 : width // 2] = 1
    return images * (1 - images[:, 3:]) + torch.cat(
        [torch.zeros(count, 3, height, width), images[:, 3:]], dim=1
    )


def test_every_context_teacher_is_in_the_contract() -> None:
    context = {name for name, one in TEACHERS.items() if one.problem == "objects"}
    tested = SMALL.keys() - {"timm/resnet10t"} | TOKEN_TEACHERS
    assert tested | {"timm/NAME", "torchvision/NAME"} == context


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(37, 51), (64, 64)])
def test_logits_have_the_tasks_shape_at_any_size(name: str, size: tuple[int, int]) -> None:
    model = make(name).eval()
    shape = {
        "context": (2, CLASSES),
        "context_pixels": (2, CLASSES, *size),
        "context_map": (2, 1 + CLASSES, *size),
        "context_scene": (2, CLASSES),
    }[str(model.task)]
    with torch.no_grad():
        logits = model(hidden_scene(2, *size))
    assert logits.shape == shape and logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_of_a_teacher_gets_a_finite_gradient(name: str) -> None:
    model = make(name)
    output = model.train()(hidden_scene(3, 65, 49))
    assert isinstance(output, Tensor) and type(output) is type(
        model.eval()(torch.zeros(1, 4, 64, 64))
    )
    output.square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", SMALL)
def test_a_teacher_survives_its_state_dict(name: str) -> None:
    first, second = make(name).eval(), make(name).eval()
    images = hidden_scene(2, 48, 64)
    with torch.no_grad():
        assert not torch.equal(first(images), second(images))
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_a_teachers_named_layer_can_be_tapped(name: str) -> None:
    _, layer, channels = SMALL[name]
    model = make(name).eval()
    taps = FeatureTaps(model, [layer])
    model(hidden_scene(2, 64, 64))
    features = taps.collect()[layer]
    assert features.ndim == 4 and features.shape[:2] == (2, channels)


@pytest.mark.parametrize("name", SMALL)
def test_a_teacher_takes_no_objects_and_bfloat16(name: str) -> None:
    model = make(name)
    for mode in (False, True):
        assert len(model.train(mode)(torch.zeros(0, 4, 32, 32))) == 0
        assert all(value.isfinite().all() for value in model.state_dict().values())
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert model(hidden_scene(2, 48, 48)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_equal_seeds_give_equal_teachers(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(make(name).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", SMALL)
def test_a_teachers_unknown_option_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher '{name}': unknown option 'wdth'"):
        make(name, wdth=3)


@pytest.mark.parametrize(("up", "millions"), [("transposed", 31.0), ("bilinear", 17.3)])
def test_the_unet_has_the_published_size(up: str, millions: float) -> None:
    with torch.device("meta"):
        model = TEACHERS["unet"].load()(80, up=up)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_bilinear_unet_works_at_any_depth(depth: int) -> None:
    model = make("unet", up="bilinear", depth=depth).eval()
    assert model(torch.zeros(1, 4, 19, 33)).shape == (1, CLASSES, 19, 33)


def test_the_unet_starts_at_the_log_odds_of_its_prior() -> None:
    model = make("unet", prior_probability=0.02)
    bias = next(p for path, p in model.named_parameters() if path == "head.bias")
    torch.testing.assert_close(bias.data, torch.full((CLASSES,), math.log(0.02 / 0.98)))


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("local_unit", [True, False])
def test_a_fourier_unet_works_with_each_option(up: str, local_unit: bool) -> None:
    model = make("unet_ffc", up=up, ratio=0.75, local_unit=local_unit).eval()
    scene = hidden_scene(1, 32, 48)
    moved = scene.clone()
    moved[:, :3, -1, -1] += 5
    with torch.no_grad():
        change = (model(scene) - model(moved)).abs()
    assert change[:, :, 0, 0].max() > 0  # at depth 2 a plain U-Net sees but 44 pixels
    names = {path for path, _ in model.named_modules() if path.endswith("local_unit")}
    assert bool(names) is local_unit


def test_a_fourier_unet_of_ratio_zero_is_a_plain_one() -> None:
    with torch.device("meta"):
        fourier, plain = make("unet_ffc", ratio=0.0, up="transposed"), make("unet")
    assert [p.shape for p in fourier.parameters()] == [p.shape for p in plain.parameters()]


def test_the_pixel_resnet_reads_layer_two() -> None:
    model = TEACHERS["resnet_pixel"].load()(CLASSES).eval()
    taps = FeatureTaps(model, ["feature"])
    with torch.no_grad():
        assert model(hidden_scene(1, 64, 64)).shape == (1, 1 + CLASSES, 64, 64)
    assert taps.collect()["feature"].shape == (1, 128, 8, 8)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(0.72, abs=0.02)


@pytest.mark.parametrize("name", ["resnet_pixel", "resnet_multilabel"])
def test_the_grey_teachers_see_no_colour(name: str) -> None:
    model = make(name).eval()
    scene = hidden_scene(1, 64, 64)
    other = scene.clone()
    other[:, 0] += 0.587
    other[:, 1] -= 0.299
    with torch.no_grad():
        torch.testing.assert_close(model(scene), model(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("resnet18", {"stride": 16}),
        ("efficientnet_b0", {}),
        ("mobilenet_v3_small", {"levels": 2}),
        pytest.param("vgg11", {"stride": 16}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {}, marks=pytest.mark.slow),
        pytest.param("densenet121", {"stride": 16, "levels": 2}, marks=pytest.mark.slow),
    ],
)
def test_any_family_of_torchvision_is_a_teacher(family: str, options: dict[str, object]) -> None:
    model = make("trunk", name=family, dense=True, hidden=8, **options).train()
    output = model(hidden_scene(2, 64, 64))
    assert output["logits"].shape == (2, CLASSES) and output["dense"].shape[1] == CLASSES
    (output["logits"].square().mean() + output["dense"].square().mean()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)


def test_the_cnn_has_a_relu_between_its_dense_layers() -> None:
    layers = [type(module) for module in make("cnn").get_submodule("head").children()]
    between = layers[layers.index(nn.Linear) + 1 :]
    assert between.index(nn.ReLU) < between.index(nn.Linear)


def test_the_trunk_teacher_reads_around_the_mask_not_the_mask_alone() -> None:
    model = make("trunk", geometry=False, dropout=0.0).train()
    scene = hidden_scene(4, 96, 96)
    elsewhere = scene.clone()
    elsewhere[1, :3, 80:, 80:] += 3
    with torch.no_grad():  # in training: a new teacher's running statistics fit no trunk yet
        assert not torch.allclose(model(scene)[1], model(elsewhere)[1], rtol=0.01)


def test_the_trunk_teacher_does_not_read_the_padding() -> None:
    scene = hidden_scene(2, 96, 96)
    black = torch.tensor(BLACK).view(3, 1, 1)
    scene[:, :3, 64:] = black
    scene[:, :3, :, 80:] = black
    model = make("trunk", name="squeezenet1_1", dropout=0.0).eval()
    nn.init.normal_(model.get_parameter("head.1.weight"))
    kept: list[Tensor] = []

    def spoil(module: nn.Module, inputs: object, maps: list[Tensor]) -> list[Tensor]:
        kept.extend(maps)
        spoilt = maps[0].clone()
        spoilt[:, :, 4:] = 9.0
        spoilt[:, :, :, 5:] = -9.0
        return [spoilt]

    with torch.no_grad():
        before = model(scene)
        model.get_submodule("trunk").register_forward_hook(spoil)
        torch.testing.assert_close(model(scene), before)
    assert kept[0].shape[2:] == (5, 5)


def test_the_trunk_teacher_takes_a_mask_of_any_shape_or_none() -> None:
    model = make("trunk").eval()
    scene = hidden_scene(3, 64, 64)
    scene[0, 3] = 0
    scene[1, 3] = 1
    scene[2, 3].fill_diagonal_(1)
    with torch.no_grad():
        assert model(scene).isfinite().all()


def test_the_trunk_teacher_can_be_frozen_up_to_a_step() -> None:
    model = make("trunk", frozen="all", hidden=8)
    learning = {path.split(".")[0] for path, p in model.named_parameters() if p.requires_grad}
    assert learning == {"head"}
    before = {path: value.clone() for path, value in model.state_dict().items()}
    model.train()(hidden_scene(2, 64, 64)).sum().backward()
    changed = {p for p, value in model.state_dict().items() if not torch.equal(value, before[p])}
    # No weight, but the statistics that the head standardises its input by.
    assert changed == {f"around.norm.{n}" for n in ("running_mean", "running_var")} | {
        "around.norm.num_batches_tracked"
    }
    partly = make("trunk", frozen="stage2", batch_norm_frozen=True)
    assert partly.get_parameter("trunk.trunk.stage3.0.branch2.0.weight").requires_grad


def test_a_kept_stride_gives_the_trunk_teacher_a_finer_grid() -> None:
    model = make("trunk", name="resnet18", stride=16).eval()
    taps = FeatureTaps(model, ["trunk.trunk"])
    model(hidden_scene(1, 64, 64))
    assert taps.collect()["trunk.trunk"].shape[2:] == (4, 4)


def test_the_trunk_teacher_reads_several_strides() -> None:
    one, two = (make("trunk", name="resnet18", levels=levels, hidden=3) for levels in (1, 2))
    assert one.get_parameter("head.1.weight").shape[1] == 4 * 512 + 8
    assert two.get_parameter("head.1.weight").shape[1] == 4 * (256 + 512) + 8
    assert two.train()(hidden_scene(3, 64, 64)).isfinite().all()


def test_a_remembering_trunk_teacher_agrees_with_one_that_computes() -> None:
    torch.manual_seed(4)
    computes = make("trunk", frozen="all", levels=2).eval()
    torch.manual_seed(4)
    remembers = make("trunk", frozen="all", levels=2, remember=True).eval()
    scene = hidden_scene(3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(remembers(scene), computes(scene), rtol=1e-3, atol=1e-4)
    remembers.load_state_dict(computes.state_dict())  # one layout of files for both


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {"width": 3}, "width must be even"),
        ("unet", {"depth": 0}, "depth at least 1"),
        ("unet", {"prior_probability": 1.0}, "between 0 and 1, got 1.0"),
        ("unet_ffc", {"ratio": 0.3}, "ratio times width an integer, got ratio 0.3 and width 4"),
        ("unet_ffc", {"ratio": 1.0}, r"ratio must be in \[0, 1\)"),
        ("unet_ffc", {"width": 3}, "unet_ffc: width must be even"),
        ("resnet_pixel", {"grid": 0}, "grid must be at least 1, got 0"),
        ("resnet_pixel", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("resnet_pixel", {"until": "layer2"}, "has no step 'layer2'"),
        ("resnet_multilabel", {"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ("cnn", {"grid": 0}, "grid must be at least 1, got 0"),
        ("cnn", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("trunk", {"margins": [-1.0]}, "margins must be above 0"),
        ("trunk", {"margins": [], "scene": False}, "at least one of margins, or scene to true"),
        ("trunk", {"min_ring": -1.0}, "min_ring must be at least 0"),
        ("trunk", {"levels": 9}, "levels must be in 1..5, got 9"),
        ("trunk", {"remember": True}, "remember needs frozen: all"),
        ("trunk", {"remember": True, "frozen": "stage2"}, "remember needs frozen: all"),
        ("trunk", {"name": "resnet17"}, "unknown torchvision classifier"),
        ("trunk", {"frozen": "stage9"}, "has no step 'stage9'"),
    ],
)
def test_a_teachers_bad_option_is_named(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "trunk"])
def test_a_teacher_compiles_in_one_graph(name: str) -> None:
    model = make(name).eval()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True, backend="eager")
    scene = hidden_scene(2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(scene), model(scene))
