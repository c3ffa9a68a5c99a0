"""Which checkpoints stay, and that one which is being read does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher import retention, rundir, sealed
from launcher.errors import NotFoundError
from launcher.retention import Rules, why_kept
from launcher.rundir import Run
from tests.conftest import seed
from tests.saving import alone, good, new_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("rules", "wers", "pinned", "torn", "kept"),
    [
        (Rules(), {}, [], [], [7, 8]),
        (Rules(last=3), {}, [], [], [6, 7, 8]),
        (Rules(last=1), {}, [], [], [7, 8]),  # never below two
        (Rules(), {2: 0.3, 4: 0.2, 8: 0.4}, [], [], [4, 7, 8]),
        (Rules(best=2), {2: 0.3, 4: 0.2, 8: 0.4}, [], [], [2, 4, 7, 8]),
        (Rules(), {5: 0.2, 4: 0.2}, [], [], [4, 7, 8]),  # the earlier of two that are as good
        (Rules(every_steps=3), {}, [], [], [3, 6, 7, 8]),
        (Rules(), {}, [1, 77], [], [1, 7, 8]),
        (Rules(), {}, [], [8], [6, 7, 8]),  # counts for nothing, and is not removed
        (Rules(), {}, [], [8, 6], [5, 6, 7, 8]),
        (Rules(), {3: 0.1, 4: 0.2}, [], [3], [4, 7, 8]),  # the best of those that can be used
        (Rules(), {9: 0.1, 4: 0.2}, [], [], [4, 7, 8]),  # 9 was evaluated and is not sealed
        (Rules(), {}, [], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_what_stays(rules: Rules, wers: dict[int, float], pinned: list[int], torn: list[int], kept: list[int]) -> None:
    assert sorted(why_kept(range(1, 9), wers, pinned, rules, lambda step: step not in torn)) == kept


def test_two_that_verify_stay_whatever_the_rules() -> None:
    dice = random.Random(seed(6))
    for _ in range(2000):
        steps = dice.sample(range(1, 40), dice.randrange(12))
        whole = {s for s in steps if dice.random() < 0.7}
        rules = Rules(dice.randrange(5), dice.randrange(4), dice.choice([None, 1, 7]))
        wers = {s: dice.random() for s in steps if dice.random() < 0.5}
        kept = set(why_kept(steps, wers, dice.sample(range(40), 2), rules, whole.__contains__))
        assert len(kept & whole) >= min(2, len(whole))
        assert kept <= set(steps)


def test_on_disk_by_wer_and_pin_and_only_whole_ones_count(run: Run) -> None:
    """One of the same size with a flipped bit is not counted: with sizes alone, two rotten ones were enough to have the
    last good one removed."""
    alone(run, *range(1, 9))
    run.evaluations.mkdir()
    for step, wer in {2: 0.2, 3: 0.1, 5: 0.3}.items():
        rundir.write_json(run.evaluation(step), {"wer": wer})
    run.evaluation(6).write_text("{")
    rotten = run.checkpoint(8) / "deepspeed" / "rank-0.pt"
    data = bytearray(rotten.read_bytes())
    data[7] ^= 1
    rotten.write_bytes(data)
    sealed.pin(run, 1)
    assert retention.retain(run, Rules(), set(), best_step=4) == [2, 5]
    assert run.sealed_steps() == [1, 3, 4, 6, 7, 8]
    sealed.unpin(run, 1)
    assert retention.surplus(run, Rules(), set()) == [1, 4]
    with pytest.raises(NotFoundError):
        sealed.pin(run, 2)


READER = """
import sys
from pathlib import Path
from launcher import sealed
with sealed.lease(Path(sys.argv[1])):
    print("reads", flush=True)
    sys.stdin.read()
"""


def test_one_whose_evaluation_comes_in_meanwhile_is_judged_the_next_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar publishes the best WER and lets go of its checkpoint between what the rules say and the removal."""
    alone(run, *range(1, 6))
    run.evaluations.mkdir()
    surplus = retention.surplus
    with ExitStack() as sidecar:
        sidecar.enter_context(sealed.lease(run.checkpoint(2)))

        def before(*arguments: Any) -> list[int]:
            goes = surplus(*arguments)
            rundir.write_json(run.evaluation(2), {"wer": 0.1})
            sidecar.close()
            return goes

        monkeypatch.setattr(retention, "surplus", before)
        assert retention.retain(run, Rules(), set()) == [1, 3]
    monkeypatch.undo()
    assert retention.retain(run, Rules(), set()) == []
    assert run.sealed_steps() == [2, 4, 5]


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_one_that_is_read_stays_until_its_reader_ends(run: Run, end: str) -> None:
    alone(run, 1, 2, 3)
    command = [sys.executable, "-c", READER, str(run.checkpoint(1))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "reads\n"
        assert retention.retain(run, Rules(), set()) == []
        assert good(run) == [1, 2, 3]
        if end == "is killed":
            reader.send_signal(signal.SIGKILL)
        reader.stdin.close()
        reader.wait(20)
    assert retention.retain(run, Rules(), set()) == [1]
    with pytest.raises(NotFoundError, match="is gone"), sealed.lease(run.checkpoint(1)):
        pass


def test_who_may_only_read_has_a_lease_too(run: Run) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may be somebody else")
    alone(run, 1, 2, 3)
    shutil.copytree(run.root, where := Path("/tmp") / f"speechctl-lease-{os.getpid()}")
    try:
        os.chmod(where, 0o755)
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            try:
                with sealed.lease(Run(where).checkpoint(1)):
                    os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        shutil.rmtree(where)


def test_an_error_while_reading_is_the_readers(run: Run) -> None:
    alone(run, 1)
    with pytest.raises(FileNotFoundError, match="mine"), sealed.lease(run.checkpoint(1)):
        raise FileNotFoundError("mine")
    assert sealed.remove(run, 1)
