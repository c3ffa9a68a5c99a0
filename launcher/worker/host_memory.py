"""Copies of a rank's state in host memory, taken at a step and written while training changes what they were of.

The memory is used again at every save: fresh memory would cost as much time as the copy, and on a GPU it must be
pinned to be copied into at full speed.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from launcher.committer import File, Sink


class HostMemory:
    """
    Args:
        copies: False: tensors are taken as they are, for a caller that writes them before anything changes.
    """

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self._kept: dict[tuple[str, int], Tensor] = {}

    def file(self, name: str, state: Any) -> File:
        """`state`, anything that `torch.save` takes, as a file of that name. The one taken before under this name must
        have been written."""
        taking = _Taking()
        pickled = io.BytesIO()
        out = pickle.Pickler(pickled, protocol=4)
        out.persistent_id = taking.number  # type: ignore[method-assign]
        out.dump(state)
        tensors = taking.tensors
        if self.copies:
            tensors = [self._copy((name, number), tensor) for number, tensor in enumerate(tensors)]
            if any(tensor.is_cuda for tensor in taking.tensors):
                torch.cuda.synchronize()
        again = pickle.Unpickler(io.BytesIO(pickled.getvalue()))  # noqa: S301  # pickled just above
        again.persistent_load = lambda number: tensors[number]  # type: ignore[method-assign]
        copy = again.load()
        size = sum(t.numel() * t.element_size() for t in tensors) + len(pickled.getvalue())
        return File(name, size, lambda sink: _write(copy, sink))

    def _copy(self, place: tuple[str, int], tensor: Tensor) -> Tensor:
        memory = self._kept.get(place)
        if memory is None or memory.dtype != tensor.dtype or memory.shape != tensor.shape:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[place] = memory
        memory.copy_(tensor.detach(), non_blocking=True)
        return memory


def _write(state: Any, sink: Sink) -> None:
    # The file is hashed as a whole: torch's CRC of each tensor would add 0.23 s of CPU a GB, measured, to 0.06 s.
    torch.serialization.set_crc32_options(False)
    torch.save(state, sink)  # type: ignore[arg-type]


class _Taking:
    """Numbers the tensors of a state. Those that are the same memory have the same number, as weights that are tied."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        seen = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        key = seen if value.numel() else id(value)
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[key]
