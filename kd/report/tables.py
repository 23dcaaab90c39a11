"""Tables of metrics: variants over seeds, runs side by side, one run, and transfer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, paired_interval
from kd.metrics.records import Records
from kd.metrics.registry import METRICS, Metric, direction_note
from kd.utils.io import write_text

CLEAR = "*: the 95 % interval does not touch zero"
RESAMPLED = "95 % interval: images resampled"
OVER_IMAGES = f"[low, high]: {RESAMPLED}"

_TRANSFER_ROWS = ("mAP", "micro_AP", "top1", "mean_class_top1", "nll")

Row = tuple[str, ...]


class Scorer(Protocol):
    """Computes metrics of one kind of prediction records."""

    @property
    def things(self) -> str:
        """Plural noun for the predicted items in messages: `objects`."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the metrics that a table shows by default."""

    def metric(self, name: str) -> Metric:
        """The definition of a metric, by name."""

    def value(self, records: Records, name: str) -> float | None:
        """Value of a metric, None if it is not defined on these records; raise if it is unknown."""

    def interval(self, records: Records, name: str) -> Interval | None:
        """A metric with its 95 % interval over images, or None."""

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Difference of a metric from a paired run on the same images; unknown bounds are NaN."""

    def references(self, records: Records) -> Mapping[str, Records]:
        """Reference predictions for the same rows, by name."""

    def notes(self, records: Records) -> Sequence[str]:
        """Notes about the references, printed below a table."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one variant, and its difference from the baseline."""

    metric: Metric
    variant: str
    values: tuple[float, ...]  # one per seed
    difference: Interval | None = None  # None for the baseline
    by_seed: tuple[Interval, ...] = ()  # difference of each seed, over images

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values) / len(self.values)


def _compare(
    scorer: Scorer,
    name: str,
    variant: str,
    runs: Sequence[Records],
    twins: Sequence[Records] | None,
) -> Comparison:
    """Compare a variant with the baseline's `twins`: over seeds, or over images for one seed."""
    metric = scorer.metric(name)
    values = tuple(value_of(scorer, name, run) for run in runs)
    if twins is None:
        return Comparison(metric, variant, values)
    by_seed = tuple(
        scorer.difference(run, twin, name) for twin, run in zip(twins, runs, strict=True)
    )
    overall = by_seed[0] if len(by_seed) == 1 else paired_interval([one.mean for one in by_seed])
    return Comparison(metric, variant, values, overall, by_seed)


def value_of(scorer: Scorer, name: str, records: Records) -> float:
    """Compute a metric; raise a `UserError` if it is unknown or not defined on the records."""
    number = scorer.value(records, name)
    if number is None:
        raise UserError(f"metric {name!r}: none of these {scorer.things} counts for it")
    return number


@dataclass(frozen=True)
class Table:
    """Cells of a table as text, and the comparisons that they show."""

    title: str
    header: Row
    groups: tuple[tuple[Row, ...], ...]  # of rows, separated by lines
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_text(self) -> str:
        """Format the table as aligned lines without colours."""
        rows = [self.header, *(row for group in self.groups for row in group)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(self.header))]

        def line(row: Row) -> str:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return "  ".join(cells).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [self.title, line(self.header)]
        for group in self.groups:
            lines += [rule, *map(line, group)]
        return "\n".join([*lines, *self.notes]) + "\n"

    def to_markdown(self) -> str:
        """Format the table as Markdown: a heading, a table and a list of notes."""
        dashes = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [self.header, tuple(dashes), *(row for group in self.groups for row in group)]
        cells = [
            "| " + " | ".join(cell.strip().replace("|", r"\|") for cell in row) + " |"
            for row in rows
        ]
        notes = [f"- {note.replace('*', chr(92) + '*')}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *cells, "", *notes]).rstrip() + "\n"


def print_table(table: Table, stream: TextIO | None = None) -> None:
    """Print a table, formatted on a wide enough terminal and otherwise as plain text."""
    stream = stream or sys.stdout
    text = table.to_text()
    width = max(map(len, text.splitlines()))
    if not stream.isatty() or width + 8 > shutil.get_terminal_size().columns:
        stream.write(text)
        return
    drawn = rich.table.Table(
        title=table.title, box=rich.box.SIMPLE_HEAD, caption="\n".join(table.notes)
    )
    drawn.title_justify = drawn.caption_justify = "left"
    for place, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if place else "left", no_wrap=True)
    for group in table.groups:
        for row in group:
            drawn.add_row(*(Text(c, style="bold" if c.endswith("*") else "") for c in row))
        drawn.add_section()
    Console(file=stream).print(drawn)


def write_markdown(tables: Sequence[Table], path: Path) -> None:
    """Write tables to one Markdown file."""
    write_text(path, "\n".join(table.to_markdown() for table in tables))


def distill_table(
    scorer: Scorer,
    variants: Mapping[str, Sequence[Records]],
    seeds: Sequence[int],
    *,
    metrics: Sequence[str] | None = None,
    title: str = "Plain and distilled",
    baseline: str = "plain",
) -> Table:
    """Compare variants with the baseline: means over seeds with a t interval, then each seed.

    Args:
        scorer: Computes the metrics.
        variants: Variant -> predictions for the same rows, one per seed; gives the column order.
        seeds: The seeds.
        metrics: Rows; by default those of `scorer.rows` that the records allow.
        title: Title of the table.
        baseline: The variant that others are compared with.
    """
    if baseline not in variants or not seeds:
        raise UserError(
            f"no run {baseline!r} to compare with; there are {', '.join(variants) or 'none'}"
        )
    for variant, runs in variants.items():
        if len(runs) != len(seeds):
            raise UserError(f"variant {variant!r} has {len(runs)} runs for {len(seeds)} seeds")
    note = f"means over {len(seeds)} seeds, t interval; each seed: {RESAMPLED}"
    if len(seeds) == 1:
        note = f"one seed only: {RESAMPLED}; other seeds may differ"
    return _compared(scorer, variants, seeds, baseline, metrics, title, (CLEAR, note))


def runs_table(
    scorer: Scorer,
    runs: Mapping[str, Records],
    *,
    ceilings: Mapping[str, float] | None = None,
    metrics: Sequence[str] | None = None,
    title: str = "Runs",
) -> Table:
    """Compare single runs with the first run, on the same images.

    `runs` maps a name to predictions for the same rows. `ceilings` maps a metric to its value for
    the exact posterior. By default, the rows are the `scorer.rows` that the records allow.
    """
    if not runs:
        raise UserError("no run to show")
    first = next(iter(runs))
    notes = (CLEAR, f"differences: {RESAMPLED}") if len(runs) > 1 else ()
    variants = {name: [records] for name, records in runs.items()}
    return _compared(scorer, variants, [0], first, metrics, title, notes, ceilings)


def _compared(
    scorer: Scorer,
    variants: Mapping[str, Sequence[Records]],
    seeds: Sequence[int],
    baseline: str,
    metrics: Sequence[str] | None,
    title: str,
    notes: Sequence[str],
    ceilings: Mapping[str, float] | None = None,
) -> Table:
    """Build a row for each metric: the baseline, then each variant and its difference from it."""
    first, others = variants[baseline][0], [name for name in variants if name != baseline]
    names, references = list(dict.fromkeys(metrics or ())), scorer.references(first)
    if metrics is None:
        names = [name for name in scorer.rows if scorer.value(first, name) is not None]
    found, means, by_seed = [], [], []
    for name in names:
        metric = scorer.metric(name)
        twins = variants[baseline]
        line = [
            _compare(scorer, name, one, variants[one], None if one == baseline else twins)
            for one in (baseline, *others)
        ]
        found += line
        beside = [metric.text(scorer.value(one, name)) for one in references.values()]
        if ceilings:
            beside.append(metric.text(ceilings.get(name)))
        means.append((*_row(metric.label, line, None), *beside))
        by_seed += [
            (*_row(f"{metric.label}, seed {seed}", line, place), *beside)
            for place, seed in enumerate(seeds)
        ]
    header = ["metric", baseline]
    header += [cell for one in others for cell in (one, f"{one} - {baseline}")]
    header += [*references, *["ceiling"] * bool(ceilings)]
    notes = [*notes, *direction_note(map(scorer.metric, names))]
    if ceilings:
        notes.append("ceiling: the exact posterior of the scenes' own generative model")
    return Table(
        title=title,
        header=tuple(header),
        groups=(tuple(means), tuple(by_seed)) if len(seeds) > 1 else (tuple(means),),
        notes=(*notes, *scorer.notes(first)),
        comparisons=tuple(found),
    )


def _row(label: str, line: Sequence[Comparison], seed: int | None) -> Row:
    """Cells of a metric: the mean over seeds, or the value of one seed."""
    cells = [label]
    for entry in line:
        cells.append(entry.metric.text(entry.mean if seed is None else entry.values[seed]))
        if entry.difference is not None:
            cells.append(
                entry.metric.change(entry.difference if seed is None else entry.by_seed[seed])
            )
    return tuple(cells)


@dataclass(frozen=True)
class Scored:
    """Computed metrics of one run or reference."""

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """Values for `metrics.json`."""
        return {
            **self.values,
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
        }


def score(
    scorer: Scorer, name: str, records: Records, metrics: Sequence[str], *, intervals: bool = True
) -> Scored:
    """Compute the metrics that these records allow."""
    found = {metric: scorer.value(records, metric) for metric in metrics}
    values = {metric: number for metric, number in found.items() if number is not None}
    bounds = {m: scorer.interval(records, m) for m in values} if intervals else {}
    return Scored(name, values, {m: one for m, one in bounds.items() if one is not None})


def run_table(
    scorer: Scorer, rows: Sequence[Scored], title: str, notes: Sequence[str] = ()
) -> Table:
    """Tabulate one run: a row for each metric and its interval, a column for each reference."""
    run, *references = rows
    metrics = {name: scorer.metric(name) for name in run.values}
    lines = [
        (
            metric.label,
            metric.text(run.values[name]),
            metric.bounds(run.intervals.get(name)),
            *(metric.text(one.values.get(name)) for one in references),
        )
        for name, metric in metrics.items()
    ]
    header = ("metric", run.name, "95 % interval", *(one.name for one in references))
    below = (RESAMPLED, *direction_note(metrics.values()), *notes)
    return Table(title, header, (tuple(lines),), below)


def side_by_side_table(
    scorer: Scorer,
    rows: Sequence[Scored],
    title: str,
    notes: Sequence[str] = (),
    *,
    bounded: Sequence[str] = (),
) -> Table:
    """Tabulate several runs (`rows`), one per row, and below them the references.

    Runs have intervals, references have none. `bounded` names the metrics whose intervals are
    shown.
    """
    metrics = [scorer.metric(name) for name in rows[0].values]
    lines = []
    for one in rows:
        cells = [one.name]
        for metric in metrics:
            bounds = metric.bounds(one.intervals.get(metric.name)) if metric.name in bounded else ""
            cells.append(f"{metric.text(one.values.get(metric.name))} {bounds}".strip())
        lines.append(tuple(cells))
    runs = sum(bool(one.intervals) for one in rows)
    groups = tuple(group for group in (tuple(lines[:runs]), tuple(lines[runs:])) if group)
    header = ("run", *(metric.label for metric in metrics))
    return Table(title, header, groups, (OVER_IMAGES, *direction_note(metrics), *notes))


def difference_notes(
    scorer: Scorer, records: Records, references: Mapping[str, Records], metrics: Sequence[str]
) -> list[str]:
    """Describe a run's difference from each reference on the same images, with 95 % intervals."""
    notes = []
    for name, reference in references.items():
        parts = [
            f"{scorer.metric(metric).label} "
            f"{scorer.metric(metric).change(scorer.difference(records, reference, metric)).strip()}"
            for metric in metrics
        ]
        notes.append(f"difference from the {name}: {', '.join(parts)}")
    return [*notes, CLEAR] if notes else []


def transfer_table(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
    seeds: Sequence[int],
    *,
    title: str = "Transfer",
) -> Table:
    """Tabulate means over seeds, and differences from the first row with t intervals over seeds.

    `numbers` maps (mode, start), such as ("probe", "random"), to metrics for each seed; `start`
    names the initial trunk weights. Entries of one mode must be adjacent.
    """
    first = next(iter(numbers))
    baseline, chance = first[1], numbers[first][0]
    metrics = [METRICS[name] for name in _TRANSFER_ROWS if name in chance]
    groups: dict[str, list[Row]] = {}
    comparisons = []
    for (mode, start), summaries in numbers.items():
        cells = [f"{mode}: {start}"]
        for metric in metrics:
            values = tuple(summary[metric.name] for summary in summaries)
            twins = tuple(summary[metric.name] for summary in numbers[mode, baseline])
            entry = Comparison(metric, cells[0], values)
            if start != baseline:
                gaps = [own - twin for own, twin in zip(values, twins, strict=True)]
                alone = Interval(gaps[0], float("nan"), float("nan"))
                interval = paired_interval(gaps) if len(gaps) > 1 else alone
                entry = replace(entry, difference=interval)
            change = "" if entry.difference is None else metric.change(entry.difference)
            cells += [metric.text(entry.mean), change]
            comparisons.append(entry)
        groups.setdefault(mode, []).append(tuple(cells))
    header = ["mode: start"]
    for metric in metrics:
        header += [metric.label, f"- {baseline}"]
    notes = ["one seed only"]
    if len(seeds) > 1:
        notes = [CLEAR, f"means over {len(seeds)} seeds, t interval"]
    notes += direction_note(metrics)
    constant = [
        f"{metric.label} {metric.text(chance[prefix + metric.name])}"
        for metric in metrics
        for prefix in ("chance_", "prior_")
        if prefix + metric.name in chance
    ]
    if constant:
        notes.append(f"one prediction for all, the class fractions: {', '.join(constant)}")
    rows = tuple(tuple(group) for group in groups.values())
    return Table(title, tuple(header), rows, tuple(notes), tuple(comparisons))
