"""The weights of a sealed checkpoint alone, whatever they were trained with."""

from __future__ import annotations

import torch

from launcher import sealed
from launcher.rundir import Run


def weights_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    """All of them, consolidated, fp32, on the CPU, in one process.

    Raises:
        DataError: the checkpoint does not verify.
    """
    manifest = sealed.verify(run, step)
    folder = run.checkpoint(step)
    stage = manifest["identity"]["zero_stage"]
    if stage == "off":
        saved = torch.load(folder / "accelerate.pt", map_location="cpu", weights_only=True)["model"]
    elif stage == "0":  # nothing is sharded; in bf16 these are the weights that were computed with
        path = folder / "deepspeed" / "mp_rank_00_model_states.pt"
        saved = torch.load(path, map_location="cpu", weights_only=False)["module"]
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        saved = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="deepspeed")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in saved.items()}
