"""The kernel's counters of processes that it ended for want of memory: real ones, of a real cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import memory
from tests.conftest import wait_until
from tests.faults.cells import small_cgroup

HOG = """
import sys
open(sys.argv[1], "w").write("0")
print("there", flush=True)
sys.stdin.readline()
held = [b"1" * 2**20 for _ in range(1000)]
"""


@pytest.fixture
def group() -> Iterator[Path]:
    with small_cgroup() as made:
        yield made


def test_a_kill_for_want_of_memory_is_counted_where_it_happened(group: Path) -> None:
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(group / "cgroup.procs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        assert hog.stdout is not None and hog.stdout.readline() == "there\n"
        assert memory.cgroup(hog.pid) == group
        assert memory.limit(group) == 200 * 2**20
        watch, other = memory.Watch(), memory.Watch()
        before = watch.look({"3": hog.pid})
        other.look({"0": bystander.pid})
        assert (before["oom_kills"], before["oom_kills_on_machine"], before["limit"]) == (0, 0, 200 * 2**20)
        assert 2**20 < before["peak_rss"]["3"] < 100 * 2**20
        hog.communicate("go\n")
        assert hog.returncode == -9
        after = watch.look({"3": hog.pid})
        assert (after["oom_kills"], after["oom_kills_on_machine"]) == (1, 0)
        assert other.look({"0": bystander.pid})["oom_kills"] == 0, "another cgroup's counter stays as it was"
        # Whoever looks later, on this machine, sees the same; elsewhere the facts stay as they were.
        assert memory.look_again(before)["oom_kills"] == 1
        elsewhere: dict[str, Any] = {**before, "counters": {**before["counters"], "boot": "another"}}
        assert memory.look_again(elsewhere)["oom_kills"] == 0
    finally:
        for process in (hog, bystander):
            process.kill()
            process.wait()


def test_the_kills_of_others_on_the_machine_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that somebody killed was once called out of memory, and not started again, because another job of the
    machine had run out of memory at that time."""
    (tmp_path / "memory.events").write_text("oom_kill 0\n")
    monkeypatch.setattr(memory, "cgroup", lambda pid: tmp_path)
    monkeypatch.setattr(memory, "machine_kills", lambda: 10)
    watch = memory.Watch()
    assert watch.look({"0": os.getpid()})["oom_kills_on_machine"] == 0
    (tmp_path / "memory.events").unlink()
    monkeypatch.setattr(memory, "machine_kills", lambda: 11)
    seen = watch.look({"0": os.getpid()})
    assert (seen["oom_kills"], seen["oom_kills_on_machine"]) == (0, 1), "where the cgroup cannot say, the machine may"


def test_what_the_kernel_did_long_before_a_death_is_not_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program in the cgroup had run out of memory days ago; a rank that somebody killed was then called out of
    memory, and not started again."""
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0\n")
    monkeypatch.setattr(memory, "cgroup", lambda pid: tmp_path)
    with subprocess.Popen(["sleep", "60"]) as rank:
        watch = memory.Watch()
        watch.look({"0": rank.pid})
        counter.write_text("oom_kill 1\n")
        for _ in range(3):
            watch.look({"0": rank.pid})
        rank.kill()
        rank.wait()
        assert watch.look({"0": rank.pid})["oom_kills"] == 0
        counter.write_text("oom_kill 2\n")
        assert watch.look({"0": rank.pid})["oom_kills"] == 1, "and nothing is forgotten from then on"


@pytest.mark.parametrize(
    ("name", "text", "kills"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n", 2),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),
    ],
)
def test_both_kinds_of_cgroup_are_read(tmp_path: Path, name: str, text: str, kills: int | None) -> None:
    (tmp_path / name).write_text(text)
    assert memory.kills(tmp_path) == kills


def test_the_lowest_limit_above_counts(tmp_path: Path) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    assert memory.limit(group) is None
    (group / "memory.max").write_text("max\n")
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory.limit(group) == 1000


def test_a_process_that_is_gone_has_no_vitals() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    wait_until(lambda: memory.status(gone.pid) == {})
    assert memory.status(os.getpid())["State"] == "R"
    assert memory.cgroup(gone.pid) is None
