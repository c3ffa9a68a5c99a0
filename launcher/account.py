"""What torchrun leaves in a node's log about its ranks: who failed first, by what code, and the line that says most."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from pathlib import Path


def of_torchrun(log: Path, silenced: Collection[int] = ()) -> list[tuple[int, int]]:
    """(rank, exit code) of a node's ranks that failed, by the summary in its log; what torchrun saw first comes first.
    The others are not causes: it ends them itself, by SIGTERM, and after 30 s by SIGKILL.

    Args:
        silenced: processes that their node killed because another one had died; they are left out.
    """
    found: list[tuple[int, int]] = []
    text = text_of(log)
    left_out = {*silenced, *(int(pid) for pid in re.findall(r"Unable to shutdown process (\d+) via", text))}
    others, _, root = text.partition("Root Cause (first observed failure):")
    for part in (root, others):
        for match in re.finditer(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+) \(pid: (\d+)", part):
            if int(match[3]) not in left_out:
                found.append((int(match[1]), int(match[2])))
    return found


def first_signalled(account: list[tuple[int, int]], raised: set[int]) -> tuple[int, int] | None:
    """(rank, signal) of the rank whose end by a signal is the first cause on its node, if that is what happened.

    Args:
        raised: ranks that gave a cause of their own. A peer's account of a connection that broke is none.
    """
    signalled = [(rank, -code) for rank, code in account if code < 0 and -code != signal.SIGTERM]
    if not signalled:
        return None
    rank, number = signalled[0]
    came_first = account[0] == (rank, -number)
    # Libraries abort (SIGABRT) for want of a peer, and a rank may crash on its way out after it said why.
    secondary = rank in raised or number == signal.SIGABRT or not came_first
    return None if raised and secondary else (rank, number)


def name_of(number: int) -> str:
    """A signal's name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def port_taken(log: Path) -> bool:
    """Whether torchrun could not listen where the ranks were to meet: between the choice of a free port and its use
    somebody else may take it."""
    return re.search(r"EADDRINUSE|[Aa]ddress already in use", text_of(log)) is not None


def last_error(log: Path) -> str:
    """The line of a log that says most: the last one that names an exception, or else the last one.

    What torchrun says once a rank has failed is left out: it only repeats that one did.
    """
    text = re.split(r"(?m)^[EW]\d{4} .*torch/distributed/elastic/multiprocessing/api\.py", text_of(log))[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [*lines, *named][-1] if lines else f"there is nothing in {log}"


def text_of(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""
