"""Bad input through the commands: one line that names file and place, status 2, nothing lost."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kd.distill
import kd.evaluate
import kd.train_teacher
import kd.transfer
from kd.cli import Main, run_command
from kd.engine.checkpoint import load_checkpoint

DATA = {
    "train": {"annotations": "annotations/instances_train2017.json", "images": "train2017"},
    "val": {"annotations": "annotations/instances_val2017.json", "images": "val2017"},
    "size": 32,
    "max_fraction": 1.0,
    "augment": None,
    "workers": 0,
}
TRAIN = {"epochs": 1, "batch_size": 4, "precision": "fp32", "images": 0, "evaluate_every": 0}
TEACHER = {
    "data": DATA,
    "task": {"name": "context", "weights": {"cross_entropy": 1.0}},
    "teacher": {"name": "cnn", "options": {"width": 4}},
    "train": TRAIN,
}
DISTILL = {
    "data": DATA,
    "task": {"name": "classification", "weights": {"cross_entropy": 1.0}},
    "soft_targets": {"out_of_fold": False},
    "student": {"name": "squeezenet1_1", "options": {"region_size": 1}},
    "losses": [{"name": "context_logits", "weight": 1.0}],
    "variants": ["plain", "distilled"],
    "train": {**TRAIN, "batch_size": 4},
}

Command = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs go below an empty folder; logging is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    root, ours = logging.getLogger(), logging.getLogger("kd")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command's main; gives its status and the error lines of stderr."""

    def run(main: Main, recipe: dict[str, Any] | None, *argv: str) -> tuple[int, list[str]]:
        arguments = list(argv)
        if recipe is not None:
            path = tmp_path / "mine.yaml"
            path.write_text(yaml.safe_dump(recipe))
            arguments = ["--config", str(path), *argv]
        capsys.readouterr()
        status = run_command(main, arguments)
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if line.startswith("error: ")]

    return run


@pytest.fixture
def data(tiny_coco: Callable[..., Path]) -> Path:
    return tiny_coco(images=4, size=(32, 40))


def settings(data: Path, *more: str) -> list[str]:
    return [part for text in (f"data.root={data}", *more) for part in ("--set", text)]


def edit(data: Path, change: Callable[[dict[str, Any]], None], split: str = "train2017") -> Path:
    """Change a split's annotation file."""
    path = data / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def only_error(result: tuple[int, Sequence[str]]) -> str:
    status, lines = result
    assert status == 2
    assert len(lines) == 1, lines
    return lines[0]


def teacher(command: Command, data: Path, *argv: str) -> tuple[int, list[str]]:
    return command(kd.train_teacher.main, TEACHER, "--out", "run", *settings(data), *argv)


def test_the_recipes_of_these_tests_train_and_resume(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    weights = Path("run/model.safetensors").read_bytes()
    assert teacher(command, data, "--resume") == (0, [])
    assert Path("run/model.safetensors").read_bytes() == weights


# --- the dataset ---------------------------------------------------------------------------------


def test_a_missing_image_is_named_before_anything_is_written(command: Command, data: Path) -> None:
    (data / "train2017" / "000000000002.jpg").unlink()
    line = only_error(teacher(command, data))
    assert f"{data}/train2017: 1 of the 4 images" in line
    assert "000000000002.jpg" in line
    assert not Path("run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_also_from_a_worker(
    command: Command, data: Path, workers: int
) -> None:
    path = data / "train2017" / "000000000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    line = only_error(teacher(command, data, "--set", f"data.workers={workers}"))
    assert f"{path}" in line
    assert "truncated" in line


def test_an_image_of_another_size_is_named(command: Command, data: Path) -> None:
    shutil.copy(data / "train2017" / "000000000001.jpg", data / "x.jpg")
    edit(data, lambda content: content["images"][0].update(width=50))
    line = only_error(teacher(command, data))
    assert "000000000001.jpg" in line
    assert "40 x 32 pixels" in line
    assert "50 x 32" in line


def test_objects_that_cannot_be_used_are_counted_and_left_out(
    command: Command, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        spoiled = [
            {**first, "id": 900, "bbox": [3, 3, 0, 5]},
            {**first, "id": 901, "bbox": [300, 300, 5, 5]},
            {
                **first,
                "id": 902,
                "iscrowd": 1,
                "segmentation": {"counts": [1280], "size": [32, 40]},
            },
            {**first, "id": 903, "bbox": [30, 20, 50, 50]},
        ]
        content["annotations"] += spoiled
        content["images"].append({**content["images"][0], "id": 77})

    path = edit(data, spoil)
    with caplog.at_level(logging.INFO, logger="kd"):
        assert teacher(command, data) == (0, [])
    [said] = {record.getMessage() for record in caplog.records if "skipped:" in record.getMessage()}
    assert said.startswith(f"{path}: 5 images")
    for remark in ("1 crowd", "1 zero area", "1 outside image", "1 clipped", "images without"):
        assert remark in said
    left_out = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert any("1 of 5 images left out" in message for message in left_out)


def add_object(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 900, **values})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_object(category_id=99), ["annotation 900", "99"]),
        (add_object(image_id=4242), ["annotation 900", "4242"]),
        (lambda content: content.update(annotations=[]), ["annotations"]),
        (lambda content: content.update(images=[]), ["images"]),
        (lambda content: content.update(categories=[]), ["categories"]),
    ],
)
def test_a_file_that_contradicts_itself_is_named_with_the_place(
    command: Command, data: Path, change: Callable[[dict[str, Any]], None], said: list[str]
) -> None:
    path = edit(data, change)
    line = only_error(teacher(command, data))
    assert str(path) in line
    assert all(word in line for word in said), line
    assert not Path("run").exists()


def test_a_dataset_without_a_usable_object_is_named(command: Command, data: Path) -> None:
    limits = ("--set", "data.min_fraction=0.98", "--set", "data.max_fraction=0.99")
    line = only_error(teacher(command, data, *limits))
    assert "instances_train2017.json: no image has an object between 98" in line
    assert "min_fraction and max_fraction" in line


def test_a_json_cut_off_is_named_with_the_place(command: Command, data: Path) -> None:
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-300])
    line = only_error(teacher(command, data))
    assert str(path) in line
    assert "line 1" in line or "byte" in line or "character" in line or "column" in line, line


def test_splits_of_different_classes_are_refused(command: Command, data: Path) -> None:
    edit(data, lambda content: content["categories"][0].update(name="cube"), "val2017")
    assert "categories differ" in only_error(teacher(command, data))


def test_a_dataset_that_is_not_there_is_named(command: Command, tmp_path: Path) -> None:
    line = only_error(teacher(command, tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere/annotations/instances_train2017.json" in line


# --- the run folder -------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_made_is_named(command: Command, data: Path) -> None:
    Path("file").write_text("kept")
    arguments = ["--out", "file/run", *settings(data)]
    line = only_error(command(kd.train_teacher.main, TEACHER, *arguments))
    assert line.startswith("error: file/run: cannot be created: ")
    assert Path("file").read_text() == "kept"


def test_a_full_disk_stops_the_run_and_what_was_trained_stays(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    os.remove("run/summary.json")  # as if it had been stopped before its end
    held = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        line = only_error(teacher(command, data, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "run/model.safetensors: cannot be written: " in line
    assert "File too large" in line
    assert "--resume" in line
    for name in ("last.pt", "model.safetensors", "config.yaml"):
        assert (Path("run") / name).read_bytes() == held[name]
    assert teacher(command, data, "--resume") == (0, [])


def test_a_run_is_never_written_over(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    held = Path("run/model.safetensors").read_bytes()
    assert "has a run already; continue it with --resume" in only_error(teacher(command, data))
    line = only_error(teacher(command, data, "--resume", "--set", "train.epochs=2"))
    assert "run: has a run with another config: train.epochs: 1 there, 2 now" in line
    assert Path("run/model.safetensors").read_bytes() == held


def test_a_checkpoint_of_another_model_is_refused(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    wide = ["--out", "wide", *settings(data, "teacher.options.width=8")]
    assert command(kd.train_teacher.main, TEACHER, *wide) == (0, [])
    os.remove("wide/summary.json")
    shutil.copy("run/last.pt", "wide/last.pt")
    held = Path("wide/model.safetensors").read_bytes()
    line = only_error(command(kd.train_teacher.main, TEACHER, *wide, "--resume"))
    assert line.startswith("error: wide/last.pt: weights of another model: ")
    assert "expected" in line
    assert Path("wide/model.safetensors").read_bytes() == held


def test_resuming_with_another_number_of_classes_is_refused(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    os.remove("run/summary.json")
    held = Path("run/last.pt").read_bytes()
    for split in ("train2017", "val2017"):
        new = {"id": 90, "name": "cube", "supercategory": "shape"}
        edit(data, lambda content: content["categories"].append(new), split)  # noqa: B023
    line = only_error(teacher(command, data, "--resume"))
    assert "run/last.pt: weights of another model: " in line
    assert "(5," in line
    assert Path("run/last.pt").read_bytes() == held


class Attack:
    """Its pickle makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap",)


def test_code_in_a_checkpoint_is_refused_and_not_run(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    os.remove("run/summary.json")
    Path("run/last.pt").write_bytes(pickle.dumps({"format": 1, "parts": Attack()}, protocol=2))
    line = only_error(teacher(command, data, "--resume"))
    assert "run/last.pt: not loaded: " in line
    torch.save({"format": 1, "parts": Attack()}, "run/last.pt")
    assert "run/last.pt: not loaded: " in only_error(teacher(command, data, "--resume"))
    line = only_error(
        command(kd.distill.main, DISTILL, "--teacher", "run/last.pt", *settings(data))
    )
    assert "run/last.pt: not loaded: " in line
    assert not Path("trap").exists()


def test_a_checkpoint_cut_off_is_named(command: Command, data: Path) -> None:
    assert teacher(command, data) == (0, [])
    os.remove("run/summary.json")
    whole = Path("run/last.pt").read_bytes()
    Path("run/last.pt").write_bytes(whole[: len(whole) // 2])
    assert "run/last.pt: not a checkpoint" in only_error(teacher(command, data, "--resume"))


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_loads(
    command: Command, data: Path
) -> None:
    more = ("train.epochs=6", "train.schedule.warmup=0.0", "train.optimizer.name=sgd")
    arguments = ["--out", "run", *settings(data, *more, "train.optimizer.lr=1e20")]
    line = only_error(command(kd.train_teacher.main, TEACHER, *arguments))
    assert "not finite" in line
    assert "The last checkpoint, if any, is unchanged" in line
    assert "train.optimizer.lr" in line
    assert not Path("run/model.safetensors").exists()
    place, _, parts = load_checkpoint(Path("run/last.pt"))
    assert place.epoch >= 1
    assert all(t.isfinite().all() for t in parts["model"].values() if t.is_floating_point())


# --- teachers, students, evaluation ---------------------------------------------------------------


def distill(command: Command, data: Path, *argv: str) -> tuple[int, list[str]]:
    return command(kd.distill.main, DISTILL, "--out", "out", *settings(data), *argv)


def test_without_a_teacher_the_message_says_which_command_makes_one(
    command: Command, data: Path
) -> None:
    line = only_error(distill(command, data))
    assert "no trained teacher at runs/teacher/unet/" in line
    assert "train one: python -m kd.train_teacher --teacher unet --data " in line
    assert "--teacher RUN" in line
    assert not Path("out").exists()
    assert "nowhere: no such run folder" in only_error(
        distill(command, data, "--teacher", "nowhere")
    )


def test_the_command_that_makes_a_teacher_gets_the_data_as_typed(
    command: Command, data: Path
) -> None:
    Path("my data.yaml").write_text(yaml.safe_dump({**DATA, "root": str(data)}))
    arguments = ("--student", "resnet18", "--data")
    line = only_error(command(kd.distill.main, None, *arguments, "my data.yaml"))
    assert "runs/teacher/cnn/my data; train one: " in line
    assert "kd.train_teacher --teacher cnn --data 'my data.yaml', or choose" in line
    # A recipe that holds its dataset: that is no name to be given to a command.
    assert "--data unnamed.yaml (a file with the data section of the recipe), or" in only_error(
        distill(command, data)
    )
    transfer = ("--task", "scene_labels", "--data", "my data.yaml")
    assert "--data 'my data.yaml', or" in only_error(command(kd.transfer.main, None, *transfer))


def test_of_several_teachers_the_one_that_is_missing_is_named(command: Command, data: Path) -> None:
    """Without weights at hand: teachers are looked for before a student is built."""
    assert teacher(command, data) == (0, [])
    Path("mine.yaml").write_text(yaml.safe_dump({**DATA, "root": str(data)}))
    arguments = ["--student", "fasterrcnn_resnet18_context", "--ablation", "context", "--data",
                 "mine.yaml", "--set", "student.options.weights=none.pth"]  # fmt: skip
    line = only_error(command(kd.distill.main, None, *arguments))
    assert "no trained teacher at runs/teacher/cnn/mine; " in line and "--teacher RUN" in line
    line = only_error(command(kd.distill.main, None, *arguments, "--teacher", "run"))
    assert "more_teachers.detector: no trained teacher at runs/teacher/fasterrcnn_resnet50/" in line
    assert "--teacher fasterrcnn_resnet50 --data mine.yaml, or" in line
    assert line.endswith("choose one with --set more_teachers.detector.run=RUN")
    arguments += ["--teacher", "run", "--set", "more_teachers.detector.run=nowhere"]
    line = only_error(command(kd.distill.main, None, *arguments))
    assert line == "error: more_teachers.detector.run: nowhere: no such run folder or file"
    # Found, and only then the student's weights are missed.
    line = only_error(command(kd.distill.main, None, *arguments[:-1],
                              "more_teachers.detector.run=run"))  # fmt: skip
    assert "weights file none.pth does not exist" in line


def test_a_teacher_that_is_none_is_named(command: Command, data: Path) -> None:
    Path("empty").mkdir()
    line = only_error(distill(command, data, "--teacher", "empty"))
    assert "empty: not a run folder, it has no config.yaml" in line
    assert teacher(command, data) == (0, [])
    os.remove("run/model.safetensors")
    line = only_error(distill(command, data, "--teacher", "run"))
    assert "run/model.safetensors: no such file; if the run has not finished" in line
    assert not Path("out").exists()


def test_a_teacher_of_other_classes_is_refused_before_training(
    command: Command, data: Path
) -> None:
    assert teacher(command, data) == (0, [])
    for split in ("train2017", "val2017"):
        new = {"id": 90, "name": "cube", "supercategory": "shape"}
        edit(data, lambda content: content["categories"].append(new), split)  # noqa: B023
    line = only_error(distill(command, data, "--teacher", "run"))
    assert "class 4 (from 0) of this teacher is none, of unnamed 'cube'" in line
    assert not Path("out").exists()


def test_a_teacher_without_folds_cannot_give_out_of_fold_posteriors(
    command: Command, data: Path
) -> None:
    assert teacher(command, data) == (0, [])
    arguments = ("--teacher", "run", "--set", "soft_targets.out_of_fold=true")
    line = only_error(distill(command, data, *arguments))
    assert "run: trained without folds" in line
    assert "soft_targets.out_of_fold=false" in line


@pytest.mark.slow
def test_a_distillation_keeps_what_it_trained_through_mistakes(
    command: Command, data: Path
) -> None:
    assert teacher(command, data) == (0, [])
    assert distill(command, data, "--teacher", "run") == (0, [])
    variant = Path("out/seed0/distilled/model.safetensors")
    held = variant.read_bytes()
    assert "has a run already" in only_error(distill(command, data, "--teacher", "run"))
    line = only_error(
        distill(command, data, "--teacher", "run", "--resume", "--set", "data.size=48")
    )
    assert "data.size: 32 there, 48 now" in line
    assert variant.read_bytes() == held
    # A variant is no teacher, and the whole of a comparison is no single run.
    line = only_error(
        command(kd.distill.main, DISTILL, "--teacher", str(variant.parent), *settings(data))
    )
    assert "a student's run; expected a teacher's run" in line
    assert "a comparison; choose one of its variants" in only_error(
        command(kd.evaluate.main, None, "out")
    )
    assert command(kd.evaluate.main, None, str(variant.parent)) == (0, [])
    assert command(kd.evaluate.main, None, str(variant.parent), "--set", "data.workers=0")[0] == 0
    line = only_error(command(kd.evaluate.main, None, str(variant.parent), "--set", "data.sise=3"))
    assert "--set data.sise=3: sise: unknown key; did you mean 'size'?" in line
    variant.write_bytes(held[:100])
    line = only_error(command(kd.evaluate.main, None, str(variant.parent)))
    assert f"{variant}: not a safetensors file" in line


def test_evaluating_what_is_no_run_is_named(command: Command, tmp_path: Path) -> None:
    line = only_error(command(kd.evaluate.main, None, "nowhere"))
    assert line.endswith("nowhere: not a run folder, it has no config.yaml")
    Path("results.json").write_text("[]")
    for flags in ([], ["--all"]):  # a detector's results, the flag forgotten
        line = only_error(command(kd.evaluate.main, None, "results.json", *flags))
        assert "python -m kd.evaluate results.json --annotations JSON" in line
    Path("config.yaml").write_text("a: 1")
    assert "config.yaml: not the config of a run" in only_error(
        command(kd.evaluate.main, None, ".")
    )


@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        (TEACHER, "teacher.name=ccn", "unknown teacher 'ccn'; did you mean 'cnn'?"),
        (TEACHER, "teacher.options.widht=4", "unknown option 'widht'; did you mean 'width'"),
        (TEACHER, "task.name=contxt", "unknown task 'contxt'; did you mean 'context'"),
        (
            TEACHER,
            "task.weights={masked_bce: 1.0}",
            "each loss needs one weight; unmatched: masked_bce",
        ),
        (TEACHER, "data.augment={flop: 0.5}", "flop"),
        (TEACHER, "train.optimizer.lr_scale={trunc: 0.1}", "trunc"),
        (TEACHER, "data.prepared=nowhere", "nowhere"),
    ],
)
def test_a_mistake_that_a_schema_cannot_see_is_a_line_too(
    command: Command, data: Path, recipe: dict[str, Any], setting: str, said: str
) -> None:
    arguments = ["--out", "run", *settings(data, setting)]
    assert said in only_error(command(kd.train_teacher.main, recipe, *arguments))
