"""Stands in for a rank: the worker's own door, signals, log and failure records, with this file's training behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

from launcher import rundir
from launcher.errors import DataError, ExitCode
from launcher.rundir import Attempt
from launcher.worker import __main__ as worker

RANK = int(os.environ["RANK"])


def run(root: Path, stop_flag: list[bool], fresh: bool) -> None:
    attempt = Attempt(root)
    behaviour, _, number = os.environ["STUB_BEHAVIOUR"].partition(" ")
    if behaviour == "raise":
        time.sleep(float(number or 0))
        raise ValueError(f"boom of rank {RANK}")
    if behaviour == "data":
        time.sleep(float(number or 0))
        raise DataError("shard 3 has changed", hint="pack it again")
    if behaviour == "kill":
        time.sleep(float(number or 0))
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "lost":
        while not any(attempt.failures.iterdir()) and not stop_flag[0]:
            time.sleep(0.01)
        raise RuntimeError("Connection closed by peer")
    if behaviour == "child":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        rundir.write_json(root / "child.json", {"pid": child.pid})
    seal_s = 1.5 if behaviour == "slow" else 0.1  # the others see the request too
    train(attempt, stop_flag, steps=int(number or 10**9), deaf=behaviour == "deaf", seal_s=seal_s)


def train(attempt: Attempt, stop_flag: list[bool], steps: int, deaf: bool, seal_s: float) -> None:
    """Fifty steps a second, until asked to stop."""
    rows = {"world_size": int(os.environ["WORLD_SIZE"]), "utterances": 12, "max_steps": 50, "left_out": {}}
    if RANK == 0:
        rundir.append_line(attempt.events, {"event": "started", "time": time.time(), "step": 0, **rows})
    step, stop = 0, False
    while step < steps and not stop:
        step += 1
        time.sleep(0.02)
        if RANK == 0:
            metrics = {"step": step, "epoch": 0, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3}
            more = {"audio_s": 10.0, "step_s": 0.02, "time": time.time()}
            rundir.append_line(attempt.metrics, {**metrics, **more})
        stop = not deaf and (stop_flag[0] or attempt.run.stop_request.exists())
    time.sleep(seal_s)
    if RANK == 0:
        code = ExitCode.STOPPED if stop else ExitCode.FINISHED
        rundir.write_json(attempt.exit, {"code": code, "step": step, "sealed_step": step})


if __name__ == "__main__":
    module = ModuleType("launcher.worker.train")
    module.__dict__["run"] = run
    sys.modules["launcher.worker.train"] = module
    sys.exit(worker.main(["train", sys.argv[1]]))
