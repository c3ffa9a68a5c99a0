"""Whether the work that is sealed saw each utterance of each epoch exactly once, over all attempts and world sizes.

Every rank writes what it read in which step. Here those lines are followed step by step, each from the attempt whose
work stands: what an attempt did behind the step from which the next one went on was rolled back, and what is behind
the newest sealed checkpoint is not sealed yet. The checkpoints' own accounts are compared on the way. Reads; writes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher import report, rundir, sealing
from launcher.errors import DataError
from launcher.rundir import Attempt, Run


@dataclass(frozen=True)
class Discrepancy:
    """One thing that is not as it must be, and where, as far as it has a place."""

    what: str
    epoch: int | None = None
    step: int | None = None
    attempt: int | None = None
    rank: int | None = None
    utterance: str | None = None

    def __str__(self) -> str:
        """`attempt 2, rank 0, step 7: …`."""
        names = ("attempt", "rank", "step", "epoch") if self.step is None else ("attempt", "rank", "step")
        places = [f"{name} {value}" for name in names if (value := getattr(self, name)) is not None]
        return f"{', '.join(places)}: {self.what}" if places else self.what


@dataclass
class Epoch:
    """What sealed work has seen of one epoch."""

    number: int
    utterances: int
    """As many as there are."""
    seen: int = 0
    """Different ones."""
    repeated: int = 0
    lost: int | None = None
    """None while the epoch is under way."""


@dataclass(frozen=True)
class Undone:
    """Steps of one attempt that do not count: their work was thrown away by what ended it, or is not sealed yet."""

    attempt: int
    first: int
    last: int
    utterances: int
    audio_s: float
    step_s: float
    pending: bool
    """It is the last attempt: a checkpoint may still seal them, if it runs."""


@dataclass(frozen=True)
class Standing:
    """Steps whose work is sealed, and who did it."""

    attempt: int
    ranks: int
    first: int
    last: int


@dataclass
class Audit:
    run_dir: str
    sealed: int
    """Step of the newest sealed checkpoint; 0: none, and nothing counts."""
    steps: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    undone: list[Undone] = field(default_factory=list)
    stands: list[Standing] = field(default_factory=list)
    discrepancies: list[Discrepancy] = field(default_factory=list)
    """In the order of steps; at most `LIMIT`."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exact": not self.discrepancies}

    def lines(self) -> list[str]:
        """As a person reads it."""
        said = [f"run      {self.run_dir}"]
        by = [f"attempt {s.attempt}: steps {_span(s.first, s.last)} on {_count(s.ranks, 'rank')}" for s in self.stands]
        said += [f"{'sealed' if k == 0 else '':<9}{line}" for k, line in enumerate(by or ["nothing yet"])]
        for k, part in enumerate(self.undone):
            work = f"{_count(part.utterances, 'utterance')}, {part.audio_s / 3600:.2f} h of audio, {part.step_s:.1f} s"
            which = "not sealed yet" if part.pending else "thrown away"
            steps = f"attempt {part.attempt}: steps {_span(part.first, part.last)}, {work}; {which}"
            said.append(f"{'undone' if k == 0 else '':<9}{steps}")
        if self.epochs:
            said += ["", f"{'epoch':>9}{'utterances':>12}{'seen':>12}{'repeated':>10}{'lost':>8}"]
        for e in self.epochs:
            lost = "" if e.lost is None else e.lost
            row = f"{e.number:>9}{e.utterances:>12}{e.seen:>12}{e.repeated:>10}{lost:>8}"
            said.append(row.rstrip() if e.lost is not None else f"{row.rstrip()}    under way")
        if self.epochs and not self.discrepancies:
            said += [
                "",
                "exact: sealed work saw no utterance of an epoch twice, and left out none of an epoch that is over",
            ]
        return said

    def complain(self) -> None:
        """
        Raises:
            DataError: where anything is not as it must be; names the first.
        """
        if self.discrepancies:
            others = len(self.discrepancies) - 1
            more = f" (and {'at least ' if others + 1 >= LIMIT else ''}{others} more)" if others else ""
            raise DataError(
                f"{self.discrepancies[0]}{more}",
                hint=f"`speechctl audit --json {self.run_dir}` lists them; where nobody touched a ledger it is a bug of"
                " speechctl",
            )


LIMIT = 20


@dataclass(frozen=True)
class Span:
    """Steps of one attempt that stand."""

    attempt: Attempt
    first: int
    last: int
    world_size: int
    accumulation: int
    utterances: int


def spans(run: Run, sealed: int) -> list[Span]:
    """Who did which of the steps that stand, oldest first."""
    found: list[Span] = []
    for attempt in run.attempts():
        started = [e for e in rundir.read_lines(attempt.events) if e["event"] == "started"]
        if not started:
            continue
        event = started[0]
        found = [cut(span, event["step"]) for span in found]
        shape = (event["world_size"], event["accumulation"], event["utterances"])
        found.append(Span(attempt, event["step"] + 1, sealed, *shape))
    return [span for span in (cut(span, sealed) for span in found) if span.first <= span.last]


def cut(span: Span, last: int) -> Span:
    return span if span.last <= last else Span(span.attempt, span.first, last, *_shape(span), span.utterances)


def _shape(span: Span) -> tuple[int, int]:
    return span.world_size, span.accumulation


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def audit(run: Run) -> Audit:
    """
    Raises:
        NotFoundError: there is no run in that directory.
        DataError: a file of it is not what speechctl writes.
    """
    value = report.read(run)
    result = Audit(run_dir=str(run.root), sealed=value.sealed[-1] if value.sealed else 0)
    try:
        return Auditor(run, result).go(value.sealed)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"a file of {run.root} is not what speechctl writes ({type(error).__name__}: {error})",
            hint="ledgers, events and manifests are not for editing; restore what was there",
        ) from error


class Auditor:
    def __init__(self, run: Run, result: Audit) -> None:
        self.run = run
        self.result = result
        self.seen: set[str] = set()
        """Of the epoch that is being read."""
        self.first: set[str] | None = None
        """Of the first epoch that is over."""
        self.others: dict[int, set[str]] = {}
        """Of those later ones in which it was not the same; seldom any."""
        self.shapes: list[list[int]] = []
        """Of the epoch that is being read: world size, accumulation, steps."""

    def found(self, what: str, **where: Any) -> None:
        if len(self.result.discrepancies) < LIMIT:
            self.result.discrepancies.append(Discrepancy(what, **where))

    def go(self, sealed: list[int]) -> Audit:
        standing = spans(self.run, self.result.sealed)
        accounts = {step: sealing.manifest_of(self.run.checkpoint(step))["progress"]["cursor"] for step in sealed}
        reached = 0
        for span in standing:
            if span.first != reached + 1:
                self.found(f"no attempt has done steps {reached + 1} to {span.first - 1}")
            reached = span.last
            self.result.stands.append(Standing(span.attempt.number, span.world_size, span.first, span.last))
            self.follow(span, accounts)
        if reached < self.result.sealed:
            self.found(f"no attempt has done steps {reached + 1} to {self.result.sealed}, which are sealed")
        if self.result.epochs:
            last = self.result.epochs[-1]
            self.leave(last, complete=last.seen == last.utterances)
        self.judge()
        stands = {span.attempt.number: span.last for span in standing}
        self.result.undone = [u for a in self.run.attempts() if (u := self.undone(a, stands.get(a.number)))]
        return self.result

    def follow(self, span: Span, accounts: dict[int, Any]) -> None:
        """The steps of one attempt that stand, all ranks of a step together."""
        ledgers = [Ledger(span.attempt.ledger(rank)) for rank in range(span.world_size)]
        for step in range(span.first, span.last + 1):
            self.result.steps += 1
            epochs = set()
            for rank, ledger in enumerate(ledgers):
                where = {"attempt": span.attempt.number, "rank": rank, "step": step}
                row = ledger.at(step)
                if row is None:
                    self.found("the ledger has no line for this step", **where)
                    continue
                if ledger.twice:
                    self.found("the ledger has two lines for this step", **where)
                if row["epoch"] not in epochs:
                    epochs.add(row["epoch"])
                    self.enter(row["epoch"], span, where)
                self.count(row["ids"], where)
            if len(epochs) > 1:
                where = {"attempt": span.attempt.number, "step": step}
                self.found(f"the ranks are in different epochs: {sorted(epochs)}", **where)
            self.shape(span)
            if step in accounts and epochs:
                self.compare(accounts[step], step, span)

    def enter(self, number: int, span: Span, where: dict[str, int]) -> None:
        """Begin another epoch, where `number` is one."""
        epochs = self.result.epochs
        if epochs and epochs[-1].number == number:
            return
        if number != (epochs[-1].number + 1 if epochs else 0):
            self.found(f"epoch {number} follows {f'epoch {epochs[-1].number}' if epochs else 'nothing'}", **where)
        if epochs:
            self.leave(epochs[-1], complete=True)
        epochs.append(Epoch(number, span.utterances))
        self.seen, self.shapes = set(), []

    def leave(self, epoch: Epoch, *, complete: bool) -> None:
        epoch.seen = len(self.seen)
        if complete:
            epoch.lost = epoch.utterances - epoch.seen
            if self.first is None:
                self.first = self.seen
            elif self.seen != self.first:
                self.others[epoch.number] = self.seen

    def count(self, ids: list[str], where: dict[str, int]) -> None:
        epoch, before = self.result.epochs[-1], len(self.seen)
        new = set(ids)
        if not self.seen.isdisjoint(new) or len(new) != len(ids):
            for number, utterance in enumerate(ids):
                if utterance in self.seen or utterance in ids[:number]:
                    again = f"{utterance} is seen again in epoch {epoch.number}"
                    self.found(again, **where, epoch=epoch.number, utterance=utterance)
        self.seen |= new
        epoch.repeated += len(ids) - (len(self.seen) - before)
        epoch.seen = len(self.seen)

    def shape(self, span: Span) -> None:
        if self.shapes and tuple(self.shapes[-1][:2]) == _shape(span):
            self.shapes[-1][2] += 1
        else:
            self.shapes.append([*_shape(span), 1])

    def compare(self, account: dict[str, Any], step: int, span: Span) -> None:
        """A sealed checkpoint's account of its epoch with the ledgers'."""
        mine = {"epoch": self.result.epochs[-1].number, "history": self.shapes}
        if account != mine:
            said, read = json.dumps(account), json.dumps(mine)
            what = f"the checkpoint says {said}, the ledgers {read} (ranks, accumulation, steps)"
            self.found(what, attempt=span.attempt.number, step=step)

    def judge(self) -> None:
        """What only all epochs together can tell."""
        first = self.first or set()
        every = first.union(*self.others.values())
        for epoch in self.result.epochs:
            if epoch.lost is None:
                continue
            missing = sorted(every - self.others.get(epoch.number, first))
            for utterance in missing:
                lost = f"{utterance} was not seen in epoch {epoch.number}"
                self.found(lost, epoch=epoch.number, utterance=utterance)
            if epoch.lost != len(missing):
                what = f"{epoch.seen} utterances were seen in epoch {epoch.number}, and there are {epoch.utterances}"
                self.found(what, epoch=epoch.number)

    def undone(self, attempt: Attempt, stands: int | None) -> Undone | None:
        """What an attempt did behind the last of its steps that stand."""
        metrics = rundir.read_lines(attempt.metrics)
        lost = [m for m in metrics if stands is None or m["step"] > stands]
        if not lost:
            return None
        return Undone(
            attempt=attempt.number,
            first=lost[0]["step"],
            last=lost[-1]["step"],
            utterances=sum(m["utterances"] for m in lost),
            audio_s=round(sum(m["audio_s"] for m in lost), 3),
            step_s=round(sum(m["step_s"] for m in lost), 3),
            pending=attempt.number == self.run.attempts()[-1].number,
        )


class Ledger:
    """One rank's lines, read once from the first to the last."""

    def __init__(self, path: Path) -> None:
        self.rows = _rows(path)
        self.ahead: dict[str, Any] | None = next(self.rows, None)
        self.twice = False

    def at(self, step: int) -> dict[str, Any] | None:
        """The line of a step; steps are asked for in order."""
        while self.ahead is not None and self.ahead["step"] < step:
            self.ahead = next(self.rows, None)
        if self.ahead is None or self.ahead["step"] != step:
            return None
        row, self.ahead = self.ahead, next(self.rows, None)
        self.twice = self.ahead is not None and self.ahead["step"] == step
        return row


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; a torn last one is of a step that did not end."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if line.endswith(rundir.TORN + b"\n"):  # the line that was begun there follows whole
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}", hint="it was damaged; restore it") from error
