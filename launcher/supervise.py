"""One attempt: start the nodes, watch, classify, decide the exit code. The same for every backend."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import environment, rundir
from launcher.backends import BACKENDS, ssh
from launcher.errors import ExitCode
from launcher.hosts import Host
from launcher.node import END, KILL, NODE_SCRIPT, OVER, WORKER, die_with_parent
from launcher.plan import Plan
from launcher.recipe import Launch
from launcher.rundir import Attempt, Run

Tell = Callable[[dict[str, Any]], None]
"""Called with each event of the attempt, as it happens."""

# The worker in one process -------------------------------------------------------------------------------------------


def ask_worker(arguments: list[str], stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run one verb of the worker here; its answer is caught, its progress and errors go to our stderr unless told."""
    env = {**os.environ, **environment.base_variables(1)}
    command = [sys.executable, "-m", WORKER, *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)


# One attempt ---------------------------------------------------------------------------------------------------------


AFTER_FAILURE_S = 10.0
"""How long the ranks of other nodes may take to end by themselves once a node has failed. They cannot seal without
its ranks, but they can say what they saw."""

LET_GO_S = 30.0
"""How long after that a node is waited for that was told to end at once."""

LEASE_RENEWED_S = 2.0
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
    order: list[int] = []
    with interrupts() as received, lease(attempt) as over:
        try:
            for k, host in enumerate(plan.hosts):
                nodes.append(start(attempt, k, host))
            order = watch(attempt, nodes, received, tell, over)
        finally:
            for node in nodes:
                if node.stdin is not None:
                    node.stdin.close()  # one that still runs now ends its ranks, gently first
            returncodes = [node.wait() for node in nodes]
    code = conclude(attempt, returncodes, order)
    note(attempt, "ended", code=int(code), nodes=returncodes)
    return code


@contextmanager
def lease(attempt: Attempt) -> Iterator[threading.Event]:
    """Renew the attempt's lease for as long as this process lives, also while nobody reads what it prints. Once the
    event is set, and at the end, the lease says that it is over: a node that we cannot reach may still read it."""
    over = threading.Event()

    def renew() -> None:
        for beat in itertools.count():
            with suppress(OSError):
                attempt.lease.write_text(f"{beat}\n")
            if over.wait(LEASE_RENEWED_S):
                break
        with suppress(OSError):
            attempt.lease.write_bytes(OVER)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield over
    finally:
        over.set()
        thread.join()


def watch(
    attempt: Attempt,
    nodes: list[subprocess.Popen[bytes]],
    received: list[int],
    tell: Tell,
    over: threading.Event,
) -> list[int]:
    """Follow the nodes until all have ended; returns them in the order in which they did. The first signal to the
    launcher asks the ranks to seal and stop, the second ends them, a third does not wait for anybody.

    Where one node fails the others are ended too, since none can go on alone: gently, then at once, and what does not
    answer even then is let go.
    """
    follow = Follower(attempt, tell)
    acted_on = 0
    order: list[int] = []
    steps = [(0.0, END), (AFTER_FAILURE_S, KILL), (AFTER_FAILURE_S + LET_GO_S, None)]
    failed_at = math.inf
    while len(order) < len(nodes):
        for k, node in enumerate(nodes):
            if k not in order and node.poll() is not None:
                order.append(k)
                note(attempt, "node ended", node=k, returncode=node.returncode)
                if node.returncode != 0 and failed_at == math.inf:
                    over.set()
                    came_up = rundir.read_json(attempt.node(k)) is not None
                    failed_at = time.monotonic() - (0 if came_up else AFTER_FAILURE_S)  # else there is nothing to save
        while steps and time.monotonic() - failed_at >= steps[0][0] and len(order) < len(nodes):
            _, word = steps.pop(0)
            for node in nodes:
                node.kill() if word is None else say(node, word)
        if len(received) > acted_on:
            acted_on += 1
            note(attempt, "signal", number=received[acted_on - 1])
            if acted_on == 1:
                tell({"event": "stopping"})
                request_stop(attempt.run, f"signal {received[0]} to the launcher")
            else:
                tell({"event": "killing"})
                for node in nodes:
                    say(node, KILL) if acted_on == 2 else node.kill()
        follow.once()
        time.sleep(0.1)
    follow.once()
    return order


def say(node: subprocess.Popen[bytes], word: bytes) -> None:
    """A word to a node; one that has ended does not hear it."""
    if node.stdin is not None and node.poll() is None:
        with suppress(OSError):
            os.write(node.stdin.fileno(), word)


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


def conclude(attempt: Attempt, returncodes: Sequence[int], order: Sequence[int] = ()) -> ExitCode:
    """The attempt's exit code, from what its ranks and nodes wrote; `failure.json` says why where it failed.

    Args:
        returncodes: of the processes that stood for the nodes. None of them alone makes a success.
        order: the nodes in the order in which they ended, as seen from here; clocks differ between machines.
    """
    ended = rundir.read_json(attempt.exit)
    if ended is not None:  # rank 0 writes it after the last seal
        return ExitCode(ended["code"])
    failure = first_failure(attempt, returncodes, order or range(len(returncodes)))
    rundir.write_json(attempt.failure, failure)
    return ExitCode(failure["code"])


def first_failure(attempt: Attempt, returncodes: Sequence[int], order: Sequence[int]) -> dict[str, Any]:
    """First cause, evidence, verdict and what to type next."""
    if (failure := node_failure(attempt, returncodes, order)) is not None:
        return failure
    records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
    records.sort(key=lambda r: float(r["time"]))
    causes = [r for r in records if not r["lost_peer"]]
    nodes = [n for k in range(len(returncodes)) if (n := rundir.read_json(attempt.node(k)))]
    killed = next((n["killed"] for n in nodes if n["killed"]), None)
    asked = next((n["asked"] for n in nodes if n["asked"]), None)
    signalled = first_signalled(torchrun_account(attempt, order), {r["rank"] for r in causes})
    resume = f"`speechctl resume {attempt.run.root}` goes on from the newest checkpoint"
    rank: int | None = None
    evidence = attempt.node_log(0)
    if signalled is not None:
        rank, number = signalled
        message = f"rank {rank}{on_host(attempt, rank)} was ended by {by_signal(number)}"
    elif causes:
        cause = causes[0]
        rank, known = cause["rank"], cause["hint"] is not None
        log = attempt.rank_log(cause["rank"])
        where = str(log) if log.exists() else "the traceback above"
        return {
            "code": cause["code"] or ExitCode.BUG,
            "rank": rank,
            "message": cause["message"]
            if known
            else f"rank {rank}{on_host(attempt, rank)}: {cause['type']}: {cause['message']}",
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


def node_failure(attempt: Attempt, returncodes: Sequence[int], order: Sequence[int]) -> dict[str, Any] | None:
    """The failure of a node itself, where that is the first cause: it never came up, it could not start its ranks, or
    it was lost."""
    hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts) or ()]
    over_ssh = any(attempt.logs.glob("ssh-*.log"))
    lost: dict[str, Any] | None = None
    for k in order:
        record, log = rundir.read_json(attempt.node(k)), attempt.node_log(k)
        if record is None and over_ssh and returncodes[k] != 0:
            error = ssh.refusal(attempt, k, hosts[k])
            hint = f"{error.hint}; then `speechctl resume {attempt.run.root}`"
            lost = {"code": error.exit_code, "message": error.message, "hint": hint}
            log = attempt.ssh_log(k)
        elif record is not None and "error" in record and k == order[0]:
            lost = record["error"]
        elif returncodes[k] == ssh.FAILED and over_ssh and k == order[0]:
            lost = {
                "code": ExitCode.INFRASTRUCTURE,
                "message": f"lost {hosts[k].name}: {ssh.last_words(attempt, k)}",
                "hint": f"when `ssh {hosts[k].name} true` works again, `speechctl resume {attempt.run.root}` goes on"
                " from the newest checkpoint",
            }
            log = attempt.ssh_log(k)
        if lost is not None:
            return {"rank": None, "evidence": str(log), **lost, "code": int(lost["code"])}
    return None


def on_host(attempt: Attempt, rank: int) -> str:
    """` on gpu-02`, where there is more than one host."""
    hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts) or ()]
    names = [host.name for host in hosts for _ in range(host.slots)]
    return f" on {names[rank]}" if len(hosts) > 1 and rank < len(names) else ""


def torchrun_account(attempt: Attempt, order: Sequence[int] = (0,)) -> list[tuple[int, int]]:
    """(rank, exit code) of the ranks that failed, by the summaries in the nodes' logs; what torchrun saw first comes
    first. The others are not causes: it ends them itself, by SIGTERM, and after 30 s by SIGKILL."""
    found: list[tuple[int, int]] = []
    for log in (attempt.node_log(k) for k in order):
        if not log.exists():
            continue
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
