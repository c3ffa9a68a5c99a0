"""One step of training, whoever does it: DeepSpeed where the recipe gives a ZeRO stage, Accelerate where it is off.

The loop sees `Engine` and no more. Neither engine schedules the learning rate: it is a pure function of the step
(`train.learning_rate`), which makes it exact after any resume.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from launcher.committer import File
from launcher.recipe import Recipe
from launcher.worker.backbone import SpeechModel
from launcher.worker.data import Tensors, to_device
from launcher.worker.host_memory import HostMemory
from launcher.worker.ranks import Ranks


class Engine(ABC):
    """A model with its optimizer, on this rank."""

    model: SpeechModel
    device: torch.device
    weights_type = torch.float32
    """That the model's weights have while it computes."""

    @abstractmethod
    def backward(self, tensors: Tensors, factor: float, last: bool) -> Tensor:
        """Add one micro-batch to the gradient.

        Args:
            factor: multiplies the sum of the micro-batch's losses; undoes the engine's own averaging over ranks and
                accumulation.
            last: this is the last micro-batch of the step.

        Returns:
            the sum of the losses, detached, shape ().
        """

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip and update. Returns the norm of the whole gradient before clipping."""

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

    def infer(self, tensors: Tensors) -> tuple[Tensor, list[str]]:
        """Loss of each utterance and greedy transcripts, without dropout, masking or gradients."""
        self.model.eval()
        try:
            with torch.no_grad():
                return self._infer(to_device(tensors, self.device))
        finally:
            self.model.train()

    def _infer(self, tensors: Tensors) -> tuple[Tensor, list[str]]:
        losses, texts = self.model(tensors, transcribe=True)
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


def optimizer_for(model: SpeechModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only."""
    options = recipe.optimizer
    matrices = [p for _, p in model.trained() if p.ndim >= 2]
    others = [p for _, p in model.trained() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
    )


class AccelerateEngine(Engine):
    """One process, or plain data parallel: no DeepSpeed anywhere near, so that a debugger sees an ordinary model."""

    def __init__(self, model: SpeechModel, recipe: Recipe, accumulation: int, ranks: Ranks) -> None:
        from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

        if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
            raise RuntimeError("ACCELERATE_USE_DEEPSPEED is set, but the recipe says zero_stage: off")
        self.accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision="bf16" if recipe.precision == "bf16" else "no",
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
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer_for(model, recipe))

    def backward(self, tensors: Tensors, factor: float, last: bool) -> Tensor:
        with self.accelerator.accumulate(self.wrapped):
            if self.accelerator.sync_gradients != last:
                raise RuntimeError("Accelerate counts another accumulation than the sampler")
            losses, _ = self.wrapped(to_device(tensors, self.device))
            total: Tensor = losses.sum()
            self.accelerator.backward(total * factor)
        return total.detach()

    def step(self, learning_rate: float) -> float:
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def _infer(self, tensors: Tensors) -> tuple[Tensor, list[str]]:
        with self.accelerator.autocast():
            return super()._infer(tensors)

    def _losses(self, model: SpeechModel, tensors: Tensors) -> Tensor:
        with self.accelerator.autocast():
            return super()._losses(model, tensors)

    def snapshot(self, memory: HostMemory) -> list[File]:
        if self.accelerator.process_index != 0:
            return []
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return [memory.file("accelerate.pt", state)]

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / "accelerate.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
