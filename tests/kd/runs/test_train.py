"""A run from its folder to its summary, and exact resumption from wherever it was interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from kd.config.datasets import Generate, Split
from kd.config.recipes import Optimizer, TermSection, Train
from kd.data.loader import SampleLoader
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import CachedPosteriors
from kd.distillation.terms import build_term
from kd.engine.checkpoint import load_checkpoint
from kd.engine.state import Objective
from kd.errors import UserError
from kd.nn.regions import roi_features
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.evaluation import ObjectResults
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import Classification
from kd.runs import train as session_module
from kd.runs.build import make_accelerator, make_loader
from kd.runs.folder import RunFolder
from kd.runs.read import read_scalars
from kd.runs.train import RunSetup, print_summary, run_training

pytestmark = pytest.mark.slow

TRAIN = Train(
    epochs=3,
    batch_size=8,
    optimizer=Optimizer(lr=3e-3),
    ema=0.9,
    precision="fp32",
    evaluate_every=1,
    checkpoint_every=2,
    log_every=1,
    images=0,
)
CONFIG = {"task": {"name": "classification"}, "train": TRAIN.model_dump(mode="json"), "seed": 5}
STEPS = 9


class TinyStudent(nn.Module):
    """Batch norm, dropout, two heads: all that a resumption could get wrong, and quick."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.3)
        self.appearance = nn.Linear(4 * width, num_classes)
        self.context = nn.Linear(width, num_classes)

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """Classify objects in their scenes."""
        features = self.trunk(images)
        seen = roi_features(features, rois, 4, output_size=2).flatten(1)
        context = self.context(self.dropout(features.mean(dim=(2, 3))[rois[:, 0].long()]))
        appearance = self.appearance(self.dropout(seen))
        return {"logits": appearance + context, "appearance": appearance, "context": context}


@pytest.fixture(scope="module")
def data(small_scenes: Path) -> ObjectsDataset:
    section = ObjectsSection(
        name="scenes",
        root=str(small_scenes),
        train=Split(annotations="annotations/instances_train.json", images="train"),
        val=Split(annotations="annotations/instances_val.json", images="val"),
        generate=Generate(train=24, val=8),
        size=32,
        min_fraction=0.0,
        max_fraction=1.0,
        augment={"flip": 0.5, "shift": 0.1, "jitter": 0.2},
        workers=1,
    )
    return open_objects(section)


def run(
    data: ObjectsDataset,
    folder: Path,
    wrap: Callable[[SampleLoader], Any] = lambda loader: loader,
    *,
    workers: int = 0,
    seed: int = 5,
) -> dict[str, Any]:
    """Train a student with dropout, batch norm, average, labels on half the images and a term."""
    accelerator = make_accelerator("fp32")
    ids = data.train.image_ids
    dataset = data.samples("train", train=True, labelled=ids[::2], seed=seed, epochs=3)
    loader = make_loader(dataset, accelerator, batch_size=8, workers=workers, seed=seed, train=True)
    rows = torch.from_numpy(data.train.object_ids.astype(np.int64))
    torch.manual_seed(0)
    posteriors = CachedPosteriors(rows, torch.rand(len(rows), data.num_classes).log_softmax(dim=1))
    set_seed(seed)
    student = TinyStudent(data.num_classes)
    terms = [
        build_term(TermSection(name="context_logits", weight=1.0, options={"temperature": 1.0}))
    ]
    objective = Objective(
        Classification(num_classes=data.num_classes), {"cross_entropy": 1.0}, terms, posteriors
    )
    opened = RunFolder(folder, CONFIG, resume=True)
    setup = RunSetup(opened, accelerator, data, TRAIN, seed, "run")
    return run_training(setup, AdaptedStudent(student), objective, wrap(loader))


@pytest.fixture(scope="module")
def undisturbed(data: ObjectsDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(data, folder, workers=1)
    return folder


class Interrupted(Exception):
    """What ends a run without a checkpoint, as a crash does."""


class Ending:
    """A loader that after some batches, over all epochs, interrupts whoever reads it."""

    def __init__(self, loader: SampleLoader, batches: int, action: Callable[[], None]) -> None:
        self.loader, self.left, self.action = loader, batches, action

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            if self.left == 0:
                self.action()
            self.left -= 1
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.loader.set_epoch(epoch, start_batch)


def crash() -> None:
    raise Interrupted


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def parts(folder: Path) -> dict[str, Any]:
    place, _, parts = load_checkpoint(folder / "last.pt")
    assert place.step == STEPS
    return parts


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, averages, optimiser and random streams bit for bit; every evaluation is there."""
    ours, theirs = parts(folder), parts(other)
    for part in ("model", "ema"):
        for name, tensor in ours[part].items():
            assert torch.equal(tensor, theirs[part][name]), (part, name)
    for number, moments in ours["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, theirs["optimizer"]["state"][number][name])
    assert torch.equal(ours["streams"][0]["torch"], theirs["streams"][0]["torch"])
    assert (folder / "model.safetensors").read_bytes() != b""
    with np.load(folder / "predictions.npz") as mine, np.load(other / "predictions.npz") as its:
        assert np.array_equal(mine["log_probs"], its["log_probs"])
    curves, expected = read_scalars(folder), read_scalars(other)
    assert dict(curves["eval/nll"]) == dict(expected["eval/nll"])
    assert dict(curves["train/lr"]) == dict(expected["train/lr"])
    assert dict(curves["loss/total"]) == dict(expected["loss/total"])


def test_a_run_writes_all_its_files_and_its_summary_last(
    undisturbed: Path, data: ObjectsDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "last.pt", "model.safetensors", "metrics.jsonl", "predictions.npz",
            "summary.json"} <= names  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["ceiling_top1"] > summary["top1"]
    assert summary["steps_per_second"] > 0
    assert len(read_scalars(undisturbed)["eval/nll"]) == 3
    print_summary("title", summary, ObjectResults())
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[-2:] == ["exact", "posterior"]
    assert any(line.split()[:2] == ["nll", "(nats)"] for line in printed)


def test_workers_change_nothing(undisturbed: Path, data: ObjectsDataset, tmp_path: Path) -> None:
    run(data, tmp_path / "run", workers=0)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7])
def test_a_crash_at_any_step_ends_in_the_same_weights(
    batches: int, undisturbed: Path, data: ObjectsDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(data, folder, lambda loader: Ending(loader, batches, crash), workers=batches % 2)
    torch.rand(7)  # whatever a new process does before it goes on
    run(data, folder, workers=1 - batches % 2)
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_a_ctrl_c_at_any_step_loses_no_step(
    batches: int, undisturbed: Path, data: ObjectsDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(data, folder, lambda loader: Ending(loader, batches, ctrl_c))
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(folder / "last.pt")[0].step == batches + 1
    run(data, folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_a_crash_while_evaluating_repeats_that_evaluation(
    evaluation: int,
    undisturbed: Path,
    data: ObjectsDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    loader = session_module.val_loader
    with monkeypatch.context() as patch:
        patch.setattr(
            session_module,
            "val_loader",
            lambda *asked: Ending(loader(*asked), evaluation, crash),
        )
        with pytest.raises(Interrupted):
            run(data, folder)
    assert load_checkpoint(folder / "last.pt")[0].step == 3 * (evaluation + 1)
    run(data, folder)
    assert_same_run(folder, undisturbed)


def test_a_finished_training_that_lost_its_summary_is_evaluated_again(
    undisturbed: Path, data: ObjectsDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(data, folder)
    (folder / "summary.json").unlink()
    (folder / "model.safetensors").unlink()
    summary = run(data, folder)
    assert "steps_per_second" not in summary
    assert_same_run(folder, undisturbed)


def test_a_checkpoint_of_another_model_is_refused(
    undisturbed: Path, data: ObjectsDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(data, folder, lambda loader: Ending(loader, 4, crash))
    other = TinyStudent(data.num_classes, width=7)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "TinyStudent", lambda num_classes: other)
        with pytest.raises(UserError, match=r"last\.pt: weights of another model: .* expected"):
            run(data, folder)
