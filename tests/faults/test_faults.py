"""Every fault of the table on this machine: seen in time, named, and gone on from where that helps."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launcher import rundir
from tests.conftest import Stub
from tests.faults.cells import names, play
from tests.faults.places import Place


@pytest.mark.parametrize("name", names("local"))
def test_local(name: str, stub: Stub) -> None:
    play(Place(stub), name)


def test_a_stop_that_is_asked_for_is_followed_by_no_other_attempt(stub: Stub) -> None:
    """A rank dies while the others seal for a stop: the run had been asked to end, so it ends."""
    stub.behave("deaf", "deaf", patience_s=0.5)
    with stub.start(*stub.command, "launch", "stub.yaml") as process:
        stub.wait_for_ranks()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        os.kill(rundir.read_json(stub.run.attempts()[0].rank(1))["pid"], signal.SIGKILL)
        process.communicate(timeout=30)
    (attempt,) = stub.run.attempts()
    failure = rundir.read_json(attempt.failure)
    assert process.returncode == failure["code"] == 76
