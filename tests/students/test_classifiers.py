"""The contract of the student classifiers, and the product of experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from kd.distillation.hooks import FeatureTaps
from kd.errors import ConfigError, UserError
from kd.registry import build
from students import STUDENTS
from students.classifiers import SceneClassifier, build_student

SLOW = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mobilenet_v2", "regnet_x_400mf", "swin_t", "vgg11_bn"),
    *("vit_b_32",),
]
FAMILIES = [
    *("shufflenet_v2_x0_5", "resnet18", "squeezenet1_1", "mobilenet_v3_small"),
    *("timm/resnet10t", "timm/mobilenetv3_small_050"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]
QUICK = "shufflenet_v2_x0_5"
CLASSES = 5
ROIS = torch.tensor(
    [[0, 4, 6, 40, 50], [0, 60, 2, 95, 30], [1, 0, 0, 97, 79], [1, 30, 30, 33, 34]]
).float()


def scenes(height: int = 79, width: int = 97) -> Tensor:
    return torch.randn(2, 3, height, width)


def student(name: str = QUICK, /, **options: object) -> SceneClassifier:
    built = build_student(name, num_classes=CLASSES, **options)  # type: ignore[arg-type]
    return built


@pytest.mark.parametrize("name", FAMILIES)
def test_the_contract_of_a_student(name: str) -> None:
    """Shape at an odd size, one output type, gradients, taps and state dict, on one model."""
    model = build(STUDENTS, name, {}, what="student", num_classes=CLASSES)
    images = scenes()
    taps = FeatureTaps(model, ["trunk.trunk"])
    output = model.train()(images, ROIS)
    features = taps.collect()["trunk.trunk"]
    assert features.shape[:2] == (2, model.get_submodule("trunk.trunk").channels)
    assert list(output) == ["logits", "appearance", "context"]
    assert all(one.shape == (4, CLASSES) and one.isfinite().all() for one in output.values())
    nn.functional.cross_entropy(output["logits"], torch.tensor([0, 1, 2, 3])).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
    taps.remove()
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        evaluated, again = model.eval()(images, ROIS), copied(images, ROIS)
    assert list(evaluated) == list(output)
    for key, value in evaluated.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_logits_are_the_product_of_the_experts() -> None:
    prior = [0.4, 0.3, 0.1, 0.1, 0.1]
    model = student(prior=prior, strength=0.7).eval()
    nn.init.normal_(model.context.layers[-1].weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        output = model(scenes(), ROIS)
    for row in range(4):
        appearance = output["appearance"][row].softmax(0)
        context = output["context"][row].softmax(0)
        product = [
            math.log(appearance[c]) + 0.7 * (math.log(context[c]) - math.log(prior[c]))
            for c in range(CLASSES)
        ]
        torch.testing.assert_close(
            output["logits"][row], torch.tensor(product), rtol=1e-4, atol=1e-5
        )


def test_a_new_context_head_says_nothing_but_the_prior() -> None:
    prior = [0.4, 0.3, 0.1, 0.1, 0.1]
    model = student(prior=prior).eval()
    with torch.no_grad():
        output = model(scenes(), ROIS)
    expected = torch.tensor(prior).expand(4, -1)
    torch.testing.assert_close(output["context"].softmax(1), expected, rtol=0.1, atol=0.01)


def test_a_bare_student_has_no_context_and_the_same_first_weights() -> None:
    torch.manual_seed(1)
    full = student()
    torch.manual_seed(1)
    bare = student(context=False)
    state = full.state_dict()
    for path, value in bare.state_dict().items():
        assert torch.equal(value, state[path]), path
    assert {path.split(".")[0] for path in state.keys() - bare.state_dict().keys()} == {"context"}
    with torch.no_grad():
        output = bare.eval()(scenes(), ROIS)
    assert list(output) == ["logits", "appearance"]


@pytest.mark.parametrize("view", ["region", "crop"])
@pytest.mark.parametrize("context", [True, False])
def test_no_objects_give_no_rows_and_leave_batch_norm_sound(view: str, context: bool) -> None:
    model = student(view=view, crop_size=64, context=context).train()
    output = model(scenes(), ROIS[:0])
    assert all(one.shape == (0, CLASSES) for one in output.values())
    output["logits"].sum().backward()
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("view", ["region", "crop"])
def test_each_object_is_judged_by_itself(view: str) -> None:
    model = student(view=view, crop_size=64).eval()
    images = scenes()
    with torch.no_grad():
        whole = model(images, ROIS)
        order = torch.tensor([2, 0, 3, 1])
        shuffled = model(images, ROIS[order])
    torch.testing.assert_close(shuffled["logits"], whole["logits"][order], rtol=1e-4, atol=1e-5)
    second = ROIS[2:3].clone()
    second[:, 0] = 0
    with torch.no_grad():
        alone = model(images[1:], second)
    torch.testing.assert_close(alone["logits"], whole["logits"][2:3], rtol=1e-4, atol=1e-5)


def test_the_crop_view_sees_the_object_in_its_crop_alone() -> None:
    model = student(view="crop", crop_size=64, margin=0.0).eval()
    for norm in (model.seen, model.context.around.norm):  # type: ignore[union-attr]
        norm.running_var.fill_(1e-6)  # type: ignore[union-attr]  # a random trunk says little
    images = scenes()
    changed = images.clone()
    changed[0, :, 60:, 50:] += 3  # far from the first object
    with torch.no_grad():
        before, after = model(images, ROIS), model(changed, ROIS)
    torch.testing.assert_close(after["appearance"][0], before["appearance"][0])
    assert not torch.equal(after["context"][0], before["context"][0])


def test_taps_hold_the_scenes_features_in_the_crop_view_too() -> None:
    model = student(view="crop", crop_size=64)
    taps = FeatureTaps(model, ["trunk.trunk"])
    model(scenes(), ROIS)
    assert taps.collect()["trunk.trunk"].shape == (2, 1024, 3, 4)


@pytest.mark.parametrize(
    ("options", "side"), [({}, 2), ({"stride": 16}, 4), ({"stride": 8}, 8), ({"upscale": 2}, 4)]
)
def test_small_images_can_have_a_finer_grid(options: dict[str, object], side: int) -> None:
    model = student("resnet18", **options).eval()
    taps = FeatureTaps(model, ["trunk.trunk"])
    with torch.no_grad():
        model(scenes(64, 64), ROIS)
    assert taps.collect()["trunk.trunk"].shape[2:] == (side, side)


def test_the_strength_is_learned_where_asked_for() -> None:
    fixed, learned = student(strength=0.5), student(strength=0.5, learn_strength=True)
    assert "strength" not in dict(fixed.named_parameters())
    assert dict(learned.named_parameters())["strength"].item() == 0.5
    fixed.load_state_dict(learned.state_dict())  # one layout of files for both


@pytest.mark.parametrize("remember", [False, True])
def test_a_frozen_trunk_does_not_change(remember: bool) -> None:
    model = student(frozen="all", hidden=8, dropout=0.1, remember=remember).train()
    before = {path: value.clone() for path, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(scenes(), ROIS)["logits"].square().sum().backward()
    optimizer.step()
    changed = {p for p, value in model.state_dict().items() if not torch.equal(value, before[p])}
    assert changed and not any(path.startswith("trunk") for path in changed)


@pytest.mark.parametrize("view", ["region", "crop"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_logits_in_full_precision(view: str, training: bool) -> None:
    model = student(view=view, crop_size=64).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits = model(scenes(), ROIS)["logits"]
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("view", ["region", "crop"])
def test_a_remembering_student_agrees_with_one_that_computes(view: str) -> None:
    options: dict[str, object] = {"view": view, "crop_size": 64, "frozen": "all", "levels": 2}
    torch.manual_seed(4)
    computes = student(**options).eval()
    torch.manual_seed(4)
    remembers = student(**options, remember=True).eval()
    images = scenes()
    with torch.no_grad():
        expected = computes(images, ROIS)["logits"]
        for _ in range(2):
            found = remembers(images, ROIS)["logits"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert remembers(images, ROIS[:0])["logits"].shape == (0, CLASSES)


def test_one_object_does_not_move_the_statistics() -> None:
    model = student(context=False).train()
    before = {path: value.clone() for path, value in model.seen.state_dict().items()}
    model(scenes(), ROIS[:1])
    assert all(torch.equal(v, before[p]) for p, v in model.seen.state_dict().items())
    model(scenes(), ROIS)
    assert model.seen.num_batches_tracked == 1


@pytest.mark.slow
def test_a_student_compiles_in_one_graph() -> None:
    model = student("resnet18", stride=16).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = scenes()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, ROIS), model(images, ROIS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": [0.5, 0.5]}, "prior must hold 5 probabilities above 0, got 2"),
        ({"prior": [0.5, 0.5, 0.0, 0.1, 0.1]}, "the smallest of them 0.0"),
        ({"view": "object"}, "view must be 'region' or 'crop'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"region_size": 0}, "region_size must be at least 1, got 0"),
        ({"upscale": 0}, "upscale must be at least 1"),
        ({"ring_margin": 0.0}, "ring_margin above 0"),
        ({"min_ring": -1.0}, "min_ring must be at least 0, got -1.0"),
        ({"levels": 0}, "levels must be in 1..5, got 0"),
        ({"remember": True}, "remember needs frozen: all"),
        ({"stride": 5}, "stride must be one of"),
        ({"weights": "nowhere.pth"}, "weights file nowhere.pth does not exist"),
    ],
)
def test_a_students_bad_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        student(**options)


def test_options_are_checked_against_the_signature() -> None:
    options = {"viwe": "crop", "upscale": 2.5}
    with pytest.raises(ConfigError) as caught:
        build(STUDENTS, "resnet18", options, what="student", num_classes=3)
    assert "unknown option 'viwe'; did you mean 'view'" in str(caught.value)
    assert "'upscale' must be a valid integer, got 2.5" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown option 'num_classes'"):
        build(STUDENTS, "resnet18", {"num_classes": 3}, what="student", num_classes=3)


def test_every_trunk_in_the_registry_is_torchvisions() -> None:
    from torchvision import models

    others = {"timm/NAME", "torchvision/NAME", "transferred"}
    trunks = {name for name, one in STUDENTS.items() if one.problem == "objects"} - others
    assert len(trunks) > 30 and trunks <= set(models.list_models(module=models))
    with pytest.raises(UserError, match="unknown torchvision classifier 'resnet19'"):
        build_student("resnet19", num_classes=3)
