"""Commits checkpoints: every rank writes, fsyncs and hashes its own files, all vote, rank 0 seals them.

What the files hold and when to save is the caller's business. One rename on rank 0 is the commit point; a save that
fails anywhere before it fails on all ranks, and leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import xxhash

from launcher import retention, rundir, sealed, sealing
from launcher.errors import InfrastructureError, SpeechctlError, StorageError
from launcher.rundir import Attempt, Run

T = TypeVar("T")

IN_A_ROW = 3
"""So many saves in a row that fail end the run."""


PIECE = 4 << 20
"""Bytes that are written and hashed while the processor still has them at hand."""

WINDOW = 8 * PIECE
"""Bytes after which the disk is told to begin: fsync would otherwise find nearly all of a file still to be written.
Measured with 1 GB on a virtual disk: 0.02 s in fsync, not 0.35 s, and the writes themselves no slower."""


class Peers(Protocol):
    """This process among the ranks of its attempt."""

    rank: int
    world_size: int

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Raises when they are not all there after a deadline of its own."""


class Sink(Protocol):
    def write(self, data: Any, /) -> int:
        """All of `data`, which is bytes or has them."""

    def flush(self) -> None: ...


@dataclass(frozen=True)
class File:
    """One file of a checkpoint that this rank writes."""

    name: str
    """Below the checkpoint, with `/`."""
    size: int
    """About how many bytes it takes; the disk is asked for them first."""
    write: Callable[[Sink], object]


@dataclass(frozen=True)
class Outcome:
    """What a save came to, as one rank saw it. Rank 0's word counts: it is the one that seals."""

    step: int
    error: str = ""
    """Why nothing was sealed; empty: it is sealed."""
    superseded: bool = False
    """A newer attempt has the run."""
    bytes: int = 0
    """Of the whole checkpoint; known to rank 0."""
    trouble: str = ""
    """What went wrong once it was sealed, such as an old checkpoint that could not be removed."""
    torn: bool = False
    """The ranks could not hear each other; their connection is of no use any more."""


class VoteLost(StorageError):
    """A vote did not come to its end on this rank. Others may have seen it through, and sealed."""


class Committer:
    """One rank's part in all saves of an attempt.

    Args:
        peers: talks to the same ranks' committers and to nobody else; it may be used from a thread of its own.
        on_sealed: called on rank 0 when a checkpoint is durable, with its outcome so far.
        first: makes durable, on every rank, what no checkpoint may outlive. Where it raises, the save fails.
    """

    def __init__(
        self,
        attempt: Attempt,
        peers: Peers,
        rules: retention.Rules,
        on_sealed: Callable[[Outcome], object] = lambda _: None,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        self.attempt = attempt
        self.run: Run = attempt.run
        self.peers = peers
        self.rules = rules
        self.on_sealed = on_sealed
        self.first = first
        self.begun = 0
        """Saves."""
        self.failed_in_a_row = 0
        self.whole: set[int] = set()
        """Steps that this attempt sealed, or has read and verified."""

    @property
    def staging(self) -> Path:
        """Where this save is written; all ranks have begun as many. Another name each time: over NFS, a rank on another
        node may take a name that it knows for the directory that had it before, which is sealed now."""
        return self.run.checkpoints / f".attempt-{self.attempt.number:04d}.{self.begun}"

    def fence(self) -> list[str]:
        """Rank 0, once its attempt's directory exists: take every unfinished checkpoint of an older attempt away, so
        that an orphan has nothing left to rename. `_refuse_if_superseded` has the other half of the argument.

        Returns:
            what was wrong with those that were put aside: they have lost their manifests.
        """
        problems = []
        for leftover in sorted(self.run.checkpoints.glob(".attempt-*")):
            sealed.trash(leftover)
        for torn in self.run.checkpoints.glob("step-*"):
            # Not ours to seal, and in the way of the one that will be.
            if torn.is_dir() and not (torn / rundir.MANIFEST).is_file():
                sealed.rename_aside(torn, "bad")
                problems.append(f"{torn} has no {rundir.MANIFEST}")
        sealed.empty_trash(self.run)
        return problems

    # One save --------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        files: Sequence[File] | Exception,
        facts: Mapping[str, Any],
        best_step: int = -1,
        said: Callable[[str], object] = lambda _: None,
    ) -> Outcome:
        """Seal a checkpoint of `step`, by all ranks. Raises nothing: `settle` makes the ranks agree on the outcome.

        Args:
            files: this rank's; or why it has none to write, which fails the save on all ranks.
            facts: what the manifest says besides; rank 0's count.
            best_step: retention keeps this one too.
            said: called before each stage, with its name; the same on all ranks.
        """
        outcome = Outcome(step)
        self.begun += 1
        try:
            said("room")
            need = sum(self._agree(lambda: _sizes(files)))
            said("stage")
            self._agree(lambda: self._stage(need))
            said("write")
            shares = self._agree(lambda: self._write(files, need))
            said("commit")
            if self.peers.rank == 0:
                digests = {name: digest for share in shares for name, digest in share.items()}
                more = {**sealed.marks(self.run, step), "attempt": self.attempt.number}
                with rundir.storage_errors(self.staging, need):
                    self._check(digests)
                    sealing.seal(self.staging, self.run.checkpoint(step), {**facts, **more}, digests)
                outcome = Outcome(step, bytes=sum(d["bytes"] for d in digests.values()))
                self.whole.add(step)
        except Exception as error:  # whatever it is, the other ranks hear of it at their vote, and training at `settle`
            superseded, torn = isinstance(error, InfrastructureError), isinstance(error, VoteLost)
            outcome = Outcome(step, said_by(error), superseded, torn=torn)
        said("retain")
        if self.peers.rank != 0:
            return outcome
        if outcome.error:
            shutil.rmtree(self.staging, ignore_errors=True)
            return outcome
        return replace(outcome, trouble=self._after(outcome, best_step))

    def _agree(self, work: Callable[[], T]) -> list[T]:
        """What `work` came to on every rank; where it failed on one, that is raised on all of them."""
        value, error, superseded = None, "", False
        try:
            value = work()
        except Exception as problem:
            error, superseded = f"rank {self.peers.rank}: {said_by(problem)}", isinstance(problem, InfrastructureError)
        try:
            answers = self.peers.gather((value, error, superseded))
        except Exception as problem:
            raise VoteLost(
                f"rank {self.peers.rank} did not hear of all others: {problem}", hint="try again"
            ) from problem
        for _, problem_there, superseded_there in answers:
            if problem_there:
                kind = InfrastructureError if superseded_there else StorageError
                raise kind(problem_there, hint="see the events of this attempt")
        return [answer[0] for answer in answers]  # type: ignore[misc]  # None only beside an error

    def _stage(self, need: int) -> None:
        """Rank 0 makes the directory that all write into."""
        if self.peers.rank != 0:
            return
        with rundir.storage_errors(self.staging, need):
            for leftover in self.run.checkpoints.glob(f".attempt-{self.attempt.number:04d}.*"):
                shutil.rmtree(leftover, ignore_errors=True)
            stat = os.statvfs(self.run.checkpoints)
            if stat.f_blocks and stat.f_bavail * stat.f_frsize < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.staging.mkdir()
        self._refuse_if_superseded()

    def _refuse_if_superseded(self) -> None:
        """
        Asked after the staging directory was made: a newer attempt makes its own directory first and fences after
        that, so either it is seen here, or its fence still finds what was staged.
        """
        newest = self.run.attempts()[-1].number
        if newest > self.attempt.number:
            raise InfrastructureError(
                f"attempt {self.attempt.number} is an orphan: attempt {newest} has taken over {self.run.root}",
                hint=f"`speechctl status {self.run.root}` shows the one that counts",
            )

    def _write(self, files: Sequence[File] | Exception, need: int) -> dict[str, dict[str, Any]]:
        """This rank's files, and their digests by name."""
        assert not isinstance(files, Exception)  # `_sizes` raised it
        digests = {}
        with rundir.storage_errors(self.staging, need):
            self.first()
        for file in files:
            path = self.staging / file.name
            with rundir.storage_errors(path, need):
                # The staging directory itself is never made here. After a fence an orphan's ranks would have made it
                # anew, and sealed it.
                for parent in reversed(PurePosixPath(file.name).parents[:-1]):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(self.staging / parent)
                digests[file.name] = write_hashed(path, file.write)
        return digests

    def _check(self, digests: Mapping[str, Mapping[str, Any]]) -> None:
        """What lies there, as rank 0 sees it, is what the ranks say they wrote."""
        found = {str(p.relative_to(self.staging)): p.stat().st_size for p in sealing.files_under(self.staging)}
        wanted = {name: digest["bytes"] for name, digest in digests.items()}
        if found != wanted:
            name = min(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
            raise StorageError(
                f"{self.staging / name} has {found.get(name, 'no')} bytes on rank 0, {wanted.get(name, 'none')} were"
                " written",
                hint="look at the file system: the nodes do not see the same files",
            )

    def _after(self, outcome: Outcome, best_step: int) -> str:
        try:
            self.on_sealed(outcome)
            self._refuse_if_superseded()
            retention.retain(self.run, self.rules, self.whole, best_step)
        except Exception as error:  # the checkpoint is sealed whatever happens to older ones
            return said_by(error)
        return ""

    # After it --------------------------------------------------------------------------------------------------------

    def settle(self, mine: Outcome, ranks: Peers) -> Outcome:
        """Rank 0's outcome, the same on every rank. Training goes on also when nothing was sealed.

        Args:
            ranks: who trains. Not the committer's own peers: their vote may have run out of time.

        Raises:
            StorageError: on all ranks, when this was the third failure in a row.
            InfrastructureError: on all ranks, when a newer attempt has taken over the run.
        """
        outcomes = [Outcome(**said) for said in ranks.gather(vars(mine))]
        outcome = replace(outcomes[0], torn=any(one.torn for one in outcomes))
        if outcome.superseded:
            raise InfrastructureError(
                outcome.error, hint=f"`speechctl status {self.run.root}` shows the attempt that counts"
            )
        if not outcome.error:
            self.failed_in_a_row = 0
            self.whole.add(outcome.step)
            return outcome
        self.failed_in_a_row += 1
        if self.failed_in_a_row == IN_A_ROW:
            raise StorageError(
                f"three checkpoints in a row could not be sealed; the last: {outcome.error}",
                hint="make room or mend the file system, then `speechctl resume`; sealed checkpoints are untouched",
            )
        return outcome


def said_by(error: Exception) -> str:
    return error.message if isinstance(error, SpeechctlError) else f"{type(error).__name__}: {error}"


def _sizes(files: Sequence[File] | Exception) -> int:
    if isinstance(files, Exception):
        raise files
    return sum(file.size for file in files)


def write_hashed(path: Path, write: Callable[[Sink], object]) -> dict[str, Any]:
    """Make a new file and leave it durable; returns its digest as a manifest has it. One pass.

    After a failed fsync the kernel takes the pages for clean, and another fsync would succeed for nothing: such a file
    is lost, and the whole save with it.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    sink = _Hashed(fd)
    try:
        try:
            write(sink)
        finally:
            if sink.error is not None:
                raise sink.error  # a library may have made something unreadable of it on the way
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)  # where NFS tells what it could not write
    return {"bytes": sink.size, "xxh3_128": sink.hasher.hexdigest()}


class _Hashed:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.hasher = xxhash.xxh3_128()
        self.size = 0
        self.begun = 0
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while len(rest):
                piece = rest[:PIECE]
                written = os.write(self.fd, piece)
                self.hasher.update(piece[:written])
                rest = rest[written:]
                self.size += written
                if self.size - self.begun >= WINDOW:
                    # Linux begins to write such pages, and drops none that it has not written. Should that fail,
                    # fsync still says so; a file system that takes no advice is none the worse.
                    with contextlib.suppress(OSError):
                        os.posix_fadvise(self.fd, self.begun, self.size - self.begun, os.POSIX_FADV_DONTNEED)
                    self.begun = self.size
        except OSError as error:
            self.error = self.error or error
            raise
        return count

    def flush(self) -> None:
        pass
