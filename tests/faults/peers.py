"""What torchrun, `deepspeed` and `accelerate launch` make of the faults of the table that one machine can have.

    python -m tests.faults.peers [--limit 60] [--only "SIGKILL rank" ...] [--out build/faults-of-peers.json]

Two ranks on gloo sum a number ten times a second, with a timeout of 20 s on the process group (the default is 30 min).
For each cell: the exit code of the command, seconds from the fault to its end, processes left 5 s after that (ended
here by their own pids), and whether what it printed names rank 1, the culprit. What was seen once is a column of the
table; where that is different now, both are printed. The same faults on speechctl are `tests/faults/test_faults.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import count
from tests.faults.table import PEERS as RECORDED
from tests.faults.table import Seen

RANK = """\
import datetime, os, signal, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
rank, fault = dist.get_rank(), os.environ["FAULT"]
open(f"up-{rank}", "w").write(str(os.getpid()))
while True:
    dist.all_reduce(torch.ones(1))
    time.sleep(0.1)
    if rank == 1 and os.path.exists("now"):
        if fault == "exception":
            raise ValueError("boom")
        if fault == "exit 7":
            sys.exit(7)
        if fault == "crash loop":
            os.kill(os.getpid(), signal.SIGKILL)
"""

HERE = Path(sys.executable).parent
PEERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}"],
    "deepspeed": [str(HERE / "deepspeed"), "--num_accelerators=2", "--no_local_rank", "--master_port={port}"],
    "accelerate launch": [
        *(str(HERE / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port={port}"),
    ],
}
RESTARTS = {"torchrun": ["--max-restarts=3"], "accelerate launch": ["--max_restarts=3"]}
"""Options for the crash loop; `deepspeed` has none without its elastic mode."""


class Trial:
    """One peer's command with its two ranks up, in a directory of its own."""

    def __init__(self, folder: Path, peer: str, fault: str) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
            if fault == "port taken":
                free.listen()
                self.process = self._start(peer, fault)
                self.began = time.monotonic()
                self._wait()
                return
        if fault == "crash loop":
            (folder / "now").touch()
        self.process = self._start(peer, fault)
        deadline = time.monotonic() + 120
        while not all((folder / f"up-{k}").exists() for k in (0, 1)):
            assert time.monotonic() < deadline and self.process.poll() is None, "the ranks did not come up"
            time.sleep(0.05)
        time.sleep(1)

    def _start(self, peer: str, fault: str) -> subprocess.Popen[bytes]:
        options = RESTARTS.get(peer, []) if fault == "crash loop" else []
        argv = [word.format(port=self.port) for word in PEERS[peer]] + options + ["rank.py"]
        # A family is known by this directory, also where its launcher is gone.
        env = {**os.environ, "FAULT": fault, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(argv, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True)

    def _wait(self, limit_s: float = 60) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(limit_s)

    def family(self) -> list[psutil.Process]:
        """Every process whose working directory is this trial's."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, number: int) -> int:
        return int((self.folder / f"up-{number}").read_text())

    def agent(self) -> int:
        """The parent of the ranks: torchrun itself, or what `deepspeed` started."""
        return psutil.Process(self.rank(1)).ppid()


def touch(trial: Trial) -> None:
    (trial.folder / "now").touch()


FAULTS: dict[str, Callable[[Trial], None]] = {
    "exception": touch,
    "exit 7": touch,
    "SIGKILL rank": lambda trial: os.kill(trial.rank(1), signal.SIGKILL),
    "SIGKILL node agent": lambda trial: os.kill(trial.agent(), signal.SIGKILL),
    "SIGKILL launcher": lambda trial: trial.process.kill(),
    "SIGSTOP rank": lambda trial: os.kill(trial.rank(1), signal.SIGSTOP),
    "port taken": lambda trial: None,
    "crash loop": lambda trial: None,
}


def cell(peer: str, fault: str, limit_s: float) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder).resolve(), peer, fault)
        try:
            began = getattr(trial, "began", time.monotonic())
            FAULTS[fault](trial)
            trial._wait(limit_s)
            seconds = time.monotonic() - began
            exit_code = trial.process.poll()
            time.sleep(5)
            left = len(trial.family()) if exit_code is not None else 0
            text = (trial.folder / "log").read_text(errors="replace")
            named = re.search(r"(?i)\brank\s*[:=]?\s*1\b|\[rank1\]", text) is not None
            return Seen(exit_code, round(seconds), left, named)
        finally:
            for process in trial.family():
                with suppress(psutil.Error):
                    process.kill()
            trial.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a command is taken for hung")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="some faults")
    parser.add_argument("--out", type=Path, default=Path("build/faults-of-peers.json"))
    options = parser.parse_args()
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for fault in options.only:
        for peer in PEERS:
            seen = cell(peer, fault, options.limit)
            table.setdefault(fault, {})[peer] = asdict(seen)
            print(f"{fault:<20} {peer:<18} {compared(seen, RECORDED[fault][peer])}", flush=True)
            count("cells", 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def compared(seen: Seen, recorded: Seen) -> str:
    """Both, unless they differ in nothing but the time."""
    same = replace(seen, after_s=recorded.after_s) == recorded
    return in_words(seen) + ("" if same else f"   (recorded: {in_words(recorded)})")


def in_words(seen: Seen) -> str:
    if seen.exit is None:
        return f"hangs (> {seen.after_s} s)"
    named = "named" if seen.named else "not named"
    return f"exit {seen.exit}, {seen.after_s} s, {seen.left} left, {named}"


if __name__ == "__main__":
    sys.exit(main())
