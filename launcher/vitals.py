"""What the ranks of this node do, looked at about once a second and told to the launcher through a file.

In a thread of its own: where the file system hangs, so does whoever writes there, and that must not be the loop which
ends the ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher import memory, rundir
from launcher.hosts import Host
from launcher.marks import END, VARIABLE, Mark, Slots
from launcher.rundir import Attempt

EVERY_S = 1.0
ANSWER_S = 2.0
"""How long a rank may take to write its stack when it is asked to. One that is stopped never does."""

STACK_LINES = 12


class Vitals:
    def __init__(self, attempt: Attempt, node_rank: int, hosts: Sequence[Host]) -> None:
        self.attempt = attempt
        self.node_rank = node_rank
        self.first_rank = sum(host.slots for host in hosts[:node_rank])
        self.count = hosts[node_rank].slots
        self.slots = Slots(self.count)
        self.variables = {VARIABLE: self.slots.path}
        self.memory = memory.Watch()
        self._wanted = threading.Event()
        self._looked = time.monotonic()
        self._beat = 0
        self._marks = [Mark(0, 0, 0, 0, "", "")] * self.count
        self._unchanged_s = [0.0] * self.count

    def follow(self) -> None:
        self._looked = time.monotonic()
        threading.Thread(target=self._follow, daemon=True).start()

    def dump(self) -> None:
        """Have every rank write its stack, soon."""
        self._wanted.set()

    def pids(self) -> set[int]:
        """The ranks that have come up."""
        return {mark.pid for k in range(self.count) if (mark := self.slots.read(k)).pid}

    def one_died(self) -> bool:
        """Whether a rank is gone that had not come to its end."""
        return any(map(self._has_died, range(self.count)))

    def _has_died(self, k: int) -> bool:
        mark = self.slots.read(k)
        if not mark.pid or mark.at == END or memory.status(mark.pid).get("State", "Z") != "Z":
            return False
        return self.slots.read(k).at != END  # or it came to its end between the two looks

    def _follow(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a disk that is full or gone is not for this thread to tell
                facts = json.dumps(self.look()).encode()
                fd = os.open(self.attempt.progress(self.node_rank), os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    rundir.write_over(fd, facts)  # emptied first, it got no room again on a disk that was full
                finally:
                    os.close(fd)
            if self._wanted.wait(EVERY_S):
                self._wanted.clear()
                with contextlib.suppress(OSError):
                    self._dump()

    def look(self) -> dict[str, Any]:
        """This node's ranks as they are now."""
        now = time.monotonic()
        # Where this process was stopped itself, as SLURM suspends a job, its ranks were too.
        elapsed = min(now - self._looked, 2 * EVERY_S)
        self._looked, self._beat = now, self._beat + 1
        ranks = []
        for k in range(self.count):
            mark = self.slots.read(k)
            self._unchanged_s[k] = 0.0 if mark.count != self._marks[k].count else self._unchanged_s[k] + elapsed
            self._marks[k] = mark
            status = memory.status(mark.pid) if mark.pid else {}
            ranks.append(
                {
                    "rank": self.first_rank + k,
                    "pid": mark.pid,
                    "phase": mark.phase or "start",
                    "step": mark.step,
                    "at": mark.at,
                    "marks": mark.count,
                    "unchanged_s": round(self._unchanged_s[k], 1),
                    "state": status.get("State"),
                    "rss": status.get("VmRSS"),
                }
            )
        return {
            "node_rank": self.node_rank,
            "beat": self._beat,
            "time": time.time(),
            "ranks": ranks,
            "memory": self.memory_facts(),
        }

    def memory_facts(self) -> dict[str, Any]:
        pids = {str(self.first_rank + k): mark.pid for k, mark in enumerate(self._marks) if mark.pid}
        return self.memory.look({"agent": os.getpid(), **pids})

    def _dump(self) -> None:
        """SIGUSR1 to our ranks, which have `faulthandler` behind it; what they were doing goes into `dumped`."""
        ours = {p.pid for p in psutil.Process().children(recursive=True)}
        ranks = [row for row in self.look()["ranks"] if row["pid"] in ours]
        for row in ranks:
            row["state"] = memory.status(row["pid"]).get("State")  # before the signal, which may wake it
            with contextlib.suppress(ProcessLookupError):
                os.kill(row["pid"], signal.SIGUSR1)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline and not all(self._text(row["rank"]) for row in ranks):
            time.sleep(0.05)
        time.sleep(0.1)  # the last lines
        for row in ranks:
            path = self.attempt.stack(row["rank"])
            row["answered"] = bool(self._text(row["rank"]))
            if not row["answered"]:
                py_spy(row["pid"], path)
            if path.exists():
                rundir.sync_file(path)
            row["stack"] = main_thread(self._text(row["rank"]))[:STACK_LINES]
        rundir.write_json(self.attempt.dumped(self.node_rank), {"ranks": ranks, "time": time.time()})

    def _text(self, rank: int) -> str:
        try:
            return self.attempt.stack(rank).read_text(errors="replace")
        except OSError:
            return ""


def py_spy(pid: int, path: Path) -> None:
    """The stack of a process that does not answer, read from outside where there is a py-spy."""
    if shutil.which("py-spy") is None:
        return
    with path.open("ab") as file, contextlib.suppress(OSError, subprocess.TimeoutExpired):
        argv = ["py-spy", "dump", "--nonblocking", "--pid", str(pid)]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=10, check=False)


def main_thread(text: str) -> list[str]:
    """The frames of the main thread, innermost first, in what faulthandler or py-spy wrote: one line each.

    faulthandler has the main thread last; py-spy names it.
    """
    parts = re.split(r"(?m)^(?=(?:Current thread|Thread) )", text)
    named = [part for part in parts if '"MainThread"' in part.partition("\n")[0]]
    return [line.strip() for line in (named or parts)[-1].splitlines()[1:] if line.strip()]
