"""The recipe of context terms for a detector in docs/detection.md runs, and its terms teach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from kd import distill, train_teacher
from kd.distillation.targets import LiveTeacher
from kd.nn.detectors.contract import Level
from kd.problems.detection.task import Detection
from kd.runs.load_teacher import class_names_of, load_teacher

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def shown() -> str:
    """The page's recipe, behind a dataset's file."""
    _, _, block = (ROOT / "docs" / "detection.md").read_text().split("```yaml\n")
    return block.split("```")[0]


@pytest.fixture(scope="module")
def small(small_scenes: Path) -> list[str]:
    settings = [f"data.root={small_scenes}", "data.workers=0",
                "data.generate={train: 24, val: 8, size: 64, seed: 0}", "train.epochs=1",
                "train.batch_size=8", "train.images=0", "train.precision=fp32"]  # fmt: skip
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def teacher(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's own `cnn`, of fewer channels."""
    out = tmp_path_factory.mktemp("docs") / "teacher"
    given = [*small, "--set", "teacher.options.width=4", "--set", "teacher.options.hidden=16"]
    assert train_teacher.main(["--teacher", "cnn", *given, "--out", str(out)]) == 0
    return out


def losses(run: Path) -> dict[str, float]:
    """The last value of each loss."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {entry["tag"]: entry["value"] for entry in entries}
    return {tag.removeprefix("loss/"): found[tag] for tag in found if tag.startswith("loss/")}


def test_the_page_s_recipe_runs(small: list[str], teacher: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "mine.yaml", tmp_path / "students"
    path.write_text(shown())
    weights = {term["name"]: term["weight"] for term in yaml.safe_load(shown())["losses"]}
    assert weights.keys() == {"context_features", "channel_wise"}
    command = ["--config", str(path), "--teacher", str(teacher), *small, "--out", str(out)]
    assert distill.main(command) == 0
    assert {path.parent.name for path in out.glob("seed0/*/summary.json")} == {"plain", "distilled"}
    own = {"objectness", "proposal_boxes", "classes", "boxes"}
    for variant, fractions in (("plain", dict.fromkeys(weights, 0.0)), ("distilled", weights)):
        found = losses(out / "seed0" / variant)
        assert own < found.keys() and all(found[name] > 0 for name in own)
        if variant == "distilled":
            assert weights.keys() < found.keys() and all(found[name] > 0 for name in weights)
        total = sum(fractions.get(name, 1.0) * found[name] for name in found if name != "total")
        # Steps count alike in the total, by their rings and boxes in the other means.
        assert found["total"] == pytest.approx(total, rel=1e-3)


def test_a_live_context_teacher_sees_the_objects_of_a_detector_s_batch(
    teacher: Path,
) -> None:
    """What the page warns of: around an object its features have seen it."""
    loaded = load_teacher(teacher, len(class_names_of(teacher)))
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    boxes, image_of = torch.tensor([[24.0, 24.0, 40.0, 40.0]]), torch.zeros(1, dtype=torch.int64)
    batch = {"images": images, "boxes": boxes, "image_of": image_of,
             "sizes": torch.tensor([[64, 64]])}  # fmt: skip
    other = images.clone()
    other[:, :, 24:40, 24:40] = 255 - other[:, :, 24:40, 24:40]
    hidden = {"hidden": torch.zeros(1, dtype=torch.int64), "hide_fraction": torch.ones(1)}
    around = ring_of(batch)
    with LiveTeacher(loaded.model, loaded.task, ["features.0"], posterior=False) as live:
        seen = [live({**batch, "images": one})["features.0"] for one in (images, other)]
        blind = [live({**batch, **hidden, "images": one})["features.0"] for one in (images, other)]
    assert not torch.equal(seen[0][around], seen[1][around])
    assert torch.equal(*blind)


def ring_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Places of stride 4, of every channel, within the ring of the batch's boxes."""
    task = Detection(num_classes=1, levels=(Level(4),))
    ring = task.masks(batch)["ring"]((16, 16)) > 0
    assert ring.any()
    return ring[:, None].expand(-1, 4, -1, -1)
