"""Data sections: who has a layout has label maps; mistakes are told at their places in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kd.config.datasets import Split
from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe, TeacherRecipe
from kd.errors import ConfigError, UserError
from kd.problems.detection.data import DetectionDataset
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import data_config, load_recipe, section_from
from kd.problems.saliency.schema import SaliencySection
from kd.problems.segmentation.schema import SegmentationSection
from kd.runs.build import open_data

ESPNET = find_config("distill", "espnet_c")
OF_OBJECTS = ("coco", "voc", "kitti")
PATHS = {"annotations": "a.json", "images": "a"}
MAPS: dict[str, Any] = {"layout": "camvid", "crop": (64, 64)}


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a dataset of the user's own."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def mistakes_of(*settings: str, data: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        section_of(*settings, data=data)
    return str(caught.value).splitlines()


def section_of(*settings: str, data: str | None = None) -> Any:
    path = find_config("distill", "resnet18") if data in OF_OBJECTS else ESPNET
    return load_recipe(DistillRecipe, path, data=data, settings=settings).data


def test_the_layout_chooses_the_section() -> None:
    camvid, scenes = data_config("camvid"), data_config("scenes")
    assert isinstance(camvid, SegmentationSection) and isinstance(scenes, ObjectsSection)
    assert isinstance(section_of(), SegmentationSection) and isinstance(
        section_of(data="coco"), ObjectsSection
    )
    for section in (camvid, scenes):
        assert section_from({"data": section.model_dump(mode="json")}, "run") == section
    recipe = load_recipe(TeacherRecipe, find_config("teacher", "pspnet"), data="cityscapes")
    assert isinstance(recipe.data, SegmentationSection) and recipe.data.layout == "cityscapes"
    with pytest.raises(
        UserError, match=r"^camvid: this is data of segmentation; expected .* --data scenes"
    ):
        data_config("camvid", needs="context")


def test_the_page_s_dataset_of_one_s_own_is_taken(
    own: Callable[[str], Path], tiny_coco: Callable[..., Path], tmp_path: Path
) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "detection.md").read_text()
    shown = page.split("```yaml\n")[1].split("```")[0]
    coco, root = tiny_coco(), tmp_path / "mine"
    root.mkdir()
    for split in ("train", "val"):
        (coco / "annotations" / f"instances_{split}2017.json").rename(root / f"{split}.json")
        (coco / f"{split}2017").rename(root / split)
    path = own(shown.replace("/data/mine", str(root)))
    recipe = load_recipe(
        TeacherRecipe, find_config("teacher", "retinanet_resnet50"), data=str(path)
    )
    section = recipe.data
    assert isinstance(section, ObjectsSection)
    assert (section.name, section.size, section.workers) == ("mine", 512, 4)
    assert section.scales == (0.8, 1.25)  # of photographs, as the page says
    opened = open_data(section, "detection")
    assert isinstance(opened, DetectionDataset) and opened.num_classes == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.crp=8", "data.crp: unknown key; did you mean 'crop'?"),
        ("data.min_fraction=0.1", "data.min_fraction: unknown key; known keys: name, root, "
         "workers, layout, train, val, generate, size, crop, augment"),
        ("data.label_maps=1", "data.label_maps: unknown key; known keys: name, root, workers, "
         "layout, train, val, generate, size, crop, augment"),
        ("data.size=x", "data.size: input should be a valid integer, got 'x'"),
        ("data.crop=[64]", "data.crop.1: missing key"),
        ("data.crop=64", "data.crop: input should be a valid tuple, got 64"),
        ("data.layout=camvd", "data.layout: unknown layout 'camvd'; did you mean 'camvid'? "
         "The others are ade20k, cityscapes, coco, voc2012, got 'camvd'"),
        ("data.train=3", "data.train: input should be a valid string, got 3"),
        ("data.train=[a, b]", "data.train: input should be a valid string, got ('a', 'b')"),
        ("data.val={annotations: a, images: b}",
         "data: val: layout camvid expects the name of a split"),
        ("data.val={annotations: a, images: b, imags: c}",
         "data.val.imags: unknown key; did you mean 'images'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_section_of_label_maps_is_told_at_its_place(
    setting: str, message: str
) -> None:
    assert mistakes_of(setting, data="camvid") == [f"--set {setting}: {message}"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.train.imags=b", "data.train.imags: unknown key; did you mean 'images'?"),
        ("data.generate.trian=3", "data.generate.trian: unknown key; did you mean 'train'?"),
        ("data.val=val", "data: val: layout coco expects paths of annotations and images"),
    ],
)
def test_splits_of_coco_are_paths(setting: str, message: str) -> None:
    assert mistakes_of(setting) == [f"--set {setting}: {message}"]


def test_a_data_file_without_its_layout_hears_of_it(own: Callable[[str], Path]) -> None:
    path = str(own("train: train\nval: val\ncrop: [64, 64]\n"))
    assert mistakes_of(data=path) == [f"--data {path}: data.layout: missing key"]
    path = str(own("layotu: camvid\ntrain: train\nval: val\ncrop: [64, 64]\n"))
    assert f"{path}: data.layotu: unknown key; did you mean 'layout'?" in mistakes_of(data=path)


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ("espnet_c", "coco", "coco is data of objects; task segmentation needs data of "
         "segmentation, such as --data scenes_maps"),
        ("resnet18", "camvid", "camvid is data of segmentation; task classification needs data of "
         "objects, such as --data scenes"),
        ("fcos_resnet18", "osie", "osie is data of saliency; task detection needs data of "
         "detection, such as --data scenes"),
        ("saliency_resnet18", "scenes", "scenes is data of objects; task saliency needs data of "
         "saliency, such as --data scenes_gaze"),
    ],
)  # fmt: skip
def test_data_of_another_problem_are_refused(recipe: str, data: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DistillRecipe, find_config("distill", recipe), data=data)
    assert str(caught.value) == f"--data {data}: data.name: {message}"


def test_a_dataset_of_label_maps_of_the_users_own(own: Callable[[str], Path]) -> None:
    section = data_config(str(own("layout: voc2012\ntrain: trainval\ncrop: [64, 32]\n")))
    assert isinstance(section, SegmentationSection) and section.name == "mine"
    assert (section.train, section.val, section.crop) == ("trainval", "val", (64, 32))


def test_another_split_is_a_change_to_a_dataset_and_not_a_whole_one(tmp_path: Path) -> None:
    path, named = tmp_path / "recipe.yaml", "data: {name: camvid, train: trainval}"
    path.write_text(ESPNET.read_text().replace("data: scenes_maps", named))
    data = load_recipe(DistillRecipe, path).data
    assert isinstance(data, SegmentationSection)
    assert (data.layout, data.train, data.val) == ("camvid", "trainval", "test")
    whole = "data: {name: mine, layout: camvid, crop: [64, 64]}"
    path.write_text(ESPNET.read_text().replace("data: scenes_maps", whole))
    assert load_recipe(DistillRecipe, path).data.name == "mine"


@pytest.mark.parametrize(
    ("data", "setting", "message"),
    [
        ("coco", "data.scales=[1.5, 0.5]",
         "data: scales [1.5, 0.5]: put the smaller factor first"),
        ("coco", "data.scales=[0, 1]", "data.scales.0: input should be greater than 0, got 0"),
        ("coco", "data.scales=[0.5, 11]",
         "data.scales.1: input should be less than or equal to 10, got 11"),
        ("coco", "data.scales=1", "data.scales: input should be a valid tuple, got 1"),
        ("coco", "data.scale=[1, 2]", "data.scale: unknown key; did you mean 'scales'?"),
        ("coco", "data.layout=voc", "data: train: layout voc expects the name of a split"),
        ("coco", "data.train=train2017",
         "data: train: layout coco expects paths of annotations and images"),
        ("voc", "data.layout=vic",
         "data.layout: unknown layout 'vic'; did you mean 'voc'? The others are coco, kitti, "
         "got 'vic'"),
        ("coco", "data.classes=[fox]",
         "data: classes: set one or more names, and only with layout voc"),
        ("voc", "data.classes=[]",
         "data: classes: set one or more names, and only with layout voc"),
        ("voc", "data.layuot=voc", "data.layuot: unknown key; did you mean 'layout'?"),
        ("voc", "data.val={annotations: a, images: b}",
         "data: val: layout voc expects the name of a split"),
        ("kitti", "data.val=3", "data.val: input should be a valid string, got 3"),
        ("kitti", "data.generate={train: 3}",
         "data: generate: only for the embedded scenes, not for layout kitti"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_section_of_boxes_is_told_at_its_place(
    data: str, setting: str, message: str
) -> None:
    lines = mistakes_of(setting, data=data)
    assert f"--set {setting}: {message}" in lines or f"{data}.yaml: {message}" in lines, lines


def test_boxes_of_other_layouts_are_objects(own: Callable[[str], Path]) -> None:
    voc: Any = data_config("voc")
    assert (voc.layout, voc.train, voc.scales) == ("voc", "VOC2007/trainval", (1.0, 1.0))
    assert section_from({"data": voc.model_dump(mode="json")}, "run") == voc
    mine: Any = data_config(str(own("layout: kitti\ntrain: mine\nval: all\nscales: [1, 2]\n")))
    assert (mine.train, mine.val, mine.scales) == ("mine", "all", (1.0, 2.0))
    other = section_of("data.train=VOC2012/train", data="voc")
    assert isinstance(other, ObjectsSection) and other.train == "VOC2012/train"


def test_a_recipe_may_have_a_whole_section_of_boxes_in_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = "data: {layout: kitti, train: train, val: val}"
    text = find_config("distill", "resnet18").read_text()
    assert "data: scenes\n" in text
    path.write_text(text.replace("data: scenes\n", f"{whole}\n"))
    data = load_recipe(DistillRecipe, path).data
    assert isinstance(data, ObjectsSection) and (data.layout, data.name) == ("kitti", "unnamed")


def test_splits_fit_the_layout() -> None:
    section = SegmentationSection.model_validate(MAPS)
    assert (section.train, section.val, section.size) == ("train", "val", None)
    drawn = SegmentationSection.model_validate(
        {**MAPS, "layout": "coco", "train": PATHS, "val": PATHS}
    )
    assert drawn.train == Split(annotations="a.json", images="a")
    for change, message in (
        ({"layout": "coco"}, "train: layout coco expects paths of annotations and images"),
        (
            {"layout": "coco", "train": PATHS},
            "val: layout coco expects paths of annotations and images",
        ),
        ({"val": PATHS}, "val: layout camvid expects the name of a split"),
    ):
        with pytest.raises(ValidationError, match=message):
            SegmentationSection.model_validate({**MAPS, **change})


def test_folds_are_for_objects_alone() -> None:
    path = find_config("teacher", "pspnet")
    with pytest.raises(UserError) as caught:
        load_recipe(TeacherRecipe, path, settings=["folds=3"])
    assert str(caught.value) == (
        "--set folds=3: folds: this is data of segmentation; expected data of objects, "
        "such as --data scenes"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ablations={structured: {pixel: [pixl]}}", "ablations.structured.pixel: no term pixl in "
         "losses or more_losses; there are: pixel_wise, pair_wise, holistic, channel_wise"),
        ("ablations={one: {plain: [pixel_wise]}}",
         "ablations: plain: names of built-in variants"),
        ("ablations={objects: {pixel: 3}}",
         "ablations.objects.pixel: input should be a valid tuple, got 3"),
        ("ablations={one: {pixel: [pixel_wise]}, two: {pixel: [pair_wise]}}",
         "ablations: pixel: defined in two ablations"),
        ("variants=[plain, pixl]", "variants: unknown pixl; known: plain, distilled, no_context, "
         "shuffled, output_kd, pixel, pixel_pair, all, channel"),
        ("more_losses=[{name: channel_wise, wieght: 1.0, weight: 1.0}]",
         "more_losses.0.wieght: unknown key; did you mean 'weight'?"),
    ],
)  # fmt: skip
def test_ablations_that_do_not_fit_are_refused(setting: str, message: str) -> None:
    assert mistakes_of(setting) == [f"--set {setting}: {message}"]


def test_terms_of_ablations_are_told_apart_from_those_of_the_distilled_variant() -> None:
    [line] = mistakes_of("more_losses=[{name: pixel_wise, weight: 1.0}]", "ablations={}")
    assert line.endswith("losses: pixel_wise: given twice; tell them apart by `label`")
    labelled = "more_losses=[{name: pixel_wise, label: soft, weight: 1.0}]"
    ablations = "ablations={soft: {softer: [soft, pair_wise]}}"
    settings = [labelled, "ablations={}", ablations, "variants=[plain, softer]"]
    recipe = load_recipe(DistillRecipe, ESPNET, settings=settings)
    assert [term.label for term in recipe.all_losses][-1] == "soft"
    assert recipe.terms_of("softer") == ("soft", "pair_wise")
    assert recipe.terms_of("plain") is recipe.terms_of("distilled") is None


def test_a_layout_of_fixations_chooses_their_section(own: Callable[[str], Path]) -> None:
    osie, scenes = data_config("osie"), data_config("scenes_gaze")
    assert isinstance(osie, SaliencySection) and isinstance(scenes, SaliencySection)
    for section in (osie, scenes):
        assert section_from({"data": section.model_dump(mode="json")}, "run") == section
    recipe = load_recipe(DistillRecipe, find_config("distill", "saliency_resnet18"), data="salicon")
    assert isinstance(recipe.data, SaliencySection) and recipe.data.maps == "published"
    mine = data_config(str(own("layout: mit1003\ndegree: 30.0\nsize: [64, 96]\n")))
    assert isinstance(mine, SaliencySection) and (mine.train, mine.val, mine.val_fraction) == (
        "train",
        "val",
        0.2,
    )
    with pytest.raises(UserError, match="expected data of objects, such as --data scenes"):
        data_config("osie", needs="context")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.degre=8.0", "data.degre: unknown key; did you mean 'degree'?"),
        ("data.degree=0.0", "data.degree: input should be greater than 0, got 0.0"),
        ("data.size=240", "data.size: input should be a valid tuple, got 240"),
        ("data.layout=osi", "data.layout: unknown layout 'osi'; did you mean 'osie'? "
         "The others are cat2000, mit1003, salicon, synthetic, got 'osi'"),
        ("data.val_fraction=1.0", "data.val_fraction: input should be less than 1, got 1.0"),
        ("data.maps=drawn", "data.maps: input should be 'fixations' or 'published', got 'drawn'"),
        ("data.val={annotations: a, images: b}", "data: val: layout osie expects the name of a "
         "split"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_section_of_fixations_is_told_at_its_place(
    setting: str, message: str
) -> None:
    path = find_config("distill", "saliency_resnet18")
    with pytest.raises(ConfigError) as error:
        load_recipe(DistillRecipe, path, data="osie", settings=[setting])
    assert str(error.value).splitlines() == [f"--set {setting}: {message}"]


def test_a_file_of_fixations_that_is_not_whole_hears_of_it(own: Callable[[str], Path]) -> None:
    path = str(own("degree: 8.0\nsize: [64, 64]\n"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(DistillRecipe, find_config("distill", "saliency_resnet18"), data=path)
    assert str(caught.value) == f"--data {path}: data.layout: missing key"
    with pytest.raises(
        ConfigError, match="train: layout synthetic expects paths of annotations and"
    ):
        data_config("osie", ["data.layout=synthetic"])
    with pytest.raises(ConfigError, match="maps: layout synthetic has no published maps"):
        data_config("scenes_gaze", ["data.maps=published"])
