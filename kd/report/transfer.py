"""Table of transfer results: starting points of a student compared with the first, by mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kd.metrics.bootstrap import Interval, paired_interval
from kd.metrics.registry import METRICS, direction_note
from kd.report.tables import CLEAR, Comparison, Table

_ROWS = ("mAP", "micro_AP", "top1", "mean_class_top1", "nll")


def transfer_table(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
    seeds: Sequence[int],
    *,
    title: str = "Transfer",
) -> Table:
    """Tabulate means over seeds, and differences from the first start with t intervals over seeds.

    Args:
        numbers: (mode, start) -> summaries, one per seed; the entries of a mode are adjacent.
        seeds: The seeds.
        title: Above the table.
    """
    first = next(iter(numbers))
    baseline, chance = first[1], numbers[first][0]
    metrics = [name for name in _ROWS if name in chance]
    found = {
        (key, name): _compare(name, key, numbers, baseline) for key in numbers for name in metrics
    }
    modes = list(dict.fromkeys(mode for mode, _ in numbers))
    groups = tuple(
        tuple(
            _row(key, [found[key, name] for name in metrics]) for key in numbers if key[0] == mode
        )
        for mode in modes
    )
    header = ["mode: start"]
    for name in metrics:
        header += [METRICS[name].label, f"- {baseline}"]
    spread = f"means over {len(seeds)} seeds, t interval" if len(seeds) > 1 else "one seed only"
    notes = [CLEAR, spread] if len(seeds) > 1 else [spread]
    known = [(name, prefix + name) for name in metrics for prefix in ("chance_", "prior_")]
    constant = [
        f"{METRICS[name].label} {METRICS[name].text(chance[key])}"
        for name, key in known
        if key in chance
    ]
    notes += direction_note(METRICS[name] for name in metrics)
    if constant:
        notes.append(f"one prediction for all, the class fractions: {', '.join(constant)}")
    return Table(title, tuple(header), groups, tuple(notes), tuple(found.values()))


def _compare(
    metric: str,
    key: tuple[str, str],
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
    baseline: str,
) -> Comparison:
    mode, start = key
    values = tuple(summary[metric] for summary in numbers[key])
    if start == baseline:
        return Comparison(METRICS[metric], f"{mode}: {start}", values)
    twins = [summary[metric] for summary in numbers[mode, baseline]]
    gaps = [own - twin for own, twin in zip(values, twins, strict=True)]
    unknown = float("nan")
    interval = paired_interval(gaps) if len(gaps) > 1 else Interval(gaps[0], unknown, unknown)
    return Comparison(METRICS[metric], f"{mode}: {start}", values, interval)


def _row(key: tuple[str, str], line: Sequence[Comparison]) -> tuple[str, ...]:
    cells = [f"{key[0]}: {key[1]}"]
    for entry in line:
        cells.append(entry.metric.text(entry.mean))
        interval = entry.difference
        cells.append("" if interval is None else entry.metric.change(interval))
    return tuple(cells)
