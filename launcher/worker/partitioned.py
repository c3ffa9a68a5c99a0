"""DeepSpeed's engine at ZeRO 1, 2 and 3, filled from the files of any number of ranks. `reshard.py` says why so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import DataError
from launcher.worker.adamw import EMA
from launcher.worker.ranks import Ranks
from launcher.worker.shards import HINT, KINDS, Piece, Shards, check_coverage, check_names, part_of_3


def load(engine: Any, folder: Path, saved_by: int, ranks: Ranks) -> None:
    """
    Args:
        engine: DeepSpeed's own, with an optimizer that has not stepped.
        folder: where DeepSpeed's files are.

    Raises:
        DataError: the checkpoint does not have each element of the model exactly once, or the ranks do not take it so.
    """
    stage = engine.zero_optimization_stage()
    shards = Shards(folder, stage, saved_by)
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in engine.module.named_parameters():
        sizes = trained if parameter.requires_grad else frozen
        sizes[name] = parameter.ds_numel if stage == 3 else parameter.numel()
    check_coverage(f"{folder}", (p for pieces in shards.pieces.values() for p in pieces), trained)
    check_names(f"{folder}, buffers", shards.buffers, engine._get_buffer_names())
    if stage == 3:
        if shards.frozen() != frozen:
            raise DataError(f"{folder}: frozen are {shards.frozen()}, and the model has {frozen}", hint=HINT)
        engine.optimizer.checkpoint_event_prologue()
        _load_module_of_3(engine, shards, ranks)
        pieces, vectors = _pieces_of_3(engine.optimizer, ranks), engine.optimizer.fp32_partitioned_groups_flat
    else:
        check_names(f"{folder}, frozen parameters", set(shards.module) & set(frozen), frozen)
        engine.load_module_state_dict({"module": shards.module})
        pieces, vectors = _pieces_of_1_and_2(engine.optimizer, ranks), engine.optimizer.single_partition_of_fp32_groups
    everywhere = [Piece(*row) for rows in ranks.gather([_row(p) for p in pieces]) for row in rows]
    check_coverage(f"{folder}, taken by {ranks.world_size} ranks", everywhere, trained)
    _fill(engine.optimizer, stage, shards, pieces, vectors, ranks)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    else:
        _check_weights(engine.optimizer, pieces, vectors, ranks, folder)
    for name, count in shards.counters().items():
        setattr(engine, name, count)


def _row(piece: Piece) -> list[Any]:
    return [piece.name, piece.start, piece.count, piece.rank, piece.group, piece.offset]


def _pieces_of_1_and_2(optimizer: Any, ranks: Ranks) -> list[Piece]:
    """What this rank keeps, as the optimizer was just built."""
    found = []
    for group, parameters in enumerate(optimizer.bit16_groups):
        for parameter in parameters:
            if (here := parameter._hp_mapping) is not None:
                start, at = here.lp_fragment_address.start, here.hp_fragment_address
                found.append(Piece(optimizer.param_names[parameter], start, at.numel, ranks.rank, group, at.start))
    return found


def _pieces_of_3(optimizer: Any, ranks: Ranks) -> list[Piece]:
    found = []
    for group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            part = part_of_3(parameter.ds_numel, ranks.rank, ranks.world_size)
            if part.length != parameter.partition_numel():
                raise RuntimeError(f"ZeRO 3 keeps {parameter.partition_numel()} elements, not {part.length}")
            if part.count:
                name = optimizer.param_names[parameter]
                found.append(Piece(name, part.start, part.count, ranks.rank, group, offset))
            offset += part.length
    return found


def _load_module_of_3(engine: Any, shards: Shards, ranks: Ranks) -> None:
    """Frozen parameters, cut for this many ranks, and buffers. What is trained comes with the optimizer."""
    frozen = {}
    for name, numel in shards.frozen().items():
        part = part_of_3(numel, ranks.rank, ranks.world_size)
        mine = shards.read_frozen(name)[part.start : part.start + part.count]
        frozen[name] = torch.nn.functional.pad(mine, (0, part.length - part.count))
    module = {**engine.module.state_dict(), **shards.buffers}
    engine.load_module_state_dict({"module": module, "frozen_param_fragments": frozen})


def _check_weights(optimizer: Any, pieces: Iterable[Piece], vectors: list[Tensor], ranks: Ranks, folder: Path) -> None:
    """That the model's weights, which came whole from the file of rank 0, are those that the optimizer keeps in fp32.

    A forward pass says nothing of the latter at ZeRO 1 and 2, before the first update has overwritten the former.
    """
    parameters = {optimizer.param_names[p]: p for group in optimizer.bit16_groups for p in group}
    problem = ""
    for piece in pieces:
        parameter = parameters[piece.name].data.flatten()
        kept = vectors[piece.group].data.narrow(0, piece.offset, piece.count)
        if not torch.equal(parameter.narrow(0, piece.start, piece.count), kept.to(parameter.dtype)):
            problem = problem or f"rank {ranks.rank} has other weights of {piece.name} than the optimizer has"
    if problem := next((p for p in ranks.gather(problem) if p), ""):
        raise DataError(f"{folder}: {problem}", hint=HINT)


def _fill(
    optimizer: Any, stage: int, shards: Shards, pieces: Iterable[Piece], vectors: list[Tensor], ranks: Ranks
) -> None:
    """This rank's weights, moments and average, its counts of updates and the loss's scale, as if its own file had
    them."""
    steps = [shards.step(group) for group in range(len(vectors))]
    states = (*KINDS[1:], *([] if optimizer.optimizer.ema is None else [EMA]))
    filled = {"fp32": vectors, **{kind: [torch.zeros_like(v) for v in vectors] for kind in states}}
    for kind, into in filled.items():
        for piece in pieces:
            if kind != "fp32" and steps[piece.group] is None:
                continue
            values = shards.read(kind, piece.name, piece.start, piece.count)
            into[piece.group].data.narrow(0, piece.offset, piece.count).copy_(values)
    state = {**optimizer.state_dict(), "loss_scaler": shards.loss_scaler}
    base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    numbers = [number for options in base["param_groups"] for number in options["params"]]
    base["state"] = {
        number: {"step": torch.tensor(step), **{kind: filled[kind][group] for kind in states}}
        for group, (number, step) in enumerate(zip(numbers, steps, strict=True))
        if step is not None
    }
    optimizer.load_state_dict([state] * ranks.world_size, load_optimizer_states=True, load_from_fp32_weights=True)
