"""What DeepSpeed wrote, parameter by parameter, whatever the number of ranks that wrote it. Reads; knows no engine.

At ZeRO 1, 2 and 3 each rank's file has a few long vectors: its part of the fp32 weights of a group of parameters one
after the other, and of both moments of Adam. Here they are cut into pieces that say which elements of which parameter
they are. Files are mapped, not read: whoever takes a piece pays for that piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import DataError
from launcher.worker.adamw import EMA

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""Of each trained parameter, all fp32: the master weight and Adam's two moments. The moving average of the weights is
one more where the run keeps it, `adamw.EMA`."""

HINT = "resume with as many ranks as saved it; a checkpoint that verifies and cannot be read so is a bug of speechctl"


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` elements of a flattened parameter from `start` on, at `offset` of a rank's vector for a group."""

    name: str
    start: int
    count: int
    rank: int
    group: int
    offset: int


def check_coverage(what: str, pieces: Iterable[Piece], sizes: Mapping[str, int]) -> None:
    """
    Args:
        sizes: elements of each parameter that must be there.

    Raises:
        DataError: an element of one of them is in no piece, or in two, or a piece is of no parameter.
    """
    found: dict[str, list[Piece]] = {name: [] for name in sizes}
    for piece in pieces:
        if piece.name not in found:
            raise DataError(f"{what}: {piece.name} is no trained parameter of this model", hint=HINT)
        found[piece.name].append(piece)
    for name, mine in found.items():
        reached = 0
        for piece in sorted(mine, key=lambda p: p.start):
            if piece.start != reached:
                twice = "twice" if piece.start < reached else "nowhere"
                raise DataError(f"{what}: element {min(piece.start, reached)} of {name} is {twice}", hint=HINT)
            reached += piece.count
        if reached != sizes[name]:
            raise DataError(f"{what}: {reached} of {sizes[name]} elements of {name}", hint=HINT)


def check_names(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raises DataError where one is missing, or there is one more."""
    for name in sorted(set(found) ^ set(wanted)):
        raise DataError(f"{what}: {name} is {'missing' if name in set(wanted) else 'not of this model'}", hint=HINT)


class Shards:
    """A checkpoint of ZeRO 1, 2 or 3. Its files were checked against the manifest before: they are pickles."""

    def __init__(self, folder: Path, stage: int, world_size: int) -> None:
        self.folder = folder
        self.stage = stage
        self.world_size = world_size
        self._optimizers = [self._open(f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt") for r in range(world_size)]
        models = [f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(world_size)]
        self._models = [self._open(name) for name in (models if stage == 3 else ["mp_rank_00_model_states.pt"])]
        self._states = [state["optimizer_state_dict"] for state in self._optimizers]
        self.pieces: dict[str, list[Piece]] = {}
        for piece in self._pieces_of_3() if stage == 3 else self._pieces_of_1_and_2():
            self.pieces.setdefault(piece.name, []).append(piece)

    def _open(self, pattern: str) -> dict[str, Any]:
        found = list(self.folder.glob(pattern))
        if len(found) != 1:
            raise DataError(f"{self.folder} has {len(found)} files {pattern}, and 1 was expected", hint=HINT)
        state: dict[str, Any] = torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)
        return state

    # Trained parameters ----------------------------------------------------------------------------------------------

    def _pieces_of_1_and_2(self) -> Iterator[Piece]:
        """A group is cut into equal parts across parameters; each rank says what it has of which. The parts of a
        parameter lie in the order of the ranks."""
        reached: Counter[str] = Counter()
        for rank, state in enumerate(self._states):
            for group, addresses in enumerate(state["param_slice_mappings"]):
                for name, at in addresses.items():
                    yield Piece(name, reached[name], at.numel, rank, group, at.start)
                    reached[name] += at.numel

    def _pieces_of_3(self) -> Iterator[Piece]:
        """Each parameter is cut into equal parts, the last filled up; a group is the parts one after the other."""
        for rank, model in enumerate(self._models):
            for group, shapes in enumerate(model["param_shapes"]):
                offset = 0
                for name, shape in shapes.items():
                    part = part_of_3(shape.numel(), rank, self.world_size)
                    if part.count:
                        yield Piece(name, part.start, part.count, rank, group, offset)
                    offset += part.length

    def sizes(self) -> dict[str, int]:
        """Elements of each trained parameter."""
        return {name: shape.numel() for shapes in self._models[0]["param_shapes"] for name, shape in shapes.items()}

    def step(self, group: int) -> float | None:
        """How many updates the optimizer has made of a group; None where it has made none, and has no moments. Groups
        that were frozen for a while have fewer.

        Raises:
            DataError: ranks count differently.
        """
        states = (base["state"].get(self._numbers(base)[group]) for base in map(self._base, self._states))
        # At ZeRO 1 and 2 DeepSpeed leaves an empty state where there is none.
        counts = {float(state["step"]) for state in states if state}
        if len(counts) > 1:
            raise DataError(f"{self.folder}: the optimizer's steps differ: {sorted(counts)}", hint=HINT)
        return counts.pop() if counts else None

    @staticmethod
    def _numbers(base: dict[str, Any]) -> list[int]:
        """By which the optimizer's state has the vectors, in the order of the groups."""
        return [number for options in base["param_groups"] for number in options["params"]]

    def _base(self, state: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, Any] = state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return base

    def _vector(self, kind: str, rank: int, group: int) -> Tensor:
        state = self._states[rank]
        if kind == "fp32" or (kind == EMA and self.step(group) is None):
            vectors = state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
            return vectors[group]  # type: ignore[no-any-return]
        base = self._base(state)
        numbers = [number for options in base["param_groups"] for number in options["params"]]
        return base["state"][numbers[group]][kind]  # type: ignore[no-any-return]

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements of a flattened parameter, fp32, shape (count,). What has not been updated yet is its own average."""
        into = torch.empty(count, dtype=torch.float32)
        for piece in self.pieces[name]:
            first, end = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first < end:
                vector = self._vector(kind, piece.rank, piece.group)
                into[first - start : end - start] = vector.narrow(0, piece.offset + first - piece.start, end - first)
        return into

    # Everything else -------------------------------------------------------------------------------------------------

    @property
    def module(self) -> dict[str, Tensor]:
        """Rank 0's `state_dict`: at ZeRO 3 with nothing in the place of parameters, otherwise whole."""
        return self._models[0]["module"]  # type: ignore[no-any-return]

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {name: self.module[name] for name in self._models[0]["buffer_names"]}

    def frozen(self) -> dict[str, int]:
        """Elements of each parameter that is not trained, where those are cut up: at ZeRO 3.

        DeepSpeed lists whatever has no gradient when it saves: also what is frozen for some of the steps, and has its
        place among those that are trained.
        """
        shapes = self._models[0]["frozen_param_shapes"] or {} if self.stage == 3 else {}
        trained = self.sizes()
        return {name: shape.numel() for name, shape in shapes.items() if name not in trained}

    def read_frozen(self, name: str) -> Tensor:
        """A flattened parameter that is not trained, in the type it was computed in."""
        parts = [model["frozen_param_fragments"][name].flatten() for model in self._models]
        return torch.cat(parts)[: self.frozen()[name]]

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's own object: the scale, and how long ago it last overflowed. The same on all ranks."""
        return self._states[0]["loss_scaler"]

    def counters(self) -> dict[str, int]:
        """The engine's own counts of steps."""
        return {name: self._models[0][name] for name in ("global_steps", "global_samples", "skipped_steps")}


@dataclass(frozen=True, slots=True)
class Part:
    start: int
    count: int
    length: int
    """`count`, and what fills it up."""


def part_of_3(numel: int, rank: int, world_size: int) -> Part:
    """What ZeRO 3 keeps of a parameter on one rank."""
    length = -(-numel // world_size)
    start = min(rank * length, numel)
    return Part(start, min(length, numel - start), length)
