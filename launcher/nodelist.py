"""SLURM's node lists: `gpu[01-03,7],login1` as the names that `scontrol show hostnames` prints for it."""

from __future__ import annotations

import re
from math import prod

from launcher.errors import UsageError
from launcher.located_yaml import Problem, Source, found

MAX_NAMES = 100_000
MAX_LENGTH = 253


class NodelistError(UsageError):
    """The text is no node list."""


def expand_nodelist(text: str) -> list[str]:
    """The names in scontrol's order, with its duplicates and leading zeros. `_` may be in them, unlike in a hostfile.

    Refused, though scontrol 22.05 makes something of it: no names at all, a bracket that does not close, a range that
    is open or has a blank in it, a number of more than 18 digits, and characters that are in no host name.
    """
    names: list[str] = []
    for entry in re.finditer(r"(?:\[[^\]]*\]?|[^, \t\n])+", text):
        names += _expand(entry[0], entry.start(), text, MAX_NAMES - len(names))
    if not names:
        raise _refusal(text, 0, "a name", "")
    return names


def _expand(entry: str, start: int, text: str, room: int) -> list[str]:
    """The names of one entry, which `text` has at `start`. Raises NodelistError if they are more than `room`."""
    texts: list[str] = []  # what stands before, between and after the brackets
    brackets: list[list[tuple[range, int]]] = []  # in each, ranges and how many digits their numbers have at least
    at = start
    for k, piece in enumerate(re.split(r"\[([^\[\]]*)\]", entry)):
        if k % 2:
            brackets.append(_ranges(piece, at + 1, text))
            at += len(piece) + 2
            continue
        if odd := re.search(r"[^A-Za-z0-9._-]" if k else r"^[._-]|[^A-Za-z0-9._-]", piece):
            expected = "a `]` for this" if odd[0] == "[" else "letters, digits, '.', '_' and '-'"
            raise _refusal(text, at + odd.start(), expected, odd[0])
        texts.append(piece)
        at += len(piece)
    if brackets and texts[-1]:
        raise _refusal(text, at - len(texts[-1]), "a comma, since SLURM's names end at their last bracket", texts[-1])
    longest = sum(map(len, texts)) + sum(max(max(w, len(str(r[-1]))) for r, w in bracket) for bracket in brackets)
    if longest > MAX_LENGTH:
        raise _refusal(text, start, f"names of at most {MAX_LENGTH} characters", f"{longest} characters")
    count = prod(sum(len(r) for r, _ in bracket) for bracket in brackets)
    if count > room:
        raise _refusal(text, start, f"at most {MAX_NAMES} names", f"{MAX_NAMES - room + count}")
    names = texts[:1]
    for k, bracket in enumerate(brackets):
        numbers = [str(n).zfill(width) for r, width in bracket for n in r]
        # scontrol counts up the last bracket first, then the first, the second, and so on.
        if k < len(brackets) - 1:
            names = [name + number + texts[k + 1] for number in numbers for name in names]
        else:
            names = [name + number for name in names for number in numbers]
    return names


def _ranges(piece: str, start: int, text: str) -> list[tuple[range, int]]:
    ranges = []
    for part in piece.split(","):
        bounds = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if bounds is None:
            raise _refusal(text, start, "a number or a range such as 01-03", part)
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if first > last:
            raise _refusal(text, start, "a range that counts up", part)
        ranges.append((range(first, last + 1), len(bounds[1])))
        start += len(part) + 1
    return ranges


def _refusal(text: str, at: int, expected: str, what: str) -> NodelistError:
    spot = Source("node list", text).after(text[:at])
    problem = Problem(spot, "", f"expected {expected}, found {found(what or None)}")
    return NodelistError(str(problem), hint="a node list is names such as gpu[01-03,7],login1")
