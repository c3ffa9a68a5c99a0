"""What plans, comparisons of hosts, reports and diagnoses look like, in lines."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from launcher import report as reports
from launcher import ui
from launcher.cadence import Cadence
from launcher.checkpoints import Condition, Pruned, Row
from launcher.errors import ExitCode, in_bytes
from launcher.plan import Plan
from launcher.prepare.between_hosts import proposals
from launcher.prepare.checks import COLUMNS, SEVERITY, Check, cell, several
from launcher.prepare.run import Result
from launcher.report import Node, Report, Start, span
from launcher.rundir import Run
from launcher.why import VERDICTS, Diagnosis


def plan(value: Plan, saving: Cadence) -> None:
    """The plan as a person reads it before saying yes."""
    ranks = f"{value.world_size} on {machines(value)}"
    stage = "off (Accelerate)" if value.deepspeed is None else str(value.deepspeed["zero_optimization"]["stage"])
    left_out = "".join(f"; left out: {count} {reason}" for reason, count in value.left_out.items())
    lengths = "" if value.padded_lengths is None else f"; {ui.counted(value.padded_lengths, 'padded length')}"
    on_host = f" and {in_bytes(value.host_bytes_per_rank)} in the host's memory" if value.host_bytes_per_rank else ""
    ui.grid(
        [
            ("run", f"{value.name} in {value.run_dir}"),
            ("ranks", f"{ranks}, backend {value.backend}, ZeRO {stage}"),
            (
                "step",
                f"{value.step_seconds:g} padded s = {ui.counted(value.world_size, 'rank')}"
                f" x {ui.counted(value.accumulation, 'micro-batch')} x {value.micro_batch_seconds:g} s",
            ),
            ("steps", f"{value.max_steps} = {value.epochs:.2f} epochs of {value.steps_per_epoch}"),
            ("training", f"{value.utterances} utterances, {value.audio_hours:.2f} h{left_out}"),
            ("padding", f"{value.padding:.1%}; straggler factor {value.straggler:.3f}{lengths}"),
            ("evaluation", f"{value.evaluation_utterances} utterances"),
            ("model", f"{value.parameters:,} parameters, {value.trained_parameters:,} trained"),
            ("memory", f"{in_bytes(value.state_bytes_per_rank)} of model states a rank{on_host}, activations on top"),
            ("checkpoint", in_bytes(value.checkpoint_bytes)),
            *cadence(saving),
            *(("note", note) for note in value.notes),
            *(("file", file) for file in value.files),
            *commands(value),
        ]
    )


def cadence(value: Cadence) -> list[tuple[str, str]]:
    """What saves cost, and how often they lose least."""
    best = lasting(value.best_interval_s)
    if value.best_every_steps is None:
        own = f"every_steps {value.every_steps}: loss unknown, {value.step_source}"
    else:
        best = f"{ui.counted(value.best_every_steps, 'step')} ({best})"
        assert value.every_steps_loss is not None and value.step_s is not None
        own = f"every_steps {value.every_steps} loses {share(value.every_steps_loss)} of the time"
    known = [] if value.step_s is None else [("step time", f"{lasting(value.step_s)} ({value.step_source})")]
    waits, durable = lasting(value.stall_s), lasting(value.durable_s)
    return [
        ("save", f"training waits {waits}, durable after {durable} ({value.saves_source})"),
        *known,
        ("failures", f"one in {lasting(value.mtbf_s)} ({value.mtbf_source}; --mtbf sets it)"),
        ("interval", f"{own}; least is lost with a save every {best}: {share(value.best_loss)}"),
    ]


def lasting(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.001 else "under 1 ms"


def share(loss: float) -> str:
    return f"{loss * 100:.2g}%" if loss >= 1e-5 else "under 0.001%"


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
    ui.answer(f"{'':<{width}}{''.join(f'{c:<8}' for c in columns)}")
    for s in seen:
        row = {c: cell(checks, s.name, c) for c in columns}
        words = [f"{s.reached_s:.1f} s" if (c, v) == ("reach", "ok") else CELLS[v] for c, v in row.items()]
        ui.answer(
            f"{s.name:<{width}}{''.join(f'{w:<8}' for w in words)}", style="red" if "fail" in row.values() else ""
        )
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
        ui.answer(text, style="red" if first.verdict == "fail" else "")
        if first.hint:
            ui.answer(f"     hint: {first.hint}")
    ways: dict[str, list[str]] = {}
    for name, way in proposals(result.found).items():
        ways.setdefault(way, []).append(name)
    ui.answer("")
    for line in result.mended:
        ui.answer(f"--fix: {line}")
    if (total := next((c for c in checks if c.name == "all-reduce" and c.verdict == "ok"), None)) is not None:
        ui.answer(f"all-reduce over {ui.counted(len(seen), 'host')}: {total.found}")
    for way, at in ways.items():
        ui.answer(f"proposed, not set: {way} ({several(at)})")
    if result.found.sizes_unknown:
        ui.answer(result.found.sizes_unknown)
    red = len({c.host for c in checks if c.verdict == "fail"})
    ui.answer(f"{ui.counted(len(seen), 'host')}: " + (f"{red} not ready" if red else "ready"))


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
    ui.grid(
        [
            ("run", f"{value.name} in {value.run_dir}"),
            ("state", state(value)),
            *(("job", job_of(value, job)) for job in value.jobs[-1:]),
            ("steps", f"{value.step} of {value.max_steps}, {ui.counted(value.attempts, 'attempt')}"),
            ("audio", audio if value.metrics else "none yet"),
            ("sealed", (", ".join(str(s) for s in value.sealed) or f"none {value.none_sealed}") + best),
            *([("left out", left_out(value))] if value.left_out else []),
            *([("slow", slow(value.straggler))] if value.straggler else []),
            *(("evaluation", line) for line in reports.unevaluated(value)[-3:]),
            *(("avoided", f"{a['host']}: {a.get('why', '')}{until(a)}") for a in value.avoided),
        ]
    )
    if value.attempts > 1:
        ui.answer("\nattempts")
        attempts(value.history)
    doing = [at_work(node) for node in value.nodes] if value.state == "running" else []
    if any(odd for _, odd in doing) or (len(doing) > 1 and any(node.doing for node in value.nodes)):
        ui.answer("\nnodes")
        for text, odd in doing:
            ui.answer(f"  {text}{odd}")
    if value.evaluations:
        ui.answer("")
        curve(value.evaluations)
    if heard:
        ui.answer("")
        for row in heard:
            ui.answer(f"said   {row['ref']}")
            ui.answer(f"heard  {row['hyp']}")
    if value.failure:
        ui.answer("")
        ui.answer(f"failed: {value.failure['message']}")
        for line in value.failure["evidence"]:
            ui.answer(f"evidence: {line}")
        ui.answer(f"hint: {value.failure['hint']}")
    ui.commands_next(commands)


def left_out(value: Report) -> str:
    last = next(m["step"] for m in reversed(value.metrics) if m.get("left_out"))
    return f"{ui.counted(value.left_out, 'step')} with a loss or gradient that was not finite, the last at step {last}"


def slow(row: dict[str, Any]) -> str:
    return f"rank {row['rank']} on {row['host']} takes {row['factor']:.1f}x as long as the others (step {row['step']})"


def state(value: Report) -> str:
    """The state in words."""
    if value.holder is not None:
        return f"running: pid {value.holder.get('pid', '?')} on {value.holder.get('host', '?')}"
    if value.state == "finished" and value.history[-1].why:
        return f"finished: {value.history[-1].why}"
    return {
        "created": "created, not started yet",
        "interrupted": "interrupted: the launcher was gone before it could say how the ranks ended",
        "stopped": f"stopped on request{asked(value.history[-1:])}, with its work sealed",
    }.get(value.state, value.state)


def asked(starts: list[Start]) -> str:
    """By whom, where the last one stopped for that."""
    return "".join(f" ({start.asked})" for start in starts if start.asked)


def clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def until(row: dict[str, Any]) -> str:
    return f"; until {clock(row['until'])}" if row.get("until") is not None else ""


SHOWN_ATTEMPTS = 10


def attempts(starts: list[Start]) -> None:
    """A line for each, the newest last; of very many the oldest are only counted."""
    several = any(len(s.hosts) > 1 for s in starts) or len({tuple(s.hosts) for s in starts}) > 1
    if len(starts) > SHOWN_ATTEMPTS:
        ui.answer(f"  {len(starts) - SHOWN_ATTEMPTS} before these")
    for s in starts[-SHOWN_ATTEMPTS:]:
        when = "?" * 19 if s.started is None else clock(s.started)
        hosts = some(s.hosts) if several else ""
        steps = "no step" if s.from_step is None else f"step {s.from_step} to {s.to_step}"
        ui.answer("  ".join(x for x in (f"  {s.number}", when, hosts, steps, how(s)) if x))


def how(start: Start) -> str:
    """How an attempt ended, short enough for a table."""
    if start.failure is None:
        return f"{start.state}{asked([start])}"
    message = start.failure["message"].partition("\n")[0]
    return f"failed: {message if len(message) <= 100 else message[:99] + '…'}"


def some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


SILENT_S = 15
"""A node says something about once a second; clocks of hosts differ, and file servers cache, by less than this."""


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
    age_s = time.time() - node.heard if node.heard is not None else 0.0
    silent = f"; silent for {age_s:.0f} s" if age_s > SILENT_S else ""
    return f"{who}{most}", silent + "".join(odd[:4]) + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")


def why(value: Diagnosis) -> None:
    """A failure as a person reads it at night: first what happened, then how that is known, last what to type."""
    rows = [("run", f"{value.name} in {value.run_dir}, {value.state}")]
    unevaluated = [("evaluation", line) for line in value.unevaluated[-3:]]
    if value.code is None:
        ui.grid([rows[0], ("attempt" if value.attempt else "state", value.message), *unevaluated])
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
            *unevaluated,
        ]
        ui.grid([(name, text) for name, text in rows if text])
    for excerpt in value.excerpts:
        ui.answer(f"\n{excerpt.title}:")
        for line in excerpt.lines:
            ui.answer(f"  {line.expandtabs()[:500]}")
    if value.earlier:
        ui.answer("\nattempts that failed before it")
        attempts(value.earlier)
    if value.hint:
        ui.answer(f"\nhint: {value.hint}")
    ui.answer("\nnext:")
    for command in value.commands:
        ui.answer(f"  {command}")


def steps_of(start: Start) -> str:
    return "before its first step" if start.from_step is None else f"step {start.from_step} to {start.to_step}"


def curve(evaluations: list[dict[str, Any]]) -> None:
    """WER over the steps, a bar for each evaluation."""
    first = evaluations[0]["wer"]
    best = min(e["wer"] for e in evaluations)
    if len({e.get("normalizer") for e in evaluations}) > 1:
        ui.answer("these are under different normalizers and cannot be compared")
    ui.answer(f"{'step':>8}  {'WER':>7}  {'sub':>5} {'ins':>5} {'del':>5} {'words':>6}  loss")
    for e in evaluations:
        counts = f"{e['substitutions']:>5} {e['insertions']:>5} {e['deletions']:>5} {e['words']:>6}"
        bar = "█" * round(min(1.0, e["wer"]) * 30)
        text = f"{e['step']:>8}  {e['wer']:>7.2%}  {counts}  {e['loss']:<8.4g} {bar}"
        ui.answer(text, style=ui.purple(e["wer"], first, best))


# Checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoints(rows: list[Row]) -> None:
    """A line for each, oldest first; what is wrong with one under it."""
    if not rows:
        ui.answer("no checkpoint is sealed yet")
        return
    known = [row.wer for row in rows if row.wer is not None]
    ui.answer(f"{'step':>8}  {'WER':>8}  {'size':>10}  {'state':<8}  {'marks':<15}  {'ranks':>5}  resumes into")
    for row in rows:
        seen, into = row.condition, row.resumes_into
        wer = "-" if row.wer is None else f"{row.wer:.2%}"
        size = in_bytes(seen.bytes) if seen.manifest else "-"
        marks = ", ".join(
            w for w, is_so in (("best", row.best), ("pinned", row.pinned), ("in use", row.leased)) if is_so
        )
        ranks = "-" if row.ranks is None else str(row.ranks)
        shape = "-" if into is None else f"ZeRO {into['zero_stage']}, {into['precision']}, any number of ranks"
        text = f"{seen.step:>8}  {wer:>8}  {size:>10}  {seen.state:<8}  {marks:<15}  {ranks:>5}  {shape}"
        style = "" if row.wer is None else ui.purple(row.wer, known[0], min(known))
        ui.answer(text, style="red" if seen.problems else style)
        for problem in seen.problems:
            ui.answer(f"{'':>8}  {problem}")


def hashed() -> Callable[[int, int, int], None]:
    """Says every few seconds how far the hashing of a checkpoint has come."""
    shown = time.monotonic()

    def tell(step: int, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= ui.Progress.EVERY_S:
            shown = time.monotonic()
            ui.say(f"step {step}: {in_bytes(done)} of {in_bytes(total)} hashed")

    return tell


def conditions(seen: list[Condition]) -> None:
    """A line for each checkpoint that was verified; the problems are told by the error that follows."""
    for one in seen:
        what = f"{ui.counted(one.files, 'file')}, {in_bytes(one.bytes)}" if one.manifest else ""
        what = "it was removed meanwhile" if one.state == "gone" else what
        ui.answer(f"{one.step:>8}  {one.state:<8}  {what}", style="red" if one.state == "damaged" else "")
    if not seen:
        ui.answer("no checkpoint is sealed yet")


def pruned(done: Pruned) -> None:
    goes = "would go" if done.dry_run else "removed"
    for step in sorted(done.stays.keys() | done.goes.keys()):
        what = ("stays", ", ".join(done.stays[step])) if step in done.stays else (goes, in_bytes(done.goes[step]))
        ui.answer(f"{step:>8}  {what[0]:<8}  {what[1]}")
    freed = f", {in_bytes(sum(done.goes.values()))}" if done.goes else ""
    ui.answer(f"{ui.counted(len(done.goes), 'checkpoint')} {goes}{freed}; {len(done.stays)} kept")
