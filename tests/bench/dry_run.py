"""CPU seconds of `speechctl launch --dry-run` for 64 nodes x 8 GPUs (local: one node), beside those of importing typer
and rich; interleaved, in one run.

    python -m tests.bench.dry_run [--runs 5] [--out build/dry_run.json]

Children are included. The first plan of some packs and a model asks the worker for facts, which imports torch: it is a
row of its own, held to nothing. Fails where the median of a backend is above 1 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.bench.cli_start import cpu_seconds
from tests.worker.runs import RECIPE, SPEECHCTL, speechctl, write_recipe

LIMIT_S = 1.0

LAUNCH = {
    "local": "{processes: 8}",
    "ssh": "{backend: ssh, hostfile: hosts}",
    "slurm": "{backend: slurm, nodes: 64, slurm: {gres: 'gpu:h100:8', time: 24h}}",
}

ENOUGH = RECIPE.replace("train_utterances: 40", "train_utterances: 600").replace("24s,", "6000s,")
"""For a step of 512 ranks."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/dry_run.json"))
    options = parser.parse_args()
    out = options.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        recipe = write_recipe(Path(folder).resolve(), Path(folder).resolve(), ENOUGH)
        Path("hosts").write_text("".join(f"gpu-{k:02d} slots=8\n" for k in range(1, 65)))
        done = speechctl("pack", str(recipe), cwd=Path(folder))
        assert done.returncode == 0, done.stderr
        commands = {"import typer, rich": [sys.executable, "-c", "import typer, rich"]}
        for backend, launch in LAUNCH.items():
            commands[backend] = [*SPEECHCTL, "launch", str(recipe), "--dry-run", "--set", f"launch={launch}"]
        first = {name: cpu_seconds(argv) for name, argv in commands.items()}
        seen: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, argv in commands.items():
                seen[name].append(cpu_seconds(argv))
        os.chdir("/")
    rows = {name: {"median_s": statistics.median(all_s), "min_s": min(all_s)} for name, all_s in seen.items()}
    result = {"runs": options.runs, "cpu_s": rows, "facts_unknown_s": first["ssh"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'CPU seconds':<20} median     min    (of {options.runs}, interleaved)")
    for name, row in rows.items():
        print(f"{name:<20} {row['median_s']:6.2f}  {row['min_s']:6.2f}")
    print(f"{'ssh, facts unknown':<20} {first['ssh']:6.2f}          (once)")
    return int(any(rows[backend]["median_s"] > LIMIT_S for backend in LAUNCH))


if __name__ == "__main__":
    sys.exit(main())
