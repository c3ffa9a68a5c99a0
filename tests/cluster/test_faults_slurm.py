"""Every fault of the table in real SLURM jobs. After a killed rank the job goes on by itself; where a host may be at
fault it is queued again, and so it is where its supervisor dies."""

from __future__ import annotations

import pytest

from launcher.recovery import AT_ITS_HOST
from tests.cluster.slurm import Slurm
from tests.conftest import Stub
from tests.faults.cells import failure_of, names, play
from tests.faults.places import InJob

pytestmark = pytest.mark.cluster

SHORT = ("SIGKILL rank", "SIGSTOP rank")


@pytest.mark.parametrize("name", names("slurm", SHORT))
def test_slurm(name: str, stub: Stub, slurm: Slurm) -> None:
    place = InJob(stub, slurm)
    play(place, name)
    queued_again = failure_of(place)["kind"] in (*AT_ITS_HOST, "launcher lost")
    assert slurm.show(place.job)["Restarts"] == str(int(queued_again))
