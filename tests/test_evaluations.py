"""What `report` shows of evaluations, and what it refuses to put beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import evaluations, rundir
from launcher.errors import NotFoundError, UsageError
from launcher.rundir import Run
from tests.conftest import Golden, made_run
from tests.test_cli import Transcript, compare, speechctl

__all__ = ["speechctl"]  # a fixture


def row(errors: int, words: int = 40, **more: Any) -> dict[str, Any]:
    """As `score.total` writes it: all errors but one deletion are substitutions."""
    return {
        "wer": errors / words,
        "errors": errors,
        "substitutions": errors - 1,
        "insertions": 0,
        "deletions": 1,
        "words": words,
        "correct": words - errors,
        "utterances": 5,
        "wrong_utterances": 3,
        "cer": errors / words / 2,
        "characters": 5 * words,
        "character_errors": errors * 5 // 2,
        **more,
    }


def told(run: Run, step: int, **more: Any) -> None:
    """An evaluation of a run as `Evaluator.publish` writes it."""
    interval = {"low": 0.2, "high": 0.55, "level": 0.95, "resamples": 1000, "speakers": 2}
    aligned = [["=", "HELLO", "HELLO"], ["I", "", "THE"], ["S", "WORLD", "WORD"], ["D", "AGAIN", ""]]
    worst = {"utt_id": "84-1-0001", "subset": "dev-clean", "speaker": 84, "seconds": 3.2, "errors": 3, "words": 3}
    result = {
        **{"step": step, "attempt": 2, "mode": "rank0", "normalizer": "librispeech", "decoder": "greedy"},
        **{"loss": 0.5, **row(15), "interval": interval},
        "subsets": {"dev-clean": row(5, 20, interval=None), "dev-other": row(10, 20, interval=interval)},
        "sexes": {"F": row(5, 20), "M": row(10, 20)},
        "durations": {"2-5 s": row(15)},
        "speakers": {str(s): row(2 if s != 90 else 20) for s in (84, 90)},
        "worst": [{**worst, "aligned": aligned}],
        "criterion": {"subset": "dev-other", "wer": 0.5},
        **{"truncated": 0, "padding": 0.125, "packs": "abc", "blocked_s": 1.25, "time": 1.0},
        **more,
    }
    rundir.write_json(run.evaluation(step), result)


def test_report(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    run = made_run(tmp_path / "runs" / "stub", "finished")
    told(run, 6)
    compare("report", "report stub --checkpoint last", 0, speechctl, tmp_path, golden)


def test_compared(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    for name, errors in (("one", 15), ("two", 10)):
        told(made_run(tmp_path / "runs" / name, "finished"), 6, **row(errors))
    compare("report-two", "report one two --checkpoint 6", 0, speechctl, tmp_path, golden)


def test_mixed_normalizers_are_refused(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    told(made_run(tmp_path / "runs" / "one", "finished"), 6)
    told(made_run(tmp_path / "runs" / "two", "finished"), 6, normalizer="whisper-english")
    compare("report-mixed", "report one two --checkpoint 6", 2, speechctl, tmp_path, golden)


def test_other_utterances_are_refused() -> None:
    one, other = ({"normalizer": "librispeech", "packs": packs} for packs in ("abc", "abd"))
    evaluations.refuse_mixed([("one", one), ("again", dict(one))])
    with pytest.raises(UsageError, match=r"differ in their utterances .*: one has abc, other has abd"):
        evaluations.refuse_mixed([("one", one), ("other", other)])


def test_the_best_is_by_the_subset_that_decides(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "finished")  # by all words it is step 6
    told(run, 4, criterion={"subset": "dev-other", "wer": 0.1})
    told(run, 6, criterion={"subset": "dev-other", "wer": 0.2})
    assert evaluations.chosen(run, "best")["step"] == 4
    assert evaluations.chosen(run, "last")["step"] == 6
    assert evaluations.chosen(run, "2")["step"] == 2
    with pytest.raises(NotFoundError) as found:
        evaluations.chosen(run, "5")
    assert found.value.hint == "take best, last, or one of: 2, 4, 6"


def test_nothing_was_evaluated_yet(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no evaluation yet"):
        evaluations.chosen(made_run(tmp_path / "run", "created"), "best")


def test_as_json(speechctl: Transcript, tmp_path: Path) -> None:
    run = made_run(tmp_path / "runs" / "stub", "finished")
    told(run, 6)
    done = speechctl("report", "stub", "--checkpoint", "6", "--json")
    assert json.loads(done.stdout) == rundir.read_json(run.evaluation(6))
