"""Why a run failed, told from its files alone, whoever wrote them and wherever they are seen."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import rundir, why
from launcher.rundir import Run
from tests.conftest import Golden, made_run
from tests.test_cli import Transcript, compare, speechctl
from tests.test_logs import lab_run, write_failure
from tests.test_rundir import held

__all__ = ["speechctl"]  # a fixture

HANG = {
    "kind": "hang",
    "code": 76,
    "verdict": "again",
    "host": "gpu-04",
    "node_rank": 1,
    "message": "rank 3 on gpu-04 has made no progress for 300 s: step 4, the others are at step 5",
    "hint": "look at gpu-04",
    "time": 9.0,
}


def hung(run: Run) -> None:
    attempt = run.attempts()[-1]
    for record in attempt.failures.iterdir():
        record.unlink()
    stack = attempt.stacks / "rank-00003.txt"
    stack.write_text("".join(f'  File "data.py", line {k} in read\n' for k in range(40)))
    evidence = [str(attempt.rank_log(3)), str(stack), "ranks 0-2 wait in all_reduce"]
    rundir.write_json(attempt.failure, {**HANG, "rank": 3, "evidence": evidence})


def relaunched(run: Run) -> None:
    attempt = run.new_attempt()
    rundir.append_line(attempt.events, {"event": "started", "step": 4, "time": 300.0})


def finished(run: Run) -> None:
    relaunched(run)
    rundir.write_json(run.attempts()[-1].exit, {"code": 0, "step": 6, "sealed_step": 6})


def refused(run: Run) -> None:
    """The failure of a node: no rank is named, and ssh said why."""
    attempt = run.attempts()[-1]
    for record in attempt.failures.iterdir():
        record.unlink()
    attempt.ssh_log(1).write_text("debug\ngpu-04: Permission denied (publickey).\n")
    said = {"message": "gpu-04 refused to let us in", "hint": "give it your key", "evidence": str(attempt.ssh_log(1))}
    rundir.write_json(attempt.failure, {"code": 3, "rank": None, **said})


def interrupted(run: Run) -> None:
    run.attempts()[-1].failure.unlink()
    rundir.write_json(run.lock, {"host": "login-1", "pid": 7, "since": 100.0, "command": "speechctl launch x.yaml"})
    run.launcher_log.write_text("step 4/6  epoch 0\n")


def also_raised(run: Run) -> None:
    attempt = run.attempts()[-1]
    record = rundir.read_json(attempt.rank_failure(3))
    rundir.write_json(attempt.rank_failure(1), {**record, "rank": 1, "message": "boom too\nand more"})


@pytest.mark.parametrize(
    ("name", "change", "arguments", "code"),
    [
        ("failed", None, "", 0),
        ("two-causes", also_raised, "", 0),
        ("hang", hung, "", 0),
        ("relaunched", relaunched, "", 0),
        ("finished", finished, "", 0),
        ("refused", refused, "", 0),
        ("interrupted", interrupted, "", 0),
        ("attempt-1", None, "--attempt 1", 0),
        ("attempt-fine", finished, "--attempt 3", 0),
        ("no-attempt", None, "--attempt 3", 6),
        ("json", hung, "--json", 0),
    ],
)
def test_why(
    name: str, change: Any, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    run = lab_run(tmp_path / "runs" / "stub")
    if change is not None:
        change(run)
    compare(f"why-{name}", f"why runs/stub {arguments}", code, speechctl, tmp_path, golden)


def submitted(run: Run) -> None:
    run.slurm.mkdir()
    for number, time_s in (("99", 50.0), ("1234", 100.0)):
        rundir.write_json(run.slurm / f"job-{number}.json", {"job": number, "time": time_s, "argv": ["sbatch"]})
    (run.slurm / "job-1234.log").write_text("slurmstepd: error: no such directory\n")


@pytest.mark.parametrize(("name", "change"), [("created", None), ("submitted", submitted)])
def test_a_run_that_was_not_started(
    name: str,
    change: Any,
    speechctl: Transcript,
    tmp_path: Path,
    golden: Golden,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    squeue = tmp_path_factory.mktemp("bin") / "squeue"
    squeue.write_text("#!/bin/sh\necho 'PENDING|Priority'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    run = made_run(tmp_path / "runs" / "stub", "created")
    if change is not None:
        change(run)
    compare(f"why-{name}", "why stub", 0, speechctl, tmp_path, golden)
    if change is not None:
        compare(f"status-{name}", "status stub", 0, speechctl, tmp_path, golden)


def test_a_run_that_goes_on_after_a_failure(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    run = lab_run(tmp_path / "runs" / "stub")
    with held(run, "speechctl launch stub.yaml"):
        compare("why-held", "why stub", 0, speechctl, tmp_path, golden)


def test_the_files_may_be_seen_at_another_path(tmp_path: Path) -> None:
    """The evidence has the paths of the machine on which it was found."""
    run = lab_run(tmp_path / "run")
    refused(run)
    shutil.move(run.root, tmp_path / "elsewhere")
    (excerpt,) = why.diagnose(Run(tmp_path / "elsewhere"), None).excerpts
    assert excerpt.lines == ["debug", "gpu-04: Permission denied (publickey)."]


def test_a_lock_that_names_nobody_hides_nothing(tmp_path: Path) -> None:
    """Where the disk was full, the lock was empty, and `why` read it as a damaged file of the run."""
    run = made_run(tmp_path / "run", "interrupted")
    run.lock.touch()
    assert why.diagnose(run, None).message.startswith("the launcher was gone before it could say how the ranks ended")


def test_what_files_say_drives_no_terminal(speechctl: Transcript, tmp_path: Path) -> None:
    run = lab_run(tmp_path / "runs" / "stub")
    write_failure(run, 3, message="boom \x1b]0;owned\x07", hint="\x9b31m")
    for command in ("why stub", "status stub", "attach stub", "logs stub --rank all"):
        done = speechctl(*command.split())
        assert not [c for c in done.stdout + done.stderr if not c.isprintable() and c != "\n"], command


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    run = lab_run(tmp_path / "run")
    attempt = run.attempts()[-1]
    attempt.rank_log(3).write_text(
        "".join(f"{k}\n" for k in range(100_000)) + "Traceback (most recent call last):\n x\n"
    )
    traceback, before = why.diagnose(run, None).excerpts
    assert traceback.lines[-1] == "ValueError: boom"
    assert before.lines == [str(k) for k in range(99_985, 100_000)]
    attempt.rank_failure(3).unlink()
    (log,) = why.diagnose(run, None).excerpts
    assert log.lines == [*(str(k) for k in range(99_987, 100_000)), "Traceback (most recent call last):", " x"]


# Status, of more than one machine -------------------------------------------------------------------------------------


def at_work(run: Run) -> None:
    attempt = run.attempts()[-1]
    (attempt.root / "progress").mkdir(exist_ok=True)
    ranks: list[dict[str, Any]] = [{"rank": r, "phase": "step", "step": 5, "unchanged_s": 0.3} for r in (0, 1)]
    rundir.write_json(attempt.root / "progress" / "node-000.json", {"ranks": ranks})
    ranks = [
        {"rank": 2, "phase": "step", "step": 5, "unchanged_s": 0.3},
        {"rank": 3, "phase": "save", "step": 4, "unchanged_s": 45.2},
    ]
    rundir.write_json(attempt.root / "progress" / "node-001.json", {"ranks": ranks})
    for host, until in (("gpu-07", 3e9), ("gpu-08", 100.0), ("gpu-09", 4e9)):
        rundir.append_line(run.avoided, {"host": host, "why": "lost", "until": until})


def test_status_across_nodes(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    run = lab_run(tmp_path / "runs" / "stub")
    relaunched(run)
    rundir.write_json(run.attempts()[-1].hosts, [{"name": "gpu-03", "slots": 2}, {"name": "gpu-05", "slots": 2}])
    at_work(run)
    with held(run, "speechctl launch stub.yaml"):
        compare("status-nodes", "status stub", 0, speechctl, tmp_path, golden)
        (run.attempts()[-1].root / "progress" / "node-001.json").write_text('{"ranks": [{"rank": 2, "pha')
        done = compare("status-nodes-half", "status stub", 0, speechctl, tmp_path, golden)
        assert "nothing heard yet" in done.stdout
        value = json.loads(speechctl("status", "stub", "--json").stdout)
    assert [(n["host"], n["ranks"], sorted(n["doing"])) for n in value["nodes"]] == [
        ("gpu-03", [0, 1], ["0", "1"]),
        ("gpu-05", [2, 3], []),
    ]
    assert [(a["host"], a["until"]) for a in value["avoided"]] == [("gpu-07", 3e9), ("gpu-09", 4e9)]
    assert [(s["number"], s["state"], s["code"]) for s in value["history"]] == [
        (1, "interrupted", None),
        (2, "failed", 1),
        (3, "running", None),
    ]


def test_status_says_how_old_its_word_of_a_node_is(speechctl: Transcript, tmp_path: Path) -> None:
    """A host that was cut off looked like one at work until its launcher gave it up."""
    run = lab_run(tmp_path / "runs" / "stub")
    at_work(run)
    said = run.attempts()[-1].progress(0)
    long_ago = time.time() - 1000
    os.utime(said, (long_ago, long_ago))
    with held(run, "speechctl launch stub.yaml"):
        lines = speechctl("status", "stub").stdout.splitlines()
    (first,), (second,) = ([x for x in lines if f"ranks {ranks}" in x] for ranks in ("0-1", "2-3"))
    assert re.search(r"step 5 \(step\); silent for 100\d s", first)
    assert "silent" not in second


def test_of_very_many_attempts_the_oldest_are_counted(speechctl: Transcript, tmp_path: Path) -> None:
    run = made_run(tmp_path / "runs" / "stub", "interrupted")
    for _ in range(30):
        relaunched(run)
    done = speechctl("status", "stub")
    assert "\nattempts\n  22 before these\n  23  " in done.stdout
    assert os.sep not in done.stdout.partition("attempts\n  22")[2].partition("\n\n")[0]
