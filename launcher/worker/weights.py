"""The weights of a sealed checkpoint, their moving average, or the average of several checkpoints, in one process: for
whoever wants the model and not its training."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

from launcher import recipe as schema
from launcher import recipe_file, sealed, sealing
from launcher.errors import DataError, UsageError
from launcher.rundir import Run
from launcher.worker import learning, vocabularies
from launcher.worker.adamw import EMA
from launcher.worker.backbone import SpeechModel
from launcher.worker.models import build
from launcher.worker.shards import Shards

Weights = dict[str, torch.Tensor]
"""By name."""


def weights_of(run: Run, step: int) -> Weights:
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


def ema_of(run: Run, step: int, model: SpeechModel) -> Weights:
    """The same with the moving average in the place of what learns. What is frozen, or has not been updated yet, is its
    own average.

    Args:
        model: as it is trained: with adapters apart, and without gradients where nothing ever learns.

    Raises:
        DataError: the checkpoint does not verify.
        UsageError: the run keeps no average.
    """
    recipe = recipe_file.load(run.resolved)
    if recipe.optimizer.ema is None:
        raise UsageError(
            f"{run.root} keeps no moving average of its weights",
            hint="a run whose recipe has optimizer.ema does; --average last:5 is the mean of its last checkpoints",
        )
    weights = weights_of(run, step)
    folder, identity = run.checkpoint(step), sealing.manifest_of(run.checkpoint(step))["identity"]
    stage = identity["zero_stage"]
    parameters = dict(model.named_parameters())
    if stage in ("1", "2", "3"):
        shards = Shards(folder / "deepspeed", int(stage), identity["world_size"])
        for name, size in shards.sizes().items():
            weights[name] = shards.read(EMA, name, 0, size).view(parameters[name].shape)
        return _tied(weights, model)
    if stage == "off":
        saved = torch.load(folder / "accelerate.pt", map_location="cpu", weights_only=True)["optimizer"]
    else:
        path = folder / "deepspeed" / "mp_rank_00_model_states.pt"
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["optimizer"]
        saved = saved.get("optimizer_state_dict", saved)  # AdamW's, inside of that for bf16 and fp16
    # The optimizer knows parameters by their number, group by group.
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    in_order = [names[id(parameter)] for group in learning.groups(model, recipe) for parameter in group.parameters]
    for number, name in zip(numbers, in_order, strict=True):
        if EMA in (state := saved["state"].get(number, {})):
            weights[name] = state[EMA].view(parameters[name].shape)
    return _tied(weights, model)


def _tied(weights: Weights, model: SpeechModel) -> Weights:
    """With what the optimizer has under the first name of a parameter under its others, too: a checkpoint has tied
    weights under each, and loading takes the last."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name != (known := first.setdefault(id(parameter), name)) and name in weights:
            weights[name] = weights[known]
    return weights


def average_of(run: Run, steps: Sequence[int], of: Callable[[int], Weights] | None = None) -> Weights:
    """The mean of what several checkpoints of one run hold, as `of` gives it, or else `weights_of`: each element is
    summed in float64, oldest first, divided by their number and rounded once to float32. What is not floating-point,
    such as a counter, is the newest's. Of equal tensors the mean is that tensor, bit for bit: frozen weights stay what
    they are.

    Takes the memory of three copies of the weights: the sum has two.

    Raises:
        DataError: a checkpoint does not verify, or holds other weights than the one before it.
    """
    first, *others = sorted(steps)
    of = of or functools.partial(weights_of, run)
    newest = of(first)
    sums = {name: tensor.double() for name, tensor in newest.items() if tensor.is_floating_point()}
    for step in others:
        newest = of(step)
        shapes = {name: tensor.shape for name, tensor in newest.items() if tensor.is_floating_point()}
        if shapes != {name: total.shape for name, total in sums.items()}:
            raise DataError(
                f"{run.checkpoint(step)} holds other weights than {run.checkpoint(first)}",
                hint="average checkpoints of one model; `speechctl checkpoint verify` looks at each",
            )
        for name, total in sums.items():
            total += newest[name]
    return {name: sums[name].div_(len(steps)).float() if name in sums else newest[name] for name in newest}


def source_of(run: Run, steps: Sequence[int], *, ema: bool = False) -> dict[str, Any]:
    """Which checkpoints weights were taken from, for the record: the newest, and all where there are several; and which
    weights: `trained`, their moving average `ema`, or the `average` of several checkpoints."""
    digests = {step: str(sealing.manifest_of(run.checkpoint(step))["digest"]) for step in sorted(steps)}
    newest = max(steps)
    weights = EMA if ema else "trained" if len(steps) == 1 else "average"
    source: dict[str, Any] = {"run": str(run.root), "step": newest, "checkpoint": digests[newest], "weights": weights}
    if len(steps) > 1:
        source["average_of"] = [{"step": step, "checkpoint": digest} for step, digest in digests.items()]
    return source


def restored(
    run: Run,
    step: int | Sequence[int],
    backbone: schema.Backbone,
    seed: int,
    *,
    merged: bool = True,
    ema: bool = False,
) -> SpeechModel:
    """The model with the weights of a sealed checkpoint, or with the average of several.

    Args:
        merged: adapters are merged into the weights; otherwise they are as in training. An average is then that of the
            merged weights.
        ema: take the moving average of the weights, of one checkpoint.

    Raises:
        DataError: a checkpoint does not verify, or holds other weights than the model has.
        UsageError: the run keeps no moving average.
    """
    steps = [step] if isinstance(step, int) else step
    model = build(backbone, seed=seed, vocabulary=vocabularies.of_run(run))
    recipe = recipe_file.load(run.resolved)
    lora, of = recipe.lora, functools.partial(weights_of, run)
    if lora is not None and merged and len(steps) > 1:
        # The product of two means is not the mean of the products: merged first, averaged then.
        lora, of = None, functools.partial(_merged_of, run, backbone, seed)
    if lora is not None:
        learning.adapt(model, lora)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # DeepSpeed prints its progress, and stdout is for our answer
        if ema:
            learning.freeze_for_ever(model, recipe.freeze)
            weights = ema_of(run, steps[0], model)
        else:
            weights = weights_of(run, steps[0]) if len(steps) == 1 else average_of(run, steps, of)
    problems: Any = model.load_state_dict(weights, strict=False)
    # Tied weights are stored once; whatever is left must share memory with something that was loaded.
    loaded = {t.data_ptr() for n, t in model.state_dict().items() if n in weights}
    missing = [n for n in problems.missing_keys if model.state_dict()[n].data_ptr() not in loaded]
    if missing or problems.unexpected_keys:
        raise DataError(
            f"{run.checkpoint(max(steps))} does not hold this model: missing {missing[:3]}, unexpected"
            f" {problems.unexpected_keys[:3]}",
            hint="evaluate and export with the version of speechctl that trained the run",
        )
    if lora is not None and merged:
        learning.merge(model)
    return model


def _merged_of(run: Run, backbone: schema.Backbone, seed: int, step: int) -> Weights:
    """As `weights_of`, with adapters merged."""
    return restored(run, step, backbone, seed).state_dict()
