"""How `node.sh` is started on host k. Whatever the way, the result is one process here whose standard input reaches the
node over there, and when it closes, ends its ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from launcher.backends import local, slurm, ssh
from launcher.hosts import Host
from launcher.rundir import Attempt

Start = Callable[[Attempt, int, Host], "subprocess.Popen[bytes]"]
"""(attempt, node rank, host) -> the process that stands for that node."""

BACKENDS: dict[str, Start] = {"local": local.start, "ssh": ssh.start, "slurm": slurm.start}

ARGV: dict[str, Callable[[Attempt, int, Host], list[str]]] = {"local": local.argv, "ssh": ssh.argv, "slurm": slurm.argv}
"""The same as the command that it is."""
