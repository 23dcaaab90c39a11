"""The pages "Your own ..." are run word for word, from a folder outside of the repository."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from kd import distill
from kd.problems import problem_of_data
from kd.problems.recipes import data_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("student", "teacher", "loss", "dataset", "metric")
# A block of code; a line with a file's name before it says where it is written.
BLOCK = re.compile(
    r"(?:^`(?P<file>[\w.-]+)`:\n\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: str) -> list[re.Match[str]]:
    """The blocks of code of a page, in order."""
    return list(BLOCK.finditer((ROOT / "docs" / f"your-own-{page}.md").read_text("utf-8")))


def run_line(line: str) -> None:
    """Run one line of a shell, `python -m MODULE ...` or `python FILE`, in this process."""
    python, *arguments = shlex.split(line)
    assert python == "python"
    if arguments[0] == "-m":
        command = importlib.import_module(arguments[1])
        assert command.main(arguments[2:]) == 0, line
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def follow(page: str, folder: Path) -> Path:
    """Write the files of a page into a folder and run its commands there."""
    for block in blocks(page):
        if block["file"]:
            (folder / block["file"]).write_text(block["text"], "utf-8")
        else:
            for line in block["text"].replace("\\\n", " ").splitlines():
                run_line(line)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, which Python is started from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name in ("mine", "network")]:
        del sys.modules[name]


def scalars(run: Path) -> dict[str, list[float]]:
    """Each curve of a run."""
    curves: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        curves.setdefault(entry["tag"], []).append(entry["value"])
    return curves


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_a_file_or_commands(page: str) -> None:
    found = [(block["kind"], bool(block["file"])) for block in blocks(page)]
    assert set(found) <= {("python", True), ("yaml", True), ("bash", False)}
    assert ("bash", False) in found


@pytest.mark.slow
def test_a_student_is_trained_evaluated_and_compared(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow("student", elsewhere)
    for seed in ("seed0", "seed1"):
        plain, distilled = (elsewhere / "runs/mine" / seed / one for one in ("plain", "distilled"))
        sizes = {json.loads((run / "summary.json").read_text())["parameters"]
                 for run in (plain, distilled)}  # fmt: skip
        assert len(sizes) == 1
        assert scalars(distilled)["loss/context_logits"][-1] > 0
    assert (elsewhere / "runs/mine/seed0/distilled/evaluation/table.md").is_file()
    table = capsys.readouterr().out
    assert "distilled - plain" in table


@pytest.mark.slow
def test_a_teacher_is_trained_with_its_folds_and_teaches(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow("teacher", elsewhere)
    teacher = elsewhere / "runs/teacher"
    size = 8 * (4 * 25 + 1) + 8 * (8 * 9 + 1) + 22 * (8 + 1)  # of the page's layers, width 8
    for run in (teacher, teacher / "fold0", teacher / "fold1"):
        assert json.loads((run / "summary.json").read_text())["parameters"] == size
    assert (teacher / "evaluation/table.md").is_file()
    for variant in ("distilled", "shuffled"):
        curves = scalars(elsewhere / "runs/student/seed0" / variant)
        assert curves["loss/context_logits"][-1] > 0
    assert "distilled - plain" in capsys.readouterr().out


# A segmentation network without batch norms, whose statistics micro-batches do not share.
NETWORK = """
from torch import nn

class Plain(nn.Module):
    stride = 8

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.ReLU(), nn.Conv2d(8, num_classes, 1)
        )

    def forward(self, images):
        return {"logits": self.layers(images)}

def network(*, num_classes):
    return Plain(num_classes)
"""
# One step of plain gradient descent; crops at several scales, so that images differ in void.
ONE_STEP = [
    "student={name: 'network:network', options: {}}", "variants=[distilled]", "seeds=[0]",
    "data.crop=[96, 96]", "data.augment={scale: [0.5, 2.0]}",
    "train={epochs: 1, batch_size: 24, precision: fp32, clip_norm: 0.0, images: 0}",
    "train.optimizer={name: sgd, lr: 0.1, momentum: 0.0, weight_decay: 0.0}",
    "train.schedule={name: constant, warmup: 0.0}",
]  # fmt: skip


def one_step(out: Path, term: str, *settings: str) -> list[str]:
    """A command that takes one step with a term."""
    losses = f"losses=[{{name: '{term}', student: logits, teacher: logits, weight: 1.0}}]"
    texts = [text for one in [*ONE_STEP, losses, *settings] for text in ("--set", one)]
    return ["--config", "student.yaml", "--out", str(out), *texts]


def _as_rank(rank: int, port: int, command: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()  # what a fork inherits of accelerate knows one process
    os._exit(distill.main(command))


def in_two_processes(command: list[str]) -> None:
    """Run a command as rank 0 and rank 1."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_as_rank, args=(rank, port, command)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]


@pytest.mark.slow
def test_a_loss_has_the_built_in_one_s_gradient_whole_split_and_on_two_ranks(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow("loss", elsewhere)
    curves = scalars(elsewhere / "runs/student/seed0/distilled")
    assert curves["loss/mine:DISTANCE"][-1] > 0
    assert "distilled - plain" in capsys.readouterr().out
    (elsewhere / "network.py").write_text(NETWORK)
    out = elsewhere / "steps"
    assert distill.main(one_step(out / "hint", "hint")) == 0
    assert distill.main(one_step(out / "mine", "mine:DISTANCE")) == 0
    assert distill.main(one_step(out / "micro", "mine:DISTANCE", "train.accumulate=2")) == 0
    in_two_processes(one_step(out / "ranks", "mine:DISTANCE"))
    assert distill.main(one_step(out / "none", "hint", "variants=[plain]")) == 0
    built_in = load_file(out / "hint/seed0/distilled/model.safetensors")
    untaught = load_file(out / "none/seed0/plain/model.safetensors")
    for name, weight in built_in.items():
        moved = (weight - untaught[name]).abs().max()
        assert moved > 1e-5  # what the term does
        for run in ("mine", "micro", "ranks"):
            added = load_file(out / run / "seed0/distilled/model.safetensors")[name]
            # Places count as the pixels with a class: at the rims of void that is rounded.
            torch.testing.assert_close(added, weight, rtol=0, atol=float(0.005 * moved))


@pytest.mark.slow
def test_a_dataset_opens_with_its_counts_and_is_learned_from(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow("dataset", elsewhere)
    section = data_config("mine.yaml")
    data = problem_of_data(section).open(section)
    assert data.class_names == ("disc", "square")
    for split, images in (("train", 16), ("val", 8)):
        index = getattr(data, split)
        assert (len(index.image_ids), len(index.labels)) == (images, 2 * images)
        assert np.bincount(index.labels).tolist() == [images, images]
    summary = json.loads((elsewhere / "runs/teacher/summary.json").read_text())
    assert summary["count"] == 16  # all objects of val, each hidden in turn
    assert (elsewhere / "runs/student/seed0/distilled/evaluation/table.md").is_file()
    assert "distilled - plain" in capsys.readouterr().out

    section = data_config("maps.yaml")
    maps = problem_of_data(section).open(section)
    assert maps.class_names == ("ground", "disc")
    # The disc of 25 pixels across, of the 96 x 64 pixels of an image.
    fractions = maps.class_fractions()["pixel_fractions"]
    assert fractions[1] == pytest.approx(np.pi * 12.5**2 / (96 * 64), rel=0.03)
    student = json.loads((elsewhere / "runs/maps/seed0/plain/summary.json").read_text())
    assert 0 < student["pixel_accuracy"] <= 1
    section = data_config("gaze.yaml")
    gaze = problem_of_data(section).open(section)
    assert (len(gaze.train.images), len(gaze.val.images)) == (8, 4)
    points = gaze.val.fixations(0, (64, 96)).points
    with Image.open(elsewhere / "looked_at/val/val0.png") as file:
        rows, columns = np.nonzero(np.array(file))
    centre = columns.mean() + 0.5, rows.mean() + 0.5
    assert np.abs(points.mean(axis=0) - centre).max() < 6  # five people, four pixels beside
    student = json.loads((elsewhere / "runs/gaze/seed0/plain/summary.json").read_text())
    assert student["KLD"] > 0


@pytest.mark.slow
def test_a_metric_shows_with_its_unit_everywhere_and_is_compared_over_images(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow("metric", elsewhere)
    printed = capsys.readouterr().out
    one, two = (elsewhere / "runs" / name for name in ("one", "two"))
    values = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    for run, summary in zip((one, two), values, strict=True):
        # The same as the NLL, in bits.
        assert summary["surprise"] == pytest.approx(summary["nll"] / np.log(2), rel=1e-9)
        assert scalars(run)["eval/surprise"][-1] == pytest.approx(summary["surprise"])
    lines = printed.splitlines()
    shown = [line.split() for line in lines if line.strip().startswith("surprise (bits)")]
    assert [words[2] for words in shown] == [
        f"{values[n]['surprise']:.2f}" for n in (0, 1, 0, 0)
    ]  # two trainings, an evaluation, the comparison
    assert shown[3][4].startswith(f"{values[1]['surprise'] - values[0]['surprise']:+z.2f}")
    assert "lower is better: nll, ece, surprise" in lines
    numbers = json.loads((one / "evaluation/metrics.json").read_text())["runs"]["cnn"]
    nats, bits = (numbers["intervals"][name] for name in ("nll", "surprise"))
    assert bits == pytest.approx([bound / np.log(2) for bound in nats])
