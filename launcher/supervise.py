"""One attempt: start the nodes, watch, classify, decide the exit code. The same for every backend."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import environment, rundir
from launcher.backends import BACKENDS
from launcher.errors import ExitCode
from launcher.node import NODE_SCRIPT, WORKER, die_with_parent
from launcher.plan import Plan
from launcher.recipe import Launch
from launcher.rundir import Attempt, Run

Tell = Callable[[dict[str, Any]], None]
"""Called with each event of the attempt, as it happens."""

# The worker in one process -------------------------------------------------------------------------------------------


def ask_worker(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one verb of the worker here; its answer is caught, its progress and errors go to our stderr."""
    env = {**os.environ, **environment.base_variables(1)}
    command = [sys.executable, "-m", WORKER, *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)


# One attempt ---------------------------------------------------------------------------------------------------------


LEASE_S = 30
"""How long a node hears nothing of the launcher before it takes it for gone. On this machine the closed standard input
says so at once and for certain, and a launcher that was only suspended may go on."""


def prepare_attempt(run: Run, launch: Launch, plan: Plan, *, fresh: bool) -> Attempt:
    """The attempt's directory with everything its nodes need. The caller holds the run's lock."""
    attempt = run.new_attempt()
    env = {
        "variables": environment.rank_variables(plan.backend, max(h.slots for h in plan.hosts), launch.device),
        "device": launch.device,
        "address": "127.0.0.1" if plan.backend == "local" else None,
        "lease_s": None if plan.backend == "local" else LEASE_S,
        "rendezvous_id": secrets.token_hex(16),
        "rendezvous_timeout_s": 120,
        "stop_grace_s": launch.stop_grace,
        "fresh": fresh,
    }
    rundir.write_json(attempt.env, env, mode=0o600)
    rundir.write_json(attempt.hosts, [h.to_json() for h in plan.hosts])
    rundir.write_bytes(attempt.root / "interpreter", f"{sys.executable}\n".encode())
    rundir.write_bytes(attempt.root / "pythonpath", os.environ.get("PYTHONPATH", "").encode())
    rundir.write_bytes(attempt.node_script, NODE_SCRIPT.encode(), mode=0o755)
    return attempt


def run_attempt(attempt: Attempt, plan: Plan, tell: Tell) -> ExitCode:
    """Start every node, follow the attempt to its end, and say how it ended. Leaves no process behind.

    Raises:
        HostError: a node cannot be started.
    """
    note(attempt, "started", nodes=len(plan.hosts))
    start = BACKENDS[plan.backend]
    nodes: list[subprocess.Popen[bytes]] = []
    with interrupts() as received:
        try:
            for k, host in enumerate(plan.hosts):
                nodes.append(start(attempt, k, host))
            watch(attempt, nodes, received, tell)
        finally:
            for node in nodes:
                if node.stdin is not None:
                    node.stdin.close()  # one that still runs now ends its ranks, gently first
            returncodes = [node.wait() for node in nodes]
    code = conclude(attempt, returncodes)
    note(attempt, "ended", code=int(code), nodes=returncodes)
    return code


def watch(attempt: Attempt, nodes: list[subprocess.Popen[bytes]], received: list[int], tell: Tell) -> None:
    """Follow the nodes until all have ended. The first signal to the launcher asks the ranks to seal and stop, the
    second ends them, a third does not wait for anybody."""
    follow = Follower(attempt, tell)
    acted_on = 0
    while any(node.poll() is None for node in nodes):
        if len(received) > acted_on:
            acted_on += 1
            note(attempt, "signal", number=received[acted_on - 1])
            if acted_on == 1:
                tell({"event": "stopping"})
                request_stop(attempt.run, f"signal {received[0]} to the launcher")
            else:
                tell({"event": "killing"})
                for node in nodes:
                    node.terminate() if acted_on == 2 else node.kill()
        follow.once()
        time.sleep(0.1)
    follow.once()


def run_debug(attempt: Attempt) -> ExitCode:
    """The one rank as our own child in this terminal: breakpoints, prints and Ctrl-C work as in any script."""
    env: dict[str, Any] = rundir.read_json(attempt.env)
    argv = [sys.executable, "-m", WORKER, "train", str(attempt.root), "--debug"] + ["--fresh"] * env["fresh"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(argv, env={**os.environ, **env["variables"]}, preexec_fn=die_with_parent)
        returncode = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return conclude(attempt, [returncode])


AT_ONCE_S = 0.5
"""Signals this close together are one wish: Ctrl-C may reach us from the terminal and from a wrapper too."""


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The signals that asked this process to end, in order, instead of its end. One that was ignored, as under nohup,
    stays ignored."""
    received: list[int] = []
    last = -math.inf

    def receive(number: int, _: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > AT_ONCE_S:
            received.append(number)
            last = now

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, receive) for n in numbers}
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
            for line in whole.splitlines():
                with suppress(ValueError):  # progress is not worth a run
                    fresh.append(json.loads(line))
        for row in sorted(fresh, key=lambda r: float(r["time"])):
            self.tell(row)


# How it ended --------------------------------------------------------------------------------------------------------


def conclude(attempt: Attempt, returncodes: Sequence[int]) -> ExitCode:
    """The attempt's exit code, from what its ranks and nodes wrote; `failure.json` says why where it failed.

    Args:
        returncodes: of the processes that stood for the nodes. None of them alone makes a success.
    """
    ended = rundir.read_json(attempt.exit)
    if ended is not None:  # rank 0 writes it after the last seal
        return ExitCode(ended["code"])
    failure = first_failure(attempt, returncodes)
    rundir.write_json(attempt.failure, failure)
    return ExitCode(failure["code"])


def first_failure(attempt: Attempt, returncodes: Sequence[int]) -> dict[str, Any]:
    """First cause, evidence, verdict and what to type next."""
    records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
    records.sort(key=lambda r: float(r["time"]))
    causes = [r for r in records if not r["lost_peer"]]
    nodes = [n for k in range(len(returncodes)) if (n := rundir.read_json(attempt.node(k)))]
    killed = next((n["killed"] for n in nodes if n["killed"]), None)
    asked = next((n["asked"] for n in nodes if n["asked"]), None)
    signalled = first_signalled(torchrun_account(attempt), {r["rank"] for r in causes})
    resume = f"`speechctl resume {attempt.run.root}` goes on from the newest checkpoint"
    rank: int | None = None
    evidence = attempt.node_log(0)
    if signalled is not None:
        rank, number = signalled
        message = f"rank {rank} was ended by {by_signal(number)}"
    elif causes:
        cause = causes[0]
        rank, known = cause["rank"], cause["hint"] is not None
        log = attempt.rank_log(cause["rank"])
        where = str(log) if log.exists() else "the traceback above"
        return {
            "code": cause["code"] or ExitCode.BUG,
            "rank": rank,
            "message": cause["message"] if known else f"rank {rank}: {cause['type']}: {cause['message']}",
            "evidence": where,
            "hint": cause["hint"] if known else f"read {where}, mend it, then {resume}",
        }
    elif killed is not None:
        message, evidence = f"the ranks were killed before their work was sealed: {killed}", attempt.supervisor
    elif asked is not None:
        message, evidence = f"the ranks ended before their work was sealed: {asked}", attempt.logs
    elif records:
        rank = records[0]["rank"]
        message, evidence = f"rank {rank} lost its peers: {records[0]['message']}", attempt.rank_log(records[0]["rank"])
    else:
        message = unexplained(attempt, returncodes, nodes)
    return {
        "code": ExitCode.INFRASTRUCTURE,
        "rank": rank,
        "message": message,
        "evidence": str(evidence),
        "hint": resume,
    }


def torchrun_account(attempt: Attempt) -> list[tuple[int, int]]:
    """(rank, exit code) of the ranks that failed, by the summaries in the nodes' logs; what torchrun saw first comes
    first. The others are not causes: it ends them itself, by SIGTERM, and after 30 s by SIGKILL."""
    found: list[tuple[int, int]] = []
    for log in sorted(attempt.logs.glob("node-*.log")):
        others, _, root = log.read_text(errors="replace").partition("Root Cause (first observed failure):")
        for part in (root, others):
            for match in re.finditer(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+) ", part):
                found.append((int(match[1]), int(match[2])))
    return found


def first_signalled(account: list[tuple[int, int]], raised: set[int]) -> tuple[int, int] | None:
    """(rank, signal) of the rank whose end by a signal is the first cause, if that is what happened.

    Args:
        raised: ranks that gave a cause of their own. A peer's account of a connection that broke is none.
    """
    signalled = [(rank, -code) for rank, code in account if code < 0 and -code != signal.SIGTERM]
    if not signalled:
        return None
    rank, number = signalled[0]
    came_first = account[0] == (rank, -number)
    # Libraries abort (SIGABRT) for want of a peer, and a rank may crash on its way out after it said why.
    secondary = rank in raised or number == signal.SIGABRT or not came_first
    return None if raised and secondary else (rank, number)


def by_signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return name + ("; the kernel does that when memory runs out" if number == signal.SIGKILL else "")


def unexplained(attempt: Attempt, returncodes: Sequence[int], nodes: list[dict[str, Any]]) -> str:
    """What can be said where no rank said anything."""
    for k, returncode in enumerate(returncodes):
        if returncode < 0:
            return f"the process of node {k} was ended by {by_signal(-returncode)}"
    for node in nodes:
        if (node["returncode"] or 0) < 0:
            return f"torchrun on {node['host']} was ended by {by_signal(-node['returncode'])}"
    account = torchrun_account(attempt)
    who = f"rank {account[0][0]} ended with code {account[0][1]}" if account else "the ranks ended"
    return f"{who} without a word: {last_error(attempt.node_log(0))}"


def last_error(path: Path) -> str:
    """The line of a node's log that says most: the last one that names an exception, or else the last one.

    What torchrun says once a rank has failed is left out: it only repeats that one did.
    """
    text = path.read_text(errors="replace") if path.exists() else ""
    text = re.split(r"(?m)^[EW]\d{4} .*torch/distributed/elastic/multiprocessing/api\.py", text)[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [*lines, *named][-1] if lines else f"there is nothing in {path}"
