"""Packs -> batches: which utterances there are, and the tensors of one micro-batch, made one step ahead."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from launcher.errors import DataError
from launcher.worker.pack_reader import Pack, open_pack

Waveform = npt.NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance, decoded."""

    utt_id: str
    waveform: Waveform
    """Shape (n_samples,), 16 kHz, in -1 … 1."""
    text: str


class Utterances:
    """The utterances of several packs, one after the other, in pack order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.packs: list[Pack] = [open_pack(path) for path in paths]
        self.ends = np.cumsum([len(p) for p in self.packs])
        self.lengths = np.concatenate([np.asarray(p.lengths) for p in self.packs])
        """Structured array: n_samples, n_chars, ctc_frames."""

    def __len__(self) -> int:
        return len(self.lengths)

    def pack_of(self, index: int) -> Pack:
        return self.packs[int(np.searchsorted(self.ends, index, side="right"))]

    def subset_of(self, index: int) -> str:
        return self.pack_of(index).path.name

    def row(self, index: int) -> dict[str, Any]:
        """The sample as it lies in the pack."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.packs[number].sample(index - (int(self.ends[number - 1]) if number else 0))

    def example(self, index: int) -> Example:
        """Read and decode one utterance. Safe from several threads.

        Raises:
            DataError: the bytes in the pack do not decode to the samples that its lengths promise.
        """
        row, pack = self.row(index), self.pack_of(index)
        try:
            waveform, _ = soundfile.read(io.BytesIO(row["audio"]), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise _damaged(pack, row["utt_id"], str(error)) from error
        if len(waveform) != row["n_samples"]:
            raise _damaged(pack, row["utt_id"], f"{len(waveform)} samples instead of {row['n_samples']}")
        return Example(row["utt_id"], waveform, row["text"])

    @property
    def digest(self) -> str:
        """Of all packs, from their manifests: what a checkpoint was trained on."""
        return "+".join(str(p.manifest["digest"]) for p in self.packs)


def _damaged(pack: Pack, utt_id: str, what: str) -> DataError:
    return DataError(
        f"utterance {utt_id} in {pack.path} does not decode: {what}",
        hint="the pack was damaged after it was sealed; remove it and run `speechctl pack` again",
    )


def pad(waveforms: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded waveforms (batch, samples) and their lengths (batch,)."""
    lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64)
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return padded, lengths


def ahead(work: Callable[[T], R], items: Sequence[T], depth: int = 2) -> Generator[R, None, None]:
    """`map(work, items)`, computed by one thread up to `depth` items ahead of the consumer.

    FLAC decoding releases the GIL. One thread keeps the order; what is made does not depend on when it is made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        pending = [pool.submit(work, item) for item in items[:depth]]
        for i in range(len(items)):
            result = pending.pop(0).result()
            if i + depth < len(items):
                pending.append(pool.submit(work, items[i + depth]))
            yield result


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
