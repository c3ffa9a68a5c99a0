"""Real speech and real weights: Whisper tiny.en on an excerpt of LibriSpeech, by the commands a user types; and what it
hears in more than its window.

Needs SPEECHCTL_TEST_DATA: a directory with `data/LibriSpeech` and `backbones/whisper-tiny.en` (Hugging Face layout).
Takes about two minutes on two cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from launcher import recipe as schema
from launcher.rundir import Run, read_json, read_lines
from launcher.worker.models import build
from launcher.worker.recognize import recognize
from launcher.worker.score import normalizer, score
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


def test_a_recording_longer_than_the_window_is_heard_whole() -> None:
    """Five utterances in one, 34 s: the fifth is cut through by the end of the first window. No word is lost, and each
    sentence has the time at which it is spoken."""
    corpus = DATA / "data" / "LibriSpeech" / "dev-clean"
    said = dict(line.split(" ", 1) for path in corpus.rglob("*.trans.txt") for line in path.read_text().splitlines())
    pause = np.zeros(4_000, dtype=np.float32)
    files = sorted(corpus.rglob("*.flac"))[:5]
    pieces = [np.concatenate([soundfile.read(path, dtype="float32")[0], pause]) for path in files]
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1] / 16_000
    waveform = np.concatenate(pieces)
    source = str(DATA / "backbones" / "whisper-tiny.en")
    model = build(schema.Whisper(kind="whisper", source=source), seed=1).eval()
    heard = recognize(model, waveform, torch.device("cpu"), file="x", timed=True)
    assert heard.duration_s > 30
    normalize = normalizer("whisper-english")
    reference = " ".join(said[path.stem] for path in files)
    errors = score([(normalize(reference), normalize(heard.text))])
    assert errors["words"] > 90 and errors["deletions"] + errors["insertions"] <= 1 and errors["wer"] < 0.05, errors
    for start_s in starts:  # tiny.en writes whole seconds, mostly
        assert min(abs(segment.start_s - start_s) for segment in heard.segments) < 1
