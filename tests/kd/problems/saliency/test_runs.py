"""Saliency through the commands, on tiny scenes: teacher, stored maps, students, tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from kd import cache, compare, distill, evaluate, train_teacher
from kd.cli import run_command
from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.engine.loop import forward_losses
from kd.errors import UserError
from kd.evaluation import predict
from kd.experiments.distillation import Distillation
from kd.formats.coco import load_coco
from kd.metrics.saliency import METRICS
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, open_data
from kd.runs.read import read_distill, read_run
from kd.scenes.gaze import SceneGaze

pytestmark = pytest.mark.slow

TRAIN = "train={epochs: 1, batch_size: 8, images: 2, precision: fp32, evaluate_every: 0}"
LIGHT = "{trunk: mobilenet_v2, until: features.6, stride: 8, head: 16, weights: null}"
STUDENT = "student.options={trunk: mobilenet_v2, width: 0.25, weights: null}"


def sets(*settings: str) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def gaze(small_scenes: Path) -> list[str]:
    """`--set` texts that replace a recipe's data by gaze at the small scenes."""
    return [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.degree=3.0",
        "data.size=[64, 64]",
        "data.workers=0",
    ]


@pytest.fixture(scope="module")
def teacher(gaze: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gaze") / "teacher"
    flags = sets(*gaze, TRAIN, f"teacher.options={LIGHT}")
    assert train_teacher.main(["--teacher", "msinet", "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def distilled(gaze: list[str], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gaze") / "students"
    flags = sets(*gaze, TRAIN, STUDENT, "seeds=[0]")
    command = ["--student", "saliency_resnet18", "--teacher", str(teacher), "--out", str(out)]
    assert distill.main([*command, *flags]) == 0
    return out


def distillation(gaze: list[str], teacher: Path, out: Path, *settings: str) -> Distillation:
    recipe = load_recipe(
        DistillRecipe,
        find_config("distill", "saliency_resnet18"),
        settings=[*gaze, TRAIN, STUDENT, f"teacher.run={teacher}", *settings],
    )
    return Distillation(recipe, open_data(recipe.data), make_accelerator("fp32"), out)


def images_of(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return set(events.Tags()["images"])


def test_a_run_knows_the_centre_prior_and_other_observers(teacher: Path) -> None:
    summary = json.loads((teacher / "summary.json").read_text())
    assert summary["count"] == 8
    for name in METRICS:
        assert {name, f"prior_{name}", f"observers_{name}"} <= summary.keys()
    assert summary["prior_IG"] == pytest.approx(0)
    assert summary["observers_NSS"] > summary["prior_NSS"]
    records = read_run(teacher).records
    assert records["centre_prior"].shape == (8, len(METRICS)) == records["other_observers"].shape


def test_a_distillation_ends_with_its_table_and_images(distilled: Path) -> None:
    runs = read_distill(distilled)
    assert list(runs.variants) == ["plain", "distilled"]
    lines = (distilled / "table.md").read_text().splitlines()
    assert lines[2] == (
        "| metric | plain | distilled | distilled - plain | centre prior | other observers |"
    )
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:]
    assert [row.removeprefix("| ").split(" ")[0] for row in rows] == list(METRICS)
    assert images_of(distilled) == {"overlays/0", "overlays/1"}
    with Image.open(distilled / "overlays" / "0.png") as picture:
        assert picture.width > 4 * picture.height  # six panels side by side


def test_only_the_distilled_student_has_a_second_map(distilled: Path) -> None:
    parameters = [
        json.loads((distilled / "seed0" / variant / "summary.json").read_text())["parameters"]
        for variant in ("plain", "distilled")
    ]
    assert parameters[1] - parameters[0] == 16 * 9 + 1
    curves = {
        variant: (distilled / "seed0" / variant / "metrics.jsonl").read_text()
        for variant in ("plain", "distilled")
    }
    assert "loss/saliency" in curves["distilled"] and "loss/saliency" not in curves["plain"]
    assert all("loss/kld" in text for text in curves.values())


def test_variants_start_alike_and_see_the_same_images(
    gaze: list[str], teacher: Path, tmp_path: Path
) -> None:
    variants = distillation(gaze, teacher, tmp_path)
    starts = {}
    for variant in ("plain", "distilled"):
        model, _ = variants.assemble(variant, 3, variants.samples(variant, 3))
        starts[variant] = model.state_dict()
    own = starts["distilled"].keys() - starts["plain"].keys()
    assert own and all("teacher_saliency" in name for name in own)
    assert all(torch.equal(value, starts["distilled"][n]) for n, value in starts["plain"].items())
    plain, taught = (variants.samples(variant, 3)[2, 5] for variant in ("plain", "distilled"))
    assert all(torch.equal(value, taught[name]) for name, value in plain.items())
    assert taught.keys() - plain.keys() == {"stored.saliency"}


def test_stored_and_live_teachers_teach_alike(
    gaze: list[str], teacher: Path, tmp_path: Path
) -> None:
    values = []
    still = ["data.augment=null", "soft_targets.dtype=float32", "soft_targets.score_stride=1"]
    for kind in ("stored", "live"):
        variants = distillation(
            gaze, teacher, tmp_path, *still, f"soft_targets.kind={kind}", "variants=[distilled]"
        )
        dataset = variants.samples("distilled", 0)
        model, objective = variants.assemble("distilled", 0, dataset)
        with torch.no_grad():
            losses = forward_losses(model.eval(), variants.first_batch(dataset), objective)
        values.append(torch.stack([losses[name].value for name in ("kld", "saliency")]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert (values[0] > 0).all()


def test_each_variant_of_the_temperature_learns_by_a_term_of_its_own(
    gaze: list[str], teacher: Path, tmp_path: Path
) -> None:
    variants = distillation(gaze, teacher, tmp_path, "variants=[plain, cool, warm3, published]")
    values = {}
    for variant, term in (("cool", "saliency"), ("warm3", "warm"), ("published", "quirk")):
        dataset = variants.samples(variant, 0)
        model, objective = variants.assemble(variant, 0, dataset)
        with torch.no_grad():
            losses = forward_losses(model.eval(), variants.first_batch(dataset), objective)
        assert set(losses) == {"kld", term}
        values[variant] = float(losses[term].value)
    assert len({round(value, 6) for value in values.values()}) == 3


def test_maps_of_both_splits_are_stored_by_one_command(
    gaze: list[str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--teacher", str(teacher), "--data", "scenes_gaze", *sets(*gaze)]
    assert cache.main([*command, "--out", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert "saliency: 24 images, " in said and "saliency: 8 images of val, " in said
    assert cache.main([*command, "--split", "val", "--size", "32", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "24 images" not in said and "saliency: 8 images of val" in said
    assert "soft_targets.size=32" in said


@pytest.fixture
def of_many_sizes(tmp_path: Path, small_scenes: Path) -> list[str]:
    """Images of different sizes with the gaze model's fixations, in MIT1003's layout."""
    index = load_coco(small_scenes / "annotations" / "instances_train.json", small_scenes / "train")
    root, sizes = tmp_path / "mit1003", [(64, 64), (48, 64), (64, 40)]
    for folder in ("ALLSTIMULI", "ALLFIXATIONMAPS"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        height, width = sizes[number % 3]
        with Image.open(index.path(number)) as picture:
            picture.convert("RGB").crop((0, 0, width, height)).save(
                root / "ALLSTIMULI" / f"i{number}.jpeg"
            )
        points = SceneGaze(index)(number, (64, 64)).points.astype(int)
        marked = np.zeros((64, 64), np.uint8)
        marked[points[:, 1], points[:, 0]] = 255
        Image.fromarray(marked[:height, :width]).save(
            root / "ALLFIXATIONMAPS" / f"i{number}_fixPts.jpg", quality=95
        )
    return [f"data.root={root}", "data.size=[48, 64]", "data.degree=3.0", "data.workers=0"]


def test_images_of_many_sizes_are_stored_and_taught_too(
    of_many_sizes: list[str], teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    flags = sets(*of_many_sizes, TRAIN, STUDENT, "seeds=[0]", f"soft_targets.cache={tmp_path}/kept")
    command = ["--student", "saliency_resnet18", "--data", "mit1003", "--teacher", str(teacher)]
    assert distill.main([*command, "--out", str(out), *flags]) == 0
    records = read_run(out / "seed0" / "distilled").records
    assert len(records["image_ids"]) == 2 and np.isfinite(records["KLD"]).all()
    # Nobody says whose fixations these are: they are dealt to some at random.
    assert np.isfinite(records["other_observers"]).all()


def test_an_evaluation_has_tables_numbers_and_images(
    distilled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "IMAGES", 2)
    run = distilled / "seed0" / "distilled"
    assert evaluate.main([str(run), "--per-class"]) == 0
    said = capsys.readouterr().out
    assert "centre prior  other observers" in said and "By image" in said
    folder = run / "evaluation"
    numbers = json.loads((folder / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    (found,) = numbers["runs"].values()
    for name in METRICS:
        assert found[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-5)
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert set(numbers["references"]) == {"centre prior", "other observers"}
    names = {file.stem for file in folder.glob("*.png")}
    assert names == {"images_KLD", "images_NSS", "images_IG", "gaze_0", "gaze_1"}
    assert images_of(folder) >= {"images/0", "images/1", "evaluation/images_KLD"}


def test_runs_side_by_side_share_a_table(
    distilled: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(distilled / "seed0"), str(teacher)]
    assert evaluate.main(["--all", *runs, "--out", str(tmp_path)]) == 0
    assert "scenes_gaze val: 8 images" in capsys.readouterr().out
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert len(table["runs"]) == 3 and len(table["references"]) == 2
    figure = tmp_path / "bars.png"
    assert compare.main([str(distilled), "--figure", str(figure)]) == 0
    assert figure.is_file() and "other observers" in capsys.readouterr().out


def test_mistakes_are_one_line(
    gaze: list[str], teacher: Path, small_scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = sets(f"data.root={small_scenes}", "data.generate={train: 24, val: 8, size: 64, seed: 0}")
    command = ["--student", "saliency_resnet18", "--data", "scenes_maps", *maps]
    mistakes = {
        "task saliency needs data of saliency, such as --data scenes_gaze": (
            distill.main, [*command, "--teacher", str(teacher)]
        ),
        "--flip need label maps; this task scores images with fixations": (
            evaluate.main, [str(teacher), "--flip"]
        ),
    }  # fmt: skip
    for message, (main, arguments) in mistakes.items():
        assert run_command(main, arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1 and message in lines[0]
    with pytest.raises(
        UserError, match="folds: this is data of saliency; expected data of objects"
    ):
        train_teacher.main(["--teacher", "msinet", *sets(*gaze, "folds=2")])


def test_terms_about_classes_or_boxes_are_refused(
    gaze: list[str], teacher: Path, tmp_path: Path
) -> None:
    wrong = {
        "output_kd": "needs hidden objects",
        "imitation": "needs the mask 'imitation'; Saliency has valid",
        "pixel_wise": "the student gives no 'logits'",
    }
    for name, message in wrong.items():
        layers = "student: trunk, teacher: trunk, " if name == "imitation" else ""
        losses = f"losses=[{{name: {name}, {layers}weight: 1.0}}]"
        with pytest.raises(UserError, match=f"losses: {name}: .*{message}"):
            distillation(
                gaze, teacher, tmp_path, losses, "more_losses=[]", "ablations={}",
                "soft_targets.kind=live", "variants=[plain, distilled]",
            ).check()  # fmt: skip
