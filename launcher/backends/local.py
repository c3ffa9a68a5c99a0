"""This machine: `node.sh` is an ordinary child."""

from __future__ import annotations

import subprocess

from launcher.hosts import Host
from launcher.rundir import Attempt


def start(attempt: Attempt, node_rank: int, host: Host) -> subprocess.Popen[bytes]:
    """A session of its own keeps Ctrl-C with the launcher, which asks the ranks to stop in good order."""
    log = attempt.node_log(node_rank).open("ab")
    with log:
        return subprocess.Popen(
            ["bash", str(attempt.node_script), str(node_rank)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
