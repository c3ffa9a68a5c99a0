"""Trains one recipe at ZeRO 0, 1, 2 and 3 in one process group. Run alone it is the launcher; under torchrun, a rank.

Usage: stages.py RECIPE [--set KEY=VALUE …]; leaves the runs `stage-0` … `stage-3` in the working directory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from launcher import hosts, plan, recipe_file, rundir, supervise
from launcher.rundir import Attempt, Run


def prepare(recipe: str, overrides: list[str]) -> list[Attempt]:
    attempts = []
    for stage in range(4):
        sets = [*overrides, f"zero_stage={stage}", f"run_dir=stage-{stage}"]
        value = recipe_file.absolute(recipe_file.load(Path(recipe), sets), Path.cwd())
        facts = {"accumulation": 1, "parameters": 1, "trained_parameters": 1, "steps_per_epoch": 1}
        facts |= {
            "utterances": 40,
            "evaluation_utterances": 6,
            "padding": 0,
            "straggler": 1,
            "audio_s": 0,
            "left_out": 0,
        }
        made = plan.make(value, hosts.local(2, 0), facts)
        run = Run(value.run_path)
        for folder in (run.root, run.checkpoints, run.stop_request.parent):
            folder.mkdir()
        rundir.write_bytes(run.resolved, recipe_file.dump(value).encode())
        rundir.write_json(run.plan, made.to_json())
        rundir.write_json(run.deepspeed, made.deepspeed)
        attempts.append(supervise.prepare_attempt(run, value.launch, made, fresh=False))
    return attempts


def launcher(recipe: str, overrides: list[str]) -> int:
    attempts = prepare(recipe, overrides)
    env = rundir.read_json(attempts[0].env)["variables"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=static"]
    where = ["--master-addr=127.0.0.1", f"--master-port={port}", __file__, *(str(a.root) for a in attempts)]
    return subprocess.run([*torchrun, *where], env=env, check=False).returncode


def rank(attempts: list[str], last: bool = True) -> int:
    from launcher.worker import train
    from launcher.worker.ranks import Ranks

    close, Ranks.close = Ranks.close, Ranks.barrier  # type: ignore[method-assign]
    for attempt in attempts:
        training = train.Training(Attempt(Path(attempt)), [False], fresh=False)
        training.go()
    Ranks.close = close  # type: ignore[method-assign]
    if last:
        close(training.ranks)
    return 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(rank(sys.argv[1:]))
    sys.exit(launcher(sys.argv[1], [o for o in sys.argv[2:] if o != "--set"]))
