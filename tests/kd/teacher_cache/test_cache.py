"""A teacher's outputs, kept: the same numbers, gone on with, mended, refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd.config.recipes import Adapter, TermSection, Train
from kd.data.loader import to_device
from kd.distillation.student import AdaptedStudent, adapt_student
from kd.distillation.targets import CachedPosteriors, CachedTeacher, LiveTeacher
from kd.distillation.terms import build_term
from kd.engine.loop import train_step
from kd.engine.state import Objective
from kd.errors import UserError
from kd.formats.splits import fold_of
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.task import Classification
from kd.problems.recipes import data_config
from kd.runs.build import make_accelerator, make_loader
from kd.runs.load_teacher import TrainedTeacher, fold_models, load_teacher
from kd.runs.setup import start_training
from kd.storage.store import Store
from kd.teacher_cache import cache as teacher_cache
from kd.teacher_cache.cache import CacheOptions, open_cache
from students.classifiers import build_student

LAYER, SEEN = "features.2", "trunk.trunk.maxpool"
BOTH = ("posterior", "logits", LAYER)


@pytest.fixture(scope="module")
def data(small_data: list[str]) -> ObjectsDataset:
    return open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))


@pytest.fixture
def teacher(small_teacher: Path, tmp_path: Path) -> TrainedTeacher:
    """A copy, whose folder has no cache yet."""
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder, ignore=shutil.ignore_patterns("cache"))
    return load_teacher(folder, 22)


def live_rows(teacher: TrainedTeacher, data: ObjectsDataset) -> dict[str, dict[int, Tensor]]:
    """What the teacher says now, by output and object."""
    section = data.section.model_copy(update={"min_fraction": 0.0, "max_fraction": 1.0})
    dataset = ObjectsDataset(section, data.train, data.val).samples("train")
    loader = make_loader(dataset, make_accelerator("fp32"), batch_size=5, workers=0)
    loader.set_epoch(0)
    rows: dict[str, dict[int, Tensor]] = {name: {} for name in BOTH}
    with LiveTeacher(teacher.model, teacher.task, [LAYER]) as live, torch.no_grad():
        for batch in loader:
            ids = batch["object_ids"][batch["hidden"]].tolist()
            given = live(batch)
            for name in BOTH:
                rows[name] |= dict(zip(ids, given[name], strict=True))
    return rows


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_kept_is_what_the_teacher_says(
    teacher: TrainedTeacher, data: ObjectsDataset, dtype: Any
) -> None:
    kept = open_cache(
        teacher, data, make_accelerator("fp32"), CacheOptions(outputs=BOTH, dtype=dtype)
    )
    rows = live_rows(teacher, data)
    tolerance = 1e-3 if dtype == "float16" else 1e-5
    for name in BOTH:
        ids = kept[name].store.ids()
        assert set(ids.tolist()) == set(data.train.object_ids.tolist()) == set(rows[name])
        stored = kept[name].whole()
        assert stored.dtype == getattr(torch, dtype)
        live = torch.stack([rows[name][int(one)] for one in ids])
        torch.testing.assert_close(stored.float(), live, rtol=tolerance, atol=tolerance)
    assert kept[LAYER].shape == tuple(rows[LAYER][int(ids[0])].shape)
    assert len(list((teacher.folder / "cache").iterdir())) == 3


def test_out_of_fold_posteriors_are_each_images_own_fold(
    teacher: TrainedTeacher, data: ObjectsDataset
) -> None:
    accelerator = make_accelerator("fp32")
    kept = open_cache(teacher, data, accelerator, CacheOptions(outputs=BOTH[::2], out_of_fold=True))
    rows = live_rows(teacher, data)
    ids = kept["posterior"].store.ids()
    layer = torch.stack([rows[LAYER][int(one)] for one in kept[LAYER].store.ids()])
    torch.testing.assert_close(kept[LAYER].whole().float(), layer, rtol=1e-3, atol=1e-3)
    by_fold = []
    for model in fold_models(teacher, 22):
        one = TrainedTeacher(teacher.folder, teacher.recipe, model, teacher.task)
        said = live_rows(one, data)["posterior"]
        by_fold.append(torch.stack([said[int(i)] for i in ids]))
    owner = np.repeat(data.train.image_ids, np.diff(data.train.first))
    image = dict(zip(data.train.object_ids.tolist(), owner.tolist(), strict=True))
    folds = fold_of(np.array([image[int(one)] for one in ids]), 2)
    assert set(folds) == {0, 1}
    expected = torch.stack([by_fold[fold][row] for row, fold in enumerate(folds)])
    stored = kept["posterior"].whole().float()
    torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stored, by_fold[0], atol=1e-3)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "MOST_IMAGES", 5)  # 24 images: five shards
    monkeypatch.setattr(teacher_cache, "IMAGES_A_BATCH", 4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Images that teachers were shown, batch by batch."""
    shown: list[int] = []
    call = LiveTeacher.__call__

    def counted(self: LiveTeacher, batch: dict[str, Tensor]) -> Any:
        shown.append(len(batch["images"]))
        return call(self, batch)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    yield shown


def test_an_interrupted_pass_goes_on_where_it_stopped(
    teacher: TrainedTeacher,
    data: ObjectsDataset,
    small_shards: None,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator, options = make_accelerator("fp32"), CacheOptions(outputs=("posterior", LAYER))
    whole = open_cache(teacher, data, accelerator, options)
    expected = {name: kept.whole() for name, kept in whole.items()}
    shutil.rmtree(teacher.folder / "cache")
    with monkeypatch.context() as patch:
        write, done = Store.write_shard, []

        def cut_off(self: Store, number: int, fields: Any) -> None:
            write(self, number, fields)
            done.append(number)
            if len(done) == 5:
                raise KeyboardInterrupt

        patch.setattr(Store, "write_shard", cut_off)
        with pytest.raises(KeyboardInterrupt):
            open_cache(teacher, data, accelerator, options)
    finished = {
        file: file.stat().st_mtime_ns for file in (teacher.folder / "cache").rglob("*.safetensors")
    }
    assert len(finished) == 5
    asked.clear()
    again = open_cache(teacher, data, accelerator, options)
    assert sum(asked) == 24 - 2 * 5  # posteriors of three shards are there, maps of two
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    for name, kept in again.items():
        assert torch.equal(kept.whole(), expected[name])
    asked.clear()
    open_cache(teacher, data, accelerator, options)
    assert asked == []


def test_a_damaged_shard_is_named_and_rebuilt_alone(
    teacher: TrainedTeacher,
    data: ObjectsDataset,
    small_shards: None,
    asked: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator, options = make_accelerator("fp32"), CacheOptions(outputs=(LAYER,))
    before = open_cache(teacher, data, accelerator, options)[LAYER].whole()
    (victim,) = (teacher.folder / "cache").rglob("00003-*")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 255
    victim.write_bytes(content)
    asked.clear()
    after = open_cache(teacher, data, accelerator, options)[LAYER].whole()
    assert asked == [4, 1]
    assert torch.equal(before, after)
    assert f"{victim.name}: corrupt shard, rebuilding" in caplog.text
    assert victim.is_file()  # the same content has the same name


def test_only_the_likeliest_classes_are_kept(teacher: TrainedTeacher, data: ObjectsDataset) -> None:
    accelerator = make_accelerator("fp32")
    exact = open_cache(teacher, data, accelerator, CacheOptions(dtype="float32"))["posterior"]
    kept = open_cache(teacher, data, accelerator, CacheOptions(dtype="float32", top_k=5))[
        "posterior"
    ]
    values, indices = exact.whole().topk(5, dim=1)
    torch.testing.assert_close(kept.whole().gather(1, indices), values)
    assert kept.shape == (22,)
    assert kept.store.bytes < 0.5 * exact.store.bytes
    posteriors = CachedPosteriors.read(kept)
    torch.testing.assert_close(posteriors.log_probs.exp().sum(1), torch.ones(131))


def test_another_teacher_transform_or_dataset_is_refused(
    teacher: TrainedTeacher, data: ObjectsDataset, tmp_path: Path
) -> None:
    accelerator = make_accelerator("fp32")
    options = CacheOptions(location=str(tmp_path / "kept"))
    open_cache(teacher, data, accelerator, options)
    with torch.no_grad():
        next(iter(teacher.model.parameters())).add_(1e-3)
    with pytest.raises(UserError, match=r"kept/scenes-train-posterior: a cache of.*teacher is '"):
        open_cache(teacher, data, accelerator, options)
    teacher = load_teacher(teacher.folder, 22)
    section = teacher.recipe.data.model_copy(update={"size": 48})
    recipe = teacher.recipe.model_copy(update={"data": section})
    other = TrainedTeacher(teacher.folder, recipe, teacher.model, teacher.task)
    with pytest.raises(UserError, match=r"transform is 'size 32, box.*' there, 'size 48, box"):
        open_cache(other, data, accelerator, options)
    half = make_accelerator("bf16")
    with pytest.raises(UserError, match=r"precision is 'fp32' there, 'bf16' here"):
        open_cache(teacher, data, half, options)
    make_accelerator("fp32")
    swapped = ObjectsDataset(data.section, data.val, data.train)
    with pytest.raises(UserError, match=r"data is '.*' there, '.*' here"):
        open_cache(teacher, swapped, accelerator, options)
    open_cache(teacher, data, accelerator, options)


def test_objects_are_hidden_at_the_size_of_the_training(
    teacher: TrainedTeacher, data: ObjectsDataset
) -> None:
    with pytest.raises(
        UserError, match=r"size=64: not available for hidden objects.* leave soft_targ"
    ):
        open_cache(teacher, data, make_accelerator("fp32"), CacheOptions(size=64))


def test_numbers_that_cannot_be_kept_are_named(
    teacher: TrainedTeacher, data: ObjectsDataset
) -> None:
    head = [p for p in teacher.model.parameters() if p.ndim == 1][-1]
    with torch.no_grad():
        head.fill_(1e5)
    with pytest.raises(UserError, match=r"logits of object \d+ is not finite as float16; store it"):
        open_cache(teacher, data, make_accelerator("fp32"), CacheOptions(outputs=("logits",)))


class Mirrorable(nn.Module):
    """A teacher that sees single pixels and means of them: a mirror changes nothing but places."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.AvgPool2d(4))
        self.head = nn.Linear(8, 22)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("augmented", [False, True])
def test_distilling_from_a_cache_gives_the_live_losses(
    teacher: TrainedTeacher, data: ObjectsDataset, augmented: bool
) -> None:
    accelerator = make_accelerator("fp32")
    if augmented:  # by mirroring, which this teacher follows
        mirrored = Mirrorable().eval()
        teacher = TrainedTeacher(teacher.folder, teacher.recipe, mirrored, teacher.task)
    kept = open_cache(teacher, data, accelerator, CacheOptions(outputs=("posterior", LAYER)))
    off = dict.fromkeys(("flip", "shift", "rotate", "rgb_shift", "shuffle", "grey", "blur",
                         "jitter"), 0.0)  # fmt: skip
    moves = {**off, "flip": 0.5} if augmented else off
    section = data.section.model_copy(update={"augment": moves})
    dataset = ObjectsDataset(section, data.train, data.val).samples(
        "train", train=True, cached=[kept[LAYER]]
    )
    loader = make_loader(dataset, accelerator, batch_size=8, workers=0, train=True)
    curves = []
    sources = (
        LiveTeacher(teacher.model, teacher.task, [LAYER]),
        CachedTeacher(CachedPosteriors.read(kept["posterior"]), [LAYER]),
    )
    for source in sources:
        curves.append(curve(data, source, loader))
    assert len(curves[0]) == 3
    for live, stored in zip(*curves, strict=True):
        assert stored == pytest.approx(live, rel=2e-3)


def curve(data: ObjectsDataset, source: Any, loader: Any) -> list[float]:
    """The total loss of each step of an epoch."""
    torch.manual_seed(0)
    student = build_student("shufflenet_v2_x0_5", num_classes=22, stride=16)
    terms = [
        build_term(one)
        for one in [
            TermSection(name="context_logits", weight=1.0),
            TermSection(name="context_features", weight=0.1, student=SEEN, teacher=LAYER),
            TermSection(name="pair_wise", weight=0.5, student=SEEN, teacher=LAYER),
        ]
    ]
    task = Classification(num_classes=22)
    loader.set_epoch(0)
    first = next(iter(loader))
    adapters = {SEEN: Adapter(kind="resize", to=LAYER)}
    model, terms = adapt_student(student, terms, adapters, source, task, first)
    assert isinstance(model, AdaptedStudent)
    train = Train(precision="fp32", channels_last=False)
    training = start_training(make_accelerator("fp32"), model, train, 3)
    objective = Objective(task, {"cross_entropy": 1.0}, terms, source)
    training.model.train()
    loader.set_epoch(0)
    losses = []
    for batch in loader:
        moved = to_device(batch, torch.device("cpu"), channels_last=False)
        sums, _ = train_step(training, [moved], objective, objective.weights_at(0.0))
        losses.append(float(sums["total"]))
    return losses


def test_other_images_under_the_same_names_are_refused(
    teacher: TrainedTeacher, data: ObjectsDataset, tmp_path: Path
) -> None:
    accelerator, options = make_accelerator("fp32"), CacheOptions(location=str(tmp_path / "kept"))
    open_cache(teacher, data, accelerator, options)
    moved = shutil.copytree(data.train.image_folder, tmp_path / "pictures")
    index = dataclasses.replace(data.train, image_folder=moved)
    open_cache(teacher, ObjectsDataset(data.section, index, data.val), accelerator, options)
    picture = min(moved.iterdir())
    with Image.open(picture) as image:
        Image.eval(image, lambda value: value // 3).save(picture)
    with pytest.raises(UserError, match="images is '"):
        open_cache(teacher, ObjectsDataset(data.section, index, data.val), accelerator, options)


def test_posteriors_in_int8_come_near_and_are_kept_apart(
    teacher: TrainedTeacher, data: ObjectsDataset, tmp_path: Path
) -> None:
    accelerator = make_accelerator("fp32")
    places = {int8: str(tmp_path / str(int8)) for int8 in (False, True)}
    exact, rough = (
        open_cache(
            teacher, data, accelerator, CacheOptions(int8=int8, dtype="float32", location=place)
        )["posterior"].whole()
        for int8, place in places.items()
    )
    divergence = (exact.exp() * (exact - rough)).sum(dim=1)
    assert not torch.equal(exact, rough) and divergence.mean().abs() < 0.05
    with pytest.raises(UserError, match=r"precision is 'fp32' there, 'int8' here"):
        open_cache(teacher, data, accelerator, CacheOptions(int8=True, dtype="float32",
                                                      location=places[False]))  # fmt: skip
    with pytest.raises(UserError, match="int8: posteriors only"):
        open_cache(teacher, data, accelerator, CacheOptions(outputs=BOTH, int8=True))
