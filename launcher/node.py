"""On each node: starts torchrun with this attempt's ranks, ends every rank when told or left alone, reports.

`python -m launcher.node ATTEMPT_DIR NODE_RANK`, started by the attempt's `node.sh`. Values come from files; nothing is
spliced into a shell. It ends its ranks when its standard input closes, which is how it notices that the launcher is
gone; gently first, so that they can seal their work.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from launcher import rundir
from launcher.errors import HostError
from launcher.rundir import Attempt

WORKER = "launcher.worker"
"""The only name by which the control side knows the worker."""

NODE_SCRIPT = """\
#!/usr/bin/env bash
# Starts this attempt's ranks on one node. Argument: the rank of the node, from 0.
set -euo pipefail
attempt=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONSAFEPATH=1  # a folder called launcher where we stand is not ours
exec "$(cat "$attempt/interpreter")" -m launcher.node "$attempt" "$1"
"""


def torchrun_argv(
    python: str, hosts: list[dict[str, Any]], node_rank: int, meeting: dict[str, Any], attempt: Path
) -> list[str]:
    """torchrun with a static rendezvous and no restarts: a dynamic one runs the code of whoever reaches its port."""
    return [
        *(python, "-m", "torch.distributed.run"),
        f"--nnodes={len(hosts)}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={hosts[node_rank]['slots']}",
        "--rdzv-backend=static",
        f"--rdzv-id={meeting['id']}",
        f"--master-addr={meeting['address']}",
        f"--master-port={meeting['port']}",
        "--max-restarts=0",
        *("-m", WORKER, "train", str(attempt)),
    ]


class Node:
    """The ranks of one attempt on this machine."""

    def __init__(self, attempt: Attempt, node_rank: int) -> None:
        self.attempt = attempt
        self.node_rank = node_rank
        self.env: dict[str, Any] = rundir.read_json(attempt.env)
        self.hosts: list[dict[str, Any]] = rundir.read_json(attempt.hosts)
        self.told_to_kill = False
        self.asked: str | None = None
        """Why the ranks were asked to end, where they were."""
        self.killed: str | None = None
        """Why this process killed them, where it did."""
        self.told: set[int] = set()

    def meet(self) -> dict[str, Any]:
        """Where the ranks find each other: picked and published by the head node, awaited by the others."""
        if self.node_rank == 0:
            with socket.socket() as free:
                free.bind((self.env["address"], 0))
                port = free.getsockname()[1]
            meeting = {"address": self.env["address"], "port": port, "id": self.env["rendezvous_id"]}
            rundir.write_json(self.attempt.rendezvous, meeting, mode=0o600)
            return meeting
        deadline = time.monotonic() + self.env["rendezvous_timeout_s"]
        while time.monotonic() < deadline and not self.told_to_kill:
            # By listing: NFS answers from cached attributes when it is asked for one name.
            if self.attempt.rendezvous.name in os.listdir(self.attempt.root):
                return dict(rundir.read_json(self.attempt.rendezvous))
            time.sleep(0.2)
        raise HostError(f"node {self.node_rank} found no {self.attempt.rendezvous}", hint="look at the head node's log")

    def run(self) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told_to_kill", True))
        adopt_orphans()
        argv = torchrun_argv(sys.executable, self.hosts, self.node_rank, self.meet(), self.attempt.root)
        if self.env["fresh"]:
            argv.append("--fresh")
        with self.attempt.node_log(self.node_rank).open("ab") as log:
            torchrun = subprocess.Popen(
                argv,
                env=self.env["variables"],
                cwd=self.attempt.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        returncode = self._watch(torchrun)
        kill_family()  # whatever outlived torchrun
        rundir.write_json(
            self.attempt.node(self.node_rank),
            {
                "node_rank": self.node_rank,
                "host": socket.gethostname(),
                "returncode": returncode,
                "asked": self.asked,
                "killed": self.killed,
                "time": time.time(),
            },
        )
        return 0 if returncode == 0 else 1

    def _watch(self, torchrun: subprocess.Popen[bytes]) -> int:
        alone, deadline = False, math.inf
        grace_s = self.env["stop_grace_s"]
        while torchrun.poll() is None:
            if alone:
                time.sleep(0.2)
                self._ask_ranks(torchrun)
            elif _closed(sys.stdin.fileno(), timeout_s=0.2):
                alone, self.asked, deadline = True, "the launcher went away", time.monotonic() + grace_s
            elif self.asked is None and self.attempt.run.stop_request.exists():
                self.asked, deadline = "a stop was asked for", time.monotonic() + grace_s
            if time.monotonic() > deadline:
                self.killed = f"{self.asked}, and launch.stop_grace, {grace_s:g} s, was over"
            elif self.told_to_kill:
                self.killed = "the launcher was told to end at once"
            if self.killed is not None:
                kill_family()
                break
        return torchrun.wait()

    def _ask_ranks(self, torchrun: subprocess.Popen[bytes]) -> None:
        """SIGTERM to every rank, once: they have sessions of their own, so a signal to torchrun's group would miss
        them. Called again and again, because torchrun may still be starting some."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(torchrun.pid).children():
                if rank.pid not in self.told:
                    self.told.add(rank.pid)
                    rank.terminate()


def _closed(fd: int, timeout_s: float) -> bool:
    """Whether the other end of `fd` is gone. Nothing is ever sent on it."""
    readable, _, _ = select.select([fd], [], [], timeout_s)
    return bool(readable) and os.read(fd, 4096) == b""


def adopt_orphans() -> None:
    """Have a process below this one become its child when its own parent dies, so that `kill_family` still finds it."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def kill_family() -> None:
    """SIGKILL to all processes below this one, until there are none: one of them may be starting another."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        family = psutil.Process().children(recursive=True)
        living = [p for p in family if _is_running(p)]
        if not living:
            return
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, whatever kills the parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(Node(Attempt(Path(sys.argv[1])), int(sys.argv[2])).run())
