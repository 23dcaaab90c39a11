"""The rows that saliency maps are held against, in records and in tables."""

from __future__ import annotations

import numpy as np
import pytest

from kd.metrics.records import Array
from kd.metrics.saliency import METRICS
from kd.problems.saliency.baselines import CENTRE, NAMES, OBSERVERS, notes, references
from kd.problems.saliency.evaluation import SaliencyResults
from kd.report.tables import distill_table, runs_table

SALIENCY = SaliencyResults()


@pytest.fixture
def records() -> dict[str, Array]:
    """A run on four images; other observers are known of two of them."""
    random = np.random.default_rng(0)
    found: dict[str, Array] = {"image_ids": np.arange(4)}
    found |= {name: random.random(4) for name in METRICS}
    found |= {name: np.full(4, 9) for name in ("fixation_counts", "other_counts")}
    found |= {name: np.ones(4) for name in ("truth_entropy", "prior_bits")}
    found[CENTRE] = np.tile(np.arange(len(METRICS), dtype=np.float64), (4, 1))
    found[OBSERVERS] = np.full((4, len(METRICS)), np.nan)
    found[OBSERVERS][1], found[OBSERVERS][3] = 2.0, 4.0
    return found


def test_references_are_records_of_the_same_images(records: dict[str, Array]) -> None:
    found = references(records)
    assert list(found) == list(NAMES.values())
    for place, name in enumerate(METRICS):
        assert SALIENCY.value(found["centre prior"], name) == place
        assert SALIENCY.value(found["other observers"], name) == 3
    lines = notes(records)
    assert "whatever the image" in lines[0] and "images)" not in lines[0]
    assert lines[1].endswith("(on 2 of 4 images)")


def test_references_that_are_not_there_are_left_out(records: dict[str, Array]) -> None:
    records[OBSERVERS] = np.full_like(records[OBSERVERS], np.nan)
    assert list(references(records)) == ["centre prior"] and len(notes(records)) == 1
    del records[CENTRE], records[OBSERVERS]
    assert references(records) == {} and notes(records) == []


def test_every_table_has_them(records: dict[str, Array]) -> None:
    better = {**records, "KLD": records["KLD"] - 0.1}
    table = distill_table(
        SALIENCY, {"plain": [records] * 2, "distilled": [better] * 2}, [0, 1], title="gaze"
    )
    assert table.header[-2:] == ("centre prior", "other observers")
    rows = {row[0]: row for group in table.groups for row in group}
    assert rows["NSS"][-2:] == ("3.000", "3.000") == rows["NSS, seed 1"][-2:]
    assert rows["KLD (nats)"][3].startswith("-0.100")
    assert any(note.startswith("centre prior: ") for note in table.notes)
    side = runs_table(SALIENCY, {"a": records, "b": better}, title="gaze")
    assert side.header == ("metric", "a", "b", "b - a", "centre prior", "other observers")
    assert all(len(row) == 6 for row in side.groups[0])
    assert "Runs" not in side.to_text()
