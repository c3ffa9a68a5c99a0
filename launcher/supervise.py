"""One attempt: start the nodes, watch, classify, decide the exit code. The same for every backend."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import rundir
from launcher.backends import BACKENDS
from launcher.errors import ExitCode
from launcher.node import NODE_SCRIPT, WORKER
from launcher.plan import Plan
from launcher.rundir import Attempt, Run

Tell = Callable[[dict[str, Any]], None]
"""Called with each event of the attempt, as it happens."""

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHONPATH|LD_LIBRARY_PATH|XDG_\w+|CUDA_\w+|NCCL_\w+"
    r"|GLOO_\w+|TORCH_\w+|HF_\w+|TRANSFORMERS_\w+|SSL_CERT_\w+|OMP_\w+|MKL_\w+|DS_\w+|PYTHONDEVMODE|COVERAGE_\w+"
)
"""Environment variables that ranks inherit; no other crosses."""


# The worker in one process -------------------------------------------------------------------------------------------


def ask_worker(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one verb of the worker here; its answer is caught, its progress and errors go to our stderr."""
    env = {**os.environ, **base_variables(1)}
    command = [sys.executable, "-m", WORKER, *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def base_variables(processes: int) -> dict[str, str]:
    """Settings that every process of the worker wants; the user's own values win."""
    gpus = gpu_count()
    variables = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
    }
    if not gpus:
        # glibc gives freed tensors back to the kernel and asks for them again at every step: measured 221 ms against
        # 148 ms for the same bare loop on a CPU.
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "MALLOC_TRIM_THRESHOLD_": "4000000000",
            "MALLOC_MMAP_THRESHOLD_": "1000000000",
        }
    return {name: os.environ.get(name, value) for name, value in variables.items()}


# One attempt ---------------------------------------------------------------------------------------------------------


def prepare_attempt(run: Run, plan: Plan, *, stop_grace_s: float, fresh: bool) -> Attempt:
    """The attempt's directory with everything its nodes need. The caller holds the run's lock."""
    for request in (run.stop_request, run.save_request):
        request.unlink(missing_ok=True)
    attempt = run.new_attempt()
    variables = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    variables |= base_variables(max(h.slots for h in plan.hosts))
    if plan.backend == "local":
        variables |= {"GLOO_SOCKET_IFNAME": "lo"}
    env = {
        "variables": variables,
        "address": "127.0.0.1",
        "rendezvous_id": secrets.token_hex(16),
        "rendezvous_timeout_s": 120,
        "stop_grace_s": stop_grace_s,
        "fresh": fresh,
    }
    rundir.write_json(attempt.env, env, mode=0o600)
    rundir.write_json(attempt.hosts, [h.to_json() for h in plan.hosts])
    rundir.write_bytes(attempt.root / "interpreter", f"{sys.executable}\n".encode())
    rundir.write_bytes(attempt.node_script, NODE_SCRIPT.encode(), mode=0o755)
    return attempt


def run_attempt(attempt: Attempt, plan: Plan, tell: Tell) -> ExitCode:
    """Start every node, follow the attempt to its end, and say how it ended."""
    run = attempt.run
    note(attempt, "started", nodes=len(plan.hosts))
    start = BACKENDS[plan.backend]
    follow = Follower(attempt, tell)
    with interrupts() as received:
        nodes = [start(attempt, k, host) for k, host in enumerate(plan.hosts)]
        acted_on = 0
        while any(node.poll() is None for node in nodes):
            if len(received) > acted_on:
                acted_on += 1
                if acted_on == 1:
                    request_stop(run, f"signal {received[0]} to the launcher")
                    tell({"event": "stopping"})
                else:
                    tell({"event": "killing"})
                    for node in nodes:
                        with suppress(ProcessLookupError):
                            node.terminate()
            follow.once()
            time.sleep(0.1)
    for node in nodes:
        if node.stdin is not None:
            node.stdin.close()
    follow.once()
    code = conclude(attempt)
    note(attempt, "ended", code=int(code))
    return code


def run_debug(attempt: Attempt) -> ExitCode:
    """The one rank as our own child in this terminal: breakpoints, prints and Ctrl-C work as in any script."""
    env: dict[str, Any] = rundir.read_json(attempt.env)
    argv = [sys.executable, "-m", WORKER, "train", str(attempt.root), "--debug"] + ["--fresh"] * env["fresh"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(argv, env={**os.environ, **env["variables"]})
        returncode = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if returncode < 0:
        note(attempt, "killed", signal=-returncode)
    return conclude(attempt)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The signals that asked this process to end, in order, instead of its end."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def request_stop(run: Run, why: str) -> None:
    run.stop_request.parent.mkdir(exist_ok=True)
    rundir.write_json(run.stop_request, {"why": why, "time": time.time()})


def note(attempt: Attempt, event: str, **facts: Any) -> None:
    rundir.append_line(attempt.supervisor, {"event": event, "time": time.time(), **facts})


class Follower:
    """Hands on the lines that rank 0 appends to its events and metrics, each once."""

    def __init__(self, attempt: Attempt, tell: Tell) -> None:
        self.offsets = dict.fromkeys((attempt.events, attempt.metrics), 0)
        self.tell = tell

    def once(self) -> None:
        fresh: list[dict[str, Any]] = []
        for path, offset in self.offsets.items():
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.offsets[path] = offset + len(whole)
            fresh += [json.loads(line) for line in whole.splitlines()]
        for row in sorted(fresh, key=lambda r: float(r["time"])):
            self.tell(row)


# How it ended --------------------------------------------------------------------------------------------------------


def conclude(attempt: Attempt) -> ExitCode:
    """The attempt's exit code, from what its ranks and nodes wrote; `failure.json` says why where it failed."""
    ended = rundir.read_json(attempt.exit)
    if ended is not None:  # rank 0 writes it after the last seal
        return ExitCode(ended["code"])
    failure = first_failure(attempt)
    rundir.write_json(attempt.failure, failure)
    return ExitCode(failure["code"])


def first_failure(attempt: Attempt) -> dict[str, Any]:
    """First cause, evidence, verdict and what to type next."""
    records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
    records.sort(key=lambda r: float(r["time"]))
    causes = [r for r in records if not r["lost_peer"]]
    killed = killed_ranks(attempt)
    resume = f"`speechctl resume {attempt.run.root}` goes on from the newest checkpoint"
    if causes and not killed:
        cause = causes[0]
        return {
            "code": cause["code"],
            "rank": cause["rank"],
            "message": f"rank {cause['rank']}: {cause['type']}: {cause['message']}"
            if cause["hint"] is None
            else cause["message"],
            "evidence": str(attempt.rank_log(cause["rank"])),
            "hint": cause["hint"] or f"read the traceback in {attempt.rank_log(cause['rank'])}; then {resume}",
        }
    nodes = [n for k in range(len(rundir.read_json(attempt.hosts))) if (n := rundir.read_json(attempt.node(k)))]
    by = next((n["ended_by"] for n in nodes if n["ended_by"] != "itself"), None)
    if killed and by is None:
        rank, number = killed[0]
        name = signal.Signals(number).name
        memory = "; the kernel does that when memory runs out" if number == signal.SIGKILL else ""
        message, evidence = f"rank {rank} was ended by {name}{memory}", str(attempt.node_log(0))
    elif by is not None:
        message, evidence = f"the ranks were ended by {by} before their work was sealed", str(attempt.supervisor)
    elif records:
        message, evidence = f"rank {records[0]['rank']} lost its peers: {records[0]['message']}", str(attempt.logs)
    else:
        message, evidence = (
            f"the ranks ended without a word: {last_line(attempt.node_log(0))}",
            str(attempt.node_log(0)),
        )
    return {"code": ExitCode.INFRASTRUCTURE, "rank": None, "message": message, "evidence": evidence, "hint": resume}


def killed_ranks(attempt: Attempt) -> list[tuple[int, int]]:
    """(rank, signal) of ranks that a signal ended, from torchrun's own account, first failure first."""
    found: list[tuple[int, int]] = []
    for log in sorted(attempt.logs.glob("node-*.log")):
        text = log.read_text(errors="replace")
        for match in re.finditer(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: -(\d+) ", text):
            found.append((int(match[1]), int(match[2])))
        # torchrun terminates the siblings of the first one that fails
    return [f for f in found if f[1] != signal.SIGTERM] or found


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return lines[-1].strip() if lines else "its log is empty"


def provenance(run: Run, command: list[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What this run was made from: code, packages, packs, command."""
    from importlib import metadata

    package = Path(__file__).parent
    git = ["git", "-C", str(package)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    names = ("speechctl", "torch", "torchaudio", "deepspeed", "accelerate", "transformers", "mosaicml-streaming")
    return {
        "command": command,
        "code": {"revision": revision or None, "changed": changed.splitlines()},
        "packages": {n: metadata.version(n) for n in names},
        "python": sys.version.split()[0],
        "packs": facts["packs"],
        "host": os.uname().nodename,
        "created": time.time(),
    }
