"""A sealed checkpoint's weights in one process, for whoever wants the model and not its training."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from launcher import recipe as schema
from launcher import recipe_file, sealed
from launcher.errors import DataError
from launcher.rundir import Run
from launcher.worker import learning, vocabularies
from launcher.worker.backbone import SpeechModel
from launcher.worker.models import build


def weights_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    """All weights of a sealed checkpoint, consolidated, fp32, on the CPU, in one process.

    Raises:
        DataError: the checkpoint does not verify.
    """
    manifest = sealed.verify(run, step)
    folder = run.checkpoint(step)
    stage = manifest["identity"]["zero_stage"]
    if stage == "off":
        saved = torch.load(folder / "accelerate.pt", map_location="cpu", weights_only=True)["model"]
    else:
        saved = {}
        if stage != "3":  # in bf16 these are the weights that were computed with
            path = folder / "deepspeed" / "mp_rank_00_model_states.pt"
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"]
        if stage != "0":
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            # At stage 1 these are the trained ones alone: without the others, no run with frozen weights was exported.
            saved = {**saved, **get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="deepspeed")}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in saved.items()}


def restored(run: Run, step: int, backbone: schema.Backbone, seed: int) -> SpeechModel:
    """The model with the weights of one sealed checkpoint, adapters merged into them.

    Raises:
        DataError: the checkpoint does not verify, or holds other weights than the model has.
    """
    model = build(backbone, seed=seed, vocabulary=vocabularies.of_run(run))
    lora = recipe_file.load(run.resolved).lora
    if lora is not None:
        learning.adapt(model, lora)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights = weights_of(run, step)  # DeepSpeed prints its progress, and stdout is for our answer
    problems: Any = model.load_state_dict(weights, strict=False)
    # Tied weights are stored once; whatever is left must share memory with something that was loaded.
    loaded = {t.data_ptr() for n, t in model.state_dict().items() if n in weights}
    missing = [n for n in problems.missing_keys if model.state_dict()[n].data_ptr() not in loaded]
    if missing or problems.unexpected_keys:
        raise DataError(
            f"{run.checkpoint(step)} does not hold this model: missing {missing[:3]}, unexpected"
            f" {problems.unexpected_keys[:3]}",
            hint="evaluate and export with the version of speechctl that trained the run",
        )
    if lora is not None:
        learning.merge(model)
    return model
