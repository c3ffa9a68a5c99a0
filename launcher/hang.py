"""Whether the ranks of an attempt still get on, and if not, which of them differs from the others.

The agents tell how long each rank has made no mark, by their own clocks. A run hangs when the ranks that are furthest
behind have made none for longer than the deadline of what they do: those ahead of them may well be waiting.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from launcher import rundir
from launcher.errors import DataError
from launcher.failure import Failure, places, read_progress, resume
from launcher.recipe_launch import Deadlines
from launcher.rundir import Attempt

SILENT_S = 30.0
"""An agent that says nothing for so long, while the way to it still stands, is lost."""

DUMP_S = 15.0
"""How long agents may take to tell their ranks' stacks."""

STOPPED = {"T": "it is stopped", "t": "a debugger holds it", "D": "it waits in the kernel and cannot be ended"}
"""States of a process that gets nowhere by itself."""


class Watch:
    """Looks at the agents' files about once a second."""

    def __init__(self, attempt: Attempt, nodes: int, deadlines: Deadlines) -> None:
        self.attempt = attempt
        step = deadlines.step
        self.deadlines = {"start": deadlines.start, "step": step, "evaluate": step, "save": deadlines.save}
        self.seen: list[dict[str, Any]] = [{} for _ in range(nodes)]
        self.silent_s = [0.0] * nodes
        self._looked = time.monotonic()

    def look(self, living: Collection[int]) -> list[dict[str, Any]] | None:
        """The ranks that are furthest behind where the run hangs; empty where a node is lost (`silent`); None where all
        is well, or it is too early to look again."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return None
        elapsed, self._looked = min(now - self._looked, 2.0), now  # time in which we did not look says nothing
        for k in living:
            facts = read_progress(self.attempt, k)
            changed = facts.get("beat") is not None and facts["beat"] != self.seen[k].get("beat")
            self.silent_s[k] = 0.0 if changed else self.silent_s[k] + elapsed
            if changed:
                self.seen[k] = facts
        if self.silent(living):
            return []
        return behind([self.seen[k].get("ranks", []) for k in living], self.deadlines)

    def silent(self, living: Collection[int]) -> list[int]:
        """Nodes whose agents have said nothing for too long. One that has yet to say its first word is starting."""
        return [k for k in living if self.silent_s[k] > (SILENT_S if self.seen[k] else self.deadlines["start"])]

    def explain(self, living: Collection[int], dump: Callable[[], None]) -> Failure:
        """What ends the attempt: the node that is lost, or the rank that differs.

        Args:
            dump: asks the agents for the stacks of their ranks.
        """
        where = places(self.attempt)
        if lost := self.silent(living):
            host = next((host for host, k in where if k == lost[0]), "its host")
            message = (
                f"lost node {lost[0]} on {host}: its agent has said nothing for {self.silent_s[lost[0]]:.0f} s, though"
                " the way to it stands"
            )
            log = str(self.attempt.node_log(lost[0]))
            return Failure("node lost", message, resume(self.attempt), host=host, node_rank=lost[0], evidence=[log])
        before = [row for k in living for row in self.seen[k].get("ranks", [])]
        dump()
        told = self._dumped(living)
        rows = [{**row, **told.get(row["rank"], {})} for row in before]
        row, why = differs(rows)
        evidence = [str(self.attempt.stacks), str(self.attempt.progress_dir)]
        if row is None:
            first = rows[0]
            stands = f"in {first['phase']} {first['step']} at {first['at'] or 'its first lines'}"
            message = f"the run hangs: no rank differs, all {len(rows)} stand {stands} for {first['unchanged_s']:.0f} s"
            return Failure("hang", message, resume(self.attempt), evidence=evidence)
        host, node_rank = where[row["rank"]]
        message = (
            f"rank {row['rank']} on {host} hangs in {row['phase']} {row['step']} at {row['at'] or 'its first lines'},"
            f" for {row['unchanged_s']:.0f} s: {why}"
        )
        stack = [str(self.attempt.stack(row["rank"])), *row["stack"]] if row.get("stack") else []
        whose: dict[str, Any] = {"rank": row["rank"], "host": host, "node_rank": node_rank}
        return Failure("hang", message, resume(self.attempt), evidence=[*stack, *evidence], **whose)

    def _dumped(self, living: Collection[int]) -> dict[int, dict[str, Any]]:
        """What the ranks did, by rank, from all agents that answer in time."""
        deadline = time.monotonic() + DUMP_S
        missing, told = set(living), {}
        while missing and time.monotonic() < deadline:
            for k in sorted(missing):
                try:
                    value = rundir.read_json(self.attempt.dumped(k))
                except (DataError, OSError):
                    value = None
                if value is not None:
                    missing.discard(k)
                    told.update({row["rank"]: row for row in value["ranks"]})
            time.sleep(0.1)
        return told


def behind(nodes: Sequence[Sequence[dict[str, Any]]], deadlines: dict[str, float]) -> list[dict[str, Any]] | None:
    """The ranks that are furthest behind, where all of these are beyond their deadline; else None."""
    if not nodes or not all(nodes):
        return None  # some agent has not told of its ranks yet
    rows = [row for rows in nodes for row in rows]
    least = min(row["marks"] for row in rows)
    last = [row for row in rows if row["marks"] == least]
    return last if all(row["unchanged_s"] > deadlines.get(row["phase"], deadlines["start"]) for row in last) else None


def differs(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The rank that differs from the others, and how; None where none does."""
    for row in rows:
        if row.get("state") in STOPPED:
            return row, f"{STOPPED[row['state']]} (state {row['state']})"
    if len(rows) == 1:
        return rows[0], "it is the only one"
    least, most = min(row["marks"] for row in rows), max(rows, key=lambda row: int(row["marks"]))
    if least < most["marks"]:
        row = next(row for row in rows if row["marks"] == least)
        others = sum(r["marks"] == least for r in rows) - 1
        also = f", and so are {others} more," if others else ""
        return row, f"it is behind{also} while others are in {most['phase']} {most['step']} at {most['at']}"
    tops = Counter(row["stack"][0] for row in rows if row.get("stack"))
    if len(tops) > 1:
        rare, count = min(tops.items(), key=lambda item: item[1])
        if count < max(tops.values()) or len(rows) == 2:
            row = next(row for row in rows if row.get("stack") and row["stack"][0] == rare)
            return row, f"it is in {rare}, and others are in {tops.most_common(1)[0][0]}"
    return None, ""
