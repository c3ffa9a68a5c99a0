"""The demo's backbone: shapes, padding, casting, randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.worker.tiny_ctc import TinyCtc


def build(dropout: float = 0.0) -> TinyCtc:
    torch.manual_seed(1)
    return TinyCtc(vocabulary_size=32, hidden=16, layers=2, dropout=dropout)


SPANS = torch.tensor([[3, 20], [0, 0]]), torch.tensor([[0, 5], [70, 80]])


def speech(*n_samples: int) -> tuple[Tensor, Tensor]:
    """Noise of the given lengths, zero-padded to the longest."""
    batch = torch.zeros(len(n_samples), max(n_samples))
    for i, n in enumerate(n_samples):
        batch[i, :n] = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.1
    return batch, torch.tensor(n_samples)


@pytest.mark.parametrize("n_samples", [1, 399, 400, 559, 560, 719, 720, 1039, 1040, 16_000, 47_777])
def test_frames_says_what_forward_returns(n_samples: int) -> None:
    logits, frames = build()(*speech(n_samples))
    assert frames.tolist() == TinyCtc.frames(np.array([n_samples])).tolist()
    assert logits.shape == (1, int(frames), 32)


def test_a_second_has_25_frames() -> None:
    assert TinyCtc.frames(np.array([16_000])).tolist() == [25]


@pytest.mark.parametrize("n_samples", [300, 7_000, 7_123, 16_000])
@pytest.mark.parametrize("training", [False, True])
def test_result_does_not_depend_on_padding(n_samples: int, training: bool) -> None:
    model = build().train(training)
    alone, lengths = speech(n_samples)
    batched, both_lengths = speech(n_samples, 48_321)
    expected, frames = model(alone, lengths)
    found, both_frames = model(batched, both_lengths)
    assert both_frames[0] == frames[0]
    torch.testing.assert_close(found[0, : frames[0]], expected[0, : frames[0]], atol=1e-4, rtol=0)


def test_loudness_does_not_matter() -> None:
    model = build().eval()
    waveforms, lengths = speech(16_000)
    torch.testing.assert_close(model(waveforms, lengths)[0], model(waveforms * 0.5, lengths)[0], atol=0.05, rtol=0)


def test_digital_silence_is_finite() -> None:
    logits, _ = build()(torch.zeros(2, 16_000), torch.tensor([16_000, 8_000]))
    assert logits.isfinite().all()


def test_gradient_reaches_every_parameter() -> None:
    model = build(dropout=0.1).train()
    model(*speech(16_000, 9_000), SPANS)[0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_features_stay_fp32_when_the_model_is_cast() -> None:
    model = build().eval()
    waveforms, lengths = speech(16_000)
    wanted, _ = model(waveforms, lengths)
    found, _ = model.to(torch.bfloat16)(waveforms, lengths)
    assert found.dtype == torch.bfloat16
    assert list(model.buffers()) == []  # a filterbank rounded to bf16 would shift every feature
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)


def test_autocast_does_not_reach_the_features() -> None:
    model = build().eval()
    waveforms, lengths = speech(16_000)
    wanted, _ = model(waveforms, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = model(waveforms, lengths)
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)


def test_training_after_inference_mode() -> None:
    """The filterbank is shared by all models of a process; one made in inference mode must serve training too."""
    from launcher.worker import tiny_ctc

    tiny_ctc._mel.cache_clear()
    model = build()
    with torch.inference_mode():
        model(*speech(8_000))
    model.train()(*speech(8_000))[0].sum().backward()


def test_spans_are_hidden_in_training_only() -> None:
    """What lies in them is not heard: other sound there gives the same logits."""
    model = build().train()
    waveforms, lengths = speech(16_000, 16_000)
    spans = (torch.tensor([[20, 60], [0, 0]]), torch.tensor([[0, 0], [0, 80]]))
    hidden = model(waveforms, lengths, spans)[0]
    plain = model(waveforms, lengths)[0]
    assert not torch.equal(hidden, plain)
    assert torch.allclose(hidden[1], model(torch.zeros_like(waveforms), lengths)[0][1], atol=2e-3), "all of its bands"
    model.eval()
    assert torch.equal(model(waveforms, lengths, spans)[0], model(waveforms, lengths)[0])
