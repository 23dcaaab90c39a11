"""Detectors through the commands: the embedded scenes, tiny runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torch import Tensor

from kd import distill, evaluate, train_teacher
from kd.cli import read_recipe, recipe_parser
from kd.config.recipes import DistillRecipe
from kd.data.loader import SampleLoader
from kd.engine.checkpoint import load_checkpoint
from kd.errors import UserError
from kd.experiments import distillation as variants
from kd.experiments.distillation import Distillation
from kd.runs.build import make_accelerator, make_loader, open_data

pytestmark = pytest.mark.slow

SMALL = (
    "options={trunk: resnet18, width: 0.25, levels: [2, 3], channels: 16, scales: [2.0], "
    "canonical: 32.0, hidden: 32, region_size: 3, candidates: [50, 50], proposals: [40, 20], "
    "sampled_anchors: 32, sampled_regions: 32, least_score: 0.0}"
)
HEAD = SMALL.replace("{trunk: resnet18, ", "{context: true, ")
VARIANTS = {"plain", "F", "G", "I", "D", "ID"}
TRAIN = "train={epochs: 1, batch_size: 8, images: 2, precision: fp32, evaluate_every: 0}"


def flags(settings: list[str]) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def scenes(small_scenes: Path) -> list[str]:
    return [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.workers=0",
        TRAIN,
    ]


@pytest.fixture(scope="module")
def finder(scenes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Faster R-CNN trained for three steps."""
    out = tmp_path_factory.mktemp("boxes") / "teacher"
    given = flags([*scenes, f"teacher.{SMALL}"])
    command = ["--teacher", "fasterrcnn_resnet50", "--data", "scenes", *given, "--out", str(out)]
    assert train_teacher.main(command) == 0
    return out


def test_a_teacher_is_scored_as_pycocotools_scores_its_results(
    finder: Path, small_scenes: Path
) -> None:
    summary = json.loads((finder / "summary.json").read_text())
    truth = COCO(small_scenes / "annotations" / "instances_val.json")
    scored = COCOeval(truth, truth.loadRes(str(finder / "detections.json")), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    for name, place in (("AP", 0), ("AP50", 1), ("AP75", 2)):
        assert summary[name] == pytest.approx(scored.stats[place], abs=1e-6)


def test_an_ablation_fills_one_table_and_draws_boxes_and_masks(
    scenes: list[str], finder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    given = flags([*scenes, f"student.{SMALL}", "seeds=[0]"])
    command = ["--student", "fasterrcnn_resnet18", "--data", "scenes", "--teacher", str(finder),
               "--ablation", "imitation", *given, "--out", str(out)]  # fmt: skip
    assert distill.main(command) == 0
    assert {path.parent.name for path in out.glob("seed0/*/summary.json")} == VARIANTS
    assert "AP50 (%)" in (out / "table.md").read_text()
    for name in ("overlays/0.png", "overlays/1.png", "masks/0.png", "masks/1.png"):
        assert (out / name).is_file()
    curves = (out / "seed0" / "ID" / "metrics.jsonl").read_text()
    for term in ("near_0", "object_logits", "object_boxes", "objectness"):
        assert f'"loss/{term}"' in curves
    assert '"loss/near_0"' not in (out / "seed0" / "G" / "metrics.jsonl").read_text()
    # Asked again, a student answers as it did.
    run = out / "seed0" / "ID"
    assert evaluate.main([str(run)]) == 0
    again = json.loads((run / "evaluation" / "metrics.json").read_text())["runs"]
    (numbers,) = again.values()
    assert numbers["AP"] == pytest.approx(json.loads((run / "summary.json").read_text())["AP"])
    assert (run / "evaluation" / "boxes_0.png").is_file()


def curves(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()


def test_a_context_teacher_teaches_the_head_and_a_bare_twin_has_none(
    scenes: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    given = flags([*scenes, f"student.{HEAD}", "seeds=[0]", "soft_targets.out_of_fold=true",
                   "variants=[plain, distilled, no_context, shuffled]"])  # fmt: skip
    command = ["--student", "fasterrcnn_resnet18_context", "--data", "scenes"]
    assert distill.main([*command, "--teacher", str(small_teacher), *given, "--out", str(out)]) == 0
    runs = {path.parent.name: path.parent for path in out.glob("seed0/*/summary.json")}
    assert runs.keys() == {"plain", "distilled", "no_context", "shuffled"}
    for variant in (
        "plain",
        "distilled",
        "shuffled",
    ):  # a plain student shows the curve for nothing
        assert '"loss/context_logits"' in curves(runs[variant])
    assert '"loss/context_logits"' not in curves(runs["no_context"])
    weights = {variant: load_file(run / "model.safetensors") for variant, run in runs.items()}
    heads = {name for name in weights["plain"] if name.startswith("context.")}
    assert heads and weights["no_context"].keys() == weights["plain"].keys() - heads
    taught, alone = (
        weights[variant]["context.layers.3.weight"] for variant in ("distilled", "plain")
    )
    assert not taught.equal(alone)
    fractions = weights["plain"]["context.log_prior"].exp()
    assert fractions.sum() == pytest.approx(1.0, abs=1e-4) and fractions.std() > 1e-3
    for variant in ("distilled", "no_context"):  # asked again, each answers as it did
        assert evaluate.main([str(runs[variant])]) == 0
        again = json.loads((runs[variant] / "evaluation" / "metrics.json").read_text())["runs"]
        summary = json.loads((runs[variant] / "summary.json").read_text())
        assert next(iter(again.values()))["AP"] == pytest.approx(summary["AP"])


def test_a_stored_context_teacher_stands_beside_a_live_detector(
    scenes: list[str], finder: Path, small_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    given = flags([*scenes, f"student.{HEAD}", "seeds=[0]", "train.accumulate=2",
                   f"more_teachers.detector.run={finder}"])  # fmt: skip
    command = ["--student", "fasterrcnn_resnet18_context", "--data", "scenes", *given]
    command += ["--teacher", str(small_teacher), "--ablation", "context", "--out", str(out)]
    assert distill.main(command) == 0
    found = {path.parent.name: curves(path.parent) for path in out.glob("seed0/*/summary.json")}
    assert found.keys() == {"plain", "context", "I", "I_context"}
    for variant, terms in (("plain", ""), ("context", "c"), ("I", "n"), ("I_context", "cn")):
        assert ('"loss/context_logits"' in found[variant]) is ("c" in terms)
        assert ('"loss/near_1"' in found[variant]) is ("n" in terms)
    assert (out / "masks/0.png").is_file()


def refusal(scenes: list[str], teacher: Path, out: Path, ablation: str, *settings: str) -> str:
    """What stops an ablation of imitation."""
    given = flags([*scenes, f"student.{SMALL}", *settings])
    command = ["--student", "fasterrcnn_resnet18", "--data", "scenes", "--teacher", str(teacher)]
    with pytest.raises(UserError) as caught:
        distill.main([*command, "--ablation", ablation, *given, "--out", str(out)])
    return str(caught.value)


def test_a_layer_that_a_teacher_lacks_is_said_to_be_its(
    scenes: list[str], small_teacher: Path, finder: Path, tmp_path: Path
) -> None:
    said = refusal(scenes, small_teacher, tmp_path, "imitation", "data.size=32")
    teacher = f"teacher {small_teacher} (cnn, task context)"
    assert said.startswith(f"losses: near_0: {teacher}: unknown layer ")
    assert "'network.backbone.0'" in said
    assert "for teacher.name fasterrcnn_resnet50: use a run of that kind" in said
    three = 'levels=["0", "1", "2"]'
    said = refusal(scenes, finder, tmp_path, "psi", three)
    assert said.startswith("student: layer 'network.backbone' has no output '2'; known: 0, 1. ")
    assert "`levels`" in said and "both pyramids" in said
    deep = "student.options.levels=[2, 3, 4]"
    said = refusal(scenes, finder, tmp_path, "psi", three, deep)
    assert said.startswith(f"teacher {finder} (fasterrcnn_resnet50, task detection): layer ")
    assert "has no output '2'; known: 0, 1. " in said


def test_heads_of_another_kind_are_refused(scenes: list[str], tmp_path: Path) -> None:
    small = ("teacher.options={trunk: resnet18, width: 0.25, levels: [2, 3], channels: 64}",
             "train.epochs=0")  # fmt: skip
    command = ["--teacher", "fcos_resnet50", "--data", "scenes", *flags([*scenes, *small])]
    assert train_teacher.main([*command, "--out", str(tmp_path / "fcos")]) == 0
    said = refusal(scenes, tmp_path / "fcos", tmp_path / "out", "imitation")
    assert (
        "losses: object_logits: student (" in said and "both detectors must have one stage" in said
    )


def test_a_context_teacher_may_be_the_further_one(
    scenes: list[str], finder: Path, small_teacher: Path, tmp_path: Path
) -> None:
    given = flags([*scenes, f"student.{HEAD}", "soft_targets={kind: live, out_of_fold: false}",
                   f"teacher={{run: {finder}, kind: live}}", "variants=[distilled]", "adapters={}",
                   f"more_teachers={{scene: {{run: {small_teacher}, kind: stored}}}}",
                   "losses=[{name: context_logits, weight: 1.0, teacher: scene.posterior}]",
                   "more_losses=[]", "ablations={}"])  # fmt: skip
    command = ["--student", "fasterrcnn_resnet18_context", "--data", "scenes", *given]
    args = recipe_parser("x", "distill", "y").parse_args(command)
    recipe = read_recipe(args, DistillRecipe, "distill")
    assert recipe is not None
    data = open_data(recipe.data, recipe.task.name)
    distillation = Distillation(recipe, data, make_accelerator("fp32"), tmp_path)
    distillation.check()
    assert distillation.sources is not None and list(distillation.sources.teachers) == [
        "scene"
    ]  # none reads ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["student.options.context=false"], "no_context: a student without a context head, but"),
        (["student.options.context=false", "variants=[distilled]"],
         "the student has no output 'context'"),
        (["teacher.kind=live"], "context_logits: posteriors of objects, hidden in turn, must be"),
        (["variants=[plain, output_kd]"], "output_kd: only for students that classify objects"),
        (["variants=[plain, I]", "more_teachers.detector.kind=stored"],
         "near_0: for detectors only posteriors can come from the cache; set kind: live"),
        (["variants=[shuffled]", "losses=[{name: object_logits, weight: 1.0}]", "teacher.kind=live",
          "ablations={}", "more_losses=[]", "adapters={}"],
         r"shuffled needs soft_targets\.kind=stored"),
    ],
)  # fmt: skip
def test_what_context_and_detectors_do_not_go_with_is_refused(
    settings: list[str], said: str, scenes: list[str], finder: Path, small_teacher: Path
) -> None:
    given = flags([*scenes, f"student.{HEAD}", f"more_teachers.detector.run={finder}", *settings])
    command = ["--student", "fasterrcnn_resnet18_context", "--data", "scenes"]
    with pytest.raises(UserError, match=said):
        distill.main([*command, "--teacher", str(small_teacher), *given])


def test_stored_answers_of_a_detector_are_refused(scenes: list[str], finder: Path) -> None:
    given = flags([*scenes, f"student.{SMALL}", "soft_targets.kind=stored"])
    command = ["--student", "fasterrcnn_resnet18", "--data", "scenes", "--teacher", str(finder)]
    with pytest.raises(UserError, match=r"only posteriors .*--set soft_targets\.kind=live"):
        distill.main([*command, *given])


@pytest.mark.parametrize(
    ("student", "teacher", "curve"),
    [
        ("retinanet_resnet18", "retinanet_resnet50", "near_1"),
        ("fcos_resnet18", "fcos_resnet50", "near_0"),
        ("fasterrcnn_resnet18_c4", "fasterrcnn_resnet50_c4", "near"),
    ],
)
def test_each_recipe_s_ablations_run_from_its_own_teacher(
    student: str, teacher: str, curve: str, scenes: list[str], tmp_path: Path
) -> None:
    small = ["trunk=resnet18", "width=0.25"]
    given = flags([*scenes, *(f"teacher.options.{one}" for one in small)])
    run, out = tmp_path / "teacher", tmp_path / "students"
    assert train_teacher.main(["--teacher", teacher, *given, "--out", str(run)]) == 0
    given = flags([*scenes, *(f"student.options.{one}" for one in small), "seeds=[0]"])
    command = ["--student", student, "--teacher", str(run), *given, "--out", str(out)]
    single = student.endswith("c4")
    assert distill.main([*command, "--ablation", "imitation"]) == 0
    found = {path.parent.name: curves(path.parent) for path in out.glob("seed0/*/summary.json")}
    assert found.keys() == VARIANTS
    assert f'"loss/{curve}"' in found["I"] and '"loss/object_logits"' not in found["I"]
    assert '"loss/object_logits"' in found["D"] and f'"loss/{curve}"' not in found["D"]
    assert ('"loss/object_boxes"' in found["ID"]) is single
    if single:
        more = tmp_path / "psi"
        assert distill.main([*command, "--ablation", "psi", "--out", str(more)]) == 0
        found = {
            path.parent.name: curves(path.parent) for path in more.glob("seed0/*/summary.json")
        }
        assert found.keys() == {"plain", *(f"psi_{fraction}" for fraction in (20, 35, 50, 65, 80))}
        assert '"loss/near_20"' in found["psi_20"] and '"loss/near"' in found["psi_50"]


class Crash(Exception):
    """Ends a run without a last checkpoint."""


class Ending:
    """A loader that crashes after some batches."""

    def __init__(self, loader: SampleLoader, batches: int) -> None:
        self.loader, self.left = loader, batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            if self.left == 0:
                raise Crash
            self.left -= 1
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.loader.set_epoch(epoch, start_batch)


def test_a_student_with_a_context_head_goes_on_after_a_crash_bit_for_bit(
    scenes: list[str], small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags([*scenes, f"student.{HEAD}", "seeds=[0]", "variants=[distilled]",
                   "soft_targets.out_of_fold=true", "train.checkpoint_every=1"])  # fmt: skip
    command = ["--student", "fasterrcnn_resnet18_context", "--data", "scenes", *given]
    command += ["--teacher", str(small_teacher), "--out"]
    assert distill.main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:

        def ending(*args: Any, **kwargs: Any) -> Ending:
            return Ending(make_loader(*args, **kwargs), 2)

        patched.setattr(variants, "make_loader", ending)
        with pytest.raises(Crash):
            distill.main([*command, str(tmp_path / "parts")])
    run = Path("seed0") / "distilled"
    assert not (tmp_path / "parts" / run / "summary.json").exists()
    assert load_checkpoint(tmp_path / "parts" / run / "last.pt")[0].step in (1, 2)
    assert distill.main([*command, str(tmp_path / "parts"), "--resume"]) == 0
    whole, again = (
        load_file(tmp_path / name / run / "model.safetensors") for name in ("whole", "parts")
    )
    assert any(name.startswith("context.") for name in whole) and whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
