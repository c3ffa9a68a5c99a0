"""How things look: the only user of rich. Answers go to stdout, progress to stderr, and nothing needs colour."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher import report as reports
from launcher.errors import printable


class _Plain(Console):
    """Lines as they are: nothing is wrapped, cropped or padded, and without a terminal there are no escape codes."""

    def __init__(self, *, stderr: bool) -> None:
        # rich's own NO_COLOR keeps bold; here it means that nothing but the text is written.
        color = None if os.environ.get("NO_COLOR") else "auto"
        super().__init__(stderr=stderr, color_system=color, highlight=False, soft_wrap=True)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        """Nobody reads what we say any more. An answer ends there; progress is not worth a run, which goes on."""
        self.quiet = True
        if not self.stderr:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141)


out = _Plain(stderr=False)
err = _Plain(stderr=True)

DIM, BRIGHT = (88, 48, 128), (216, 160, 255)
"""The product's purple: a run starts at the first shade and ends at the second."""


def purple(wer: float, first: float, best: float) -> str:
    """A shade that brightens as WER falls from the first one seen to the best."""
    span = first - best
    share = 1.0 if span <= 0 or math.isnan(wer) else min(1.0, max(0.0, (first - wer) / span))
    red, green, blue = (round(d + (b - d) * share) for d, b in zip(DIM, BRIGHT, strict=True))
    return f"rgb({red},{green},{blue})"


def error(text: str) -> None:
    first, newline, rest = printable(text).partition("\n")
    say(first, style="bold red" if first.startswith("error:") else "")
    if newline:
        say(rest)


def failed(failure: dict[str, Any]) -> None:
    """A failure.json, in the form of every other error."""
    evidence = "\n          ".join(reports.evidence(failure))
    error(f"error: {failure['message']}\n\nevidence: {evidence}\n\nhint: {failure['hint']}")


def say(text: str, style: str = "") -> None:
    """A line of progress. A terminal that was closed is no reason to end a run."""
    with suppress(OSError):
        err.print(Text(printable(text), style=style))


def answer(text: str, style: str = "") -> None:
    out.print(Text(printable(text).rstrip(" "), style=style))


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def grid(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        answer(f"{name:<{width}}{value}")


def commands_next(commands: list[str]) -> None:
    answer("\nnext:")
    for command in commands:
        answer(f"  {command}")


class Progress:
    """Prints what an attempt's rank 0 reports, a line a fact; steps at most every few seconds."""

    EVERY_S = 5.0

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.shown = 0.0
        self.first: float | None = None
        self.best = math.inf
        self.audio_s = 0.0
        self.step_s = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        kind = row.get("event")
        if kind is None:
            self._step(row)
        elif kind == "evaluated":
            self.first = row["wer"] if self.first is None else self.first
            self.best = min(self.best, row["wer"])
            text = (
                f"step {row['step']}: WER {row['wer']:.2%}  ({row['substitutions']} sub, {row['insertions']} ins,"
                f" {row['deletions']} del of {row['words']} words in {row['utterances']} utterances)"
                f"  loss {row['loss']:.4g}  {row['blocked_s']:.1f} s"
            )
            say(text, style=purple(row["wer"], self.first, self.best))
        elif kind in LINES:
            with suppress(KeyError):  # a worker of another version says it in other words
                say(LINES[kind].format(**row))
            if kind == "relaunching":
                self._relaunching(row)

    def _relaunching(self, row: dict[str, Any]) -> None:
        lost = f"; {counted(row['lost'], 'step')} lost" if row["lost"] else ""
        say(f"starting again in {row['wait_s']:g} s from step {row['step']}{lost} (Ctrl-C: not)")
        for host in row["used_again"]:
            say(f"{host} is used again: no other host can take its place")

    def catch_up(self, rows: list[dict[str, Any]]) -> None:
        """Take in what was reported before we came, and print the last few facts of it."""
        facts = [k for k, row in enumerate(rows) if row.get("event") is not None][-5:]
        steps = [k for k, row in enumerate(rows) if row.get("event") is None][-1:]
        for k, row in enumerate(rows):
            err.quiet = k not in (*facts, *steps)
            self.shown = -math.inf if k in steps else self.shown
            self(row)
        err.quiet = False

    def _step(self, row: dict[str, Any]) -> None:
        self.audio_s += row["audio_s"]
        self.step_s += row["step_s"]
        if time.monotonic() - self.shown < self.EVERY_S and row["step"] != self.max_steps:
            return
        self.shown = time.monotonic()
        speed = self.audio_s / self.step_s if self.step_s else 0.0
        loss, norm = (  # of a step that was left out
            "not finite" if row[name] is None else f"{row[name]:{form}}"
            for name, form in (("loss", ".4g"), ("grad_norm", ".3g"))
        )
        say(
            f"step {row['step']}/{self.max_steps}  epoch {row['epoch']}  loss {loss}"
            f"  grad norm {norm}  lr {row['learning_rate']:.2e}  {speed:.0f}x real time"
        )


LINES = {
    "started": "all {world_size} ranks are up: {utterances} utterances, from step {step} to {max_steps}",
    "fresh": "starting over at step 0; what was sealed before is put aside",
    "put_aside": "a checkpoint does not verify and was put aside: {problem}",
    "fell_back": "going on from step {step}; steps lost by that: {lost}",
    "sealed": "step {step}: sealed a checkpoint; training waited {blocked_s:.1f} s for it",
    "trouble_after_seal": "step {step}: sealed a checkpoint, but then: {problem}",
    "save_failed": "step {step}: no checkpoint: {error}; training goes on",
    "left_out": "{message}; left out, {in_row} in a row",
    "straggler": "step {step}: the others wait for rank {rank} on {host}: it takes {factor:.1f}x as long as they do"
    " ({own_s:.3f} s a step, {others_s:.3f} s)",
    "straggler_gone": "step {step}: no rank is slower than the others any more",
    "evaluation_failed": "step {step}: not evaluated: {error}; training goes on",
    "early_stopping": "step {step}: {why}",
    "stopping": "stopping: the ranks finish their step and seal it (Ctrl-C again ends them at once)",
    "killing": "ending the ranks now; sealed checkpoints stay",
    "relaunching": "attempt {attempt} failed: {message}",
    "stopped": "step {step}: stopped, and sealed",
    "finished": "step {step}: finished, and sealed",
}
