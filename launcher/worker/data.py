"""Packs -> batches: which utterances there are, and the tensors of micro-batches, made ahead of the step."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from launcher.errors import DataError
from launcher.recipe import Recipe
from launcher.worker import shard_cache
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

    def __init__(self, packs: Sequence[Pack]) -> None:
        self.packs = list(packs)
        self.ends = np.cumsum([len(p) for p in self.packs])
        self.lengths = np.concatenate([np.asarray(p.lengths) for p in self.packs])
        """Structured array: n_samples, n_chars, ctc_frames."""

    @staticmethod
    def of(recipe: Recipe, subsets: Sequence[str]) -> Utterances:
        """Of these subsets of a recipe; where it has them elsewhere, their shards come to this node as they are needed.

        Raises:
            DataError: a pack is not there, or not what was sealed.
        """
        remote = recipe.data.remote
        if remote is None:
            return Utterances([open_pack(recipe.pack(s)) for s in subsets])
        cache = shard_cache.folder(recipe.feed.cache)
        return Utterances([open_pack(recipe.pack(s), remote=f"{remote.rstrip('/')}/{s}", cache=cache) for s in subsets])

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, index: int) -> tuple[Pack, int]:
        """Its pack, and its position there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.packs[number], index - (int(self.ends[number - 1]) if number else 0)

    def subset_of(self, index: int) -> str:
        return self.place(index)[0].path.name

    def row(self, index: int) -> dict[str, Any]:
        """The sample as it lies in the pack.

        Raises:
            DataError: as `Pack.sample`.
        """
        pack, position = self.place(index)
        return pack.sample(position)

    def example(self, index: int) -> Example:
        """Read and decode one utterance. Safe from several threads.

        Raises:
            DataError: the bytes in the pack do not decode to the samples that its lengths promise; names the shard.
        """
        pack, position = self.place(index)
        row, promised = pack.sample(position), int(self.lengths[index]["n_samples"])
        try:
            waveform, _ = soundfile.read(io.BytesIO(row["audio"]), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise pack.damaged(position, f"{row['utt_id']} does not decode: {error}") from error
        if waveform.shape != (promised,):
            raise pack.damaged(position, f"{row['utt_id']} has sound of shape {waveform.shape}, promised {promised}")
        return Example(row["utt_id"], waveform, row["text"])

    @property
    def digest(self) -> str:
        """Of all packs, from their manifests: what a checkpoint was trained on."""
        return "+".join(str(p.manifest["digest"]) for p in self.packs)


def pad(waveforms: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded waveforms (batch, samples) and their lengths (batch,)."""
    lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64)
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return padded, lengths


def pad_to(tensors: Tensors, n_samples: int) -> Tensors:
    """A micro-batch of sound, (batch, samples), with more zeros behind it. Others are as long as their model says."""
    inputs = tensors["inputs"]
    if inputs.ndim != 2 or inputs.shape[1] >= n_samples:
        return tensors
    return {**tensors, "inputs": torch.nn.functional.pad(inputs, (0, n_samples - inputs.shape[1]))}


def ahead(work: Callable[[T], R], items: Sequence[T], depth: int = 2, threads: int = 1) -> Generator[R, None, None]:
    """`map(work, items)`, computed by threads up to `depth` items ahead of the consumer.

    FLAC decoding and resampling release the GIL. Results come in the order of the items, whoever made them; `work`
    must not depend on when it is called. An error comes in its item's place.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="feed")
    todo = iter(items)
    try:
        pending = deque(pool.submit(work, item) for item in islice(todo, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(todo, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


class BackgroundCheck:
    """Reads and hashes shards in a thread, once, while training goes on.

    Whoever opens a shard first could do it: the hash takes a hundredth of the time that decoding takes. But batches are
    drawn from all shards, so that the first few steps would read the whole corpus. So every rank takes its share of the
    shards of all, and what is damaged ends the run minutes later instead.
    """

    def __init__(self, packs: Sequence[Pack], share: slice) -> None:
        self.todo = [(pack, shard) for pack in packs for shard in pack.shards][share]
        self.error: DataError | None = None
        self.thread = threading.Thread(target=self._go, name="check", daemon=True)
        self.thread.start()

    def _go(self) -> None:
        for pack, shard in self.todo:
            try:
                pack.check(shard)
            except DataError as error:
                self.error = error
                return

    def complain(self) -> None:
        """
        Raises:
            DataError: a shard was found damaged; names it.
        """
        if self.error is not None:
            raise self.error


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
