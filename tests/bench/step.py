"""What a step of our loop costs over a bare one, in CPU time, on a model so small that little else is left, and on the
same ready batches: without ZeRO beside bare PyTorch, Accelerate and Hugging Face's Trainer; at stages 1 to 3 beside a
bare DeepSpeed loop.

    python -m tests.bench.step [--processes 6] [--rounds 20] [--steps 5] [--ways off 1 2 3] [--ranks 1]
        [--out build/step.json]

Paired and interleaved: in every round each loop trains the same batches once, and what a loop adds is the median over
the rounds of its difference to the bare one of that round. Many short rounds: what a shared host does comes and goes
within seconds. Several processes: where a model happens to lie in memory makes it 0.3 ms faster or slower in one
process than its own copy (measured). `bare again` is the control, another model in the same bare loop: what it adds is
the noise. Forward, backward, clipping, the optimizer and a log of the loss are in all of them. On a model of real size
all of this vanishes in the noise of a machine.

Fails where ours adds more than 0.5 ms to the bare loop of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher import environment

BAR_MS = 0.5
WAYS = ("off", "0", "1", "2", "3")


def seen(folder: Path, way: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Of each round, milliseconds of CPU a step by the name of the loop, as rank 0 measured them."""
    env = {**os.environ, **environment.base_variables(1, "cpu"), "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "TOKENIZERS_PARALLELISM": "false"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    argv += ["-m", "tests.bench.step_ways", str(folder), way, str(options.rounds), str(options.steps)]
    with open(folder / "log", "w") as log:
        done = subprocess.run(argv, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=3600, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-5000:]
    rounds: list[dict[str, float]] = json.loads((folder / f"{way}.json").read_text())
    return rounds


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    adds = {name: [row[name] - row["bare"] for row in rounds] for name in rounds[0] if name != "bare"}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in adds.items()}
    return {
        "bare_ms": round(statistics.median(row["bare"] for row in rounds), 3),
        "adds_ms": {name: round(statistics.median(values), 3) for name, values in adds.items()},
        "quartiles_ms": {name: [round(values[0], 3), round(values[2], 3)] for name, values in quartiles.items()},
        "rounds": rounds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=6, help="one after the other")
    parser.add_argument("--rounds", type=int, default=20, help="in each of them")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["off", "1", "2", "3"], choices=WAYS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/step.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"ranks": options.ranks, "load": os.getloadavg(), "ways": {}}
    for way in options.ways:
        rounds = []
        for _ in range(options.processes):
            with tempfile.TemporaryDirectory() as folder:
                rounds += seen(Path(folder), way, options)
        result["ways"][way] = of = summary(rounds)
        kind = "PyTorch" if way == "off" else f"DeepSpeed, stage {way}"
        print(f"bare {kind}: {of['bare_ms']:.2f} ms of CPU a step; what others add, and the middle half of the rounds")
        for name, adds in of["adds_ms"].items():
            low, high = of["quartiles_ms"][name]
            print(f"  {name:<12} {adds:+6.2f} ms   {low:+.2f} … {high:+.2f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(of["adds_ms"]["speechctl"] > BAR_MS for of in result["ways"].values()))


if __name__ == "__main__":
    sys.exit(main())
