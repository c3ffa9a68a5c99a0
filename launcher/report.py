"""What the files of a run say, as a value: its state, its curve, its checkpoints. Reads; writes nothing."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher import lock, retention, rundir, sealed
from launcher.errors import DataError, ExitCode, NotFoundError, StorageError, UsageError
from launcher.rundir import Attempt, Run


@dataclass(frozen=True)
class Node:
    """A host's part in an attempt."""

    number: int
    host: str
    """Empty where the attempt does not say."""
    ranks: list[int]
    doing: dict[str, dict[str, Any]]
    """By rank: phase, step, `unchanged_s`; as far as the node said so."""
    heard: float | None = None
    """When it last said so, by the clock of the file system that the run is on. It does about once a second."""


@dataclass(frozen=True)
class Start:
    """One attempt, in a line."""

    number: int
    started: float | None
    hosts: list[str]
    from_step: int | None
    """None: its ranks did not begin to train."""
    to_step: int | None
    state: str
    """As of the run."""
    code: int | None
    """The exit code that it ended with; None where nobody was there to say."""
    failure: dict[str, Any] | None
    asked: str | None
    """Who or what asked it to stop, where it stopped for that."""
    why: str = ""
    """Why it ended before the last step, where it had come to its end."""


@dataclass(frozen=True)
class Report:
    """A run at a glance."""

    name: str
    run_dir: str
    state: str
    """running; finished; stopped (sealed, on request); failed; interrupted (the launcher was killed); created (before
    the first attempt)."""
    step: int
    """Newest step that a rank reported, of the attempt that went last."""
    max_steps: int
    sealed: list[int]
    """Steps with a sealed checkpoint."""
    was_sealed: int
    """The newest step that was ever sealed, as the records say; -1: none. It may be gone."""
    best: dict[str, Any] | None
    """Step and WER of the best checkpoint, while it is there."""
    evaluations: list[dict[str, Any]]
    """By step."""
    unevaluated: list[dict[str, Any]]
    """Evaluations that came to nothing, and were not made up for: step, error and, of those beside training, log."""
    metrics: list[dict[str, Any]]
    """One a step, without those that were rolled back."""
    attempts: int
    failure: dict[str, Any] | None
    """Why the last attempt ended, where it failed."""
    holder: dict[str, Any] | None
    history: list[Start]
    """All attempts, oldest first."""
    nodes: list[Node]
    """Of the attempt that went last."""
    avoided: list[dict[str, Any]]
    """Hosts that are left out for now: host, why, until."""
    left_out: int
    """Steps whose loss or gradient was not finite, which all ranks left out; without those that were rolled back."""
    straggler: dict[str, Any] | None
    """The rank that the others wait for, as far as one was named last: rank, host, factor, step."""
    jobs: list[dict[str, Any]]
    """What was submitted to SLURM, oldest first: id, time, log. From the run's files: SLURM is not asked."""
    job: dict[str, Any] | None = None
    """SLURM's last job of the run: id, state, reason. Not from its files: `jobs.py` asks SLURM."""

    @property
    def exit_code(self) -> int | None:
        """What a `launch` that ended like this run did has ended with; None while it runs, or before it did."""
        if self.state in ("running", "created"):
            return None
        code = self.history[-1].code
        return int(ExitCode.INFRASTRUCTURE) if code is None else code

    @property
    def none_sealed(self) -> str:
        """How it comes that there is no sealed checkpoint."""
        return "yet" if self.was_sealed < 0 else f"any more: step {self.was_sealed} was"

    @property
    def audio_s(self) -> float:
        return float(sum(m["audio_s"] for m in self.metrics))

    @property
    def training_s(self) -> float:
        return float(sum(m["step_s"] for m in self.metrics))

    def to_json(self) -> dict[str, Any]:
        value = {k: v for k, v in asdict(self).items() if k != "metrics"}
        return {**value, "last": self.metrics[-1] if self.metrics else None}


def read(run: Run) -> Report:
    """
    Raises:
        NotFoundError: there is no run in that directory.
        DataError: one of its files is not what speechctl writes.
        StorageError: one of them cannot be read.
    """
    if not run.exists():
        raise NotFoundError(
            f"{run.root} is not a run: it has no {run.resolved.name}",
            hint="give the directory of a run, such as runs/NAME; `speechctl launch RECIPE` makes one",
        )
    try:
        return _read(run)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"a file of {run.root} is not what speechctl writes ({type(error).__name__}: {error})",
            hint="plan.json, best.json, exit.json and the like are not for editing; restore what was there",
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot read {error.filename or run.root}: {error.strerror}",
            hint="mend the file system, or make it readable; nothing was changed",
        ) from error


def _read(run: Run) -> Report:
    plan = rundir.read_json(run.plan)
    if plan is None:
        raise DataError(f"{run.plan} is missing", hint="restore it from a copy; `speechctl launch` makes another run")
    attempts = run.attempts()
    paths = [p for p in sorted(run.evaluations.glob("step-*.json")) if p.name.count(".") == 1]
    evaluations: list[dict[str, Any]] = [rundir.read_json(p) for p in paths]
    unevaluated: dict[int, dict[str, Any]] = {}
    metrics: dict[int, dict[str, Any]] = {}
    reached: dict[int, tuple[int, int]] = {}
    for attempt in attempts:
        events = rundir.read_lines(attempt.events)
        started = [e for e in events if e["event"] == "started"]
        if started:  # what older attempts did behind the step that it resumed from was rolled back
            step = started[0]["step"]
            metrics = {s: m for s, m in metrics.items() if s <= step}
            evaluations = [e for e in evaluations if e["step"] <= step or e["attempt"] >= attempt.number]
            unevaluated = {s: e for s, e in unevaluated.items() if s <= step}
        unevaluated |= {e["step"]: e for e in events if e["event"] == "evaluation_failed"}
        own = {m["step"]: m for m in rundir.read_lines(attempt.metrics)}
        metrics.update(own)
        if started:
            reached[attempt.number] = (started[0]["step"], max(own, default=started[0]["step"]))
    steps, best = run.sealed_steps(), rundir.read_json(run.best)
    holder = lock.holder(run)
    if holder is not None and (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
        holder = None  # the launcher itself, telling how its own run ended
    history = [start_of(a, reached.get(a.number), holder is not None and a is attempts[-1]) for a in attempts]
    ended = history[-1].state if history else "created"
    return Report(
        name=plan["name"],
        run_dir=str(run.root),
        state="running" if holder is not None else ended,
        step=max(metrics, default=0),
        max_steps=plan["max_steps"],
        sealed=steps,
        was_sealed=sealed.newest_said(run),
        best=best if best is not None and best["step"] in steps else None,
        evaluations=evaluations,
        unevaluated=[row for s, row in sorted(unevaluated.items()) if s not in {e["step"] for e in evaluations}],
        metrics=[metrics[step] for step in sorted(metrics)],
        attempts=len(attempts),
        failure=history[-1].failure if history else None,
        holder=holder,
        history=history,
        nodes=[doing(attempts[-1], node) for node in layout(attempts[-1])] if attempts else [],
        avoided=list(rundir.avoided(run).values()),
        left_out=sum(bool(m.get("left_out")) for m in metrics.values()),
        straggler=read_straggler(attempts[-1]) if attempts else None,
        jobs=submitted(run),
    )


def start_of(attempt: Attempt, reached: tuple[int, int] | None, held: bool) -> Start:
    """
    Args:
        reached: the steps from which and to which it came.
        held: whether a launcher has the run, and this is its newest attempt.
    """
    ended, failure = (rundir.read_json(p) if rundir.there(p) else None for p in (attempt.exit, attempt.failure))
    noted = rundir.read_lines(attempt.supervisor)
    times = (row["time"] for rows in (noted, rundir.read_lines(attempt.events)) for row in rows[:1])
    if failure is not None:
        state, code = "failed", failure["code"]
    elif ended is not None and not held and left_alone(attempt, ended):
        state, code = "interrupted", None
    elif ended is not None:
        state, code = "finished" if ended["code"] == ExitCode.FINISHED else "stopped", ended["code"]
    else:
        state, code = "running" if held else "interrupted", None
    asked = next((r.get("asked") for r in reversed(noted) if r["event"] == "ended"), (ended or {}).get("asked"))
    return Start(
        number=attempt.number,
        started=next(times, None),
        hosts=[node.host for node in layout(attempt) if node.host],
        from_step=reached and reached[0],
        to_step=reached and reached[1],
        state=state,
        code=code,
        failure=failure,
        asked=asked if code == ExitCode.STOPPED else None,
        why=str((ended or {}).get("why", "")) if state == "finished" else "",
    )


def left_alone(attempt: Attempt, ended: dict[str, Any]) -> bool:
    """Whether ranks sealed and stopped because their launcher was gone, and not because anybody had asked for it.

    Rank 0 says whether a request was there. Where none was, their node says why it ended them, but only once they have
    ended: until then, or where it was killed too, it is so unless the launcher has concluded the attempt.
    """
    if ended["code"] != ExitCode.STOPPED or ended.get("asked"):
        return False
    nodes = [rundir.read_json(path) for path in sorted(attempt.root.glob("node-*.json"))]
    if said := [node["asked"] for node in nodes if node.get("asked")]:
        return any("launcher" in asked for asked in said)
    concluded = any(row["event"] == "ended" for row in rundir.read_lines(attempt.supervisor))
    # What an older version of this wrote has no word of rank 0 on it.
    return "asked" in ended and nodes != [] and not concluded


def read_straggler(attempt: Attempt) -> dict[str, Any] | None:
    """The last word of an attempt on whether one rank is slower than the others."""
    said = [e for e in rundir.read_lines(attempt.events) if e["event"] in ("straggler", "straggler_gone")]
    return said[-1] if said and said[-1]["event"] == "straggler" else None


def layout(attempt: Attempt) -> list[Node]:
    """Which ranks are where. Where the attempt does not say: the ranks that have a log, on one node."""
    hosts = rundir.read_json(attempt.hosts)
    if hosts is None:
        ranks = sorted(int(p.stem.removeprefix("rank-")) for p in attempt.logs.glob("rank-*.log"))
        return [Node(0, "", ranks, {})]
    nodes: list[Node] = []
    first = 0
    for number, host in enumerate(hosts):
        nodes.append(Node(number, host["name"], list(range(first, first + host["slots"])), {}))
        first += host["slots"]
    return nodes


def doing(attempt: Attempt, node: Node) -> Node:
    """With what its ranks do, as far as it said so. It rewrites that in place, so that it may be read half."""
    try:
        path = attempt.progress(node.number)
        said = rundir.read_json(path) or {}
        return replace(node, doing={str(row["rank"]): row for row in said["ranks"]}, heard=path.stat().st_mtime)
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return node


def submitted(run: Run) -> list[dict[str, Any]]:
    """The run's SLURM jobs, by the files that `jobs.py` writes."""
    rows = [rundir.read_json(path) for path in run.slurm.glob("job-*.json")]
    jobs = [{"id": r["job"], "time": r["time"], "log": str(run.slurm / f"job-{r['job']}.log")} for r in rows]
    return sorted(jobs, key=lambda job: float(job["time"]))


def evidence(failure: dict[str, Any]) -> list[str]:
    """Files and lines that show it."""
    found = failure.get("evidence") or []
    return [found] if isinstance(found, str) else [str(line) for line in found]


def span(numbers: Sequence[int]) -> str:
    """`0-3, 7`, of sorted numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def unevaluated(value: Report) -> list[str]:
    return [
        f"step {e['step']} was not evaluated: {e['error']}" + (f" (log: {e['log']})" if "log" in e else "")
        for e in value.unevaluated
    ]


def samples(run: Run, step: int, count: int) -> list[dict[str, Any]]:
    """A few references with what the model heard, spread over the evaluation."""
    rows = rundir.read_lines(run.hypotheses(step))
    return rows[:: max(1, len(rows) // count)][:count]


def commands(value: Report) -> list[str]:
    """What makes sense to type next."""
    root = shlex.quote(value.run_dir)
    if value.state == "running" or (value.job or {}).get("is_there"):
        return [f"speechctl {verb} {root}" for verb in ("attach", "stop")]
    if value.state == "finished":
        at = value.best["step"] if value.best else (value.sealed[-1] if value.sealed else 0)
        which = "" if value.best else " --checkpoint last"
        export = shlex.quote(f"{value.run_dir}/exports/step-{at:08d}")
        return [
            f"speechctl evaluate {root}{which}",
            f"speechctl export {root}{which}",
            f"speechctl transcribe {export} FILE.flac",
        ]
    if value.state == "created" and value.jobs:
        return [f"squeue --job {value.jobs[-1]['id']}", f"speechctl attach {root}"]
    reason = [f"speechctl why {root}"] if value.state in ("failed", "interrupted") else []
    return [*reason, f"speechctl resume {root}"]


def sealed_step(run: Run, which: str) -> int:
    """The step that `best`, `last` or a number means.

    Raises:
        NotFoundError: no such checkpoint is sealed; lists those that are.
    """
    value = read(run)
    best = value.best["step"] if value.best else None
    named = {"best": best, "last": value.sealed[-1] if value.sealed else None}
    number = int(which) if which.isascii() and which.isdigit() else None
    step = named.get(which, number)
    if step is None or step not in value.sealed:
        if not value.sealed:
            raise NotFoundError(
                f"{run.root} has no sealed checkpoint {value.none_sealed}",
                hint=f"`speechctl status {run.root}` shows where it stands",
            )
        raise NotFoundError(
            f"{run.root} has no checkpoint {which}",
            hint=f"take best, last, or one of its sealed steps: {', '.join(map(str, value.sealed))}",
        )
    return step


def averaged_steps(run: Run, which: str) -> list[int]:
    """The steps that `last:5` (the newest) or `best:3` (the lowest WER in training) mean, oldest first.

    Raises:
        UsageError: it means nothing.
        NotFoundError: there are not so many; lists those that there are.
    """
    word, _, number = which.partition(":")
    count = int(number) if number.isascii() and number.isdigit() else 0
    if word not in ("last", "best") or count < 1:
        raise UsageError(f"--average {which!r} is not understood", hint="ema, none, last:5, best:3, or another number")
    value = read(run)
    if word == "last":
        there, kind, setting = value.sealed[::-1], "sealed", "checkpoint.keep_last"
    else:
        wers = retention.wers(run, value.sealed)
        there = sorted(wers, key=lambda step: (wers[step], step))
        kind, setting = "sealed and evaluated", "checkpoint.keep_best"
    if len(there) < count:
        raise NotFoundError(
            f"{run.root} has {len(there)} checkpoints that are {kind}, --average {which} needs {count}"
            f" (steps {', '.join(map(str, sorted(there))) or 'none'})",
            hint=f"take {word}:{len(there)}; a recipe with {setting}: {count} keeps so many"
            if there
            else f"`speechctl status {run.root}` shows where it stands",
        )
    return sorted(there[:count])
