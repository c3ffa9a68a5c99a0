"""`export`, with the real model: sealed or absent, and its checkpoint stays while it reads."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher import recipe_file, sealed, sealing, staging
from launcher.committer import Committer, File
from launcher.errors import ExitCode
from launcher.retention import Rules
from launcher.rundir import Run
from launcher.worker import __main__ as worker
from launcher.worker.models import build
from tests.conftest import RECIPE, count
from tests.disks import mounted
from tests.saving import Alone, new_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With a sealed checkpoint of a model of some MiB at step 3."""
    made = new_run(tmp_path / "run")
    made.resolved.write_text(RECIPE.replace("kind: tiny-ctc", "kind: tiny-ctc, hidden: 256, layers: 1"))
    recipe = recipe_file.load(made.resolved)
    saved = io.BytesIO()
    torch.save({"model": build(recipe.backbone, seed=5).state_dict()}, saved)
    file = File("accelerate.pt", len(saved.getvalue()), lambda sink: sink.write(saved.getvalue()))
    committer = Committer(made.attempts()[-1], Alone(), Rules())
    assert not committer.save(3, [file], {"identity": {"zero_stage": "off"}}).error
    return made


def export(run: Run, target: Path) -> int:
    return worker.main(["export", str(run.root), "--step", "3", "--target", str(target)])


DRIVER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from launcher import rundir, sealed
from launcher.worker import __main__ as worker, models, weights
from launcher.rundir import Run

run, folder = Run(sys.argv[1]), Path(sys.argv[2])

def kill(before=None):
    def do(*arguments, **more):
        if before is not None:
            before(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    return do

def rename(source, target, kept=os.rename):
    if Path(target).name != "x":
        return kept(source, target)
    if when == "after the rename":
        kept(source, target)
    os.kill(os.getpid(), signal.SIGKILL)

for when in ("before the weights", "after the weights", "at an fsync", "at the manifest", "before the rename",
             "after the rename", "while it reads", "never"):
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        if when == "before the weights":
            models.write_export = kill()
        if when == "after the weights":
            models.write_export = kill(models.write_export)
        if when == "at an fsync":
            rundir.sync_file = kill(rundir.sync_file)
        if when == "at the manifest":
            rundir.write_json = kill()
        if "rename" in when:
            os.rename = rename
        if when == "while it reads":
            def restored(*arguments, kept=weights.restored, **options):
                os.write(2, b"leased" if not sealed.remove(run, 3) else b"removed")
                return kept(*arguments, **options)
            weights.restored = restored
        os._exit(worker.main(["export", str(run.root), "--step", "3", "--target", str(folder / when / "x")]))
    print(when, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sep="\\t", flush=True)
"""


def test_killed_at_any_moment_it_is_whole_or_absent(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(run.root), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    ended = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(ended) == 8, done.stderr[-3000:]
    for when, code in ended.items():
        target = tmp_path / "out" / when / "x"
        fine = when in ("never", "while it reads")
        assert int(code) == (0 if fine else -signal.SIGKILL), (when, done.stderr[-3000:])
        assert target.exists() == (fine or when == "after the rename"), when
        if target.exists():
            manifest = sealing.verify(target)
            assert manifest["source"] == {
                "run": str(run.root),
                "step": 3,
                "checkpoint": sealing.manifest_of(run.checkpoint(3))["digest"],
                "weights": "trained",
            }
    assert "leased" in done.stderr and "removed" not in done.stderr
    # The next one removes what is left of a killed one.
    target = tmp_path / "out" / "at the manifest" / "x"
    assert (target.parent / ".x.partial" / "model.safetensors").exists()
    assert export(run, target) == 0
    assert [p.name for p in target.parent.iterdir()] == ["x"]
    never = tmp_path / "out" / "never" / "x" / "model.safetensors"
    assert (target / "model.safetensors").read_bytes() == never.read_bytes()
    count("kills of an export", 6)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for room first; and where the room is gone when it is needed, what safetensors says is understood."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        assert export(run, disk / "x") == ExitCode.STORAGE
        asked = capfd.readouterr().err
        own = staging.staged
        monkeypatch.setattr(staging, "staged", lambda target, need: own(target))
        assert export(run, disk / "x") == ExitCode.STORAGE
        for said in (asked, capfd.readouterr().err):
            assert f"cannot write {disk}/.x.partial: No space left on device" in said
        assert "1.0 MiB and" in asked and " MiB needed, " in asked
        assert list(disk.iterdir()) == []


def test_a_checkpoint_that_is_gone(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sealed.remove(run, 3)
    assert export(run, tmp_path / "x") == ExitCode.NOT_FOUND
    assert "step-00000003 is gone" in capfd.readouterr().err
    assert not list(tmp_path.glob("*x*")) and json.loads(run.provenance.read_text())
