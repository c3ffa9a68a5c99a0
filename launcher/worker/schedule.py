"""The learning rate: a pure function of the step, which makes it exact after any resume."""

from __future__ import annotations

import math

from launcher.recipe_optimization import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, max_steps: int) -> float:
    """Of the step that begins when `step` are done: the first has `init_scale`.

    The decay ends at `final_scale` when all steps are done, so that the last step still has a little more, as in
    fairseq's tri-stage and in the schedules of transformers.
    """
    climbed, decays = schedule.stages(max_steps)
    _, init, final = schedule.shape
    if step < climbed:
        return peak * (init + (1 - init) * step / climbed)
    if step < decays or decays >= max_steps:
        return peak
    share = min(1.0, (step - decays) / (max_steps - decays))
    if schedule.kind == "tri-stage":
        return peak * math.exp(math.log(final) * share)
    left = 1 - share if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return peak * (final + (1 - final) * left)
