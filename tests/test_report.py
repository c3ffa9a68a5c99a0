"""What the files of a run come to, and how it looks: whole, plain and narrow enough to read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import report, rundir
from launcher.cli import arguments
from launcher.errors import NotFoundError, StorageError, UsageError, in_bytes
from launcher.hosts import Host
from launcher.lock import RunLock
from launcher.recovery import note, settle
from launcher.rundir import Run
from launcher.ui import counted, purple
from launcher.vitals import Vitals
from tests.conftest import RECIPE, made_run


@pytest.mark.parametrize("state", ["created", "finished", "stopped", "failed", "interrupted"])
def test_the_state_is_what_the_newest_attempt_came_to(tmp_path: Path, state: str) -> None:
    assert report.read(made_run(tmp_path / "run", state)).state == state


def test_ranks_that_seal_alone_are_asked_by_nobody_before_their_node_says_so(tmp_path: Path) -> None:
    """Of a run whose launcher was killed, `status` said `stopped on request` for as long as its node was still ending:
    the ranks' word that they had sealed and stopped was there, and the node's about why was not."""
    run = made_run(tmp_path / "run", "stopped")
    attempt = run.attempts()[-1]
    ended = {"code": 75, "step": 4, "sealed_step": 4}
    node = {"returncode": None, "asked": None, "killed": None, "time": 1.0}
    rundir.write_json(attempt.node(0), node)
    assert report.read(run).state == "stopped", "an older version of this has no word of rank 0"
    rundir.write_json(attempt.exit, {**ended, "asked": None})
    assert report.read(run).state == "interrupted"
    for asked, state in (("the launcher went away", "interrupted"), ("the node was sent SIGTERM", "stopped")):
        rundir.write_json(attempt.node(0), {**node, "returncode": 0, "asked": asked})
        assert report.read(run).state == state
    rundir.write_json(attempt.node(0), node)
    note(attempt, "ended", code=75, sealed=4, asked=None)
    assert report.read(run).state == "stopped", "the launcher saw it, and the node was killed before it could say more"


def test_a_stop_that_was_asked_for_stays_so_whoever_is_killed_behind_it(tmp_path: Path) -> None:
    """The request is gone with the next launcher's start, which then took the launcher before it for lost."""
    run = made_run(tmp_path / "run", "stopped")
    attempt = run.attempts()[-1]
    rundir.write_json(attempt.exit, {"code": 75, "step": 4, "sealed_step": 4, "asked": "speechctl stop"})
    node = {"returncode": None, "asked": None, "killed": None, "time": 1.0}
    for record in (node, {**node, "returncode": 0, "asked": "the launcher went away"}):
        rundir.write_json(attempt.node(0), record)
        with RunLock(run, "resume"):
            settle(run)
        last = report.read(run).history[-1]
        assert (last.state, last.asked, last.failure) == ("stopped", "speechctl stop", None)


def test_steps_that_were_rolled_back_do_not_count(tmp_path: Path) -> None:
    value = report.read(made_run(tmp_path / "run", "finished"))
    assert [(m["step"], m["attempt"]) for m in value.metrics] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)]
    assert (value.audio_s, value.training_s) == (216.0, 3.0)
    assert [(e["step"], e["attempt"]) for e in value.evaluations] == [(2, 1), (4, 2), (6, 2)]
    assert (value.step, value.max_steps, value.attempts) == (6, 6, 2)


def test_a_best_checkpoint_that_is_gone_is_not_offered(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "finished")
    assert report.read(run).best == {"step": 6, "wer": 0.375}
    (run.checkpoint(6) / rundir.MANIFEST).unlink()
    assert report.read(run).best is None


def test_a_file_that_cannot_be_read_is_no_bug_of_ours(tmp_path: Path) -> None:
    """An I/O error, or a mode of 000, was told with a traceback and exit code 70."""
    run = made_run(tmp_path / "run", "finished")
    run.best.unlink(missing_ok=True)
    run.best.mkdir()
    with pytest.raises(StorageError, match=f"cannot read {run.best}: Is a directory"):
        report.read(run)


def test_a_held_run_is_running_unless_we_hold_it(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "failed")
    with RunLock(run, "speechctl resume"):
        assert report.read(run).state == "failed", "the launcher itself says how its run ended"
        code = (
            "import sys; from launcher import report, rundir; v = report.read(rundir.Run(sys.argv[1])); print(v.state)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(run.root)], capture_output=True, text=True, check=True)
        assert done.stdout == "running\n"


def test_what_ranks_do_is_read_as_their_node_writes_it(tmp_path: Path) -> None:
    """`status` read a mapping by rank where the node writes a list, and never showed what any rank does."""
    attempt = made_run(tmp_path / "run", "interrupted").new_attempt()
    hosts = [Host("gpu-03", 2), Host("gpu-04", 2)]
    rundir.write_json(attempt.hosts, [host.to_json() for host in hosts])
    rundir.write_json(attempt.progress(1), Vitals(attempt, 1, hosts).look())
    silent, said = report.read(attempt.run).nodes
    assert silent.doing == {}
    assert {rank: row["phase"] for rank, row in said.doing.items()} == {"2": "start", "3": "start"}


def test_a_directory_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotFoundError, match=r"is not a run: it has no resolved\.yaml"):
            report.read(Run(root))


def test_samples_are_spread_over_the_evaluation(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "finished")
    assert [row["ref"] for row in report.samples(run, 6, 2)] == ["SENTENCE 0", "SENTENCE 2"]
    assert len(report.samples(run, 6, 10)) == 5
    assert report.samples(run, 5, 2) == []


def test_which_checkpoints_an_average_is_of(tmp_path: Path) -> None:
    """Steps 2, 4 and 6 are sealed, with WERs of 0.75, 0.5 and 0.375."""
    run = made_run(tmp_path / "run", "finished")
    assert [report.averaged_steps(run, w) for w in ("last:1", "last:2", "last:3")] == [[6], [4, 6], [2, 4, 6]]
    assert [report.averaged_steps(run, w) for w in ("best:1", "best:3")] == [[6], [2, 4, 6]]
    better = rundir.read_json(run.evaluation(2)) | {"wer": 0.1}
    rundir.write_json(run.evaluation(2), better)
    run.evaluation(4).unlink()
    assert report.averaged_steps(run, "best:2") == [2, 6]
    with pytest.raises(NotFoundError, match=r"has 2 checkpoints that are sealed and evaluated, .* needs 3 .*2, 6"):
        report.averaged_steps(run, "best:3")
    with pytest.raises(NotFoundError, match="has 3 checkpoints that are sealed, --average last:4 needs 4") as caught:
        report.averaged_steps(run, "last:4")
    assert "last:3" in caught.value.hint and "checkpoint.keep_last: 4" in caught.value.hint
    for odd in ("last", "last:", "last:0", "last:-1", "first:2", "best:two", "5", "last:²"):
        with pytest.raises(UsageError, match="is not understood"):
            report.averaged_steps(run, odd)
    with pytest.raises(NotFoundError, match=r"has 0 checkpoints .* \(steps none\)"):
        report.averaged_steps(made_run(tmp_path / "new", "created"), "last:2")


def test_whose_weights_a_command_takes(tmp_path: Path) -> None:
    """Of a run with a moving average that, which its WERs are of, by any name of the checkpoint; the weights themselves
    when they are asked for, and then the result has another name."""
    plain, averaging = made_run(tmp_path / "plain", "finished"), made_run(tmp_path / "averaging", "finished")
    averaging.resolved.write_text(RECIPE.replace("learning_rate: 1e-3", "learning_rate: 1e-3, ema: 0.999"))
    assert "ema" in averaging.resolved.read_text()
    assert arguments.chosen(plain, "best", None) == (["--step", "6"], "step-00000006")
    assert arguments.chosen(plain, "2", "none") == (["--step", "2"], "step-00000002")
    assert arguments.chosen(averaging, "last", None) == (["--step", "6", "--ema"], "step-00000006")
    assert arguments.chosen(averaging, "2", "ema") == (["--step", "2", "--ema"], "step-00000002")
    assert arguments.chosen(averaging, "2", "none") == (["--step", "2"], "step-00000002.average-none")
    for run in (plain, averaging):
        of = ["--step", "4", "--step", "6"]
        assert arguments.chosen(run, "best", "last:2") == (of, "step-00000006.average-last-2")
        with pytest.raises(UsageError, match="takes the place of --checkpoint"):
            arguments.chosen(run, "2", "last:2")
    with pytest.raises(UsageError, match="keeps no moving average of its weights") as caught:
        arguments.chosen(plain, "best", "ema")
    assert "optimizer.ema" in caught.value.hint


# How it looks ---------------------------------------------------------------------------------------------------------


def test_the_shade_brightens_from_the_first_wer_to_the_best() -> None:
    assert purple(0.9, first=0.9, best=0.1) == "rgb(88,48,128)"
    assert purple(0.1, first=0.9, best=0.1) == "rgb(216,160,255)"
    assert purple(0.5, first=0.9, best=0.1) == "rgb(152,104,192)"
    assert purple(1.5, first=0.9, best=0.1) == "rgb(88,48,128)"
    assert purple(float("nan"), first=0.9, best=0.1) == purple(0.3, first=0.3, best=0.3) == "rgb(216,160,255)"


def test_quantities_carry_their_unit() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**30, 2**42)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "4.0 TiB",
    ]
    assert (counted(1, "rank"), counted(2, "rank"), counted(0, "step")) == ("1 rank", "2 ranks", "0 steps")


SHOW = """
import sys
from launcher import ui, views
ui.say("progress " + "x" * 300, style="bold red")
ui.error("error: " + "y" * 300 + "\\x1b[31m\\n\\nhint: z")
ui.answer("answer [bold]" + "w" * 300 + "   ", style="bold")
views.curve([{"step": 1, "wer": 0.0, "substitutions": 0, "insertions": 0, "deletions": 0, "words": 9, "loss": 1.0}])
"""


def show(**env: str) -> tuple[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env={**plain, **env}, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stdout, done.stderr


def test_in_a_pipe_there_are_lines_and_nothing_else() -> None:
    for env in ({"COLUMNS": "80"}, {"COLUMNS": "80", "TERM": "xterm-256color"}):
        stdout, stderr = show(**env)
        assert stderr == "progress " + "x" * 300 + "\nerror: " + "y" * 300 + "\\x1b[31m\n\nhint: z\n"
        assert stdout.splitlines()[0] == "answer [bold]" + "w" * 300
        assert not [line for line in stdout.splitlines() if line != line.rstrip()]
        assert "\x1b" not in stdout


def test_colour_only_where_it_is_wanted() -> None:
    """On a terminal; and there NO_COLOR leaves nothing but the text."""
    coloured, plain = (in_a_terminal(**env) for env in ({}, {"NO_COLOR": "1"}))
    assert "\x1b[1;31merror: " in coloured or "\x1b[31;1merror: " in coloured
    assert "\x1b" not in plain
    assert "error: yyy" in plain


def in_a_terminal(**env: str) -> str:
    """What `SHOW` writes when stdout and stderr are a terminal."""
    main, other = os.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    variables = {**inherited, "TERM": "xterm-256color", **env}
    with subprocess.Popen([sys.executable, "-c", SHOW], env=variables, stdout=other, stderr=other) as process:
        os.close(other)
        pieces = []
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            pieces.append(piece)
        assert process.wait(20) == 0
    os.close(main)
    return b"".join(pieces).decode()


def test_checkpoints_that_are_gone_are_not_yet_to_come(tmp_path: Path) -> None:
    """After `rm -r checkpoints` the status read "none yet", and an export that none was sealed yet."""
    assert report.read(made_run(tmp_path / "new", "created")).none_sealed == "yet"
    run = made_run(tmp_path / "run", "interrupted")
    (newest,) = run.sealed_steps()[-1:]
    rundir.append_line(run.attempts()[-1].events, {"event": "sealed", "step": newest, "time": 300.0})
    shutil.rmtree(run.checkpoints)
    assert report.read(run).none_sealed == f"any more: step {newest} was"
    with pytest.raises(NotFoundError, match=f"no sealed checkpoint any more: step {newest} was"):
        report.sealed_step(run, "last")
