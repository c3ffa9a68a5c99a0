"""The runner of the full counts, on parts of a second: what it counts, that it goes on, and what it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import torture
from tests.conftest import count, gone, seed, wait_until
from tests.torture import PARTS, ROOT, Part

FAKE = """\
import json, os, subprocess, sys, time
from pathlib import Path
def count(name, n):
    with open(os.environ["SPEECHCTL_TEST_COUNTS"], "a") as counts:
        print(json.dumps({"name": name, "n": n}), file=counts)
what, folder = sys.argv[1], Path(sys.argv[2])
with (folder / f"seeds-{what}").open("a") as seeds:
    print(os.environ["SPEECHCTL_TEST_SEED"], file=seeds)
count("throws", 6)
if what == "slow" and not (folder / "quick").exists():
    child = subprocess.Popen(["sleep", "600"])
    (folder / ".pids").write_text(f"{os.getpid()} {child.pid}")
    (folder / ".pids").rename(folder / "pids")
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        (folder / "took down").touch()
        raise
count("throws", 4)
print("what the log has")
sys.exit(3 if what == "bad" else 0)
"""

MAIN = """\
import sys
from pathlib import Path
from tests import torture
folder = Path(sys.argv[1])
where = {"PYTHONPATH": f"{folder / 'fakes'}"}
parts = [torture.Part(n, ("fake", n, str(folder)), where, "throws", 10) for n in sys.argv[2].split(",")]
torture.digest_of_the_code = lambda: "code"
sys.exit(torture.main(sys.argv[3:], parts, folder / "state"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake.py").write_text(FAKE)
    yield tmp_path
    for pid in pids(tmp_path) if (tmp_path / "pids").exists() else ():  # of a test that failed
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.cmdline() == ["sleep", "600"] or "fake" in process.cmdline():
                process.kill()


def run(folder: Path, names: str, *arguments: str) -> tuple[int, str]:
    argv = [sys.executable, "-c", MAIN, str(folder), names, *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


def under_way(folder: Path, names: str, *arguments: str) -> subprocess.Popen[bytes]:
    """One that is in its slow part."""
    argv = [sys.executable, "-c", MAIN, str(folder), names, *arguments]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until((folder / "pids").exists, 60)
    return process


def pids(folder: Path) -> set[int]:
    return {int(pid) for pid in (folder / "pids").read_text().split()}


def state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "state" / "state.json").read_text()))


def seeds(folder: Path, name: str) -> list[str]:
    return (folder / f"seeds-{name}").read_text().split()


def row(said: str, name: str) -> str:
    """Of the last table."""
    return [line for line in said.splitlines() if line.startswith(f"{name} ")][-1]


def test_every_part_once_and_again_with_another_seed(folder: Path) -> None:
    code, said = run(folder, "one,two")
    assert code == 0
    assert re.search("1 +0 +10 throws, throws fail at less than 0.3$", row(said, "one"))
    code, said = run(folder, "one,two")
    assert re.search("2 +0 +20 throws, throws fail at less than 0.15$", row(said, "two"))
    assert len({*seeds(folder, "one"), *seeds(folder, "two")}) == 4, "every round has its own"
    code, said = run(folder, "one,two", "--fresh", "--part", "one")
    assert re.search("1 +0 +10 throws", row(said, "one")) and "two" not in said
    first, _, third = seeds(folder, "one")
    assert first == third, "a round can be had again"
    assert list((folder / "state").glob("*.log")) == []


def test_a_failure_is_shown_with_its_log_until_the_code_is_another(folder: Path) -> None:
    code, said = run(folder, "bad,one")
    assert code == 1
    (log,) = (folder / "state").glob("bad-*.log")
    assert log.read_text() == "what the log has\n"
    assert re.search(r"FAILED in \d+ s \(exit 3; 10 throws\): ", said) and f"failed: {log}\n" in said
    assert re.search("1 +1 +10 throws$", row(said, "bad")), "no bound where something failed"
    assert re.search("1 +0 +10 throws,", row(said, "one")), "the others run"
    code, said = run(folder, "bad,one", "--part", "one")
    assert code == 0
    code, said = run(folder, "bad,one", "--seconds", "0")
    assert code == 1 and f"failed: {log}\n" in said
    code, said = run(folder, "bad,one", "--seconds", "0", "--seed", "2")
    assert code == 0 and said.startswith("begins anew"), "what was found is of one seed"


def test_a_round_that_skipped_something_has_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten throws of eleven: as where the cluster is not there, and the tests over it are skipped."""
    most = Part("most", ("fake", "most", str(folder)), {"PYTHONPATH": str(folder / "fakes")}, "throws", 11)
    assert torture.main([], [most], folder / "state") == 1
    assert "(only 10 of 11 throws; 10 throws)" in capsys.readouterr().out


def test_the_seconds_cut_a_part_short(folder: Path) -> None:
    """It and what it started are gone; it counts for nothing, and comes last the next time."""
    began = time.monotonic()
    code, said = run(folder, "slow,one", "--seconds", "6")
    assert code == 0 and time.monotonic() - began < 30
    assert "slow: round 1" in said and "cut short" in said
    assert (folder / "took down").exists(), "it could take down what it had made"
    assert gone(pids(folder), 5)
    assert re.search("0 +0 +-$", row(said, "slow"))
    (folder / "quick").touch()
    code, said = run(folder, "slow,one")
    assert said.index("one: round 1") < said.index("slow: round 1"), "what was cut lets others go first"
    assert len(set(seeds(folder, "slow"))) == 1, "the same round again"
    assert re.search("1 +0 +10 throws", row(said, "slow"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_part_and_keeps_the_rest(folder: Path, number: int) -> None:
    process = under_way(folder, "one,slow")
    process.send_signal(number)
    assert process.wait(60) == 130
    assert (folder / "took down").exists() and gone(pids(folder), 5)
    assert [state(folder)["parts"][name]["rounds"] for name in ("one", "slow")] == [1, 0]


def test_a_runner_that_is_killed_takes_its_part_along_and_is_gone_on_from(folder: Path) -> None:
    process = under_way(folder, "one,slow")
    process.kill()
    process.wait()
    part_, child = map(int, (folder / "pids").read_text().split())
    assert gone({part_}, 20)
    os.kill(child, signal.SIGKILL)
    (folder / "quick").touch()
    code, said = run(folder, "one,slow")
    assert code == 0
    assert len(seeds(folder, "one")) == 1, "it was done"
    assert len(seeds(folder, "slow")) == 2 and len(set(seeds(folder, "slow"))) == 1
    assert re.search("1 +0 +10 throws", row(said, "slow"))


def test_two_at_once_are_refused(folder: Path) -> None:
    process = under_way(folder, "slow")
    try:
        argv = [sys.executable, "-c", MAIN, str(folder), "slow"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error: another one uses ")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_the_parts_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Their files, and whoever counts what they count; a line of the list can be pasted into a shell."""
    assert torture.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert re.search("(?m)^injections +10,000 strings a round: SPEECHCTL_TEST_INJECTIONS=10000 python -m pytest ", said)
    sources = "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    for one in PARTS:
        paths = [word for word in one.command if "/" in word]
        assert all((ROOT / path).exists() for path in paths), paths
        assert f'count("{one.unit}"' in sources, one.unit


def test_a_test_says_what_it_did(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHCTL_TEST_COUNTS", raising=False)
    monkeypatch.delenv("SPEECHCTL_TEST_SEED", raising=False)
    count("throws", 3)  # nobody asks
    assert seed(7) == 7
    monkeypatch.setenv("SPEECHCTL_TEST_COUNTS", str(folder / "counts"))
    monkeypatch.setenv("SPEECHCTL_TEST_SEED", "100")
    count("throws", 3)
    count("catches")
    assert [json.loads(line) for line in (folder / "counts").read_text().splitlines()] == [
        {"name": "throws", "n": 3},
        {"name": "catches", "n": 1},
    ]
    assert seed(7) == 107


def test_another_state_of_the_code_has_another_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launcher", "tests", "recipes"):
        (folder / name).mkdir()
    monkeypatch.setattr(torture, "ROOT", folder)
    (folder / "tests" / "test_x.py").write_text("1\n")
    before = torture.digest_of_the_code()
    (folder / "tests" / "__pycache__").mkdir()
    (folder / "tests" / "__pycache__" / "test_x.pyc").write_text("byte code\n")
    assert torture.digest_of_the_code() == before
    (folder / "tests" / "test_x.py").write_text("2\n")
    assert torture.digest_of_the_code() != before
