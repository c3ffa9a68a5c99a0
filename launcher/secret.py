"""Secrets on their way: which variables they are, where a value comes from, and how it reaches the ranks.

No file of the run has a value, nor any command line: the launcher reads it from its environment or from the file that
the recipe names, and it is the first line on each node's standard input.
"""

from __future__ import annotations

import json
import os
import re
import select
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import IO

from launcher.errors import HostError, PreflightError, UsageError
from launcher.redact import LOGIN, MIN_LENGTH, NAMES, USERINFO, forms

MAX_BYTES = 2**15
"""Of all values together: a pipe takes them while nobody reads it yet."""

WAIT_S = 60.0
"""How long a node waits for them. They were sent before it was started."""

SOUNDS_SECRET = re.compile(
    r"(?i)(.*_)?(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|CREDENTIALS?|AUTH|API_?KEY|(PRIVATE|ACCESS)_KEY)"
    r"(_ID|_[0-9]+)?"
)


def implied(name: str, value: str) -> bool:
    """Whether a variable looks like a secret though nobody said so. What is shorter than eight characters is a switch,
    such as HF_HUB_DISABLE_IMPLICIT_TOKEN=1."""
    if USERINFO.search(value) is not None or (name.lower().endswith("_proxy") and LOGIN.search(value) is not None):
        return True
    return SOUNDS_SECRET.fullmatch(name) is not None and len(value) >= 8


def sources(entries: Iterable[str]) -> dict[str, str | None]:
    """`launch.secrets` as name -> file, or None for the environment."""
    split = (entry.partition("=") for entry in entries)
    return {name: file or None for name, _, file in split}


def read(where: Mapping[str, str | None], given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The values.

    Raises:
        PreflightError: for all that cannot be had, or cannot be kept secret.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    hints: list[str] = []
    for name, file in where.items():
        try:
            values[name] = _from_environment(name, given) if file is None else _from_file(file)
            _check(values[name])
        except _Unusable as problem:
            problems.append(f"the secret {name}: {problem}")
            hints.append(problem.hint)
    if problems:
        raise PreflightError("\n".join(problems), hint="; ".join(dict.fromkeys(hints)))
    if len(_line(values)) > MAX_BYTES:
        raise PreflightError(
            f"the secrets {', '.join(values)} come to more than {MAX_BYTES // 1024} KiB",
            hint="name a file that the code reads by itself, in place of its content",
        )
    return values


class _Unusable(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _from_environment(name: str, given: Mapping[str, str]) -> str:
    if name not in given:
        raise _Unusable(
            "expected in the environment, and it is not there",
            f"export {name}, or give its file in the recipe: {name}=/path/of/a/file",
        )
    return given[name]


def _from_file(file: str) -> str:
    """Its text without one newline at the end, which editors put there."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise _Unusable(
            f"{file} cannot be read: {what}", "give the file that has the value, and nothing else"
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable(f"{file} is no regular file", "give a file that has the value, and nothing else")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise _Unusable(f"{file} is open to others, with mode {mode:04o}", f"chmod 600 {file}")
        raw = os.read(fd, MAX_BYTES + 1)
    finally:
        os.close(fd)
    return raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _check(value: str) -> None:
    if len(value) < MIN_LENGTH:
        raise _Unusable(
            f"its value has {len(value)} characters, expected at least {MIN_LENGTH}",
            "so short a value cannot be blacked out in logs: everything would be",
        )
    if "\0" in value:
        raise _Unusable("its value has a NUL, which no variable can have", "write it as text, such as base64")


def refuse_in_recipe(values: Mapping[str, str], recipe: str) -> None:
    """
    Raises:
        UsageError: the recipe says a secret, and is about to be written into the run's directory.
    """
    for name, value in values.items():
        if any(form in recipe.encode("utf-8", "surrogatepass") for form in forms(value)):
            raise UsageError(
                f"the recipe, or a --set, has the value of the secret {name}, and is written into the run's directory",
                hint=f"take it out there: the ranks find it in their variable {name}",
            )


def variables(values: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment has more, where there are secrets: those, and which they are."""
    return {**values, NAMES: ",".join(values)} if values else {}


# To a node ------------------------------------------------------------------------------------------------------------


def _line(values: Mapping[str, str]) -> bytes:
    return json.dumps(dict(values)).encode() + b"\n"


def send(stdin: IO[bytes] | None, values: Mapping[str, str]) -> None:
    """Before any other word, and only where there are values. A node that has ended does not hear it."""
    if values and stdin is not None:
        with suppress(OSError):
            os.write(stdin.fileno(), _line(values))


def receive(names: Iterable[str], fd: int = 0, wait_s: float = WAIT_S) -> dict[str, str]:
    """On a node: what `send` wrote, and not a byte more. Nothing is read where no names are given.

    Raises:
        HostError: it did not come, or is not what the attempt says.
    """
    wanted = sorted(names)
    if not wanted:
        return {}
    hint = "start the run by `speechctl launch` or `resume`; by hand, the first line of standard input is {NAME: VALUE}"
    line, deadline = bytearray(), time.monotonic() + wait_s
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise HostError(f"the secrets {', '.join(wanted)} did not come within {wait_s:g} s", hint=hint)
        byte = os.read(fd, 1)  # what follows the line is for others
        if not byte or len(line) > 2 * MAX_BYTES:
            raise HostError(f"the secrets {', '.join(wanted)} did not come: standard input ended first", hint=hint)
        line += byte
    try:
        values = json.loads(line)
        if sorted(values) == wanted and all(isinstance(value, str) for value in values.values()):
            return dict(values)
    except (ValueError, TypeError):
        pass  # what came instead is not shown: it may be one
    raise HostError(f"expected the secrets {', '.join(wanted)} on standard input, found something else", hint=hint)
