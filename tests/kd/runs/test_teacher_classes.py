"""Which teachers are refused for their classes: those whose answers would be taken for others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from kd import cache, distill, evaluate, train_teacher
from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.distillation.registry import TERMS, TermKind
from kd.errors import UserError
from kd.experiments.distillation import Distillation
from kd.losses import pair_wise
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, open_data
from kd.runs.folder import class_names, write_class_names
from kd.runs.load_teacher import check_classes, load_teacher

pytestmark = pytest.mark.slow

PIXELS = "losses=[{name: pixel_wise, weight: 1.0}]"
PAIRS = "losses=[{name: pair_wise, weight: 1.0, student: norm3, teacher: pyramid}]"
AFFINITIES = "losses=[{name: pair_wise, weight: 1.0, student: norm3, teacher: logits}]"
TRAIN = "train={epochs: 1, batch_size: 8, images: 0, precision: fp32, evaluate_every: 0}"


def flags(settings: Sequence[str]) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def maps(small_scenes: Path) -> list[str]:
    """`--set` texts that replace a recipe's data by label maps of the small scenes."""
    return [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.size=32",
        "data.crop=[32, 32]",
        "data.workers=0",
        TRAIN,
    ]


@pytest.fixture(scope="module")
def mapped(maps: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of label maps as its training leaves it."""
    out = tmp_path_factory.mktemp("maps") / "teacher"
    options = "teacher.options={trunk: resnet18, width: 0.25, head: 16}"
    settings = [*maps, options, "task.weights={cross_entropy: 1.0, auxiliary: 0.4}"]
    command = ["--teacher", "pspnet", *flags(settings), "--out", str(out)]
    assert train_teacher.main(command) == 0
    return out


def renamed(run: Path, to: Path, names: Sequence[str] | None) -> Path:
    """A copy of a run with other class names, or none."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("cache", "fold*", "evaluation"))
    if names is None:
        (to / "classes.json").unlink()
    else:
        write_class_names(to, names)
    return to


def names_of(run: Path) -> list[str]:
    names = class_names(run)
    assert names is not None
    return list(names)


def exchanged(run: Path) -> list[str]:
    """A run's classes with two of them in each other's place."""
    names = names_of(run)
    names[2], names[3] = names[3], names[2]
    return names


def opened(maps: list[str], teacher: Path, *settings: str) -> Distillation:
    own = [*maps, f"teacher.run={teacher}", "ablations={}", "variants=[distilled]", *settings]
    recipe = load_recipe(DistillRecipe, find_config("distill", "espnet_c"), settings=own)
    return Distillation(
        recipe, open_data(recipe.data), make_accelerator("fp32"), teacher.parent / "students"
    )


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_a_teacher_of_the_same_classes_in_another_order_is_refused(
    maps: list[str], mapped: Path, tmp_path: Path, kind: str
) -> None:
    other = renamed(mapped, tmp_path / "other", exchanged(mapped))
    names = names_of(mapped)
    message = (
        rf"class 2 \(from 0\) of this teacher is '{names[3]}', of scenes_maps '{names[2]}'.*"
        r"classes in this order.*other/classes\.json"
    )
    with pytest.raises(UserError, match=message):
        opened(maps, other, PIXELS, f"soft_targets.kind={kind}")
    assert not (other / "cache").exists()  # it was found out before anything was computed


def test_a_further_teacher_is_looked_at_too(maps: list[str], mapped: Path, tmp_path: Path) -> None:
    other = renamed(mapped, tmp_path / "other", exchanged(mapped))
    more = [f"more_teachers={{second: {{run: {other}}}}}", "soft_targets.kind=live"]
    for read in ("second.logits", "mean.logits"):
        losses = f"losses=[{{name: pixel_wise, weight: 1.0, teacher: {read}}}]"
        with pytest.raises(UserError, match=r"other: class 2 \(from 0\) of this teacher"):
            opened(maps, mapped, *more, losses)


def test_layers_and_affinities_ask_for_no_classes(
    maps: list[str], mapped: Path, tmp_path: Path
) -> None:
    other = renamed(mapped, tmp_path / "other", exchanged(mapped))
    for losses in (PAIRS, AFFINITIES):
        assert opened(maps, other, losses, "soft_targets.kind=live").sources is not None


def test_an_old_run_without_names_is_taken_by_its_number_of_classes(
    maps: list[str], mapped: Path, tmp_path: Path
) -> None:
    old = renamed(mapped, tmp_path / "old", None)
    assert opened(maps, old, PIXELS, "soft_targets.kind=live").sources is not None


def test_a_teacher_of_objects_of_another_order_is_refused(
    small_data: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    other = renamed(small_teacher, tmp_path / "other", exchanged(small_teacher))
    command = ["--student", "resnet18", *small_data, "--teacher", str(other)]
    with pytest.raises(UserError, match=r"class 2 \(from 0\) of this teacher is .*, of scenes '"):
        distill.main([*command, "--out", str(tmp_path / "run")])


def test_numbers_of_a_teacher_of_other_classes_are_not_computed(
    maps: list[str], small_data: list[str], mapped: Path, small_teacher: Path, tmp_path: Path
) -> None:
    message = r"class 2 \(from 0\) of this teacher"
    other = renamed(mapped, tmp_path / "other", exchanged(mapped))
    with pytest.raises(UserError, match=message):
        evaluate.main([str(other)])
    data = [text for text in maps if text.startswith("data.")]
    command = ["--teacher", str(other), "--data", "scenes_maps", *flags(data)]
    with pytest.raises(UserError, match=message):
        cache.main([*command, "--out", str(tmp_path / "kept")])
    layers = ["--only-layers", "--layers", "pyramid", "--out", str(tmp_path / "kept")]
    assert cache.main([*command, *layers]) == 0


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_a_teacher_of_context_with_background_teaches_by_its_score_maps(
    maps: list[str], small_data: list[str], tmp_path: Path, kind: str
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    learned = [TRAIN, "teacher.options={width: 16}"]
    command = ["--teacher", "resnet_pixel", *small_data, *flags(learned), "--out", str(teacher)]
    assert train_teacher.main(command) == 0
    taught = [*maps, PIXELS, "ablations={}", "seeds=[0]", f"soft_targets.kind={kind}"]
    given = [*flags(taught), "--teacher", str(teacher), "--out", str(out)]
    assert distill.main(["--student", "espnet_c", *given]) == 0
    curves = (out / "seed0" / "distilled" / "metrics.jsonl").read_text()
    assert "loss/pixel_wise" in curves
    other = renamed(teacher, tmp_path / "other", exchanged(teacher))
    with pytest.raises(UserError, match=r"class 3 \(from 0\) of this teacher is"):
        opened(maps, other, PIXELS, f"soft_targets.kind={kind}")


def test_score_maps_of_other_teachers_of_context_lack_the_background(
    maps: list[str], small_teacher: Path
) -> None:
    with pytest.raises(UserError, match=r"class 0 \(from 0\) of .* of scenes_maps 'background'"):
        opened(maps, small_teacher, PIXELS)


def test_classes_that_one_side_lacks_are_said_to_be_none(small_teacher: Path) -> None:
    teacher = load_teacher(small_teacher, 22)
    names = names_of(small_teacher)
    check_classes(teacher, names, "mine")
    with pytest.raises(UserError, match=rf"class 21 .* teacher is '{names[-1]}', of mine none"):
        check_classes(teacher, names[:-1], "mine")
    with pytest.raises(UserError, match=r"class 22 .* teacher is none, of mine 'kite'"):
        check_classes(teacher, [*names, "kite"], "mine")
    with pytest.raises(UserError, match=f"class 0 .* is '{names[0]}', of mine 'background'"):
        check_classes(teacher, ["background", *names], "mine")


def test_names_that_cannot_be_read_are_named(small_teacher: Path, tmp_path: Path) -> None:
    broken = renamed(small_teacher, tmp_path / "broken", names_of(small_teacher))
    (broken / "classes.json").write_text(json.dumps({"names": 3}))
    with pytest.raises(UserError, match="not a run's class names"):
        check_classes(load_teacher(broken, 22), ["a"], "mine")


@pytest.mark.parametrize("by_class", [False, True])
def test_a_loss_of_ones_own_says_whether_classes_are_compared(
    maps: list[str], mapped: Path, tmp_path: Path, by_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def affinities(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return pair_wise(student, teacher, valid=valid)

    kind = TermKind(affinities, "like pair_wise", unit="image", valid=True, by_class=by_class)
    monkeypatch.setitem(TERMS, "affinities", kind)
    other = renamed(mapped, tmp_path / "other", exchanged(mapped))
    losses = "losses=[{name: affinities, weight: 1.0, student: logits, teacher: logits}]"
    if by_class:
        with pytest.raises(UserError, match=r"class 2 \(from 0\) of this teacher"):
            opened(maps, other, losses, "soft_targets.kind=live")
    else:
        assert opened(maps, other, losses, "soft_targets.kind=live").sources is not None
