"""The transfer's table by hand."""

from __future__ import annotations

import pytest

from kd.report.tables import transfer_table


def numbers(*values: float) -> list[dict[str, float]]:
    return [{"mAP": v, "micro_AP": v / 2, "chance_mAP": 0.1, "steps": 3} for v in values]


def test_starts_are_compared_with_the_first_of_their_mode() -> None:
    table = transfer_table(
        {
            ("probe", "random"): numbers(0.2, 0.3),
            ("probe", "context"): numbers(0.5, 0.62),
            ("finetune", "random"): numbers(0.4, 0.4),
            ("finetune", "context"): numbers(0.3, 0.5),
        },
        (0, 1),
        title="labels",
    )
    assert table.header == ("mode: start", "mAP (%)", "- random", "micro_AP (%)", "- random")
    assert [[row[0] for row in group] for group in table.groups] == [
        ["probe: random", "probe: context"], ["finetune: random", "finetune: context"],
    ]  # fmt: skip
    assert table.groups[0][0][1:3] == ("25.0", "")
    # Differences 30 and 32: mean 31, t(1) = 12.706 times 1.
    assert table.groups[0][1][1:3] == ("56.0", "+31.0 [+18.3, +43.7]*")
    assert table.groups[1][1][2].startswith("+0.0 [") and table.groups[1][1][2].endswith("] ")
    assert table.notes[-1] == "one prediction for all, the class fractions: mAP (%) 10.0"
    assert "means over 2 seeds, t interval" in table.to_markdown()
    found = next(
        c for c in table.comparisons if c.variant == "probe: context" and c.metric.name == "mAP"
    )
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.31)


def test_one_seed_has_no_interval() -> None:
    table = transfer_table(
        {("probe", "random"): numbers(0.2), ("probe", "context"): numbers(0.5)}, (0,)
    )
    assert table.groups[0][1][2] == "+30.0 "
    assert table.notes[0] == "one seed only"
