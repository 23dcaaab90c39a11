"""The contract of teachers that read a scene as tokens, and what each promises beyond it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.distillation.hooks import FeatureTaps
from kd.distillation.student import AdaptedStudent
from kd.errors import ConfigError, UserError
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.problems.objects.task import SceneTokens
from kd.registry import build
from teachers import TEACHERS

CLASSES, SIZE = 5, 48
TRUNK = {"pixels": "trunk", "trunk": "shufflenet_v2_x0_5", "levels": 1, "frozen": None}
SMALL: dict[str, tuple[str, dict[str, object]]] = {
    "annotations": ("scene_transformer", {"width": 16, "depth": 2}),
    "softmax": ("scene_transformer", {"width": 16, "depth": 2, "attention": "softmax"}),
    "patches": ("scene_transformer", {"width": 16, "depth": 2, "pixels": "patches",
                                      "annotations": False}),
    "both": ("scene_transformer", {"width": 16, "depth": 2, "pixels": "patches", "counts": True,
                                   "dense": True, "reach": 2}),
    "trunk": ("scene_transformer", {"width": 16, "depth": 1, **TRUNK}),
    "kinds": ("scene_transformer", {"width": 16, "depth": 1, "kinds": 6}),
    "cooccurrence": ("cooccurrence", {}),
    "prior": ("prior", {}),
}  # fmt: skip
TRAINED = [name for name, (teacher, _) in SMALL.items() if teacher == "scene_transformer"]


def make(name: str, **more: object) -> nn.Module:
    teacher, options = SMALL[name]
    built: nn.Module = build(TEACHERS, teacher, options | more, what="teacher", num_classes=CLASSES)
    return built


def awake(model: nn.Module) -> nn.Module:
    """Weights large enough that every input shows in the answer."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def scene(images: int = 2) -> dict[str, Tensor]:
    """A batch with three objects on each image, one of the images wider than high."""
    boxes = torch.tensor([[4.0, 4, 14, 16], [24, 4, 40, 12], [6, 20, 20, 34]])
    return {
        "images": torch.randint(0, 256, (images, 3, SIZE, SIZE), dtype=torch.uint8),
        "sizes": torch.tensor([[SIZE, SIZE], [36, SIZE]])[:images],
        "image_ids": torch.arange(images),
        "boxes": boxes.repeat(images, 1),
        "labels": torch.arange(3 * images) % CLASSES,
        "image_of": torch.arange(images).repeat_interleave(3),
        "object_ids": torch.arange(3 * images),
        "hidden": torch.tensor([0, 2, 4])[: 3 if images == 2 else 2],
        "hide_fraction": torch.ones(3 if images == 2 else 2),
    }


def ask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    task = SceneTokens(num_classes=CLASSES, image_inputs=model.image_inputs)  # type: ignore[arg-type]
    output, _ = AdaptedStudent(model)(*task.inputs(batch))
    log_probs: Tensor = task.decode(output, batch)
    return log_probs


def fitted(model: nn.Module) -> nn.Module:
    model.fit(random_objects(30))  # type: ignore[operator]
    return model


def random_objects(images: int, seed: int = 0) -> Objects:
    rng = np.random.default_rng(seed)
    count = images * 4
    low, sides = rng.random((count, 2)) * 0.6, 0.05 + rng.random((count, 2)) * 0.3
    return Objects(
        torch.from_numpy(rng.integers(0, CLASSES, count)),
        torch.ones(count, dtype=torch.bool),
        torch.from_numpy(np.concatenate([low, low + sides], axis=1)).float(),
        torch.ones(count),
        torch.arange(images).repeat_interleave(4),
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_token_teacher_answers_for_each_hidden_object(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        log_probs = ask(model, scene())
    assert log_probs.shape == (3, CLASSES) and log_probs.isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", SMALL)
def test_a_posterior_knows_neither_its_own_pixels_nor_its_own_label(name: str) -> None:
    model = awake(fitted(make(name)))
    batch = scene()
    with torch.no_grad():
        before = ask(model, batch)
        changed = {key: value.clone() for key, value in batch.items()}
        changed["images"][0, :, 4:16, 4:14] = 255  # the first object's box, nothing else
        changed["labels"][0] = 3
        after = ask(model, changed)
    assert torch.equal(before[0], after[0])  # of the object itself
    torch.testing.assert_close(before[2], after[2])  # of the other image's
    told = model.reads_labels or model.image_inputs != "none"
    assert torch.equal(before[1], after[1]) != told  # its neighbour sees or is told of it


@pytest.mark.parametrize("name", ["annotations", "both", "kinds", "cooccurrence"])
def test_one_pass_gives_the_same_as_hiding_one_by_one(name: str) -> None:
    model = awake(fitted(make(name)))
    batch = scene()
    with torch.no_grad():
        together = ask(model, batch)
        for row, hidden in enumerate(batch["hidden"]):
            alone = {**batch, "hidden": hidden[None], "hide_fraction": torch.ones(1)}
            torch.testing.assert_close(ask(model, alone)[0], together[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["annotations", "trunk", "kinds", "cooccurrence"])
def test_objects_without_a_name_are_left_out(name: str) -> None:
    model = awake(fitted(make(name)))
    batch = scene()
    batch["hidden"] = torch.tensor([0, 4])
    batch["hide_fraction"] = torch.ones(2)
    with torch.no_grad():
        unknown = {**batch, "labels": torch.where(torch.arange(6) == 1, -1, batch["labels"])}
        withheld = {**batch, "also_hidden": torch.arange(6) == 1}
        as_unknown, as_withheld = ask(model, unknown), ask(model, withheld)
    torch.testing.assert_close(as_unknown, as_withheld)
    assert not torch.allclose(as_unknown[0], ask(model, batch)[0])
    torch.testing.assert_close(as_unknown[1], ask(model, batch)[1])  # on the other image


def test_a_lone_object_gets_an_answer_too() -> None:
    batch = scene()
    kept = torch.tensor([0, 3])
    for key in ("boxes", "labels", "image_of", "object_ids"):
        batch[key] = batch[key][kept]
    batch["hidden"], batch["hide_fraction"] = torch.tensor([0, 1]), torch.ones(2)
    for name in SMALL:
        assert ask(fitted(make(name)).eval(), batch).isfinite().all(), name


@pytest.mark.parametrize("name", ["annotations", "patches", "trunk", "prior"])
def test_nothing_hidden_is_no_error(name: str) -> None:
    batch = scene()
    batch["hidden"], batch["hide_fraction"] = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    for mode in (True, False):
        assert ask(make(name).train(mode), batch).shape == (0, CLASSES)


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_of_a_token_teacher_gets_a_finite_gradient(name: str) -> None:
    model = fitted(make(name)).train()
    task = SceneTokens(num_classes=CLASSES, image_inputs=model.image_inputs)  # type: ignore[arg-type]
    batch = scene()
    output, _ = AdaptedStudent(model)(*task.inputs(batch))
    losses = task.losses(output, batch)
    assert set(losses) == {"cross_entropy"} | ({"visible"} if name == "both" else set())
    sum(loss.value for loss in losses.values()).backward()  # type: ignore[union-attr]
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", SMALL)
def test_a_token_teacher_survives_its_state_dict(name: str) -> None:
    first, second = awake(fitted(make(name))), make(name).eval()
    second.load_state_dict(first.state_dict())
    batch = scene()
    with torch.no_grad():
        assert torch.equal(ask(first, batch), ask(second, batch))


@pytest.mark.parametrize("name", TRAINED)
def test_a_token_teacher_takes_bfloat16(name: str) -> None:
    model = make(name).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert ask(model, scene()).isfinite().all()


def test_the_readers_can_be_tapped_for_each_hidden_object() -> None:
    model = make("annotations").eval()
    taps = FeatureTaps(model, ["readers.1"])
    ask(model, scene())
    assert taps.collect()["readers.1"].shape == (3, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotations": False}, "there is no input; set annotations to true"),
        ({"pixels": "voxels"}, "option 'pixels' must be 'patches'"),
        ({"dense": True}, "dense needs pixels: patches"),
        ({"heads": 3}, "heads 3 must divide width 16"),
        (
            {"annotations": False, "pixels": "patches", "kinds": 4},
            "kinds are learned from annotations",
        ),
        ({"pixels": "patches", "patch": 0}, "patch 0 must be 1 or more"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_a_transformer_that_cannot_be_built_says_why(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make("annotations", **options)
    with pytest.raises(ConfigError, match="unknown option 'widht'"):
        make("annotations", widht=3)


def test_the_prior_is_the_fraction_of_each_class() -> None:
    objects = random_objects(10)._replace(classes=torch.tensor([0] * 30 + [2] * 10))
    model = make("prior").eval()
    model.fit(objects)  # type: ignore[operator]
    fractions = torch.tensor([31.0, 1, 11, 1, 1]) / 45  # one is added to each count
    with torch.no_grad():
        torch.testing.assert_close(ask(model, scene()).exp(), fractions.expand(3, -1))


def slow_naive_bayes(objects: Objects, hidden: int, train: Objects) -> list[float]:
    """Plain naive Bayes over the company alone, with one pseudo-count, object by object."""
    seen = [int((train.classes == c).sum()) + 1 for c in range(CLASSES)]
    fraction = [count / sum(seen) for count in seen]
    scores = []
    for c in range(CLASSES):
        score = math.log(seen[c])
        for j in range(len(objects.classes)):
            if j == hidden or objects.image_of[j] != objects.image_of[hidden]:
                continue
            both = company = 0
            for a in range(len(train.classes)):
                for b in range(len(train.classes)):
                    if a != b and train.image_of[a] == train.image_of[b] and train.classes[a] == c:
                        company += 1
                        both += int(train.classes[b] == objects.classes[j])
            expected = fraction[int(objects.classes[j])]
            score += math.log((both + expected) / (company + 1) / expected)
        scores.append(score)
    total = math.log(sum(math.exp(score) for score in scores))
    return [score - total for score in scores]


def test_plain_naive_bayes_is_its_definition() -> None:
    train, asked = random_objects(12), random_objects(2, seed=5)
    model = NaiveBayes(CLASSES, evidence=("company",), fitted=False)
    model.fit(train)
    answers = model.eval()(asked, torch.tensor([1, 6]))
    for row, hidden in zip(answers, (1, 6), strict=True):
        slow = torch.tensor(slow_naive_bayes(asked, hidden, train))
        torch.testing.assert_close(row, slow, rtol=1e-4, atol=1e-5)


def test_in_training_an_image_is_left_out_of_the_counts() -> None:
    train = random_objects(12)
    model = NaiveBayes(CLASSES, evidence=("company", "place", "size"), fitted=False)
    model.fit(train)
    inside = model.train()(train, torch.tensor([5]))  # an object of image 1
    others = train.image_of != 1
    rest = NaiveBayes(CLASSES, evidence=("company",), fitted=False)
    rest.fit(Objects(*(part[others] for part in train))._replace(
        image_of=torch.arange(11).repeat_interleave(4)))  # fmt: skip
    model.evidence = frozenset({"company"})
    company = model.train()(train, torch.tensor([5]))
    assert inside.isfinite().all()
    # The fractions that lifts are taken against stay those of all objects, which hardly matters.
    torch.testing.assert_close(company, rest.eval()(train, torch.tensor([5])), rtol=0.05, atol=0.05)
    assert not torch.allclose(company, model.eval()(train, torch.tensor([5])), rtol=0.05, atol=0.05)


def test_evidence_without_information_loses_its_weight() -> None:
    """Classes drawn at random: the fitted model must not believe in their company."""
    train, fresh = random_objects(60), random_objects(200, seed=9)
    losses = {}
    for fit in (False, True):
        model = NaiveBayes(CLASSES, evidence=("company", "place", "size"), fitted=fit)
        model.fit(train)
        answers = model.eval()(fresh, torch.arange(len(fresh.classes)))
        losses[fit] = float(nn.functional.nll_loss(answers, fresh.classes))
    assert losses[True] < losses[False] and losses[True] < math.log(CLASSES) + 0.05


def test_unknown_evidence_is_an_error() -> None:
    with pytest.raises(UserError, match="option 'evidence' must be 'company'"):
        make("cooccurrence", evidence=["colour"])
