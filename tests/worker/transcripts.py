"""The verb `transcribe` in the process of the tests, and models for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher import recipe as schema
from launcher import sealing
from launcher.worker import __main__ as worker
from launcher.worker import vocabulary
from launcher.worker.backbone import CtcModel, IntArray, SpeechModel
from launcher.worker.data import Tensors
from launcher.worker.models import write_export


def transcribe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    code = worker.main(["transcribe", *map(str, arguments)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def exported(model: SpeechModel, folder: Path) -> Path:
    """What `speechctl export` leaves: sealed."""
    staged = folder.with_name(f"{folder.name}.staged")
    staged.mkdir()
    write_export(model, staged)
    sealing.seal(staged, folder, {"format": "speechctl.export/1"})
    return folder


class Ear(CtcModel):
    """Hears by itself in each frame of 20 ms the class that its loudness says: class i for a mean of i / 100."""

    HOP = 320

    def __init__(self, max_samples: int | None = None) -> None:
        super().__init__(vocabulary.Letters())
        self.backbone = schema.TinyCtc(kind="tiny-ctc")
        self.max_samples = max_samples
        self.heard: list[int] = []
        """Samples of each call."""

    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        self.heard.append(tensors["inputs"].shape[1])
        count = tensors["lengths"] // self.HOP
        frames = tensors["inputs"][:, : int(count.max()) * self.HOP].reshape(len(count), -1, self.HOP).mean(2)
        classes = (frames * 100).round().long().clamp(0, 31)
        return torch.nn.functional.one_hot(classes, 32).float(), count

    def frames(self, n_samples: IntArray) -> IntArray:
        return n_samples // self.HOP

    def parts(self) -> dict[str, list[str]]:
        return {}

    def export(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def say(cls, classes: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A waveform that has these in its frames."""
        return np.repeat(np.array(classes, dtype=np.float32) / 100, cls.HOP)
