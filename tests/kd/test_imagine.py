"""`kd.imagine` as a user runs it, on a tiny teacher."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd import imagine
from kd.cli import run_command
from kd.context.session import Imagination
from kd.problems.objects.data import open_objects
from kd.problems.recipes import data_config
from kd.runs.folder import class_names
from kd.runs.load_teacher import class_names_of, latest_teacher
from kd.utils.io import output_names

pytestmark = pytest.mark.slow


@pytest.fixture
def scene(small_scenes: Path) -> Path:
    return sorted((small_scenes / "val").glob("*.png"))[0]


def asked(scene: Path, run: Path, out: Path, *flags: str) -> int:
    return run_command(imagine.main, [str(scene), "--teacher", str(run), "--out", str(out), *flags])


def drawn(file: Path) -> tuple[int, int]:
    """Width and height of an image that is not of one colour."""
    with Image.open(file) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
        return picture.size


def percentages(said: str) -> list[float]:
    return [float(line.split()[-2]) for line in said.splitlines() if line.endswith(" %")]


def test_a_box_gets_the_runs_own_answer(
    scene: Path, small_teacher: Path, small_data: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The probabilities printed are those of predictions.npz."""
    data = open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))
    with np.load(small_teacher / "predictions.npz") as stored:
        records = dict(stored)
    row = int(np.flatnonzero(data.val.object_ids == records["object_ids"][0])[0])
    path = data.val.path(data.val.image_of(row))
    box = ",".join(str(corner) for corner in data.val.boxes[row].tolist())
    assert asked(path, small_teacher, tmp_path, "--box", box, "--top", "22") == 0
    said = capsys.readouterr().out
    expected = np.sort(100 * np.exp(records["log_probs"][0]))[::-1]
    assert percentages(said) == pytest.approx(expected, abs=0.051)
    best = data.val.class_names[int(records["log_probs"][0].argmax())]
    assert said.splitlines()[2].split()[0] == best
    assert drawn(tmp_path / f"{path.stem}.png")[0] > 500


def test_all_kinds_of_regions_are_asked_together(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[5:20, 5:20] = 7
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--box", "1,2,20,30", "--box", "5,5,20,20", "--mask", str(tmp_path / "mask.png"),
             "--polygon", "5,5,20,5,20,20,5,20", "--random", "2", "--top", "3"]  # fmt: skip
    assert asked(scene, small_teacher, tmp_path / "out", *flags) == 0
    said = capsys.readouterr().out.splitlines()
    titles = [line.strip() for line in said if line.startswith("  ") and line[2] != " "]
    assert titles[:4] == ["box 1,2,20,30", "box 5,5,20,20", "polygon of 4 corners", "mask.png"]
    assert len(titles) == 7 and titles[6].startswith("drawn: ")
    answers = [said[start + 1 : start + 4] for start in range(5, 16, 4)]
    assert answers[0] == answers[1] == answers[2]  # the same pixels, three ways to say so


def test_by_default_random_regions_are_hidden_and_a_seed_says_which(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for seed in ([], ["--seed", "1"]):
        assert asked(scene, small_teacher, tmp_path, *seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    assert said[0].count("  box ") == 3
    assert len(percentages(said[0])) == 30


def test_heat_maps_are_drawn_for_each_class(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--class", "boat", "--class", "mug", "--region", "0.3x0.3", "--stride", "1"]
    assert asked(scene, small_teacher, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "% of all objects)" in said and "    x " in said
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{scene.stem}_boat.png", f"{scene.stem}_mug.png",
    }  # fmt: skip
    drawn(tmp_path / f"{scene.stem}_boat.png")


def test_images_of_all_kinds_are_asked_about(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey, with transparency, 16 bits, turned: all give an answer, the first two the same one."""
    grey = Image.open(scene).convert("L").resize((50, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "grey.png")
    grey.convert("RGBA").save(tmp_path / "clear.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    grey.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    files = [str(tmp_path / f"{name}.png") for name in ("grey", "clear", "deep", "turned")]
    command = ["--teacher", str(small_teacher), "--out", str(tmp_path / "out")]
    assert imagine.main([*files, *command, "--box", "5,5,30,30"]) == 0
    said = percentages(capsys.readouterr().out)
    assert len(said) == 40
    assert said[:10] == said[10:20] == said[20:30] == said[30:]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_of_several_images_the_good_ones_are_done(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    broken, small = tmp_path / "broken.jpg", tmp_path / "small.png"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no more")
    Image.new("RGB", (4, 4)).save(small)
    files = [str(broken), str(tmp_path / "gone.png"), str(small), str(scene)]
    command = ["--teacher", str(small_teacher), "--out", str(tmp_path / "out")]
    assert imagine.main([*files, *command, "--box", "5,5,30,30"]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{scene.stem}.png"]
    assert str(scene) in capsys.readouterr().out
    for message in (
        f"error: {broken}: cannot read this image",
        f"error: {tmp_path / 'gone.png'}: image not found",
        f"error: {small}: box 5,5,30,30 lies outside of the image, which is 4 x 4 pixels",
        "3 of 4 images failed",
    ):
        assert message in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class", "baot"], "--class: unknown class 'baot'; did you mean 'boat'"),
        (["--box", "1,2,3"], "box '1,2,3': expected x1,y1,x2,y2"),
        (["--mask", "gone.png"], "gone.png: mask not found"),
        (["--class", "boat", "--region", "2x2"], "region '2x2': expected WxH"),
        (["--class", "boat", "--stride", "0"], "stride 0: must be above 0"),
        (["--random", "0"], "--random must be at least 1"),
        (["--annotations", "gone.json"], "gone.json"),
    ],
)
def test_mistakes_end_the_command_before_any_work(
    flags: list[str], message: str, scene: Path, small_teacher: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert asked(scene, small_teacher, tmp_path / "out", *flags) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_data_is_enough(
    scene: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The class names come with it; an older run's from its dataset, or it says what lacks."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "classes.json"):
        shutil.copy(small_teacher / name, run)
    config = (small_teacher / "config.yaml").read_text().replace("root: ", "root: /gone")
    head, _, rest = config.partition("  generate:")
    config = head + "  generate: null\n" + rest[rest.index("  size: 32") :]
    (run / "config.yaml").write_text(config)
    assert asked(scene, run, tmp_path / "out", "--box", "5,5,20,20") == 0
    assert "of all objects" not in capsys.readouterr().out  # predictions.npz is not there
    names = json.loads((run / "classes.json").read_text())["names"]
    assert class_names(run) == class_names_of(small_teacher) == tuple(names)
    (run / "classes.json").unlink()
    assert asked(scene, run, tmp_path / "out") == 2
    assert "has no classes.json, and its dataset cannot be read" in capsys.readouterr().err
    older = tmp_path / "older"
    shutil.copytree(small_teacher, older, ignore=shutil.ignore_patterns("classes.json", "cache"))
    assert class_names_of(older) == tuple(names)


def test_a_broken_list_of_classes_is_named(small_teacher: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"names": "boat"}', '{"names": []}'):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=r"classes\.json: not a run's class names"):
            class_names(tmp_path)


def test_a_teacher_that_reads_objects_says_what_it_lacks(
    small_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = imagine._parser().parse_args(["x.jpg", "--out", str(tmp_path)])
    imagined = Imagination.open(small_teacher, args)
    imagined.check_annotations(False)
    assert caplog.text == ""
    imagined.check_annotations(True)
    assert "reads pixels only; --annotations change nothing" in caplog.text
    imagined.teacher.model.reads_labels = True  # type: ignore[assignment]
    imagined.check_annotations(False)
    assert "without --annotations COCO.json it knows none of them" in caplog.text


def test_outputs_of_one_name_are_numbered() -> None:
    paths = [Path("a/x.jpg"), Path("b/x.png"), Path("y.jpg")]
    assert output_names(paths) == ["x_1", "x_2", "y"]


def test_annotations_reach_the_teacher(
    scene: Path, small_scenes: Path, small_teacher: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One of pixels answers the same; that others are told is tested in test_expected."""
    file = small_scenes / "annotations" / "instances_val.json"
    said = []
    for flags in ([], ["--annotations", str(file)]):
        assert asked(scene, small_teacher, tmp_path, "--box", "5,5,30,30", *flags) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert torch.tensor(percentages(said[0])).sum() <= 100.5


def test_without_a_name_the_teacher_trained_last_is_asked(
    scene: Path, small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_command(imagine.main, [str(scene)]) == 2
    assert "no trained context teacher" in capsys.readouterr().err
    for age, name in enumerate(("cnn/scenes", "unet/scenes", "unet/unfinished")):
        run = tmp_path / "runs" / "teacher" / name
        shutil.copytree(small_teacher, run)
        os.utime(run / "summary.json", (1e9 - age, 1e9 - age))
    (run / "summary.json").unlink()
    assert run_command(imagine.main, [str(scene)]) == 0
    assert "using teacher runs/teacher/cnn/scenes, the latest one" in caplog.text
    assert drawn(tmp_path / "runs" / "imagine" / f"{scene.stem}.png")[0] > 500


def test_the_latest_teacher_is_one_of_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, (name, task) in enumerate(
        (("pspnet", "segmentation"), ("cnn", "context"), ("unet", "context"))
    ):
        run = tmp_path / "runs" / "teacher" / name / "scenes"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"task: {{name: {task}}}\n")
        (run / "summary.json").write_text("{}")
        os.utime(run / "summary.json", (1e9 - age, 1e9 - age))
    assert latest_teacher() == Path("runs/teacher/cnn/scenes")
