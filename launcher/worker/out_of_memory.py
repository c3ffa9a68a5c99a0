"""Memory that ran out in training, with what it ran out on and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from launcher.errors import MemoryExhausted
from launcher.recipe import Recipe
from launcher.worker.data import Tensors
from launcher.worker.sampler import MicroBatch


@contextmanager
def memory_errors(what: str | Callable[[], str], recipe: Recipe) -> Iterator[None]:
    """
    Raises:
        MemoryExhausted: in the place of whatever says that memory ran out. The traceback keeps the first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # OutOfMemoryError of torch is a RuntimeError
        if not is_of_memory(error):
            raise
        said = what if isinstance(what, str) else what()
        raise MemoryExhausted(f"out of memory in {said}: {first_line(error)}", hint=remedy(recipe)) from error


def is_of_memory(error: BaseException) -> bool:
    """The CPU's allocator, cuBLAS and cuDNN raise a plain RuntimeError."""
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def remedy(recipe: Recipe) -> str:
    """What to change, the cheapest first."""
    ways = [
        f"lower batch.max_rank_seconds, {recipe.batch.max_rank_seconds:g} now: the same step in smaller micro-batches"
        " (`speechctl fit RECIPE` finds the largest that fits)"
    ]
    if not recipe.activation_checkpointing:
        ways.append("activation_checkpointing: true")
    if recipe.zero_stage in ("off", 0, 1, 2):
        ways.append(f"a higher zero_stage than {recipe.zero_stage}")
    elif not recipe.offload.optimizer:
        ways.append("offload.optimizer: true")
    return (
        "; or ".join(ways)
        + f"; or leave out utterances longer than data.max_utterance, {recipe.data.max_utterance:g} s"
    )


def batch_in_words(step: int, batch: MicroBatch, utt_ids: list[str], tensors: Tensors) -> Callable[[], str]:
    """For `memory_errors`: said where it is needed."""

    def said() -> str:
        shape = " x ".join(map(str, tensors["inputs"].shape))
        more = f" and {len(utt_ids) - 3} more" if len(utt_ids) > 3 else ""
        return (
            f"step {step}, on {len(utt_ids)} utterances of up to {batch.seconds:.1f} s"
            f" ({batch.padded_s:.1f} padded s, inputs {shape}: {', '.join(utt_ids[:3])}{more})"
        )

    return said
