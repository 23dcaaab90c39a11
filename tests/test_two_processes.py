"""Two processes over gloo: the gradients, metrics and tables of one process with the whole batch.

The ranks are forked from this process, which has paid for the imports; one test starts them with
torchrun as a user does.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from kd import distill
from kd.config.datasets import Generate, Split
from kd.config.recipes import (
    Critic,
    Model,
    Optimizer,
    Schedule,
    TaskSection,
    TeacherRecipe,
    TermSection,
    Train,
)
from kd.data.loader import to_device
from kd.distillation import adapters
from kd.distillation.adapters import Conv3x3
from kd.distillation.registry import TermKind
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import build_term, draw_modules, modules_of
from kd.engine.loop import evaluate, train_step
from kd.engine.state import Objective, Training
from kd.losses.imitation import hint
from kd.nn.networks import DETECTORS
from kd.nn.regions import roi_features
from kd.problems.detection.task import Detection
from kd.problems.objects.data import open_objects
from kd.problems.objects.metric import TopN
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import Classification, Context
from kd.problems.segmentation.task import Segmentation
from kd.runs.build import make_accelerator, make_loader
from kd.runs.load_teacher import TrainedTeacher
from kd.runs.read import read_distill, read_scalars
from kd.runs.setup import open_run, start_training
from kd.teacher_cache import cache as teacher_cache
from kd.utils.images import VOID
from teachers.cnn import cnn

ROOT = Path(__file__).resolve().parent.parent
# SGD: Adam's first steps have the size of the rate whatever the gradient's, rounding's included.
STUDENT = [
    text
    for setting in (
        "student={name: shufflenet_v2_x0_5, options: {stride: 16, batch_norm_frozen: true}}",
        "train.optimizer={name: sgd, lr: 0.01}",
        "data.repeat_labelled=1",
        "train.epochs=1",
        "train.batch_size=8",
        "train.images=0",
        "seeds=[0]",
        "data.labelled=0.5",
        "variants=[plain, distilled, no_context]",
    )
    for text in ("--set", setting)
]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _as_rank(rank: int, world: int, port: int, function: Callable[[], None], log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    # What a fork inherits of accelerate knows one process.
    PartialState._reset_state()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        function()
    except BaseException:
        log.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def in_two_processes(function: Callable[[], None], folder: Path) -> list[int]:
    """Run a function as rank 0 and rank 1; their exit codes."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    logs = [folder / f"rank{rank}.txt" for rank in (0, 1)]
    ranks = [
        context.Process(target=_as_rank, args=(rank, 2, port, function, log))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=90)
        if process.is_alive():
            process.kill()
            process.join()
    for log in logs:
        if log.is_file():
            print(log.read_text())  # pytest shows it where the test fails
    return [process.exitcode or 0 for process in ranks]


def _section(root: Path) -> ObjectsSection:
    return ObjectsSection(
        root=str(root),
        train=Split(annotations="annotations/instances_train.json", images="train"),
        val=Split(annotations="annotations/instances_val.json", images="val"),
        generate=Generate(train=24, val=8),
        size=32,
        min_fraction=0.0,
        max_fraction=1.0,
        workers=0,
    )


class NormFree(nn.Module):
    """A student without batch norm, whose statistics would be each rank's own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.appearance = nn.Linear(8, num_classes)
        self.context = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor, rois: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify objects in their scenes."""
        features = self.trunk(images)
        appearance = self.appearance(roi_features(features, rois, 4).flatten(1))
        context = self.context(features.mean(dim=(2, 3))[rois[:, 0].long()])
        return {"logits": appearance + context, "appearance": appearance, "context": context}


class Scaled(nn.Module):
    """A loss with a weight that learns: outside of the forward pass that DDP knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """A mean over all places."""
        return (student * self.weight.view(-1, 1, 1) - teacher).square().mean()


def _steps(root: Path, out: Path, *, accumulate: int) -> None:
    """Two steps with all kinds of terms, on whole batches of 8; the weights go to a file."""
    accelerator = make_accelerator("fp32")
    data = open_objects(_section(root))
    dataset = data.samples(
        "train", train=True, labelled=data.train.image_ids[::3], seed=1, epochs=1
    )
    loader = make_loader(dataset, accelerator, batch_size=8 // accumulate, workers=0, train=True)
    torch.manual_seed(4)
    teacher = cnn(data.num_classes, width=4, downs=3, hidden=8)
    student = NormFree(data.num_classes)
    live = LiveTeacher(teacher, Context(num_classes=data.num_classes), ["features.3"])
    layers: dict[str, Any] = {"student": "trunk", "teacher": "features.3"}
    terms = [
        build_term(TermSection(name="context_logits", weight=1.0)),
        build_term(TermSection(name="context_features", weight=1.0, **layers)),
        build_term(TermSection(name="pair_wise", weight=1.0, **layers)),
        build_term(TermSection(name="holistic", weight=1.0, **layers, options={"widths": [4, 8]})),
    ]
    terms = draw_modules(terms, {"features.3": torch.zeros(1, 32, 4, 4)})
    scaled = build_term(TermSection(name="hint", label="scaled", weight=1.0, **layers))
    own = dataclasses.replace(scaled.kind, trained="student")
    terms.append(dataclasses.replace(scaled, kind=own, function=Scaled()))
    critics = modules_of(terms, trained="critic")
    model = AdaptedStudent(
        student,
        ["trunk"],
        {"trunk": nn.Conv2d(8, 32, 3, stride=2, padding=1)},
        modules_of(terms, trained="student"),
    )
    # The points of the penalty are each rank's own; at a third of the way they are everybody's.
    torch.rand = lambda *size, **_: torch.full(size, 1 / 3)
    train = Train(
        optimizer=Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0),
        schedule=Schedule(name="constant", warmup=0.0),
        clip_norm=1.0,
        critic=Critic(optimizer=Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0)),
    )
    training = start_training(accelerator, model, train, 2, critics)
    objective = Objective(
        Classification(num_classes=data.num_classes), {"cross_entropy": 1.0}, terms, live
    )
    loader.set_epoch(0)
    batches = [to_device(b, accelerator.device, channels_last=True) for b in loader]
    for step in range(2):
        group = batches[step * accumulate : (step + 1) * accumulate]
        assert not teacher.training
        train_step(training, group, objective, objective.weights_at(0.0))
    if accelerator.is_main_process:
        judged = critics["holistic"].state_dict(prefix="critic.")
        torch.save({**training.unwrapped.state_dict(), **judged}, out)
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_take_the_steps_of_one_process_with_the_whole_batch(
    accumulate: int, small_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", torch.rand)
        _steps(small_scenes, tmp_path / "one.pt", accumulate=1)
    two = functools.partial(_steps, small_scenes, tmp_path / "two.pt", accumulate=accumulate)
    assert in_two_processes(two, tmp_path) == [0, 0]
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    both = torch.load(tmp_path / "two.pt", weights_only=True)
    assert any(name.startswith("adapters.") for name in one)
    assert not torch.equal(one["losses.scaled.weight"], torch.ones(32))
    for name in one:
        if accumulate > 1 and name.startswith("critic."):
            continue  # power iteration advances with each micro-batch
        torch.testing.assert_close(one[name], both[name], rtol=1e-4, atol=1e-6, msg=name)


BOXES = [[[8, 8, 16, 17], [4, 30, 12, 38]], [[10, 4, 30, 26]], [], []]  # of four images
DETECTOR = {"trunk": "resnet18", "width": 0.25, "levels": [2, 3], "scales": [2.0],
            "canonical": 32.0, "hidden": 32, "region_size": 3, "candidates": [50, 50],
            "proposals": [40, 20], "batch_norm_frozen": True}  # fmt: skip


def _pictures(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """Some of the four as a detector's batch."""
    torch.manual_seed(2)
    images = torch.randint(256, (len(BOXES), 3, 64, 64), dtype=torch.uint8)
    flat = [(place, box) for place, number in enumerate(chosen) for box in BOXES[number]]
    return {
        "images": images[list(chosen)],
        "sizes": torch.tensor([[64, 64]] * len(chosen)),
        "image_ids": torch.tensor(chosen),
        "boxes": torch.tensor([box for _, box in flat]).float().view(-1, 4),
        "labels": torch.zeros(len(flat), dtype=torch.int64),
        "image_of": torch.tensor([place for place, _ in flat], dtype=torch.int64),
        "object_ids": torch.arange(len(flat)),
        "labelled": torch.ones(len(chosen), dtype=torch.bool),
    }


def _detector_steps(out: Path, groups: Sequence[Sequence[Sequence[int]]]) -> None:
    """Two steps of terms on a pyramid, on each rank's own images; the weights go to a file."""
    accelerator = make_accelerator("fp32")
    torch.manual_seed(4)
    student, teacher = (DETECTORS["fasterrcnn"].load()(3, channels=c, **DETECTOR) for c in (16, 24))
    layers = [f"network.backbone.{level}" for level in (0, 1)]
    known: Any = {"num_classes": 3, "levels": student.levels, "loss_units": student.loss_units}
    live = LiveTeacher(teacher, Detection(**known, wanted="features"), layers, posterior=False)
    terms = [
        build_term(TermSection(name=kind, label=f"{kind}{place}", weight=1.0, student=layers[place],
                   teacher=layers[place], options=options))
        for kind, place, options in (
            ("imitation", 0, {"psi": 0.8}), ("imitation_inside", 0, {}),
            ("context_features", 0, {}), ("imitation_inside", 1, {}),
        )
    ]  # fmt: skip
    model = AdaptedStudent(student, layers, {layer: Conv3x3(16, 24) for layer in layers})
    train = Train(
        optimizer=Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0),
        schedule=Schedule(name="constant", warmup=0.0),
    )
    training = start_training(accelerator, model, train, 2)
    training.model.train()
    # The student's own losses sample regions at random, which is each rank's own.
    own = dict.fromkeys(known["loss_units"], 0.0)
    objective = Objective(Detection(**known, psis=(0.8,)), own, terms, live)
    for _ in range(2):
        group = [_pictures(chosen) for chosen in groups[accelerator.process_index]]
        train_step(training, group, objective, objective.weights_at(0.0))
    if accelerator.is_main_process:
        torch.save(training.unwrapped.state_dict(), out)
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("few", [-1.0, 1.0])
def test_two_ranks_imitate_a_detector_as_one_process_does_though_one_has_no_box(
    few: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "FEW", few)  # adapters everywhere, or where masks look
    _detector_steps(tmp_path / "one.pt", [[range(4)]])
    two = functools.partial(_detector_steps, tmp_path / "two.pt", [[[0], [1]], [[2], [3]]])
    assert in_two_processes(two, tmp_path) == [0, 0]
    one, both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    adapter = one["adapters.network/backbone/0.convolution.bias"]
    assert adapter.abs().sum() > 0  # it began at zero
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=1e-4, atol=1e-6, msg=name)


def own_hint(
    student: torch.Tensor, teacher: torch.Tensor, *, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """A user's own loss, a mean over the valid places."""
    return hint(student, teacher, valid=valid)


OWN_HINT = TermKind(own_hint, "a copy of hint", unit="place", valid=True)


class Scores(nn.Module):
    """Score maps from squares of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(3, 3, 8, stride=8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images to logits, (N, 3, H/8, W/8)."""
        scores: torch.Tensor = self.scores(images)
        return scores


def _label_maps(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """Images with label maps; the first one is void but for a strip."""
    random = torch.Generator().manual_seed(6)
    images = torch.randint(256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    maps = torch.randint(3, (4, 32, 32), generator=random)
    maps[0, :, 8:] = VOID
    return {"images": images[list(chosen)], "label_maps": maps[list(chosen)]}


def _own_loss_steps(out: Path, groups: Sequence[Sequence[Sequence[int]]]) -> None:
    """Two steps of a user's own loss on each rank's label maps; the weights go to a file."""
    accelerator = make_accelerator("fp32")
    torch.manual_seed(4)
    student, teacher, task = Scores(), Scores(), Segmentation(num_classes=3)
    section = TermSection(
        name=f"{__name__}:OWN_HINT", weight=1.0, student="logits", teacher="logits"
    )
    live = LiveTeacher(teacher, task, posterior=False)
    train = Train(
        optimizer=Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0),
        schedule=Schedule(name="constant", warmup=0.0),
    )
    training = start_training(accelerator, AdaptedStudent(student), train, 2)
    training.model.train()
    objective = Objective(task, {"cross_entropy": 1.0}, [build_term(section)], live)
    for _ in range(2):
        group = [_label_maps(chosen) for chosen in groups[accelerator.process_index]]
        train_step(training, group, objective, objective.weights_at(0.0))
    if accelerator.is_main_process:
        torch.save(training.unwrapped.state_dict(), out)
    accelerator.wait_for_everyone()


def test_a_loss_of_the_users_own_has_one_gradient_however_the_batch_is_split(
    tmp_path: Path,
) -> None:
    _own_loss_steps(tmp_path / "one.pt", [[range(4)]])
    _own_loss_steps(tmp_path / "parts.pt", [[[0], [1, 2, 3]]])
    two = functools.partial(_own_loss_steps, tmp_path / "two.pt", [[[0]], [[1, 2, 3]]])
    assert in_two_processes(two, tmp_path) == [0, 0]
    one, parts, both = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "parts", "two")
    )
    for name in one:
        torch.testing.assert_close(one[name], parts[name], rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(one[name], both[name], rtol=1e-4, atol=1e-6, msg=name)


def _keep(root: Path, out: Path) -> None:
    """A cache of small shards, each made by one of the ranks."""
    teacher_cache.MOST_IMAGES = 5
    accelerator, data = make_accelerator("fp32"), open_objects(_section(root))
    torch.manual_seed(4)
    recipe = TeacherRecipe(
        data=data.section,
        task=TaskSection(name="context", weights={"cross_entropy": 1.0}),
        teacher=Model(name="cnn"),
    )
    model = cnn(data.num_classes, width=4, downs=3, hidden=8).eval()
    teacher = TrainedTeacher(out, recipe, model, Context(num_classes=data.num_classes))
    kept = teacher_cache.open_cache(
        teacher, data, accelerator, teacher_cache.CacheOptions(outputs=("posterior", "features.3"))
    )
    for output in kept.values():  # every rank reads what both have written
        assert output.store.ids().tolist() == sorted(data.train.object_ids.tolist())


def test_two_ranks_keep_what_one_does(small_scenes: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "MOST_IMAGES", 5)
        _keep(small_scenes, tmp_path / "one")
    assert in_two_processes(functools.partial(_keep, small_scenes, tmp_path / "two"), tmp_path) == [
        0,
        0,
    ]
    shards = [
        sorted(str(file.relative_to(side)) for file in side.rglob("*.safetensors"))
        for side in (tmp_path / "one", tmp_path / "two")
    ]
    assert len(shards[0]) == 2 * 5
    assert shards[0] == shards[1]  # their names have the checksums of their contents


class Counted(nn.Module):
    """Batch norm whose statistics differ between the ranks before an evaluation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor, rois: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify by an image's mean colour."""
        return {"logits": self.head(self.norm(images).mean(dim=(2, 3))[rois[:, 0].long()])}


def _evaluate(root: Path, out: Path) -> None:
    accelerator = make_accelerator("fp32")
    data = open_objects(_section(root))
    torch.manual_seed(1)
    model = AdaptedStudent(Counted(data.num_classes))
    norm = model.get_submodule("student.norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean += accelerator.process_index
    metric = TopN(data.num_classes)
    loader = make_loader(data.samples("val"), accelerator, batch_size=5, workers=0)
    evaluate(model, Classification(num_classes=data.num_classes), loader, metric, accelerator)
    metric.save_predictions(out / f"{accelerator.num_processes}-{accelerator.process_index}.npz")
    accelerator.wait_for_everyone()


def test_two_ranks_measure_what_one_does(small_scenes: Path, tmp_path: Path) -> None:
    _evaluate(small_scenes, tmp_path)
    assert in_two_processes(functools.partial(_evaluate, small_scenes, tmp_path), tmp_path) == [
        0,
        0,
    ]
    with (
        np.load(tmp_path / "1-0.npz") as one,
        np.load(tmp_path / "2-0.npz") as first,
        np.load(tmp_path / "2-1.npz") as second,
    ):
        for name in one.files:
            assert np.allclose(one[name], first[name], atol=1e-6), name
            assert np.array_equal(first[name], second[name]), name


def _same_table(one: Path, two: Path) -> None:
    """The tables agree but for what batch norm makes of a rank's own objects."""
    ours, theirs = read_distill(one), read_distill(two)
    assert list(ours.variants) == list(theirs.variants) == ["plain", "distilled", "no_context"]
    for variant, runs in ours.variants.items():
        for run, other in zip(runs, theirs.variants[variant], strict=True):
            assert np.array_equal(run.records["object_ids"], other.records["object_ids"])
            difference = np.abs(run.records["log_probs"] - other.records["log_probs"]).max()
            assert difference < 0.05, variant
            for name in ("nll", "topn_auc"):
                assert run.summary[name] == pytest.approx(other.summary[name], abs=5e-3)
            mine, its = (read_scalars(one.folder)["loss/total"] for one in (run, other))
            assert np.allclose(mine, its, rtol=1e-2)


def _distill(flags: list[str]) -> None:
    assert distill.main(flags) == 0


@pytest.fixture(scope="module")
def alone(
    small_data: list[str], small_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """The flags of a distillation and its folder, made by one process."""
    flags = ["--student", "resnet18", "--teacher", str(small_teacher), *small_data, *STUDENT]
    out = tmp_path_factory.mktemp("alone") / "run"
    _distill([*flags, "--out", str(out)])
    return flags, out


@pytest.mark.slow
def test_torchrun_gives_the_table_of_one_process(
    alone: tuple[list[str], Path], tmp_path: Path
) -> None:
    flags, one = alone
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(free_port()), "-m", "kd.distill",
               *flags, "--out", str(out)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # No limit on how long it may take; only a hang ends it.
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1_200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distilled - plain") == 1
    _same_table(one, out)


def _refused(out: Path) -> None:
    accelerator = make_accelerator("fp32")
    try:
        open_run(accelerator, out, {"a": 2}, resume=True)
    except ValueError as error:
        (out / f"said{accelerator.process_index}").write_text(str(error))
    open_run(accelerator, out / "new", {"a": 1}, resume=False)
    accelerator.wait_for_everyone()


def test_a_run_folder_of_another_config_is_refused_on_every_rank(tmp_path: Path) -> None:
    accelerator = make_accelerator("fp32")
    open_run(accelerator, tmp_path, {"a": 1}, resume=False)
    (tmp_path / "metrics.jsonl").touch()
    assert in_two_processes(functools.partial(_refused, tmp_path), tmp_path) == [0, 0]
    for rank in (0, 1):
        assert "a: 1 there, 2 now" in (tmp_path / f"said{rank}").read_text()
    assert (tmp_path / "new" / "config.yaml").is_file()


def _stop(root: Path, out: Path) -> None:
    """Rank 1 alone is asked to stop; both stop after the same step, and say which."""
    from kd.engine.loop import fit
    from kd.engine.state import Hooks

    accelerator = make_accelerator("fp32")
    data = open_objects(_section(root))
    loader = make_loader(
        data.samples("train", train=True), accelerator, batch_size=4, workers=0, train=True
    )
    training: Training = start_training(
        accelerator, AdaptedStudent(Counted(data.num_classes)), Train(), 100
    )
    task = Classification(num_classes=data.num_classes)
    hooks = Hooks(
        log=lambda values, step: None,
        checkpoint=lambda: None,
        stop=lambda: accelerator.process_index == 1 and training.progress.step >= 3,
    )
    try:
        fit(training, Objective(task, {"cross_entropy": 1.0}), loader, epochs=9, hooks=hooks,
            log_every=2)  # fmt: skip
    except KeyboardInterrupt:
        place: Any = training.progress.step
        (out / f"stopped{accelerator.process_index}").write_text(str(place))
    accelerator.wait_for_everyone()


def test_one_rank_asked_to_stop_stops_both_at_the_same_step(
    small_scenes: Path, tmp_path: Path
) -> None:
    assert in_two_processes(functools.partial(_stop, small_scenes, tmp_path), tmp_path) == [0, 0]
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
