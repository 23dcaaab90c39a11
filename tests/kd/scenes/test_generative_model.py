"""The scenes' generative model and its exact posterior."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kd.errors import UserError
from kd.scenes import generative_model as model
from kd.scenes.generative_model import WORLD, Scene, World, exact_posteriors


def tiny_world() -> World:
    """Three classes, the first two confusable; two kinds."""
    rng = np.random.default_rng(5)
    sizes = rng.dirichlet(np.ones(len(model.SIZES)), (2, 3))
    log_size = np.log(sizes[:, [0, 0, 2]])[:, :, None].repeat(3, axis=2)
    pull = rng.normal(0, 1.5, (3, 3))
    return World(
        kinds=("a", "b"),
        classes=("x", "y", "z"),
        looks=np.array([0, 0, 1]),
        log_base=rng.normal(0, 1, (2, 3, 3)),
        pull=pull + pull.T,
        log_width=log_size[0],
        log_height=log_size[1],
        reach=20.0,
    )


def slow_density(world: World, kind: int, boxes: np.ndarray, classes: tuple[int, ...]) -> float:
    """p(kind) prod_i p(c_i | kind, c_<i) p(size_i | c_i, place_i), from the module's docstring."""
    density = 1 / len(world.kinds)
    for i, (x, y, width, height) in enumerate(boxes):
        row = y + height / 2
        place = 0 if row < 20.5 else 1 if row < 38.5 else 2
        weights = []
        for c in range(len(world.classes)):
            logit = world.log_base[kind, place, c]
            for j in range(i):
                bx, by, bw, bh = boxes[j]
                squared = (x + width / 2 - bx - bw / 2) ** 2 + (row - by - bh / 2) ** 2
                near = math.exp(-squared / (2 * world.reach**2))
                logit += world.pull[c, classes[j]] * near
            weights.append(math.exp(logit))
        density *= weights[classes[i]] / sum(weights)
        sizes = list(model.SIZES)
        density *= math.exp(world.log_width[classes[i], place, sizes.index(width)])
        density *= math.exp(world.log_height[classes[i], place, sizes.index(height)])
    return density


@pytest.mark.parametrize("given", ["pixels", "annotations", "both"])
def test_the_posterior_equals_a_sum_over_all_classes_of_all_objects(given: model.Given) -> None:
    world = tiny_world()
    for seed in range(3):
        scene = model.sample_scene(np.random.default_rng(seed), world=world)
        scene = Scene(scene.kind, scene.horizon, scene.classes[:4], scene.boxes[:4])
        for hidden in range(len(scene.classes)):
            expected = np.zeros(3)
            for kind in range(2):
                for classes in itertools.product(range(3), repeat=len(scene.classes)):
                    if given != "annotations" and kind != scene.kind:
                        continue
                    visible = world.looks if given == "pixels" else np.arange(3)
                    others = [i for i in range(len(classes)) if i != hidden]
                    if any(visible[classes[i]] != visible[scene.classes[i]] for i in others):
                        continue
                    expected[classes[hidden]] += slow_density(world, kind, scene.boxes, classes)
            got = exact_posteriors(scene, given=given, world=world)[hidden]
            np.testing.assert_allclose(got, expected / expected.sum(), rtol=1e-9)


def test_the_joint_density_sums_to_one_over_kinds_classes_and_sizes() -> None:
    world = tiny_world()
    total, centres = 0.0, np.array([[20, 15], [34, 45]])
    classes = np.array(list(itertools.product(range(3), repeat=2)))
    for sizes in itertools.product(model.SIZES, repeat=4):
        size = np.array(sizes).reshape(2, 2)
        boxes = np.concatenate([centres - size // 2, size], axis=1)
        density = model.log_density(boxes, classes, np.arange(2), world=world)
        total += float(np.exp(density).sum())
    assert total == pytest.approx(1.0)


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    return [model.sample_scene(np.random.default_rng([11, seed])) for seed in range(200)]


@pytest.fixture(scope="module")
def posteriors(sampled: list[Scene]) -> dict[str, np.ndarray]:
    """(K, C) of all objects."""
    givens: tuple[model.Given, ...] = ("pixels", "annotations", "both")
    return {g: np.concatenate([exact_posteriors(s, given=g) for s in sampled]) for g in givens}


def test_the_posterior_is_calibrated_on_sampled_scenes(
    sampled: list[Scene], posteriors: dict[str, np.ndarray]
) -> None:
    labels = np.concatenate([scene.classes for scene in sampled])
    for posterior in posteriors.values():
        np.testing.assert_allclose(posterior.sum(axis=1), 1.0)
        assert (posterior > 0).all()
        confidence = posterior.max(axis=1)
        right = posterior.argmax(axis=1) == labels
        error = math.sqrt((confidence * (1 - confidence)).sum()) / len(labels)
        assert right.mean() == pytest.approx(confidence.mean(), abs=3.5 * error)
        assert 0.6 < confidence.mean() < 0.85  # informative, not trivial


def test_more_information_raises_the_likelihood_of_the_true_class(
    sampled: list[Scene], posteriors: dict[str, np.ndarray]
) -> None:
    labels = np.concatenate([scene.classes for scene in sampled])
    rows = np.arange(len(labels))
    nll = {given: -np.log(p[rows, labels]).mean() for given, p in posteriors.items()}
    assert nll["both"] < min(nll["pixels"], nll["annotations"])


def test_neighbours_separate_confusable_classes_where_kind_and_place_do_not(
    sampled: list[Scene], posteriors: dict[str, np.ndarray]
) -> None:
    counts = np.full((len(WORLD.kinds), 3, len(WORLD.classes)), 0.5)
    for seed in range(800):
        scene = model.sample_scene(np.random.default_rng([13, seed]))
        for place, label in zip(scene.places, scene.classes, strict=True):
            counts[scene.kind, place, label] += 1
    full, place_only = [], []
    objects = [(s, c, p) for s in sampled for c, p in zip(s.classes, s.places, strict=True)]
    for (scene, label, place), posterior in zip(objects, posteriors["pixels"], strict=True):
        pair = np.flatnonzero(WORLD.looks == WORLD.looks[label])
        if len(pair) == 2:
            full.append(pair[posterior[pair].argmax()] == label)
            place_only.append(pair[counts[scene.kind, place, pair].argmax()] == label)
    assert 0.38 < len(full) / len(objects) < 0.52
    assert np.mean(full) > np.mean(place_only) + 0.1
    assert np.mean(full) > 0.7


def test_confusable_classes_have_equal_sizes() -> None:
    for look in np.unique(WORLD.looks):
        for table in (WORLD.log_width, WORLD.log_height):
            same = table[WORLD.looks == look]
            assert (same == same[0]).all()
    _, members = np.unique(WORLD.looks, return_counts=True)
    assert (members == 2).sum() >= 4


def test_scenes_follow_the_layout() -> None:
    for seed in range(300):
        scene = model.sample_scene(np.random.default_rng([15, seed]))
        assert model.COUNTS[0] <= len(scene.classes) <= model.COUNTS[1]
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, :2] + scene.boxes[:, 2:] <= model.CANVAS).all()
        centres = scene.boxes[:, :2] + scene.boxes[:, 2:] // 2
        assert sorted(map(tuple, centres)) == list(map(tuple, centres))
        for (a, b), (c, d) in itertools.combinations(centres, 2):
            assert (a - c) ** 2 + (b - d) ** 2 >= model.MIN_DISTANCE**2
        for place, row in zip(scene.places, centres[:, 1], strict=True):
            assert model.BANDS[place][0] <= row <= model.BANDS[place][1]


def test_the_posterior_ignores_the_class_of_the_hidden_object() -> None:
    scene = model.sample_scene(np.random.default_rng(3))
    for given in ("pixels", "annotations", "both"):
        before = exact_posteriors(scene, given=given)[1]
        other = scene.classes.copy()
        other[1] = (other[1] + 7) % len(WORLD.classes)
        after = Scene(scene.kind, scene.horizon, other, scene.boxes)
        np.testing.assert_array_equal(exact_posteriors(after, given=given)[1], before)


def test_given_annotations_the_scene_kind_is_unknown() -> None:
    scene = model.sample_scene(np.random.default_rng(4))
    other = Scene((scene.kind + 1) % 6, scene.horizon, scene.classes, scene.boxes)
    first, second = (exact_posteriors(s, given="annotations") for s in (scene, other))
    np.testing.assert_array_equal(first, second)


def test_an_unknown_given_is_rejected() -> None:
    scene = model.sample_scene(np.random.default_rng(7))
    with pytest.raises(UserError, match="given: got 'smell', expected one of pixels"):
        exact_posteriors(scene, given="smell")  # type: ignore[arg-type]
