"""A run under way: attempt after attempt, until it ends. Each starts its nodes, watches them and ends them, and what
follows a failure is decided in `recovery`. The same for every backend."""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from secrets import token_hex
from typing import Any

from launcher import environment, hang, memory, ownership, recovery, redact, rundir, secret
from launcher.backends import BACKENDS
from launcher.cause import conclude
from launcher.errors import ExitCode, HostError, StorageError
from launcher.events import Follower, Tell
from launcher.failure import Failure, read_progress, resume
from launcher.node import DUMP, END, KILL, NODE_SCRIPT, OVER, WORKER, die_with_parent
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.recipe_launch import Deadlines, Launch
from launcher.recovery import note
from launcher.rundir import Attempt, Run

# Attempt after attempt -----------------------------------------------------------------------------------------------


def to_the_end(
    run: Run, recipe: Recipe, plan: Plan, tell: Tell, *, fresh: bool = False, by_hand: bool = True
) -> ExitCode:
    """Go on with a run until it is finished, stopped, or nothing more is to be tried. The caller holds its lock.

    Args:
        fresh: put the checkpoints aside and start at step 0.
        by_hand: a person asked for this: attempts without progress are counted anew.

    Raises:
        HostError: a node cannot be started.
    """
    with interrupts() as received:
        while True:
            if not wait_for_the_last(run, recipe.launch.stop_grace, received):
                return ExitCode.STOPPED
            recovery.settle(run)
            if not by_hand and (spent := recovery.exhausted(run, recipe.launch.relaunch)) is not None:
                rundir.write_json(run.attempts()[-1].failure, spent.to_json())
                return spent.code
            attempt = prepare_attempt(run, recipe.launch, plan, fresh=fresh)
            before = -1 if fresh else recovery.sealed(run)
            job = {"job": os.environ["SLURM_JOB_ID"]} if plan.backend == "slurm" else {}
            note(attempt, "started", sealed=before, by_hand=by_hand, **job)
            code, failed = run_attempt(attempt, plan, recipe.launch, tell, received)
            # What was put aside once is not to be put aside again, and what was not still is.
            fresh = fresh and not any(e["event"] == "started" for e in rundir.read_lines(attempt.events))
            after = before if fresh else recovery.sealed(run)
            note(attempt, "ended", code=int(code), sealed=after, asked=rundir.asked_to_stop(run))
            if failed is None:
                return code
            if plan.backend != "local":
                recovery.avoid(attempt, failed, recipe.launch.relaunch.avoid)
            avoided = rundir.avoided(run)
            moved = environment.moved(recipe, plan.hosts, avoided)
            decision = recovery.decide(
                recovery.past(run), failed, recipe.launch.relaunch, can_move=moved != list(plan.hosts)
            )
            if received or run.stop_request.exists():
                return failed.code
            if decision.wait_s is None:
                if decision.in_vain:
                    failed = recovery.no_progress(run, failed, decision.in_vain)
                    rundir.write_json(attempt.failure, failed.to_json())
                return failed.code
            if plan.backend == "slurm" and failed.kind in recovery.AT_ITS_HOST:
                # Another job may get another host in its place: the code says to queue it again, also where a host
                # that was lost refuses now, whose own code would not.
                return ExitCode.INFRASTRUCTURE
            tell(relaunching(attempt, failed, after, decision.wait_s, recovery.used_again(moved, avoided)))
            if not pause(decision.wait_s, run, received):
                return failed.code
            plan, by_hand = replace(plan, hosts=moved), False


def relaunching(attempt: Attempt, failed: Failure, sealed: int, wait_s: float, used_again: list[str]) -> dict[str, Any]:
    """The event that says what went wrong, and from where the next attempt goes on."""
    steps = [row["step"] for row in rundir.read_lines(attempt.metrics)]
    step = max(0, sealed)
    return {
        "event": "relaunching",
        "attempt": attempt.number,
        "message": failed.message,
        "wait_s": wait_s,
        "step": step,
        "lost": max(0, max(steps, default=0) - step),
        "used_again": used_again,
        "time": time.time(),
    }


def pause(wait_s: float, run: Run, received: list[int]) -> bool:
    """Wait before the next attempt. False: somebody asked for the end meanwhile."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if received or run.stop_request.exists():
            return False
        time.sleep(0.1)
    return not (received or run.stop_request.exists())


# One attempt ---------------------------------------------------------------------------------------------------------


AFTER_FAILURE_S = 10.0
"""How long the ranks of other nodes may take to end by themselves once a node has failed. They cannot seal without
its ranks, but they can say what they saw."""

BEFORE_STEPS_S = 3.0
"""The same before the first step, when there is nothing to seal."""

LET_GO_S = 30.0
"""How long after that a node is waited for that was told to end at once."""

LET_GO_SILENT_S = 5.0
"""The same, for one that was silent before."""

LEASE_RENEWED_S = 2.0
LEASE_S = 30
"""How long a node hears nothing of the launcher before it takes it for gone. On this machine the closed standard input
says so at once and for certain, and a launcher that was only suspended may go on."""


TO_BE_KILLED_S = 10
"""How long it may take a node to end ranks that did not end in their grace."""


def prepare_attempt(run: Run, launch: Launch, plan: Plan, *, fresh: bool) -> Attempt:
    """The attempt's directory with everything its nodes need. The caller holds the run's lock.

    Raises:
        PreflightError: a secret cannot be had; nothing was made.
    """
    secrets, slots = environment.secrets(launch), max(h.slots for h in plan.hosts)
    secret.read(secrets)
    ownership.only_we_write()
    attempt = run.new_attempt()
    env = {
        "variables": environment.rank_variables(plan.backend, slots, launch.device, secrets),
        "secrets": secrets,  # where they come from
        "device": launch.device,
        "address": "127.0.0.1" if plan.backend == "local" else None,
        "lease_s": None if plan.backend == "local" else LEASE_S,
        "rendezvous_id": token_hex(16),
        "rendezvous_timeout_s": launch.deadlines.start,
        "stop_grace_s": launch.stop_grace,
        "fresh": fresh,
    }
    rundir.write_json(attempt.env, env, mode=0o600)
    rundir.write_json(attempt.hosts, [h.to_json() for h in plan.hosts])
    rundir.write_bytes(attempt.interpreter, f"{sys.executable}\n".encode())
    rundir.write_bytes(attempt.pythonpath, os.environ.get("PYTHONPATH", "").encode())
    rundir.write_bytes(attempt.node_script, NODE_SCRIPT.encode(), mode=0o755)
    return attempt


def wait_for_the_last(run: Run, stop_grace_s: float, received: list[int]) -> bool:
    """Until no node of the last attempt is alive, as far as a lock on its file says so; but no longer than its agents
    take to miss their launcher and its ranks have to seal. Those that a lost launcher left behind end by themselves,
    may be sealing now, and hold the memory of their GPUs. False: somebody asked for the end meanwhile."""
    attempts = run.attempts()
    if not attempts or not attempts[-1].alive.exists():
        return True
    deadline = time.monotonic() + LEASE_S + stop_grace_s + TO_BE_KILLED_S
    with attempts[-1].alive.open("r+b") as file:
        while time.monotonic() < deadline and not (received or run.stop_request.exists()):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.1)
    return not (received or run.stop_request.exists())


def run_attempt(
    attempt: Attempt, plan: Plan, launch: Launch, tell: Tell, received: list[int]
) -> tuple[ExitCode, Failure | None]:
    """Start every node, follow the attempt to its end, and say how it ended. Leaves no process behind.

    Args:
        received: the signals that asked this process to end, as they come (`interrupts`).

    Raises:
        HostError: a node cannot be started.
    """
    values = secrets_of(attempt)
    start = BACKENDS[plan.backend]
    nodes: list[subprocess.Popen[bytes]] = []
    order: list[int] = []
    seen: Failure | None = None
    with lease(attempt) as over:
        try:
            for k, host in enumerate(plan.hosts):
                nodes.append(start(attempt, k, host))
                secret.send(nodes[k].stdin, values)
            order, seen = watch(attempt, nodes, received, tell, over, launch.deadlines)
        except HostError as error:
            refused = Failure("host refused", error.message, error.hint, host=host.name, node_rank=k)
            rundir.write_json(attempt.failure, refused.to_json())
            raise
        finally:
            for node in nodes:
                if node.stdin is not None:
                    node.stdin.close()  # one that still runs now ends its ranks, gently first
            returncodes = [node.wait() for node in nodes]
            for log in (*attempt.logs.glob("ssh-*.log"), *attempt.logs.glob("srun-*.log")):
                redact.rewrite(log, redact.current)
    code = conclude(attempt, returncodes, order, seen)
    value = rundir.read_json(attempt.failure)
    return code, None if value is None else Failure.from_json(value)


def secrets_of(attempt: Attempt) -> dict[str, str]:
    """The values that the attempt says its ranks get; from here on this process blacks them out.

    Raises:
        PreflightError: one cannot be had.
    """
    values = secret.read((rundir.read_json(attempt.env) or {}).get("secrets", {}))
    redact.use(values.values())
    return values


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
    deadlines: Deadlines,
) -> tuple[list[int], Failure | None]:
    """Follow the nodes until all have ended. The first signal to the launcher asks the ranks to seal and stop, the
    second ends them, a third does not wait for anybody.

    Where one node fails the others are ended too, since none can go on alone: gently, then at once, and what does not
    answer even then is let go.

    Returns:
        the nodes in the order in which they ended, and what they were ended for where that was decided here.
    """
    seen: Failure | None = None
    follow = Follower(attempt, tell)
    ranks = hang.Watch(attempt, len(nodes), deadlines)
    acted_on = 0
    order: list[int] = []
    steps = [(0.0, END), (AFTER_FAILURE_S, KILL), (AFTER_FAILURE_S + LET_GO_S, None)]
    failed_at = math.inf
    while len(order) < len(nodes):
        for k, node in enumerate(nodes):
            if k not in order and node.poll() is not None:
                order.append(k)
                remember(attempt, "node ended", node=k, returncode=node.returncode)
                if node.returncode == -signal.SIGKILL:
                    look_for_it(attempt, k)
                if node.returncode != 0 and failed_at == math.inf:
                    over.set()
                    failed_at = time.monotonic() + patience(attempt, k) - AFTER_FAILURE_S
        living = [k for k in range(len(nodes)) if k not in order]
        if failed_at == math.inf and ranks.look(living) is not None:
            seen = seen or ranks.explain(living, lambda: say_all(nodes, DUMP))
            remember(attempt, "hang", message=seen.message)
            over.set()
            failed_at = time.monotonic() - AFTER_FAILURE_S  # they would not hear a gentle word
            if seen.kind == "node lost":
                failed_at -= LET_GO_S - LET_GO_SILENT_S
        while steps and time.monotonic() - failed_at >= steps[0][0] and len(order) < len(nodes):
            _, word = steps.pop(0)
            for node in nodes:
                node.kill() if word is None else say(node, word)
        if len(received) > acted_on:
            acted_on += 1
            remember(attempt, "signal", number=received[acted_on - 1])
            if acted_on == 1:
                if not attempt.run.stop_request.exists():  # or its reason would be lost
                    request_stop(attempt.run, f"{signal.Signals(received[0]).name} to the launcher")
                # Behind a slow disk we act late, and may have heard another one: those count that know of `stopping`.
                del received[1:]
                tell({"event": "stopping"})
            else:
                tell({"event": "killing"})
                seen = seen or by_force(attempt)
                for node in nodes:
                    say(node, KILL) if acted_on == 2 else node.kill()
        follow.once()
        time.sleep(0.1)
    follow.once()
    return order, seen


def remember(attempt: Attempt, event: str, **facts: Any) -> None:
    """`note`, where a disk that is full or does not answer is not worth a run that goes well."""
    with suppress(OSError, StorageError):
        note(attempt, event, **facts)


def patience(attempt: Attempt, node_rank: int) -> float:
    """How long other nodes' ranks may take to end by themselves once this one has failed."""
    with suppress(OSError):
        if not attempt.node(node_rank).exists():
            return 0.0  # it never came up: there was nothing to do yet
        if not attempt.metrics.exists():
            return BEFORE_STEPS_S
    return AFTER_FAILURE_S


def say_all(nodes: list[subprocess.Popen[bytes]], word: bytes) -> None:
    for node in nodes:
        say(node, word)


def look_for_it(attempt: Attempt, node_rank: int) -> None:
    """Where an agent of this machine was killed, it cannot say any more that memory ran out: look in its place."""
    facts = read_progress(attempt, node_rank)
    if facts.get("memory"):
        with suppress(OSError):
            rundir.write_json(attempt.progress(node_rank), {**facts, "memory": memory.look_again(facts["memory"])})


def by_force(attempt: Attempt) -> Failure:
    message = "the ranks were killed before their work was sealed: the launcher was told to end at once"
    return Failure("stopped by force", message, resume(attempt), evidence=[str(attempt.supervisor)])


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
        variables = {**os.environ, **env["variables"], **secret.variables(secrets_of(attempt))}
        child = subprocess.Popen(argv, env=variables, preexec_fn=die_with_parent)
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
