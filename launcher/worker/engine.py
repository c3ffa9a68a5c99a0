"""One step of training, whoever does it: DeepSpeed where the recipe gives a ZeRO stage, Accelerate where it is off.

The loop sees `Engine` and no more. Neither engine schedules the learning rate or knows what is frozen when: both are
pure functions of the step (`schedule.py`, `learning.py`), which makes them exact after any resume.

A loss that is not finite makes every gradient NaN, whatever its own derivative is. So there is one test for all that
goes wrong in a step, the norm of the whole gradient, and all ranks see the same norm: they leave the step out together,
without a word about it.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launcher.committer import File
from launcher.errors import PreflightError, TrainingError
from launcher.recipe import Recipe
from launcher.worker.adamw import AdamW
from launcher.worker.backbone import SpeechModel
from launcher.worker.data import Tensors, to_device
from launcher.worker.host_memory import HostMemory
from launcher.worker.learning import Group, freeze, groups, optimizer_for, set_rates
from launcher.worker.ranks import Ranks
from launcher.worker.waits import Waits


class Engine(ABC):
    """A model with its optimizer, on this rank."""

    model: SpeechModel
    device: torch.device
    weights_type = torch.float32
    """That the model's weights have while it computes."""
    groups: Sequence[Group]
    """What learns: the groups of the optimizer."""
    adamw: AdamW
    """The optimizer itself, whatever is around it."""
    waits: Waits
    """For other ranks, inside what the engine does."""
    done = 0
    """Steps that are done."""

    def begin(self, done: int) -> None:
        """Get ready for the step that follows on `done`: what is frozen in it has no gradients."""
        self.done = done
        if freeze(self.groups, done):
            self._frozen_anew()

    def _frozen_anew(self) -> None:
        self.waits.watch(self.model.parameters())

    @abstractmethod
    def backward(self, tensors: Tensors, factor: float, last: bool) -> Tensor:
        """Add one micro-batch to the gradient.

        Args:
            factor: multiplies the sum of the micro-batch's losses; undoes the engine's own averaging over ranks and
                accumulation.
            last: this is the last micro-batch of the step.

        Returns:
            the loss of each utterance, detached, shape (batch,).
        """

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip and update.

        Returns:
            the norm of the whole gradient before clipping, the same on every rank; NaN where it is not finite: then
            neither weights nor moments have changed.

        Raises:
            TrainingError: on every rank: fp16 cannot be scaled down any further.
        """

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied with in fp16."""
        return None

    def is_sound(self) -> bool:
        """Whether all weights that this rank keeps are finite. Reads each of them once."""
        largest = torch.nn.utils.get_total_norm([w for w in self.kept() if w.numel()], norm_type=math.inf)
        return bool(torch.isfinite(largest))

    def kept(self) -> list[Tensor]:
        """The weights that this rank keeps."""
        return [p.detach() for p in self.model.parameters()]

    @abstractmethod
    def snapshot(self, memory: HostMemory) -> list[File]:
        """This rank's share of model and optimizer as of now, as files to be written later. Waits for no other rank:
        where one fails, the others hear of it by the committer's vote."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take back what is in the files of `snapshot`, by the same number of ranks. The files were verified before."""

    def reshard(self, folder: Path, saved_by: int, ranks: Ranks) -> None:
        """Take back what `save` wrote by `saved_by` ranks, whatever their number. The files were verified before."""
        self.load(folder)  # where nothing is cut up

    def alone(self) -> SpeechModel | None:
        """A model with the weights of now, that rank 0 can compute with while the others do not; None on those. All
        ranks ask for it together."""
        return self.model

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the moving average of its weights, where the recipe asks for one; afterwards the
        weights of before, bit for bit. All ranks come and go together. Where an error ends it on one rank, it stays so:
        the others could not be waited for, and the run ends."""
        if self.adamw.ema is None:
            yield
            return
        self.adamw.exchange()
        self._weights_exchanged()
        yield
        self.adamw.exchange()
        self._weights_exchanged()

    def _weights_exchanged(self) -> None:  # noqa: B027  # nothing to do where they are the model's own
        """The optimizer's weights are others; bring them into the model."""

    def infer(self, tensors: Tensors, alone: SpeechModel | None = None) -> tuple[Tensor, list[str]]:
        """Loss of each utterance and greedy transcripts, without dropout, masking or gradients.

        Args:
            alone: the model of `alone`, where the other ranks do not take part.
        """
        model = alone or self.model
        model.eval()
        try:
            with torch.no_grad():
                return self._infer(to_device(tensors, self.device), alone)
        finally:
            model.train()

    def _infer(self, tensors: Tensors, alone: SpeechModel | None) -> tuple[Tensor, list[str]]:
        losses, texts = (alone or self.model)(tensors, transcribe=True)
        return losses, texts

    def losses(self, tensors: Tensors, model: SpeechModel | None = None) -> Tensor:
        """Of each utterance, as `infer` computes them; by `model`, where it is not the engine's own."""
        model = model or self.model
        model.eval()
        try:
            with torch.no_grad():
                return self._losses(model, to_device(tensors, self.device))
        finally:
            model.train()

    def _losses(self, model: SpeechModel, tensors: Tensors) -> Tensor:
        losses: Tensor = model(tensors)[0]
        return losses


def poisoned(total: Tensor, factor: float) -> Tensor:
    """`total * factor`; where it is not finite, with a gradient that is NaN."""
    return total * (total.detach() * 0 + factor)


def out_of_scale() -> TrainingError:
    """fp16 has nothing left to scale down."""
    return TrainingError(
        "the gradient overflows fp16 although the loss is scaled down as far as it goes",
        hint="say precision: bf16 in a new run, or `speechctl resume RUN --set optimizer.learning_rate=…`, a lower one",
    )


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """
    Raises:
        PreflightError: this device does not compute in the recipe's precision.
    """
    if recipe.precision == "fp16" and device.type == "cpu":
        raise PreflightError(
            "precision fp16 needs a GPU, and this rank computes on the CPU", hint="say precision: bf16, or fp32"
        )


class AccelerateEngine(Engine):
    """One process, or plain data parallel: no DeepSpeed anywhere near, so that a debugger sees an ordinary model."""

    def __init__(self, model: SpeechModel, recipe: Recipe, accumulation: int, ranks: Ranks) -> None:
        from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

        if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
            raise RuntimeError("ACCELERATE_USE_DEEPSPEED is set, but the recipe says zero_stage: off")
        self.accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
            gradient_accumulation_steps=accumulation,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=ranks.timeout)],
        )
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        got = (self.accelerator.distributed_type, self.accelerator.num_processes)
        if got[0] not in kinds or got[1] != ranks.world_size:
            raise RuntimeError(f"Accelerate made {got[0]} with {got[1]} processes; {ranks.world_size} were launched")
        self.device = self.accelerator.device
        self.grad_clip = recipe.optimizer.grad_clip
        self.model = model
        self.groups = groups(model, recipe)
        # One process has nobody to share gradients with: no DDP, which would cost it a millisecond a step.
        self.wrapped = self.accelerator.prepare_model(model, evaluation_mode=ranks.world_size == 1)
        self.adamw = optimizer_for(self.groups, recipe)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)
        self.parameters = [p for group in self.groups for p in group.parameters]
        self.waits = Waits(self.device)
        self.waits.watch(model.parameters())

    def _frozen_anew(self) -> None:
        super()._frozen_anew()
        if isinstance(self.wrapped, DistributedDataParallel):  # it waits for every gradient that there was when made
            old = self.wrapped
            self.wrapped = DistributedDataParallel(
                old.module, device_ids=old.device_ids, output_device=old.output_device
            )

    def backward(self, tensors: Tensors, factor: float, last: bool) -> Tensor:
        is_shared = isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if is_shared and not last else nullcontext():
            losses, _ = self.wrapped(to_device(tensors, self.device))
            self.accelerator.backward(poisoned(losses.sum(), factor))  # divides by the accumulation
        self.waits.backward_ended()
        detached: Tensor = losses.detach()
        return detached

    def step(self, learning_rate: float) -> float:
        # Accelerate's wrapper looks for packages at every call, 0.4 ms of CPU a step; it is needed for a scaler alone.
        scales = self.accelerator.scaler is not None
        optimizer = self.optimizer if scales else self.optimizer.optimizer
        if scales:
            self.accelerator.unscale_gradients(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or math.inf))
        set_rates(optimizer.param_groups, self.groups, learning_rate, self.done)
        if math.isfinite(norm) or scales:  # a scaler steps by itself, or scales down
            optimizer.step()
        optimizer.zero_grad()
        if scales and not math.isfinite(norm) and self.accelerator.scaler.get_scale() < 1:
            raise out_of_scale()
        return norm if math.isfinite(norm) else math.nan

    @property
    def loss_scale(self) -> float | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def _infer(self, tensors: Tensors, alone: SpeechModel | None) -> tuple[Tensor, list[str]]:
        with self.accelerator.autocast():
            return super()._infer(tensors, alone)

    def _losses(self, model: SpeechModel, tensors: Tensors) -> Tensor:
        with self.accelerator.autocast():
            return super()._losses(model, tensors)

    def snapshot(self, memory: HostMemory) -> list[File]:
        if self.accelerator.process_index != 0:
            return []
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return [memory.file("accelerate.pt", state)]

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / "accelerate.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
