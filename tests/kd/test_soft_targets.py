"""Targets from a live teacher and from stored posteriors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.weights import weights_hash
from kd.soft_targets import LiveTeacher, StoredPosteriors, from_arrays
from kd.tasks.context import Context
from teachers import TEACHERS

CLASSES = 5


def batch_of(*object_ids: int) -> dict[str, Tensor]:
    """A batch whose hidden objects have these ids; another object lies before each."""
    ids = torch.tensor([value for one in object_ids for value in (-1, one)])
    return {"object_ids": ids, "hidden": torch.arange(1, len(ids), 2)}


def stored(count: int = 6) -> StoredPosteriors:
    logits = torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(10, 10 + count).flip(0) ** 2  # neither sorted nor dense
    return StoredPosteriors(ids, logits.log_softmax(1))


def scene(size: int = 32) -> dict[str, Tensor]:
    """Two pictures, three objects, all hidden one by one."""
    return {
        "images": torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8),
        "sizes": torch.tensor([[size, size]] * 2),
        "boxes": torch.tensor([[2.0, 2, 12, 12], [4, 4, 20, 16], [8, 8, 30, 30]]),
        "labels": torch.tensor([0, 1, 2]),
        "image_of": torch.tensor([0, 0, 1]),
        "object_ids": torch.tensor([1, 2, 3]),
        "hidden": torch.tensor([0, 1, 2]),
        "hide_share": torch.ones(3),
    }


def test_each_hidden_object_gets_its_own_posterior() -> None:
    logits = torch.eye(3).log_softmax(1)
    source = StoredPosteriors(torch.tensor([30, 10, 20]), logits)
    rows = source(batch_of(20, 30, 20, 10))["posterior"]
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, logits[[2, 0, 2, 1]], atol=1e-3)


def test_a_batch_without_hidden_objects_gets_none() -> None:
    batch = {"object_ids": torch.tensor([3]), "hidden": torch.zeros(0, dtype=torch.long)}
    assert stored()(batch)["posterior"].shape == (0, CLASSES)


@pytest.mark.parametrize("stranger", [0, 101, 10_000])
def test_an_unknown_object_is_named(stranger: int) -> None:
    source = stored()
    message = rf"posteriors: no posterior for 1 objects, first annotation {stranger};"
    with pytest.raises(UserError, match=message):
        source(batch_of(100, stranger))
    with pytest.raises(UserError, match=message):
        source.check_covers(torch.tensor([100, stranger]))
    source.check_covers(torch.tensor([121, 100]))


def test_no_posteriors_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="no object has a posterior"):
        from_arrays(np.zeros(0, np.int64), np.zeros((0, 3), np.float32))


def test_shuffling_gives_every_object_anothers_posterior() -> None:
    source = stored(50)
    shuffled = source.shuffled(3)
    assert torch.equal(shuffled.object_ids, source.object_ids)
    same = (shuffled.log_probs == source.log_probs).all(dim=1)
    assert not same.any()
    rows = sorted(map(tuple, source.log_probs.tolist()))
    assert sorted(map(tuple, shuffled.log_probs.tolist())) == rows
    assert torch.equal(shuffled.log_probs, source.shuffled(3).log_probs)
    assert not torch.equal(shuffled.log_probs, source.shuffled(4).log_probs)


def test_posteriors_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "train.safetensors"
    source = stored()
    source.save(path, {"teacher": "abc", "data": "d"})
    again = StoredPosteriors.load(path, {"teacher": "abc"})
    assert torch.equal(again.object_ids, source.object_ids)
    assert torch.equal(again.log_probs, source.log_probs)
    assert again.source == str(path)
    assert [file.name for file in path.parent.iterdir()] == ["train.safetensors"]


def test_posteriors_of_another_teacher_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    stored().save(path, {"teacher": "abc"})
    with pytest.raises(UserError, match=r"teacher is 'abc', this run needs 'xyz'; delete the file"):
        StoredPosteriors.load(path, {"teacher": "xyz"})
    with pytest.raises(UserError, match=r"data is None, this run needs 'd'"):
        StoredPosteriors.load(path, {"data": "d"})


def test_a_file_that_holds_no_posteriors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    with pytest.raises(UserError, match="not a file of posteriors"):
        StoredPosteriors.load(path, {})
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a file of posteriors"):
        StoredPosteriors.load(path, {})
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"not a file of posteriors; make one with python -m kd"):
        StoredPosteriors.load(path, {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.safetensors: cannot be written"):
        stored().save(tmp_path / "file" / "x.safetensors", {})


def test_a_live_teacher_gives_what_its_task_reads_from_it() -> None:
    model = TEACHERS["cnn"](num_classes=CLASSES, width=4)
    task = Context(num_classes=CLASSES)
    layer = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    teacher = LiveTeacher(model.train(), task, [layer])
    batch = scene()
    known = teacher(batch)
    assert set(known) == {"posterior", layer}
    assert known["posterior"].shape == (3, CLASSES)
    assert torch.allclose(known["posterior"].exp().sum(1), torch.ones(3))
    assert known[layer].shape[0] == 3
    assert torch.equal(
        known["posterior"], task.decode({"logits": model(*task.inputs(batch))}, batch)
    )


def test_a_live_teacher_is_frozen_and_does_not_learn_statistics() -> None:
    model = TEACHERS["cnn"](num_classes=CLASSES, width=4).train()
    teacher = LiveTeacher(model, Context(num_classes=CLASSES))
    before = weights_hash(model)
    known = teacher(scene())
    assert not known["posterior"].requires_grad
    assert not any(part.training for part in model.modules())
    assert weights_hash(model) == before


def test_a_live_teacher_answers_in_float32_from_bfloat16() -> None:
    model = TEACHERS["cnn"](num_classes=CLASSES, width=4)
    task, batch = Context(num_classes=CLASSES), scene()
    exact = LiveTeacher(model, task)(batch)["posterior"]
    rough = LiveTeacher(model, task, autocast=True)(batch)["posterior"]
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.1)
