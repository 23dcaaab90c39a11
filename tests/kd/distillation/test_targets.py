"""Targets from a live teacher and from stored posteriors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd.distillation.targets import (
    CachedPosteriors,
    CachedTeacher,
    LiveTeacher,
    Teachers,
    known_counts,
)
from kd.errors import UserError
from kd.nn.weights import weights_hash
from kd.problems.base import Batch, Rows
from kd.problems.objects.task import Context
from kd.storage.fields import CachedField
from kd.storage.store import Store
from teachers import TEACHERS

CLASSES = 5


def batch_of(*object_ids: int) -> Rows:
    """Rows of hidden objects of these ids."""
    ids = torch.tensor(object_ids, dtype=torch.int64)
    return Rows("hidden", torch.zeros_like(ids), ids=ids, hidden=True)


def stored(count: int = 6) -> CachedPosteriors:
    logits = torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(10, 10 + count).flip(0) ** 2  # neither sorted nor dense
    return CachedPosteriors(ids, logits.log_softmax(1))


def scene(size: int = 32) -> dict[str, Tensor]:
    """Two images, three objects, all hidden one by one."""
    return {
        "images": torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8),
        "sizes": torch.tensor([[size, size]] * 2),
        "boxes": torch.tensor([[2.0, 2, 12, 12], [4, 4, 20, 16], [8, 8, 30, 30]]),
        "labels": torch.tensor([0, 1, 2]),
        "image_of": torch.tensor([0, 0, 1]),
        "object_ids": torch.tensor([1, 2, 3]),
        "hidden": torch.tensor([0, 1, 2]),
        "hide_fraction": torch.ones(3),
    }


def test_each_hidden_object_gets_its_own_posterior() -> None:
    logits = torch.eye(3).log_softmax(1)
    source = CachedPosteriors(torch.tensor([30, 10, 20]), logits)
    rows = source({}, batch_of(20, 30, 20, 10))["posterior"]
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, logits[[2, 0, 2, 1]], atol=1e-3)


def test_a_batch_without_hidden_objects_gets_none() -> None:
    assert stored()({}, batch_of())["posterior"].shape == (0, CLASSES)


@pytest.mark.parametrize("stranger", [0, 101, 10_000])
def test_an_unknown_object_is_named(stranger: int) -> None:
    source = stored()
    message = rf"posteriors: 1 objects have no posterior, such as annotation {stranger};"
    with pytest.raises(UserError, match=message):
        source({}, batch_of(100, stranger))
    with pytest.raises(UserError, match=message):
        source.check_covers(torch.tensor([100, stranger]))
    source.check_covers(torch.tensor([121, 100]))


def test_no_posteriors_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="no posterior is cached"):
        CachedPosteriors(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))


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


def test_posteriors_come_back_from_a_cache(tmp_path: Path) -> None:
    source, store = stored(), Store(tmp_path)
    store.create({}, 2)
    for number, rows in enumerate((slice(0, 2), slice(2, None))):
        part = {"ids": source.object_ids[rows], "values": source.log_probs[rows]}
        store.write_shard(number, {name: tensor.numpy() for name, tensor in part.items()})
    again = CachedPosteriors.read(CachedField(store, "posterior"))
    assert torch.equal(again.object_ids, source.object_ids)
    assert torch.equal(again.log_probs, source.log_probs)
    assert again.source == str(tmp_path)


def test_a_teacher_that_was_asked_before_brings_the_batchs_maps() -> None:
    teacher = CachedTeacher(stored(), ["neck"], prefix="stored.big.")
    maps = torch.rand(2, 3, 4, 4).half()
    known = teacher({"stored.big.neck": maps}, batch_of(100, 121))
    assert torch.equal(known["neck"], maps.float())
    assert known["posterior"].shape == (2, CLASSES)


class Says:
    """A teacher of fixed answers."""

    def __init__(self, **answers: Tensor) -> None:
        self.answers = answers

    def __call__(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        return self.answers


def test_several_teachers_are_told_apart_and_averaged_in_logits() -> None:
    logits = torch.randn(2, 4, 3)
    teachers = Teachers(
        Says(posterior=logits[0].log_softmax(1), neck=torch.ones(4)),
        {"big": Says(posterior=logits[1].log_softmax(1), neck=torch.zeros(4))},
        [1.0, 3.0],
    )
    known = teachers({}, Rows())
    assert set(known) == {"posterior", "neck", "big.posterior", "big.neck", "mean.posterior"}
    assert torch.equal(known["big.neck"], torch.zeros(4))
    expected = (0.25 * logits[0] + 0.75 * logits[1]).log_softmax(1)
    torch.testing.assert_close(known["mean.posterior"], expected)


def test_logits_are_averaged_only_where_all_give_them_in_one_shape() -> None:
    one, two = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 4, 4)
    same = Teachers(Says(logits=one), {"big": Says(logits=3 * one)}, [1.0, 1.0])({}, Rows())
    torch.testing.assert_close(same["mean.logits"], 2 * one)
    assert "mean.logits" not in Teachers(Says(logits=one), {"b": Says(logits=two)}, [1.0, 1.0])(
        {}, Rows()
    )
    with pytest.raises(UserError, match="got 1 weights for 2 teachers"):
        Teachers(Says(), {"b": Says()}, [1.0])


def test_a_live_teacher_gives_what_its_task_reads_from_it() -> None:
    model = TEACHERS["cnn"].load()(num_classes=CLASSES, width=4)
    task = Context(num_classes=CLASSES)
    layer = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    teacher = LiveTeacher(model.train(), task, [layer])
    batch = scene()
    known = teacher(batch)
    assert set(known) == {"posterior", "logits", layer}
    assert known["posterior"].shape == (3, CLASSES)
    assert torch.allclose(known["posterior"].exp().sum(1), torch.ones(3))
    assert known[layer].shape[0] == 3
    assert torch.equal(
        known["posterior"], task.decode({"logits": model(*task.inputs(batch))}, batch)
    )


def test_a_live_teacher_is_frozen_and_does_not_learn_statistics() -> None:
    model = TEACHERS["cnn"].load()(num_classes=CLASSES, width=4).train()
    teacher = LiveTeacher(model, Context(num_classes=CLASSES))
    before = weights_hash(model)
    known = teacher(scene())
    assert not known["posterior"].requires_grad
    assert not any(part.training for part in model.modules())
    assert weights_hash(model) == before


def test_a_live_teacher_answers_in_float32_from_bfloat16() -> None:
    model = TEACHERS["cnn"].load()(num_classes=CLASSES, width=4)
    task, batch = Context(num_classes=CLASSES), scene()
    exact = LiveTeacher(model, task)(batch)["posterior"]
    rough = LiveTeacher(model, task, autocast=True)(batch)["posterior"]
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.1)


def boxes_of(*object_ids: int) -> Rows:
    """Rows of a detector's boxes, none of which is hidden."""
    return batch_of(*object_ids)._replace(unit="boxes", hidden=False)


def test_boxes_that_nobody_asked_about_have_no_posterior_and_are_not_counted() -> None:
    source = stored()  # of 10**2 to 15**2
    rows = source({}, boxes_of(121, 7, 100, 10_000))["posterior"]
    assert rows[[1, 3]].isnan().all()
    assert torch.equal(rows[[0, 2]], source({}, batch_of(121, 100))["posterior"])
    teacher = CachedTeacher(source)
    assert known_counts(teacher, boxes_of(121, 7, 100)) == {"known": 2.0}
    assert known_counts(teacher, boxes_of()) == {"known": 0.0}
    assert known_counts(teacher, batch_of(121)) == {}  # who is asked about hidden ones is complete
    assert known_counts(CachedTeacher(None), boxes_of(1)) == known_counts(Says(), boxes_of(1)) == {}
    source.check_knows(torch.tensor([5, 225]))
    with pytest.raises(
        UserError, match="no object has a posterior; the cache is of another dataset"
    ):
        source.check_knows(torch.tensor([5, 6]))


def test_each_stored_teacher_knows_its_own_boxes_and_their_mean_those_of_all() -> None:
    one, two = stored(), CachedPosteriors(torch.tensor([100, 7]), torch.randn(2, CLASSES))
    both = Teachers(CachedTeacher(one), {"more": CachedTeacher(two)}, [1.0, 1.0])
    batch = boxes_of(100, 121, 7)
    assert known_counts(both, batch) == {"known": 2.0, "more.known": 2.0, "mean.known": 1.0}
    mean = both({}, batch)["mean.posterior"]
    assert mean.isnan().any(dim=1).tolist() == [False, True, True]
    # Beside a teacher that runs in each step, there is no mean to count.
    mixed = Teachers(Says(neck=torch.ones(1)), {"more": CachedTeacher(two)}, [1.0, 1.0])
    assert known_counts(mixed, batch) == {"more.known": 2.0}


def test_without_the_first_teacher_the_others_keep_their_names() -> None:
    alone = Teachers(None, {"more": Says(neck=torch.ones(1))}, [2.0])
    assert set(alone({}, Rows())) == {"more.neck"}
    with pytest.raises(UserError, match="got 2 weights for 1 teachers"):
        Teachers(None, {"more": Says()}, [1.0, 1.0])
