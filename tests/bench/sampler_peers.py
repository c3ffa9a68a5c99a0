"""Other toolkits' batches of the same utterances; run by `tests.bench.sampler` in an environment of their own.

    python tests/bench/sampler_peers.py SECONDS.npy BUDGET RANKS NAME

Prints one JSON object: the batches of each rank as lists of positions, and the CPU seconds that one rank took for them.
What a peer needs before it can begin (a manifest, a dataset object) is made outside of the clock.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from launcher.worker import shims

Batches = list[list[int]]


def timed(work: Callable[[], Iterable[Any]]) -> tuple[list[Any], float]:
    began = time.process_time()
    made = list(work())
    return made, time.process_time() - began


def lhotse(seconds: list[float], budget: float, ranks: int) -> tuple[list[Batches], float]:
    """DynamicBucketingSampler with its 30 buckets, made by every rank for itself."""
    from lhotse import CutSet, MonoCut, Recording
    from lhotse.dataset import DynamicBucketingSampler

    def recording(name: str, s: float) -> Recording:
        return Recording(id=name, sources=[], sampling_rate=16000, num_samples=round(s * 16000), duration=s)

    cuts = CutSet.from_cuts(
        MonoCut(id=str(i), start=0, duration=s, channel=0, recording=recording(str(i), s))
        for i, s in enumerate(seconds)
    ).to_eager()
    made: list[Batches] = []
    cpu_s = 0.0
    # Of the large set, one rank: each draws the batches of all.
    for rank in range(ranks if len(seconds) < 100_000 else 1):
        sampler = DynamicBucketingSampler(
            cuts, max_duration=budget, num_buckets=30, shuffle=True, seed=1, world_size=ranks, rank=rank
        )
        batches, cpu_s = timed(lambda sampler=sampler: sampler)  # type: ignore[misc]
        made.append([[int(cut.id) for cut in batch] for batch in batches])
    return made, cpu_s


def speechbrain(seconds: list[float], budget: float, ranks: int) -> tuple[list[Batches], float]:
    """DynamicBatchSampler with 200 buckets, which pad least of those it was tried with; ranks take turns at batches, as
    its DistributedSamplerWrapper has them."""
    shims.apply()
    from speechbrain.dataio.sampler import DynamicBatchSampler

    batches, cpu_s = timed(
        lambda: DynamicBatchSampler(
            seconds, max_batch_length=budget, num_buckets=200, lengths_list=seconds, shuffle=True, seed=1
        )
    )
    return [[list(map(int, b)) for b in batches[rank::ranks]] for rank in range(ranks)], cpu_s


def huggingface(seconds: list[float], budget: float, ranks: int) -> tuple[list[Batches], float]:
    """The Trainer's length grouping: batches of one count, here as many utterances of mean length as fit; Accelerate
    has the ranks take turns at them."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    count = int(budget / (sum(seconds) / len(seconds)))
    lengths = [round(s * 16000) for s in seconds]
    generator = torch.Generator().manual_seed(1)
    order, cpu_s = timed(lambda: LengthGroupedSampler(count, lengths=lengths, generator=generator))
    batches = [list(map(int, order[i : i + count])) for i in range(0, len(order), count)]
    return [batches[rank::ranks] for rank in range(ranks)], cpu_s


def main() -> None:
    path, budget, ranks, name = sys.argv[1:]
    seconds = np.load(path).tolist()
    made, cpu_s = {"lhotse": lhotse, "speechbrain": speechbrain, "huggingface": huggingface}[name](
        seconds, float(budget), int(ranks)
    )
    print(json.dumps({"cpu_s": cpu_s, "ranks": made}))


if __name__ == "__main__":
    main()
