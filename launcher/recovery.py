"""What follows a failed attempt: another one after a wait, or the end. Decided from what the attempts left on disk.

`decide` is pure. A person's `resume` starts the count of attempts without progress anew; a requeued job goes on
counting. Hosts at which something failed are left out for a while, where others can take their place.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import cause, rundir
from launcher.failure import Failure, resume
from launcher.hosts import Host
from launcher.recipe_launch import Relaunch
from launcher.rundir import Attempt, Run

LONGEST_WAIT_S = 600.0


@dataclass(frozen=True)
class Past:
    """One attempt that is over."""

    number: int
    sealed_before: int
    """Newest sealed step when it began; -1: none."""
    sealed_after: int
    by_hand: bool
    """A person asked for it: what was before is forgiven."""

    @property
    def progressed(self) -> bool:
        return self.sealed_after > self.sealed_before


@dataclass(frozen=True)
class Decision:
    """`wait_s` before the next attempt, or None where there is none. `in_vain`: so many attempts in a row ended without
    a new checkpoint."""

    wait_s: float | None
    in_vain: int


def decide(past: Sequence[Past], failed: Failure, relaunch: Relaunch, *, can_move: bool = False) -> Decision:
    """
    Args:
        past: all attempts, oldest first; the last is the one that `failed`.
        can_move: a spare host can take the place of the one that failed.
    """
    in_vain = attempts_in_vain(past)
    began_before = len(past) > 1 and not past[-1].by_hand
    # A host that refused at the first attempt refuses at the second; one that is lost and then refuses is starting up.
    again = failed.verdict == "again" or (failed.kind == "host refused" and (can_move or began_before))
    if not again or in_vain >= relaunch.attempts:
        return Decision(None, in_vain if again else 0)
    return Decision(min(relaunch.wait * 2.0 ** max(0, in_vain - 1), LONGEST_WAIT_S), in_vain)


def attempts_in_vain(past: Sequence[Past]) -> int:
    """How many in a row ended without a new checkpoint, since a person last asked for one."""
    count = 0
    for one in reversed(past):
        if one.progressed:
            break
        count += 1
        if one.by_hand:
            break
    return count


def no_progress(run: Run, last: Failure, in_vain: int) -> Failure:
    """What stands in place of the last attempt's failure when the run ends for want of progress."""
    tried = "1 attempt" if in_vain == 1 else f"{in_vain} attempts in a row"
    return replace(
        last,
        kind="no progress",
        message=f"{run.root} makes no progress: {tried} ended without a new checkpoint; the last: {last.message}",
        hint=f"look into that first; then `speechctl resume {run.root}` counts anew",
        cause=last.to_json(),
    )


def exhausted(run: Run, relaunch: Relaunch) -> Failure | None:
    """What ends a run that would go on without a person, as a requeued job does, and has been tried often enough: its
    launcher may have been lost each time, or the time limit may have come before the first seal."""
    tried = past(run)
    in_vain = attempts_in_vain(tried)
    if in_vain < relaunch.attempts:
        return None
    attempt = run.attempts()[tried[-1].number - 1]
    value = rundir.read_json(attempt.failure)
    message = f"attempt {attempt.number} was stopped before it had sealed a new step"
    last = Failure("time limit", message, resume(attempt)) if value is None else Failure.from_json(value)
    return last if last.kind == "no progress" else no_progress(run, last, in_vain)


# On disk -------------------------------------------------------------------------------------------------------------


def note(attempt: Attempt, event: str, **facts: Any) -> None:
    rundir.append_line(attempt.supervisor, {"event": event, "time": time.time(), **facts})


def sealed(run: Run) -> int:
    """The newest sealed step; -1: none."""
    return max(run.sealed_steps(), default=-1)


def past(run: Run) -> list[Past]:
    """All attempts of the run that have ended."""
    found = []
    for attempt in run.attempts():
        rows = {row["event"]: row for row in rundir.read_lines(attempt.supervisor)}
        if "started" in rows and "ended" in rows:
            began, over = rows["started"], rows["ended"]
            found.append(Past(attempt.number, began["sealed"], over["sealed"], began["by_hand"]))
    return found


def settle(run: Run) -> None:
    """Conclude the attempts that a lost launcher left open, also where it or a rank had said how they ended: those
    without an end are none of the past. The caller holds the run's lock."""
    for attempt in run.attempts():
        if (lost := cause.of_lost_launcher(attempt)) is not None:
            rundir.write_json(attempt.failure, lost.to_json())
        ended = rundir.read_json(attempt.failure) or rundir.read_json(attempt.exit)
        rows = rundir.read_lines(attempt.supervisor)
        events = [row["event"] for row in rows]
        if ended is not None and "started" in events and "ended" not in events:
            began = next(row for row in rows if row["event"] == "started")
            # One that never came to its first step has sealed nothing; a fresh one has put nothing aside either.
            trained = any(row["event"] == "started" for row in rundir.read_lines(attempt.events))
            to = sealed(run) if trained else began["sealed"]
            note(attempt, "ended", code=ended["code"], sealed=to, asked=ended.get("asked"))


# Hosts ---------------------------------------------------------------------------------------------------------------

AT_ITS_HOST = ("node lost", "host refused", "hang", "device")
"""Kinds of failure after which the host is left out for a while."""


def avoid(attempt: Attempt, failed: Failure, for_s: float) -> None:
    """Remember the host of a failure that may be the host's."""
    if failed.kind in AT_ITS_HOST and failed.host is not None:
        now = time.time()
        why = {"kind": failed.kind, "why": failed.message, "attempt": attempt.number}
        rundir.append_line(attempt.run.avoided, {"host": failed.host, "time": now, "until": now + for_s, **why})


def used_again(hosts: Collection[Host], names: Mapping[str, Any]) -> list[str]:
    """Hosts that are to be left out and are needed all the same."""
    return [host.name for host in hosts if host.name in names]
