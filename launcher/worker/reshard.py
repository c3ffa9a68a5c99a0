"""A checkpoint of N ranks into a run of M: every rank takes its part of each parameter out of the files of all.

DeepSpeed's own way is its universal format: a second copy of everything on disk, made by a program of its own, pickles
again. It leaves out frozen parameters and buffers, says nothing of it, and restores Adam's count from whichever
parameter comes first. Nothing here is written: the files of the checkpoint, which all ranks have verified, are mapped
(`shards.py`), and what a rank needs of them goes straight into the engine, in the form in which DeepSpeed itself would
load a checkpoint of M ranks. So there is no half of anything when a rank dies, no space to run out of, and every rank
reads about as much as it keeps. At ZeRO 0 and without DeepSpeed nothing is cut up, and loading is the same at any
number of ranks.

Nothing is believed: each element of each parameter is counted, where it is read and where it goes, and a forward pass
of the loaded engine must give the loss that rank 0 computes with the checkpoint's weights by another way (DeepSpeed's
`zero_to_fp32`, and a model of its own). Where that pass does not see the fp32 weights, at ZeRO 1 and 2, these are
compared with those that it does see. That loss is computed here, not at the seal: a save would have to stop for a
forward pass of all ranks, and its loss would hold on that kind of device alone. What each rank draws at random goes on
exactly where it was only with the same number of ranks. Here every rank is seeded anew.
"""

from __future__ import annotations

import numpy as np
import xxhash

from launcher.errors import DataError
from launcher.marks import mark
from launcher.rundir import Run
from launcher.worker.backbone import SpeechModel
from launcher.worker.engine import Engine
from launcher.worker.ranks import Ranks
from launcher.worker.shards import HINT
from launcher.worker.weights import restored

TOLERANCE = 1e-5
"""Of the probe's losses, relative. Measured on a CPU: 0, in fp32 and in bf16; matrices of other shapes may round."""


def restore(engine: Engine, ranks: Ranks, run: Run, step: int, saved_by: int, identity: str) -> None:
    """Bring `engine`, by all ranks together, to a verified checkpoint of `saved_by` ranks, and seed the dice.

    Args:
        identity: the checkpoint's digest; the dice depend on it and on nothing of this attempt.

    Raises:
        DataError: on all ranks: it does not cover the model, or the loaded model hears something else.
    """
    engine.reshard(run.checkpoint(step), saved_by, ranks)
    mark("probe")
    check_probe(engine, ranks, run, step)
    seed_dice(identity, ranks)


def seed_dice(identity: str, ranks: Ranks) -> None:
    """Streams of their own for each rank, the same whenever this checkpoint goes on with this many ranks."""
    from accelerate.utils import set_seed

    set_seed(xxhash.xxh32_intdigest(f"{identity} {ranks.rank} of {ranks.world_size}"))


# The probe -----------------------------------------------------------------------------------------------------------


def check_probe(engine: Engine, ranks: Ranks, run: Run, step: int) -> None:
    """Raises DataError, on all ranks, where the engine's losses are not those of the checkpoint's weights."""
    after = losses(engine, engine.model)
    before: list[float] = []
    problem = ""
    if ranks.rank == 0:
        try:
            # Adapters apart, as the engine has them: merged and rounded to bf16 they are another sum.
            plain = restored(run, step, engine.model.backbone, seed=0, merged=False)
            plain = plain.to(engine.device, engine.weights_type)
            before = losses(engine, plain)
        except DataError as error:
            problem = error.message
    before, problem = ranks.gather((before, problem))[0]
    if problem:
        raise DataError(problem, hint=HINT)
    for rank, mine in enumerate(ranks.gather(after)):
        for a, b in zip(before, mine, strict=True):
            if not abs(a - b) <= TOLERANCE * max(1.0, abs(a)):
                raise DataError(
                    f"{run.checkpoint(step)}: loaded by {ranks.world_size} ranks, the model of rank {rank} has a loss"
                    f" of {b!r} on the probe, and its weights have {a!r}",
                    hint=HINT,
                )


def losses(engine: Engine, model: SpeechModel) -> list[float]:
    """Of three short noises, whatever the run's data. Under ZeRO 3 all ranks must compute together."""
    random = np.random.default_rng(7)
    waveforms = [0.1 * random.standard_normal(n).astype(np.float32) for n in (24_000, 16_000, 11_200)]
    tensors = engine.model.collate(waveforms, ["A PROBE", "OF", "A"])
    return [float(x) for x in engine.losses(tensors, model).double()]
