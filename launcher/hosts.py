"""Hosts: which machines an attempt runs on, and how many ranks each takes.

Reads hostfiles and narrows them to a selection. SLURM's node lists are read in `nodelist.py`. Nothing here reaches a
machine.
"""

from __future__ import annotations

import difflib
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.errors import HostError, UsageError, printable
from launcher.located_yaml import Problem, Source, Spot, found

MAX_BYTES = 2**20
MAX_SHOWN = 50
MAX_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    """A host name or an IP address, IPv6 without its brackets."""
    slots: int
    """Ranks on this host."""
    user: str | None = None
    """Who logs in; None leaves that, like `port`, to ssh and its configuration."""
    port: int | None = None
    """ssh's."""
    address: str | None = None
    """The IP address that the rendezvous uses; None: what the name resolves to."""
    gpus: tuple[int, ...] | None = None
    """The GPU of each local rank, in their order; None: local rank k has GPU k, where there are GPUs."""

    def to_json(self) -> dict[str, Any]:
        """Without what was left open."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return data if self.gpus is None else {**data, "gpus": list(self.gpus)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Host:
        gpus = data.get("gpus")
        return cls(**{**data, "gpus": None if gpus is None else tuple(gpus)})


def local(processes: int | Literal["auto"], gpus: int) -> list[Host]:
    """This machine alone: as many ranks as asked for, or one for each GPU, or one."""
    return [Host("localhost", (gpus or 1) if processes == "auto" else processes)]


def first(found: Sequence[Host], nodes: int | Literal["auto"], avoided: Collection[str] = ()) -> list[Host]:
    """The first `nodes` hosts. One that is to be avoided gives its place to the first spare host with as many slots,
    and keeps it where there is none: a run has as many ranks at every attempt.

    Raises:
        UsageError: there are fewer hosts.
    """
    count = len(found) if nodes == "auto" else nodes
    if count > len(found):
        raise UsageError(
            f"launch.nodes asks for {count} hosts, and the hostfile's selection has {len(found)}",
            hint="add hosts to the hostfile, or set launch.nodes to fewer",
        )
    spares = [host for host in found[count:] if host.name not in avoided]
    chosen = list(found[:count])
    for place, host in enumerate(chosen):
        stand_in = next((s for s in spares if s.slots == host.slots), None) if host.name in avoided else None
        if stand_in is not None:
            spares.remove(stand_in)
            chosen[place] = stand_in
    return chosen


def same_machine(facts: Mapping[str, str]) -> None:
    """
    Args:
        facts: the machine id of each host by its name. An empty id says nothing: some containers have none.

    Raises:
        HostError: two names are one machine, which would get the ranks of both.
    """
    names: dict[str, list[str]] = {}
    for name, machine_id in facts.items():
        names.setdefault(machine_id.strip().lower(), []).append(name)
    shared = [(ours, machine_id) for machine_id, ours in names.items() if machine_id and len(ours) > 1]
    if shared:
        raise HostError(
            "\n".join(f"{' and '.join(ours)} are one machine, with the machine id {i}" for ours, i in shared),
            hint="keep one of the names, with all the slots; machines that were cloned from one image need a "
            "/etc/machine-id each: empty that file on one, then `systemd-machine-id-setup` there",
        )


# Hostfiles -----------------------------------------------------------------------------------------------------------


class HostfileError(UsageError):
    """The hostfile cannot be used. `problems` has what is wrong in it, in the order of the file."""

    def __init__(self, message: str, *, hint: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


def load_hostfile(path: Path) -> list[Host]:
    """The hosts in `path`. Raises one HostfileError for all that is wrong: never a smaller run."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as e:
        raise HostfileError(f"{path}: there is no such file", hint=_neighbours(path)) from e
    except IsADirectoryError as e:
        raise HostfileError(f"{path}: expected a hostfile, found a directory", hint=_neighbours(path)) from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        what = f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}"
        raise HostfileError(what, hint=_neighbours(path)) from e
    if len(raw) > MAX_BYTES:
        what = f"{path}: larger than {MAX_BYTES // 2**20} MiB, which no hostfile is"
        raise HostfileError(what, hint=_neighbours(path))
    try:
        return parse_hostfile(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as e:
        source = Source(str(path), raw.decode("utf-8", "replace"))
        spot = source.after(raw[: e.start].decode("utf-8", "replace"))
        what = f"expected UTF-8, found the byte 0x{raw[e.start]:02x}"
        raise _refusal(source, [Problem(spot, "", what, "save the file as UTF-8")]) from e


def parse_hostfile(text: str, source: str) -> list[Host]:
    """A host for each line `[user@]name key=value ...`, in the order of the lines; `#` begins a comment.

    What DeepSpeed reads as it was meant, `name slots=8`, means the same here. No field of a host that comes out of this
    has a character that a shell or ssh would read anything into. Addresses come out written in the one canonical way.

    Args:
        source: what messages call the text, such as its path.
    """
    reader = _Reader(Source(source, text))
    hosts = reader.hosts()
    if reader.problems:
        raise _refusal(reader.source, reader.problems)
    return hosts


def dump_hostfile(hosts: Iterable[Host]) -> str:
    """Text that `parse_hostfile` reads as equal hosts, where it could have made them. `slots` stands first and is
    always there, for DeepSpeed, which ignores the rest of a line."""
    lines = []
    for host in hosts:
        name = f"[{host.name}]" if ":" in host.name else host.name
        gpus = None if host.gpus is None else ",".join(map(str, host.gpus))
        values = {"slots": host.slots, "port": host.port, "address": host.address, "gpus": gpus}
        words = [f"{key}={value}" for key, value in values.items() if value is not None]
        lines.append(" ".join([f"{host.user}@{name}" if host.user else name, *words]) + "\n")
    return "".join(lines)


def _name(text: str) -> str | None:
    if bracketed := re.fullmatch(r"\[(.*:.*)\]", text):
        return _address(bracketed[1])
    if re.fullmatch(r"[0-9.]+", text):  # a resolver takes each of these for an address, 17 for 0.0.0.17
        return _address(text)
    return text if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}", text) else None


def _address(text: str) -> str | None:
    """The one way to write this address."""
    if not re.fullmatch(r"[0-9A-Fa-f:.]{2,45}", text):  # ipaddress takes anything at all behind a `%`
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if address.is_unspecified or address.is_multicast else str(address)


def _user(text: str) -> str | None:
    return text if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", text) else None


def _slots(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,3}", text) and int(text) <= MAX_SLOTS else None


def _port(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,4}", text) and int(text) <= 65535 else None


def _numbers(text: str) -> tuple[int, ...] | None:
    """`0,2-3` as (0, 2, 3), in the order written."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        bounds = re.fullmatch(r"(0|[1-9][0-9]{0,3})(?:-(0|[1-9][0-9]{0,3}))?", part)
        new = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)
        if not new or new[-1] >= MAX_SLOTS or not numbers.keys().isdisjoint(new):
            return None
        numbers |= dict.fromkeys(new)
    return tuple(numbers)


_LINE = "a line is `gpu-01 slots=8`, and where needed `trainer@gpu-01 slots=8 port=2222 address=10.0.0.5 gpus=0-7`"
_KEYS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "slots": (_slots, f"a number from 1 to {MAX_SLOTS}", "slots are the ranks on the host, one for each GPU"),
    "port": (_port, "a number from 1 to 65535", "this is ssh's port; without it ssh decides"),
    "address": (_address, "the IPv4 or IPv6 address of one machine", "without it the name is looked up"),
    "gpus": (_numbers, f"GPU numbers below {MAX_SLOTS}, each once", "such as gpus=0,2-3"),
}
"""For each key what reads its value (None: it cannot), what that expects, and a hint."""
_FIELDS = _KEYS | {
    "user": (_user, "a user name", "letters, digits, '_', '.' and '-', the first none of '.' and '-'"),
    "name": (_name, "a host name or an IP address", "letters, digits, '.' and '-', the first a letter or a digit"),
}


class _Reader:
    """Reads line by line and past mistakes, which it collects."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self._lines: dict[str, int] = {}
        """Where each name and address was first said."""

    def hosts(self) -> list[Host]:
        text = self.source.text
        if lone := re.search(r"\r(?!\n)", text):
            what = "expected lines that end in LF or CRLF, found CR alone (U+000D)"
            spot = self.source.after(text[: lone.start()])
            self.problems.append(Problem(spot, "", what, "save the file with Unix line ends"))
        hosts = [host for number, line in enumerate(self.source.lines) if (host := self._host(number, line))]
        if not hosts and not self.problems:
            what = f"expected at least one host, found {'only comments' if text.strip() else 'nothing'}"
            hint = "write a line such as `gpu-01 slots=8` for each host; no hosts never mean a smaller run"
            self.problems.append(Problem(Spot(self.source), "", what, hint))
        return hosts

    def _host(self, number: int, line: str) -> Host | None:
        # Only blanks and tabs part words. Whatever else Unicode calls a space was not meant to be there.
        parts = re.finditer(r"#.*|[^ \t]+", line)
        words = [(part[0], Spot(self.source, number, part.start(), len(part[0]))) for part in parts]
        start = len(self.problems)
        if words and words[-1][0].startswith("#"):
            self._comment(*words.pop())
        if not words:
            return None
        values: dict[str, Any] = {}
        spots: dict[str, Spot] = {}
        for key, text, spot in self._login(*words[0]):
            self._read(key, text, spot, values, spots)
        keys_start = len(self.problems)
        for word, spot in words[1:]:
            key, equals, text = word.partition("=")
            if key in _KEYS and equals:
                self._read(key, text, _part(spot, len(key) + 1, text), values, spots)
            elif key and equals:
                near = difflib.get_close_matches(key[:99].lower(), [k for k in _KEYS if k not in values], n=1)
                hint = f"did you mean '{near[0]}'?" if near else "remove it"
                self._refuse(_part(spot, 0, key), "slots, port, address or gpus", key, hint)
            elif len(self.problems) == keys_start:  # after a mistake, a bare word is most likely part of it
                self._refuse(spot, "key=value", word, "a line has no blanks around `=` or inside a value")
        if len(self.problems) == keys_start and "=" not in words[0][0]:
            self._count(values, spots, _part(words[-1][1], len(words[-1][0]), ""))
        return Host(**values) if len(self.problems) == start else None

    def _login(self, word: str, spot: Spot) -> Iterator[tuple[str, str, Spot]]:
        user, at, name = word.rpartition("@")
        if at:
            yield "user", user, _part(spot, 0, user)
        yield "name", name, _part(spot, len(user + at), name)

    def _read(self, key: str, text: str, spot: Spot, values: dict[str, Any], spots: dict[str, Spot]) -> None:
        reads, expected, hint = _FIELDS[key]
        if key in values:
            self._refuse(spot, "each key once", f"{key}={text}", f"keep one of the two {key}=")
            return
        values[key], spots[key] = reads(text), spot
        if values[key] is None:
            if key == "name" and ":" in text:
                hint = "an IPv6 address stands in brackets, a port goes into port=2222"
            elif key == "name" and re.fullmatch(r"[0-9.]+", text):
                hint = "a name of digits and dots is an IPv4 address, such as 10.0.0.5"
            self._refuse(spot, expected, text, hint)
        elif key in ("name", "address"):
            identity = values[key].lower().rstrip(".")
            first = self._lines.setdefault(identity, spot.line)
            if first != spot.line:
                what = f"expected each host once, found {values[key]} on line {first + 1} and on line {spot.line + 1}"
                hint = "keep one line, with all the slots of that machine"
                self.problems.append(Problem(spot, "", what, hint))

    def _count(self, values: dict[str, Any], spots: dict[str, Spot], end: Spot) -> None:
        """Sees to it that `slots` is there and agrees with `gpus`."""
        if "gpus" in values:
            count = len(values["gpus"])
            if values.setdefault("slots", count) != count:
                expected = f"slots={count}, one for each of the gpus"
                self._refuse(spots["slots"], expected, f"slots={values['slots']}", "leave slots out beside gpus")
        elif "slots" not in values:
            self._refuse(end, "slots=N, or gpus=", "", _LINE)

    def _comment(self, text: str, spot: Spot) -> None:
        """A comment may be in any language; what would drive a terminal stays out of it."""
        if text.isprintable():
            return
        for column, c in enumerate(text):
            if c != "\t" and printable(c) != c:
                self._refuse(_part(spot, column, c), "text", c, "remove this character")
                return

    def _refuse(self, spot: Spot, expected: str, text: str, hint: str) -> None:
        """Points at the first character of `text` that no field has, if there is one: it may look like another."""
        shown = found(text or None)
        if odd := re.search(r"[^ -~]", text):
            spot = _part(spot, odd.start(), odd[0])
            shown = f"U+{ord(odd[0]):04X}" + (f" '{odd[0]}'" if odd[0].isprintable() else "")
        self.problems.append(Problem(spot, "", f"expected {expected}, found {shown}", hint))


def _part(spot: Spot, column: int, text: str) -> Spot:
    return replace(spot, column=spot.column + column, width=len(text) or 1)


def _refusal(source: Source, problems: list[Problem]) -> HostfileError:
    problems = sorted(problems, key=lambda p: (p.spot.line, p.spot.column))
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    more = [f"… and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    text = "\n".join([f"{source.label} has {count}", "", *map(str, problems[:MAX_SHOWN]), *more])
    return HostfileError(text, hint=f"mend the hostfile; {_LINE}", problems=problems)


def _neighbours(path: Path) -> str:
    """Files that may have been meant instead of `path`."""
    folder = path.parent
    try:
        folder = path if path.is_dir() else folder
        names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except (OSError, ValueError):
        return f"there is no directory {folder} that can be read"
    if near := difflib.get_close_matches(path.name, names):
        return f"did you mean {' or '.join(near)} in {folder}?"
    return f"{folder} has {', '.join(names[:10])}" if names else f"there is no file in {folder}"


# Selections ----------------------------------------------------------------------------------------------------------


def select(hosts: Sequence[Host], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Host]:
    """What `include` and then `exclude` leave of `hosts`, in the order of `hosts`.

    DeepSpeed's grammar, `worker-0@worker-1:0,2`: hosts parted by `@`, each whole or with the slots that are meant. Also
    ranges, `worker-1:0-3`, and patterns, `worker-*:0`. What is said more than once adds up. In both options, slots are
    numbered from 0 as in `hosts`: slot k is GPU k, or on a host with `gpus` the one at position k of those. So a host
    that keeps only some of its slots has `gpus` afterwards.

    Raises:
        UsageError: a name, pattern or slot that is in no host, or nothing is left.
    """
    problems: list[str] = []
    chosen = {host.name: set(range(host.slots)) for host in hosts}
    if include:
        chosen = _named(hosts, include, "launch.include", problems)
    for name, slots in _named(hosts, exclude, "launch.exclude", problems).items():
        chosen[name] -= slots
    hint = "slots follow a colon: [worker-0, 'worker-1:0,2']; the hosts are " + _few(hosts)
    if problems:
        raise UsageError("\n".join(problems), hint=hint)
    left = [_narrowed(host, sorted(chosen[host.name])) for host in hosts if chosen[host.name]]
    if not left:
        said = [*(f"launch.include {text}" for text in include), *(f"launch.exclude {text}" for text in exclude)]
        raise UsageError(f"expected at least one host, found none left by {' '.join(said)}", hint=hint)
    return left


def _named(hosts: Sequence[Host], texts: Sequence[str], option: str, problems: list[str]) -> dict[str, set[int]]:
    """The slots of each host that `texts` name; none for the other hosts."""
    chosen: dict[str, set[int]] = {host.name: set() for host in hosts}
    for item in (item for text in texts for item in text.split("@")):
        # Brackets are an IPv6 address's, or a pattern's: gpu-0[1-3].
        parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:]*)(?::(.*))?", item, re.DOTALL)
        name, slots = parts.groups() if parts else (item, None)
        matching = _matching(hosts, name)
        numbers = None if slots is None else _numbers(slots)
        if not matching:
            near = difflib.get_close_matches(name.lower(), [host.name for host in hosts], n=1, cutoff=0.5)
            mean = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{option}: expected a host, found {found(name or None)}{mean}")
        elif slots is not None and numbers is None:
            problems.append(f"{option} {item}: expected slots such as 0,2-3, each once, found {found(slots or None)}")
        elif short := [host for host in matching if numbers and max(numbers) >= host.slots]:
            has = f"{short[0].name}, which has slots 0-{short[0].slots - 1}"
            problems.append(f"{option} {item}: expected slots of {has}, found {max(numbers or ())}")
        for host in matching:
            chosen[host.name] |= set(range(host.slots) if slots is None else numbers or ())
    return chosen


def _matching(hosts: Sequence[Host], name: str) -> list[Host]:
    wanted = (_name(name) or name).lower()
    if same := [host for host in hosts if host.name.lower() == wanted]:
        return same
    return [host for host in hosts if fnmatch.fnmatchcase(host.name.lower(), wanted)]


def _narrowed(host: Host, slots: list[int]) -> Host:
    if len(slots) == host.slots:
        return host
    return replace(host, slots=len(slots), gpus=tuple(host.gpus[k] if host.gpus else k for k in slots))


def _few(hosts: Sequence[Host]) -> str:
    return ", ".join([host.name for host in hosts[:10]] + (["…"] if len(hosts) > 10 else []))
