"""A conversation with the probe on one host: by ssh, inside a SLURM allocation, or on this machine."""

from __future__ import annotations

import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.backends import slurm, ssh
from launcher.hosts import Host
from launcher.probe.answers import MARK

BOOT = "import sys; i = sys.stdin.buffer; exec(i.read(int(i.readline())))"
"""All that stands in a command line: what is run comes on standard input, behind its length."""

LOADER = """\
import sys, types
for name, text in {texts!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["launcher.probe.answers"].main()
"""


def ssh_argv(host: Host) -> list[str]:
    return ssh.command_argv(host, f"exec python3 -c '{BOOT}'")


def srun_argv(host: Host, job: str) -> list[str]:
    return slurm.look_argv(host, job, "python3", "-c", BOOT)


def here_argv() -> list[str]:
    return [sys.executable, "-c", BOOT]


def program() -> bytes:
    """The probe as text, with all its modules."""
    folder = Path(__file__).parent.parent / "probe"
    names = {"launcher.probe": "__init__", **{f"launcher.probe.{n}": n for n in ("machine", "facts", "answers")}}
    texts = [(name, (folder / f"{file}.py").read_text()) for name, file in names.items()]
    text = LOADER.format(texts=texts).encode()
    return f"{len(text)}\n".encode() + text


AGAIN_S = 3.0
"""What another try must have, or it would end without a reason."""


class Unanswered(Exception):
    """No answer, or one that says what went wrong. Its text is for people."""


class Silent(Unanswered):
    """Not in time."""

    def __init__(self, began: float) -> None:
        super().__init__(f"nothing was heard in {time.monotonic() - began:.0f} s")


class Session:
    """One probe. Used by one thread at a time."""

    def __init__(self, host: Host, argv: list[str], env: Mapping[str, str] | None = None) -> None:
        """
        Args:
            env: of the command here, where it is not to be ours.
        """
        self.host = host
        self.argv, self.env = argv, env
        self.began = time.monotonic()
        self.answered_s: float | None = None
        """How long it took until the first answer."""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the session is)
        self.noise: list[str] = []
        """What came on standard output and was not of the probe."""
        self.buffer = b""
        self.count = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._open()

    def _open(self) -> None:
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                self.argv, stdin=pipe, stdout=pipe, stderr=self.errors, start_new_session=True, env=self.env
            )
        except OSError as error:
            self.errors.write(f"cannot start {self.argv[0]}: {error.strerror}\n".encode())
            return
        for stream in (self.process.stdin, self.process.stdout):
            os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]

    def connect(self, until: float) -> dict[str, Any]:
        """Send the probe and wait for its first word; again where an sshd let us go because too many came at once."""
        for pause_s in (*(random.uniform(0.3, most) for most in (1.0, 2.0, 3.0)), None):
            try:
                self._write(program(), until)
                hello: dict[str, Any] = self._answer(0, until)
                self.answered_s = time.monotonic() - self.began
                return hello
            except Silent:
                raise
            except Unanswered:
                crowded = self.process is not None and re.search(ssh.CROWDED, self.said()) is not None
                if not crowded or pause_s is None or time.monotonic() + pause_s + AGAIN_S > until:
                    raise
                time.sleep(pause_s)
                self._end()
                self.buffer = b""
                self.errors.truncate(0)
                self._open()
        raise AssertionError("not reached")

    def ask(self, do: str, until: float, **values: Any) -> Any:
        """
        Raises:
            Unanswered: not in time, or the other side is gone, or it failed there.
        """
        self.count += 1
        self._write(json.dumps({"id": self.count, "do": do, **values}).encode() + b"\n", until)
        return self._answer(self.count, until)

    def clock(self, until: float, exchanges: int = 8) -> tuple[float, float]:
        """(how far its clock is ahead of ours, the round trip), in seconds, from the quickest of some exchanges."""
        best = (0.0, float("inf"))
        for _ in range(exchanges):
            before, began = time.time(), time.monotonic()
            there = self.ask("clock", until)
            trip = time.monotonic() - began
            if trip < best[1]:
                best = (there - (before + trip / 2), trip)
        return best

    def said(self) -> str:
        """What ssh, srun or the shell over there said on standard error."""
        self.errors.seek(0)
        return self.errors.read(100_000).decode("utf-8", "replace")

    def kill(self) -> None:
        """End it at once; whoever waits for an answer hears that there will be none."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End it. What hangs is not waited for."""
        self._end()
        self.errors.close()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.wait()

    def _write(self, data: bytes, until: float) -> None:
        if self.process is None or self.process.stdin is None:
            raise Unanswered(self._last_words())
        fd = self.process.stdin.fileno()
        while data:
            _, writable, _ = select.select([], [fd], [], max(0.0, until - time.monotonic()))
            if not writable:
                raise Silent(self.began)
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Unanswered(self._ended(until)) from error

    def _answer(self, number: int, until: float) -> Any:
        assert self.process is not None and self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while True:
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                self.buffer = rest
                text = line.decode("utf-8", "replace")
                noise, mark, said = text.partition(MARK)
                self.noise += [noise] * bool(noise.strip())
                if mark and (value := json.loads(said))["id"] == number:
                    if "error" in value:
                        raise Unanswered(value["error"])
                    return value["value"]
                continue
            readable, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            if not readable:
                raise Silent(self.began)
            piece = os.read(fd, 65536)
            if not piece:
                raise Unanswered(self._ended(until))
            self.buffer += piece

    def _ended(self, until: float) -> str:
        """The reason why the other side is gone: ssh may still be about to say it."""
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.1, min(2.0, until - time.monotonic())))
        return self._last_words()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        return lines[-1] if lines else "it ended without a word"
