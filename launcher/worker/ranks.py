"""What the ranks of one run say to each other, on the CPU: decisions, sums, votes and text.

One process is a world of its own, and every function here then answers at once. Gradients go elsewhere: they belong
to the engine.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from launcher.errors import DataError, PreflightError
from launcher.recipe_launch import Deadlines

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Of one exchange among ranks that nobody watches; gloo's own."""


def patience_s(deadlines: Deadlines) -> float:
    """How long one exchange may take before torch ends the ranks: longer than the launcher needs to see a hang, name
    the rank that differs, and end them. A rank may wait through several marks of a slower one."""
    return max(TIMEOUT_S, 2 * max(deadlines.start, deadlines.step, deadlines.save))


class Ranks:
    """This process's place among the ranks, as torchrun's environment gives it."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if int(os.environ.get("SPEECHCTL_GPUS", "0")) and self.device.type != "cuda":
            raise PreflightError(
                "this machine shows GPUs, and torch cannot use them: the run would train on the CPU",
                hint="look at `nvidia-smi` and at torch.cuda.is_available(), or --set launch.device=cpu",
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._group: Any = None

    def connect(self) -> None:
        """Make the CPU group, once the engine's own process group is up (or make that, when it is not)."""
        if self.world_size == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=self.timeout)
        if dist.get_world_size() != self.world_size:
            raise RuntimeError(f"the process group has {dist.get_world_size()} ranks, {self.world_size} were launched")
        self._group = dist.new_group(backend="gloo", timeout=self.timeout)

    def apart(self, timeout_s: float) -> Ranks:
        """The same ranks on a connection of their own, for a thread beside training. All ranks make it together.

        Args:
            timeout_s: of one exchange. The connection is of no use after one that took longer.
        """
        other = copy.copy(self)
        other.timeout = datetime.timedelta(seconds=timeout_s)
        if self.world_size > 1:
            other._group = dist.new_group(backend="gloo", timeout=other.timeout)
        return other

    def close(self) -> None:
        """Leave together: a rank that goes early aborts the others, and the job fails after its work is done."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64; the same bits on every rank."""
        if self.world_size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return [float(v) for v in tensor]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. For text and small records: what JSON can say, and tuples come as lists.

        Not pickled, as torch's own `all_gather_object` is: who gets into the connection of two ranks could run code.
        """
        if self.world_size == 1:
            return [value]
        mine = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, group=self._group)
        return [json.loads(bytes(text.numpy())) for text in texts]

    def store(self, name: str) -> Any:
        """The store that the ranks met by, with keys of its own under `name`; None where there is one rank."""
        if self.world_size == 1:
            return None
        return PrefixStore(name, dist.distributed_c10d._get_default_store())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def agree(self, what: str, value: str) -> None:
        """Check that every rank has the same value.

        Raises:
            DataError: they differ; names who has what.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            seen = ", ".join(f"rank {r}: {v}" for r, v in enumerate(values))
            raise DataError(
                f"the ranks disagree about {what}: {seen}",
                hint="they read different packs, code or recipes; compare the nodes",
            )
