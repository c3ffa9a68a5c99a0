"""Every fault of the table over real ssh. A third host takes the place of one at which something failed, but where one
is cut off: there is none in its place then, and the run waits until it is back."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import Cluster
from tests.conftest import Stub
from tests.faults.cells import EVERY, FAULTS, Fault, names, play
from tests.faults.places import OverSsh

pytestmark = pytest.mark.cluster

SHORT = ("SIGKILL rank", "SIGSTOP rank", "host cut", "host power-off")


@pytest.mark.parametrize("name", names("ssh", SHORT))
def test_ssh(name: str, stub: Stub, cluster: Cluster) -> None:
    play(OverSsh(stub, cluster, spare=name != "host cut"), name)


@pytest.mark.skipif(not EVERY, reason="SPEECHCTL_TEST_FAULTS=all")
def test_a_host_that_only_the_launcher_has_lost(stub: Stub, cluster: Cluster) -> None:
    """Its ranks still reach the others, over a network of their own. All of them seal, which nobody had asked for: the
    run ended there, with exit code 75, as if a person had stopped it."""
    play(OverSsh(stub, cluster, spare=True), "host cut", Fault(strike=FAULTS["host cut"].strike))
