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
def memory_errors(
    what: str | Callable[[], str], recipe: Recipe, remedy: Callable[[Recipe], str] | None = None
) -> Iterator[None]:
    """
    Args:
        remedy: what to change; by default `of_training`.

    Raises:
        MemoryExhausted: in the place of whatever says that memory ran out. The traceback keeps the first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # OutOfMemoryError of torch is a RuntimeError
        if not is_of_memory(error):
            raise
        said = what if isinstance(what, str) else what()
        raise MemoryExhausted(
            f"out of memory in {said}: {first_line(error)}", hint=(remedy or of_training)(recipe)
        ) from error


def is_of_memory(error: BaseException) -> bool:
    """The CPU's allocator, cuBLAS and cuDNN raise a plain RuntimeError."""
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def of_training(recipe: Recipe) -> str:
    """What to change, the cheapest first."""
    seconds = recipe.batch.max_rank_seconds
    ways = [
        f"lower batch.max_rank_seconds, {seconds:g} now: the same step in smaller micro-batches, such as `speechctl"
        f" resume RUN --set batch.max_rank_seconds={seconds / 2:g}` (`speechctl fit RECIPE` finds the largest that"
        " fits)"
    ]
    if not recipe.activation_checkpointing:
        ways.append("`resume RUN --set activation_checkpointing=true`")
    other = []
    if recipe.zero_stage in ("off", 0, 1, 2):
        other.append(f"a higher zero_stage than {recipe.zero_stage}")
    elif not recipe.offload.optimizer:
        other.append("offload.optimizer: true")
    other.append(f"no utterances longer than data.max_utterance, {recipe.data.max_utterance:g} s now")
    return f"{'; or '.join(ways)}; or, in a new run, {', or '.join(other)}"


def of_evaluation(recipe: Recipe) -> str:
    """The same, where it ran out in an evaluation."""
    seconds = recipe.evaluate.batch_seconds
    return (
        f"lower evaluate.batch_seconds, {seconds:g} now, such as `speechctl resume RUN --set"
        f" evaluate.batch_seconds={seconds / 2:g}`; an utterance that is longer is evaluated alone"
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
