"""Saving 1 GB of training state over two ranks: how long training waits, and when the last byte is durable. Ours beside
torch.save, DeepSpeed's own engines and torch's asynchronous save, of one engine's state, interleaved, in one run.

    python -m tests.bench.checkpoint [--runs 7] [--stages 2 3] [--folder DIR] [--out build/checkpoint.json]

Each way to save is measured between two plain host copies of the same bytes (into memory that was used before) and two
plain writes of them (as many files, one fsync each), and put in proportion to these: the speed of a disk varies. Files
are fresh each time, what was written before is synced first and removed after; nothing is read, so no page cache is
dropped. The first round is not counted. A disk at `--folder` (default: build) is measured, not a tmpfs.

Fails where the median of our asynchronous save's proportions is above 1.5 for the wait or 1.3 for durable. How much
slower a step of training is beside our write is printed and held to nothing.
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

LAYERS = {1: 4, 2: 4, 3: 6}
"""Of 15.7 million parameters, by stage: they come to 1.1 GB and 1.2 GB. Stages 1 and 2 save the weights twice."""

RECIPE = """\
name: bench
launch: {{processes: 2}}
data: {{corpus: {folder}/corpus, packs: {folder}/packs, train: [train-clean-100]}}
backbone: {{kind: tiny-ctc, hidden: 1024, layers: {layers}}}
zero_stage: {stage}
max_steps: 10
batch: {{step_seconds: 24s, max_rank_seconds: 12s}}
optimizer: {{learning_rate: 1e-3}}
evaluate: {{subsets: [dev-clean]}}
checkpoint: {{every_steps: 4}}
"""

OURS = "speechctl"

BARS = {"blocked": 1.5, "durable": 1.3}

Times = dict[str, float]


def seen(folder: Path, stage: int, runs: int) -> Any:
    """What two ranks measured."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, layers=LAYERS[stage], stage=stage))
    env = {**os.environ, **environment.base_variables(2, "cpu"), "GLOO_SOCKET_IFNAME": "lo"}
    # DeepSpeed's fast and decoupled engines want to know how many machines there are; its own launcher says so.
    env |= {"CROSS_SIZE": "1", "CROSS_RANK": "0"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv += ["-m", "tests.bench.checkpoint_ways", str(folder), str(recipe), str(stage), str(runs)]
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    with open(folder / "log", "w") as log:
        done = subprocess.run(argv, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=3600, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-5000:]
    return json.loads((folder / "seen.json").read_text())


def summary(measured: Any) -> dict[str, Any]:
    first, *rounds = measured["rounds"]
    of = {way: [row[way] for row in rounds] for way in rounds[0]}
    return {
        "bytes": measured["bytes"],
        "rows": {way: {**row(all_of), "first_blocked_s": first[way]["blocked_s"]} for way, all_of in of.items()},
        "beside": {name: statistics.median(r[name] for r in measured["beside"][1:]) for name in measured["beside"][0]},
        "cannot": measured["cannot"],
        "rounds": measured["rounds"],
    }


def row(all_of: list[Times]) -> dict[str, float]:
    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    result = {}
    for what, reference in (("blocked", "copy_s"), ("durable", "write_s")):
        took = [one[f"{what}_s"] for one in all_of]
        result[f"{what}_median_s"], result[f"{what}_min_s"] = median(took), round(min(took), 3)
        result[f"{reference[:-2]}_median_s"] = median([one[reference] for one in all_of])
        result[f"{what}_ratio"] = median([one[f"{what}_s"] / one[reference] for one in all_of])
        least = min(one[reference] for one in all_of)
        result[f"{what}_ratio_of_minimums"] = round(min(took) / least, 3)
    return result | {"cpu_s": median([one["cpu_s"] for one in all_of])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], choices=sorted(LAYERS))
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=Path("build/checkpoint.json"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"runs": options.runs, "load": os.getloadavg(), "stages": {}}
    for stage in options.stages:
        with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as folder:
            result["stages"][stage] = summary(seen(Path(folder), stage, options.runs))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for stage, of in result["stages"].items():
        show(stage, of, options.runs)
    ours = [of["rows"][OURS] for of in result["stages"].values()]
    return int(any(one[f"{what}_ratio"] > bar for one in ours for what, bar in BARS.items()))


def show(stage: int, of: dict[str, Any], runs: int) -> None:
    print(f"ZeRO-{stage}, {sum(of['bytes']) / 1e9:.2f} GB over {len(of['bytes'])} ranks; {runs} rounds, interleaved")
    print(f"{'':<36} training waits           durable                  CPU-s  first wait")
    print(f"{'':<36} median    min  x copy    median    min x write")
    for name, r in of["rows"].items():
        times = [
            f"{r[f'{what}_median_s']:6.2f} {r[f'{what}_min_s']:6.2f} {r[f'{what}_ratio']:7.2f}"
            for what in ("blocked", "durable")
        ]
        print(f"{name:<36} {'    '.join(times)} {r['cpu_s']:10.2f} {r['first_blocked_s']:10.2f}")
    beside = of["beside"]
    print(f"a step of training: {beside['alone_s']:.2f} s alone, {beside['during_s']:.2f} s while ours is written")
    for name, why in of["cannot"].items():
        print(f"{name} cannot: {why}")


if __name__ == "__main__":
    sys.exit(main())
