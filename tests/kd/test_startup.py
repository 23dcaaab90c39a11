"""Commands answer before torch is imported: help, lists, schemas, recipes and mistyped names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kd.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "import runpy, sys\n"
    "sys.argv = sys.argv[1:]\n"
    "try:\n"
    "    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    "finally:\n"
    "    heavy = sorted({'torch', 'numpy', 'matplotlib'} & sys.modules.keys())\n"
    "    sys.stderr.write(f'heavy: {heavy}')\n"
)


@pytest.mark.parametrize(
    ("command", "status", "answer"),
    [
        ("kd --help", 0, "train-teacher"),
        ("kd.train_teacher --help", 0, "--teacher NAME"),
        ("kd.distill --help", 0, "--student NAME"),
        ("kd.evaluate --help", 0, "--per-class"),
        ("kd.evaluate --list", 0, "mIoU "),
        ("kd.evaluate a b", 2, "--all compares several"),
        ("kd.compare --help", 0, "--markdown"),
        ("kd.transfer --help", 0, "--task NAME"),
        ("kd.cache --help", 0, "--layers"),
        ("kd.imagine --help", 0, "--polygon"),
        ("kd.rescore --help", 0, "--detections"),
        ("kd.predict --help", 0, "--annotations"),
        ("kd.export --help", 0, "--format"),
        ("kd.layers --help", 0, "--maps"),
        ("kd.export run --format onxx", 2, "invalid choice: 'onxx'"),
        ("kd.export run --int8 static --format torchscript", 2, "only for --format onnx"),
        ("kd.distill --schema", 0, "SegmentationSection"),
        ("kd.distill --list", 0, "fasterrcnn_resnet18 "),
        ("kd.train_teacher --list", 0, "scene_transformer "),
        ("kd.distill --student resnet18 --print-config", 0, "variants:"),
        ("kd.distill --student nosuch", 2, "no file configs/distill/nosuch.yaml"),
        ("kd.distill --student resnet18 --set student.name=resnet19", 2, "mean 'resnet18'"),
        ("kd.distill --student resnet18 --set student.name=espnet", 2, "is for segmentation"),
        ("kd.distill --student resnet18 --set train.epohcs=3", 2, "did you mean 'epochs'?"),
        ("kd.distill --student resnet18 --set task.name=contxt", 2, "unknown task 'contxt'"),
        ('kd.distill --student resnet18 --set losses=[{"name":"hnt","weight":1.0}]', 2, "'hint'"),
        (
            'kd.distill --student espnet_c --set adapters={"norm3":{"kind":"con1x1","to":"x"}}',
            2,
            "'conv1x1'",
        ),
        ("kd.train_teacher --teacher cnn --set teacher.name=unett", 2, "mean 'unet'"),
        ("kd.distill --student resnet18 --set metrics=[accuracy]", 2, "package.module:METRIC"),
        ("kd.out_of_context make --list", 0, "camvid "),
        ("kd.cache --teacher x --data scens", 2, "did you mean 'scenes'"),
        ("kd distil", 2, "did you mean 'distill'"),
    ],
)
def test_an_answer_needs_no_torch(command: str, status: int, answer: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == status, ran.stderr
    assert answer in ran.stdout + ran.stderr
    assert ran.stderr.endswith("heavy: []")


@pytest.mark.parametrize("name", ["download", "prepare", "scenes"])
def test_help_of_a_data_command_needs_no_torch(name: str) -> None:
    command = [sys.executable, "-c", PROBE, f"kd.data.{name}", "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: " in ran.stdout
    assert ran.stderr in ("heavy: []", "heavy: ['numpy']")


def test_every_command_is_a_module_that_runs() -> None:
    for name in COMMANDS:
        assert (ROOT / "kd" / f"{name.replace(' ', '/').replace('-', '_')}.py").is_file(), name
    commands = {path.stem for path in (ROOT / "kd").glob("*.py") if "def main(" in path.read_text()}
    assert commands - {"__main__"} == {
        name.replace("-", "_") for name in COMMANDS if " " not in name
    }


def test_kd_runs_the_command_that_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-teacher", "--teacher", "cnn", "--print-config"]) == 0
    assert "name: cnn" in capsys.readouterr().out
    assert main(["train-teacher", "--teacher", "cnm"]) == 2
    assert "did you mean 'cnn'" in capsys.readouterr().err
