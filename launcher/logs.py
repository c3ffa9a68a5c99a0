"""Which lines of a run's logs somebody wants to see, and where they are. Reads; writes nothing.

Logs are files of a run's attempts, one for each rank, each node and each ssh connection or srun. Their lines carry no
time, so they are shown log by log, and while a run is followed in the order in which they come.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher import lock, report, rundir
from launcher.errors import NotFoundError, UsageError, printable
from launcher.report import Node
from launcher.rundir import Attempt, Run

BLOCK_BYTES = 1 << 16
LINE_BYTES = 1 << 16
"""A line that is longer comes in pieces: what a rank prints may have no end."""

POLL_S = 0.25

Wants = Callable[[str], bool]
Kind = Literal["rank", "node", "ssh", "srun"]


@dataclass(frozen=True)
class Log:
    """One file that grows."""

    path: Path
    kind: Kind
    number: int
    """Of the rank, or of the node."""
    attempt: int
    host: str | None
    """Where the attempt has more than one."""


@dataclass(frozen=True)
class Line:
    log: Log
    text: str
    several_attempts: bool
    """Whether lines of other attempts are shown too."""

    def render(self) -> str:
        """With the prefix that names its writer, and nothing in it that drives a terminal."""
        log = self.log
        words = [f"a{log.attempt}"] * self.several_attempts + [log.kind, str(log.number), log.host or ""]
        return printable(f"[{' '.join(words).rstrip()}] {self.text.expandtabs()}").rstrip()

    def to_json(self) -> dict[str, object]:
        log = self.log
        return {"attempt": log.attempt, "log": log.kind, "number": log.number, "host": log.host, "line": self.text}


# Which logs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What was asked for, as it was written; None where it was not.

    Raises:
        UsageError: one of the lists cannot be read.
    """

    ranks: str | None = None
    """Numbers, `all` or `failed`."""
    nodes: str | None = None
    """Numbers and host names, or `all`."""
    attempts: str | None = None
    """Numbers, `all` or `last`."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks not in ("all", "failed"):
            _numbers("--rank", self.ranks, "0,3-5, all or failed")
        if self.attempts is not None and self.attempts not in ("all", "last"):
            _numbers("--attempt", self.attempts, "2, all or last")

    def pick_attempts(self, run: Run) -> list[Attempt]:
        """
        Raises:
            NotFoundError: there is no such attempt.
        """
        attempts = run.attempts()
        if not attempts or self.attempts == "all":
            return attempts
        if self.attempts is None and self.ranks == "failed":
            return [a for a in attempts if a.failure.exists()][-1:] or attempts[-1:]
        if self.attempts is None or self.attempts == "last":
            return attempts[-1:]
        wanted = _numbers("--attempt", self.attempts, "")
        found = [a for a in attempts if _among(a.number, wanted)]
        for low, high in wanted:
            if not any(low <= a.number <= high for a in attempts):
                has = report.span([a.number for a in attempts])
                raise NotFoundError(
                    f"{run.root} has no attempt {low if low == high else f'{low}-{high}'}", hint=f"it has {has}"
                )
        return found

    def pick_logs(self, attempt: Attempt) -> list[Log]:
        """The logs that are wanted of an attempt, also those that are not there, in the order to show them in.

        Raises:
            UsageError: there is no such rank or node.
        """
        nodes = report.layout(attempt)
        ranks = self._ranks(attempt, nodes)
        several = len(nodes) > 1
        logs: list[Log] = []
        for node in self._nodes(attempt, nodes):
            host = node.host if several else None

            def log(kind: Kind, number: int, host: str | None = host) -> Log:
                path_of = {"node": attempt.node_log, "ssh": attempt.ssh_log, "srun": attempt.srun_log}
                return Log(path_of.get(kind, attempt.rank_log)(number), kind, number, attempt.number, host)

            if (self.nodes is not None and self.ranks is None) or (self.ranks == "failed" and node.number in ranks[1]):
                logs += [log("ssh", node.number), log("srun", node.number), log("node", node.number)]
            logs += [log("rank", rank) for rank in node.ranks if _among(rank, ranks[0])]
        return logs

    def _nodes(self, attempt: Attempt, nodes: list[Node]) -> list[Node]:
        if self.nodes is None or self.nodes == "all":
            return nodes
        found: list[Node] = []
        for word in self.nodes.split(","):
            some = [n for n in nodes if word.strip() in (str(n.number), n.host)]
            if not some:
                has = ", ".join(f"{n.number} ({n.host})" if n.host else str(n.number) for n in nodes)
                raise UsageError(
                    f"attempt {attempt.number} has no node {word.strip()!r}", hint=f"its nodes are {has}; or --node all"
                )
            found += some
        return [n for n in nodes if n in found]

    def _ranks(self, attempt: Attempt, nodes: list[Node]) -> tuple[list[tuple[int, int]], list[int]]:
        """Spans of ranks, and nodes of which the nodes' own logs are wanted."""
        everything = [(0, max((r for n in nodes for r in n.ranks), default=0))]
        if self.ranks == "all" or (self.ranks is None and self.nodes is not None):
            return everything, []
        if self.ranks is None:
            return [(0, 0)], []
        if self.ranks == "failed":
            ranks, failed_nodes = failed(attempt, nodes)
            return [(r, r) for r in ranks], failed_nodes
        wanted = _numbers("--rank", self.ranks, "")
        last = everything[0][1]
        for low, high in wanted:
            if high > last:
                raise UsageError(
                    f"attempt {attempt.number} has no rank {max(low, last + 1)}",
                    hint=f"its ranks are {report.span([r for n in nodes for r in n.ranks])}",
                )
        return wanted, []


def failed(attempt: Attempt, nodes: list[Node]) -> tuple[list[int], list[int]]:
    """The ranks that failed, and where no rank did the nodes that may have.

    A rank that only lost its peers did not fail: after one failure all the others do that.
    """
    failure = rundir.read_json(attempt.failure)
    records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
    ranks = {int(r["rank"]) for r in records if not r["lost_peer"]}
    if failure is None:
        return sorted(ranks), []
    if failure.get("rank") is not None:
        ranks.add(int(failure["rank"]))
    if ranks:
        return sorted(ranks), []
    node = failure.get("node_rank")
    return [], [n.number for n in nodes] if node is None else [int(node)]


def _numbers(option: str, text: str, example: str) -> list[tuple[int, int]]:
    """`0,3-5` as spans, both ends in them."""
    spans = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{option} {text!r} is no list of numbers: {word.strip()!r}", hint=f"such as {example}")
        spans.append((int(match[1]), int(match[2] or match[1])))
    return spans


def _among(number: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(low <= number <= high for low, high in spans)


# Their lines ---------------------------------------------------------------------------------------------------------


class Reader:
    """A file that others append to, read by lines that are complete: the last one may still be being written.

    A carriage return ends a line as well, or a progress bar would be one line that never ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode = 0
        self.torn = b""

    def fresh(self) -> Iterator[str]:
        """What was completed since the last call. A file that was replaced or cut short is read from its start."""
        try:
            file = self.path.open("rb")  # anew each time: NFS then asks its server
        except OSError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if self.inode not in (0, stat.st_ino) or stat.st_size < self.offset:
                self.offset, self.torn = 0, b""
            self.inode = stat.st_ino
            file.seek(self.offset)
            while block := file.read(BLOCK_BYTES):
                self.offset += len(block)
                lines = (self.torn + block).splitlines(keepends=True)
                complete = lines[-1].endswith(b"\n") or len(lines[-1]) >= LINE_BYTES
                self.torn = b"" if complete else lines.pop()
                yield from map(text_of, lines)

    def all(self) -> Iterator[str]:
        yield from self.fresh()
        yield from self.rest()

    def rest(self) -> list[str]:
        """The line that nobody completed."""
        torn, self.torn = self.torn, b""
        return [text_of(torn)] if torn else []

    def tail(self, count: int, wants: Wants) -> list[str]:
        """The last `count` complete lines that are wanted, read from the end of the file as far as needed; `fresh` goes
        on behind them."""
        found: list[str] = []
        try:
            file = self.path.open("rb")
        except OSError:
            return found
        with file:
            stat = os.fstat(file.fileno())
            self.inode, self.offset, self.torn = stat.st_ino, stat.st_size, b""
            position, head = stat.st_size, b""
            while position > 0 and (len(found) < count or position == stat.st_size):
                start = max(0, position - BLOCK_BYTES)
                file.seek(start)
                lines = (file.read(position - start) + head).splitlines(keepends=True)
                if position == stat.st_size and lines and not lines[-1].endswith(b"\n"):
                    self.torn = lines.pop()
                head = lines.pop(0) if start > 0 and lines and len(lines[0]) < LINE_BYTES else b""
                found += [text for text in map(text_of, reversed(lines)) if wants(text)]
                position = start
        return found[:count][::-1]


def text_of(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")


def pattern(regex: str) -> Wants:
    """Whether a line has it in it.

    Raises:
        UsageError: it is no regular expression.
    """
    try:
        found = re.compile(regex).search
    except re.error as error:
        raise UsageError(
            f"--grep {regex!r} is no regular expression: {error}", hint="such as --grep 'loss|WER'"
        ) from error
    return lambda text: found(text) is not None


@dataclass(frozen=True)
class View:
    """What is shown of the logs that were selected."""

    tail: int | None = None
    """So many lines of each log; None: all."""
    since_s: float | None = None
    """Only logs that something was written to so long ago or later."""
    wants: Wants = lambda _: True

    def first(self, reader: Reader, *, torn: bool = False) -> Iterable[str]:
        """The lines that are there; the last one as far as it was written too, where `torn` says so."""
        if self.since_s is not None and reader.path.stat().st_mtime < time.time() - self.since_s:
            return reader.tail(0, self.wants)
        if self.tail is None:
            return filter(self.wants, reader.all() if torn else reader.fresh())
        found = reader.tail(self.tail, self.wants)
        found += filter(self.wants, reader.rest() if torn else ())
        return found[max(0, len(found) - self.tail) :]


def show(run: Run, selection: Selection, view: View, missing: Callable[[str], None]) -> Iterator[Line]:
    """The lines of the selected logs as they are now.

    Args:
        missing: told about each rank that was asked for by its number and has said nothing.

    Raises:
        NotFoundError: the run has no such attempt, or none of the logs is there.
    """
    attempts = selection.pick_attempts(run)
    if not attempts:
        raise NotFoundError(f"{run.root} has no logs: it was not started yet", hint=f"`speechctl resume {run.root}`")
    wanted = [log for attempt in attempts for log in selection.pick_logs(attempt)]
    there = [log for log in wanted if log.path.exists()]
    if not there:
        raise _nothing(run, selection, attempts, wanted)
    if selection.ranks not in ("all", "failed") and selection.nodes is None:
        for log in wanted:
            if log not in there or log.path.stat().st_size == 0:
                missing(
                    f"rank {log.number} of attempt {log.attempt} has {'said nothing' if log in there else 'no log'}"
                )
    for log in there:
        for text in view.first(Reader(log.path), torn=True):
            yield Line(log, text, len(attempts) > 1)


def _nothing(run: Run, selection: Selection, attempts: list[Attempt], wanted: list[Log]) -> NotFoundError:
    which = f"attempt {attempts[-1].number}" if len(attempts) == 1 else "these attempts"
    if selection.ranks == "failed" and not wanted:
        return NotFoundError(
            f"{which} of {run.root} has no rank that failed", hint=f"`speechctl why {run.root}` says how it ended"
        )
    named = {"all": "its ranks", "failed": "the ranks that failed", None: "rank 0"}
    who = (
        named.get(selection.ranks, f"rank {selection.ranks}") if selection.nodes is None else f"node {selection.nodes}"
    )
    return NotFoundError(
        f"{which} of {run.root} has no log of {who}",
        hint=f"`speechctl logs {run.root} --node all` shows all there is, `speechctl why {run.root}` how it ended",
    )


def follow(run: Run, selection: Selection, view: View) -> Iterator[Line]:
    """The lines that are there and those that come, of later attempts too, until nobody has the run any more."""
    readers: dict[Log, Reader] = {}
    numbered = selection.attempts not in (None, "all", "last")
    first = 0  # of the attempts to show; 0 until there is one
    while True:
        held = lock.holder(run) is not None  # asked first: what was written before the end is read after it
        attempts = run.attempts()
        picked = [a.number for a in selection.pick_attempts(run)] if numbered or not first else []
        if numbered:
            held = held and attempts[-1].number in picked
            attempts = [a for a in attempts if a.number in picked]
        came_later = first > 0
        first = first or min(picked, default=0)
        wanted = [log for a in attempts if a.number >= first for log in selection.pick_logs(a)]
        for log in (log for log in wanted if log.path.exists()):
            known = log in readers or came_later
            reader = readers.setdefault(log, Reader(log.path))
            several = len({shown.attempt for shown in readers}) > 1
            for text in filter(view.wants, reader.fresh()) if known else view.first(reader):
                yield Line(log, text, several)
        if not held:
            for log, reader in readers.items():
                for text in filter(view.wants, reader.rest()):
                    yield Line(log, text, len({shown.attempt for shown in readers}) > 1)
            return
        time.sleep(POLL_S)
