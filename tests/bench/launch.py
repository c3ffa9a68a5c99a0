"""Seconds from a command to the end of its first training step: `speechctl launch` beside a bare torchrun script that
imports the same, builds the same model and engine, and makes one step of the same shape; interleaved, in one run.

    python -m tests.bench.launch [--runs 5] [--ssh] [--slurm] [--out build/launch.json]

`--ssh` and `--slurm` start hosts in network namespaces, as the tests do (root, and the Debian packages), and run the
same two ranks on two of them. Clocks are one machine's. Fails where local is above 1.3 times the bare script, or where
another backend is more than 3 s above local.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.rundir import Run, read_lines
from tests.worker.runs import SPEECHCTL, speechctl, write_recipe

BARE = """\
import sys, time
from pathlib import Path
import numpy as np
import deepspeed
from launcher import recipe_file
from launcher.worker import train
from launcher.worker.engine_deepspeed import DeepSpeedEngine
from launcher.worker.models import build
from launcher.worker.ranks import Ranks
import json

recipe = recipe_file.load(Path(sys.argv[1]))
ranks = Ranks()
model = build(recipe.backbone, seed=recipe.seed)
engine = DeepSpeedEngine(model, recipe, json.loads(Path(sys.argv[2]).read_text()), ranks)
ranks.connect()
sound = [np.zeros(16000, dtype="float32")] * 4
engine.backward(model.collate(sound, ["A"] * 4), 1.0, last=True)
engine.step(1e-3)
if ranks.rank == 0:
    print(time.time())
ranks.close()
"""

SMALL = ["--set", "max_steps=1", "--set", "evaluate.at_end=false", "--set", "trackers=[]"]


def cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def first_step(root: Path) -> float:
    """When rank 0 wrote the first line of its metrics, by its own clock."""
    return float(read_lines(Run(root).attempts()[0].metrics)[0]["time"])


class Bench:
    """The ways to a first step, each a function that returns (seconds to the first step, CPU seconds in all)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder, folder)
        self.count = 0
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = speechctl("pack", str(self.recipe), cwd=folder)
        assert done.returncode == 0, done.stderr
        os.environ["XDG_CACHE_HOME"] = self.env["XDG_CACHE_HOME"] = str(folder / "cache")
        began = time.time()
        done = speechctl("launch", str(self.recipe), *SMALL, "--set", f"run_dir={folder}/first", cwd=folder)
        assert done.returncode == 0, done.stderr
        self.cold_s = first_step(folder / "first") - began
        """The very first launch of these packs and this model, which asks the worker for facts."""
        (folder / "bare.py").write_text(BARE)

    def bare(self) -> tuple[float, float]:
        run = Run(self.folder / "first")
        variables = json.loads(run.attempts()[0].env.read_text())["variables"]
        argv = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(self.folder / "bare.py"), str(run.resolved), str(run.deepspeed)),
        ]
        began, cpu = time.time(), cpu_s()
        done = subprocess.run(
            argv, env={**self.env, **variables, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1]) - began, cpu_s() - cpu

    def launched(
        self, *options: str, prefix: Callable[..., list[str]] = lambda *words: list(words)
    ) -> tuple[float, float]:
        self.count += 1
        root = self.folder / f"run-{self.count}"
        argv = [*SPEECHCTL, "launch", str(self.recipe), *SMALL, "--set", f"run_dir={root}", *options]
        began, cpu = time.time(), cpu_s()
        done = subprocess.run(prefix(*argv), cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 60
        while not (Run(root).attempts() and Run(root).attempts()[0].exit.exists()):  # a submitted job goes on
            assert time.monotonic() < deadline, "the job did not finish"
            time.sleep(0.05)
        return first_step(root) - began, cpu_s() - cpu


@contextmanager
def ways(bench: Bench, ssh: bool, slurm: bool) -> Iterator[dict[str, Callable[[], tuple[float, float]]]]:
    found: dict[str, Callable[[], tuple[float, float]]] = {"bare torchrun": bench.bare, "local": bench.launched}
    if not (ssh or slurm):
        yield found
        return
    from tests.cluster.conftest import Cluster

    cluster = Cluster(bench.folder, 2)
    try:
        cluster.up()
        hostfile = cluster.hostfile(bench.folder / "two-hosts", *cluster.hosts)
        if ssh:
            there = f"launch={{backend: ssh, hostfile: {hostfile}}}"
            found["ssh"] = lambda: bench.launched("--set", there, prefix=cluster.desk)
        yield found
    finally:
        cluster.down()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ssh", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/launch.json"))
    options = parser.parse_args()
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        cold_s = bench.cold_s
        with ways(bench, options.ssh, options.slurm) as found:
            for _ in range(options.runs):
                for name, way in found.items():
                    seen.setdefault(name, []).append(way())
    wall = {name: statistics.median(s for s, _ in pairs) for name, pairs in seen.items()}
    result: dict[str, Any] = {
        "runs": options.runs,
        "cold_s": cold_s,
        "first_step_s": {name: {"median": wall[name], "all": [s for s, _ in pairs]} for name, pairs in seen.items()},
        "cpu_s": {name: statistics.median(c for _, c in pairs) for name, pairs in seen.items()},
        "local_to_bare": statistics.median(
            a[0] / b[0] for a, b in zip(seen["local"], seen["bare torchrun"], strict=True)
        ),
        "above_local_s": {name: wall[name] - wall["local"] for name in wall if name not in ("local", "bare torchrun")},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, seconds in wall.items():
        print(f"{name:<14} {seconds:6.2f} s to the first step, {result['cpu_s'][name]:6.2f} CPU-s")
    print(f"(medians of {options.runs}; the CPU of ranks on other hosts is not counted)")
    print(f"the very first launch, whose facts nobody knew: {cold_s:.2f} s (once)")
    print(f"local / bare   {result['local_to_bare']:.2f} (median of pairs)")
    for name, seconds in result["above_local_s"].items():
        print(f"{name} above local: {seconds:.2f} s")
    return int(result["local_to_bare"] > 1.3 or any(s > 3 for s in result["above_local_s"].values()))


if __name__ == "__main__":
    sys.exit(main())
