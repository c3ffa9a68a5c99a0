"""What a person sees: whole transcripts in golden/cli, to be read aloud. They are the product.

The real command in a process of its own. Only paths, pids, times and host names are replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import ExitCode
from tests.conftest import RECIPE, Golden, made_run, wait_until
from tests.test_rundir import held

ROOT = Path(__file__).parent.parent
BEFORE, AFTER = ["recipe check", "prepare", "pack", "plan", "fit"], ["evaluate", "report", "export", "transcribe"]
CHECKPOINT = [f"checkpoint {word}" for word in ("ls", "verify", "prune", "pin", "unpin", "reshard")]
COMMANDS = [*BEFORE, "launch", "resume", "status", "why", "audit", "logs", "attach", "stop", *AFTER, *CHECKPOINT]

Transcript = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def speechctl(tmp_path: Path) -> Transcript:
    """`speechctl ARGUMENTS` in the test's own directory."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
        env = {**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "launcher.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)

    return run


def transcript(done: subprocess.CompletedProcess[str], tmp_path: Path) -> str:
    """Command, exit code, stdout and stderr as one text, the same on every machine."""
    text = f"$ {shlex.join(['speechctl', *done.args[3:]])}\n[exit {done.returncode}]\n"
    for name in ("stdout", "stderr"):
        if output := getattr(done, name):
            text += f"--- {name}\n{output}"
    text = text.replace(str(tmp_path), "TMP").replace(socket.gethostname(), "HOST")
    text = re.sub(r"pid \d+", "pid PID", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` with its content, and every directory."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"/" for p in sorted(root.rglob("*"))}


def compare(
    name: str, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> subprocess.CompletedProcess[str]:
    """Run one command and compare its transcript; it leaves the disk as it was."""
    before = tree(tmp_path)
    done = speechctl(*shlex.split(arguments))
    assert done.returncode == code, done.stderr
    golden(f"cli/{name}.txt", transcript(done, tmp_path))
    assert tree(tmp_path) == before
    assert not [line for line in (done.stdout + done.stderr).splitlines() if line != line.rstrip()]
    return done


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("version", "--version", 0),
        ("help", "--help", 0),
        ("nothing", "", 2),
        ("launch-help", "launch --help", 0),
        ("resume-help", "resume --help", 0),
        ("fit-help", "fit --help", 0),
        ("fit-bad-memory", "fit stub.yaml --memory plenty", 2),
        ("fit-bad-recipe", "fit bad.yaml", 2),
        ("unknown-command", "lauch x.yaml", 2),
        ("unknown-option", "status --jsn runs/stub", 2),
        ("missing-argument", "resume", 2),
        ("bad-number", "pack stub.yaml --processes 0", 2),
        ("launch-missing-file", "launch stbu.yaml", 2),
        ("recipe-check", "recipe check stub.yaml", 0),
        ("recipe-check-set", "recipe check stub.yaml --set max_steps=1k --set zero_stage=off", 0),
        ("recipe-check-bad", "recipe check bad.yaml", 2),
        ("launch-bad-set", "launch stub.yaml --set batch.step_second=9s", 2),
        ("resume-no-run", "resume nowhere", 6),
        ("status-no-run", "status nowhere", 6),
        ("stop-no-run", "stop nowhere", 6),
        ("attach-no-run", "attach nowhere", 6),
        ("logs-help", "logs --help", 0),
        ("logs-no-run", "logs nowhere", 6),
        ("why-no-run", "why nowhere", 6),
        ("launch-two-terminals", "launch stub.yaml --debug --detach", 2),
        ("evaluate-no-run", "evaluate nowhere", 6),
        ("export-no-run", "export nowhere", 6),
    ],
)
def test_commands(name: str, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "stub.yaml").write_text(RECIPE)
    bad = RECIPE.replace("processes: 2", "proceses: 2").replace("24s", "24 parsecs").replace("tiny-ctc", "tiny-cct")
    (tmp_path / "bad.yaml").write_text(bad)
    compare(name, arguments, code, speechctl, tmp_path, golden)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, speechctl: Transcript) -> None:
    done = speechctl(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: speechctl {command} ")
    assert "\nOptions:\n" in done.stdout and "\nArguments:\n" in done.stdout
    assert done.stderr == ""
    assert not [line for line in done.stdout.splitlines() if len(line) > 100 or line != line.rstrip()]


def test_no_command_is_left_out_here(speechctl: Transcript) -> None:
    listed = speechctl("--help").stdout.partition("Commands:\n")[2]
    names = {line.split()[0] for line in listed.splitlines() if re.match(r"  \S", line)}
    assert names == {command.split()[0] for command in COMMANDS}


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["created", "finished", "stopped", "failed", "interrupted"])
def test_status(state: str, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    made_run(tmp_path / "runs" / "stub", state)
    compare(f"status-{state}", "status runs/stub", 0, speechctl, tmp_path, golden)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("status-json", "status runs/stub --json", 0),
        ("launch-existing", "launch stub.yaml", 2),
        ("resume-finished", "resume runs/stub", 0),
        ("stop-finished", "stop runs/stub", 2),
        ("evaluate-no-checkpoint", "evaluate runs/stub --checkpoint 5", 6),
        ("evaluate-beam-without-lm", "evaluate runs/stub --lm-weight 1", 2),
        ("evaluate-no-number", "evaluate runs/stub --lm 4.arpa --lm-weight nan", 2),
        ("evaluate-odd-checkpoint", "evaluate runs/stub --checkpoint newest", 6),
        ("export-no-checkpoint", "export runs/stub --checkpoint 5", 6),
        ("export-existing", "export runs/stub elsewhere", 2),
    ],
)
def test_a_finished_run(
    name: str, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    run = made_run(tmp_path / "runs" / "stub", "finished")
    run.lock.touch()
    (tmp_path / "stub.yaml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    if name == "resume-finished":  # it takes the lock and says so in it
        done = speechctl(*arguments.split())
        assert done.returncode == code
        golden(f"cli/{name}.txt", transcript(done, tmp_path))
        return
    compare(name, arguments, code, speechctl, tmp_path, golden)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("export-nothing-sealed", "export runs/stub", 6),
        ("launch-in-the-way", "launch stub.yaml --set run_dir=elsewhere", 2),
    ],
)
def test_a_run_that_has_not_begun(
    name: str, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    made_run(tmp_path / "runs" / "stub", "created")
    (tmp_path / "stub.yaml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    compare(name, arguments, code, speechctl, tmp_path, golden)


@pytest.mark.parametrize("command", ["launch", "resume", "status"])
def test_a_run_that_is_in_use(command: str, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    run = made_run(tmp_path / "runs" / "stub", "stopped")
    (tmp_path / "stub.yaml").write_text(RECIPE)
    with held(run, "speechctl launch stub.yaml"):
        where = "stub.yaml" if command == "launch" else "runs/stub"
        code = ExitCode.FINISHED if command == "status" else ExitCode.USAGE
        compare(f"{command}-in-use", f"{command} {where}", code, speechctl, tmp_path, golden)


def test_stop_asks_and_waits(speechctl: Transcript, tmp_path: Path) -> None:
    run = made_run(tmp_path / "runs" / "stub", "stopped")
    with held(run, "speechctl launch stub.yaml") as holder:
        done = speechctl("stop", "runs/stub", "--no-wait")
        assert (done.returncode, done.stdout) == (0, f"{run.root}: asked to stop\n")
        assert run.stop_request.exists()
        run.stop_request.unlink()
        command = [sys.executable, "-m", "launcher.cli", "stop", str(run.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stop:
            wait_until(run.stop_request.exists)
            with pytest.raises(subprocess.TimeoutExpired):
                stop.wait(1)
            holder.kill()
            assert stop.communicate(timeout=10)[0] == f"{run.root}: stopped\n"


def test_an_answer_that_nobody_reads_ends_quietly(tmp_path: Path) -> None:
    made_run(tmp_path / "run", "finished")
    command = f"{sys.executable} -m launcher.cli status run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_a_terminal_that_knows_only_ascii_is_no_reason_to_fail(tmp_path: Path) -> None:
    made_run(tmp_path / "run", "finished")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "launcher.cli", "status", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "37.50%" in done.stdout


# Bad input, with the real worker: it starts torch, some seconds each --------------------------------------------------


def cut_short(corpus: Path) -> None:
    path = corpus / "train-clean-100" / "19" / "198" / "19-198-0001.flac"
    path.write_bytes(path.read_bytes()[:2000])


def orphans(corpus: Path) -> None:
    """A line without a file, and a file without a line."""
    chapter = corpus / "train-clean-100" / "19" / "198"
    (chapter / "19-198-0001.flac").unlink()
    transcript = chapter / "19-198.trans.txt"
    transcript.write_text("".join(transcript.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("name", "arguments", "code", "damage"),
    [
        ("pack-no-corpus", "pack stub.yaml", 5, shutil.rmtree),
        ("pack-cut-short", "pack stub.yaml", 5, cut_short),
        ("pack-orphans", "pack stub.yaml", 5, orphans),
        ("launch-no-packs", "launch stub.yaml", 5, None),
        ("launch-no-weights", "launch stub.yaml --set 'backbone={kind: wav2vec2, source: ./empty}'", 5, None),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(
    name: str,
    arguments: str,
    code: int,
    damage: Callable[[Path], None] | None,
    speechctl: Transcript,
    tiny_corpus: Path,
    tmp_path: Path,
    golden: Golden,
) -> None:
    (tmp_path / "stub.yaml").write_text(RECIPE.replace("corpus: corpus", f"corpus: {tiny_corpus.name}"))
    (tmp_path / "empty").mkdir()
    if damage is not None:
        damage(tiny_corpus)
    compare(name, arguments, code, speechctl, tmp_path, golden)
