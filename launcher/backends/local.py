"""This machine: `node.sh` is an ordinary child."""

from __future__ import annotations

import subprocess

from launcher.errors import HostError
from launcher.hosts import Host
from launcher.rundir import Attempt


def argv(attempt: Attempt, node_rank: int, host: Host) -> list[str]:
    return ["bash", str(attempt.node_script), str(node_rank)]


def start(attempt: Attempt, node_rank: int, host: Host) -> subprocess.Popen[bytes]:
    """A session of its own keeps Ctrl-C with the launcher, which asks the ranks to stop in good order.

    Raises:
        HostError: there is no bash here.
    """
    with attempt.node_log(node_rank).open("ab") as log:
        try:
            return subprocess.Popen(
                argv(attempt, node_rank, host),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(
                f"{host.name} cannot start bash: {error.strerror}", hint="install bash there, or mend PATH"
            ) from error
