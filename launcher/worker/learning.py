"""What of a model learns, when, and how fast: frozen parts, rates that fall from part to part, adapters, and what is
computed once more on the way back. The optimizer that follows from it is the same under every engine."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher import sealing
from launcher.errors import UsageError
from launcher.recipe import Recipe
from launcher.recipe_optimization import Freeze, Lora
from launcher.worker.adamw import AdamW
from launcher.worker.backbone import CtcModel, SpeechModel
from launcher.worker.tiny_ctc import TinyCtcModel


def prepare(model: SpeechModel, recipe: Recipe) -> SpeechModel:
    """`model` as this recipe trains it, in place: with adapters, and without gradients where nothing ever learns.

    Raises:
        UsageError: the recipe names parts or modules that this model has not.
    """
    if recipe.lora is not None:
        adapt(model, recipe.lora)
    freeze_for_ever(model, recipe.freeze)
    if not model.trained():
        raise UsageError("nothing of the model learns: all of it is frozen", hint="take a part out of `freeze`")
    if recipe.activation_checkpointing:
        compute_again(model)
    return model


def identity(recipe: Recipe, vocabulary: str) -> str:
    """A hash of all that decides which weights there are, how the optimizer groups them, and whether it keeps their
    average: a checkpoint fits no other. `vocabulary` is the digest of the run's.

    What is frozen for some steps only is in the optimizer all the time, and may change.
    """
    value: dict[str, Any] = {}
    if recipe.lora is not None:
        value["lora"] = recipe.lora.model_dump(exclude={"dropout"})
    if recipe.freeze:
        value["freeze"] = [freeze.model_dump(include={"parts", "but"}) for freeze in recipe.freeze]
    if recipe.optimizer.layer_decay != 1:
        value["layer_decay"] = True
    if recipe.optimizer.ema is not None:
        value["ema"] = True
    return sealing.digest_json([recipe.backbone.model_dump(), vocabulary, *([value] if value else [])])


# Parts ---------------------------------------------------------------------------------------------------------------


def matching(model: SpeechModel, patterns: Iterable[str], field: str) -> set[str]:
    """The parts that the patterns of a field mean."""
    parts = list(model.parts())
    found: set[str] = set()
    for pattern in patterns:
        mine = {part for part in parts if fnmatchcase(part, pattern)}
        if not mine:
            raise UsageError(f"{field}: the model has no part '{pattern}'", hint=f"its parts are {', '.join(parts)}")
        found |= mine
    return found


def part_of(model: SpeechModel) -> dict[str, str]:
    """The part of every parameter, by the parameter's name and in their order."""
    parts = model.parts()
    longest = sorted(((prefix, part) for part, all_of in parts.items() for prefix in all_of), key=lambda p: -len(p[0]))
    return {
        name: next(part for prefix, part in longest if name.startswith(prefix)) for name, _ in model.named_parameters()
    }


def require_grad(model: SpeechModel, parts: set[str], value: bool) -> None:
    of = part_of(model)
    for name, parameter in model.named_parameters():
        if of[name] in parts:
            parameter.requires_grad_(value)


def freeze_for_ever(model: SpeechModel, rules: Iterable[Freeze]) -> None:
    """Take the gradients from what never learns; looks at the other rules, too."""
    for freeze in rules:
        names = matching(model, freeze.parts, "freeze.parts") - matching(model, freeze.but, "freeze.but")
        if freeze.is_forever:
            require_grad(model, names, False)


# The optimizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike: one group of the optimizer."""

    parameters: list[nn.Parameter]
    weight_decay: float
    scale: float
    """Share of the learning rate."""
    frozen: tuple[Freeze, ...]
    """What freezes them, each for some of the steps."""

    def is_frozen(self, step: int) -> bool:
        """
        Args:
            step: how many are done.
        """
        return any(f.after_steps <= step and (f.until_steps is None or step < f.until_steps) for f in self.frozen)


def groups(model: SpeechModel, recipe: Recipe) -> list[Group]:
    """Everything that ever learns. Weight decay on matrices only."""
    parts, of = list(model.parts()), part_of(model)
    rules = [
        (f, matching(model, f.parts, "freeze.parts") - matching(model, f.but, "freeze.but"))
        for f in recipe.freeze
        if not f.is_forever
    ]
    found: dict[Any, list[nn.Parameter]] = {}
    for name, parameter in model.trained():
        decay = recipe.optimizer.weight_decay if parameter.ndim >= 2 else 0.0
        scale = recipe.optimizer.layer_decay ** (len(parts) - 1 - parts.index(of[name]))
        frozen = tuple(number for number, (_, names) in enumerate(rules) if of[name] in names)
        # Matrices first, as if there were neither rates nor rules: those of older checkpoints lie so.
        found.setdefault((parameter.ndim < 2, -scale, frozen, decay), []).append(parameter)
    return [
        Group(found[key], key[3], -key[1], tuple(rules[number][0] for number in key[2]))
        for key in sorted(found, key=lambda k: k[:3])
    ]


def optimizer_for(all_groups: Sequence[Group], recipe: Recipe) -> AdamW:
    options = recipe.optimizer
    optimizer = AdamW(
        [{"params": group.parameters, "weight_decay": group.weight_decay} for group in all_groups],
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        fused=True if recipe.offload.optimizer else None,
    )
    optimizer.ema = options.ema
    return optimizer


def set_rates(param_groups: Sequence[dict[str, Any]], all_groups: Sequence[Group], rate: float, step: int) -> None:
    """Tell the optimizer what the step that follows on `step` is done with."""
    for of_torch, group in zip(param_groups, all_groups, strict=True):
        of_torch["lr"] = rate * group.scale
        of_torch["frozen"] = group.is_frozen(step)


def freeze(all_groups: Sequence[Group], step: int) -> bool:
    """Have gradients computed for what learns in the step that follows on `step`, and for nothing else.

    Returns:
        whether anything has changed by it.
    """
    changed = False
    for group in all_groups:
        if group.frozen and group.parameters[0].requires_grad == group.is_frozen(step):
            changed = True
            for parameter in group.parameters:
                parameter.requires_grad_(not group.is_frozen(step))
                parameter.grad = None
    return changed


# Adapters ------------------------------------------------------------------------------------------------------------


def adapt(model: SpeechModel, lora: Lora) -> None:
    """Put adapters into `model`. They learn, and a fresh CTC head, and what the recipe names besides.

    Raises:
        UsageError: the model has no such modules or parts, or adapters there would say nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inner = model.inner
    if unheard := [target for target in lora.targets if target.rpartition(".")[2] in model.unadaptable]:
        raise UsageError(
            f"lora.targets: {', '.join(unheard)}: {model.backbone.kind} reads these weights past any adapter",
            hint="its feed-forward layers take adapters: targets: [intermediate_dense, output_dense]",
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    try:
        inject_adapter_in_model(config, inner)
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in inner.named_modules() if isinstance(m, nn.Linear)}
        raise UsageError(
            f"lora.targets: {', '.join(lora.targets)}: {error}",
            hint=f"its linear modules are {', '.join(sorted(linear))}",
        ) from error
    train = matching(model, lora.train, "lora.train") | ({"head"} if isinstance(model, CtcModel) else set())
    require_grad(model, train, True)


def merge(model: SpeechModel) -> None:
    """Add what the adapters have learned to the weights that they adapt, and take them out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in adapters:
        module.merge(safe_merge=True)
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, module.get_base_layer())
    inner = model.inner
    if hasattr(inner, "peft_config"):  # transformers would save adapters, and not the model
        del inner.peft_config
        inner._hf_peft_config_loaded = False


# Memory --------------------------------------------------------------------------------------------------------------


def compute_again(model: SpeechModel) -> None:
    """Keep what goes into each layer, and no more, for the way back. Without re-entering autograd: that would need an
    input with a gradient, which the first layer behind a frozen part has not."""
    if not isinstance(model, TinyCtcModel):
        inner = model.inner
        # Its name from transformers 5.23 on; the one of before warns, and 4.57 has no other.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        return
    for block in model.model.blocks:
        block.forward = functools.partial(_twice, block, block.forward)


def _twice(module: nn.Module, forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if module.training else forward(*inputs)
