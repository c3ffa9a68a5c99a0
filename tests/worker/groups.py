"""Several short runs in one process group of two ranks, without the launcher: what a launch costs, once for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher import environment, plan, recipe_file, rundir
from launcher import recipe as schema
from launcher.rundir import Attempt, Run
from launcher.worker.sampler import accumulation
from tests.conftest import own_port

ROOT = Path(__file__).parents[2]


def prepared(
    root: Path,
    name: str,
    value: schema.Backbone,
    stage: int,
    precision: str = "fp32",
    lora: dict[str, Any] | None = None,
    **evaluate: Any,
) -> Attempt:
    """A run directory as `launch` leaves it, for 5 steps with an evaluation before and after them."""
    seconds = 60 if isinstance(value, schema.Whisper | schema.WhisperCtc) else 4
    recipe = schema.Recipe.model_validate(
        {
            "name": name,
            "run_dir": root / name,
            "data": {"corpus": root, "packs": root / "packs", "train": ["train-clean-100"]},
            "backbone": value.model_dump(),
            "lora": lora,
            "zero_stage": stage,
            "precision": precision,
            "max_steps": 5,
            "batch": {"step_seconds": 2 * seconds, "max_rank_seconds": seconds / 2},
            "optimizer": {"learning_rate": 1e-3},
            "evaluate": {"subsets": ["dev-clean"], "at_start": True, "batch_seconds": seconds / 2, **evaluate},
            "checkpoint": {"every_steps": 5},
        }
    )
    run = Run(recipe.run_path)
    for folder in (run.root, run.checkpoints, run.stop_request.parent):
        folder.mkdir()
    each = accumulation(recipe.batch.step_seconds, recipe.batch.max_rank_seconds, 2)
    rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
    rundir.write_json(run.deepspeed, plan.deepspeed_config(recipe, each, 10**6))
    return run.new_attempt()


def trained_together(script: Path, attempts: Sequence[Attempt], cwd: Path) -> None:
    """Run `script` with the attempts' directories as its arguments, under torchrun, on two ranks."""
    env = {**os.environ, **environment.base_variables(2), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with own_port() as port:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=static"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [*torchrun, str(script), *(str(a.root) for a in attempts)]
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=2400)
        finally:
            if process.poll() is None:
                for left in psutil.Process(process.pid).children(recursive=True):
                    left.kill()  # ranks that hang have sessions of their own
                process.kill()
    assert process.returncode == 0, said.decode()[-6000:]
