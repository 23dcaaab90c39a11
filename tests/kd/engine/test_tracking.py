"""Curves: the same tags everywhere, nothing lost by a kill, nothing told twice."""

from __future__ import annotations

import gc
import json
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from kd.engine.tracking import Tracker, flatten
from kd.errors import UserError


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_are_in_both_files(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars({"loss/total": 2.0, "train/lr": 0.5}, 1)
    tracker.scalars({"loss/total": 1.0}, 2)
    tracker.close()
    assert lines_of(tmp_path) == [
        {"step": 1, "tag": "loss/total", "value": 2.0},
        {"step": 1, "tag": "train/lr", "value": 0.5},
        {"step": 2, "tag": "loss/total", "value": 1.0},
    ]
    events = events_of(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["loss/total", "train/lr"]
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 2.0), (2, 1.0)]


def test_scalars_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars({"loss/total": 2.0}, 1)
    assert len(lines_of(tmp_path)) == 1
    tracker.close()


def test_a_tracker_of_another_rank_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", enabled=False)
    tracker.scalars({"a": 1.0}, 1)
    tracker.figure("a", None, 1)
    tracker.image("a", torch.zeros(3, 2, 2), 1)
    tracker.text("a", "b")
    tracker.hparams({"a": 1}, {"b": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_resuming_drops_what_will_be_told_again(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    for step in (1, 2, 3):
        first.scalars({"loss/total": float(step)}, step)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tag": "loss/to')  # cut off by a kill
    second = Tracker(tmp_path, resume_step=2)
    second.scalars({"loss/total": 30.0}, 3)
    second.close()
    assert [(line["step"], line["value"]) for line in lines_of(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    seen = [(event.step, event.value) for event in events_of(tmp_path).Scalars("loss/total")]
    assert seen == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_start_from_nothing_drops_all(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    first.scalars({"a": 1.0}, 1)
    first.close()
    Tracker(tmp_path).close()
    assert lines_of(tmp_path) == []


def test_images_figures_text_and_settings_arrive(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.image("pictures/0", torch.full((3, 4, 5), 7.0), 1)
    tracker.figure("eval/top_n", plt.figure(), 1)
    tracker.text("note", "**here**")
    tracker.scalars({"eval/top1": 0.25}, 1)
    settings = {"train.epochs": 2, "seeds": [1, 2], "data.root": None, "compile": False}
    tracker.hparams(settings, {"eval/top1": 0.25})
    tracker.close()
    events = events_of(tmp_path)
    assert sorted(events.Tags()["images"]) == ["eval/top_n", "pictures/0"]
    assert (events.Images("pictures/0")[0].height, events.Images("pictures/0")[0].width) == (4, 5)
    assert "note/text_summary" in events.Tags()["tensors"]
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert data.plugin_name == "hparams"
    assert not plt.get_fignums()


def test_a_run_that_ends_in_an_error_leaves_its_curves(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars({"loss/total": 2.0}, 1)
    del tracker
    gc.collect()
    assert events_of(tmp_path).Tags()["scalars"] == ["loss/total"]


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.close()
    assert lines_of(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        Tracker(tmp_path / "file" / "run")


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """A function that sets the largest size of a file: writing more fails as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


# TensorBoard's thread meets the limit as well. Its end is waited for, so that its exception falls
# into this test, where it is expected, and not into the next one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_named_and_what_was_written_stays(
    tmp_path: Path, limit: Callable[[int], None]
) -> None:
    others = set(threading.enumerate())
    tracker = Tracker(tmp_path)
    tracker.scalars({"loss/total": 2.0}, 1)
    written = (tmp_path / "metrics.jsonl").read_text()
    limit(len(written))
    message = r"curves cannot be written: .*File too large.*--resume"
    with pytest.raises(UserError, match=message):
        tracker.scalars({"loss/total": 2.0}, 2)
    with pytest.raises(UserError, match=message):
        tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == written
    del tracker
    gc.collect()
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=60.0)
        assert not thread.is_alive()


def test_nested_settings_become_dotted() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": [1],
        "e": None,
    }
