"""Stands in for torchrun: copied to `torch/distributed/run.py` on PYTHONPATH, `-m torch.distributed.run` is this file.

Like the real one it gives each rank a session of its own, ends the others by SIGTERM when one fails, prints the same
summary, and exits 0 only when all did. How the ranks behave is in `behaviour.json` beside the fake `torch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STUB = Path(__file__).parents[2]
MONITOR_S = 0.1


def main(argv: list[str]) -> int:
    behaviour = json.loads((STUB / "behaviour.json").read_text())
    attempt = Path(argv[argv.index("train") + 1])
    if attempt.name != "0001":
        behaviour |= behaviour["then"]
    variables = dict(os.environ)
    for name in filter(None, variables.get("SPEECHCTL_SECRETS", "").split(",")):
        variables[name] = f"sha256:{hashlib.sha256(os.fsencode(variables[name])).hexdigest()}"
    record = {"argv": sys.orig_argv, "variables": variables, "cwd": os.getcwd(), "pid": os.getpid()}
    node_rank = value(argv, "rdzv-conf=rank")
    name = f"torchrun-{node_rank}.json" if node_rank else "torchrun.json"
    (attempt / f".{name}").write_text(json.dumps(record))
    (attempt / f".{name}").rename(attempt / name)
    time.sleep(behaviour["start_s"])
    if behaviour["says"] and node_rank == 0:
        print(behaviour["says"], file=sys.stderr)
        return 1
    slots = [host["slots"] for host in json.loads((attempt / "hosts.json").read_text())]
    first, count, world = sum(slots[:node_rank]), value(argv, "nproc-per-node"), sum(slots)
    ranks = [start(first + k, k, world, behaviour["ranks"][first + k], attempt) for k in range(count)]
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return 0
        failed = [k for k, code in enumerate(codes) if code]
        if failed:
            break
        time.sleep(MONITOR_S)
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + behaviour["patience_s"]
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    others = [k for k in range(count) if k not in failed[:1] and ranks[k].returncode]
    print("E0101 00:00:00.000 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed", file=sys.stderr)
    print("launcher.worker FAILED\nFailures:", file=sys.stderr)
    for number, k in enumerate(others, start=1):
        print(fate(number, first + k, ranks[k]), file=sys.stderr)
    print(f"Root Cause (first observed failure):\n{fate(0, first + failed[0], ranks[failed[0]])}", file=sys.stderr)
    return 1


def value(argv: list[str], option: str) -> int:
    word = next(a for a in argv if a.startswith(f"--{option}="))
    return int(word.removeprefix(f"--{option}=").partition(",")[0])


def start(rank: int, local_rank: int, world: int, behaviour: str, attempt: Path) -> subprocess.Popen[bytes]:
    what = ["-m", "no_such_worker"] if behaviour == "no import" else [str(STUB / "rank.py"), str(attempt)]
    place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world)}
    env = {**os.environ, **place, "STUB_BEHAVIOUR": behaviour}
    return subprocess.Popen([sys.executable, *what], env=env, start_new_session=True)


def fate(number: int, rank: int, process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    name = f" ({signal.Signals(-code).name})" if code < 0 else ""
    return (
        f"[{number}]:\n  time      : 2026-01-01_00:00:00\n  host      : localhost\n"
        f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: {process.pid}) {name}\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
