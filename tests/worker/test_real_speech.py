"""Real speech and real weights: Whisper tiny.en on an excerpt of LibriSpeech, by the commands a user types.

Needs SPEECHCTL_TEST_DATA: a directory with `data/LibriSpeech` and `backbones/whisper-tiny.en` (Hugging Face layout).
Takes about two minutes on two cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.rundir import Run, read_json, read_lines
from tests.worker.runs import events, speechctl

DATA = Path(os.environ.get("SPEECHCTL_TEST_DATA", ""))
RECIPE = Path(__file__).parents[2] / "recipes" / "whisper-tiny-en-sample.yaml"

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        "SPEECHCTL_TEST_DATA" not in os.environ,
        reason="needs SPEECHCTL_TEST_DATA, a directory with data/LibriSpeech and backbones/whisper-tiny.en",
    ),
]


def test_whisper_from_zero_shot_to_transcripts(tmp_path: Path) -> None:
    """The shipped recipe, shortened: 11 utterances to evaluate on, 10 steps.

    Zero-shot, transformers' own greedy generation has 3 errors in the 198 words of dev-clean's excerpt. What the
    export hears is what the training process wrote for that step, letter by letter.
    """
    corpus = DATA / "data" / "LibriSpeech"
    values = {
        "data.corpus": corpus,
        "backbone.source": DATA / "backbones" / "whisper-tiny.en",
        "evaluate.subsets": "[dev-clean]",
        "max_steps": 10,
    }
    options = [x for key, value in values.items() for x in ("--set", f"{key}={value}")]
    for verb in ("pack", "launch"):
        done = speechctl(verb, str(RECIPE), *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "runs" / "whisper-tiny-en-sample")
    zero_shot, trained = (read_json(run.evaluation(step)) for step in (0, 10))
    assert (zero_shot["words"], zero_shot["utterances"], zero_shot["truncated"]) == (198, 11, 0)
    assert zero_shot["errors"] == 3
    assert trained["loss"] < 0.8 * zero_shot["loss"]
    assert trained["errors"] <= zero_shot["errors"] + 2
    assert [e["step"] for e in events(run.attempts()[0], "sealed")] == [10]

    export = tmp_path / "export"
    done = speechctl("export", str(run.root), str(export), "--checkpoint", "last", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{export}\n", "")
    rows = read_lines(run.hypotheses(10))[:8]
    files = [next((corpus / "dev-clean").rglob(f"{row['utt_id']}.flac")) for row in rows]
    done = speechctl("transcribe", str(export), *map(str, files), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{file}\t{row['text']}" for file, row in zip(files, rows, strict=True)]
