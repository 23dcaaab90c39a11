"""Shrink each recipe of a checkout, train it with its command, and read its losses.

For `same_losses.py`. Lists a recipe's teachers and variants, and the settings that shrink it.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks._checkout import (
    ALL_VARIANTS,
    RENAMED,
    Checkout,
    Config,
    Job,
    canonical,
)
from benchmarks._tiny_data import TRAIN, VAL

GENERATED = ("scenes", "scenes_maps", "scenes_gaze")
# Image sizes in pixels; detectors of objects larger than the scenes' get larger images.
SMALL, OF_DETECTORS = 64, 96
# Options of Faster R-CNN for recipes that use the defaults, which suit images of 800 pixels.
FEWER = {"candidates": [200, 100], "proposals": [100, 50], "sampled_regions": 64, "hidden": 256}
BATCH, EPOCHS, SEED = 4, 2, 1  # the teachers' seed is 0
TEACHER_SIZE = 160  # long side of the images of segmentation teachers, pixels
COUNTED = ("eval/nll",)  # recorded for teachers that are fitted by counting and have no losses
# torchvision trunks, and trunks of models not named after them: random weights replace ImageNet's.
LIGHTER = {"resnet101": "resnet18"}  # smaller replacements
TRUNKS = ("mobilenet_v2", "mobilenet_v3_large", "densenet121", "resnet18", "resnet50", "resnet101",
          "vgg16")  # fmt: skip
UNNAMED = {"scene_transformer": "mobilenet_v2", "msinet": "vgg16", "resnet_pixel": "resnet18",
           "resnet_multilabel": "resnet18"}  # fmt: skip

Losses = dict[str, list[float | None]]


def teachers_of(job: Job, config: Config | str) -> dict[str, Job]:
    """Return a recipe's teachers by the dotted key that names their run."""
    if job.kind == "teacher" or isinstance(config, str):
        return {}
    needed = {"teacher.run": config["teacher"]}
    needed |= {f"more_teachers.{k}.run": v for k, v in config.get("more_teachers", {}).items()}
    return {place: Job("teacher", one["name"], job.data) for place, one in needed.items()}


def variants_of(job: Job, config: Config) -> list[str]:
    """List all variants of a student's recipe by their new names.

    Variants of ablations are included only on the recipe's own dataset.
    """
    finds, names_objects = (
        config["task"]["name"] == one for one in ("detection", "classification")
    )
    names = list(ALL_VARIANTS if names_objects else ALL_VARIANTS[:2])
    if finds and config["student"]["options"].get("context"):
        names += ["no_context", "shuffled"]
    own = [RENAMED.get(name, name) for name in config["variants"]]
    if job.own:
        own += [name for variants in config["ablations"].values() for name in variants]
    return list(dict.fromkeys([*names, *own]))


def settings_of(job: Job, config: Config, checkout: Checkout) -> list[str]:
    """Return the settings that shrink a recipe of any kind."""
    data, work = config["data"], checkout.work
    made: dict[str, Any] = {"data.workers": 0, "data.root": str(work / "data" / job.data)}
    if job.data in GENERATED:
        made["data.generate"] = {"train": TRAIN, "val": VAL, "size": SMALL, "seed": 0}
    finds = config["task"]["name"] == "detection" and job.data not in GENERATED
    if "degree" in data:
        made["data.size"] = [64, 64] if job.data in GENERATED else [64, 96]
    elif data["size"] is not None:
        made["data.size"] = OF_DETECTORS if finds or job.data == "camvid" else SMALL
    section = "teacher" if job.kind == "teacher" else "student"
    options = config[section]["options"]
    if config[section]["name"].startswith("fasterrcnn"):
        left = [name for name in FEWER if name not in options]
        made |= {f"{section}.options.{name}": FEWER[name] for name in left}
    if options.get("trunk") in LIGHTER:
        made[f"{section}.options.trunk"] = LIGHTER[options["trunk"]]
    targets, batch, epochs = config.get("soft_targets", {}), BATCH, EPOCHS
    if "crop" in data:
        made["data.crop"] = [64, 96] if job.data == "camvid" else [64, 64]
        if targets.get("kind") == "live":  # maps of stride 8; critics need at least 16 x 16 cells
            made["data.crop"], batch, epochs = [128, 128], BATCH // 2, EPOCHS // 2
        elif targets and targets["score_stride"] is None:
            made["soft_targets.score_stride"] = 4
    if data.get("labelled", 1.0) < 1:
        made["data.labelled"] = 0.5
    if data.get("repeat_labelled", 1) > 1:
        made["data.repeat_labelled"] = 2
    if targets.get("size"):
        made["soft_targets.size"] = TEACHER_SIZE
    if job.kind == "transfer" and "data.labelled" in made:
        epochs *= 2  # unlabelled images are left out
    train = {"epochs": epochs, "batch_size": batch, "log_every": 1, "evaluate_every": 0,
             "images": 0, "precision": "fp32"}  # fmt: skip
    made |= {f"train.{key}": value for key, value in train.items()}
    if config.get("folds"):
        made["folds"] = 2
    if job.kind != "teacher":
        made["seeds"] = [SEED]
    if job.kind == "distill":
        made["variants"] = [checkout.spelled(name) for name in variants_of(job, config)]
    made |= {place: str(work / weights_file(trunk)) for place, trunk in trunks_of(config).items()}
    return [f"{checkout.spelled(place)}={json.dumps(value)}" for place, value in made.items()]


def trunks_of(config: Config | str) -> dict[str, str]:
    """Return the trunks that a recipe initialises with ImageNet weights, by dotted key."""
    found: dict[str, str] = {}
    if isinstance(config, str):
        return found
    for section in ("teacher", "student"):
        model = config.get(section, {})
        options = model.get("options", {})
        candidates = [options.get("trunk"), options.get("name"), model.get("name")]
        named = [
            LIGHTER.get(trunk, trunk)
            for one in candidates
            for trunk in TRUNKS
            if one and one.endswith(trunk)
        ]
        named += [UNNAMED[model["name"]]] if model.get("name") in UNNAMED else []
        wanted = {f"{section}.options.{key}": value for key, value in options.items()}
        if section == "student":
            wanted |= {f"starts.{key}": value for key, value in config.get("starts", {}).items()}
        found |= {place: named[0] for place, value in wanted.items() if value == "imagenet"}
    return found


def weights_file(trunk: str) -> Path:
    """Return the path of a trunk's random weights in the working folder."""
    return Path("weights") / f"{trunk}.pth"


def train(job: Job, config: Config | str, checkout: Checkout) -> dict[str, Any]:
    """Train a recipe in a separate process; return its losses by variant, or the error."""
    started, out = time.perf_counter(), run_folder(job, checkout.work)
    shutil.rmtree(out, ignore_errors=True)
    try:
        entry: dict[str, Any] = {"variants": trained(job, config, checkout, out)}
    except (RuntimeError, OSError) as error:
        entry = {"error": str(error).replace(str(checkout.work), "WORK")}
    if job.kind != "teacher":
        shutil.rmtree(out, ignore_errors=True)
    return {"seconds": round(time.perf_counter() - started, 1), **entry}


def trained(job: Job, config: Config | str, checkout: Checkout, out: Path) -> dict[str, Losses]:
    """Train a recipe into a folder beside copies of its teachers; return its losses by variant."""
    if isinstance(config, str):
        raise RuntimeError(last_words(config))
    settings = settings_of(job, config, checkout)
    for place, teacher in teachers_of(job, config).items():
        if not is_trained(teacher, checkout.work):
            raise RuntimeError(f"its teacher failed: {teacher}")
        # Copy the teacher, so that no two recipes cache outputs in the same folder.
        copy = out / "teachers" / place
        shutil.copytree(run_folder(teacher, checkout.work) / "run", copy)
        settings.append(f"{checkout.spelled(place)}={json.dumps(str(copy))}")
    flags = [text for setting in settings for text in ("--set", setting)]
    run = out / "run"
    done = checkout.run([*job.command, *flags, "--out", str(run)])
    if done.code:
        raise RuntimeError(last_words(done.errors) or f"exit status {done.code}")
    for path in [*run.rglob("last.pt"), *run.rglob("events.*")]:
        path.unlink()  # large, and no student needs them
    return read_losses(run)


def run_folder(job: Job, work: Path) -> Path:
    """Return the folder in which a recipe is trained."""
    return work / "runs" / str(job)


def is_trained(job: Job, work: Path) -> bool:
    """Return whether a teacher's run is finished, so that students can use it."""
    return (run_folder(job, work) / "run" / "summary.json").is_file()


def last_words(errors: str) -> str:
    """Return the error message in a command's output."""
    lines = [line for line in errors.strip().splitlines() if line]
    return "; ".join([line for line in lines if line.startswith("error:")] or lines[-1:])


def read_losses(out: Path) -> dict[str, Losses]:
    """Read a run's losses by variant, under new names; None at steps without a loss."""
    found = {}
    for path in sorted(out.rglob("metrics.jsonl")):
        parts = canonical(path.parent.relative_to(out).as_posix()).split("/")
        left_out = (
            f"seed{SEED}",
            ".",
            *(["no_context"] if parts[0] in ("probe", "finetune") else []),
        )
        name = "/".join(part for part in parts if part not in left_out) or "teacher"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        logged = [line for line in lines if line["tag"].startswith("loss/")]
        logged = logged or [line for line in lines if line["tag"] in COUNTED]
        steps = sorted({line["step"] for line in logged})
        losses: Losses = {}
        for line in logged:
            values = losses.setdefault(canonical(line["tag"]), [None] * len(steps))
            values[steps.index(line["step"])] = line["value"]
        found[name] = losses
    return found
