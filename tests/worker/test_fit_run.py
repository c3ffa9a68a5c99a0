"""`speechctl fit` on a real model, in the processes that it starts; and memory that runs out in a real run."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from launcher import memory
from launcher.errors import ExitCode
from launcher.fit import PRECISION
from launcher.rundir import Run, read_json, read_lines
from launcher.worker import pack
from tests.conftest import gone, make_corpus
from tests.worker.runs import SPEECHCTL, speechctl, started, wait_for

pytestmark = pytest.mark.ranks

RECIPE = """\
name: fitted
launch: {{device: cpu, processes: 1}}
data:
  corpus: {root}/LibriSpeech
  packs: {root}/packs
  train: [train-clean-100]
  weights: {{train-clean-100: 40}}
backbone: {{kind: tiny-ctc, hidden: 16, layers: 2}}
zero_stage: off
max_steps: 9
batch: {{step_seconds: 200s, max_rank_seconds: 200s}}
optimizer: {{learning_rate: 1e-3}}
evaluate: {{subsets: [dev-clean]}}
checkpoint: {{every_steps: 100}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fit")
    make_corpus(made / "LibriSpeech")
    for subset in ("train-clean-100", "dev-clean"):
        pack.write_pack(made / "LibriSpeech", subset, made / "packs" / subset, 2**20, 1, lambda line: None)
    (made / "fit.yaml").write_text(RECIPE.format(root=made))
    return made


@contextmanager
def own_place(folder: Path) -> Iterator[dict[str, str]]:
    """An environment with a directory for temporary files, in which nothing of ours is left at the end."""
    (folder / "tmp").mkdir()
    yield {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    assert not list((folder / "tmp").glob("speechctl*"))  # torch leaves a directory of its own


def fitted(root: Path, env: dict[str, str], *options: str) -> dict[str, Any]:
    done = speechctl("fit", "fit.yaml", "--headroom", "0", "--json", *options, cwd=root, env=env)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_largest_budget(root: Path, tmp_path: Path) -> None:
    """With plenty of memory all of a step fits. With less than that took, the answer fits as it was run, a budget
    hardly larger does not as it was run, and both were measured."""
    with own_place(tmp_path) as env:
        whole = fitted(root, env, "--memory", "8GiB")
        assert whole["is_largest"] and whole["max_rank_seconds"] == 200
        (trial,) = whole["trials"]
        names = ", ".join(shape["shape"] for shape in trial["shapes"])
        for name in ("modal", "evaluation", "longest", "most utterances", "most sound", "most attention", "most text"):
            assert name in names
        assert trial["padded_s_per_s"] > 0

        limit = round(0.88 * whole["peak_bytes"])
        less = fitted(root, env, "--memory", str(limit), "--set", "batch.max_rank_seconds=80")
        assert not less["is_largest"] and 1.5 < less["max_rank_seconds"] < 200
        good = [t for t in less["trials"] if t["fits"]]
        bad = [t for t in less["trials"] if not t["fits"]]
        best, least = max(t["max_rank_seconds"] for t in good), min(t["max_rank_seconds"] for t in bad)
        assert best == less["max_rank_seconds"] < least
        assert least - best <= max(PRECISION * least, 0.101)
        assert all(t["peak_bytes"] <= limit for t in good)
        assert all(t["peak_bytes"] > limit and "takes more than" in t["why"] for t in bad)
        assert 3 <= len(less["trials"]) <= 9


def test_nothing_fits(root: Path, tmp_path: Path) -> None:
    """Not for want of memory that is counted, and not where the kernel's SIGKILL says so, which here a person sends."""
    with own_place(tmp_path) as env:
        done = speechctl(
            "fit", "fit.yaml", "--memory", "100MiB", "--set", "batch.max_rank_seconds=0.5s", cwd=root, env=env
        )
        assert done.returncode == ExitCode.OUT_OF_MEMORY
        assert "not even the longest utterance alone fits, max_rank_seconds 1.41:" in done.stderr
        assert "takes more than 90.0 MiB" in done.stderr and "90.0 MiB may be used" in done.stderr
        assert "hint: activation_checkpointing: true; or precision: bf16" in done.stderr

        with started("fit", "fit.yaml", "--set", "batch.max_rank_seconds=0.5s", cwd=root, env=env) as command:
            trial = wait_for(lambda: trials_of(command), command)[0]
            trial.send_signal(signal.SIGKILL)
            said = command.communicate(timeout=100)[0]
        assert command.returncode == ExitCode.OUT_OF_MEMORY, said
        assert "ended by SIGKILL, taken for the kernel's, for want of memory" in said


def test_an_evaluation_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    """A budget that fits training was the answer, and the run that had it ended at its first evaluation. The same
    memory is enough where a sidecar evaluates."""
    folder = tmp_path / "LibriSpeech" / "test-other" / "7" / "1"
    folder.mkdir(parents=True)
    seconds = 250
    for number in range(2):
        sound = np.random.default_rng(number).normal(0, 0.1, seconds * 16000)
        soundfile.write(folder / f"7-1-{number:04d}.flac", sound, 16000, subtype="PCM_16")
    (folder / "7-1.trans.txt").write_text("7-1-0000 A LONG STORY\n7-1-0001 ANOTHER\n")
    if not (packed := root / "packs" / "test-other").exists():
        pack.write_pack(tmp_path / "LibriSpeech", "test-other", packed, 2**24, 1, lambda line: None)
    small = ["batch={step_seconds: 3s, max_rank_seconds: 3s}", "evaluate.batch_seconds=600"]
    options = [word for value in (*small, "evaluate.subsets=[test-other]") for word in ("--set", value)]
    with own_place(tmp_path) as env:
        beside = fitted(root, env, *options, "--set", "evaluate.mode=sidecar", "--memory", "8GiB")
        assert not [s for t in beside["trials"] for s in t["shapes"] if "evaluation" in s["shape"]]
        memory = ["--memory", str(beside["peak_bytes"] + 50 * 2**20), "--headroom", "0"]
        done = speechctl("fit", "fit.yaml", *options, *memory, cwd=root, env=env)
        assert done.returncode == ExitCode.OUT_OF_MEMORY, done.stdout + done.stderr
        assert f"on an evaluation batch of 2 x {seconds}.00 s, 1 rank on cpu: takes more than" in done.stderr
        assert "hint: lower evaluate.batch_seconds, 600 now; or evaluate.mode: sidecar" in done.stderr
        assert done.stderr.count("does not fit on") == 1, "no other budget is tried"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGHUP, -1)])
def test_a_signal_in_the_middle_of_a_trial(root: Path, tmp_path: Path, number: int, code: int) -> None:
    """Two ranks under ZeRO 2, once both have made steps: nothing is left of them, nor of what they wrote.

    Ctrl-C alone cleared up; a service that is stopped and a terminal that is closed left two directories in /tmp.
    """
    with own_place(tmp_path) as env:
        options = ["--ranks", "2", "--set", "zero_stage=2", "--set", "batch.max_rank_seconds=12"]
        with subprocess.Popen(
            [*SPEECHCTL, "fit", "fit.yaml", *options], cwd=root, env=env, text=True, stderr=subprocess.PIPE
        ) as command:
            wait_for(lambda: [len(rows) for rows in shapes_in(tmp_path / "tmp")] > [0, 0], command)
            family = {p.pid for p in psutil.Process(command.pid).children(recursive=True)}
            command.send_signal(number)
            said = command.communicate(timeout=60)[1]
        assert command.returncode == code, said
        assert "Traceback" not in said
        assert len(family) >= 2 and gone(family, within_s=20)


def trials_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of its trial, as soon as they are what they are to be."""
    family = psutil.Process(command.pid).children(recursive=True)
    return [p for p in family if "fit" in p.cmdline()[2:5] and "launcher.worker" in p.cmdline()]


def shapes_in(folder: Path) -> list[list[Any]]:
    """What each rank of a trial has measured."""
    found = sorted(folder.glob("speechctl-fit-*/rank-*.jsonl"))
    return [[row for row in read_lines(path) if "shape" in row] for path in found]


def test_memory_that_runs_out_in_training(root: Path, tmp_path: Path) -> None:
    """Most of the model learns from step 61 on. By then its rank may have little more address space than it took
    before, with kernels for most shapes made, so that the CPU's allocator truly refuses: the failure has the batch, its
    utterances and what to change."""
    run = Run(tmp_path / "run")
    sets = [
        f"run_dir={run.root}",
        "max_steps=65",
        "backbone.hidden=640",
        "batch={step_seconds: 3s, max_rank_seconds: 3s}",
        "freeze=[{parts: ['*'], but: [head], until_steps: 60}]",
        "checkpoint.asynchronous=false",
    ]
    with own_place(tmp_path) as env:
        options = [word for value in sets for word in ("--set", value)]
        with started("launch", "fit.yaml", *options, cwd=root, env=env) as command:
            wait_for(lambda: run.exists() and run.attempts() and len(steps(run)) >= 40, command)
            pid = read_json(run.attempts()[0].rank(0))["pid"]
            room = memory.status(pid)["VmSize"] + 24 * 2**20
            resource.prlimit(pid, resource.RLIMIT_AS, (room, room))
            assert len(steps(run)) < 60, "too late"
            said = command.communicate(timeout=200)[0]
        assert command.returncode == ExitCode.OUT_OF_MEMORY, said
        failed = read_json(run.attempts()[0].failure)
        assert (failed["kind"], failed["rank"], failed["verdict"]) == ("host memory", 0, "mend")
        done = speechctl("why", str(run.root), cwd=root, env=env)
        for text in (said, failed["message"] + failed["hint"], done.stdout):
            assert "rank 0" in text and "out of memory in step " in text and "can't allocate memory" in text
            assert re.search(r"on \d+ utterances of up to \d\.\d s \(\d\.\d padded s, inputs \d+ x \d+: ", text)
            assert any(f"{speaker}-" in text for speaker in (19, 26, 103)), "an utterance is named"
            assert "lower batch.max_rank_seconds, 3 now" in text and "`speechctl fit RECIPE`" in text


def steps(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.attempts()[0].metrics)
