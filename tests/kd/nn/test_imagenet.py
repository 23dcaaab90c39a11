"""torchvision's weights that cannot be had: one line that says where they were looked for."""

from __future__ import annotations

import functools
import re
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision import models

from kd.errors import UserError
from kd.nn.segmentation import torchvision_net
from kd.nn.trunk import build_trunk
from kd.nn.weights import imagenet_weights

FILE = models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of torch, empty, and no way out: a proxy that nobody answers at."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    return tmp_path / "hub" / "checkpoints"


def test_without_a_connection_url_folder_and_remedies_are_named(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_trunk("resnet18", weights="imagenet")
    said = str(caught.value)
    assert "\n" not in said
    for part in (models.ResNet18_Weights.DEFAULT.url, f"{cache / FILE}", "refused",
                 "weights: FILE", "weights: null"):  # fmt: skip
        assert part in said, said
    with pytest.raises(UserError, match=r"of mobilenet_v3_large: .* cannot be downloaded from htt"):
        torchvision_net(3, weights="imagenet")


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=re.escape(str(cache / FILE))):
        build_trunk("resnet18", weights="imagenet")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_a_damaged_file_in_the_cache_is_to_be_removed(cache: Path, content: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(cache / FILE))} is corrupt: remove it"):
        build_trunk("resnet18", weights="imagenet")


def test_a_download_of_another_hash_is_refused_and_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Tensor] = models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18-0123abcd.pth")
    url = (tmp_path / "resnet18-0123abcd.pth").as_uri()
    fetch = functools.partial(torch.hub.load_state_dict_from_url, url)
    weights = {"DEFAULT": SimpleNamespace(url=url, get_state_dict=fetch)}
    monkeypatch.setattr(models, "get_model_weights", lambda _: weights)
    with pytest.raises(UserError, match="invalid hash value"):
        imagenet_weights("resnet18")
    assert list(cache.iterdir()) == []


def test_weights_in_the_cache_need_no_connection(cache: Path) -> None:
    state: dict[str, Tensor] = models.resnet18(weights=None).state_dict()
    cache.mkdir(parents=True)
    torch.save(state, cache / FILE)
    trunk = build_trunk("resnet18", weights="imagenet")
    assert trunk.state_dict()["conv1.weight"].equal(state["conv1.weight"])
