"""The first Ctrl-C is noted, the second ends; plain lines where there is no terminal."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from kd.engine.checkpoint import Progress
from kd.engine.progress import CleanStop, ProgressBar


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with CleanStop() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_plain_lines_say_the_last_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kd"), ProgressBar("run", 3, 0) as advance:
        for step in (1, 2, 3):
            advance(Progress(step=step), 3)
    assert caplog.messages == ["run: step 3 of 3"]


def test_other_ranks_stay_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kd"):
        with ProgressBar("run", 1, 0, enabled=False) as advance:
            advance(Progress(step=1), 1)
    assert caplog.messages == []
