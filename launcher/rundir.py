"""Every path in a run, and the few ways in which anything is written there.

A file that is read whole is written aside, flushed, fsynced and renamed (`write_json`); a file that grows is
JSON Lines with one writer (`append_line`). Directories of results are sealed: `sealing.py`. What the files mean belongs
to those who write them.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from launcher.errors import DataError, StorageError

MANIFEST = "MANIFEST.json"


class Run:
    """Names of the files in one run directory. Knows where things are, not what they say."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.recipe = self.root / "recipe.yaml"
        self.resolved = self.root / "resolved.yaml"
        self.plan = self.root / "plan.json"
        self.deepspeed = self.root / "deepspeed.json"
        self.provenance = self.root / "provenance.json"
        self.lock = self.root / "lock"
        self.stop_request = self.root / "control" / "stop"
        self.save_request = self.root / "control" / "save"
        self.attempts_dir = self.root / "attempts"
        self.checkpoints = self.root / "checkpoints"
        self.best = self.checkpoints / "best.json"
        self.evaluations = self.root / "evaluations"
        self.exports = self.root / "exports"
        self.vocabulary = self.root / "vocabulary"
        self.tensorboard = self.root / "tensorboard"
        self.slurm = self.root / "slurm"
        self.avoided = self.root / "avoided.jsonl"
        self.launcher_log = self.root / "launcher.log"

    def exists(self) -> bool:
        return self.resolved.is_file()

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        if not self.attempts_dir.is_dir():
            return []
        found = [Attempt(p) for p in self.attempts_dir.iterdir() if p.name.isdecimal()]
        return sorted(found, key=lambda a: a.number)

    def new_attempt(self) -> Attempt:
        """Make the directory of the next attempt. Exclusive: its number is the fence of this attempt's writes."""
        numbers = [a.number for a in self.attempts()]
        attempt = Attempt(self.attempts_dir / f"{max(numbers, default=0) + 1:04d}")
        self.attempts_dir.mkdir(exist_ok=True)
        attempt.root.mkdir()
        for name in ("logs", "failures", "ranks", "ledger", "stacks", "progress"):
            (attempt.root / name).mkdir()
        sync_dir(self.attempts_dir)
        return attempt

    def checkpoint(self, step: int) -> Path:
        # Eight digits, so that `ls` sorts steps.
        return self.checkpoints / f"step-{step:08d}"

    def pin(self, step: int) -> Path:
        """Is there where somebody wants that checkpoint kept."""
        return self.checkpoints / f"step-{step:08d}.pinned"

    def sealed_steps(self) -> list[int]:
        """Steps with a manifest in `checkpoints/`, oldest first. Says nothing about whether they verify."""
        names = [p.parent.name.removeprefix("step-") for p in self.checkpoints.glob(f"step-*/{MANIFEST}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def evaluation(self, step: int) -> Path:
        return self.evaluations / f"step-{step:08d}.json"

    def hypotheses(self, step: int) -> Path:
        return self.evaluations / f"step-{step:08d}.hypotheses.jsonl"


class Attempt:
    """Names of the files of one start of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.number = int(root.name)
        self.run = Run(root.parent.parent)
        self.node_script = root / "node.sh"
        self.env = root / "env.json"
        self.hosts = root / "hosts.json"
        self.interpreter = root / "interpreter"
        self.pythonpath = root / "pythonpath"
        self.rendezvous = root / "rendezvous.json"
        self.lease = root / "lease"
        self.exit = root / "exit.json"
        self.failure = root / "failure.json"
        self.failures = root / "failures"
        self.ranks = root / "ranks"
        self.logs = root / "logs"
        self.supervisor = root / "supervisor.jsonl"
        self.events = root / "events.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.ledger_dir = root / "ledger"
        self.stacks = root / "stacks"
        self.progress_dir = root / "progress"
        self.alive = root / "alive"
        self.evaluation_log = self.logs / "evaluation.log"

    def node(self, node_rank: int) -> Path:
        return self.root / f"node-{node_rank:03d}.json"

    def progress(self, node_rank: int) -> Path:
        """What this node's ranks do, as its agent sees it, about once a second."""
        return self.progress_dir / f"node-{node_rank:03d}.json"

    def dumped(self, node_rank: int) -> Path:
        """What this node's ranks did when the launcher asked for their stacks."""
        return self.stacks / f"node-{node_rank:03d}.json"

    def stack(self, rank: int) -> Path:
        return self.stacks / f"rank-{rank:05d}.txt"

    def node_log(self, node_rank: int) -> Path:
        return self.logs / f"node-{node_rank:03d}.log"

    def ssh_log(self, node_rank: int) -> Path:
        """What ssh said here. Not the node's log: on NFS two machines cannot append to one file."""
        return self.logs / f"ssh-{node_rank:03d}.log"

    def srun_log(self, node_rank: int) -> Path:
        """What srun said, on the first node of the job."""
        return self.logs / f"srun-{node_rank:03d}.log"

    def rank(self, rank: int) -> Path:
        """Who this rank is: host, pid and start time. Written before torch is imported."""
        return self.ranks / f"rank-{rank:05d}.json"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    def rank_failure(self, rank: int) -> Path:
        return self.failures / f"rank-{rank:05d}.json"

    def ledger(self, rank: int) -> Path:
        return self.ledger_dir / f"rank-{rank:05d}.jsonl"


# Files ---------------------------------------------------------------------------------------------------------------


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ENXIO, errno.ENODEV)
"""What NFS, Lustre, a file system in user space and a disk say that are not there any more."""

_BROKEN = (errno.EIO, errno.EREMOTEIO, errno.EUCLEAN)
_STORAGE = (*_FULL, *_GONE, *_BROKEN, errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


_need: ContextVar[int | None] = ContextVar("need", default=None)


@contextmanager
def storage_errors(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an OSError met while writing `path` into a StorageError that says what the disk had left.

    Args:
        need: bytes that all of what is being written takes, where that is known; holds for those inside too.
    """
    need = _need.get() if need is None else need
    outer = _need.set(need)
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        try:
            stat = os.statvfs(next(p for p in (path, *path.parents) if p.exists()))
            free = f"{stat.f_bavail * stat.f_frsize / 2**20:.1f} MiB and {stat.f_favail} inodes free"
        except OSError:
            free = "free space unknown"
        needed = "" if need is None else f"{need / 2**20:.1f} MiB needed, "
        raise StorageError(
            f"cannot write {path}: {error.strerror} ({needed}{free})",
            hint="make room there, or make it writable; what was sealed before is untouched",
        ) from error
    finally:
        _need.reset(outer)


def sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` whole: a reader sees the old content or the new one, also after a power cut.

    Raises:
        StorageError: the disk is full, read-only or failing; no half-written file is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_dir(path.parent)


def write_over(fd: int, data: bytes) -> None:
    """Have `data` be the content of a file, in the place of what is there, which has its room on a full disk. A reader
    may see half of it.

    Raises:
        OSError: there is no room for what is longer than before, or whatever the disk has.
    """
    if os.pwrite(fd, data, 0) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, len(data))


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    write_bytes(path, _json(value, indent=1), mode)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_bytes(path, b"".join(map(_json, rows)))


_LINE = json.JSONEncoder(ensure_ascii=False)
"""`json.dumps` makes one at each call."""


def _json(value: Any, indent: int | None = None) -> bytes:
    """With its newline. Bytes of a path or a variable that are no UTF-8, which Python has as lone surrogates, are
    written as JSON's escapes of those."""
    text = _LINE.encode(value) if indent is None else json.dumps(value, indent=indent, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def asked_to_stop(run: Run) -> str | None:
    """Who or what asks the run to stop; None where nobody does."""
    try:
        return str(json.loads(run.stop_request.read_bytes())["why"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # a file that was only touched asks as well
        return str(run.stop_request)


def there(path: Path) -> bool:
    """Whether a file is there, by listing its directory. For what another machine may just have written: over NFS, a
    name that was asked for in vain is missing for up to a minute more."""
    return path.name in names_in(path.parent)


def names_in(folder: Path) -> list[str]:
    """What is in a directory; nothing where it is not there."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_json(path: Path) -> Any:
    """The value in `path`, or None where there is no such file.

    Raises:
        DataError: the file is there and is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON: {error}", hint="it was edited or damaged; restore or remove it"
        ) from error


TORN = b"\x18"
"""ASCII's CAN, "disregard what stands before": the end of a line that its writer never completed. JSON has none."""


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line in one write, so that a reader never sees half of one from a living writer.

    Raises:
        StorageError: as `LineFile`.
    """
    with LineFile(path) as file:
        file.append(value)


class LineFile:
    """A file of JSON lines, open to append to. Half a line that was left by a power cut is closed first, with a mark
    behind which it is skipped.

    Over NFS, other hosts see what was appended when it is closed; else within half a minute.

    Raises:
        StorageError: the disk is full or failing; the part of a line that fitted is taken back, so that the next line
            does not continue it. Close it then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(self._fd).st_size
                self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
            except OSError:
                os.close(self._fd)
                raise

    def append(self, value: Mapping[str, Any]) -> None:
        """In one write, so that a reader never sees half a line."""
        line = (TORN + b"\n" if self._torn else b"") + _json(value)
        with storage_errors(self.path):
            written = os.write(self._fd, line)
            if written < len(line):
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def close(self) -> None:
        with storage_errors(self.path):
            os.close(self._fd)

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn one, which a killed writer leaves, is skipped.

    Raises:
        DataError: a whole line is not JSON.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(TORN):
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}", hint="it was damaged; remove that line") from error
    return rows


def avoided(run: Run, now: float | None = None) -> dict[str, dict[str, Any]]:
    """By its name, the newest reason to leave a host out. One that has expired is none."""
    now = time.time() if now is None else now
    return {row["host"]: row for row in read_lines(run.avoided) if row["until"] > now}
