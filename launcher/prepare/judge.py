"""Findings -> checks: all of them, in the order of the table. Pure."""

from __future__ import annotations

from launcher.prepare import between_hosts, of_a_host
from launcher.prepare.checks import COLUMNS, Check
from launcher.prepare.findings import Findings


def judge(found: Findings) -> list[Check]:
    """All checks, by column, in it by host; what is red first says why."""
    order = [name for names in COLUMNS.values() for name in names]
    places = [s.name for s in found.seen]
    checks = list(between_hosts.judge(found))
    for rank, seen in enumerate(found.seen):
        if seen.trouble is None:
            checks += of_a_host.judge(found, rank, seen)
    return sorted(
        checks, key=lambda c: (order.index(c.name), places.index(c.host) if c.host in places else len(places))
    )
