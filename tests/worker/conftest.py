"""A corpus small enough to be made anew for every test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

CHAPTERS = {
    "dev-clean": {(84, 121): 3, (174, 50): 2},
    "train-clean-100": {(19, 198): 4, (19, 227): 3, (26, 495): 3, (103, 1240): 2},
}
"""Utterances by subset, speaker and chapter."""

SENTENCES = (
    "HELLO WORLD",
    "THE CAT SAT ON THE MAT",
    "A",
    "IT'S NEVER TOO LATE",
    "SPEECH IS SILVER BUT SILENCE IS GOLDEN",
)


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """The root of a LibriSpeech tree: 5 utterances in dev-clean, 12 in train-clean-100; noisy tones, 0.3 to 1.5 s."""
    root = tmp_path / "LibriSpeech"
    random = np.random.default_rng(7)
    for subset, chapters in CHAPTERS.items():
        for (speaker, chapter), count in chapters.items():
            folder = root / subset / str(speaker) / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for i in range(count):
                utt_id = f"{speaker}-{chapter}-{i:04d}"
                n_samples = int(random.integers(4800, 24000))
                tone = np.sin(2 * np.pi * (100 + speaker) * np.arange(n_samples) / 16000)
                sound = 0.3 * tone + 0.02 * random.standard_normal(n_samples)
                soundfile.write(folder / f"{utt_id}.flac", sound, 16000, subtype="PCM_16")
                lines.append(f"{utt_id} {SENTENCES[(speaker + i) % len(SENTENCES)]}\n")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return root
