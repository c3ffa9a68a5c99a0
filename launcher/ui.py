"""How things look: the only user of rich. Answers go to stdout, progress to stderr, and nothing needs colour."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher import report as reports
from launcher.errors import ExitCode, printable
from launcher.plan import Plan
from launcher.prepare.between_hosts import proposals
from launcher.prepare.checks import COLUMNS, SEVERITY, Check, cell, several
from launcher.prepare.run import Result
from launcher.report import Node, Report, Start, span
from launcher.rundir import Run
from launcher.why import VERDICTS, Diagnosis


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


def say(text: str, style: str = "") -> None:
    """A line of progress. A terminal that was closed is no reason to end a run."""
    with suppress(OSError):
        err.print(Text(printable(text), style=style))


def answer(text: str, style: str = "") -> None:
    out.print(Text(printable(text).rstrip(" "), style=style))


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def grid(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        answer(f"{name:<{width}}{value}")


def plan(value: Plan) -> None:
    """The plan as a person reads it before saying yes."""
    ranks = f"{value.world_size} on {machines(value)}"
    stage = "off (Accelerate)" if value.deepspeed is None else str(value.deepspeed["zero_optimization"]["stage"])
    left_out = "".join(f"; left out: {count} {reason}" for reason, count in value.left_out.items())
    grid(
        [
            ("run", f"{value.name} in {value.run_dir}"),
            ("ranks", f"{ranks}, backend {value.backend}, ZeRO {stage}"),
            (
                "step",
                f"{value.step_seconds:g} padded s = {counted(value.world_size, 'rank')}"
                f" x {counted(value.accumulation, 'micro-batch')} x {value.micro_batch_seconds:g} s",
            ),
            ("steps", f"{value.max_steps} = {value.epochs:.2f} epochs of {value.steps_per_epoch}"),
            ("training", f"{value.utterances} utterances, {value.audio_hours:.2f} h{left_out}"),
            ("padding", f"{value.padding:.1%}; straggler factor {value.straggler:.3f}"),
            ("evaluation", f"{value.evaluation_utterances} utterances"),
            ("model", f"{value.parameters:,} parameters, {value.trained_parameters:,} trained"),
            ("memory", f"{size(value.state_bytes_per_rank)} of model states a rank, activations on top"),
            ("checkpoint", size(value.checkpoint_bytes)),
            *(("note", note) for note in value.notes),
            *(("file", file) for file in value.files),
            *commands(value),
        ]
    )


MANY = 8
"""More hosts than this are not listed in a line; each has its own further down."""


def machines(value: Plan) -> str:
    """Hosts and their ranks; of many, how many have how many."""
    if len(value.hosts) <= MANY:
        return ", ".join(f"{h.name} ({h.slots})" for h in value.hosts)
    slots = Counter(h.slots for h in value.hosts)
    return f"{len(value.hosts)} hosts (" + ", ".join(f"{count} x {ranks}" for ranks, count in slots.items()) + ")"


def commands(value: Plan) -> list[tuple[str, str]]:
    """What is started, as a shell would read it. From the second node on, the words that are those of the first node's
    command up to the first that differs are an ellipsis."""
    asked, nodes = value.commands[: -len(value.hosts)], value.commands[-len(value.hosts) :]
    rows = [("job", shlex.join(command)) for command in asked]
    for k, command in enumerate(nodes):
        same = 0
        while k and same < len(command) and command[same] == nodes[0][same]:
            same += 1
        rows.append((f"node {k}", ("… " if same else "") + shlex.join(command[same:])))
    return rows


CELLS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?", None: "-"}


def prepared(result: Result) -> None:
    """The table by host, then a sentence for each cell that is not in order, then what might be set."""
    checks, seen = result.checks, result.found.seen
    columns = [c for c, names in COLUMNS.items() if any(check.name in names for check in checks)]
    width = max(len(s.name) for s in seen) + 2
    answer(f"{'':<{width}}{''.join(f'{c:<8}' for c in columns)}")
    for s in seen:
        row = {c: cell(checks, s.name, c) for c in columns}
        words = [f"{s.reached_s:.1f} s" if (c, v) == ("reach", "ok") else CELLS[v] for c, v in row.items()]
        answer(f"{s.name:<{width}}{''.join(f'{w:<8}' for w in words)}", style="red" if "fail" in row.values() else "")
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in (c for c in checks if c.verdict in ("warn", "fail", "unknown")):
        # What is wrong with many hosts in the same way is said once.
        own = check.host if check.hint else "\0"  # a reason without a hint names the host that it means
        texts = (text.replace(own, "…") for text in (check.found, check.expected, check.hint))
        groups.setdefault((check.verdict, check.name, *texts), []).append(check)
    for group in sorted(groups.values(), key=lambda g: -SEVERITY.index(g[0].verdict)):
        first, names = group[0], several([c.host for c in group])
        wanted = f" (expected: {first.expected})" if first.expected else ""
        text = f"\n{CELLS[first.verdict]:<5}{names}: {first.name}: {first.found}{wanted}"
        answer(text, style="red" if first.verdict == "fail" else "")
        if first.hint:
            answer(f"     hint: {first.hint}")
    ways: dict[str, list[str]] = {}
    for name, way in proposals(result.found).items():
        ways.setdefault(way, []).append(name)
    answer("")
    for line in result.mended:
        answer(f"--fix: {line}")
    if (total := next((c for c in checks if c.name == "all-reduce" and c.verdict == "ok"), None)) is not None:
        answer(f"all-reduce over {counted(len(seen), 'host')}: {total.found}")
    for way, at in ways.items():
        answer(f"proposed, not set: {way} ({several(at)})")
    if result.found.sizes_unknown:
        answer(result.found.sizes_unknown)
    red = len({c.host for c in checks if c.verdict == "fail"})
    answer(f"{counted(len(seen), 'host')}: " + (f"{red} not ready" if red else "ready"))


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
        say(
            f"step {row['step']}/{self.max_steps}  epoch {row['epoch']}  loss {row['loss']:.4g}"
            f"  grad norm {row['grad_norm']:.3g}  lr {row['learning_rate']:.2e}  {speed:.0f}x real time"
        )


LINES = {
    "started": "all {world_size} ranks are up: {utterances} utterances, from step {step} to {max_steps}",
    "put_aside": "a checkpoint does not verify and was put aside: {problem}",
    "sealed": "step {step}: sealed a checkpoint; training waited {blocked_s:.1f} s for it",
    "trouble_after_seal": "step {step}: sealed a checkpoint, but then: {problem}",
    "save_failed": "step {step}: no checkpoint: {error}; training goes on",
    "stopping": "stopping: the ranks finish their step and seal it (Ctrl-C again ends them at once)",
    "killing": "ending the ranks now; sealed checkpoints stay",
    "relaunching": "attempt {attempt} failed: {message}",
    "stopped": "step {step}: stopped, and sealed",
    "finished": "step {step}: finished, and sealed",
}


def show(run: Run, value: Report) -> None:
    """A run at a glance, and what makes sense to type next."""
    heard_at = value.best["step"] if value.best else (value.evaluations[-1]["step"] if value.evaluations else 0)
    report(value, reports.samples(run, heard_at, 4), reports.commands(value))


def job_of(value: Report, job: dict[str, Any]) -> str:
    said = f" {value.job['state']}" if value.job else ""
    why = f" ({value.job['reason']})" if value.job and value.job["reason"] else ""
    return f"{job['id']}{said}{why}, submitted {clock(job['time'])}"


def report(value: Report, heard: list[dict[str, Any]], commands: list[str]) -> None:
    """A run at its end, or where it stands."""
    rate = value.audio_s / value.training_s if value.training_s else 0.0
    best = "" if value.best is None else f"; best: step {value.best['step']}, WER {value.best['wer']:.2%}"
    audio = f"{rate / 3600:.4f} h/s ({rate:.0f}x real time), {value.audio_s / 3600:.2f} h trained on"
    grid(
        [
            ("run", f"{value.name} in {value.run_dir}"),
            ("state", state(value)),
            *(("job", job_of(value, job)) for job in value.jobs[-1:]),
            ("steps", f"{value.step} of {value.max_steps}, {counted(value.attempts, 'attempt')}"),
            ("audio", audio if value.metrics else "none yet"),
            ("sealed", (", ".join(str(s) for s in value.sealed) or "none yet") + best),
            *(("avoided", f"{a['host']}: {a.get('why', '')}{until(a)}") for a in value.avoided),
        ]
    )
    if value.attempts > 1:
        answer("\nattempts")
        attempts(value.history)
    doing = [at_work(node) for node in value.nodes] if value.state == "running" else []
    if any(odd for _, odd in doing) or (len(doing) > 1 and any(node.doing for node in value.nodes)):
        answer("\nnodes")
        for text, odd in doing:
            answer(f"  {text}{odd}")
    if value.evaluations:
        answer("")
        curve(value.evaluations)
    if heard:
        answer("")
        for row in heard:
            answer(f"said   {row['ref']}")
            answer(f"heard  {row['hyp']}")
    if value.failure:
        answer("")
        answer(f"failed: {value.failure['message']}")
        for line in value.failure["evidence"]:
            answer(f"evidence: {line}")
        answer(f"hint: {value.failure['hint']}")
    commands_next(commands)


def commands_next(commands: list[str]) -> None:
    answer("\nnext:")
    for command in commands:
        answer(f"  {command}")


def state(value: Report) -> str:
    """The state in words."""
    if value.holder is not None:
        return f"running: pid {value.holder.get('pid', '?')} on {value.holder.get('host', '?')}"
    return {
        "created": "created, not started yet",
        "interrupted": "interrupted: the launcher was gone before it could say how the ranks ended",
        "stopped": "stopped on request, with its work sealed",
    }.get(value.state, value.state)


def clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def until(row: dict[str, Any]) -> str:
    return f"; until {clock(row['until'])}" if row.get("until") is not None else ""


SHOWN_ATTEMPTS = 10


def attempts(starts: list[Start]) -> None:
    """A line for each, the newest last; of very many the oldest are only counted."""
    several = any(len(s.hosts) > 1 for s in starts) or len({tuple(s.hosts) for s in starts}) > 1
    if len(starts) > SHOWN_ATTEMPTS:
        answer(f"  {len(starts) - SHOWN_ATTEMPTS} before these")
    for s in starts[-SHOWN_ATTEMPTS:]:
        when = "?" * 19 if s.started is None else clock(s.started)
        hosts = some(s.hosts) if several else ""
        steps = "no step" if s.from_step is None else f"step {s.from_step} to {s.to_step}"
        answer("  ".join(x for x in (f"  {s.number}", when, hosts, steps, how(s)) if x))


def how(start: Start) -> str:
    """How an attempt ended, short enough for a table."""
    if start.failure is None:
        return start.state
    message = start.failure["message"].partition("\n")[0]
    return f"failed: {message if len(message) <= 100 else message[:99] + '…'}"


def some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def at_work(node: Node) -> tuple[str, str]:
    """What the ranks of a node do, as far as it says so, and those that do something else."""
    who = f"{node.number}  {node.host}  ranks {span(node.ranks)}  "
    if not node.doing:
        return f"{who}nothing heard yet", ""
    tasks = {rank: f"step {row.get('step', '?')} ({row.get('phase', '?')})" for rank, row in node.doing.items()}
    most = max(tasks.values(), key=list(tasks.values()).count)
    odd = [
        f"; rank {rank}: {task}, unchanged for {node.doing[rank].get('unchanged_s', 0):.0f} s"
        for rank, task in tasks.items()
        if task != most
    ]
    return f"{who}{most}", "".join(odd[:4]) + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")


def why(value: Diagnosis) -> None:
    """A failure as a person reads it at night: first what happened, then how that is known, last what to type."""
    rows = [("run", f"{value.name} in {value.run_dir}, {value.state}")]
    if value.code is None:
        grid([rows[0], ("attempt" if value.attempt else "state", value.message)])
    else:
        code = ExitCode(value.code).name.lower().replace("_", " ")
        verdict = None if value.verdict is None else VERDICTS.get(value.verdict, value.verdict)
        rows += [
            (
                "attempt",
                f"{value.attempt.number} of {value.attempts}, {steps_of(value.attempt)}" if value.attempt else "",
            ),
            ("cause", value.message),
            ("kind", f"{value.kind or code} (exit {value.code})"),
            ("verdict", f"{value.verdict}: {verdict}" if verdict else ""),
            ("others", value.others),
            ("then", value.followed),
            *(("evidence" if k == 0 else "", line) for k, line in enumerate(value.evidence)),
        ]
        grid([(name, text) for name, text in rows if text])
    for excerpt in value.excerpts:
        answer(f"\n{excerpt.title}:")
        for line in excerpt.lines:
            answer(f"  {line.expandtabs()[:500]}")
    if value.earlier:
        answer("\nattempts that failed before it")
        attempts(value.earlier)
    if value.hint:
        answer(f"\nhint: {value.hint}")
    answer("\nnext:")
    for command in value.commands:
        answer(f"  {command}")


def steps_of(start: Start) -> str:
    return "before its first step" if start.from_step is None else f"step {start.from_step} to {start.to_step}"


def curve(evaluations: list[dict[str, Any]]) -> None:
    """WER over the steps, a bar for each evaluation."""
    first = evaluations[0]["wer"]
    best = min(e["wer"] for e in evaluations)
    answer(f"{'step':>8}  {'WER':>7}  {'sub':>5} {'ins':>5} {'del':>5} {'words':>6}  loss")
    for e in evaluations:
        counts = f"{e['substitutions']:>5} {e['insertions']:>5} {e['deletions']:>5} {e['words']:>6}"
        bar = "█" * round(min(1.0, e["wer"]) * 30)
        text = f"{e['step']:>8}  {e['wer']:>7.2%}  {counts}  {e['loss']:<8.4g} {bar}"
        answer(text, style=purple(e["wer"], first, best))
