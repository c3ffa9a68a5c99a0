"""What a person asks of a run's checkpoints: which there are, whether they are whole, which would go.

Unpickles nothing. The rules themselves are in `retention`, and what may be done to a sealed directory is in `sealed`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher import recipe_file, report, retention, rundir, sealed, sealing
from launcher.errors import DataError, NotFoundError, UsageError
from launcher.lock import RunLock
from launcher.retention import Rules
from launcher.rundir import Run

THREADS = 8
"""Files that are hashed at once; enough for a shared file system, where one reader alone gets little of it."""

Tell = Callable[[int, int, int], object]
"""Called with a step, how many of its bytes were hashed, and of how many; from several threads, one at a time."""


@dataclass(frozen=True)
class Condition:
    """Whether a checkpoint is what was sealed."""

    step: int
    state: str
    """`sealed`: the manifest is intact, and every file is there and has its size. `verified`: the content is the same,
    too. `damaged`. `gone`: it was removed meanwhile."""
    files: int = 0
    bytes: int = 0
    """As the manifest has them; 0 where that cannot be read."""
    problems: list[str] = field(default_factory=list)
    """Each names its file."""
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    """Empty where it cannot be read."""

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "manifest"}


@dataclass(frozen=True)
class Row:
    """A checkpoint in a list."""

    condition: Condition
    wer: float | None
    """None: it was not evaluated in training."""
    best: bool
    """It is the one that `best` means."""
    pinned: bool
    leased: bool
    """Somebody reads it just now."""

    @property
    def resumes_into(self) -> dict[str, Any] | None:
        """What a run must be that goes on from it, with any number of ranks; None where its manifest does not say."""
        identity = self.condition.manifest.get("identity", {})
        shape = {name: identity.get(name) for name in ("zero_stage", "precision")}
        return None if None in shape.values() else shape

    @property
    def ranks(self) -> int | None:
        """How many wrote it."""
        found: int | None = self.condition.manifest.get("identity", {}).get("world_size")
        return found

    def to_json(self) -> dict[str, Any]:
        more = {"wer": self.wer, "best": self.best, "pinned": self.pinned, "leased": self.leased, "ranks": self.ranks}
        return {**self.condition.to_json(), **more, "resumes_into": self.resumes_into}


def steps(run: Run) -> list[int]:
    """All that is called a checkpoint, oldest first, also where the manifest was lost."""
    names = [p.name.removeprefix("step-") for p in run.checkpoints.glob("step-*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def chosen(run: Run, which: Sequence[str]) -> list[int]:
    """The steps that these words mean, each once, oldest first; all where there is none.

    Raises:
        NotFoundError: there is no such run or checkpoint.
    """
    report.read(run)
    there = steps(run)
    if not which:
        return there
    numbers = {int(word) for word in which if word.isascii() and word.isdigit() and int(word) in there}
    named = [word for word in which if not (word.isascii() and word.isdigit() and int(word) in numbers)]
    return sorted(numbers | {report.sealed_step(run, word) for word in named})


def rows(run: Run, conditions: Sequence[Condition]) -> list[Row]:
    pinned, wers = sealed.pinned(run), retention.wers(run, [c.step for c in conditions])
    best = _best_step(run)
    return [
        Row(c, wers.get(c.step), c.step == best, c.step in pinned, sealed.leased(run.checkpoint(c.step)))
        for c in conditions
        if c.state != "gone"
    ]


def _best_step(run: Run) -> int:
    best = report.read(run).best
    return -1 if best is None else int(best["step"])


# Whole? --------------------------------------------------------------------------------------------------------------


def look(run: Run, step: int) -> Condition:
    """What can be said of a checkpoint without reading its files."""
    folder = run.checkpoint(step)
    try:
        manifest = sealing.manifest_of(folder)
        problems = list(sealing.misfits(folder, manifest).values())
    except (DataError, OSError) as error:
        if not folder.exists():
            return Condition(step, "gone")
        problem = error.message if isinstance(error, DataError) else f"{folder} cannot be read: {error.strerror}"
        return Condition(step, "damaged", problems=[problem])
    if stranger := sealed.foreign(run, step, manifest):
        problems.insert(0, stranger)
    size = sum(digest["bytes"] for digest in manifest["files"].values())
    return Condition(step, "damaged" if problems else "sealed", len(manifest["files"]), size, problems, manifest)


def verify(run: Run, step: int, tell: Tell = lambda *_: None) -> Condition:
    """Read and hash every file of a checkpoint; it is leased meanwhile. All that is wrong with it is found, not only
    the first."""
    folder = run.checkpoint(step)
    if not (folder / rundir.MANIFEST).exists():  # nothing to lease
        return look(run, step)
    try:
        with sealed.lease(folder):
            before = (folder / rundir.MANIFEST).stat()
            seen = look(run, step)
            problems = [*seen.problems, *_damages(folder, seen, tell)]
            if not problems:
                return Condition(step, "verified", seen.files, seen.bytes, [], seen.manifest)
            # A launcher that begins anew puts checkpoints aside, and those who read them with them.
            if not os.path.samestat(before, (folder / rundir.MANIFEST).stat()):
                return Condition(step, "gone")
            return Condition(step, "damaged", seen.files, seen.bytes, problems, seen.manifest)
    except (NotFoundError, FileNotFoundError):
        return Condition(step, "gone")


class _Ended(Exception):
    """Ctrl-C: the other threads need not go on."""


def _damages(folder: Path, seen: Condition, tell: Tell) -> list[str]:
    """What is wrong with the content of files that are there and have the right size."""
    if not seen.manifest:
        return []
    sound = {n: d for n, d in sorted(seen.manifest["files"].items()) if n not in sealing.misfits(folder, seen.manifest)}
    total, done = sum(d["bytes"] for d in sound.values()), 0
    lock, ended = threading.Lock(), threading.Event()

    def each(count: int) -> None:
        nonlocal done
        if ended.is_set():
            raise _Ended
        with lock:
            done += count
            tell(seen.step, done, total)

    pool = ThreadPoolExecutor(THREADS)
    try:
        return [p for p in pool.map(lambda n: sealing.damage(folder / n, sound[n], each), sound) if p]
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def refuse_damaged(run: Run, conditions: Sequence[Condition]) -> None:
    """
    Raises:
        DataError: at least one is damaged; lists every problem of every one.
    """
    damaged = [c for c in conditions if c.state == "damaged"]
    if not damaged:
        return
    listed = "".join(f"\n  step {c.step}: {problem}" for c in damaged for problem in c.problems)
    whole = [c.step for c in conditions if c.state == "verified"]
    rest = f"the newest that verifies is step {whole[-1]}" if whole else "of those looked at none verifies"
    raise DataError(
        f"{len(damaged)} of {len(conditions)} checkpoints of {run.root} do not verify{listed}",
        hint=f"restore them from a copy; `speechctl resume {run.root}` passes over what does not verify, and {rest}",
    )


# Kept, and gone ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What the rules made of a run's checkpoints, or would."""

    stays: dict[int, list[str]]
    """By step, for which reasons."""
    goes: dict[int, int]
    """By step, how many bytes it takes."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prune(run: Run, command: str, *, dry_run: bool) -> Pruned:
    """Remove what the recipe's rules do not keep, at least two that verify aside. One that is being read stays.

    Args:
        command: this one, for whoever finds the run's lock taken.

    Raises:
        UsageError: a launcher has the run; it prunes by itself.
        StorageError: one could not be renamed away; nothing else was touched.
    """
    report.read(run)
    options = recipe_file.load(run.resolved).checkpoint
    rules = Rules(options.keep_last, options.keep_best, options.keep_every_steps)
    if dry_run:
        return _pruned(run, rules, dry_run=True)
    with RunLock(run, command, visits=True):
        return _pruned(run, rules, dry_run=False)


def _pruned(run: Run, rules: Rules, *, dry_run: bool) -> Pruned:
    whole: set[int] = set()
    best = _best_step(run)
    stays = retention.judged(run, rules, whole, best)
    sizes = {step: look(run, step).bytes for step, reasons in stays.items() if not reasons}
    if dry_run:
        removed = [step for step in sizes if not sealed.leased(run.checkpoint(step))]
    else:
        removed = retention.retain(run, rules, whole, best)
    left = {step: reasons or ["being read: the next time"] for step, reasons in stays.items() if step not in removed}
    return Pruned(left, {step: sizes[step] for step in removed}, dry_run)


def pin(run: Run, which: str) -> int:
    """Returns the step.

    Raises:
        NotFoundError: there is no such run or checkpoint.
    """
    step = report.sealed_step(run, which)
    with rundir.storage_errors(run.pin(step)):
        sealed.pin(run, step)
    return step


def unpin(run: Run, step: int) -> None:
    """Leave a checkpoint to the rules again.

    Raises:
        UsageError: it is not pinned.
    """
    report.read(run)
    pinned = sorted(sealed.pinned(run))
    if step not in pinned:
        raise UsageError(
            f"{run.root} has no pin on a checkpoint of step {step}",
            hint=f"pinned: {', '.join(map(str, pinned)) or 'none'}",
        )
    with rundir.storage_errors(run.pin(step)):
        sealed.unpin(run, step)
