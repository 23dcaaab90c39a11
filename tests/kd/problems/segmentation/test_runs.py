"""Teachers and students of label maps through the commands: the embedded scenes, tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd import cache, distill, train_teacher
from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.engine.loop import forward_losses
from kd.errors import UserError
from kd.experiments.distillation import Distillation
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, open_data
from kd.utils.images import VOID

pytestmark = pytest.mark.slow

TRAIN = "train={epochs: 1, batch_size: 8, images: 0, precision: fp32, evaluate_every: 0}"
VARIANTS = ("plain", "pixel", "pixel_pair", "all", "channel")
# Maps of 8 x 8 places are too small for the critic's four halvings.
SMALL = (
    "losses=[{name: pixel_wise, weight: 10.0}, {name: pair_wise, weight: 10.0, student: norm3, "
    "teacher: pyramid}, {name: holistic, weight: 0.1, options: {widths: [8, 8]}}]"
)


@pytest.fixture(scope="session")
def maps(small_scenes: Path) -> list[str]:
    """`--set` texts that replace a recipe's data by label maps of the small scenes."""
    return [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.size=64",
        "data.crop=[64, 64]",
        "data.workers=0",
        TRAIN,
    ]


@pytest.fixture(scope="session")
def mapped_teacher(maps: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PSPNet trained for three steps."""
    out = tmp_path_factory.mktemp("maps") / "teacher"
    options = "teacher.options={trunk: resnet18, width: 0.25, head: 16}"
    given = flags([*maps, options, "task.weights={cross_entropy: 1.0, auxiliary: 0.4}"])
    assert train_teacher.main(["--teacher", "pspnet", *given, "--out", str(out)]) == 0
    return out


def flags(settings: list[str]) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


def distillation(maps: list[str], teacher: Path, *settings: str) -> Distillation:
    recipe = load_recipe(
        DistillRecipe,
        find_config("distill", "espnet_c"),
        settings=[*maps, SMALL, f"teacher.run={teacher}", *settings],
    )
    out = teacher.parent / "students"
    return Distillation(recipe, open_data(recipe.data), make_accelerator("fp32"), out)


def start(variants: Distillation, variant: str) -> dict[str, Tensor]:
    model, _ = variants.assemble(variant, 0, variants.samples(variant, 0))
    return model.state_dict()


def test_an_ablation_trains_each_of_its_variants_and_the_plain_twin(
    maps: list[str], mapped_teacher: Path, tmp_path: Path
) -> None:
    given = [*flags([*maps, SMALL, "seeds=[0]"]), "--teacher", str(mapped_teacher)]
    out = tmp_path / "students"
    command = ["--student", "espnet_c", "--ablation", "structured", *given, "--out", str(out)]
    assert distill.main(command) == 0
    assert {path.parent.name for path in out.glob("seed0/*/summary.json")} == set(VARIANTS)
    terms = {
        variant: {
            line.split('"loss/')[1].split('"')[0]
            for line in (out / "seed0" / variant / "metrics.jsonl").read_text().splitlines()
            if '"loss/' in line
        }
        for variant in VARIANTS
    }
    assert terms["plain"] == {"cross_entropy", "total"}
    assert terms["pixel_pair"] == {"cross_entropy", "pixel_wise", "pair_wise", "total"}
    assert terms["all"] == terms["pixel_pair"] | {"holistic", "holistic_critic"}
    assert terms["channel"] == {"cross_entropy", "channel_wise", "total"}


def test_an_unknown_ablation_names_those_of_the_recipe(maps: list[str]) -> None:
    with pytest.raises(UserError, match="unknown ablation of this recipe"):
        distill.main(["--student", "espnet_c", "--ablation", "struct", *flags(maps)])


def test_all_variants_have_the_same_weights_and_see_the_same_pixels(
    maps: list[str], mapped_teacher: Path
) -> None:
    variants = distillation(maps, mapped_teacher, "variants=[plain, all, channel]")
    plain = start(variants, "plain")
    for variant in ("all", "channel"):
        other = start(variants, variant)
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    samples = [variants.samples(variant, 0)[2, 5] for variant in ("plain", "all", "channel")]
    for other in samples[1:]:
        assert all(torch.equal(samples[0][name], other[name]) for name in samples[0])
    assert {name for name in samples[1] if name.startswith("stored.")} == {
        "stored.logits",
        "stored.pyramid",
    }
    assert [name for name in samples[2] if name.startswith("stored.")] == ["stored.logits"]


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_stored_and_live_teachers_teach_alike(
    maps: list[str], mapped_teacher: Path, kind: str
) -> None:
    still = "data.augment={scale: [1.0, 1.0], flip: 0.0, jitter: 0.0}"
    variants = distillation(
        maps, mapped_teacher, "variants=[distilled]", still, f"soft_targets.kind={kind}",
        "soft_targets.dtype=float32",
    )  # fmt: skip
    dataset = variants.samples("distilled", 0)
    model, objective = variants.assemble("distilled", 0, dataset)
    with torch.no_grad():
        losses = forward_losses(model.eval(), variants.first_batch(dataset), objective)
    live = distillation(
        maps, mapped_teacher, "variants=[distilled]", still, "soft_targets.kind=live"
    )
    model, objective = live.assemble("distilled", 0, dataset)
    with torch.no_grad():
        expected = forward_losses(model.eval(), live.first_batch(dataset), objective)
    for name in ("cross_entropy", "pixel_wise", "pair_wise"):
        torch.testing.assert_close(losses[name].value, expected[name].value, rtol=1e-4, atol=1e-5)


def test_stored_maps_of_mirrored_images_are_what_a_live_teacher_says_of_them(
    maps: list[str], mapped_teacher: Path
) -> None:
    turned = "data.augment={scale: [1.0, 1.0], flip: 1.0, jitter: 0.0}"

    def losses_of(*settings: str) -> list[float]:
        variants = distillation(maps, mapped_teacher, "variants=[distilled]", turned, *settings)
        dataset = variants.samples("distilled", 0)
        model, objective = variants.assemble("distilled", 0, dataset)
        with torch.no_grad():
            losses = forward_losses(model.eval(), variants.first_batch(dataset), objective)
        return [float(losses[name].value) for name in ("pixel_wise", "pair_wise")]

    live = losses_of("soft_targets.kind=live")
    both_sides = losses_of("soft_targets.dtype=float32", "soft_targets.mirrored=true")
    assert both_sides == pytest.approx(live, rel=1e-4)
    # Without, the map is only turned round, which no network with strides follows.
    one_side = losses_of("soft_targets.dtype=float32")
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(one_side, live, strict=True))


def test_score_maps_may_be_finer_than_layers(maps: list[str], mapped_teacher: Path) -> None:
    variants = distillation(
        maps, mapped_teacher, "variants=[distilled]", "soft_targets.score_stride=2"
    )
    dataset = variants.samples("distilled", 0)
    sample = dataset[0, 0]
    height, width = sample["images"].shape[1:]
    assert sample["stored.logits"].shape[2:] == (height // 2, width // 2)
    assert sample["stored.pyramid"].shape[2:] == (height // 8, width // 8)
    model, objective = variants.assemble("distilled", 0, dataset)
    losses = forward_losses(model.eval(), variants.first_batch(dataset), objective)
    assert losses["pixel_wise"].value > 0 and losses["pair_wise"].value > 0


def test_void_reaches_no_loss(maps: list[str], mapped_teacher: Path) -> None:
    variants = distillation(maps, mapped_teacher, "variants=[distilled]")
    dataset = variants.samples("distilled", 0)
    model, objective = variants.assemble("distilled", 0, dataset)
    batch = variants.first_batch(dataset)
    batch["label_maps"] = torch.full_like(batch["label_maps"], VOID)
    losses = forward_losses(model.eval(), batch, objective)
    for name in ("cross_entropy", "pixel_wise", "pair_wise"):
        assert losses[name].value == 0
    total = torch.stack([loss.value for loss in losses.values()]).sum()
    total.backward()
    learned = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(not gradient.any() for gradient in learned)


def test_a_teacher_of_the_context_of_objects_teaches_by_its_layers(
    maps: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    settings = [
        *maps,
        "data.size=32",
        "data.crop=[32, 32]",
        "losses=[{name: pair_wise, weight: 1.0, student: norm3, teacher: features.2}]",
        "ablations={}",
        "variants=[plain, distilled]",
        "seeds=[0]",
        f"soft_targets.cache={tmp_path / 'kept'}",  # the teacher is shared by other tests
    ]
    given = [*flags(settings), "--teacher", str(small_teacher), "--out", str(tmp_path / "run")]
    assert distill.main(["--student", "espnet_c", *given]) == 0
    curves = (tmp_path / "run" / "seed0" / "distilled" / "metrics.jsonl").read_text()
    assert "loss/pair_wise" in curves


def test_maps_of_images_are_kept_ahead_of_training(
    maps: list[str], mapped_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [text for text in maps if text.startswith("data.")]
    command = ["--teacher", str(mapped_teacher), "--data", "scenes_maps", *flags(data)]
    assert cache.main([*command, "--layers", "pyramid", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "logits: 24 images" in said and "pyramid: 24 images" in said


def test_layers_of_a_teacher_of_objects_are_kept_ahead_of_training_too(
    maps: list[str], small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [text for text in maps if text.startswith("data.")]
    command = ["--teacher", str(small_teacher), "--data", "scenes_maps", *flags(data)]
    layers = ["--only-layers", "--layers", "features.2", "--in-fold", "--out", str(tmp_path)]
    assert cache.main([*command, *layers]) == 0
    assert "features.2: 24 images" in capsys.readouterr().out


def test_controls_of_object_students_are_refused(maps: list[str], mapped_teacher: Path) -> None:
    with pytest.raises(
        UserError, match="variants: no_context, shuffled: only for students that classify objects"
    ):
        distillation(maps, mapped_teacher, "variants=[plain, no_context, shuffled]")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("output_kd", "needs hidden objects, which these data do not have"),
        ("decoupled", "needs hidden objects, which these data do not have"),
        ("context_features", "needs the mask 'ring'; Segmentation has valid, class_weights"),
    ],
)
def test_terms_about_hidden_objects_are_refused(
    maps: list[str], mapped_teacher: Path, name: str, message: str
) -> None:
    layers = "student: norm3, teacher: pyramid, " if name == "context_features" else ""
    losses = f"losses=[{{name: {name}, {layers}weight: 1.0}}]"
    with pytest.raises(UserError, match=f"losses: {name}: {message}"):
        distillation([*maps, losses], mapped_teacher, losses, "ablations={}")


def test_a_weighted_divergence_needs_weights_of_classes(
    maps: list[str], mapped_teacher: Path
) -> None:
    losses = "losses=[{name: pixel_wise_weighted, weight: 1.0}]"
    with pytest.raises(
        UserError, match=r"pixel_wise_weighted: classes have no weights; use pixel_"
    ):
        distillation([*maps, losses], mapped_teacher, losses, "ablations={}")


def test_a_task_says_which_kind_of_data_it_is_for(maps: list[str], small_scenes: Path) -> None:
    objects = flags([text for text in maps if not text.startswith(("data.crop", "train"))])
    with pytest.raises(UserError, match=r"scenes is data of objects; .* of segmentation, such as"):
        distill.main(["--student", "espnet_c", "--data", "scenes", *objects])
    with pytest.raises(UserError, match=r"scenes_maps is data of segmentation; .* of objects"):
        distill.main(["--student", "resnet18", "--data", "scenes_maps", *objects])


def test_a_classifier_is_no_segmentation_student(maps: list[str], mapped_teacher: Path) -> None:
    with pytest.raises(UserError, match="student 'resnet18' is for objects, not segmentation"):
        distillation(maps, mapped_teacher, "student={name: resnet18}").check()


def test_folds_are_of_objects(maps: list[str]) -> None:
    with pytest.raises(
        UserError, match="folds: this is data of segmentation; expected data of objects"
    ):
        train_teacher.main(["--teacher", "pspnet", *flags([*maps, "folds=2"])])


def test_one_image_at_a_time_is_too_few_for_a_pyramid(
    maps: list[str], mapped_teacher: Path
) -> None:
    student = "student={name: pspnet, options: {width: 0.25, head: 8}}"
    one = "train={epochs: 1, batch_size: 2, accumulate: 2, precision: fp32}"
    variants = distillation(
        maps, mapped_teacher, "variants=[plain]", student, one, "task.weights.auxiliary=0.4"
    )
    with pytest.raises(UserError, match=r"at least 2 images per process and micro-batch, got 1"):
        variants.check()
