"""The contract of the networks that say where people look: students A and B, and MSI-Net."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import students
import teachers
from kd.config.recipes import Model
from kd.distillation.hooks import FeatureTaps
from kd.errors import ConfigError, UserError
from kd.nn.trunk import build_trunk
from kd.problems import problem
from kd.registry import build

BOTH = {
    name: entry
    for name, entry in {**students.STUDENTS, **teachers.TEACHERS}.items()
    if entry.problem == "saliency"
}
TRUNK = "shufflenet_v2_x0_5"
# Name, options, and what comes out.
CASES = [
    ("saliency", {"branches": "a"}, ["saliency"]),
    ("saliency", {"branches": "b"}, ["saliency", "teacher_saliency"]),
    ("msinet", {"head": 16}, ["saliency"]),
    ("msinet", {"head": 16, "stride": 16}, ["saliency"]),
]
every_network = pytest.mark.parametrize(("name", "options", "keys"), CASES)


def make(name: str, /, **options: object) -> Any:
    return build(BOTH, name, {"trunk": TRUNK, **options}, what="network")


def pictures(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def settle(model: Any) -> Any:
    """Batch norms that have seen images, so that what they pass on differs between places."""
    with torch.no_grad():
        for _ in range(5):
            model.train()(pictures())
    return model.eval()


def test_the_registries_list_them() -> None:
    assert {name for name, *_ in CASES} == BOTH.keys()


@every_network
def test_maps_have_the_images_size_whatever_it_is(
    name: str, options: dict[str, object], keys: list[str]
) -> None:
    model = make(name, **options)
    for height, width in ((64, 96), (40, 56), (37, 51)):
        for training in (True, False):
            with torch.no_grad():
                output = model.train(training)(pictures(height, width))
            assert list(output) == keys
            for one in output.values():
                assert one.shape == (2, 1, height, width) and one.isfinite().all()
                assert (one.flatten(1).std(dim=1) > 0).all()


@every_network
def test_an_odd_size_is_a_padded_image_whose_padding_is_cut_off(
    name: str, options: dict[str, object], keys: list[str]
) -> None:
    model, images = settle(make(name, **options)), pictures(37, 51)
    larger = nn.functional.pad(images, (0, 64 - 51, 0, 64 - 37))
    if model.stride < 32:
        larger = larger[:, :, : -(-37 // model.stride) * model.stride]
        larger = larger[:, :, :, : -(-51 // model.stride) * model.stride]
    with torch.no_grad():
        small, whole = model(images), model(larger)
    for key in keys:
        assert torch.equal(small[key], whole[key][:, :, :37, :51])


@every_network
def test_every_parameter_learns(name: str, options: dict[str, object], keys: list[str]) -> None:
    model = make(name, **options).train()
    output = model(pictures())
    sum(one.flatten(1).log_softmax(dim=1)[:, ::7].mean() for one in output.values()).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        # A constant on a map changes no softmax.
        blind = path.endswith("saliency.conv.bias")
        assert blind or parameter.grad.count_nonzero() > 0, path


@every_network
def test_a_place_of_the_map_is_the_place_of_the_image(
    name: str, options: dict[str, object], keys: list[str]
) -> None:
    model, images = settle(make(name, **options)), pictures(128, 160)
    where = images.clone().requires_grad_()
    model(where)[keys[-1]][:, :, 30:34, 120:124].sum().backward()
    assert where.grad is not None
    heat = where.grad.abs().sum(dim=(0, 1))
    rows, columns = heat.sum(dim=1), heat.sum(dim=0)
    assert rows[:64].sum() > 2 * rows[64:].sum()
    assert columns[80:].sum() > 2 * columns[:80].sum()


@every_network
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_saved_network_comes_back_from_its_file(
    name: str, options: dict[str, object], keys: list[str], kind: str, tmp_path: Path
) -> None:
    first, images = make(name, **options).eval(), pictures()
    file = tmp_path / f"model.{kind}"
    save: Callable[..., None] = save_file if kind == "safetensors" else torch.save
    save(first.state_dict(), file)
    second = make(name, **options, file=str(file)).eval()
    with torch.no_grad():
        expected, found = first(images), second(images)
    for key in keys:
        assert torch.equal(found[key], expected[key])


@every_network
def test_autocast_keeps_logits_in_full_precision(
    name: str, options: dict[str, object], keys: list[str]
) -> None:
    model = make(name, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = model(pictures())
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in output.values())


@every_network
def test_the_trunks_weights_come_from_a_file_of_torchvisions(
    name: str, options: dict[str, object], keys: list[str], tmp_path: Path
) -> None:
    state = build_trunk(TRUNK).state_dict()
    torch.save(state, tmp_path / "trunk.pth")
    own = make(name, **options, weights=str(tmp_path / "trunk.pth")).state_dict()
    prefix = "trunk.trunk." if name == "msinet" else "trunk."
    assert state and all(torch.equal(own[prefix + key], value) for key, value in state.items())
    with pytest.raises(UserError, match=r"weights file nowhere\.pth does not exist"):
        make(name, **options, weights="nowhere.pth")


def test_photographs_weights_of_a_mobilenet_fit_both(shared_data: Path) -> None:
    file = shared_data / "weights" / "mobilenet_v2_features.pth"
    if not file.is_file():
        pytest.skip(f"no {file}")
    for name in BOTH:
        model = make(name, trunk="mobilenet_v2", weights=str(file)).eval()
        with torch.no_grad():
            assert model(pictures())["saliency"].isfinite().all()


@pytest.mark.parametrize("trunk", ["resnet18", TRUNK])
def test_a_and_b_of_one_seed_start_from_the_same_weights(trunk: str) -> None:
    torch.manual_seed(3)
    a = make("saliency", trunk=trunk, branches="a")
    torch.manual_seed(3)
    b = make("saliency", trunk=trunk, branches="b")
    shared = b.state_dict()
    for path, value in a.state_dict().items():
        assert torch.equal(value, shared.pop(path)), path
    assert shared.keys() == {"teacher_saliency.conv.weight", "teacher_saliency.conv.bias"}
    images = pictures()
    with torch.no_grad():
        found = b.eval()(images)
        assert torch.equal(found["saliency"], a.eval()(images)["saliency"])
    assert not torch.equal(found["saliency"], found["teacher_saliency"])


def test_the_students_have_the_published_number_of_parameters() -> None:
    a, b = (make("saliency", trunk="resnet18", branches=branches) for branches in "ab")
    assert 12.7e6 < parameters(a) < 12.8e6
    assert parameters(b) - parameters(a) == 16 * 9 + 1
    assert [stage.block[0].out_channels for stage in a.decoder] == [256, 128, 64, 32, 16]
    assert [stage.scale for stage in a.decoder] == [2] * 5


@pytest.mark.parametrize(
    ("trunk", "scales"),
    [
        ("squeezenet1_1", [1, 2, 2, 2, 2]),
        pytest.param("densenet121", [2] * 5, marks=pytest.mark.slow),
        pytest.param("swin_t", [2] * 5, marks=pytest.mark.slow),
        pytest.param("vit_b_16", [1, 2, 2, 2, 2], marks=pytest.mark.slow),
    ],
)
def test_a_student_stands_on_trunks_of_other_grids(trunk: str, scales: list[int]) -> None:
    model = make("saliency", trunk=trunk).eval()
    assert [stage.scale for stage in model.decoder] == scales
    with torch.no_grad():
        output = model(pictures(75, 91))
    assert all(one.shape == (2, 1, 75, 91) for one in output.values())


@pytest.mark.parametrize(("name", "path"), [("saliency", "decoder"), ("msinet", "pyramid")])
def test_layers_can_be_tapped(name: str, path: str) -> None:
    model = make(name)
    taps = FeatureTaps(model, [path, "trunk"])
    model(pictures())
    features = taps.collect()
    assert features[path].shape == ((2, 16, 64, 96) if name == "saliency" else (2, 256, 8, 12))
    assert features["trunk"].shape[2:] == (64 // model.stride, 96 // model.stride)


def test_a_recipe_builds_them_without_classes() -> None:
    saliency = problem("saliency")
    teacher = saliency.build_teacher(Model(name="msinet", options={"trunk": TRUNK, "head": 16}), 7)
    assert list(teacher(pictures())) == ["saliency"]
    section = Model(name="saliency", options={"trunk": TRUNK})
    student = saliency.build_student(section, 1, outputs=["teacher_saliency"])
    assert list(student(pictures())) == ["saliency", "teacher_saliency"]
    assert list(saliency.build_student(section, 1)(pictures())) == ["saliency"]
    with pytest.raises(ConfigError, match="unknown option 'num_classes'"):
        saliency.build_teacher(Model(name="msinet", options={"num_classes": 1}), 7)
    with pytest.raises(UserError, match="student 'resnet18' is for objects, not saliency"):
        saliency.build_student(Model(name="resnet18"), 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("saliency", {"branches": "c"}, "'branches' must be 'a' or 'b', got 'c'"),
        ("saliency", {"trunk": "resnet17"}, "unknown torchvision classifier 'resnet17'"),
        ("saliency", {"width": 0.5, "weights": "x.pth"}, "weights are for the full width"),
        ("saliency", {"fiel": "x.pth"}, "unknown option 'fiel'; did you mean 'file'"),
        ("msinet", {"stride": 32}, "stride must be 8 or 16, got 32"),
        ("msinet", {"head": 4}, "head must be at least 8, got 4"),
        ("msinet", {"trunk": "vit_b_16"}, "stride must be one of 16, got 8"),
        ("msinet", {"file": "nowhere.pth"}, r"weights file nowhere\.pth does not exist"),
    ],
)
def test_a_bad_option_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_a_file_of_the_other_branches_is_refused(tmp_path: Path) -> None:
    torch.save(make("saliency", branches="a").state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"missing teacher_saliency\.conv\.weight"):
        make("saliency", branches="b", file=str(tmp_path / "a.pth"))
