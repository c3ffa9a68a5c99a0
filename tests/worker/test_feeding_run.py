"""Two ranks that train on shards from elsewhere, and on damaged ones: what is fetched, what is left, what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.rundir import Run, read_json, read_lines
from launcher.worker import pack
from tests.conftest import make_corpus
from tests.worker.runs import events, speechctl, trained_on

pytestmark = pytest.mark.ranks

RECIPE = """\
name: fed
launch: {{processes: 2, device: cpu}}
data:
  corpus: {root}/LibriSpeech
  packs: {root}/{packs}
  train: [train-clean-100]
  weights: {{train-clean-100: 2}}
backbone: {{kind: tiny-ctc, hidden: 16, layers: 1}}
zero_stage: off
max_steps: 9
batch: {{step_seconds: 6s, max_rank_seconds: 3s, padded_lengths: 3}}
feed: {{threads: 3, cache: {root}/node}}
augment: {{speed: [0.9, 1.0, 1.1]}}
optimizer: {{learning_rate: 1e-3}}
evaluate: {{subsets: [dev-clean], at_end: false}}
checkpoint: {{every_steps: 100}}
"""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_shards_from_elsewhere_and_damaged_ones(tmp_path: Path) -> None:
    """The run whose shards are fetched trains on the very numbers of one that has them, and its cache is gone
    afterwards; one flipped bit ends a run with exit 5 and the shard's name."""
    root = tmp_path
    make_corpus(root / "LibriSpeech")
    for subset in ("train-clean-100", "dev-clean"):
        pack.write_pack(root / "LibriSpeech", subset, root / "whole packs" / subset, 60_000, 1, lambda line: None)
    (root / "near.yaml").write_text(RECIPE.format(root=root, packs="whole packs"))
    (root / "far.yaml").write_text(RECIPE.format(root=root, packs="small"))
    far = [str(root / "far.yaml"), "--set", f"data.remote={(root / 'whole packs').as_uri()}"]

    done = speechctl("launch", *far, cwd=root)
    assert done.returncode == 5 and "the pack " in done.stderr and "does not exist" in done.stderr
    done = speechctl("pack", *far, cwd=root)
    assert done.returncode == 0, done.stderr
    assert not list((root / "small").rglob("*.mds"))
    done = speechctl("launch", *far, "--set", "run_dir=runs/far", "--set", "feed.threads=1", cwd=root)
    assert done.returncode == 0, done.stderr
    done = speechctl("launch", str(root / "near.yaml"), "--set", "run_dir=runs/near", cwd=root)
    assert done.returncode == 0, done.stderr
    near, fetched = Run(root / "runs" / "near"), Run(root / "runs" / "far")
    assert trained_on(near) == trained_on(fetched)
    losses = [[row["loss"] for row in read_lines(run.attempts()[0].metrics)] for run in (near, fetched)]
    assert losses[0] == losses[1], "from one thread or three, from here or elsewhere"
    assert (fetched.attempts()[0].root / "shards-000").is_file(), "shards were fetched"
    assert list((root / "node").iterdir()) == []
    items = events(near.attempts()[0], "started")[0]["utterances"]
    assert items == 2 * len({i.partition("#")[0] for ids in trained_on(near).values() for i in ids})
    done = speechctl("audit", "runs/near", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr

    shard = sorted((root / "whole packs" / "train-clean-100").glob("*.mds"))[1]
    flip(shard)
    changes = ["--set", "run_dir=runs/bad", "--set", "max_steps=5000"]
    done = speechctl("launch", str(root / "near.yaml"), *changes, cwd=root)
    assert done.returncode == 5, done.stderr
    assert shard.name in done.stderr, done.stderr
    assert read_json(Run(root / "runs" / "bad").attempts()[0].failure)["kind"] == "data"
