"""What follows a failure: decided by a pure function, from what attempts left on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher import recovery, rundir
from launcher.errors import UsageError
from launcher.failure import Failure
from launcher.hosts import Host, first
from launcher.recipe_launch import Relaunch
from launcher.recovery import Decision, Past, decide
from launcher.rundir import Run

KILLED = Failure("killed", "rank 1 on a was ended by SIGKILL", "resume", rank=1, host="a", node_rank=0)
RELAUNCH = Relaunch(attempts=3, wait=5)


def past(*rows: str) -> list[Past]:
    """An attempt for each row: `+` sealed a new step, `-` none; `h` began by hand."""
    found, step = [], -1
    for number, row in enumerate(rows, start=1):
        after = step + 10 if "+" in row else step
        found.append(Past(number, step, after, "h" in row))
        step = after
    return found


@pytest.mark.parametrize(
    ("rows", "decision"),
    [
        (["h-"], Decision(5, 1)),
        (["h-", "-"], Decision(10, 2)),
        (["h-", "-", "-"], Decision(None, 3)),
        (["h+", "-", "-"], Decision(10, 2)),
        (["h-", "-", "+"], Decision(5, 0)),
        (["h-", "-", "+", "-", "-", "-"], Decision(None, 3)),
        (["h-", "-", "h-"], Decision(5, 1)),  # a person looked into it
        (["h-", "-", "-", "-"], Decision(None, 4)),  # a requeued job goes on counting
    ],
)
def test_attempts_without_progress_are_counted(rows: list[str], decision: Decision) -> None:
    assert decide(past(*rows), KILLED, RELAUNCH) == decision


def test_the_wait_doubles_up_to_ten_minutes() -> None:
    often = Relaunch(attempts=100, wait=5)
    waits = [decide(past("h+", *["-"] * n), KILLED, often).wait_s for n in range(1, 10)]
    assert waits == [5, 10, 20, 40, 80, 160, 320, 600, 600]


def test_what_a_person_must_mend_is_not_tried_again() -> None:
    for kind in ("training", "recipe", "data", "storage", "host memory", "device memory", "stopped by force"):
        assert decide(past("h+", "+"), replace(KILLED, kind=kind), RELAUNCH) == Decision(None, 0)


def test_a_host_that_refused_is_tried_again_where_that_can_help() -> None:
    refused = replace(KILLED, kind="host refused")
    assert decide(past("h-"), refused, RELAUNCH).wait_s is None
    assert decide(past("h-"), refused, RELAUNCH, can_move=True).wait_s == 5
    assert decide(past("h+", "-"), refused, RELAUNCH).wait_s == 5, "it was lost, and may be starting up"


def test_the_end_for_want_of_progress_keeps_the_last_cause(tmp_path: Path) -> None:
    ended = recovery.no_progress(Run(tmp_path), KILLED, 3)
    assert (ended.kind, ended.code, ended.verdict, ended.host) == ("no progress", 78, "mend", "a")
    assert ended.message == (
        f"{tmp_path} makes no progress: 3 attempts in a row ended without a new checkpoint; the last:"
        " rank 1 on a was ended by SIGKILL"
    )
    assert ended.cause == KILLED.to_json()


def test_a_lost_launcher_is_concluded_and_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt = run.new_attempt()
    recovery.note(attempt, "started", sealed=-1, by_hand=True)
    recovery.settle(run)
    recovery.settle(run)
    assert rundir.read_json(attempt.failure)["kind"] == "launcher lost"
    assert recovery.past(run) == [Past(1, -1, -1, True)]


@pytest.mark.parametrize("end", ["launcher lost", "time limit"])
def test_a_job_that_comes_again_and_again_in_vain_is_counted(tmp_path: Path, end: str) -> None:
    """The launcher was killed in every life of a job, or the time limit came before the first seal: nobody decided
    anything, and the job was queued again for ever."""
    run = Run(tmp_path)
    for k in range(3):
        assert recovery.exhausted(run, RELAUNCH) is None
        attempt = run.new_attempt()
        recovery.note(attempt, "started", sealed=-1, by_hand=k == 0)
        if end == "time limit":
            rundir.write_json(attempt.exit, {"code": 75, "step": 0, "sealed_step": -1})
            recovery.note(attempt, "ended", code=75, sealed=-1)
        recovery.settle(run)
    ended = recovery.exhausted(run, RELAUNCH)
    assert ended is not None and (ended.kind, ended.code) == ("no progress", 78)
    assert "3 attempts in a row" in ended.message and ended.cause is not None and ended.cause["kind"] == end
    rundir.write_json(attempt.failure, ended.to_json())
    assert recovery.exhausted(run, RELAUNCH) == ended, "said once more it is the same"
    recovery.note(run.new_attempt(), "started", sealed=-1, by_hand=True)
    recovery.settle(run)
    assert recovery.exhausted(run, RELAUNCH) is None, "a person looked into it"


def test_what_a_fresh_start_did_not_put_aside_is_no_progress(tmp_path: Path) -> None:
    """Lost before its first step in every life of its job, it was counted from nothing to the checkpoint of before, and
    queued again for ever."""
    run = Run(tmp_path)
    (run.checkpoint(100)).mkdir(parents=True)
    rundir.write_json(run.checkpoint(100) / rundir.MANIFEST, {})
    for _ in range(3):
        recovery.note(run.new_attempt(), "started", sealed=-1, by_hand=False)
        recovery.settle(run)
    assert recovery.past(run) == [Past(k, -1, -1, False) for k in (1, 2, 3)]
    ended = recovery.exhausted(run, RELAUNCH)
    assert ended is not None and ended.kind == "no progress"


def test_an_end_that_only_a_rank_told_is_one_of_the_past(tmp_path: Path) -> None:
    """Its launcher was killed behind a stop on request: it was left out, and its progress with it."""
    run = Run(tmp_path)
    attempt = run.new_attempt()
    recovery.note(attempt, "started", sealed=-1, by_hand=True)
    rundir.append_line(attempt.events, {"event": "started", "step": 0, "time": 1.0})
    (run.checkpoint(4)).mkdir(parents=True)
    rundir.write_json(run.checkpoint(4) / rundir.MANIFEST, {})
    rundir.write_json(attempt.exit, {"code": 75, "step": 4, "sealed_step": 4, "asked": "speechctl stop"})
    recovery.settle(run)
    assert not attempt.failure.exists() and recovery.past(run) == [Past(1, -1, 4, True)]


# Hosts ----------------------------------------------------------------------------------------------------------------


def test_a_host_is_avoided_for_a_while(tmp_path: Path) -> None:
    attempt = Run(tmp_path).new_attempt()
    recovery.avoid(attempt, KILLED, 100)
    assert rundir.avoided(attempt.run) == {}, "a kill says nothing about the host"
    recovery.avoid(attempt, replace(KILLED, kind="node lost"), 100)
    (why,) = rundir.avoided(attempt.run).values()
    assert (why["host"], why["kind"], why["attempt"]) == ("a", "node lost", 1)
    assert set(rundir.avoided(attempt.run, why["until"] - 1)) == {"a"}
    assert rundir.avoided(attempt.run, why["until"] + 1) == {}


def test_a_spare_host_of_the_same_size_takes_the_place() -> None:
    a, b, c, d = Host("a", 8), Host("b", 8), Host("c", 4), Host("d", 8)
    assert first([a, b, c, d], 2) == [a, b]
    assert first([a, b, c, d], 2, {"a"}) == [d, b]
    assert first([a, b, c, d], 2, {"a", "b"}) == [d, b], "there is one spare"
    assert first([a, b, c, d], 2, {"a", "d"}) == [a, b], "there is none"
    assert first([a, b], "auto", {"a"}) == [a, b]
    assert recovery.used_again([a, b], {"a": {}, "x": {}}) == ["a"]
    with pytest.raises(UsageError, match="asks for 3 hosts, and the hostfile's selection has 2"):
        first([a, b], 3)
