"""Whether the kernel ended processes because memory ran out: its own counters, of a cgroup and of the whole machine.

A SIGKILL says nothing about who sent it. A cgroup's counter rises when one of its processes was ended for want of
memory, the cgroup's or the machine's (`__oom_kill_process` in the kernel's mm/oom_kill.c counts in both places). The
machine's counter may have risen for somebody else's process: it is asked only where a cgroup's cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

NO_LIMIT = 2**60
"""cgroup v1 writes a number above this where there is none."""


class Watch:
    """The counters that matter to these processes, against what they were shortly before the first of them ended: a
    cgroup counts for ever, and programs of other people may be in it."""

    def __init__(self) -> None:
        self.machine_base = self.machine_last = machine_kills()
        self.base: dict[str, int | None] = {}
        self.last: dict[str, int | None] = {}
        """At the last look at which all lived. The base is from the look before that one: a process that the kernel has
        just ended looks alive for a moment."""
        self.peaks: dict[str, int] = {}

    def look(self, pids: Mapping[str, int]) -> dict[str, Any]:
        """
        Args:
            pids: the processes by what to call them, such as their ranks.

        Returns:
            `oom_kills` in their cgroups since then, `oom_kills_on_machine` where the former may have missed
            some, `limit` (the lowest of their cgroups; absent where there is none), `machine` (its memory) and
            `peak_rss` by name; all in bytes.
        """
        all_live = True
        for name, pid in pids.items():
            if (group := cgroup(pid)) is not None and str(group) not in self.base:
                self.base[str(group)] = self.last[str(group)] = kills(group)
            now = status(pid)
            all_live = all_live and "VmRSS" in now
            if (peak := now.get("VmHWM")) is not None:
                self.peaks[name] = peak
        if all_live:
            self.base, self.last = self.last, {group: kills(Path(group)) for group in self.last}
            self.machine_base, self.machine_last = self.machine_last, machine_kills()
        limits = [limit(Path(group)) for group in self.base]
        known = [value for value in limits if value is not None]
        counters = {"base": self.base, "machine_base": self.machine_base, "boot": boot()}
        told = {"machine": psutil.virtual_memory().total, "peak_rss": self.peaks, "counters": counters}
        return look_again({**told, **({"limit": min(known)} if known else {})})


def look_again(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with the counters as they are now. On another machine they stay as they were."""
    counters = facts.get("counters")
    if counters is None or counters["boot"] != boot():
        return facts
    changes = [(base, kills(Path(group))) for group, base in counters["base"].items()]
    in_cgroups = sum(max(0, now - base) for base, now in changes if base is not None and now is not None)
    is_blind = not changes or any(base is None or now is None for base, now in changes)
    on_machine = machine_kills() - counters["machine_base"] if is_blind else 0
    return {**facts, "oom_kills": in_cgroups, "oom_kills_on_machine": on_machine}


def cgroup(pid: int) -> Path | None:
    """The directory of the process's memory cgroup, v1 or v2; None where it cannot be told."""
    mounts = re.findall(r"(?m)^\S+ \S+ \S+ \S+ (\S+) .* - (cgroup2?) \S+ (\S+)$", _text("/proc/self/mountinfo"))
    v1 = next((m[0] for m in mounts if m[1] == "cgroup" and "memory" in m[2].split(",")), None)
    v2 = next((m[0] for m in mounts if m[1] == "cgroup2"), None)
    of_process = _text(f"/proc/{pid}/cgroup")
    for root, name in ((v1, r"(?m)^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$"), (v2, r"(?m)^0::/(.*)$")):
        found = re.search(name, of_process)
        if root is not None and found is not None:
            group = Path(root) / found[1]
            return group if group.is_dir() else Path(root)  # a container that shows its own cgroup as the root
    return None


def kills(group: Path) -> int | None:
    """How many of a cgroup's processes the kernel ended for want of memory; None where it does not say."""
    for name in ("memory.events", "memory.oom_control"):
        if found := re.search(r"(?m)^oom_kill (\d+)$", _text(group / name)):
            return int(found[1])
    return None


def limit(group: Path) -> int | None:
    """The least that the cgroup or one above it may use, in bytes."""
    values = []
    for folder in (group, *group.parents):
        text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if text.strip().isdecimal() and int(text) < NO_LIMIT:
            values.append(int(text))
    return min(values, default=None)


def available(pid: int) -> int:
    """How much more memory a process may take without any other being ended for it, in bytes: of the machine, and of
    what its cgroup and those above it may use. What the kernel keeps of files counts as free."""
    group, left = cgroup(pid), psutil.virtual_memory().available
    for folder in () if group is None else (group, *group.parents):
        if (most := limit(folder)) is None:
            continue
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        files = re.search(r"(?m)^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"))
        if used.strip().isdecimal():
            left = min(left, most - int(used) + (int(files[1]) if files else 0))
    return max(0, left)


def machine_kills() -> int:
    found = re.search(r"(?m)^oom_kill (\d+)$", _text("/proc/vmstat"))
    return int(found[1]) if found else 0


def boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id").strip()


def status(pid: int) -> dict[str, Any]:
    """`State` (one letter: R, S, D, T, Z …), `VmRSS` and `VmHWM` in bytes, as far as the kernel says."""
    text = _text(f"/proc/{pid}/status")
    found: dict[str, Any] = {name: int(kib) * 1024 for name, kib in re.findall(r"(?m)^(Vm\w+):\s+(\d+) kB$", text)}
    state = re.search(r"(?m)^State:\s+(\S)", text)
    return {**found, "State": state[1]} if state else found


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
