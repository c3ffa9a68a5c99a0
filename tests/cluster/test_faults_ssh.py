"""Every fault of the table over real ssh. A third host takes the place of one at which something failed, but where one
is cut off: there is none in its place then, and the run waits until it is back."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import Cluster
from tests.conftest import Stub
from tests.faults.cells import names, play
from tests.faults.places import OverSsh

pytestmark = pytest.mark.cluster

SHORT = ("SIGKILL rank", "SIGSTOP rank", "host cut", "host power-off")


@pytest.mark.parametrize("name", names("ssh", SHORT))
def test_ssh(name: str, stub: Stub, cluster: Cluster) -> None:
    play(OverSsh(stub, cluster, spare=name != "host cut"), name)
