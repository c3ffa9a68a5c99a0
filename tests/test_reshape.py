"""`resume` with another number of ranks: what it takes, what it refuses, and what is written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import new_run, recipe_file, reshape, rundir
from launcher.errors import ExitCode, UsageError
from launcher.hosts import Host
from launcher.rundir import Run
from tests.conftest import Stub


def ranks(run: Run) -> list[int]:
    """Of each attempt."""
    return [sum(h["slots"] for h in rundir.read_json(a.hosts)) for a in run.attempts()]


def test_ranks_come_and_go_and_the_number_stays(stub: Stub) -> None:
    """Two ranks, then three because a person said so, then three because they were three; then one."""
    stub.behave("train 12", "train 12")
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.FINISHED
    stub.behave(*["train 24"] * 3)
    done = stub.speechctl("resume", "stub", "--set", "launch.processes=3")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert f"{stub.run.root} goes on with 3 ranks; it had 2\n" in done.stderr
    assert rundir.read_json(stub.run.plan)["world_size"] == 3
    assert recipe_file.load(stub.run.resolved).launch.processes == 3
    stub.behave(*["train 36"] * 3)
    done = stub.speechctl("resume", "stub")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert "goes on with" not in done.stderr
    stub.behave("train 50")
    assert stub.speechctl("resume", "stub", "--set", "launch.processes=1").returncode == ExitCode.FINISHED
    assert ranks(stub.run) == [2, 3, 3, 1]
    starts = [rundir.read_lines(a.events)[0] for a in stub.run.attempts()]
    assert [(e["step"], e["world_size"]) for e in starts] == [(0, 2), (12, 3), (24, 3), (36, 1)]


@pytest.mark.parametrize("key", ["max_steps=60", "batch.step_seconds=48s", "launch=null", "zero_stage=3"])
def test_only_how_it_is_launched_may_change(stub: Stub, key: str) -> None:
    assert stub.speechctl("launch", "stub.yaml", "--hold").returncode == 0
    before = stub.run.resolved.read_bytes()
    done = stub.speechctl("resume", "stub", "--set", key)
    assert done.returncode == ExitCode.USAGE
    assert (
        f"error: --set {key.partition('=')[0]} at a resume" in done.stderr
        and "hint: only launch.… may change" in done.stderr
    )
    assert stub.run.resolved.read_bytes() == before and stub.run.attempts() == []


def test_another_recipe_is_refused_of_a_finished_run_too(stub: Stub) -> None:
    """`--set max_steps=100` was answered with "is finished" and exit code 0, and nothing was trained."""
    stub.behave("train 50", "train 50")
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.FINISHED
    done = stub.speechctl("resume", "stub", "--set", "max_steps=100")
    assert done.returncode == ExitCode.USAGE and "error: --set max_steps at a resume" in done.stderr
    assert stub.speechctl("resume", "stub").returncode == ExitCode.FINISHED


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on(stub: Stub) -> None:
    """`checkpoint verify` says that a resume passes over what does not verify; it said that the run is finished."""
    stub.behave("train 50", "train 50")
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.FINISHED
    (stub.run.checkpoint(50) / "weights").write_bytes(b"flip")
    stub.speechctl("resume", "stub")
    assert len(stub.run.attempts()) == 2


def test_who_a_run_is_must_be_known_before_its_checkpoints_are_judged(stub: Stub) -> None:
    """Without provenance.json, which has the run's id, each checkpoint was taken for one of another run, and put
    aside."""
    stub.behave("train 12", "train 12")
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.FINISHED
    sealed = stub.run.sealed_steps()
    stub.run.provenance.unlink()
    done = stub.speechctl("resume", "stub")
    assert done.returncode == ExitCode.DATA, done.stderr
    assert f"error: {stub.run.provenance} is missing" in done.stderr and "restore it" in done.stderr
    assert stub.run.sealed_steps() == sealed and len(stub.run.attempts()) == 1


def test_a_mistake_in_the_change_changes_nothing(stub: Stub) -> None:
    assert stub.speechctl("launch", "stub.yaml", "--hold").returncode == 0
    before = {p: p.read_bytes() for p in stub.run.root.glob("*.*")}
    assert stub.speechctl("resume", "stub", "--set", "launch.processes=many").returncode == ExitCode.USAGE
    assert {p: p.read_bytes() for p in stub.run.root.glob("*.*")} == before


def test_fewer_gpus_than_before_must_be_meant(stub: Stub) -> None:
    """One of eight fell off the bus; nobody has said that seven are to go on."""
    text = stub.recipe.read_text().replace("processes: 2", "processes: auto")
    stub.recipe.write_text(text)
    recipe = recipe_file.load(stub.recipe)
    reshape.refuse_unasked(stub.run, recipe, 8, [Host("localhost", 8)])
    with pytest.raises(UsageError, match="has run with 8 ranks; on this machine it would have 7") as caught:
        reshape.refuse_unasked(stub.run, recipe, 8, [Host("localhost", 7)])
    assert "--set launch.processes=7" in caught.value.hint


def test_killed_while_it_writes_it_down(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before each file and behind the last: the recipe in the run is one of the two, and known for the run's own."""
    assert stub.speechctl("launch", "stub.yaml", "--hold").returncode == 0
    old = stub.run.resolved.read_bytes()
    new = tmp_path / "new.yaml"
    new.write_bytes(old.replace(b"processes: 2", b"processes: 4"))
    assert new.read_bytes() != old
    made, write = stub.plan(4), rundir.write_bytes
    for allowed in range(5):
        left = [allowed]

        def until(
            path: Path, data: bytes, mode: int = 0o644, left: list[int] = left, write: Callable[..., None] = write
        ) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            write(path, data, mode)

        with monkeypatch.context() as patch:
            patch.setattr(rundir, "write_bytes", until)
            if allowed < 4:
                with pytest.raises(KeyboardInterrupt):
                    reshape.record(stub.run, new, made)
            else:
                reshape.record(stub.run, new, made)
        new_run.refuse_edited(stub.run)
        assert stub.run.resolved.read_bytes() == (old if allowed < 2 else new.read_bytes())
    assert rundir.read_json(stub.run.plan)["world_size"] == 4
    stub.run.resolved.write_bytes(old.replace(b"processes: 2", b"processes: 3"))
    with pytest.raises(UsageError, match="was changed"):
        new_run.refuse_edited(stub.run)
