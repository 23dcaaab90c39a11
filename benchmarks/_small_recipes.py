"""Each recipe of a checkout made small, trained by its command, and the losses that it leaves.

For `same_losses.py`: which teachers and variants a recipe has, and what makes it small.
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
# Pixels of images; detectors of larger objects than the scenes' see more.
SMALL, OF_DETECTORS = 64, 96
# Options of Faster R-CNN where a recipe leaves them at what images of 800 pixels need.
FEWER = {"candidates": [200, 100], "proposals": [100, 50], "sampled_regions": 64, "hidden": 256}
BATCH, EPOCHS, SEED = 4, 2, 1  # the teachers' seed is 0
TEACHER_SIZE = 160  # long side at which teachers of label maps see images, pixels
COUNTED = ("eval/nll",)  # recorded of teachers that count and have no losses
# Of torchvision, and of models whose names do not say it: random weights take ImageNet's place.
LIGHTER = {"resnet101": "resnet18"}  # and in the place of these stand smaller ones
TRUNKS = ("mobilenet_v2", "mobilenet_v3_large", "densenet121", "resnet18", "resnet50", "resnet101",
          "vgg16")  # fmt: skip
UNNAMED = {"scene_transformer": "mobilenet_v2", "msinet": "vgg16", "resnet_pixel": "resnet18",
           "resnet_multilabel": "resnet18"}  # fmt: skip

Losses = dict[str, list[float | None]]


def teachers_of(job: Job, config: Config | str) -> dict[str, Job]:
    """The teachers that a recipe needs, by the place in it that names a run."""
    if job.kind == "teacher" or isinstance(config, str):
        return {}
    needed = {"teacher.run": config["teacher"]}
    needed |= {f"more_teachers.{k}.run": v for k, v in config.get("more_teachers", {}).items()}
    return {place: Job("teacher", one["name"], job.data) for place, one in needed.items()}


def variants_of(job: Job, config: Config) -> list[str]:
    """Every variant that a recipe of a student can have, by new names.

    Those of its ablations on its own dataset alone.
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
    """What makes a recipe small, whatever it is of."""
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
        if targets.get("kind") == "live":  # maps of stride 8, of which critics need 16 x 16
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
        epochs *= 2  # images without labels are left out
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
    """The trunks that a recipe wants at ImageNet's weights, by the place that says so."""
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
    """Where a trunk's random weights are, below the working folder."""
    return Path("weights") / f"{trunk}.pth"


def train(job: Job, config: Config | str, checkout: Checkout) -> dict[str, Any]:
    """Train a recipe in a process of its own; its losses by variant, or what went wrong."""
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
    """Train a recipe into a folder, its teachers' copies beside it; its losses by variant."""
    if isinstance(config, str):
        raise RuntimeError(last_words(config))
    settings = settings_of(job, config, checkout)
    for place, teacher in teachers_of(job, config).items():
        if not is_trained(teacher, checkout.work):
            raise RuntimeError(f"its teacher failed: {teacher}")
        # A copy, so that no two recipes write stored outputs into one folder.
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
    """Where a recipe is trained."""
    return work / "runs" / str(job)


def is_trained(job: Job, work: Path) -> bool:
    """Whether a teacher is there for students."""
    return (run_folder(job, work) / "run" / "summary.json").is_file()


def last_words(errors: str) -> str:
    """What a command says is wrong."""
    lines = [line for line in errors.strip().splitlines() if line]
    return "; ".join([line for line in lines if line.startswith("error:")] or lines[-1:])


def read_losses(out: Path) -> dict[str, Losses]:
    """The losses below a run's folder by variant, under new names; None at steps without one."""
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
