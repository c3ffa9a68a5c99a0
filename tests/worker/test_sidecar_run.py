"""Training that is judged by evaluations beside it: when it ends early, what a kill leaves of that, what is kept.

Two ranks train as they do; the process beside them is a script that hears nothing and publishes WERs from a table.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import torch

from launcher import recipe as schema
from launcher import report, sealing
from launcher.rundir import Run, read_json, read_lines
from launcher.worker.pack import write_pack
from launcher.worker.sidecar import Sidecar
from tests.conftest import make_corpus
from tests.worker import worlds
from tests.worker.harm import Harm
from tests.worker.runs import events

RULES = schema.EarlyStopping(patience=3)
WERS = (0.5, 0.4, 0.41, 0.42, 0.43, 0.3, 0.31, 0.32, 0.33, 0.34, 0.35)
"""By the order in which checkpoints are evaluated. It is over behind the fifth; but when training ends there, and waits
for what is still evaluated, the sixth is better than all before it. Then it is over behind the ninth, and what is
waited for is no better: one that is under way, and one of the last step."""
OVER = 9
LAST = 5000

TABLE = """\
import ctypes, sys
ctypes.CDLL(None).prctl(1, 9)  # ends with its rank, as the real one does
from pathlib import Path
from launcher import rundir, sealing
attempt, step = rundir.Attempt(Path(sys.argv[1])), int(sys.argv[3])
run = attempt.run
wers = {wers}
done = len(list(run.evaluations.glob("step-*.json"))) if run.evaluations.exists() else 0
wer = wers[done]
counted = dict.fromkeys(("substitutions", "insertions", "deletions", "words", "utterances", "truncated", "loss"), 1)
told = {{"wer": wer, "criterion": {{"subset": "dev-clean", "wer": wer}}, "step": step, "attempt": attempt.number}}
more = {{"blocked_s": 0, "time": 0, "checkpoint": sealing.manifest_of(run.checkpoint(step))["digest"]}}
run.evaluations.mkdir(exist_ok=True)
rundir.write_json(run.evaluation(step), {{**counted, **told, **more}})
"""


class Slow(Harm):
    """Steps that take a while; where asked for, rank 1 is killed in one of them, as soon as a checkpoint remembers an
    evaluation in vain."""

    def plan(self, training: Any) -> None:
        whole = training.engine.backward

        def backward(tensors: dict[str, torch.Tensor], factor: float, last: bool) -> torch.Tensor:
            time.sleep(0.01)
            if training.ranks.rank == self.rank:
                newest = training.run.sealed_steps()[-1:]
                if newest and sealing.manifest_of(training.run.checkpoint(newest[0]))["progress"]["in_vain"]:
                    os.kill(os.getpid(), signal.SIGKILL)
            result: torch.Tensor = whole(tensors, factor, last)
            return result

        training.engine.backward = backward


def train(attempt: str, script: str, harm: Harm) -> None:
    """One rank, with the script in the place of the real sidecar."""
    Sidecar.COMMAND = (sys.executable, script)  # type: ignore[assignment]
    worlds.train_attempts([attempt], 0, [harm])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One that nothing befell, and one that was killed and went on."""
    root = tmp_path_factory.mktemp("sidecar")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    (root / "table.py").write_text(TABLE.format(wers=WERS))
    cadence = {"subsets": ["dev-clean"], "every_steps": 2, "mode": "sidecar", "early_stopping": RULES.model_dump()}
    more = {"max_steps": LAST, "evaluate": cadence, "checkpoint": {"every_steps": 2, "keep_best": 2}}
    backbone = schema.TinyCtc(kind="tiny-ctc", hidden=8, layers=1)
    made = {name: worlds.prepare(root / name, root, backbone, "off", "fp32", **more) for name in ("whole", "cut")}
    script, alive = str(root / "table.py"), Slow(-1, rank=-1)
    worlds.start(2, train, str(made["whole"].new_attempt().root), script, alive)
    cut = made["cut"]
    assert worlds.until_killed(2, train, str(cut.new_attempt().root), script, Slow(-1, rank=1))
    worlds.start(2, train, str(cut.new_attempt().root), script, alive)
    return made


def heard(run: Run, attempt: int) -> list[float]:
    """WERs, as training took them."""
    return [e["wer"] for e in events(run.attempts()[attempt], "evaluated")]


@pytest.mark.ranks
def test_a_run_ends_early_by_what_was_evaluated_beside_it(runs: dict[str, Run]) -> None:
    """And goes on where the evaluations that it waits for say that it was wrong to end.

    It ended with exit code 0 and no reason, far from its last step, while the WER was falling.
    """
    run = runs["whole"]
    attempt = run.attempts()[0]
    ended = read_json(attempt.exit)
    assert (ended["code"], ended["sealed_step"]) == (0, ended["step"]) and ended["step"] < LAST
    wers = heard(run, 0)
    assert wers == list(WERS[: len(wers)]) and len(wers) >= OVER
    times = f"in {len(wers) - WERS.index(min(WERS)) - 1} evaluations"
    assert ended["why"] == f"early stopping: {times} the WER has not fallen below 30.00%"
    steps = read_lines(attempt.metrics)
    assert ended["step"] == steps[-1]["step"]
    over = events(attempt, "evaluated")[OVER - 1]["time"]
    assert steps[-1]["time"] <= over + 0.001, "a step behind the end"  # rounded to 1 ms; a step takes ten
    value = report.read(run)
    assert (value.state, value.history[-1].why) == ("finished", ended["why"])


@pytest.mark.ranks
def test_a_kill_forgets_no_evaluation(runs: dict[str, Run]) -> None:
    """What the checkpoint remembers is not counted twice, and what it does not remember is counted."""
    run = runs["cut"]
    killed, resumed = run.attempts()
    assert not killed.exit.exists() and events(resumed, "started")[0]["step"] > 0
    again = heard(run, 1)
    known = WERS.index(again[0])
    assert again == list(WERS[known : known + len(again)]) and known + len(again) >= OVER
    assert known >= 3, "that the first checkpoint with an evaluation in vain knew"
    assert heard(run, 0)[:known] == list(WERS[:known])
    ended = read_json(resumed.exit)
    assert (ended["code"], ended["sealed_step"]) == (0, ended["step"]) and ended["step"] < LAST
    assert ended["why"].endswith("the WER has not fallen below 30.00%")


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["whole", "cut"])
def test_the_best_are_kept_until_they_are_known_and_then(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    wers = {step: read_json(run.evaluation(step))["wer"] for step in range(LAST) if run.evaluation(step).exists()}
    assert list(wers.values()) == list(WERS[: len(wers)]) and len(wers) >= OVER
    first, second, *others = sorted(wers, key=lambda step: wers[step])
    sealed = run.sealed_steps()
    assert {first, second} <= set(sealed) and read_json(run.best) == {"step": first, "wer": min(WERS)}
    assert len(set(others) & set(sealed)) <= 3, "of those that are not the best, the newest alone are there"
