"""Looks for secret values where none may be: in files, in command lines, in what was printed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.redact import Redactor


class Watch:
    """What was seen of some values."""

    def __init__(self, values: Iterable[str]) -> None:
        self.redactor = Redactor(values)
        self.files = 0
        self.seen: set[bytes] = set()
        """Every command line there was."""

    def in_files(self, root: Path) -> list[Path]:
        found = [path for path in sorted(root.rglob("*")) if path.is_file()]
        self.files += len(found)
        return [path for path in found if self.redactor.found(path.read_bytes() + str(path).encode())]

    def in_command_lines(self) -> list[bytes]:
        return [line for line in self.seen if self.redactor.found(line)]

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Note the command line of every process meanwhile, of all users and in all namespaces below this one."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.02):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with suppress(OSError):
                        self.seen.add(path.read_bytes())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
