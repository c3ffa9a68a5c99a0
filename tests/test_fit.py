"""The search of `speechctl fit` over budgets, and its trials of a worker that needs no torch."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import fit, memory, recipe_file, trials
from launcher.errors import AlreadyTold, ExitCode, InfrastructureError, SpeechctlError, UsageError
from launcher.trials import Trial, Trials
from tests.conftest import RECIPE, Golden, gone, wait_until

TRIAL = Trial(
    max_rank_seconds=0.0,
    fits=True,
    why="",
    device="cpu",
    limit_bytes=0,
    peak_bytes=0,
    needed_bytes=0,
    host_peak_bytes=0,
    padded_s_per_s=100.0,
    lasted_s=1.0,
)


# The search -----------------------------------------------------------------------------------------------------------


class Device:
    """Memory that a budget takes: straight, with the square of it, in stairs, or all but nothing until it is too
    much."""

    def __init__(self, shape: str, holds_s: float) -> None:
        self.shape = shape
        self.holds_s = holds_s
        self.tried: list[float] = []

    def takes(self, budget: float) -> float:
        share = budget / self.holds_s
        return {
            "straight": 0.5 + share / 2,
            "square": share**2,
            "stairs": round(share * 7) / 7 if share < 1 else share,
            "cliff": 0.01 if share <= 1 else 2.0,
            "falling": 1 - share / 2 if share <= 1 else 2.0,
        }[self.shape]

    def __call__(self, budget: float) -> Trial:
        self.tried.append(budget)
        takes = round(self.takes(budget) * 10**9)
        fits = budget <= self.holds_s
        return replace(TRIAL, max_rank_seconds=budget, fits=fits, limit_bytes=10**9, needed_bytes=takes)


@pytest.mark.parametrize("shape", ["straight", "square", "stairs", "cliff", "falling"])
@pytest.mark.parametrize("holds_s", [1.7, 3.0, 12.3, 99.9, 640.0, 1023.0])
@pytest.mark.parametrize("first", [0.5, 3.0, 50.0, 5000.0])
def test_the_largest_budget_is_known_to_precision(shape: str, holds_s: float, first: float) -> None:
    device = Device(shape, holds_s)
    made = fit.search(device, 1.62, first, 1024.0)
    good = max(t.max_rank_seconds for t in made if t.fits)
    bad = min(t.max_rank_seconds for t in made if not t.fits)
    assert good <= holds_s < bad
    assert bad - good <= max(fit.PRECISION * bad, fit.GRAIN_S * 1.01)
    assert len(set(device.tried)) == len(device.tried), "no budget is tried twice"
    assert all(1.62 <= budget <= 1024 for budget in device.tried)
    assert len(made) <= 24


def test_peaks_shorten_the_search() -> None:
    """Doubling and halving alone need nine trials for the same; every trial loads a model."""
    straight = Device("straight", 173.0)
    assert len(fit.search(straight, 1.62, 12.0, 1024.0)) <= 6


@pytest.mark.parametrize("first", [0.1, 20.0, 24.0, 400.0])
def test_a_whole_share_that_fits_ends_the_search(first: float) -> None:
    device = Device("straight", 1e6)
    made = fit.search(device, 1.62, first, 24.0)
    assert made[-1].max_rank_seconds == 24.0 and all(t.fits for t in made)


def test_where_the_smallest_does_not_fit_nothing_does() -> None:
    device = Device("straight", 1.0)
    made = fit.search(device, 1.62, 6.0, 24.0)
    assert device.tried == [6.0, 3.0, 1.62]
    assert not any(t.fits for t in made)


@pytest.mark.parametrize("evaluation_fits_to", [0.0, 40.0])
def test_an_evaluation_that_does_not_fit_ends_the_search(evaluation_fits_to: float) -> None:
    """It takes the same under every budget. Where it has fitted under one, a larger one has left it no room: that is
    for the search."""
    device = Device("straight", 100.0)

    def attempt(budget: float) -> Trial:
        trial = device(budget)
        shape = {"shape": "evaluation", "utterances": 8, "seconds": 15.0, "chars": 90}
        return replace(trial, fits=False, ran_out_on=shape) if trial.fits and budget > evaluation_fits_to else trial

    made = fit.search(attempt, 1.62, 200.0 if not evaluation_fits_to else 20.0, 1024.0)
    if evaluation_fits_to:
        assert 0.95 * 40 <= max(t.max_rank_seconds for t in made if t.fits) <= 40
    else:
        assert device.tried == [200.0, 100.0], "nothing is known of it while training itself does not fit"
        assert made[-1].is_for_evaluation and not made[0].is_for_evaluation


# In words -------------------------------------------------------------------------------------------------------------


def trial(budget: float, peak: int, speed: float | None) -> Trial:
    shape = {"shape": "longest, most sound", "utterances": int(budget // 15), "seconds": 15.0, "chars": 200}
    fits = speed is not None
    return replace(
        TRIAL,
        max_rank_seconds=budget,
        fits=fits,
        why="" if fits else "CUDA out of memory. Tried to allocate 2.00 GiB.",
        device="NVIDIA H100",
        limit_bytes=72 * 2**30,
        peak_bytes=peak * 2**30,
        padded_s_per_s=speed,
        shapes=[{**shape, "peak_bytes": peak * 2**30}],
        ran_out_on=None if fits else shape,
    )


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_person_reads(whole: bool, capsys: pytest.CaptureFixture[str], golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "stub.yaml").write_text(RECIPE.replace("step_seconds: 24s", "step_seconds: 800s"))
    recipe = recipe_file.load(tmp_path / "stub.yaml")
    made = [trial(100, 30, 900.0), trial(200, 55, 800.0), trial(800, 71, 790.0) if whole else trial(270, 69, 790.0)]
    fitting = list(made)
    made += [] if whole else [trial(280, 71, None)]
    fit.show(fit.Fit(1, 2, fitting[-1], made, is_largest=whole), recipe, 0.1)
    golden(f"fit/{'whole' if whole else 'found'}.txt", capsys.readouterr().out)


def test_what_a_person_reads_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "stub.yaml").write_text(RECIPE)
    recipe = recipe_file.load(tmp_path / "stub.yaml")
    shape = {"shape": "evaluation", "utterances": 8, "seconds": 15.0, "chars": 90}
    error = fit.evaluation_does_not_fit(recipe, replace(trial(6, 71, None), ran_out_on=shape), 1)
    assert error.exit_code == ExitCode.OUT_OF_MEMORY
    assert "on an evaluation batch of 8 x 15.00 s, 1 rank on NVIDIA H100: CUDA out of memory." in error.message
    assert error.hint == "lower evaluate.batch_seconds, 120 now; or evaluate.mode: sidecar; or more --memory"
    error = fit.evaluation_does_not_fit(recipe, replace(trial(6, 71, None), ran_out_on={**shape, "utterances": 1}), 1)
    assert error.hint == "evaluate.mode: sidecar; or more --memory", "one utterance cannot be divided"


def test_more_ranks_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub.yaml").write_text(RECIPE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UsageError, match=r"3 ranks are asked for, and this machine shows 2 GPU\(s\)"):
        fit.fit(recipe_file.load(tmp_path / "stub.yaml"), tmp_path / "stub.yaml", 3, None, 0.1, print)


# Trials of a stub -----------------------------------------------------------------------------------------------------

STUB = """\
import json, os, sys, time
folder, rank = sys.argv[3], os.environ["RANK"]

def say(**facts):
    with open(f"{folder}/rank-{rank}.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")

shape = {"shape": "modal", "utterances": 2, "seconds": 1.5, "chars": 9}
say(device="cpu")
say(begins=shape)
behaviour = json.loads(os.environ["STUB"])[int(rank)]
if rank != "0":
    time.sleep(0.4)
if behaviour == "fits":
    say(**shape, peak_bytes=5 * 2**20, host_peak_bytes=5 * 2**20, padded_s=3.0, step_s=0.5)
elif behaviour == "large":
    kept = bytearray(b"x") * (200 * 2**20)
    time.sleep(600)
elif behaviour == "spike":
    say(**shape, peak_bytes=2**40, host_peak_bytes=2**40, padded_s=3.0, step_s=0.5)
elif behaviour == "late":
    say(**shape, peak_bytes=2**40, host_peak_bytes=2**40)
    say(begins={**shape, "shape": "evaluation"})
    time.sleep(600)
elif behaviour in ("evaluates", "has evaluated"):
    say(**shape, peak_bytes=5 * 2**20, host_peak_bytes=5 * 2**20)
    shape["shape"] = "evaluation"
    say(begins=shape)
    if behaviour == "has evaluated":
        say(**shape, peak_bytes=5 * 2**20, host_peak_bytes=5 * 2**20)
        time.sleep(600)
    say(out_of_memory="CUDA out of memory. Tried to allocate 2.00 GiB.")
    sys.exit(77)
elif behaviour == "refused":
    say(out_of_memory="CUDA out of memory. Tried to allocate 2.00 GiB.")
    sys.exit(77)
elif behaviour == "known":
    print("noise of a library\\nerror: no pack\\n\\nhint: pack", file=sys.stderr)
    sys.exit(5)
elif behaviour == "raises":
    raise RuntimeError("gloo: connection closed")
elif isinstance(behaviour, int):
    os.kill(os.getpid(), behaviour)
else:
    assert behaviour == "hangs"
    if (child := os.fork()) == 0:
        time.sleep(600)
    with open(os.environ["STUB_PIDS"], "a") as file:
        file.write(f"{os.getpid()} {child} ")
    time.sleep(600)
"""


class Place:
    """Trials whose worker is `STUB`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        (root / "fit_stub.py").write_text(STUB)
        (root / "stub.yaml").write_text(RECIPE)
        monkeypatch.setattr(trials, "WORKER", "fit_stub")
        monkeypatch.setenv("PYTHONPATH", str(root))
        monkeypatch.setenv("STUB_PIDS", str(root / "pids"))
        monkeypatch.setenv("TMPDIR", str(root / "tmp"))
        (root / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", None)
        self.root = root
        self.before = set(psutil.Process().children())  # such as the hosts of a cluster that other tests go on with

    def run(self, *behaviours: Any, memory_bytes: int | None = 2**30) -> Trial:
        self.monkeypatch.setenv("STUB", json.dumps(behaviours))
        recipe, path = recipe_file.load(self.root / "stub.yaml"), self.root / "stub.yaml"
        return Trials(recipe, path, None, len(behaviours), memory_bytes, 0.0).run(6.0)

    def pids(self) -> set[int]:
        """Of ranks that hang, and of a process that each has started."""
        return set(map(int, (self.root / "pids").read_text().split())) if (self.root / "pids").exists() else set()

    def check_nothing_left(self) -> None:
        assert gone(self.pids(), within_s=2)
        assert not list((self.root / "tmp").iterdir())
        new = set(psutil.Process().children()) - self.before
        assert not [p for p in new if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_a_trial_that_fits(place: Place) -> None:
    trial = place.run("fits", "fits")
    assert trial.fits and trial.why == ""
    assert trial.padded_s_per_s == 6.0
    assert trial.limit_bytes == 2**29, "two ranks share what the machine has"
    assert trial.peak_bytes >= 5 * 2**20
    assert trial.hardest is not None and trial.hardest["utterances"] == 2
    place.check_nothing_left()


@pytest.mark.parametrize(
    ("behaviours", "why"),
    [
        (["refused"], "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (["fits", "refused"], "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (["raises", "refused"], "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ([int(signal.SIGKILL)], "ended by SIGKILL, taken for the kernel's, for want of memory"),
        (["hangs", int(signal.SIGKILL)], "ended by SIGKILL, taken for the kernel's, for want of memory"),
        (["large"], "takes more than 100.0 MiB"),
        (["spike"], "takes more than 100.0 MiB"),
    ],
)
def test_a_trial_that_does_not_fit(behaviours: list[Any], why: str, place: Place) -> None:
    """`spike` was over between two looks: the rank itself has seen it. `raises` only lost the other rank."""
    trial = place.run(*behaviours, memory_bytes=len(behaviours) * 100 * 2**20)
    assert not trial.fits and trial.why == why
    assert trial.padded_s_per_s is None
    place.check_nothing_left()


@pytest.mark.parametrize(
    ("behaviours", "shape"),
    [
        (["evaluates"], "evaluation"),
        (["has evaluated", "evaluates"], "evaluation"),
        (["refused"], "modal"),
        (["spike"], "modal"),
        (["late", "refused"], "modal"),
    ],
)
def test_what_memory_ran_out_on(behaviours: list[Any], shape: str, place: Place) -> None:
    """`late` took too much in a step, and was at its evaluation when that was seen: another budget may fit."""
    trial = place.run(*behaviours)
    assert not trial.fits and trial.hardest is not None and trial.hardest["shape"] == shape
    assert trial.is_for_evaluation == (shape == "evaluation")


def test_a_kill_that_the_kernel_counts_is_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    look = memory.Watch.look
    monkeypatch.setattr(memory.Watch, "look", lambda *given: {**look(*given), "oom_kills": 1})
    assert place.run(int(signal.SIGKILL)).why == "ended by the kernel because memory ran out"


def test_other_ends_are_no_matter_of_memory(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AlreadyTold) as told:
        place.run("known")
    assert told.value.exit_code == 5
    assert capfd.readouterr().err == "error: no pack\n\nhint: pack\n"
    with pytest.raises(AlreadyTold):
        place.run("raises", "known")
    assert capfd.readouterr().err == "error: no pack\n\nhint: pack\n"
    with pytest.raises(SpeechctlError) as raised:
        place.run("raises")
    assert raised.value.exit_code == ExitCode.BUG and "connection closed" in capfd.readouterr().err
    with pytest.raises(InfrastructureError, match="SIGSEGV"):
        place.run(int(signal.SIGSEGV))
    recipe = place.root / "stub.yaml"
    recipe.write_text(RECIPE.replace("stop_grace: 2s", "stop_grace: 2s, deadlines: {start: 1s}"))
    with pytest.raises(InfrastructureError, match=r"has not got on for launch\.deadlines\.start, 1 s"):
        place.run("hangs")
    place.check_nothing_left()


def test_ctrl_c_leaves_nothing(place: Place) -> None:
    def interrupt() -> None:
        wait_until(place.pids)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        place.run("hangs")
    thread.join()
    place.check_nothing_left()
