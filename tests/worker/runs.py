"""Real runs for tests: a recipe small enough to train in seconds, started by the real command in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from launcher.rundir import Attempt, Run, read_lines
from launcher.sealing import files_under

SPEECHCTL = [sys.executable, "-m", "launcher.cli"]

RECIPE = """\
name: small
launch: {{processes: 2}}
data:
  corpus: {root}/corpus
  synthesize: {{train_utterances: 40, dev_utterances: 6}}
  packs: {root}/packs
  train: [train-clean-100]
backbone: {{kind: tiny-ctc, hidden: 32, layers: 1}}
max_steps: 24
batch: {{step_seconds: 24s, max_rank_seconds: 12s}}
augment: {{speed: [0.9, 1.0, 1.1]}}
optimizer: {{learning_rate: 1e-3}}
evaluate: {{subsets: [dev-clean], every_steps: 6, batch_seconds: 6s}}
checkpoint: {{every_steps: 4}}
trackers: [tensorboard]
"""


def speechctl(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*SPEECHCTL, *arguments], cwd=cwd, text=True, capture_output=True, timeout=500, check=False, **options
    )


def write_recipe(folder: Path, root: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.format(root=root))
    return path


@contextmanager
def started(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A command under way; killed with its whole family at the end if it is still there."""
    process = subprocess.Popen(
        [*SPEECHCTL, *arguments], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 200) -> Any:
    """Poll until `what()` is true; fails when the process ends first."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := what():
            return result
        if process.poll() is not None:
            raise AssertionError(f"the command ended with {process.returncode}: {process.communicate()[0]}")
        time.sleep(0.002)
    raise AssertionError("waited too long")


def kill_rank(attempt: Attempt, rank: int, number: int = signal.SIGKILL) -> None:
    os.kill(json.loads(attempt.rank(rank).read_text())["pid"], number)


def numbers(run: Run) -> dict[int, set[tuple[str, str]]]:
    """(loss, gradient norm) as hex floats, for each step, from every attempt that did it."""
    found: dict[int, set[tuple[str, str]]] = {}
    for attempt in run.attempts():
        for row in read_lines(attempt.metrics):
            pair = (float(row["loss"]).hex(), float(row["grad_norm"]).hex())
            found.setdefault(row["step"], set()).add(pair)
    return found


def events(attempt: Attempt, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(attempt.events) if e["event"] == kind]


def trained_on(run: Run) -> dict[int, list[str]]:
    """Utterances of each step that stands, over all ranks, from the ledgers; steps rolled back are left out."""
    steps: dict[int, list[str]] = {}
    for attempt in run.attempts():
        began = events(attempt, "started")
        if began:
            steps = {s: ids for s, ids in steps.items() if s <= began[0]["step"]}
        mine: dict[int, list[str]] = {}
        for path in sorted(attempt.ledger_dir.iterdir()):
            for row in read_lines(path):
                mine.setdefault(row["step"], []).extend(row["ids"])
        steps.update(mine)
    return {step: sorted(ids) for step, ids in steps.items()}


def state_digest(folder: Path) -> str:
    """Of all that a sealed checkpoint holds, by value: how a pickle refers to what it has twice is no part of it."""
    import torch

    hasher = xxhash.xxh3_128()

    def walk(value: Any) -> None:
        hasher.update(type(value).__name__.encode())
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                walk(repr(key))
                walk(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                walk(one)
        elif isinstance(value, type) or not hasattr(value, "__dict__"):
            hasher.update(repr(value).encode())
        else:
            walk(vars(value))

    for path in files_under(folder):
        walk(str(path.relative_to(folder)))
        walk(torch.load(path, weights_only=False) if path.suffix == ".pt" else path.read_bytes())
    return hasher.hexdigest()
