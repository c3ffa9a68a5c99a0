"""A run is its user's alone: nobody else can write into one, and one that others could have written is not loaded."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from launcher.errors import ExitCode, UsageError
from launcher.ownership import refuse_foreign
from tests.conftest import Stub, made_run


def test_a_run_is_closed_to_others_also_where_a_group_shares_its_files(stub: Stub) -> None:
    """Under umask 0 every directory of an attempt could be written by anybody, once the run was opened for reading."""
    stub.behave("train 10", "train 10")
    command = ["sh", "-c", 'umask 0; exec "$@"', "sh", *stub.command, "launch", "stub.yaml"]
    done = subprocess.run(command, cwd=stub.root, env=stub.env, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.FINISHED, done.stderr
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (stub.run.root, *stub.run.root.rglob("*"))}
    assert modes[stub.run.root] == 0o700
    (attempt,) = stub.run.attempts()
    assert modes[attempt.env] == modes[attempt.rendezvous] == 0o600
    made_by_stub = {attempt.root / "torchrun.json"}
    assert [str(path) for path, mode in modes.items() if mode & 0o022 and path not in made_by_stub] == []
    assert len(modes) > 25
    refuse_foreign(stub.run)


@pytest.mark.parametrize("which", ["", "attempts", "checkpoints"])
@pytest.mark.parametrize("mode", [0o775, 0o1777])
def test_what_others_may_write_is_refused(tmp_path: Path, which: str, mode: int) -> None:
    run = made_run(tmp_path / "run", "stopped")
    refuse_foreign(run)
    (run.root / which).chmod(mode)
    with pytest.raises(UsageError, match=f"others may write to {run.root / which}.*mode {mode:04o}") as caught:
        refuse_foreign(run)
    assert caught.value.hint == f"if nobody has, `chmod -R go-w {run.root}`"
    (run.root / which).chmod(0o755)
    refuse_foreign(run)


@pytest.mark.parametrize("which", ["", "weights", "MANIFEST.json"])
def test_a_checkpoint_that_others_may_write_is_refused(tmp_path: Path, which: str) -> None:
    """Only the directory of all was looked at. Who may write a checkpoint may write its manifest, too, or a file in the
    place of one that was hashed before."""
    run = made_run(tmp_path / "run", "stopped")
    path = run.checkpoint(run.sealed_steps()[0]) / which
    path.touch()
    path.chmod(0o666 | path.stat().st_mode & 0o111)
    with pytest.raises(UsageError, match=f"others may write to {path} "):
        refuse_foreign(run)
    path.chmod(0o700)
    refuse_foreign(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
@pytest.mark.parametrize("which", ["", "checkpoints"])
def test_what_belongs_to_another_is_refused(tmp_path: Path, which: str) -> None:
    run = made_run(tmp_path / "run", "stopped")
    os.chown(run.root / which, 4321, 0)
    with pytest.raises(UsageError, match=f"{run.root / which} belongs to user 4321"):
        refuse_foreign(run)
    assert list(run.root.glob("tmp*")) == [], "the probe has no name"


@pytest.mark.parametrize("command", ["resume", "evaluate", "export"])
def test_each_command_that_loads_a_checkpoint_looks(stub: Stub, command: str) -> None:
    run = made_run(stub.run.root, "stopped")
    run.checkpoints.chmod(0o777)
    done = stub.speechctl(command, str(run.root))
    assert done.returncode == ExitCode.USAGE
    assert f"error: others may write to {run.checkpoints} (mode 0777)" in done.stderr
