"""Export every shipped student after a short training, and compare each file with its model.

    python benchmarks/export_table.py [OUT] [--recipe NAME ...] [--epochs 8]

Each recipe of configs/distill is trained without a teacher on the embedded scenes (64 pixels, one
seed; classifiers with and without the context head), exported to ONNX and with torch.export, and
run on 50 val images. OUT/table.md lists the largest difference of raw outputs relative to their
largest value, the metrics of model and file, the file size, and the time of a batch on one thread.
Run the command again to continue after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, too

import kd
from kd import distill
from kd.config.reader import find_config, known_configs, read_yaml
from kd.deploy.export import compare, export, graph_of, runner
from kd.errors import UserError
from kd.problems import problem_of_task
from kd.problems.recipes import section_from
from kd.runs.build import open_data

DATA = {"classification": "scenes", "detection": "scenes", "segmentation": "scenes_maps",
        "saliency": "scenes_gaze"}  # fmt: skip
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
HEADER = ("student", "variant", "format", "difference", "metric", "model", "file", "prior",
          "MB", "PyTorch ms", "file ms")  # fmt: skip


def train(name: str, out: Path, epochs: int) -> list[Path]:
    """Train a recipe's student, or return its finished runs."""
    recipe = read_yaml(find_config("distill", name))
    task = recipe["task"]["name"]
    variants = ["plain", "no_context"] if task == "classification" else ["plain"]
    run = out / "runs" / name
    settings: dict[str, Any] = {
        "data.generate": {"train": 600, "val": 100, "size": 64, "seed": 0},
        "data.root": str(out / "data" / DATA[task]),
        "data.workers": 0,
        "data.labelled": 1.0,
        "train.epochs": epochs,
        "train.images": 0,
        "train.evaluate_every": 0,
        "train.precision": "fp32",
        "seeds": [0],
        "variants": variants,
    }
    if task in ("segmentation", "saliency"):
        settings.pop("data.labelled")
    options = recipe["student"].get("options", {})
    settings |= {
        f"student.options.{key}": None for key in ("weights", "frozen") if options.get(key)
    }
    flags = [f for key, value in settings.items() for f in ("--set", f"{key}={json.dumps(value)}")]
    resume = ["--resume"] if run.exists() else []
    distill.main(["--student", name, "--data", DATA[task], *flags, "--out", str(run), *resume])
    return [run / "seed0" / variant for variant in variants]


def rows_of(name: str, run: Path, out: Path) -> list[list[str]]:
    """Export a run to each format and compare the files with the model."""
    model = kd.load(run, device="cpu")
    task = model.config["task"]["name"]
    data = open_data(section_from(dict(model.config), str(run)), task)
    results = problem_of_task(task).results(task)
    metric = results.metric(results.rows[0])
    prior = json.loads((run / "summary.json").read_text()).get(f"prior_{metric.name}")
    rows = []
    for format, suffix in FORMATS.items():
        file = out / "files" / f"{name}-{run.name}{suffix}"
        export(model, file, format)
        check = compare(model, runner(file, format, graph_of(model)), data, images=50)
        (out / "checks").mkdir(exist_ok=True)
        text = json.dumps(asdict(check), indent=1)
        (out / "checks" / f"{name}-{run.name}-{format}.json").write_text(text)
        rows.append([
            name, run.name, format, f"{max(check.differences.values()):.0e}", metric.label,
            metric.text(check.model[metric.name]), metric.text(check.exported[metric.name]),
            metric.text(prior) or "-", f"{file.stat().st_size / 1e6:.1f}",
            *(f"{1000 * seconds:.0f}" for seconds in check.seconds),
        ])  # fmt: skip
    return rows


def main() -> int:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/export_table"))
    parser.add_argument("--recipe", nargs="+", default=list(known_configs("distill")))
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / "rows.json"
    rows: dict[str, list[list[str]]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in args.recipe:
        if name in rows:
            continue
        try:
            runs = train(name, args.out, args.epochs)
            rows[name] = [row for run in runs for row in rows_of(name, run, args.out)]
        except UserError as error:
            sys.stderr.write(f"{name}: {error}\n")
            continue
        file.write_text(json.dumps(rows, indent=1))
        lines = [HEADER, ["---"] * len(HEADER), *(row for some in rows.values() for row in some)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (args.out / "table.md").write_text(table + "\n")
    sys.stdout.write((args.out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
