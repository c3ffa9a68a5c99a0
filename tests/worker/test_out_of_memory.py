"""Memory that runs out in a step: what it ran out on, and what to change."""

from __future__ import annotations

import pytest
import torch

from launcher.errors import ExitCode, MemoryExhausted
from launcher.worker.out_of_memory import memory_errors
from tests.test_plan import recipe


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."), MemoryError("no room")],
)
def test_the_batch_and_the_setting_are_named(error: Exception) -> None:
    with pytest.raises(MemoryExhausted) as raised, memory_errors(lambda: "step 7, on 12 utterances", recipe()):
        raise error
    assert raised.value.message == f"out of memory in step 7, on 12 utterances: {str(error).splitlines()[0]}"
    assert "batch.max_rank_seconds, 200 now" in raised.value.hint
    assert "--set activation_checkpointing=true" in raised.value.hint and "zero_stage than 2" in raised.value.hint
    assert raised.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert raised.value.__cause__ is error


def test_the_allocator_of_the_cpu_is_understood() -> None:
    """A real refusal of it: it has no type of its own."""
    with pytest.raises(MemoryExhausted, match="can't allocate memory"), memory_errors("step 1", recipe()):
        torch.empty(2**55, dtype=torch.uint8)


def test_what_has_been_tried_is_not_proposed() -> None:
    tried = recipe(zero_stage=3, activation_checkpointing=True, offload={"optimizer": True})
    with pytest.raises(MemoryExhausted) as raised, memory_errors("step 1", tried):
        raise MemoryError
    assert "zero_stage" not in raised.value.hint and "offload" not in raised.value.hint
    assert "MemoryError" in raised.value.message


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("step 1", recipe()):
        raise RuntimeError("shape mismatch")
