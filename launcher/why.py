"""Why a run failed, as a value: first cause, evidence, verdict, what followed, what to type. Reads; writes nothing."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import lock, report, rundir
from launcher.errors import ExitCode, NotFoundError
from launcher.logs import Reader
from launcher.report import Report, Start
from launcher.rundir import Attempt, Run

LINES = 15
"""How much of a file is shown."""

VERDICTS = {
    "again": "worth another attempt from the newest checkpoint",
    "mend": "the same would happen again: something has to be mended first",
}

ENDED = ("failed", "interrupted")


@dataclass(frozen=True)
class Excerpt:
    title: str
    lines: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Of one attempt that failed or was interrupted; without one, only the state of the run."""

    name: str
    run_dir: str
    state: str
    """Of the run, now."""
    attempts: int
    attempt: Start | None
    kind: str | None
    """As in failure.json; None where the launcher that wrote it did not know kinds."""
    code: int | None
    verdict: str | None
    rank: int | None
    host: str | None
    message: str
    evidence: list[str]
    excerpts: list[Excerpt]
    others: str
    """The other ranks, in a line."""
    followed: str
    """What came after it."""
    earlier: list[Start]
    """Attempts before it that failed or were interrupted, oldest first."""
    hint: str
    """Empty where the run went on since."""
    commands: list[str]
    unevaluated: list[str]
    """Evaluations beside training that came to nothing, a line each, of whatever attempt."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(run: Run, number: int | None) -> Diagnosis:
    """
    Args:
        number: the attempt to explain; None: the last one that failed or was interrupted.

    Raises:
        NotFoundError: there is no such run or attempt.
    """
    value = report.read(run)
    if number is not None and number not in [start.number for start in value.history]:
        has = report.span([start.number for start in value.history]) or "none yet"
        raise NotFoundError(f"{run.root} has no attempt {number}", hint=f"its attempts: {has}")
    candidates = [s for s in value.history if s.state in ENDED] if number is None else value.history
    start = next((s for s in reversed(candidates) if number in (None, s.number)), None)
    if start is None or start.state not in ENDED:
        return _healthy(run, value, start)
    attempt = Attempt(run.attempts_dir / f"{start.number:04d}")
    failure = start.failure or _interrupted(attempt, value, start)
    return Diagnosis(
        name=value.name,
        run_dir=value.run_dir,
        state=value.state,
        attempts=value.attempts,
        attempt=start,
        kind=failure.get("kind"),
        code=failure["code"],
        verdict=failure.get("verdict"),
        rank=failure.get("rank"),
        host=failure.get("host"),
        message=failure["message"],
        evidence=report.evidence(failure),
        excerpts=excerpts(attempt, failure),
        others=_others(attempt, failure),
        followed=_followed(value, start),
        earlier=[s for s in value.history if s.state in ENDED and s.number < start.number],
        hint=failure["hint"] if value.state != "running" and start is value.history[-1] else "",
        commands=_commands(run, value, start, failure),
        unevaluated=report.unevaluated(value),
    )


def _healthy(run: Run, value: Report, start: Start | None) -> Diagnosis:
    """There is nothing to explain."""
    root = shlex.quote(str(run.root))
    last = value.history[-1] if value.history else None
    by = f"; the last one was stopped: {last.asked}" if last is not None and last.asked else ""
    what = f"{start.number} did not fail: {start.state}" if start is not None else f"no attempt has failed{by}"
    if value.state == "created":
        jobs = ", ".join(str(job["id"]) for job in value.jobs[-1:])
        what = f"not started yet{f'; submitted to SLURM as job {jobs}' if jobs else ''}"
    nothing: dict[str, Any] = dict.fromkeys(("kind", "code", "verdict", "rank", "host"))
    return Diagnosis(
        name=value.name,
        run_dir=value.run_dir,
        state=value.state,
        attempts=value.attempts,
        attempt=start,
        message=what,
        evidence=[],
        excerpts=said_by_job(value) if value.state == "created" else [],
        others="",
        followed="",
        earlier=[],
        hint="",
        commands=[f"speechctl status {root}"] if value.state != "created" else report.commands(value),
        unevaluated=report.unevaluated(value),
        **nothing,
    )


def said_by_job(value: Report) -> list[Excerpt]:
    """The log of a job that may have failed before it came to start anything."""
    logs = [Path(job["log"]) for job in value.jobs[-1:]]
    return [Excerpt(str(log), lines) for log in logs if (lines := last_lines(log))]


def _interrupted(attempt: Attempt, value: Report, start: Start) -> dict[str, Any]:
    """What can be known of an attempt whose launcher was gone before it could say anything."""
    newest = start.number == value.history[-1].number
    last = lock.last_holder(attempt.run) if newest else None
    who = f" (pid {last['pid']} on {last['host']})" if last else ""
    files = [p for p in (attempt.events, attempt.metrics, attempt.lease, *attempt.logs.glob("*")) if p.exists()]
    heard = max((p.stat().st_mtime for p in files), default=None)
    at = "" if heard is None else f", last heard of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(heard))}"
    step = "before its first step" if not start.to_step else f"after step {start.to_step}"
    sealed = f"; newest checkpoint: {f'step {value.sealed[-1]}' if value.sealed else 'none'}" if newest else ""
    logs = [attempt.run.launcher_log, *(Path(job["log"]) for job in value.jobs[-1:])]
    # An older one is of another launcher.
    said = [str(p) for p in logs if p.exists() and p.stat().st_mtime >= (start.started or 0)]
    return {
        "kind": "launcher lost",
        "code": int(ExitCode.INFRASTRUCTURE),
        "verdict": "again",
        "message": f"the launcher{who} was gone before it could say how the ranks ended: {step}{at}{sealed}",
        "evidence": [*said, str(attempt.supervisor), str(attempt.logs)],
        "hint": f"`speechctl resume {attempt.run.root}` goes on from the newest checkpoint",
    }


# What the files say --------------------------------------------------------------------------------------------------


def excerpts(attempt: Attempt, failure: dict[str, Any]) -> list[Excerpt]:
    """The lines that say most: the end of the rank's traceback and what it printed before, or the end of the first
    file of the evidence; of a hang the stack too."""
    rank = failure.get("rank")
    found: list[Excerpt] = []
    shown: list[Path] = []
    if rank is not None:
        record = rundir.read_json(attempt.rank_failure(rank)) or {}
        traceback = "".join(record.get("traceback", ())).splitlines()[-LINES:]
        found.append(Excerpt(f"traceback of rank {rank}, its end", traceback))
        log = attempt.rank_log(rank)
        found.append(
            Excerpt(f"{'before that, ' if traceback else ''}{log}", last_lines(log, before_it=bool(traceback)))
        )
        stack = attempt.stacks / f"rank-{rank:05d}.txt"
        found.append(Excerpt(f"stack of rank {rank}, {stack}", first_lines(stack)))
        shown = [log, stack]
    files = [here(attempt, text) for text in report.evidence(failure)]
    if not any(excerpt.lines for excerpt in found):
        found += [Excerpt(str(p), last_lines(p)) for p in files if p.is_file() and p not in shown][:1]
    return [excerpt for excerpt in found if excerpt.lines]


def here(attempt: Attempt, text: str) -> Path:
    """A file of the evidence as it is called on this machine, where the run may be seen at another path."""
    _, found, rest = text.partition(f"/attempts/{attempt.root.name}/")
    path = Path(text)
    return attempt.root / rest if found and not path.is_relative_to(attempt.root) else path


def last_lines(path: Path, *, before_it: bool = False) -> list[str]:
    """The end of a log; of one that ends with a traceback that is shown already, what stands before that."""
    reader = Reader(path)
    lines = reader.tail(LINES if not before_it else 20 * LINES, lambda _: True) + reader.rest()
    if before_it:
        starts = [k for k, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        lines = lines[: starts[-1]] if starts else lines
    while lines and not lines[-1].strip():
        lines.pop()
    return lines[-LINES:]


def first_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return file.read(1 << 14).decode(errors="backslashreplace").splitlines()[:LINES]


def _others(attempt: Attempt, failure: dict[str, Any]) -> str:
    """What became of the ranks that are not the cause."""
    rank = failure.get("rank")
    count = sum(len(node.ranks) for node in report.layout(attempt)) - (rank is not None)
    if rank is None or count <= 0:
        return ""
    records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
    own = [r for r in records if not r["lost_peer"] and r["rank"] != rank]
    also = "".join(f"; rank {r['rank']}: {r['type']}: {_first_line(r['message'])}" for r in own[:3])
    more = f"; {len(own) - 3} more raised too" if len(own) > 3 else ""
    return f"{count} {'rank' if count == 1 else 'ranks'} ended after it{also}{more}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:120]


# What follows --------------------------------------------------------------------------------------------------------


def _followed(value: Report, start: Start) -> str:
    later = next((s for s in value.history if s.number > start.number), None)
    if later is not None:
        from_step = "" if later.from_step is None else f" from step {later.from_step}"
        now = "" if later is value.history[-1] else f"; now at attempt {value.history[-1].number}"
        return f"it went on as attempt {later.number}{from_step}{now}: {value.state}"
    return "the launcher still has the run" if value.state == "running" else "the run ended with it"


def _commands(run: Run, value: Report, start: Start, failure: dict[str, Any]) -> list[str]:
    root = shlex.quote(str(run.root))
    which = "--rank failed" if start.failure is not None else "--node all --tail 20"
    commands = [f"speechctl logs {root} --attempt {start.number} {which}"]
    if value.state == "running":
        return [*commands, f"speechctl attach {root}"]
    if start.number == value.history[-1].number:
        return [*commands, f"speechctl resume {root}"]
    return [*commands, f"speechctl status {root}"]
