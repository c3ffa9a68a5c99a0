"""Every failure a user can meet, as one type with a message, a hint and an exit code; how texts and sizes are said."""

from __future__ import annotations

import unicodedata
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process that a script started tells that script. 0 only when the last step asked for is sealed."""

    FINISHED = 0
    TRAINING_RAISED = 1
    USAGE = 2
    """The command line or the recipe is wrong."""
    HOST = 3
    """A host or the scheduler cannot be reached, or refused."""
    PREFLIGHT = 4
    DATA = 5
    """A corpus, a pack, a backbone or a checkpoint failed verification."""
    NOT_FOUND = 6
    """No such run, checkpoint or export."""
    BUG = 70
    STORAGE = 74
    STOPPED = 75
    """Stopped with the work saved: start again."""
    INFRASTRUCTURE = 76
    """Something under the run died: start again, and count it."""
    OUT_OF_MEMORY = 77
    NO_PROGRESS = 78
    """Three attempts without progress: do not start again."""


class SpeechctlError(Exception):
    """A failure that the user can act on: what was expected and found, where, and what to do next."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """`hint` is a keyword, which pickling would lose on the way out of a process pool."""
        return _rebuilt, (type(self), self.message, self.hint)

    def render(self) -> str:
        """The text for stderr. Control characters are escaped: names from disk must not drive a terminal."""
        return f"error: {printable(self.message)}\n\nhint: {printable(self.hint)}"


def _rebuilt(kind: type[SpeechctlError], message: str, hint: str) -> SpeechctlError:
    return kind(message, hint=hint)


class UsageError(SpeechctlError):
    exit_code = ExitCode.USAGE


class TrainingError(SpeechctlError):
    """Training cannot go on as the recipe has it."""

    exit_code = ExitCode.TRAINING_RAISED


class MemoryExhausted(SpeechctlError):
    """A device or its host has no memory left, and we know what for."""

    exit_code = ExitCode.OUT_OF_MEMORY


class HostError(SpeechctlError):
    exit_code = ExitCode.HOST


class PreflightError(SpeechctlError):
    exit_code = ExitCode.PREFLIGHT


class DataError(SpeechctlError):
    exit_code = ExitCode.DATA


class NotFoundError(SpeechctlError):
    exit_code = ExitCode.NOT_FOUND


class StorageError(SpeechctlError):
    exit_code = ExitCode.STORAGE


class InfrastructureError(SpeechctlError):
    exit_code = ExitCode.INFRASTRUCTURE


class AlreadyTold(Exception):
    """A process of ours failed and has said why on stderr itself: only its exit code is to be handed on."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """`text` with every control character but the newline written as an escape, and whatever else would end or turn
    a line."""
    if text.isprintable():  # the case of nearly all lines of a log, a hundred times as fast
        return text
    return "".join(
        c
        if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def in_bytes(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
