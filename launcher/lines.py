"""A file of JSON lines that its one writer goes on with over a full or failing disk, which costs no line.

Training says in such files what it did. A disk that is full for a while may cost checkpoints, and no step.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import rundir
from launcher.errors import StorageError
from launcher.rundir import LineFile


class Lines:
    """May be appended to from several threads; in the file, the lines are in the order in which they came.

    Args:
        stays_open_s: behind a line that comes sooner than this after the one before, the file stays open. Closed, over
            NFS, the line is at the server for whoever reads along on another host; else within half a minute, and what
            the server refuses then is not written again.
    """

    def __init__(self, path: Path, *, stays_open_s: float = 0.0) -> None:
        self.path = path
        self.stays_open_s = stays_open_s
        self._written = -math.inf
        self._file: LineFile | None = None
        self._waiting: list[Mapping[str, Any]] = []
        self._appended = False
        self._lock = threading.Lock()

    def append(self, value: Mapping[str, Any]) -> None:
        """Raises nothing of the disk's: a line that cannot be written waits for the next one, or for `sync`."""
        with self._lock:
            self._waiting.append(value)
            self._appended = True
            with suppress(StorageError):
                self._write()

    def sync(self) -> None:
        """Have every line outlive a power cut.

        Raises:
            StorageError: one of them may not.
        """
        with self._lock:
            if self._appended:
                self._write()
                with rundir.storage_errors(self.path):
                    rundir.sync_file(self.path)

    def close(self) -> None:
        """Write what still waits, as far as the disk takes it."""
        with self._lock, suppress(StorageError):
            self._write()
            self._close()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._file = self._file or LineFile(self.path)
                self._file.append(self._waiting[0])
                before, self._written = self._written, time.monotonic()
                if self._written - before >= self.stays_open_s:
                    self._close()
                del self._waiting[0]
        except StorageError:
            with suppress(StorageError):
                self._close()
            raise

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
