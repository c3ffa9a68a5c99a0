"""Blacks out secret values: in texts that are written down, and in what a process prints, on its way into a log.

A value is found as it is and in the forms in which programs print it: in JSON, in Python's quotes, in a URL, in
base64, in hex. What a program makes of it otherwise, compressed or one character a line, is not found.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from urllib.parse import quote, quote_plus, unquote

MASK = "[secret]"

MIN_LENGTH = 4
"""Shorter values would black out everything."""

NAMES = "SPEECHCTL_SECRETS"
"""The variable that tells a rank which of its variables are secrets: their names, joined by commas."""

FILTER = "speechctl-hide"
"""What the process that filters a log is called, as `ps -o comm` shows it. It ends by itself, once nobody can write to
it any more; to kill it with those who could is to lose what they said last."""

USERINFO = re.compile(r"://([^/?#\s@:]*(?::[^/?#\s]*)?)@")
"""In a URL: who logs in, and as a rule with what password."""

LOGIN = re.compile(r"^([^/@\s:]+:[^/@\s]+)@")
"""The same in a URL without its scheme, as the address of a proxy may be given."""


class Redactor:
    """Knows some values and hides them. Without any it changes nothing."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        found = {form for value in values for part in parts(value) for form in forms(part)}
        self.patterns = sorted((p for p in found if len(p) >= MIN_LENGTH), key=len, reverse=True)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def text(self, text: str) -> str:
        errors = "surrogateescape"  # as Python has bytes of file names and variables that are no text
        try:
            raw = text.encode("utf-8", errors)
        except UnicodeEncodeError:
            raw = text.encode("utf-8", errors := "surrogatepass")
        return self.data(raw).decode("utf-8", errors) if self.found(raw) else text

    def found(self, data: bytes) -> bool:
        return any(pattern in data for pattern in self.patterns)

    def data(self, data: bytes) -> bytes:
        return self._masked(data, self._spans(data))

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """What of `data` can be shown, blacked out, and its end that has to wait: with what comes next it may be one
        of the values."""
        spans = self._spans(data)
        end = min((self._open(data, pattern) for pattern in self.patterns), default=len(data))
        for start, stop in spans:  # two that overlap are blacked out together
            if start < end < stop:
                end = start
        return self._masked(data[:end], [s for s in spans if s[1] <= end]), data[end:]

    def _spans(self, data: bytes) -> list[tuple[int, int]]:
        """Where values stand, those that overlap as one."""
        found = []
        for pattern in self.patterns:
            at = data.find(pattern)
            while at >= 0:
                found.append((at, at + len(pattern)))
                at = data.find(pattern, at + 1)
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if spans and start < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        return spans

    @staticmethod
    def _masked(data: bytes, spans: list[tuple[int, int]]) -> bytes:
        pieces, at = [], 0
        for start, stop in spans:
            pieces += [data[at:start], MASK.encode()]
            at = stop
        return b"".join([*pieces, data[at:]])

    @staticmethod
    def _open(data: bytes, pattern: bytes) -> int:
        """Where at the end of `data` the pattern may have begun; its length where it has not."""
        at = data.find(pattern[:1], max(0, len(data) - len(pattern) + 1))
        while at >= 0 and not pattern.startswith(data[at:]):
            at = data.find(pattern[:1], at + 1)
        return at if at >= 0 else len(data)


def parts(value: str) -> list[str]:
    """The value; its lines, since logs put something before each; and the password in it, if it is a URL."""
    found = [value, *(line for line in re.split(r"[\r\n]+", value) if len(line) >= 8)]
    for userinfo in (*USERINFO.findall(value), *LOGIN.findall(value)):
        user, colon, password = userinfo.partition(":")
        login = [password, userinfo] if colon else [user] * (len(user) >= 8)
        found += [*login, *map(unquote, login)]
    return [part for part in found if len(part) >= MIN_LENGTH]


def forms(value: str) -> set[bytes]:
    raw = value.encode("utf-8", "surrogateescape")
    texts = {quote(raw), quote(raw, safe=""), quote_plus(raw), raw.hex()}
    texts |= {json.dumps(value, ensure_ascii=short)[1:-1] for short in (True, False)}
    for quoted in (repr(f"{value}'\""), ascii(f"{value}'\"")):  # both kinds of quotes, or Python would change its own
        inside = quoted[1:-4]
        texts |= {inside, inside.replace("\\'", "'")}
    found = {raw, *(text.encode("utf-8", "surrogateescape") for text in texts)}
    if len(raw) >= 6:
        # Inside a longer base64 text it stands at one of three offsets; the characters at its ends hold bits of its
        # neighbours too.
        for offset, shared in ((0, 0), (1, 2), (2, 3)):
            whole = (offset + len(raw)) * 8 // 6
            text = base64.b64encode(bytes(offset) + raw)[shared:whole]
            found |= {text, text.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


# What a process prints ------------------------------------------------------------------------------------------------

current = Redactor()
"""This process's: what it writes down in words goes through it."""


def use(values: Iterable[str]) -> Redactor:
    global current
    current = Redactor(values)
    return current


def use_environment(variables: Mapping[str, str]) -> Redactor:
    """As the node has told a rank by its environment."""
    names = variables.get(NAMES, "")
    return use(variables[name] for name in names.split(",") if name in variables)


def rewrite(path: str | os.PathLike[str], redactor: Redactor) -> None:
    """Black out what stands in a log already, which somebody else wrote."""
    with open(path, "r+b") as file:
        data = file.read()
        if redactor.found(data):
            file.seek(0)
            file.write(redactor.data(data))
            file.truncate()


own_filter: int | None = None
"""The pid of the one between this process and its log."""


def filter_output() -> None:
    """From here on what this process and its children print passes through a filter on its way to where standard
    output went before, which is a log. Nothing is done where there is nothing to black out.

    The filter is a process that outlives whatever ends this one, writes the rest, and ends with the last process that
    can print. Call this before there are threads.
    """
    global own_filter
    if not current:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    ready, is_ready = os.pipe()
    own_filter = os.fork()
    if own_filter == 0:
        try:
            log = os.dup(1)
            _become_filter(read, log)  # closes `is_ready` too
            copy(read, log, current)
        finally:
            os._exit(0)
    os.close(is_ready)
    os.read(ready, 1)  # until it has a session of its own
    os.close(ready)
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)


def finish_output(patience_s: float = 5) -> None:
    """Wait until all that was printed is in the log. Nothing can be printed any more."""
    if own_filter is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    deadline = time.monotonic() + patience_s
    while os.waitpid(own_filter, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)


def copy(source: int, target: int, redactor: Redactor) -> None:
    held = b""
    while data := os.read(source, 1 << 16):
        shown, held = redactor.split(held + data)
        _write(target, shown)
    _write(target, redactor.data(held))


def _write(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except OSError:  # a full disk: the rank has to be able to go on, as with any log that it cannot write
            return


def _become_filter(read: int, log: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.setsid()  # torchrun kills a rank's whole group
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, FILTER.encode(), 0, 0, 0)  # PR_SET_NAME
    for number in map(int, os.listdir("/dev/fd")):  # above all the end of the pipe that others write to
        if number not in (read, log):
            with suppress(OSError):  # the listing's own is closed already
                os.close(number)
