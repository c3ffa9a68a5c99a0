"""What all tests share: a corpus small enough to be made anew for every test, golden files, and runs without torch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from launcher import plan, recipe_file, rundir, sealed, sealing, supervise
from launcher.failure import Failure
from launcher.hosts import Host
from launcher.plan import Plan
from launcher.recipe_launch import Launch
from launcher.rundir import Attempt, Run
from tests.stub.speechctl import FACTS

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""As the user set it, for tests/gpu."""

# Every other test is about two ranks and exact numbers: on a machine with GPUs too it runs on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


# For tests/torture.py -------------------------------------------------------------------------------------------------


def count(name: str, n: int = 1) -> None:
    """Say what a test did `n` of, once it has done them."""
    if (path := os.environ.get("SPEECHCTL_TEST_COUNTS")) is not None:
        rundir.append_line(Path(path), {"name": name, "n": n})


def seed(own: int) -> int:
    """Of a test's random numbers: its own, and in every round of the full counts another."""
    return own + int(os.environ.get("SPEECHCTL_TEST_SEED", "0"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        count("tests")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from the user's cache, and nothing left there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


CHAPTERS = {
    "dev-clean": {(84, 121): 3, (174, 50): 2},
    "train-clean-100": {(19, 198): 4, (19, 227): 3, (26, 495): 3, (103, 1240): 2},
}
"""Utterances by subset, speaker and chapter."""

SENTENCES = (
    "HELLO WORLD",
    "THE CAT SAT ON THE MAT",
    "A",
    "IT'S NEVER TOO LATE",
    "SPEECH IS SILVER BUT SILENCE IS GOLDEN",
)


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """The root of a LibriSpeech tree: 5 utterances in dev-clean, 12 in train-clean-100; noisy tones, 0.3 to 1.5 s."""
    return make_corpus(tmp_path / "LibriSpeech")


def make_corpus(root: Path) -> Path:
    """What `tiny_corpus` is."""
    random = np.random.default_rng(7)
    for subset, chapters in CHAPTERS.items():
        for (speaker, chapter), count in chapters.items():
            folder = root / subset / str(speaker) / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for i in range(count):
                utt_id = f"{speaker}-{chapter}-{i:04d}"
                n_samples = int(random.integers(4800, 24000))
                tone = np.sin(2 * np.pi * (100 + speaker) * np.arange(n_samples) / 16000)
                sound = 0.3 * tone + 0.02 * random.standard_normal(n_samples)
                soundfile.write(folder / f"{utt_id}.flac", sound, 16000, subtype="PCM_16")
                lines.append(f"{utt_id} {SENTENCES[(speaker + i) % len(SENTENCES)]}\n")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return root


Golden = Callable[[str, str], None]


@pytest.fixture
def golden() -> Golden:
    """`golden(name, text)` compares a text with tests/golden/NAME. After a change that is meant, run the tests with
    SPEECHCTL_WRITE_GOLDEN=1 once, and read the difference before it is committed."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if os.environ.get("SPEECHCTL_WRITE_GOLDEN"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"not what {path} has"

    return compare


@pytest.fixture
def shared_memory_alone() -> Iterator[None]:
    """For what removes all that is stale in /dev/shm: no other such test runs meanwhile, of whichever checkout."""
    fd = os.open("/dev/shm", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# Runs without torch ---------------------------------------------------------------------------------------------------

RECIPE = """\
name: stub
launch: {processes: 2, stop_grace: 2s}
data: {corpus: corpus, packs: packs, train: [train-clean-100]}
backbone: {kind: tiny-ctc}
max_steps: 50
batch: {step_seconds: 24s, max_rank_seconds: 12s}
optimizer: {learning_rate: 1e-3}
evaluate: {subsets: [dev-clean]}
checkpoint: {every_steps: 10}
"""


class Stub:
    """A place where `-m torch.distributed.run` is `tests/stub/torchrun.py`, and speechctl is `tests/stub/speechctl.py`.

    Everything between them, from the command line to the ranks, is the real thing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages = root / "stub"
        self.run = Run(root / "runs" / "stub")
        (self.packages / "torch" / "distributed").mkdir(parents=True)
        for package in ("torch", "torch/distributed"):
            (self.packages / package / "__init__.py").touch()
        here = Path(__file__).parent / "stub"
        shutil.copy(here / "torchrun.py", self.packages / "torch" / "distributed" / "run.py")
        shutil.copy(here / "rank.py", self.packages / "rank.py")
        self.recipe = root / "stub.yaml"
        self.recipe.write_text(RECIPE.replace("stop_grace: 2s}", "stop_grace: 20s, relaunch: {wait: 0.1s}}"))
        self.env = {
            **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PYTHONPATH")},
            "PYTHONPATH": f"{self.packages}:{here.parents[1]}",
            "NO_COLOR": "1",
            "COLUMNS": "100",
        }
        self.command = [sys.executable, str(here / "speechctl.py")]

    def behave(
        self, *ranks: str, says: str = "", start_s: float = 0, patience_s: float = 5, then: tuple[str, ...] = ()
    ) -> None:
        """What each rank does (`stub/rank.py`), and what torchrun says instead of starting any.

        Args:
            then: what the ranks do at every further attempt, where that is something else.
        """
        later = {"ranks": then, "says": ""} if then else {}
        value = {"ranks": ranks, "says": says, "start_s": start_s, "patience_s": patience_s, "then": later}
        (self.packages / "behaviour.json").write_text(json.dumps(value))

    def plan(self, ranks: int = 2) -> Plan:
        return plan.make(recipe_file.load(self.recipe), [Host("localhost", ranks)], FACTS)

    def attempt(self, ranks: int = 2, stop_grace_s: float = 20) -> Attempt:
        """A prepared attempt of a run of its own, ready for a node."""
        for folder in (self.run.root, self.run.stop_request.parent):
            folder.mkdir(parents=True, exist_ok=True)
        made = self.plan(ranks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", self.env["PYTHONPATH"])
            return supervise.prepare_attempt(self.run, Launch(stop_grace=stop_grace_s), made, fresh=False)

    @contextmanager
    def start(self, *argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """A process under way; killed at the end if it is still there, which is a failure of the test."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.env, **options}
        with subprocess.Popen(argv, cwd=self.root, text=True, **options) as process:
            try:
                yield process
            finally:
                process.kill()
                for pid in self.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def speechctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"env": self.env, "timeout": 60, **options}
        command = [*self.command, *arguments]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False, **options)

    def pids(self) -> set[int]:
        """torchrun, every rank that ever came up and what those started, by their own records."""
        others = [p for a in self.run.attempts() for p in (*a.root.glob("torchrun*.json"), a.root / "child.json")]
        records = [path for a in self.run.attempts() for path in a.ranks.glob("rank-*.json")]
        return {json.loads(path.read_text())["pid"] for path in (*others, *records) if path.exists()}

    def wait_for_ranks(self, count: int = 2) -> set[int]:
        """Until all have started training; returns all processes below the node."""
        wait_until(lambda: self.run.attempts() and len(list(self.run.attempts()[-1].ranks.glob("rank-*"))) == count)
        wait_until(lambda: self.run.attempts()[-1].events.exists() or self.run.attempts()[-1].failure.exists())
        return self.pids()


def wait_until(what: Callable[[], Any], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def gone(pids: set[int], within_s: float) -> bool:
    """Whether all of these processes end in time. A zombie that nobody reaped yet has ended."""
    deadline = time.monotonic() + within_s
    while any(_is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def own_port() -> Iterator[int]:
    """A port of loopback, for whoever listens there by its number; meanwhile nobody gets it who asks for any."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    made = Stub(tmp_path)
    made.behave("train", "train")
    return made


def simulated_python(folder: Path) -> Path:
    """A directory for PATH in which `python3` is that of a simulated host (tests/stub/host.py)."""
    folder.mkdir()
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "stub" / "host.py"} "$@"\n')
    script.chmod(0o755)
    return folder


# Runs made by hand ----------------------------------------------------------------------------------------------------


def made_run(root: Path, state: str) -> Run:
    """A run directory as two attempts leave it: the first was interrupted at step 3 and had sealed step 2.

    Args:
        state: what the second came to: finished, stopped, failed, interrupted; or created: there was no attempt yet.
    """
    run = Run(root)
    run.checkpoints.mkdir(parents=True)
    run.stop_request.parent.mkdir()
    run.resolved.write_text(RECIPE)
    rundir.write_json(run.plan, {"name": "stub", "max_steps": 6})
    if state == "created":
        return run
    last = 6 if state == "finished" else 4
    for number, (first, to) in enumerate([(0, 3), (2, last)], start=1):
        attempt = run.new_attempt()
        rundir.append_line(attempt.events, {"event": "started", "step": first, "time": 100.0 * number})
        for step in range(first + 1, to + 1):
            values = {"step": step, "loss": 3 / step, "audio_s": 36.0, "step_s": 0.5, "attempt": number}
            more = {"epoch": 0, "grad_norm": 1.0, "learning_rate": 1e-3, "time": 100.0 * number + step}
            rundir.append_line(attempt.metrics, {**values, **more})
    run.evaluations.mkdir()
    # Of the evaluations of the first attempt, the one at step 3 was rolled back, and the run has not come by again.
    for number, step, errors in [(1, 2, 30), (1, 3, 28), (2, 4, 20), (2, 6, 15)]:
        if step > last:
            continue
        scores = {"substitutions": errors - 6, "insertions": 2, "deletions": 4, "words": 40, "utterances": 5}
        more = {"step": step, "attempt": number, "wer": errors / 40, "loss": 3 / step}
        rundir.write_json(run.evaluation(step), {**more, **scores})
        rows = [{"utt_id": f"84-1-{i:04d}", "ref": f"SENTENCE {i}", "hyp": f"SENTENS {i}"} for i in range(5)]
        rundir.write_jsonl(run.hypotheses(step), rows)
    for step in range(2, last + 1, 2):
        run.checkpoint(step).mkdir()
        manifest = {**sealed.marks(run, step), "files": {}}
        rundir.write_json(run.checkpoint(step) / rundir.MANIFEST, {**manifest, "digest": sealing.digest_json(manifest)})
    rundir.write_json(run.best, {"step": last, "wer": 15 / 40 if last == 6 else 20 / 40})
    if state in ("finished", "stopped"):
        rundir.write_json(attempt.exit, {"code": 0 if state == "finished" else 75, "step": last, "sealed_step": last})
    if state == "failed":
        said = "rank 1 on localhost: ValueError: boom"
        where: dict[str, Any] = {"rank": 1, "host": "localhost", "evidence": [str(attempt.rank_log(1))]}
        rundir.write_json(attempt.failure, Failure("training", said, "read the log", **where, time=1.0).to_json())
    return run
