"""Training in real processes: two gloo ranks under torchrun and DeepSpeed, killed with real signals, and resumed.

Speech is made by the test itself, by the command that users have. Process groups are slow to start (about 15 s on
two cores), so each test tells a longer story.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from launcher.rundir import Attempt, Run, read_json, read_lines
from launcher.supervise import request_stop
from launcher.worker.train import Training
from tests.conftest import count, seed
from tests.worker.runs import (
    events,
    kill_rank,
    numbers,
    speechctl,
    started,
    state_digest,
    trained_on,
    wait_for,
    write_recipe,
)

pytest.importorskip("espeakng_loader", reason="needs the extra `demo`: pip install 'speechctl[demo]'")

pytestmark = pytest.mark.ranks

KILLS = int(os.environ.get("SPEECHCTL_TEST_KILLS", "3"))
"""How often a killed run is killed: 3 in the suite, which kills one at ZeRO 2; 7 for the full count, and then at ZeRO 1
and 3 too."""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus of synthetic speech and its packs."""
    root = tmp_path_factory.mktemp("spoken")
    done = speechctl("pack", str(write_recipe(root, root)), cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def whole(spoken: Path) -> Run:
    """An undisturbed run of the recipe. No compiler runs on the way.

    DeepSpeed probed for libaio with gcc on every rank, because one entry of its table of operations was looked at.
    """
    tools = spoken / "tools"
    tools.mkdir()
    for name in ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "ninja"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tools}/ran"\nexit 1\n')
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = speechctl("launch", str(spoken / "recipe.yaml"), "--set", "run_dir=whole", cwd=spoken, env=env)
    assert done.returncode == 0, done.stderr
    assert not (tools / "ran").exists(), (tools / "ran").read_text()
    return Run(spoken / "whole")


def test_a_run_trains_evaluates_and_seals(whole: Run) -> None:
    """One launch from packs to the last sealed step; everything that a person reads afterwards is there."""
    attempt = whole.attempts()[0]
    assert read_json(attempt.exit) == {"code": 0, "step": 24, "sealed_step": 24}
    losses = [m["loss"] for m in read_lines(attempt.metrics)]
    assert len(losses) == 24
    assert sum(losses[-4:]) < sum(losses[:4])
    assert [e["step"] for e in events(attempt, "evaluated")] == [6, 12, 18, 24]
    result = read_json(whole.evaluation(24))
    assert result["utterances"] == 6
    assert result["errors"] == result["substitutions"] + result["insertions"] + result["deletions"]
    assert len(read_lines(whole.hypotheses(24))) == 6
    best = read_json(whole.best)
    assert best["wer"] == min(e["wer"] for e in events(attempt, "evaluated"))
    assert {24, best["step"]} <= set(whole.sealed_steps())
    assert len(whole.sealed_steps()) <= 3  # the last two and the best
    assert not list(whole.checkpoints.glob(".*"))
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = tensorboard.EventAccumulator(str(next(whole.tensorboard.iterdir()))).Reload()
    assert [s.step for s in logged.Scalars("train/loss")] == list(range(1, 25))
    assert [round(s.value, 4) for s in logged.Scalars("evaluate/wer")] == [
        round(e["wer"], 4) for e in events(attempt, "evaluated")
    ]


def test_every_epoch_reads_every_utterance_once(whole: Run) -> None:
    """The ledgers of both ranks together: an epoch's steps hold each utterance exactly once."""
    epochs: dict[int, list[str]] = {}
    for path in whole.attempts()[0].ledger_dir.iterdir():
        for row in read_lines(path):
            epochs.setdefault(row["epoch"], []).extend(row["ids"])
    assert len(epochs) > 2
    finished = [epochs[e] for e in sorted(epochs)[:-1]]
    for ids in finished:
        assert len(ids) == len(set(ids)) == 40


def test_export_and_transcribe_hear_what_training_heard(whole: Run, tmp_path: Path) -> None:
    """A line for each file, name and text with a tab between, and the very words of the last evaluation."""
    rows = read_lines(whole.hypotheses(24))[:3]
    files = [next((whole.root.parent / "corpus").rglob(f"{row['utt_id']}.flac")) for row in rows]
    done = speechctl("export", str(whole.root), "model", "--checkpoint", "24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = speechctl("transcribe", "model", *map(str, files), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = [f"{file}\t{row['text']}" for file, row in zip(files, rows, strict=True)]
    assert done.stdout.splitlines() == wanted


def test_an_average_is_evaluated(whole: Run, tmp_path: Path) -> None:
    """Of the two newest checkpoints, each of two ranks' shards: by the command, with a record of what it is."""
    last = whole.sealed_steps()[-2:]
    done = speechctl("evaluate", str(whole.root), "--average", "last:2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert [row["step"] for row in value["source"]["average_of"]] == last
    assert read_json(whole.evaluations / f"step-{last[1]:08d}.average-last-2.evaluate.json") == value
    assert value["utterances"] == 6 and value["words"] > 0
    done = speechctl("evaluate", str(whole.root), "--average", "last:2", "--checkpoint", "last", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "an --average of checkpoints takes the place of" in done.stderr


def test_a_checkpoint_has_no_type_of_ours(whole: Run) -> None:
    """It is DeepSpeed's, and loads where this package is not, or is another version. A class of ours was in it once, by
    way of the configuration that DeepSpeed saves with it."""
    files = list(whole.checkpoint(24).rglob("*.pt"))
    assert len(files) > 2
    for file in files:
        content = file.read_bytes()
        assert b"ds_config" in content and b"launcher" not in content, file


def test_tuning_a_beam_search_keeps_every_result(whole: Run, tmp_path: Path) -> None:
    """An n-gram under two weights: the second had written over the first."""
    pytest.importorskip("flashlight.lib.text", reason="needs the extra `beam`: pip install 'speechctl[beam]'")
    words = ["-1\t<s>\t0", "-0.5\t</s>", "-0.5\tTHE\t0"]
    grams = ["\\1-grams:", *words, "", "\\2-grams:", "-0.1\tTHE </s>"]
    (tmp_path / "the.arpa").write_text("\n".join(["\\data\\", "ngram 1=3", "ngram 2=1", "", *grams, "", "\\end\\", ""]))
    values = []
    for weight in ("0.5", "2"):
        options = ["--lm", "the.arpa", "--beam", "5", "--lm-weight", weight, "--json"]
        done = speechctl("evaluate", str(whole.root), "--checkpoint", "24", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(done.stdout))
    assert [value["beam_search"]["lm_weight"] for value in values] == [0.5, 2.0]
    content = values[0]["beam_search"]["lm_digest"][:8]
    names = [f"step-00000024.evaluate-beam-the.arpa-{content}-5-{weight}-0.0.json" for weight in ("0.5", "2.0")]
    kept = [whole.evaluations / name for name in names]
    assert [read_json(path) for path in kept] == values
    for row in read_lines(kept[0].with_suffix(".hypotheses.jsonl")):
        assert set(row["hyp"].split()) <= {"THE"}, row


def test_another_number_of_ranks_goes_on(whole: Run, tmp_path: Path) -> None:
    """One rank in the place of two, by the commands that a person types; the curve goes on as it was, and no utterance
    is read twice."""
    run = Run(tmp_path / "run")
    shutil.copytree(whole.root, run.root)
    shutil.rmtree(run.checkpoint(24))
    last = run.sealed_steps()[-1]
    done = speechctl("checkpoint", "reshard", "run", "last", "--ranks", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["step"], told["saved_by"], told["accumulation"]) == (last, 2, 2)
    done = speechctl("resume", "run", "--set", "launch.processes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = speechctl("audit", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [(s["ranks"], s["first"], s["last"]) for s in json.loads(done.stdout)["stands"]]
    assert ranks == [(2, 1, last), (1, last + 1, 24)]
    rows = [{m["step"]: m for m in read_lines(a.metrics)} for a in run.attempts()]
    assert events(run.attempts()[1], "started")[0]["step"] == last
    loss = sum(m["loss"] for m in rows[1].values()) / len(rows[1])
    before = [m["loss"] for s, m in rows[0].items() if s > last]
    assert loss == pytest.approx(sum(before) / len(before), rel=0.1)


def _more_attempts(run: Run, than: int) -> bool:
    return len(run.attempts()) > than


def test_killed_and_resumed_is_the_same_run(spoken: Path, whole: Run) -> None:
    killed_and_resumed(Run(spoken / "cut"), whole)


@pytest.mark.skipif(KILLS <= 3, reason="SPEECHCTL_TEST_KILLS=7: minutes, for the stages that others do not train at")
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_resumed_is_the_same_run_at_other_stages(spoken: Path, stage: int) -> None:
    zero = ["--set", f"zero_stage={stage}"]
    done = speechctl("launch", "recipe.yaml", "--set", f"run_dir=whole-{stage}", *zero, cwd=spoken)
    assert done.returncode == 0, done.stderr
    killed_and_resumed(Run(spoken / f"cut-{stage}"), Run(spoken / f"whole-{stage}"), *zero)


def killed_and_resumed(run: Run, whole: Run, *more: str) -> None:
    """SIGKILL of a rank in training, in a save and in an evaluation; each time the run goes on by itself.

    Every loss and gradient norm of every attempt, also of steps trained twice, equals the undisturbed run's as a hex
    float, and so do the utterances of the steps that stand and, bit for bit, the last state. Every file takes a while
    to write, so that a save is in flight for several steps, and so does the scoring of every evaluation.
    """
    site = run.root.parent / f"site-{run.root.name}"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import time\n"
        "    from launcher import committer, marks\n"
        "    write_hashed, mark = committer.write_hashed, marks.mark\n"
        "    committer.write_hashed = lambda *rest: (time.sleep(0.3), write_hashed(*rest))[1]\n"
        "    marks.mark = lambda *rest: (time.sleep(0.5 * (rest[0] == 'score')), mark(*rest))[1]\n"
    )
    dice = random.Random(seed(7))
    moments = [["saving", "evaluating", "metrics"][k % 3] for k in range(KILLS)]
    hit: list[str] = []
    patient = ["--set", f"run_dir={run.root}", *more, "--set", "launch.relaunch={attempts: 100, wait: 0.1s}"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    with started("launch", "recipe.yaml", *patient, cwd=whole.root.parent, env=env) as process:
        for k, moment in enumerate(moments):
            wait_for(partial(_more_attempts, run, k), process)
            attempt = run.attempts()[-1]
            sealed = run.sealed_steps()
            first = sealed[-1] if sealed else 0
            # Spread over the run: the later kills wait for later steps. The first waits for the first seal.
            goal = max(first + 1, min(20, 4 + k * 16 // max(1, KILLS - 1)))

            def reached(moment: str = moment, attempt: Attempt = attempt, goal: int = goal) -> bool:
                (last,) = read_lines(attempt.metrics if moment == "metrics" else attempt.events)[-1:] or [{}]
                if last.get("event", "metrics") != moment or last.get("step", 0) < goal:
                    return False
                sealed = run.sealed_steps()
                # One that is sealed is no save any more, also where nobody has said so yet.
                return sealed != [] and not (moment == "saving" and last["step"] in sealed)

            wait_for(reached, process)
            time.sleep(dice.random() * 0.02)
            kill_rank(attempt, dice.randrange(2))
            wait_for(attempt.failure.exists, process)
            last = read_lines(attempt.events)[-1]["event"]
            hit.append(last if last in ("saving", "evaluating") else "training")
            assert read_json(attempt.failure)["kind"] == "killed"
        assert process.wait(300) == 0
    assert min(hit.count("saving"), hit.count("evaluating")) >= max(1, KILLS // 5), hit
    expected = numbers(whole)
    for step, pairs in numbers(run).items():
        assert pairs == expected[step], f"step {step}"
    assert sorted(numbers(run)) == sorted(expected)
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = tensorboard.EventAccumulator(str(next(run.tensorboard.iterdir()))).Reload()
    assert [s.step for s in logged.Scalars("train/loss")] == list(range(1, 25))
    assert read_json(run.best) == read_json(whole.best)
    assert trained_on(run) == trained_on(whole)
    done = speechctl("audit", str(run.root), cwd=run.root.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state_digest(run.checkpoint(24)) == state_digest(whole.checkpoint(24))
    for step in (6, 12, 18, 24):
        a, b = read_json(run.evaluation(step)), read_json(whole.evaluation(step))
        assert [a[k] for k in ("wer", "loss", "words")] == [b[k] for k in ("wer", "loss", "words")]
    count("kills", len(hit))


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    spoken: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of training: its peer waits in gloo, and says so in its stack.

    In each attempt rank 1 also fails to take its share of the third checkpoint, between DeepSpeed's barriers: that
    save fails on both ranks, nobody waits for anybody, and training goes on.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from launcher.worker.host_memory import HostMemory\n"
        "    whole, calls = HostMemory.file, []\n"
        "    def file(self, *rest):\n"
        "        calls.append(rest)\n"
        "        if len(calls) == 4: raise MemoryError('no room')\n"  # the first takes the memory, before any save
        "        return whole(self, *rest)\n"
        "    HostMemory.file = file\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = Run(spoken / "hung")
    # It may be stopped in a step, or between two, where it waits for a save to end.
    options = ["--set", "run_dir=hung", "--set", "launch.deadlines={step: 15s, save: 15s}"]
    options += ["--set", "launch.relaunch.wait=0.1s"]
    with started("launch", "recipe.yaml", *options, cwd=spoken) as process:
        wait_for(lambda: run.attempts() and len(read_lines(run.attempts()[0].metrics)) >= 5, process)
        kill_rank(run.attempts()[0], 1, signal.SIGSTOP)
        assert process.wait(200) == 0
    first, second = run.attempts()
    failure = read_json(first.failure)
    assert (failure["kind"], failure["rank"], failure["verdict"]) == ("hang", 1, "again")
    assert failure["message"].endswith("it is stopped (state T)")
    assert "launcher/worker/train.py" in first.stack(0).read_text()
    assert read_json(second.exit)["code"] == 0
    assert [e["error"] for e in events(second, "save_failed")] == ["rank 1: MemoryError: no room"]
    assert events(second, "save_failed")[0]["step"] not in [e["step"] for e in events(second, "sealed")]
    assert numbers(run) == numbers(whole)


def test_who_asked_for_a_stop_is_remembered(tmp_path: Path) -> None:
    """The next launcher removes the request, and may then wait for a seal that takes minutes."""
    training = Training.__new__(Training)  # no more of it than looks into the control directory
    training.run, training.asked = Run(tmp_path), None
    request_stop(training.run, "speechctl stop")
    assert training._control() == ["stop"]
    training.run.stop_request.unlink()
    assert training._control() == [] and training.asked == "speechctl stop"


def test_stop_seals_and_resume_finishes(spoken: Path, whole: Run) -> None:
    """`speechctl stop` ends the run at a step boundary with exit 75 and the step sealed; nothing is trained twice.

    Its saves are synchronous, those of the whole run are not: the numbers are the same.
    """
    options = ["--set", "run_dir=stopped", "--set", "checkpoint.asynchronous=false"]
    with started("launch", "recipe.yaml", *options, cwd=spoken) as process:
        run = Run(spoken / "stopped")
        wait_for(lambda: run.attempts() and len(read_lines(run.attempts()[0].metrics)) >= 5, process)
        kill_rank(run.attempts()[0], 1, signal.SIGSTOP)  # a long step, so that the rest comes in the middle of one
        second = speechctl("resume", "stopped", cwd=spoken)
        assert second.returncode == 2 and "in use" in second.stderr and str(process.pid) in second.stderr
        assert speechctl("stop", "--no-wait", "stopped", cwd=spoken).returncode == 0
        kill_rank(run.attempts()[0], 1, signal.SIGCONT)
        assert process.wait(60) == 75
    ended = read_json(run.attempts()[0].exit)
    step = ended["step"]
    assert ended["asked"] == "speechctl stop" and run.sealed_steps()[-1] == step < 24
    assert "stopped" in speechctl("status", "stopped", cwd=spoken).stdout
    # A flipped bit in the newest checkpoint: found before it is used, put aside, and the one before is taken.
    before = run.sealed_steps()[-2]
    newest = run.checkpoint(step)
    shard = next(newest.glob("deepspeed/*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = speechctl("resume", "stopped", cwd=spoken)
    assert done.returncode == 0, done.stderr
    assert "put aside" in done.stderr and shard.name in done.stderr
    assert f"going on from step {before}; steps lost by that: {step - before}" in done.stderr
    assert list(run.checkpoints.glob(".bad-*"))
    assert numbers(run) == numbers(whole)


def test_debug_stops_at_a_breakpoint(spoken: Path) -> None:
    """`launch --debug` is one process in this terminal: pdb reads from the keyboard, and the run then goes on.

    A sitecustomize puts a breakpoint into the loop, as an editor would; a pseudo-terminal types at it.
    """
    import pty

    site = spoken / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'launcher.worker' in ' '.join(sys.orig_argv) and 'train' in sys.orig_argv:\n"
        "    from launcher.worker import train\n"
        "    whole = train.Training.one_step\n"
        "    def one_step(self, *rest):\n"
        "        if self.progress.step == 1: breakpoint()\n"
        "        return whole(self, *rest)\n"
        "    train.Training.one_step = one_step\n"
    )
    master, slave = pty.openpty()
    command = ["launch", "--debug", "recipe.yaml", "--set", "run_dir=debug", "--set", "max_steps=3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *command],
        cwd=spoken,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "PYTHONPATH": str(site)},
        start_new_session=True,
    )
    os.close(slave)
    seen = ""
    typed = False
    try:
        while True:
            try:
                seen += os.read(master, 4096).decode(errors="replace")
            except OSError:  # the other side has closed
                break
            if "(Pdb)" in seen and not typed:
                typed = True
                os.write(master, b"p 'accumulation is', self.accumulation\ncontinue\n")
        assert process.wait(60) == 0, seen
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(master)
    assert "('accumulation is', 2)" in seen, seen
    assert Run(spoken / "debug").sealed_steps() == [3]
