"""DeepSpeed (ZeRO 0-3) behind `engine.Engine`, and the one class that takes its checkpoints."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch import Tensor

from launcher.committer import File
from launcher.errors import UsageError
from launcher.recipe import Recipe
from launcher.worker import partitioned
from launcher.worker.adamw import AdamW
from launcher.worker.backbone import SpeechModel
from launcher.worker.data import Tensors, to_device
from launcher.worker.engine import Engine, out_of_scale, poisoned
from launcher.worker.host_memory import HostMemory
from launcher.worker.learning import groups, optimizer_for, set_rates
from launcher.worker.ranks import Ranks
from launcher.worker.waits import Waits

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TAG = "deepspeed"
"""The directory that DeepSpeed makes inside a checkpoint."""


class Asked(dict[str, Any]):
    """A configuration that knows which of its keys DeepSpeed has asked for: it passes over those that it does not know,
    and a word of a recipe that is misspelt would mean nothing, in silence. Sections check their own, most of them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.keys_asked: set[Any] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def refuse_unknown(self, keys: Iterable[str]) -> None:
        """
        Raises:
            UsageError: DeepSpeed has not asked for one of them.
        """
        for key in keys:
            if key not in self.keys_asked:
                near = difflib.get_close_matches(key, map(str, self.keys_asked), n=1)
                raise UsageError(
                    f"deepspeed.{key}: DeepSpeed knows no such key",
                    hint=f"did you mean {near[0]}?" if near else "see https://www.deepspeed.ai/docs/config-json",
                )


class DeepSpeedEngine(Engine):
    def __init__(self, model: SpeechModel, recipe: Recipe, config: dict[str, Any], ranks: Ranks) -> None:
        # Without this DeepSpeed compiles a shared-memory collective for CPUs at its first start (measured: 1.5-2
        # minutes of g++, and 69 MB left in /dev/shm); gloo does without. Assigned, not changed: reading the table that
        # is there would probe every operation of DeepSpeed's, with a compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed("nccl" if ranks.device.type == "cuda" else "gloo", timeout=ranks.timeout)
        self.model = model
        self.device = ranks.device
        # It knows torch's own AdamW by its very type, and warns of any other.
        if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
        self.weights_type = WEIGHTS[recipe.precision]
        self.groups = groups(model, recipe)
        self.parameters = [p for group in self.groups for p in group.parameters]
        self.copy: SpeechModel | None = None
        """At ZeRO 3, where rank 0 evaluates alone: its own whole model, filled when it is asked for."""
        if recipe.zero_stage == 3 and recipe.evaluate.mode == "rank0" and ranks.rank == 0:
            self.copy = copy.deepcopy(model).requires_grad_(False).to(ranks.device, self.weights_type)
        on = torch.device("cpu") if recipe.offload.parameters else ranks.device
        self.adamw = optimizer_for(self.groups, recipe)
        # At stage 0 in bf16 DeepSpeed has its optimizer make one step on zero gradients to allocate the moments, which
        # is counted: measured, the first real update is then 0.74 of what it should be.
        self.adamw.overflow = True
        asked = Asked(config)
        try:
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model.to(on), optimizer=self.adamw, config=asked
            )
        except (ValidationError, DeepSpeedConfigError) as error:  # a section refuses keys that it does not know
            raise UsageError(f"deepspeed: {error}", hint="see https://www.deepspeed.ai/docs/config-json") from error
        self.adamw.overflow = False
        asked.refuse_unknown(recipe.deepspeed)
        self.engine.config = config  # goes into every checkpoint, which has no type of ours in it
        self._check(recipe, ranks)
        self.grad_clip = recipe.optimizer.grad_clip
        # DeepSpeed computes no norm of its own at stage 0 in fp32; everywhere else it clips by its configuration.
        self.clips_itself = recipe.zero_stage == 0 and recipe.precision == "fp32"
        self.waits = Waits(self.device)
        if self.device.type == "cpu":
            self.waits.time_calls(deepspeed.comm.comm.cdb)
        else:
            self.waits.watch(model.parameters())
        self.files = CheckpointFiles()
        self.engine.checkpoint_engine = self.files
        # A copy of DeepSpeed's recovery script in every checkpoint: unneeded, and rank 0 would raise from it alone.
        self.engine._copy_recovery_script = lambda _: None
        if recipe.zero_stage == 3:
            self.engine.module_state_dict = self._module_state

    def _check(self, recipe: Recipe, ranks: Ranks) -> None:
        wanted = {
            "ZeRO stage": (recipe.zero_stage, self.engine.zero_optimization_stage()),
            "bf16": (recipe.precision == "bf16", self.engine.bfloat16_enabled()),
            "fp16": (recipe.precision == "fp16", self.engine.fp16_enabled()),
            "world size": (ranks.world_size, self.engine.world_size),
            "state on NVMe, which no checkpoint here has": (False, self.engine.zero_nvme_offload_optimizer()),
            "engine": ("DeepSpeedEngine", type(self.engine).__name__),
        }
        for what, (asked, got) in wanted.items():
            if asked != got:
                raise RuntimeError(f"DeepSpeed made {what} {got}; the recipe asks for {asked}")

    def backward(self, tensors: Tensors, factor: float, last: bool) -> Tensor:
        if self.engine.is_gradient_accumulation_boundary() != last:
            raise RuntimeError("DeepSpeed counts another accumulation than the sampler")
        losses, _ = self.engine(to_device(tensors, self.device))
        self.engine.backward(poisoned(losses.sum(), factor))
        self.waits.backward_ended()
        if not last:
            self.engine.step()  # counts the micro-batch; updates nothing
        detached: Tensor = losses.detach()
        return detached

    def step(self, learning_rate: float) -> float:
        set_rates(self.optimizer.param_groups, self.groups, learning_rate, self.done)
        norm: Any = None
        if self.clips_itself:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or math.inf))
            self.adamw.overflow = not math.isfinite(norm)
        try:
            self.engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # it has no type of its own
                raise
            raise out_of_scale() from error
        if getattr(self.optimizer, "overflow", False):
            return math.nan
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    @property
    def loss_scale(self) -> float | None:
        scale = self.engine._get_optimizer_loss_scale() if self.engine.fp16_enabled() else None
        return None if scale is None else float(scale)

    def kept(self) -> list[Tensor]:
        if self.engine.zero_optimization_stage() == 3:
            return [p.ds_tensor for p in self.model.parameters()]  # type: ignore[attr-defined]
        return super().kept()

    def _weights_exchanged(self) -> None:
        # As DeepSpeed does it after every update.
        optimizer, stage = self.optimizer, self.engine.zero_optimization_stage()
        if stage == 3:
            optimizer.checkpoint_event_prologue()  # gives up what is gathered
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()
        elif stage in (1, 2):
            optimizer.update_lp_params()
        elif optimizer is not self.adamw:
            for computed, updated in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_([p.data for p in computed], [p.data for p in updated])

    def alone(self) -> SpeechModel | None:
        if self.engine.zero_optimization_stage() != 3:
            return super().alone()
        copied = {} if self.copy is None else {**dict(self.copy.named_parameters()), **dict(self.copy.named_buffers())}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):  # one by one: all of it at once may be too much
                if copied:
                    copied[name].data.copy_(parameter.data)
        for name, buffer in self.engine.module.named_buffers():
            if copied:
                copied[name].copy_(buffer)
        return self.copy

    def _infer(self, tensors: Tensors, alone: SpeechModel | None) -> tuple[Tensor, list[str]]:
        if alone is not None:
            return super()._infer(tensors, alone)
        stage3 = self.engine.zero_optimization_stage() == 3
        losses, texts = self.engine.module(tensors, transcribe=True, in_step=stage3)
        return losses, texts

    def snapshot(self, memory: HostMemory) -> list[File]:
        """What `save_checkpoint` of DeepSpeed would save, without what it does around that: barriers, and at ZeRO 3 all
        parameters given up first and about 90 small ones gathered again after. Measured on a CPU, that alone took as
        long as half a copy of the state. None of it is needed: a rank's own parts are up to date whenever an update is
        over, gathered or not. A failure here keeps nobody waiting, and training finds its memory as it left it.
        """
        self.files.begin(memory)
        self.engine._save_checkpoint(str(self.files.ROOT), TAG)
        if self.engine.save_zero_checkpoint:
            self.engine._save_zero_checkpoint(str(self.files.ROOT), TAG)
        return self.files.taken

    def _module_state(self, **options: Any) -> dict[str, Any]:
        """The model's `state_dict` at ZeRO 3, as if no parameter were gathered: of those the parts are saved."""
        state: dict[str, Any] = type(self.engine).module_state_dict(self.engine, **options)
        for name, parameter in self.engine.module.named_parameters(remove_duplicate=False):
            state[name] = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return state

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder / TAG}")

    def reshard(self, folder: Path, saved_by: int, ranks: Ranks) -> None:
        if self.engine.zero_optimization_stage() == 0:
            self.load(folder)
        else:
            partitioned.load(self.engine, folder / TAG, saved_by, ranks)


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]
    """Takes what DeepSpeed wants written and writes nothing: that is the committer's, once DeepSpeed is done."""

    ROOT = Path("/nowhere")
    """What DeepSpeed is told to save to. Names below it are names below the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = HostMemory(copies=False)
        self.begin(self.memory)

    def begin(self, memory: HostMemory) -> None:
        self.memory = memory
        self.taken: list[File] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def preserves_storage_sharing(self) -> bool:
        """
        True has DeepSpeed clone the weights first, into fresh memory, so that torch.save does not write all of a flat
        buffer for a view of it. Copies of ours are of the view alone.
        """
        return not self.memory.copies

    def save(self, state_dict: Any, path: str) -> None:
        self.taken.append(self.memory.file(str(Path(path).relative_to(self.ROOT)), state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        # A pickle. `checkpoint.restore` has checked it against the manifest that this run wrote.
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
