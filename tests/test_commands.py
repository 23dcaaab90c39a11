"""The commands, end to end on tiny scenes: files, tags, tables, terms on features, messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

import kd
from kd import cache, compare, demo, distill, evaluate, train_teacher
from kd.cli import run_command
from kd.engine.checkpoint import load_checkpoint
from kd.runs.read import read_distill, read_scalars

pytestmark = pytest.mark.slow


def sets(*settings: str) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


STUDENT = sets(
    "student={name: shufflenet_v2_x0_5, options: {stride: 16}}",
    "train={epochs: 2, batch_size: 8, evaluate_every: 1, log_every: 2, images: 2}",
    "data.labelled=0.5",
    "data.repeat_labelled=1",
)


@pytest.fixture(scope="module")
def teacher(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a cache of its own: other modules of the same process fill `small_teacher`'s."""
    out = tmp_path_factory.mktemp("commands") / "teacher"
    return shutil.copytree(small_teacher, out, ignore=shutil.ignore_patterns("cache"))


@pytest.fixture(scope="module")
def distilled(
    small_data: list[str], teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two seeds of plain and distilled, out of fold."""
    out = tmp_path_factory.mktemp("distill") / "run"
    flags = [*small_data, *STUDENT, *sets("soft_targets.out_of_fold=true", "seeds=[0, 1]",
             "variants=[plain, distilled]")]  # fmt: skip
    command = ["--student", "resnet18", "--teacher", str(teacher), "--out", str(out)]
    assert distill.main([*command, *flags]) == 0
    return out


def test_torchdistill_is_imported_only_for_its_own_losses(
    small_data: list[str], teacher: Path, tmp_path: Path
) -> None:
    code = "import sys; from kd import distill; distill.main(sys.argv[1:]); print(*sys.modules)"
    term = "{name: torchdistill.DISTLoss, weight: 1, student: logits, teacher: posterior}"
    imported = []
    for number, losses in enumerate(([], sets(f"losses=[{term}]"))):
        flags = sets("train.epochs=1", "seeds=[0]", "variants=[plain, distilled]")
        ran = subprocess.run(
            [sys.executable, "-c", code, "--student", "resnet18", "--teacher", str(teacher),
             *small_data, *STUDENT, *flags, *losses, "--out", str(tmp_path / str(number))],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        imported.append("torchdistill" in ran.stdout.split())
    assert imported == [False, True]


def test_the_distilled_variant_is_what_is_shipped(
    distilled: Path, teacher: Path, tmp_path: Path
) -> None:
    """It is loaded by default, without adapters, and when neither teacher nor data are there."""
    model = kd.load(distilled)
    assert model.config["variant"] == "distilled" and model.class_names[0] == "ball"
    plain = kd.load(distilled, variant="plain", seed=model.config["seed"])
    assert model.model.state_dict().keys() == plain.model.state_dict().keys()
    card = (distilled / "README.md").read_text()
    assert f"`{teacher}`" in card and "distilled - plain" in card
    alone = model.save(tmp_path / "student.safetensors")
    assert load_file(alone).keys() == plain.model.state_dict().keys()
    assert kd.load(alone).config["variant"] == "distilled"


def tags(folder: Path) -> dict[str, set[str]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = events.Tags()
    plugins = events.summary_metadata
    return {
        "scalars": set(found["scalars"]),
        "images": set(found["images"]),
        "hparams": {tag for tag, about in plugins.items()
                    if about.plugin_data.plugin_name == "hparams"},
    }  # fmt: skip


def test_a_teacher_and_its_folds_leave_all_their_files(teacher: Path) -> None:
    names = {"config.yaml", "last.pt", "model.safetensors", "metrics.jsonl", "summary.json",
             "predictions.npz"}  # fmt: skip
    for folder in (teacher, teacher / "fold0", teacher / "fold1"):
        assert names <= {path.name for path in folder.iterdir()}
    whole, fold = (load_file(teacher / part / "model.safetensors") for part in ("", "fold0"))
    assert whole.keys() == fold.keys()
    assert not all(torch.equal(whole[name], fold[name]) for name in whole)


def test_a_twin_has_the_distilled_runs_tags(distilled: Path) -> None:
    plain, taught = (tags(distilled / "seed0" / variant) for variant in ("plain", "distilled"))
    assert plain["scalars"] == taught["scalars"]
    some = {"loss/cross_entropy", "loss/context_logits", "loss/total", "train/lr", "eval/nll"}
    assert some <= plain["scalars"]
    assert plain["images"] == taught["images"]
    assert {"images/0", "images/1", "eval/top_n", "eval/hidden_fraction"} <= plain["images"]
    assert plain["hparams"] == taught["hparams"] != set()


def test_metrics_jsonl_holds_the_same_curves(distilled: Path) -> None:
    for variant in ("plain", "distilled"):
        curves = read_scalars(distilled / "seed0" / variant)
        assert curves.keys() == tags(distilled / "seed0" / variant)["scalars"]
        assert [step for step, _ in curves["eval/top1"]] == [3, 6]
        assert [step for step, _ in curves["loss/total"]] == [2, 3, 4, 6]
        assert all(np.isfinite(value) for curve in curves.values() for _, value in curve)


def test_the_variants_took_the_same_steps(distilled: Path) -> None:
    runs = read_distill(distilled)
    assert runs.seeds == (0, 1)
    for run, twin in zip(runs.variants["distilled"], runs.variants["plain"], strict=True):
        assert run.summary["steps"] == twin.summary["steps"] == 6
        assert run.summary["parameters"] == twin.summary["parameters"]
        rates = (read_scalars(one.folder)["train/lr"] for one in (run, twin))
        assert len({tuple(rate) for rate in rates}) == 1


def test_compare_and_evaluate_say_what_distill_wrote(
    distilled: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (distilled / "table.md").read_text()
    assert "distilled - plain" in table
    assert compare.main([str(distilled), "--markdown", str(tmp_path / "t.md")]) == 0
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert set(rows[1:]) <= set((tmp_path / "t.md").read_text().splitlines())
    capsys.readouterr()
    for run in (teacher, distilled / "seed0" / "distilled"):
        assert evaluate.main([str(run)]) == 0
        summary = json.loads((run / "summary.json").read_text())
        said = capsys.readouterr().out
        assert f"{summary['nll']:.3f}" in said
        assert f"{summary['ceiling_nll']:.3f}" in said
    assert compare.main([str(teacher), str(distilled / "seed0" / "plain")]) == 0


def test_posteriors_are_computed_once_and_cache_finds_them(
    distilled: Path, teacher: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--teacher", str(teacher), "--data", "scenes", *small_data]
    shards = sorted((teacher / "cache").rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in shards]
    assert cache.main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("posterior: 131 objects, ") and "bytes an image" in said
    assert sorted((teacher / "cache").rglob("*.safetensors")) == shards
    assert [file.stat().st_mtime_ns for file in shards] == before
    earlier = set((teacher / "cache").iterdir())  # other tests of this teacher add theirs
    exact = ["--precision", "fp32"]  # bfloat16, where a processor has it, is off by 0.3 %
    assert cache.main([*command, *exact, "--in-fold", "--layers", "features.2", "--mirrored"]) == 0
    said = capsys.readouterr().out
    assert "features.2: 131 objects, " in said
    assert "under flip the moved maps differ by 0.0%" in said
    added = set((teacher / "cache").iterdir()) - earlier
    names = sorted(folder.name.rpartition("-")[0] for folder in added)
    assert names == ["scenes-train-features.2", "scenes-train-posterior"]


def test_the_cache_command_says_what_is_wrong(
    teacher: Path, small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--teacher", str(teacher), "--data", "scenes", *small_data]
    for flags, message in (
        (["--layers", "featurs.2"], "unknown layer 'featurs.2'; did you mean 'features.2'"),
        (["--top-k", "22"], "top_k 22: posterior has 22 channels; store fewer"),
        (["--top-k", "-1"], "--top-k must be at least 0, got -1"),
        (["--out", "nowhere://x"], "nowhere://x/scenes-train-posterior: Protocol not known"),
    ):
        assert run_command(cache.main, [*command, *flags]) == 2
        assert message in capsys.readouterr().err
    place = ["--out", str(tmp_path / "kept"), "--in-fold"]
    assert cache.main([*command, *place, "--dtype", "float32"]) == 0
    assert run_command(cache.main, [*command, *place]) == 2
    error = capsys.readouterr().err
    assert "cache of other content: dtype is 'float32' there, 'float16' here" in error


def test_a_finished_distillation_asks_for_resume_and_then_trains_nothing(
    distilled: Path, teacher: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_data, *STUDENT, *sets("soft_targets.out_of_fold=true", "seeds=[0, 1]",
             "variants=[plain, distilled]")]  # fmt: skip
    command = ["--student", "resnet18", "--teacher", str(teacher), "--out", str(distilled)]
    assert run_command(distill.main, [*command, *flags]) == 2
    assert "has a run already; continue it with --resume" in capsys.readouterr().err
    before = (distilled / "seed1" / "plain" / "last.pt").stat().st_mtime_ns
    # Begun in an earlier call with another list of variants; not asked for any more.
    given_up = shutil.copytree(
        distilled / "seed0" / "distilled", distilled / "seed0" / "no_context"
    )
    (given_up / "summary.json").unlink()
    assert distill.main([*command, *flags, "--resume"]) == 0
    assert "no_context" not in (distilled / "table.md").read_text()
    shutil.rmtree(given_up)
    assert (distilled / "seed1" / "plain" / "last.pt").stat().st_mtime_ns == before
    changed = [*command, *flags, *sets("train.epochs=3"), "--resume"]
    assert run_command(distill.main, changed) == 2
    assert "train.epochs: 2 there, 3 now" in capsys.readouterr().err


RECIPE = """
data: scenes
task: {name: classification, weights: {cross_entropy: 1.0}}
soft_targets: {kind: live}
student: {name: shufflenet_v2_x0_5, options: {stride: 16}}
adapters:
  trunk.trunk.maxpool: {kind: conv1x1, to: features.2}
losses:
  - {name: context_logits, weight: 1.0, options: {temperature: 2.0}}
  - {name: context_features, weight: 0.1, student: trunk.trunk.maxpool, teacher: features.2}
  - name: pair_wise
    weight: 0.5
    student: trunk.trunk.conv1
    teacher: features.1
    schedule: {name: linear, until: 0.5}
variants: [plain, distilled]
train: {epochs: 1, batch_size: 8, accumulate: 2, ema: 0.9, log_every: 1, images: 0}
"""


def test_terms_on_features_train_from_a_recipe_of_ones_own(
    small_data: list[str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    flags = ["--config", str(recipe), "--teacher", str(teacher), "--out", str(out)]
    assert distill.main([*flags, *small_data]) == 0
    assert "mine on scenes" in capsys.readouterr().out
    taught = out / "seed0" / "distilled"
    curves = read_scalars(taught)
    for term in ("context_logits", "context_features", "pair_wise"):
        assert all(value > 0 for _, value in curves[f"loss/{term}"])
    _, _, parts = load_checkpoint(taught / "last.pt")
    adapters = [name for name in parts["model"] if name.startswith("adapters.")]
    assert adapters == [
        "adapters.trunk/trunk/maxpool.weight", "adapters.trunk/trunk/maxpool.bias",
    ]  # fmt: skip
    assert all(name in parts["ema"] for name in adapters)
    exported = load_file(taught / "model.safetensors")
    assert not any("adapters" in name for name in exported)
    assert exported.keys() == load_file(out / "seed0" / "plain" / "model.safetensors").keys()
    assert all(torch.equal(exported[n], parts["ema"][f"student.{n}"]) for n in exported)
    assert evaluate.main([str(taught)]) == 0


TWO_TEACHERS = """
data: scenes
task: {name: classification, weights: {cross_entropy: 1.0}}
more_teachers:
  second: {weight: 3.0}
student: {name: shufflenet_v2_x0_5, options: {stride: 16}}
adapters:
  trunk.trunk.maxpool: {kind: resize, to: features.2}
losses:
  - {name: context_logits, weight: 1.0, teacher: mean.posterior}
  - {name: hint, weight: 0.1, student: trunk.trunk.maxpool, teacher: features.2}
  - name: hint
    label: hint_second
    weight: 0.1
    student: trunk.trunk.maxpool
    teacher: second.features.2
    schedule: {name: off_after, until: 0.4}
  - name: holistic
    weight: 0.1
    student: trunk.trunk.maxpool
    teacher: features.2
    options: {widths: [4, 8], penalty: 5.0}
variants: [plain, distilled]
train: {epochs: 1, batch_size: 8, log_every: 1, images: 0}
"""


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_two_teachers_and_a_critic_train_a_student(
    kind: str, small_data: list[str], teacher: Path, tmp_path: Path
) -> None:
    """Stored maps come with the samples, live ones with each step."""
    recipe, out = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text(TWO_TEACHERS)
    flags = ["--config", str(recipe), "--teacher", str(teacher), "--out", str(out)]
    settings = sets(
        f"more_teachers.second.run={teacher}",
        f"soft_targets.kind={kind}",
        f"soft_targets.cache={tmp_path / 'kept'}",
        "data.augment=null",
    )
    assert distill.main([*flags, *small_data, *settings]) == 0
    taught = read_scalars(out / "seed0" / "distilled")
    names = ("context_logits", "hint", "hint_second", "holistic", "holistic_critic")
    assert all(len(taught[f"loss/{name}"]) == 3 for name in names)
    assert dict(taught["loss/hint_second"])[1] == pytest.approx(dict(taught["loss/hint"])[1])
    plain = read_scalars(out / "seed0" / "plain")
    assert ("loss/context_logits" in plain) is (kind == "stored")
    assert "loss/holistic_critic" not in plain
    kept = [folder.name for folder in (tmp_path / "kept").glob("*")]
    assert ("second" in kept) is (kind == "stored")
    _, _, parts = load_checkpoint(out / "seed0" / "distilled" / "last.pt")
    assert set(parts["critics"]) == {"holistic"}


def test_a_loss_that_is_not_finite_ends_the_command_with_a_message(
    small_data: list[str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_data, *STUDENT, *sets("train.optimizer={name: sgd, lr: 1.0e+30}",
             "variants=[plain]", "train.clip_norm=0.0")]  # fmt: skip
    command = ["--student", "resnet18", "--out", str(tmp_path / "run")]
    assert run_command(distill.main, [*command, *flags]) == 2
    said = capsys.readouterr().err
    assert "not finite" in said and "train.optimizer.lr" in said
    assert not (tmp_path / "run" / "seed0" / "plain" / "last.pt").exists()


def test_a_broken_image_is_named_and_mended_training_goes_on(
    small_scenes: Path, small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tmp_path / "scenes"
    shutil.copytree(small_scenes, scenes)
    image = sorted((scenes / "train").glob("*.png"))[5]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    flags = [
        *small_data,
        *sets(f"data.root={scenes}", "teacher={name: cnn, options: {width: 4, downs: 3}}"),
        *sets("train={epochs: 1, batch_size: 4, images: 0}", "hide=one"),
    ]
    command = ["--teacher", "cnn", "--out", str(tmp_path / "run"), *flags]
    assert run_command(train_teacher.main, command) == 2
    assert image.name in capsys.readouterr().err
    image.write_bytes(content)
    assert run_command(train_teacher.main, [*command, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def test_without_a_teacher_the_message_says_which_command_makes_one(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_command(distill.main, ["--student", "resnet18", *small_data]) == 2
    assert "python -m kd.train_teacher --teacher" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_micro_batches_do_not_divide_is_refused(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_data, *sets("train.batch_size=8", "train.accumulate=3")]
    assert run_command(
        train_teacher.main, ["--teacher", "cnn", "--out", str(tmp_path / "run"), *flags]
    ) == 2  # fmt: skip
    assert "batch_size 8 is not a multiple of accumulate 3" in capsys.readouterr().err


def test_the_demo_runs_the_whole_path(
    small_scenes: Path, small_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    short = sets("train.epochs=1", "train.batch_size=8", "train.images=1")
    monkeypatch.setattr(demo, "TEACHER", [*small_data, *short, *sets("teacher.options.width=4")])
    variants = sets("variants=[plain, distilled]", "seeds=[0]", "data.labelled=0.5",
                "student.name=shufflenet_v2_x0_5")  # fmt: skip
    monkeypatch.setattr(demo, "STUDENT", [*small_data, *short, *variants])
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert "$ python -m kd.distill --student resnet18" in said
    assert "exact posterior" in said
    assert (tmp_path / "demo" / "comparison.png").is_file()
