"""On each node: starts torchrun with this attempt's ranks, ends every rank when told or left alone, reports.

`python -m launcher.node ATTEMPT_DIR NODE_RANK`, started by the attempt's `node.sh`. Values come from files; nothing is
spliced into a shell. It ends its ranks when its standard input closes, which is how it notices that the launcher is
gone; gently first, so that they can seal their work.
"""

from __future__ import annotations

import contextlib
import ctypes
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
        self.ended_by = "itself"

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
        while time.monotonic() < deadline:
            # By listing: NFS answers from cached attributes when it is asked for one name.
            if self.attempt.rendezvous.name in os.listdir(self.attempt.root):
                return dict(rundir.read_json(self.attempt.rendezvous))
            time.sleep(0.2)
        raise HostError(f"node {self.node_rank} found no {self.attempt.rendezvous}", hint="look at the head node's log")

    def run(self) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told_to_kill", True))
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
        rundir.write_json(
            self.attempt.node(self.node_rank),
            {
                "node_rank": self.node_rank,
                "host": socket.gethostname(),
                "returncode": returncode,
                "ended_by": self.ended_by,
                "time": time.time(),
            },
        )
        return 0 if returncode == 0 else 1

    def _watch(self, torchrun: subprocess.Popen[bytes]) -> int:
        asked_at: float | None = None
        listening = True
        while torchrun.poll() is None:
            if listening and _closed(sys.stdin.fileno(), timeout_s=0.2):
                listening, self.ended_by = False, "a launcher that went away"
                self._signal_ranks(torchrun, signal.SIGTERM)
                asked_at = time.monotonic()
            elif not listening:
                time.sleep(0.2)
            if asked_at is None and self.attempt.run.stop_request.exists():
                asked_at, self.ended_by = time.monotonic(), "a request to stop"
            late = asked_at is not None and time.monotonic() - asked_at > self.env["stop_grace_s"]
            if self.told_to_kill or late:
                self.ended_by += ", then killed" if late else ", killed"
                self._signal_ranks(torchrun, signal.SIGKILL)
                torchrun.kill()
                break
        return torchrun.wait()

    def _signal_ranks(self, torchrun: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Ranks have sessions of their own, so a signal to torchrun's group would miss them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(torchrun.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)


def _closed(fd: int, timeout_s: float) -> bool:
    """Whether the other end of `fd` is gone. Nothing is ever sent on it."""
    readable, _, _ = select.select([fd], [], [], timeout_s)
    return bool(readable) and os.read(fd, 4096) == b""


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(Node(Attempt(Path(sys.argv[1])), int(sys.argv[2])).run())
