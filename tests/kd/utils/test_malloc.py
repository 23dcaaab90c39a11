"""Memory that is used again: asked of the system itself, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from kd.utils.malloc import keep_freed_memory

PROBE = """
import resource, sys, torch
from kd.utils.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(10):  # the heap grows by a few blocks before it holds all that are needed
    torch.ones(64 * 2**20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(64 * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def pages_touched_anew(way: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROBE, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    return int(done.stdout)


@glibc
def test_large_blocks_are_reused() -> None:
    assert pages_touched_anew("as it comes") > 0  # or there is nothing to gain, nor to test
    assert pages_touched_anew("kept") == 0


def test_user_settings_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert not keep_freed_memory()
