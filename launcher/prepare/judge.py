"""Findings -> checks: all of them, in the order of the table. Pure."""

from __future__ import annotations

from launcher.prepare import between_hosts, of_a_host
from launcher.prepare.checks import COLUMNS, Check
from launcher.prepare.findings import Findings


def judge(found: Findings) -> list[Check]:
    """All checks, by column and then by host. Where a host fails a check, no mere warning of the same check is said."""
    order = [name for names in COLUMNS.values() for name in names]
    places = [s.name for s in found.seen]
    checks = list(between_hosts.judge(found))
    for rank, seen in enumerate(found.seen):
        if seen.trouble is None:
            checks += of_a_host.judge(found, rank, seen)
    failed = {(c.name, c.host) for c in checks if c.verdict == "fail"}
    said = [c for c in checks if c.verdict != "warn" or (c.name, c.host) not in failed]
    return sorted(said, key=lambda c: (order.index(c.name), places.index(c.host) if c.host in places else len(places)))
