"""CTC beam search with a word n-gram, on logits that are written by hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from launcher import recipe as schema
from launcher.errors import DataError, NotFoundError, UsageError
from launcher.worker import vocabulary
from launcher.worker.backbone import SpeechModel
from launcher.worker.beam_search import BeamSearch, Options, words_of
from launcher.worker.tiny_ctc import TinyCtcModel
from launcher.worker.vocabulary import Letters

pytest.importorskip("flashlight.lib.text", reason="needs the extra `beam`: pip install 'speechctl[beam]'")

ARPA = """\
\\data\\
ngram 1=7
ngram 2=3

\\1-grams:
-1.0\t<unk>
-99\t<s>\t0
-1.0\t</s>
-0.6\tTHE\t0
-2.0\tBAT\t0
-0.6\tCAT\t0
-2.0\tnaïve\t0

\\2-grams:
-0.1\t<s> THE
-0.1\tTHE CAT
-0.2\tCAT </s>

\\end\\
"""


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "2-gram.arpa"
    path.write_text(ARPA)
    return path


def heard(text: str, doubtful: dict[int, tuple[str, float]]) -> torch.Tensor:
    """Logits of a frame for each letter and a blank behind it, (1, frames, letters); at some letters another one is
    nearly as likely."""
    logits = torch.full((1, 2 * len(text), len(vocabulary.LETTERS)), -8.0)
    for k, letter in enumerate(text.replace(" ", "|")):
        logits[0, 2 * k, vocabulary.LETTERS.index(letter)] = 8.0
        logits[0, 2 * k + 1, vocabulary.BLANK] = 8.0
        if k in doubtful:
            other, value = doubtful[k]
            logits[0, 2 * k, vocabulary.LETTERS.index(other)] = value
    return logits


def model() -> SpeechModel:
    return TinyCtcModel(schema.TinyCtc(kind="tiny-ctc", hidden=8, layers=1), Letters())


def test_the_n_gram_decides_where_the_sound_does_not(arpa: Path) -> None:
    """Greedily it is a BAT by a hair; after THE there is a CAT. Without a weight the sound alone decides."""
    logits = heard("THE BAT", {4: ("C", 7.9)})
    frames = torch.tensor([logits.shape[1]])
    assert Letters().decode(logits[0].argmax(-1).tolist()) == "THE BAT"
    assert BeamSearch(model(), Options(arpa)).decode(logits, frames) == ["THE CAT"]
    assert BeamSearch(model(), Options(arpa, lm_weight=0.0)).decode(logits, frames) == ["THE BAT"]


def test_what_lies_behind_the_sound_is_not_decoded(arpa: Path) -> None:
    logits = heard("THE CAT", {})
    short, whole = torch.tensor([6]), torch.tensor([logits.shape[1]])
    both = BeamSearch(model(), Options(arpa)).decode(logits.repeat(2, 1, 1), torch.cat([short, whole]))
    assert both == ["THE", "THE CAT"]


def test_words_of_an_arpa_file(arpa: Path, tmp_path: Path) -> None:
    """Those that CTC's letters can spell; also where the file is gzipped."""
    assert words_of(arpa, Letters()) == ["THE", "BAT", "CAT"]
    packed = tmp_path / "2-gram.arpa.gz"
    packed.write_bytes(gzip.compress(ARPA.encode()))
    assert words_of(packed, Letters()) == ["THE", "BAT", "CAT"]


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        words_of(tmp_path / "none.arpa", Letters())
    (tmp_path / "lower.arpa").write_text(ARPA.lower())
    with pytest.raises(DataError, match="no unigram that the model can spell"):
        words_of(tmp_path / "lower.arpa", Letters())
    (tmp_path / "binary.arpa").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="is no ARPA file"):
        words_of(tmp_path / "binary.arpa", Letters())
    (tmp_path / "text.arpa").write_text("not an n-gram\n")
    with pytest.raises(DataError, match=r"is no ARPA file: it has no line \\1-grams:"):
        words_of(tmp_path / "text.arpa", Letters())
    (tmp_path / "words.arpa").write_text("\\1-grams:\nTHE\n")
    with pytest.raises(DataError, match="is no ARPA file: among its unigrams is a line of one word, 'THE'"):
        words_of(tmp_path / "words.arpa", Letters())


@pytest.mark.parametrize(
    "text",
    [
        ARPA.partition("\\2-grams:")[0],
        ARPA.partition("\\2-grams:")[0].replace("ngram 2=3\n", "") + "\\end\\\n",
        ARPA.replace("ngram 1=7", "ngram 1=9"),
    ],
    ids=["cut short", "single words", "wrong counts"],
)
def test_what_kenlm_cannot_load_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "cut.arpa").write_text(text)
    with pytest.raises(DataError, match=r"cut\.arpa cannot be used as an n-gram: [^\n]+$"):
        BeamSearch(model(), Options(tmp_path / "cut.arpa"))


def test_a_model_with_a_decoder_of_its_own_is_refused(arpa: Path) -> None:
    class Other(SpeechModel):
        collate = forward = padded_samples = export = parts = None  # type: ignore[assignment]

    with pytest.raises(UsageError, match="is for CTC models"):
        BeamSearch(Other(), Options(arpa))
