"""Seconds from a command to the end of its first training step: `speechctl launch` beside a bare torchrun script that
imports the same, reads from the same packs, builds the same model and engine, and makes one step; interleaved, in one
run.

    python -m tests.bench.launch [--runs 5] [--ssh] [--slurm] [--out build/launch.json]

`--ssh` and `--slurm` start hosts in network namespaces, as the tests do (root, and the Debian packages), and run the
same two ranks on two of them. Clocks are one machine's. How long a job waits for the scheduler is not ours: it is a
row of its own, and left out of `slurm`. Fails where local is above 1.3 times the bare script, or where another backend
is more than 3 s above local; `local, facts unknown` is the first launch of packs and a model, held to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.rundir import Run, read_lines
from tests.worker.runs import SPEECHCTL, speechctl, write_recipe

if TYPE_CHECKING:
    from tests.cluster.conftest import Cluster
    from tests.cluster.slurm import Slurm

Row = dict[str, float]
"""What one launch took, by row of the table: seconds to the first step, or a part of them."""

BARE = """\
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from launcher import recipe_file
from launcher.worker import train
from launcher.worker.data import Utterances
from launcher.worker.engine_deepspeed import DeepSpeedEngine
from launcher.worker.models import build
from launcher.worker.ranks import Ranks

recipe = recipe_file.load(Path(sys.argv[1]))
ranks = Ranks()
data = Utterances.of(recipe, recipe.data.train)
reading = ThreadPoolExecutor().submit(lambda: [data.example(k) for k in range(4)])  # imports streaming, as ours does
model = build(recipe.backbone, seed=recipe.seed)
engine = DeepSpeedEngine(model, recipe, json.loads(Path(sys.argv[2]).read_text()), ranks)
ranks.connect()
examples = reading.result()
engine.backward(model.collate([e.waveform for e in examples], [e.text for e in examples]), 1.0, last=True)
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


def logged(slurm: Slurm, what: str, job: str) -> float:
    """When the controller noted this of a job, to a millisecond."""
    found = re.search(rf"(?m)^\[(\S+)\] .*({what}).* JobId={job} ", slurm.log("desk").read_text() + " ")
    assert found, f"the log of slurmctld has no {what} of job {job}"
    return datetime.fromisoformat(found[1]).timestamp()


class Bench:
    """The ways to a first step, each a function that makes one launch and returns what it took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder, folder)
        self.count = 0
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.cpu_s: dict[str, list[float]] = {}
        done = speechctl("pack", str(self.recipe), cwd=folder)
        assert done.returncode == 0, done.stderr
        self.launched("warm", [])  # byte code and page cache
        self.plain = Run(folder / "run-1")
        (folder / "bare.py").write_text(BARE)

    def run(self, name: str, argv: list[str], env: dict[str, str]) -> tuple[float, str]:
        """(when it began, what it said), to its end."""
        began, cpu = time.time(), cpu_s()
        done = subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.cpu_s.setdefault(name, []).append(cpu_s() - cpu)
        return began, done.stdout

    def bare(self) -> Row:
        variables = json.loads(self.plain.attempts()[0].env.read_text())["variables"]
        argv = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(self.folder / "bare.py"), str(self.plain.resolved), str(self.plain.deepspeed)),
        ]
        began, said = self.run("bare torchrun", argv, {**self.env, **variables, "OMP_NUM_THREADS": "1"})
        return {"bare torchrun": float(said.split()[-1]) - began}

    def launched(
        self, name: str, options: list[str], prefix: Callable[..., list[str]] = lambda *words: list(words)
    ) -> tuple[float, Path, str]:
        """(when it began, the run's directory, what it said), once the run has ended."""
        self.count += 1
        root = self.folder / f"run-{self.count}"
        argv = [*SPEECHCTL, "launch", str(self.recipe), *SMALL, "--set", f"run_dir={root}", *options]
        began, said = self.run(name, prefix(*argv), self.env)
        deadline = time.monotonic() + 120
        while not (Run(root).attempts() and Run(root).attempts()[0].exit.exists()):  # a submitted job goes on
            assert time.monotonic() < deadline, "the job did not finish"
            time.sleep(0.05)
        return began, root, said

    def local(self) -> Row:
        began, root, _ = self.launched("local", [])
        return {"local": first_step(root) - began}

    def unknown(self) -> Row:
        shutil.rmtree(self.folder / "cache" / "speechctl")
        began, root, _ = self.launched("local, facts unknown", [])
        return {"local, facts unknown": first_step(root) - began}

    def ssh(self, cluster: Cluster) -> Row:
        hostfile = cluster.hostfile(self.folder / "two-hosts", *cluster.hosts)
        options = ["--set", f"launch={{backend: ssh, hostfile: {hostfile}}}"]
        began, root, _ = self.launched("ssh", options, cluster.desk)
        return {"ssh": first_step(root) - began}

    def slurm(self, cluster: Slurm) -> Row:
        options = ["--set", "launch={backend: slurm, nodes: 2, processes: 1}"]
        began, root, said = self.launched("slurm", options, cluster.desk)
        job = said.split()[1]
        cluster.wait_for(job, "COMPLETED")
        submitted, started = (logged(cluster, what, job) for what in ("submit_batch_job:", "Allocate|Started"))
        took, wait = first_step(root) - began, started - submitted
        return {
            "slurm": took - wait,
            "slurm, from its job's start": first_step(root) - started,
            "slurm, the scheduler's wait": wait,
        }


@contextmanager
def ways(bench: Bench, ssh: bool, slurm: bool) -> Iterator[list[Callable[[], Row]]]:
    found: list[Callable[[], Row]] = [bench.bare, bench.local, bench.unknown]
    with ExitStack() as stack:
        if ssh or slurm:
            from tests.cluster import conftest
            from tests.cluster.slurm import Slurm

            folder = bench.folder / "cluster"
            folder.mkdir()
            cluster = (Slurm if slurm else conftest.Cluster)(folder, 2)
            stack.callback(cluster.down)
            cluster.up()
            if ssh:
                found.append(lambda: bench.ssh(cluster))
            if isinstance(cluster, Slurm):
                found.append(partial(bench.slurm, cluster))
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, choices=range(1, 1000), metavar="N", default=5)
    parser.add_argument("--ssh", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/launch.json"))
    options = parser.parse_args()
    seen: dict[str, list[float]] = {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve())
        with ways(bench, options.ssh, options.slurm) as found:
            for number in range(options.runs):
                for way in found:
                    for name, seconds in way().items():
                        seen.setdefault(name, []).append(seconds)
                print(
                    f"{number + 1}: " + ", ".join(f"{name} {all_s[-1]:.2f}" for name, all_s in seen.items()), flush=True
                )
                result = summary(seen, bench.cpu_s)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'seconds to the first step':<28} median     min   CPU-s    (of {options.runs}, interleaved)")
    for name, row in result["rows"].items():
        cpu = "      -" if row["cpu_s"] is None else f"{row['cpu_s']:7.2f}"
        print(f"{name:<28} {row['median_s']:6.2f}  {row['min_s']:6.2f} {cpu}")
    print("(the CPU of ranks on other hosts is not counted)")
    print(f"local / bare   {result['local_to_bare']:.2f} (median of pairs), in CPU {result['local_to_bare_cpu']:.2f}")
    for name, seconds in result["above_local_s"].items():
        print(f"{name} above local: {seconds:.2f} s (median of pairs)")
    return int(result["local_to_bare"] > 1.3 or any(s > 3 for s in result["above_local_s"].values()))


def summary(seen: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    def above(name: str) -> float:
        return statistics.median(a - b for a, b in zip(seen[name], seen["local"], strict=True))

    def to_bare(of: dict[str, list[float]]) -> float:
        return statistics.median(ours / bare for ours, bare in zip(of["local"], of["bare torchrun"], strict=True))

    return {
        "runs": len(seen["local"]),
        "rows": {
            name: {
                "median_s": statistics.median(all_s),
                "min_s": min(all_s),
                "all_s": all_s,
                "cpu_s": statistics.median(cpu[name]) if name in cpu else None,
            }
            for name, all_s in seen.items()
        },
        "local_to_bare": to_bare(seen),
        "local_to_bare_cpu": to_bare(cpu),
        "above_local_s": {name: above(name) for name in ("ssh", "slurm") if name in seen},
    }


if __name__ == "__main__":
    sys.exit(main())
