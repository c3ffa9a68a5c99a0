"""CPU seconds of `speechctl --help` beside those of a bare Typer app, interleaved, in one run.

    python -m tests.bench.cli_start [--runs 10] [--out build/cli_start.json]

A ratio, because machines are noisy. Fails where it is above 1.2, or where the command imports torch.
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

BARE = """\
import typer

app = typer.Typer()


@app.command()
def first(name: str) -> None:
    "Say a name."


@app.command()
def second(count: int = 1) -> None:
    "Count."


app()
"""


def cpu_seconds(argv: list[str]) -> float:
    before = os.times()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("build/cli_start.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE)
        commands = {
            "bare typer": [sys.executable, str(bare), "--help"],
            "speechctl": [str(Path(sys.executable).with_name("speechctl")), "--help"],
        }
        for argv in commands.values():
            cpu_seconds(argv)  # byte code and page cache
        seen: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, argv in commands.items():
                seen[name].append(cpu_seconds(argv))
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher.cli", "--help"], capture_output=True, text=True, check=True
    ).stderr
    torch = any(line.rsplit("|", 1)[-1].strip().split(".")[0] == "torch" for line in imported.splitlines())
    medians = {name: statistics.median(values) for name, values in seen.items()}
    result = {
        "runs": options.runs,
        "cpu_s": {name: {"median": medians[name], "min": min(v), "max": max(v)} for name, v in seen.items()},
        "ratio": medians["speechctl"] / medians["bare typer"],
        "torch_imported": torch,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in medians.items():
        print(f"{name:<12} {value:.3f} CPU-s (median of {options.runs})")
    print(f"ratio        {result['ratio']:.3f}   torch imported: {torch}")
    return 1 if torch or result["ratio"] > 1.2 else 0


if __name__ == "__main__":
    sys.exit(main())
