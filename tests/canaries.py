"""Looks for secret values where none may be: in files, in command lines, in environments, in what was printed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.redact import Redactor

if TYPE_CHECKING:
    from tests.cluster.conftest import Cluster


class Watch:
    """What was seen of some values."""

    def __init__(self, values: Iterable[str]) -> None:
        self.redactor = Redactor(values)
        self.files = 0
        self.seen: set[bytes] = set()
        """Every command line there was."""
        self.environments: set[bytes] = set()
        """Every environment on the hosts of a cluster."""

    def in_files(self, root: Path) -> list[Path]:
        """What is removed or renamed meanwhile is passed over."""
        found = []
        for path in (Path(folder) / name for folder, _, names in os.walk(root) for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():
                    self.files += 1
                    found += [path] if self.redactor.found(path.read_bytes() + str(path).encode()) else []
        return sorted(found)

    def in_command_lines(self) -> list[bytes]:
        return [line for line in self.seen if self.redactor.found(line)]

    def in_environments(self) -> list[bytes]:
        return [one for one in self.environments if self.redactor.found(one)]

    @contextmanager
    def running(self, on: Cluster | None = None) -> Iterator[Watch]:
        """Note the command line of every process meanwhile, of all users and in all namespaces below this one.

        Args:
            on: note the environment of every process on its hosts, too; the desk is none.
        """
        over = threading.Event()
        # Of this cluster alone: another test beside this one may have the same values, and give them to its ranks.
        hosts = {os.readlink(f"/proc/{on.inside[name]}/ns/pid") for name in on.hosts} if on is not None else set()

        def look() -> None:
            while not over.wait(0.02):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with suppress(OSError):
                        self.seen.add(path.read_bytes())
                        if hosts and os.readlink(path.with_name("ns") / "pid") in hosts:
                            self.environments.add(path.with_name("environ").read_bytes())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
