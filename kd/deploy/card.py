"""Model cards: the README.md of a distillation, with the metadata of Hugging Face's hub.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from kd.errors import UserError
from kd.problems import problem_of_task
from kd.problems.recipes import section_from
from kd.report.tables import Table
from kd.runs.folder import class_names
from kd.runs.read import Run
from kd.utils.io import write_text
from kd.version import __version__

_SHOWN_CLASSES = 30


def model_card(run: Run, table: Table, command: str) -> str:
    """Describe a distillation's model: data, teacher, results, cost, licence, use.

    Args:
        run: The run of the model to ship, a variant and seed.
        table: Table that compares the variants.
        command: The command that trained them.
    """
    config, student = run.config, run.config["student"]
    problem = problem_of_task(config["task"]["name"])
    names = class_names(run.folder) or ()
    shown = ", ".join(names[:_SHOWN_CLASSES])
    if len(names) > _SHOWN_CLASSES:
        shown += f" and {len(names) - _SHOWN_CLASSES} more"
    folder = run.folder.parent.parent
    return "\n".join([
        "---",
        yaml.safe_dump(_metadata(run, problem.spec.pipeline), sort_keys=False).strip(),
        "---",
        "",
        f"# {student['name']} on {config['data']['name']}",
        "",
        f"A student for {config['task']['name']}, trained by knowledge distillation with kd "
        f"{__version__}. The model to use is `{run.folder.relative_to(folder)}`: variant "
        f"{run.config['variant']}, seed {run.config['seed']}, the best of its variant on val.",
        "",
        "## Results",
        "",
        table.to_markdown(),
        "",
        *_use(run, run.folder.relative_to(folder)),
        f"Classes ({len(names)}): {shown}.",
        "",
        "## Training",
        "",
        f"- Data: {config['data']['name']}, {_data_of(config['data'])}",
        f"- Teacher: {_teacher_of(config)}",
        f"- Student: {student['name']}, {run.summary['parameters']:,} parameters, "
        f"{run.summary['steps']} steps of {config['train']['batch_size']} images",
        f"- Initial weights: {student['options'].get('weights') or 'random'}",
        f"- Command: `{command}`",
        f"- Software: kd {__version__}, PyTorch {torch.__version__}",
        "",
        "## Licence and limits",
        "",
        "The licence of the weights depends on the data and on the initial weights above; fill in "
        "`license` before you publish them. The metrics hold for images like those of the val "
        "split, and have not been measured on others.",
        "",
    ])  # fmt: skip


def _use(run: Run, folder: Path) -> list[str]:
    """Lines that show how to load the model; none if its problem has no `Inference`."""
    config = run.config
    section = section_from(dict(config), str(run.folder / "config.yaml"))
    task = config["task"]["name"]
    try:
        inference = problem_of_task(task).inference(task, section, class_names(run.folder) or ())
    except UserError:
        return []
    boxes = ", boxes=[[x1, y1, x2, y2]]" if inference.needs_boxes else ""
    return [
        "## Use",
        "",
        "```python",
        "import kd",
        "",
        f'model = kd.load("{folder}/model.safetensors")',
        f'print(model.predict("photo.jpg"{boxes}))',
        "```",
        "",
    ]


def _metadata(run: Run, pipeline: str) -> dict[str, Any]:
    """Fields of the hub: library, pipeline, tags, and the val metrics as `model-index`."""
    config, results = run.config, run.results
    metrics = [
        {"type": name, "value": round(float(run.summary[name]), 6)}
        for name in results.rows
        if isinstance(run.summary.get(name), int | float)
    ]
    return {
        "library_name": "kd",
        "license": "unknown",
        "tags": ["knowledge-distillation", config["task"]["name"]],
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "model-index": [
            {
                "name": config["student"]["name"],
                "results": [
                    {
                        "task": {"type": pipeline or config["task"]["name"]},
                        "dataset": {"name": config["data"]["name"], "type": "custom"},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _data_of(data: Mapping[str, Any]) -> str:
    labelled = data.get("labelled", 1.0)
    part = "" if labelled == 1.0 else f", {labelled:.3g} of the train images labelled"
    return f"images of {data.get('size') or 'their own'} pixels{part}"


def _teacher_of(config: Mapping[str, Any]) -> str:
    if not config.get("losses"):
        return "none"
    teacher = config.get("teacher") or {}
    return f"`{teacher.get('run') or teacher.get('name')}`"


def write_card(folder: Path, run: Run, table: Table, command: list[str]) -> None:
    """Write the model card of a distillation to its folder."""
    write_text(folder / "README.md", model_card(run, table, shlex.join(command)))
