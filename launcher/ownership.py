"""Who may write into a run: its user alone."""

from __future__ import annotations

import os
import pwd
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from launcher.errors import UsageError
from launcher.rundir import Run


def only_we_write() -> None:
    """From here on nobody but this user can write to what this process makes, whatever the umask was."""
    os.umask(os.umask(0o077) | 0o022)


def _in_checkpoints(run: Run) -> Iterator[Path]:
    for step in run.checkpoints.glob("step-*"):
        for folder, _, files in os.walk(step):  # which passes over what is removed meanwhile
            yield from (Path(folder), *(Path(folder, name) for name in files))


def refuse_foreign(run: Run) -> None:
    """Refuse a run that somebody else could have written to: its checkpoints are unpickled, and a pickle can run code.

    Raises:
        UsageError: says which directory or file it is.
    """
    ours, root = {os.geteuid()}, shlex.quote(str(run.root))
    with suppress(OSError), tempfile.TemporaryFile(dir=run.root) as probe:
        ours.add(os.fstat(probe.fileno()).st_uid)  # a file server may know us by another number
    for path in chain((run.root, run.attempts_dir, run.checkpoints), _in_checkpoints(run)):
        try:
            status = path.stat()
        except FileNotFoundError:  # a launcher removes old checkpoints meanwhile
            continue
        if status.st_uid not in ours:
            try:
                owner = pwd.getpwuid(status.st_uid).pw_name
            except KeyError:
                owner = f"user {status.st_uid}"
            raise UsageError(
                f"{path} belongs to {owner}; loading its checkpoints could run what they wrote there",
                hint=f"have {owner} do it; or, where you trust them, use a copy: `cp -r {root} …`",
            )
        if status.st_mode & 0o022:
            raise UsageError(
                f"others may write to {path} (mode {status.st_mode & 0o7777:04o}), and loading its checkpoints could"
                " run what they wrote there",
                hint=f"if nobody has, `chmod -R go-w {root}`",
            )
