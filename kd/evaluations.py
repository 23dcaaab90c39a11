"""Which evaluation fits what runs answered: about objects, about pixels, or numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd.answers import Answers, data_of, section_of
from kd.box_evaluation import BoxEvaluation, about_boxes
from kd.evaluation import Evaluation, Scores, about
from kd.gaze_evaluation import GazeEvaluation
from kd.map_evaluation import MapEvaluation
from kd.metrics.kinds import DETECTIONS, SALIENCY, kind_of
from kd.opened import of_objects
from kd.opened_gaze import OpenGaze
from kd.opened_maps import OpenMaps
from kd.references import on_data, references
from kd.report.runs import Run, check_same_objects, named_runs

AnyEvaluation = Evaluation | MapEvaluation | BoxEvaluation | GazeEvaluation | Scores


def evaluation_of(asked: Answers, run: Path) -> AnyEvaluation:
    """What one run answered.

    Args:
        asked: Its answers.
        run: Its folder, for the title.
    """
    records, data = asked.records, asked.data
    how = f", {asked.how}" if asked.how else ""
    if records is None:
        return Scores(f"{run} on {data.section.name} val{how}", data, asked.metric)
    if kind_of(records) is DETECTIONS:
        title = f"{run} on {about_boxes(f'{data.section.name} val', records)}{how}"
        return BoxEvaluation(title, data.section.model_dump(mode="json"), {asked.name: records})
    if isinstance(data, OpenGaze):
        title = f"{run} on {_about_maps(data, len(records['image_ids']))}{how}"
        return GazeEvaluation(title, data.section.model_dump(mode="json"), {asked.name: records})
    if isinstance(data, OpenMaps):
        title = f"{run} on {_about_maps(data, len(records['image_ids']))}{how}"
        return MapEvaluation(title, data, {asked.name: records})
    objects = of_objects(data)
    title = f"{run} on {about(objects, records)}{how}"
    return Evaluation(title, objects, {asked.name: records}, references(objects, records))


def side_by_side(
    runs: Sequence[Run], data_name: str | None, settings: Sequence[str]
) -> Evaluation | MapEvaluation | BoxEvaluation | GazeEvaluation:
    """What several runs answered about the same objects or pictures.

    Args:
        runs: With their answers about one data set.
        data_name: That data set, None where it is the runs' own.
        settings: `data.a=value`.

    Raises:
        UserError: They were asked about different ones, or these are not those of the data set.
    """
    check_same_objects(runs)
    named, first = named_runs(runs), runs[0].records
    if kind_of(first) is DETECTIONS:  # their records hold the truth
        section = section_of(runs[0], data_name, settings)
        title = about_boxes(f"{section.name} val", first)
        found = {name: run.records for name, run in named.items()}
        return BoxEvaluation(title, section.model_dump(mode="json"), found)
    if kind_of(first) is SALIENCY:
        section = section_of(runs[0], data_name, settings)
        title = f"{section.name} val: {len(first['image_ids'])} pictures"
        found = {name: run.records for name, run in named.items()}
        return GazeEvaluation(title, section.model_dump(mode="json"), found)
    opened = data_of(runs[0], data_name, settings)
    if isinstance(opened, OpenMaps):
        maps = {name: run.records for name, run in named.items()}
        title = _about_maps(opened, len(first["image_ids"]))
        return MapEvaluation(title, opened, maps)
    data = of_objects(opened)
    records = {name: on_data(data, run.records, str(run.folder)) for name, run in named.items()}
    first = next(iter(records.values()))
    return Evaluation(about(data, first), data, records, references(data, first))


def _about_maps(data: OpenMaps | OpenGaze, pictures: int) -> str:
    return f"{data.section.name} val: {pictures} pictures"
