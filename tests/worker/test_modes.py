"""Evaluation in every mode: the same WER, every utterance once, and a training that does not notice.

Real ranks over gloo, forked by a server that has imported everything once, train a small wav2vec2 with dropout and
masks. A sidecar is the real process; what goes wrong in one is done by a script in its place, and with
SPEECHCTL_TEST_MODES=1 in the real one too, at every number of ranks and ZeRO stage.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import plan, recipe_file, report, rundir, why
from launcher import recipe as schema
from launcher.rundir import Run, read_json, read_lines
from launcher.worker.evaluating import Evaluations
from launcher.worker.pack import write_pack
from launcher.worker.sidecar import Sidecar
from tests.conftest import count
from tests.worker import worlds
from tests.worker.backbones import make_wav2vec2, wav2vec2
from tests.worker.runs import events, numbers

ALL = bool(os.environ.get("SPEECHCTL_TEST_MODES"))

STEPS = 6

Case = tuple[int, str, str]
"""Ranks, ZeRO stage, and who evaluates: a mode, nobody, how a sidecar goes wrong, or a mode whose disk is full once."""

MODES = ("collective", "rank0", "sidecar")
WRONG = ("raises", "hangs", "no memory", "killed")
REAL = ("raises really", "hangs really", "no memory really")
FULL = ("collective full", "rank0 full")
FULL_AT = 4
"""The step whose evaluation finds no room, where an older attempt's lies."""
NEVER = "collective never"
"""No evaluation finds any."""

STAGES = ("off", "2", "3")
"""In this order in one process: DeepSpeed's stage 3 puts a linear layer of its own in place of torch's for good, and
gradients after it differ in their last bits."""

CASES: list[Case]
if ALL:
    CASES = [
        *itertools.product((1, 2, 4), STAGES, ("nobody", *MODES)),
        *itertools.product((1, 2), STAGES, (*WRONG, *REAL, *FULL)),
    ]
else:
    CASES = [
        *itertools.product((2,), ("off", "3"), ("nobody", "collective", "rank0")),
        *((2, "2", who) for who in ("nobody", "rank0", "sidecar", *WRONG)),
        (2, "off", "collective full"),
        (2, "3", "rank0 full"),
        (1, "off", "collective"),
    ]
CASES.append((1, "off", "early"))

MISBEHAVING = """\
import os, resource, signal, sys, time
who = open(sys.argv[1] + "/who").read()
if who == "raises":
    raise ValueError("boom")
if who == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if who == "no memory":
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    held = bytearray(2**34)
os.kill(os.getpid(), signal.SIGKILL)
"""

REALLY = """\
import os, sys
where = sys.orig_argv.index("sidecar") if "sidecar" in sys.orig_argv else 0
who = open(sys.orig_argv[where + 1] + "/who").read() if where else ""
if who.endswith("really"):
    import resource, time

    def misbehave(self, *rest):
        if who.startswith("raises"):
            raise ValueError("boom")
        if who.startswith("hangs"):
            time.sleep(600)
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        self.held = bytearray(2**40)

    import importlib.abc, importlib.machinery

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "launcher.worker.evaluate":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                module.Evaluator.load = misbehave

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""


def prepared(root: Path, source: Path, case: Case) -> Run:
    """A run directory as `launch` leaves it."""
    world_size, stage, who = case
    cadence: dict[str, Any] = {"subsets": ["dev-clean", "train-clean-100"], "batch_seconds": 3, "best_on": "dev-clean"}
    if who == "sidecar" and not ALL:  # a process for each takes its time
        cadence |= {"every_steps": 4, "at_end": False}
    else:
        cadence |= {"every_steps": 2, "at_start": True} if who != "nobody" else {"at_end": False}
    mode = who.split()[0]
    cadence["mode"] = mode if mode in MODES else "sidecar" if who in (*WRONG, *REAL) else "collective"
    if who == "early":
        cadence |= {"at_start": False, "early_stopping": {"patience": 1}}
    recipe = schema.Recipe.model_validate(
        {
            "name": "modes",
            "run_dir": root / "-".join(map(str, case)).replace(" ", "-"),
            "data": {"corpus": root, "packs": root / "packs", "train": ["train-clean-100"]},
            "backbone": wav2vec2(source, dropout=0.1).model_dump(),
            "zero_stage": stage if stage == "off" else int(stage),
            "max_steps": STEPS,
            "batch": {"step_seconds": 8, "max_rank_seconds": 2},
            "optimizer": {"learning_rate": 1e-3 if who != "early" else 1e-30},
            "evaluate": cadence,
            "checkpoint": {"every_steps": 100, "keep_last": 9},
            "launch": {
                "deadlines": {"start": 4 if who == "hangs" else 900, "step": 4 if who == "hangs really" else 300}
            },
        }
    )
    run = Run(recipe.run_path)
    for folder in (run.root, run.checkpoints, run.stop_request.parent):
        folder.mkdir()
    rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
    rundir.write_json(run.plan, {"name": "modes", "max_steps": STEPS})
    if stage != "off":
        rundir.write_json(run.deepspeed, plan.deepspeed_config(recipe, 4 // world_size, 10**6))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Run]:
    """Every case, trained to its end."""
    from tests.conftest import make_corpus

    root = tmp_path_factory.mktemp("modes")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    source = make_wav2vec2(root / "wav2vec2")
    script, site = root / "misbehaving.py", root / "site"
    script.write_text(MISBEHAVING)
    site.mkdir()
    (site / "sitecustomize.py").write_text(REALLY)
    found = {case: prepared(root, source, case) for case in CASES}
    for n in sorted({case[0] for case in CASES}):
        attempts = []
        for case in sorted((c for c in CASES if c[0] == n), key=lambda c: STAGES.index(c[1])):
            attempts.append(found[case].new_attempt())
            (attempts[-1].root / "who").write_text(case[2])
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site), "SPEECHCTL_TEST_SIDECAR": str(script)}
        worlds.start(n, train, [str(a.root) for a in attempts], more)
    worlds.train(1, [found[1, "off", "early"].new_attempt()])
    return found


def train(attempts: list[str], more: dict[str, str]) -> None:
    """One rank; where a case says so, with the script in the place of the real sidecar, or no room for a result."""
    os.environ.update(more)
    real, other = Sidecar.COMMAND, (sys.executable, os.environ["SPEECHCTL_TEST_SIDECAR"])

    def command(self: Sidecar) -> tuple[str, ...]:
        return other if (self.attempt.root / "who").read_text() in WRONG else real

    Sidecar.COMMAND = property(command)  # type: ignore[assignment]
    whole = Evaluations._publish

    def publish(self: Evaluations, step: int, *rest: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        who, run = (self.attempt.root / "who").read_text(), self.attempt.run
        if who == NEVER or (who in FULL and step == FULL_AT):
            run.evaluations.mkdir(exist_ok=True)
            for path in (run.evaluation(step), run.hypotheses(step)):
                path.write_text("{}\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return whole(self, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    Evaluations._publish = publish  # type: ignore[assignment, method-assign]
    worlds.train_attempts(attempts, 0, None)


def ids(case: Case) -> str:
    return "-".join(map(str, case)).replace(" ", "-")


EVALUATED = [case for case in CASES if case[2] in MODES]
WENT_WRONG = [case for case in CASES if case[2] in (*WRONG, *REAL)]


@pytest.mark.ranks
@pytest.mark.timeout(7200 if ALL else 600)
@pytest.mark.parametrize("case", EVALUATED, ids=ids)
def test_every_mode_scores_every_utterance_once_and_hears_the_same(runs: dict[Case, Run], case: Case) -> None:
    """Before the first step, with the same weights, all of it is the same in all modes, at every number of ranks and
    ZeRO stage; later at least among the modes, which follow the same training."""
    run, reference = runs[case], runs[EVALUATED[0]]
    at = [e["step"] for e in events(run.attempts()[0], "evaluated")]
    assert at
    for step in at:
        rows = read_lines(run.hypotheses(step))
        assert len(rows) == len({row["utt_id"] for row in rows}) == 17
        assert sum(len(row["hyp"]) for row in rows) > 0, "a model that hears nothing proves nothing"
        assert read_json(run.evaluation(step))["mode"] == case[2]
    if 0 in at:
        assert scores(run, 0) == scores(reference, 0)
        mine, others = ([row["loss"] for row in read_lines(r.hypotheses(0))] for r in (run, reference))
        assert mine == pytest.approx(others, rel=1e-5)
    for other in (c for c in EVALUATED if c[:2] == case[:2]):
        for step in {*at} & {e["step"] for e in events(runs[other].attempts()[0], "evaluated")}:
            assert scores(run, step) == scores(runs[other], step)
    count("evaluations", len(at))


def scores(run: Run, step: int) -> tuple[Any, ...]:
    """All that was counted and heard, bit for bit."""
    result = read_json(run.evaluation(step))
    counted = {k: result[k] for k in ("wer", "errors", "cer", "subsets", "speakers", "worst", "criterion")}
    return counted, [(row["utt_id"], row["text"]) for row in read_lines(run.hypotheses(step))]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", [c for c in CASES if (*c[:2], "nobody") in CASES and c[2] not in ("nobody", "early")], ids=ids
)
def test_training_does_not_notice(runs: dict[Case, Run], case: Case) -> None:
    """Losses and gradient norms as hex floats, with dropout and masks: with evaluation in between, by whoever and
    whatever becomes of it, they are those of a run without.

    Pretrained models came from transformers as they are used, without dropout, and trained so until the first
    evaluation had put them into training.
    """
    alone = runs[(*case[:2], "nobody")]
    assert not alone.evaluations.exists()
    assert len(numbers(alone)) == STEPS
    assert numbers(runs[case]) == numbers(alone)


@pytest.mark.ranks
@pytest.mark.parametrize("case", WENT_WRONG, ids=ids)
def test_a_sidecar_that_goes_wrong_is_told_of(runs: dict[Case, Run], case: Case) -> None:
    """In the events, in `status` and in `why`; the run ends well, and nothing is left of the process."""
    run = runs[case]
    attempt = run.attempts()[0]
    assert read_json(attempt.exit) == {"code": 0, "step": STEPS, "sealed_step": STEPS}
    failed = events(attempt, "evaluation_failed")
    # Of those that came faster than they could be done, only the newest waits.
    assert failed[-1]["step"] == STEPS and not run.evaluations.exists()
    said = {
        "raises": "exit code 1: ValueError: boom",
        "hangs": "it made no progress for",
        "no memory": "exit code 1: MemoryError",
        "killed": "killed by SIGKILL",
    }[case[2].removesuffix(" really")]
    assert said in failed[-1]["error"]
    value = report.read(run)
    assert value.state == "finished"
    assert value.unevaluated[-1]["step"] == STEPS and said in value.unevaluated[-1]["error"]
    assert any(said in line for line in why.diagnose(run, None).unevaluated)


@pytest.mark.ranks
def test_results_that_the_disk_never_takes_end_the_run(runs: dict[Case, Run]) -> None:
    """All ranks, with the same words, at the third in a row: hours of evaluations would come to nothing, and the run
    would end as if all was well."""
    root = runs[EVALUATED[0]].root.parent
    run = prepared(root, root / "wav2vec2", (2, "off", NEVER))
    attempt = run.new_attempt()
    (attempt.root / "who").write_text(NEVER)
    with pytest.raises(AssertionError) as ended:
        worlds.start(2, train, [str(attempt.root)], {"SPEECHCTL_TEST_SIDECAR": ""})
    assert str(ended.value).count("StorageError: 3 evaluations in a row could not be published") == 2
    assert [e["step"] for e in events(attempt, "evaluation_failed")] == [0, 2, 4]
    assert not list(run.evaluations.iterdir())


@pytest.mark.ranks
@pytest.mark.parametrize("case", [case for case in CASES if case[2] in FULL], ids=ids)
def test_a_result_that_the_disk_does_not_take_costs_no_step(runs: dict[Case, Run], case: Case) -> None:
    """The run had ended at once, with all that was not saved, where a save that finds no room is let pass. Said is what
    the disk says; nothing of the result is there, nor what an older attempt had published of that step, by which the
    best would be chosen; those before and after are."""
    run = runs[case]
    attempt = run.attempts()[0]
    assert read_json(attempt.exit) == {"code": 0, "step": STEPS, "sealed_step": STEPS}
    (failed,) = events(attempt, "evaluation_failed")
    assert failed["step"] == FULL_AT and "File too large" in failed["error"]
    assert str(run.hypotheses(FULL_AT)) in failed["error"]
    wanted = [step for step in range(0, STEPS + 1, 2) if step != FULL_AT]
    assert [e["step"] for e in events(attempt, "evaluated")] == wanted
    assert {p.name for p in run.evaluations.iterdir()} == {
        path.name for step in wanted for path in (run.evaluation(step), run.hypotheses(step))
    }
    value = report.read(run)
    assert [row["step"] for row in value.unevaluated] == [FULL_AT]
    assert any(f"step {FULL_AT} was not evaluated" in line for line in why.diagnose(run, None).unevaluated)


@pytest.mark.ranks
def test_a_run_that_learns_nothing_ends_early_and_says_why(runs: dict[Case, Run]) -> None:
    """With 0, sealed, at the evaluation that brought no lower WER than the first. Started again, it has ended."""
    run = runs[1, "off", "early"]
    first, second = run.attempts()
    assert [e["step"] for e in events(first, "evaluated")] == [2, 4]
    ended = read_json(first.exit)
    assert (ended["code"], ended["step"], ended["sealed_step"]) == (0, 4, 4) and run.sealed_steps()[-1] == 4
    assert ended["why"].startswith("early stopping: in 1 evaluation the WER on dev-clean has not fallen below ")
    assert read_json(second.exit) == ended and not read_lines(second.metrics) and not events(second, "evaluated")
    value = report.read(run)
    assert (value.state, value.history[-1].why) == ("finished", ended["why"])
    assert read_json(run.best)["step"] == 2


@pytest.mark.ranks
def test_the_best_is_taken_from_a_sidecar(runs: dict[Case, Run]) -> None:
    """By the WER of the subset that the recipe names, and of a checkpoint that is there."""
    run = runs[(2, "2", "sidecar")]
    evaluated = report.read(run).evaluations
    wers = {e["step"]: e["criterion"]["wer"] for e in evaluated if e["step"]}
    best = read_json(run.best)
    assert best["wer"] == min(wers.values()) and wers[best["step"]] == best["wer"]
    assert best["step"] in run.sealed_steps()
    for result in evaluated:
        assert result["criterion"] == {"subset": "dev-clean", "wer": result["subsets"]["dev-clean"]["wer"]}
        assert result["blocked_s"] == 0 < result["lasted_s"]
