"""Label maps through the commands, on tiny scenes: tables, evaluations, overlays, costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from kd import compare, distill, evaluate, train_teacher
from kd.cli import run_command
from kd.errors import UserError
from kd.evaluation import predict
from kd.runs.read import read_distill, read_run

pytestmark = pytest.mark.slow

TRAIN = "train={epochs: 1, batch_size: 8, images: 2, precision: fp32, evaluate_every: 0}"
LIGHT = "options: {trunk: mobilenet_v2, width: 0.25, until: features.6, head: 16, stride: 8}"
# The recipe's own, but for the critic: its maps are too small here.
TERMS = (
    "losses=[{name: pixel_wise, weight: 10.0}, {name: pair_wise, weight: 10.0, student: norm3, "
    "teacher: pyramid, options: {kernel: 2}}]",
    "ablations.structured.all=[pixel_wise, pair_wise]",
    "ablations.two={pixels: [pixel_wise], channels: [channel_wise]}",
)


def sets(*settings: str) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def maps(small_scenes: Path) -> list[str]:
    """Flags that replace the data by tiny scenes."""
    return sets(
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.workers=0",
        "data.crop=[32, 32]",
    )


@pytest.fixture(scope="module")
def teacher(maps: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that saw images half as large as its students will."""
    out = tmp_path_factory.mktemp("maps") / "teacher"
    model = f"teacher={{name: pspnet, {LIGHT}}}"
    flags = [*maps, *sets(TRAIN, model, "data.size=32")]
    command = ["--teacher", "pspnet_mobilenet_v2", "--out", str(out)]
    assert train_teacher.main([*command, *flags]) == 0
    return out


@pytest.fixture(scope="module")
def distilled(maps: list[str], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of one seed."""
    out = tmp_path_factory.mktemp("maps") / "espnet_c"
    flags = [*maps, *sets(TRAIN, *TERMS, "seeds=[0]")]
    command = ["--student", "espnet_c", "--ablation", "two", "--teacher", str(teacher)]
    assert distill.main([*command, "--out", str(out), *flags]) == 0
    return out


def images_of(folder: Path) -> set[str]:
    """Tags of the images in a folder's event file, of which there is one."""
    assert len(list(folder.glob("events.*"))) == 1
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return set(events.Tags()["images"])


def test_an_ablation_fills_one_table_in_the_order_of_the_recipe(distilled: Path) -> None:
    runs = read_distill(distilled)
    assert list(runs.variants) == ["plain", "pixels", "channels"]
    assert runs.variants["plain"][0].records["names"][0] == "background"
    lines = (distilled / "table.md").read_text().splitlines()
    assert lines[2] == "| metric | plain | pixels | pixels - plain | channels | channels - plain |"
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:]
    assert rows == ["| mIoU (%)", "| mean_accuracy (%)", "| pixel_accuracy (%)"]


def test_the_two_commands_of_the_documentation_find_each_other(
    small_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes as they are, all terms and the critic's size too, but for the amount of work."""
    monkeypatch.chdir(tmp_path)
    little = [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.workers=0",
        "train.epochs=1",
        "train.precision=fp32",
        "train.images=0",
    ]
    model = f"teacher={{name: pspnet, {LIGHT}}}"
    assert train_teacher.main(["--teacher", "pspnet_mobilenet_v2", *sets(*little, model)]) == 0
    command = ["--student", "espnet", "--ablation", "structured"]
    assert distill.main([*command, *sets(*little, "seeds=[0]")]) == 0
    (run,) = (tmp_path / "runs" / "distill").glob("*/*/table.md")
    runs = read_distill(run.parent)
    assert list(runs.variants) == ["plain", "pixel", "pixel_pair", "all", "channel"]
    head = run.read_text().splitlines()[2]
    assert all(f"| {variant} - plain |" in head for variant in list(runs.variants)[1:])
    terms = {
        "plain": set(),
        "pixel": {"pixel_wise"},
        "pixel_pair": {"pixel_wise", "pair_wise"},
        "all": {"pixel_wise", "pair_wise", "holistic", "holistic_critic"},
        "channel": {"channel_wise"},
    }
    for variant, own in terms.items():
        scalars = (run.parent / "seed0" / variant / "metrics.jsonl").read_text()
        found = {text.split('"')[0] for text in scalars.split('"loss/')[1:]}
        assert found == own | {"cross_entropy", "total"}


def test_a_distillation_draws_every_variant_beside_truth_and_teacher(distilled: Path) -> None:
    assert images_of(distilled) == {"overlays/0", "overlays/1"}
    names = sorted(file.name for file in (distilled / "overlays").iterdir())
    assert names == ["0.png", "1.png"]
    with Image.open(distilled / "overlays" / "0.png") as picture:
        assert picture.width > 1.9 * picture.height / 2  # six panels in two rows
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


@pytest.fixture(scope="module")
def evaluated(distilled: Path) -> Path:
    """One variant's run, evaluated."""
    run = distilled / "seed0" / "pixels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "IMAGES", 2)
        assert evaluate.main([str(run)]) == 0
    return run


def test_an_evaluation_has_tables_numbers_and_figures(evaluated: Path) -> None:
    folder = evaluated / "evaluation"
    numbers = json.loads((folder / "metrics.json").read_text())
    summary = json.loads((evaluated / "summary.json").read_text())
    (found,) = numbers["runs"].values()
    for name in ("mIoU", "mean_accuracy", "pixel_accuracy"):
        assert found[name] == pytest.approx(summary[name])
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert sum(row["pixels"] for row in found["classes"]) == pytest.approx(1)
    assert numbers["images"] == 8
    table = (folder / "table.md").read_text()
    assert "| metric | espnet_c, pixels | 95 % interval |" in table
    assert "| class | pixels (%) | IoU (%) |" in table
    drawn = {"class_iou", "confusions"}
    files = {file.stem for file in folder.glob("*.png")}
    assert files == {*drawn, "overlay_0", "overlay_1"}
    tags = {f"evaluation/{name}" for name in drawn} | {"images/0", "images/1"}
    assert images_of(folder) == tags


def test_scales_and_mirror_are_averaged_into_a_folder_of_their_own(
    teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "IMAGES", 0)
    assert evaluate.main([str(teacher), "--scales", "1"]) == 0
    stored = read_run(teacher).records
    with np.load(teacher / "evaluation" / "scales_1" / "predictions.npz") as again:
        assert np.abs(again["confusion"] - stored["confusion"]).sum() <= 4  # ties of rounding
    assert evaluate.main([str(teacher), "--scales", "0.75,1.5", "--flip"]) == 0
    folder = teacher / "evaluation" / "scales_0.75_1.5_flip"
    assert "scales 0.75, 1.5, flip" in capsys.readouterr().out
    with np.load(folder / "predictions.npz") as several:
        assert (several["confusion"].sum(axis=2) == stored["confusion"].sum(axis=2)).all()
        assert (several["confusion"] != stored["confusion"]).any()


def test_answers_about_another_split_are_a_run_that_costs_are_drawn_with(
    evaluated: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "IMAGES", 0)
    table = teacher / "evaluation" / "table.md"
    before = table.read_text() if table.is_file() else None
    split = "data.val={annotations: annotations/instances_train.json, images: train}"
    for run in (evaluated, teacher):
        assert evaluate.main([str(run), "--set", split]) == 0
    assert (table.read_text() if table.is_file() else None) == before
    (asked,) = (teacher / "evaluation").glob("val=*instances_train*")
    (student,) = (evaluated / "evaluation").glob("val=*instances_train*")
    assert read_run(asked).config["data"]["val"]["images"] == "train"
    assert read_run(asked).summary["count"] == 24
    own, others = read_run(teacher), read_run(asked)
    assert own.summary["parameters"] == others.summary["parameters"]
    assert compare.main([str(student), str(asked), "--cost", str(tmp_path / "cost.png")]) == 0
    with pytest.raises(UserError, match="scored different images"):
        compare.main([str(student), str(teacher), "--cost", str(tmp_path / "cost.png")])


def test_runs_side_by_side_share_tables_and_a_figure(
    evaluated: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(evaluated.parent), str(teacher)]
    assert evaluate.main(["--all", *runs, "--out", str(tmp_path), "--per-class"]) == 0
    said = capsys.readouterr().out
    assert "scenes_maps val: 8 images" in said and "IoU (%) by class" in said
    assert {file.name for file in tmp_path.glob("*.png")} == {"class_iou.png"}
    assert len(json.loads((tmp_path / "metrics.json").read_text())["runs"]) == 4


def test_mistakes_are_one_line(
    teacher: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = tmp_path / "objects"
    shutil.copytree(small_teacher, objects, ignore=shutil.ignore_patterns("fold*", "cache"))
    mistakes = {
        "--flip need label maps; this task scores objects": [str(objects), "--flip"],
        "numbers are needed, such as 0.75,1,1.25": [str(teacher), "--scales", "1;2"],
        "scales must be above 0, got -1": [str(teacher), "--scales", "1,-1"],
        "--all reads stored predictions": ["--all", str(teacher), "--flip"],
        "name it, such as --data scenes": ["--all", str(teacher), str(objects)],
    }
    for message, arguments in mistakes.items():
        assert run_command(evaluate.main, arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1 and message in lines[0]
