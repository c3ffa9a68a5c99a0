"""Hangs: who shows no progress, whether that is a hang, and which rank differs from the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import hang, marks, memory, rundir, vitals
from launcher.hang import behind, differs
from launcher.hosts import Host
from launcher.recipe_launch import Deadlines
from launcher.rundir import Attempt
from tests.conftest import RECIPE, Stub, gone, wait_until

DEADLINES = {"start": 900.0, "step": 300.0, "evaluate": 300.0, "save": 900.0}


def row(rank: int, marks: int, unchanged_s: float = 400.0, phase: str = "step", **more: Any) -> dict[str, Any]:
    base = {"rank": rank, "pid": 100 + rank, "phase": phase, "step": 12, "at": "agree", "marks": marks, "state": "S"}
    return {**base, "unchanged_s": unchanged_s, **more}


# Whether ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "hung"),
    [
        ([[row(0, 50), row(1, 48)]], [1]),
        ([[row(0, 50, 20), row(1, 48, 20)]], None),
        # Rank 0 waits for a rank that is behind and gets on: a slow one is no hang.
        ([[row(0, 50, 2000)], [row(1, 48, 20)]], None),
        ([[row(0, 50)], [row(1, 48, 400, "save")]], None),  # a save may take longer
        ([[row(0, 50)], [row(1, 48, 1000, "save")]], [1]),
        ([[row(0, 50)], [row(1, 50)]], [0, 1]),
        ([[row(0, 50)], [row(1, 50, 20)]], None),  # it came there just now
        ([[row(0, 5)], []], None),  # an agent that has not told of its ranks yet
        ([[row(0, 0, 400, "start")]], None),
        ([[row(0, 0, 1000, "start")]], [0]),
    ],
)
def test_a_run_hangs_when_those_furthest_behind_are_beyond_their_deadline(
    nodes: list[list[dict[str, Any]]], hung: list[int] | None
) -> None:
    found = behind(nodes, DEADLINES)
    assert (None if found is None else [r["rank"] for r in found]) == hung


# Which --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "rank", "why"),
    [
        ([row(0, 48), row(1, 50, state="T")], 1, "it is stopped (state T)"),
        ([row(0, 48), row(1, 50, state="D")], 1, "it waits in the kernel and cannot be ended (state D)"),
        ([row(0, 50), row(1, 48), row(2, 50)], 1, "it is behind while others are in step 12 at agree"),
        ([row(0, 50), row(1, 48), row(2, 48)], 1, "it is behind, and so are 1 more, while others are in step 12 at ag"),
        ([row(0, 50, stack=["in f"]), row(1, 50, stack=["in f"]), row(2, 50, stack=["in g"])], 2, "it is in in g, and"),
        ([row(0, 50, stack=["in f"]), row(1, 50, stack=["in f"])], None, ""),
        ([row(0, 50)], 0, "it is the only one"),
    ],
)
def test_the_rank_that_differs_is_named(rows: list[dict[str, Any]], rank: int | None, why: str) -> None:
    found, said = differs(rows)
    assert (None if found is None else found["rank"]) == rank and said.startswith(why)


# By whom that is known ------------------------------------------------------------------------------------------------


def vitals_of(tmp_path: Path, slots: int = 2) -> tuple[Attempt, vitals.Vitals]:
    (tmp_path / "attempts").mkdir()
    attempt = Attempt(tmp_path / "attempts" / "0001")
    for folder in (attempt.root, attempt.progress_dir, attempt.stacks):
        folder.mkdir()
    return attempt, vitals.Vitals(attempt, 1, [Host("a", 3), Host("b", slots)])


MARKING = """
import faulthandler, os, signal, sys, time
from launcher import marks
faulthandler.register(signal.SIGUSR1, file=open(sys.argv[2], "ab"))
marks.open_slot(int(sys.argv[1]), int(sys.argv[1]) - 3)
marks.mark("model", "start")
marks.mark("data", "step", 7)
def waits_for_data():
    if sys.argv[3:]:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
waits_for_data()
"""


def test_ranks_tell_where_they_are_and_show_their_stacks_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank sleeps, the other is stopped; the small py-spy notes how it was called."""
    attempt, agent = vitals_of(tmp_path)
    (tmp_path / "py-spy").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "py-spy").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    env = {**os.environ, **agent.variables, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", MARKING, str(rank), str(attempt.stack(rank)), *more], env=env)
        for rank, more in ((3, []), (4, ["stop"]))
    ]
    try:
        wait_until(lambda: [r["state"] for r in agent.look()["ranks"]] == ["S", "T"])
        seen = agent.look()["ranks"]
        assert [(r["rank"], r["pid"], r["phase"], r["step"], r["at"], r["marks"]) for r in seen] == [
            (3, ranks[0].pid, "step", 7, "data", 2),
            (4, ranks[1].pid, "step", 7, "data", 2),
        ]
        assert all(r["rss"] > 2**20 for r in seen)
        agent.follow()
        agent.dump()
        wait_until(attempt.dumped(1).exists)
        sleeps, stopped = rundir.read_json(attempt.dumped(1))["ranks"]
        assert (sleeps["answered"], stopped["answered"]) == (True, False)
        assert sleeps["stack"][0].endswith("in waits_for_data")
        assert attempt.stack(4).read_text() == f"dump --nonblocking --pid {ranks[1].pid}\n"
        wait_until(lambda: rundir.read_json(attempt.progress(1))["ranks"][0]["unchanged_s"] > 0)
        assert ranks[0].poll() is None, "asking does not end it"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_nobody_else_gets_the_signal_of_a_rank_that_is_gone(tmp_path: Path) -> None:
    """Its number may be another process's by now, which SIGUSR1 would end."""
    attempt, agent = vitals_of(tmp_path, slots=1)
    foreign = subprocess.Popen(["setsid", "--fork", "sh", "-c", "echo $$; exec sleep 60"], stdout=subprocess.PIPE)
    assert foreign.stdout is not None
    pid = int(foreign.stdout.readline())
    foreign.stdout.close()
    foreign.wait()
    try:
        os.pwrite(agent.slots.fd, marks.SLOT.pack(1, 0, pid, 3, b"step", b"data"), 0)
        agent.look()
        agent._dump()
        assert rundir.read_json(attempt.dumped(1))["ranks"] == []
        assert not gone({pid}, within_s=0.3)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_rank_that_ends_while_it_is_looked_at_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It made its last mark behind the look at the marks, and was gone at the look at the processes: its peers were
    killed for that, which may be sealing."""
    _, agent = vitals_of(tmp_path, slots=1)

    def marked(at: str) -> dict[str, str]:
        os.pwrite(agent.slots.fd, marks.SLOT.pack(1, 0, 100, 3, b"step", at.encode()), 0)
        return {}  # of a process that is gone

    for last, died in ((marks.END, False), ("agree", True)):
        marked("agree")
        monkeypatch.setattr(memory, "status", lambda _, last=last: marked(last))
        assert agent.one_died() == died


def test_an_agent_that_was_stopped_itself_does_not_count_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, agent = vitals_of(tmp_path, slots=1)
    agent.look()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert agent.look()["ranks"][0]["unchanged_s"] == 2 * vitals.EVERY_S


def test_the_main_thread_is_the_one_that_counts() -> None:
    dumped = (
        'Thread 0x01 (most recent call first):\n  File "a.py", line 1 in fed\n\n'
        'Current thread 0x02 (most recent call first):\n  File "b.py", line 2 in step\n  File "b.py", line 9 in go\n'
    )
    assert vitals.main_thread(dumped) == ['File "b.py", line 2 in step', 'File "b.py", line 9 in go']
    spied = 'Process 7: python\nThread 7 (idle): "MainThread"\n    step (b.py:2)\nThread 8 (idle)\n    fed (a.py:1)\n'
    assert vitals.main_thread(spied) == ["step (b.py:2)"]
    assert vitals.main_thread("") == []


# As the launcher sees it ----------------------------------------------------------------------------------------------


def test_an_agent_that_falls_silent_is_a_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, _ = vitals_of(tmp_path)
    rundir.write_json(attempt.hosts, [{"name": "a", "slots": 1}, {"name": "b", "slots": 1}])
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = hang.Watch(attempt, 2, Deadlines())
    for beat in range(40):
        clock[0] += 1.1
        for k in range(2):
            if k == 0 or beat < 5:
                facts = {"beat": beat, "ranks": [row(k, 50 + beat, 0)]}
                attempt.progress(k).write_text(json.dumps(facts))
        if watch.look([0, 1]) is not None:
            break
    failed = watch.explain([0, 1], lambda: None)
    assert (failed.kind, failed.host, failed.node_rank) == ("node lost", "b", 1)
    assert 4 + 30 / 1.1 <= beat <= 6 + 30 / 1.1
    assert failed.message.startswith("lost node 1 on b: its agent has said nothing for 3")


def test_an_agent_that_is_stopped_is_let_go(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks go with it, and the run goes on."""
    silent = f"{stub.packages}/sitecustomize.py"
    Path(silent).write_text("from launcher import hang\nhang.SILENT_S = 4.0\n")
    stub.behave("train", "train", then=("train 40", "train 40"))
    with stub.start(*stub.command, "launch", "stub.yaml") as process:
        wait_until(lambda: stub.run.sealed_steps())
        wait_until(stub.run.attempts()[0].progress(0).exists)
        time.sleep(2)  # the launcher has read it
        os.kill(rundir.read_json(stub.run.attempts()[0].node(0))["pid"], signal.SIGSTOP)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "attempt 1 failed: lost node 0 on localhost: its agent has said nothing for" in stderr
    assert gone(stub.pids(), within_s=2)


def test_a_slow_step_is_no_hang(stub: Stub) -> None:
    """Each mark is in time, though the whole takes longer than the deadline."""
    deadlines = "deadlines: {start: 60s, step: 3s, save: 60s}"
    stub.recipe.write_text(RECIPE.replace("stop_grace: 2s}", f"stop_grace: 2s, {deadlines}}}"))
    stub.behave("train 300", "train 300")
    done = stub.speechctl("launch", "stub.yaml")
    assert done.returncode == 0, done.stderr
    assert len(stub.run.attempts()) == 1
