"""The power is cut while two real ranks save: with our checkpoints, and with DeepSpeed's own `save_checkpoint`.

SPEECHCTL_TEST_COUNT: so many cuts, over ZeRO 1, 2 and 3, instead of a few at one of them; half of them at once, half
after 7 s, when the journal has had time to write the names of what is not there. In the short form ext4 commits its
journal every second instead of every five, and 2 s do. The same on the committer alone: tests/test_commit_disks.py.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash

from launcher import audit, rundir
from launcher.rundir import Attempt, Run
from tests.conftest import count, seed
from tests.disks import cut, mounted, new_image, only_root
from tests.test_commit_kills import points
from tests.worker import worlds
from tests.worker.harm import Harm, inject, log_calls, traced_here
from tests.worker.runs import numbers, state_digest, trained_on
from tests.worker.undisturbed import EVERY, Undisturbed, said, whole

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")
STAGES = ["1", "2", "3"]
LATER_S = 7.0 if TRIALS else 2.0
JOURNAL = "loop,commit=5" if TRIALS else "loop,commit=1"
CALLS = ("mkdir", "openat", "write", "close", "fsync", "rename", "unlink", "unlinkat", "rmdir")
"""Those that change what is on the disk, and what is around them."""
STEPS = EVERY * (4 + -(-int(TRIALS or 9) // 3))

pytestmark = [
    pytest.mark.ranks,
    only_root,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
    pytest.mark.timeout(3600 if TRIALS else 600),
]


def moments(calls: Counter[str], n: int, own_seed: int) -> list[tuple[str, int, float]]:
    """`n` times a call at which the save ends, and how long after that the power is cut. At the last of them the save
    has come to its end."""
    every = points(Counter({name: calls[name] for name in CALLS if calls[name]}), n, own_seed)
    random.Random(seed(own_seed)).shuffle(every)
    every[-2:] = [("kexec_load", 1)] * 2  # is never called
    return [(call, k, LATER_S * (trial % 2)) for trial, (call, k) in enumerate(every)]


@pytest.mark.parametrize("stage", STAGES if TRIALS else [random.Random(seed(5)).choice(STAGES)])
def test_a_power_cut_loses_nothing_that_was_sealed(undisturbed: Undisturbed, tmp_path: Path, stage: str) -> None:
    """One run on one disk, cut in one save after the other, goes on each time from what the cut has left, and ends as
    the undisturbed. The lines of sealed steps are there too."""
    n = len(range(STAGES.index(stage), int(TRIALS or 9), len(STAGES)))
    disk, image = tmp_path / "disk", new_image(tmp_path / "image", 32)
    sealed: set[int] = set()
    """Said to be, and not too old to be kept."""
    for trial, (call, k, wait_s) in enumerate(moments(undisturbed.calls(stage, STEPS, 0), n, 6)):
        with mounted(disk, "-o", JOURNAL, str(image)):
            run = Run(disk / "run")
            if trial == 0:
                run = undisturbed.prepare(run.root, stage, STEPS)
                rundir.sync_dir(disk)
            target = EVERY * (max(run.sealed_steps(), default=EVERY) // EVERY + 1)
            harm = Harm(target, 0, inject(call, "signal=KILL", k))
            worlds.train_until_killed(2, run.new_attempt(), harm, target + 1)
            sealed = {*run.sealed_steps(), *said(run)} if said(run) else sealed
            time.sleep(wait_s)
            after = cut(disk, image)
        image.unlink()
        after.rename(image)
        with mounted(disk, "-o", JOURNAL, str(image)):
            published = whole(run)
            when = f"{call} {k}, {wait_s} s later: {sealed} were sealed, and there are {published}"
            assert set(sorted(sealed)[-2:]) <= set(published), when
    with mounted(disk, "-o", JOURNAL, str(image)):
        worlds.train(2, [run.new_attempt()])
        expected = undisturbed.run(stage, STEPS)
        assert numbers(run) == numbers(expected)
        assert trained_on(run) == trained_on(expected)
        assert state_digest(run.checkpoint(STEPS)) == state_digest(expected.checkpoint(STEPS))
        assert audit.audit(run).discrepancies == []
    count("power cuts of two real ranks", n)


# DeepSpeed's own -----------------------------------------------------------------------------------------------------


def digest_of(engine: Any) -> str:
    """Of this rank's weights and moments."""
    hasher = xxhash.xxh3_128()
    moments = [s[k] for s in engine.optimizer.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    for tensor in [*engine.module.state_dict().values(), *moments]:
        hasher.update(tensor.detach().contiguous().flatten().numpy().tobytes())
    return hasher.hexdigest()


def by_deepspeed(attempt: str, folder: str, outside: str, steps: int, strace: tuple[str, ...]) -> None:
    """Train so many steps and have DeepSpeed save each, with its defaults; strace is on the last. Or load, where there
    are none to train. What came of it is left outside of the disk that is cut."""
    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from launcher.worker.data import ahead
    from launcher.worker.train import Training

    torch.set_num_threads(1)
    training = Training(Attempt(Path(attempt)), [False], fresh=False)
    rank, engine = training.ranks.rank, training.engine.engine  # type: ignore[attr-defined]
    engine.checkpoint_engine = TorchCheckpointEngine()
    with suppress(AttributeError):
        del engine._copy_recovery_script
    notes = Path(outside)
    if not steps:
        try:
            path, _ = engine.load_checkpoint(folder)
            loaded = {"tag": Path(path).parent.name if path else None, "digest": digest_of(engine) if path else None}
        except Exception as error:
            loaded = {"error": f"{type(error).__name__}: {error}"}
        rundir.write_json(notes / f"loaded-{rank}", loaded)
        training.ranks.barrier()
        return
    with suppress(FileNotFoundError):
        engine.load_checkpoint(folder)
    planned = training.begin_epoch()
    load = partial(training._load, training.progress.cursor.epoch)
    feed = ahead(load, [b for step in planned for b in step[rank::2]])
    for number in range(steps):
        training.one_step(planned[number % len(planned)], feed)
        tag = f"global_step{engine.global_steps}"
        rundir.write_json(notes / f"{tag}-{rank}", digest_of(engine))
        last = number == steps - 1 and rank == 0 and strace
        if last:
            with traced_here(*strace):
                engine.save_checkpoint(folder)
        else:
            engine.save_checkpoint(folder)
        if rank == 0:
            rundir.write_json(notes / "said", tag)
    training.ranks.barrier()


def test_the_same_with_what_deepspeed_saves(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Its `save_checkpoint` and `load_checkpoint` as they are, over the same cuts. It fsyncs nothing: what it said was
    saved is gone; and the harness can tell."""
    n = int(TRIALS or 2)
    disk, base = tmp_path / "disk", new_image(tmp_path / "base", 32)

    def scratch() -> str:
        return str(
            undisturbed.prepare(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", "2", STEPS).new_attempt().root
        )

    (first := tmp_path / "notes").mkdir()
    with mounted(disk, "-o", JOURNAL, str(base)):
        worlds.start(2, by_deepspeed, scratch(), str(disk / "saved"), str(first), 2, log_calls(tmp_path / "calls"))
        worlds.start(2, by_deepspeed, scratch(), str(disk / "saved"), str(first), 0, ())
    for rank in (0, 1):  # without a cut
        digest = rundir.read_json(first / f"global_step2-{rank}")
        assert rundir.read_json(first / f"loaded-{rank}") == {"tag": "global_step2", "digest": digest}
    calls = Counter(line.split("(")[0] for line in (tmp_path / "calls").read_text().splitlines() if "(" in line)
    came = Counter[str]()
    for trial, (call, k, wait_s) in enumerate(moments(calls, n, 7)):
        notes = Path(shutil.copytree(first, tmp_path / f"notes-{trial}"))
        (notes / "said").unlink()
        image = Path(shutil.copy(base, tmp_path / f"image-{trial}"))
        strace = inject(call, "signal=KILL", k)
        with mounted(disk, "-o", JOURNAL, str(image)):
            worlds.until_killed(2, by_deepspeed, scratch(), str(disk / "saved"), str(notes), 1, strace)
            time.sleep(wait_s)
            after = cut(disk, image)
        image.unlink()
        with mounted(disk, "-o", JOURNAL, str(after)):
            worlds.start(2, by_deepspeed, scratch(), str(disk / "saved"), str(notes), 0, ())
        after.unlink()
        saved = rundir.read_json(notes / "said")
        loaded = [rundir.read_json(notes / f"loaded-{rank}") for rank in (0, 1)]
        tag = loaded[0].get("tag")
        print(f"{call} {k}, {wait_s} s later: said {saved}; {loaded}")
        came["said saved"] += saved is not None
        came["said saved, and lost"] += saved is not None and tag != saved
        came["loads nothing, with an older one there"] += any("error" in one for one in loaded)
        came["begins at step 0"] += any(one.get("tag", "") is None for one in loaded)
        wanted = [rundir.read_json(notes / f"{tag}-{rank}") for rank in (0, 1)] if tag else []
        came["torn, and accepted"] += bool(tag) and [one.get("digest") for one in loaded] != wanted
    for what, times in came.items():
        count(f"DeepSpeed: {what}", times)
    assert came["said saved, and lost"] == came["said saved"] >= 2
    count("power cuts of DeepSpeed's own save", n)
