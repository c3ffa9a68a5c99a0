"""Starting a run and going on with one: everything between the command line and the first attempt."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from launcher import (
    checkpoints,
    environment,
    facts,
    follow,
    jobs,
    lock,
    measured,
    new_run,
    ownership,
    recipe_file,
    redact,
    report,
    reshape,
    rundir,
    secret,
    supervise,
    ui,
    verbs,
    views,
)
from launcher import plan as plans
from launcher.errors import ExitCode, HostError, UsageError
from launcher.hosts import Host
from launcher.jobs import Job
from launcher.lock import RunLock
from launcher.plan import Plan
from launcher.prepare import run as preflight
from launcher.recipe import Recipe
from launcher.rundir import Run

NOT_OF: dict[str, tuple[str, ...]] = {
    "local": ("nodes=auto", "hostfile=null", "include=[]", "exclude=[]"),
    "ssh": ("processes=auto",),
    "slurm": ("hostfile=null", "include=[]", "exclude=[]"),
}
"""What a recipe may say for another backend, and what undoes it."""


def for_backend(backend: str | None) -> list[str]:
    """The overrides that have a recipe run with this backend, whatever it was written for; None: as it says."""
    if backend is None:
        return []
    return [f"launch.backend={backend}", *(f"launch.{word}" for word in NOT_OF[backend])]


DEBUG = (*for_backend("local"), "launch.processes=1", "zero_stage=off")
"""The overrides of a run in one process."""


def planned(value: Recipe, path: Path, machines: list[Host] | None = None) -> tuple[Plan, dict[str, Any]]:
    """What the recipe comes to on these hosts, or on those that it means, and the facts that this was made from.

    Args:
        path: the same recipe, as a file that the worker can read.
    """
    machines = machines or environment.machines(value)
    world_size = sum(h.slots for h in machines)
    told = facts.known(value, world_size)
    if told is None:
        told = dict(verbs.answer_of("facts", str(path), "--world-size", str(world_size)))
        facts.remember(value, world_size, told)
    return plans.make(value, machines, told), told


def launch(
    recipe: Path, overrides: list[str], *, dry_run: bool, hold: bool, debug: bool, detach: bool
) -> int | ExitCode:
    """Returns the exit code of the command."""
    with recipe_file.resolved(recipe, overrides) as (value, path):
        run = Run(value.run_path)
        if hold and new_run.is_of(run, path):
            ui.answer(str(run.root))
            return ExitCode.FINISHED
        if not dry_run and run.root.exists():
            raise new_run.in_the_way(run)
        made, told = planned(value, path)
        if dry_run:
            views.plan(made, measured.planned(value, made))
            return ExitCode.FINISHED
        values = secret.read(environment.secrets(value.launch))
        redact.use(values.values())
        secret.refuse_in_recipe(values, recipe.read_text(errors="replace") + path.read_text())
        preflight.before_launch(value, made.hosts)
        new_run.create(run, recipe, path, made, told)
    if hold:
        ui.answer(str(run.root))
        return ExitCode.FINISHED
    if value.launch.backend == "slurm":
        return _submit_new(run, value)
    steps, ranks = ui.counted(made.max_steps, "step"), ui.counted(made.world_size, "rank")
    ui.say(f"{made.name}: {steps} on {ranks}, in {run.root}")
    if detach and follow.is_needed(value.launch.backend):
        return follow.tell_detached(run)
    with RunLock(run, _command()):
        return _attempts(run, value, made, fresh=False, debug=debug)


def resume(
    run: Run, overrides: list[str], *, fresh: bool, debug: bool, in_allocation: bool, detach: bool
) -> int | ExitCode:
    """
    Args:
        overrides: of what may change (`reshape.py`); they stay.

    Returns:
        the exit code of the command.
    """
    report.read(run)  # refuses what is no run before anything is written there
    ownership.refuse_foreign(run)
    if detach and follow.is_needed(recipe_file.load(run.resolved).launch.backend):
        words = [word for override in overrides for word in ("--set", override)]
        return follow.tell_detached(run, *["--fresh"] * fresh, *words)
    with (jobs.LockInJob if in_allocation else RunLock)(run, _command()):
        reshape.refuse_others(run, overrides)
        state = report.read(run)
        if state.state == "finished" and not fresh and _is_whole(run, state):
            ui.say(f"{run.root} is finished")
            show(run)
            return ExitCode.FINISHED
        new_run.refuse_edited(run)
        hosts: list[Host] | None = None
        if in_allocation:
            before = plans.Plan.from_json(rundir.read_json(run.plan))
            hosts = jobs.allocation(run, recipe_file.load(run.resolved), before)
            overrides = [f"launch.nodes={len(hosts)}"] if len(hosts) != len(before.hosts) else []
        value, made = _go_on(run, overrides, hosts)
        if debug and (value.zero_stage != "off" or value.launch.processes != 1):
            raise UsageError("this run was not launched with --debug", hint=f"`speechctl resume {run.root}`")
        if in_allocation:
            fresh = fresh and not jobs.has_begun(run)  # that was in an earlier life of this job
            try:
                return _attempts(run, value, made, fresh=fresh, debug=False)
            finally:
                jobs.leave_exclusions(run, value)
        if value.launch.backend == "slurm":
            return _submitted(run, jobs.submit(run, value, fresh=fresh))
        preflight.before_launch(value, made.hosts)
        return _attempts(run, value, made, fresh=fresh, debug=debug)


def _is_whole(run: Run, state: report.Report) -> bool:
    """Whether a run that came to its end still has what it came to."""
    if state.history and state.history[-1].why:
        return True
    return state.max_steps in state.sealed and checkpoints.verify(run, state.max_steps).state == "verified"


def _go_on(run: Run, overrides: list[str], hosts: list[Host] | None) -> tuple[Recipe, Plan]:
    """The run's recipe and plan, for `hosts` or those that it means now; written down where they change."""
    made = plans.Plan.from_json(rundir.read_json(run.plan))
    with recipe_file.resolved(run.resolved, overrides) as (value, path):
        if hosts is None:
            if value.launch.backend == "slurm":
                jobs.refuse_second(run)
                if not overrides:
                    return value, made
            hosts = environment.machines(value, rundir.avoided(run))
        was, now = made.world_size, sum(h.slots for h in hosts)
        reshape.refuse_unasked(run, value, was, hosts)
        if was == now and not overrides:
            # Another host may have taken the place of one that died.
            return value, dataclasses.replace(made, hosts=hosts)
        made, _ = planned(value, path, hosts)
        reshape.record(run, path, made)
        if was != now:
            ui.say(f"{run.root} goes on with {ui.counted(now, 'rank')}; it had {was}")
        return value, made


def stop(run: Run, *, wait: bool) -> None:
    """Ask a run to end with its work sealed. A job that waits is cancelled.

    Raises:
        UsageError: nobody has the run, and no job of it waits.
        HostError: SLURM does not say whether one does.
    """
    if report.read(run).holder is None:
        job = jobs.current(run)
        if job is not None and not job.is_there and not job.is_gone:
            raise HostError(
                f"nobody has {run.root}, and its job may wait: {job}", hint=f"`scancel {job.id}` once SLURM answers"
            )
        if job is None or not job.is_there:
            raise UsageError(f"{run.root} is not running", hint=f"`speechctl status {run.root}` shows how it ended")
        jobs.cancel(job)
        ui.answer(f"{run.root}: job {job.id} is cancelled")
        return
    supervise.request_stop(run, "speechctl stop")
    while wait and lock.holder(run) is not None:
        time.sleep(0.2)
    ui.answer(f"{run.root}: {report.read(run).state if wait else 'asked to stop'}")


def show(run: Run) -> None:
    views.show(run, jobs.report_of(run))


def _command() -> str:
    """This command, for whoever finds the run's lock taken."""
    return redact.current.text(" ".join(sys.argv))


def _attempts(run: Run, value: Recipe, made: Plan, *, fresh: bool, debug: bool) -> int | ExitCode:
    """Attempts to the end of the run, and what is said of it."""
    if debug:
        code = supervise.run_debug(supervise.prepare_attempt(run, value.launch, made, fresh=fresh))
    else:
        by_hand = "SLURM_RESTART_COUNT" not in os.environ  # a job that was requeued goes on counting
        code = supervise.to_the_end(run, value, made, ui.Progress(value.max_steps), fresh=fresh, by_hand=by_hand)
    failure = rundir.read_json(run.attempts()[-1].failure)
    if failure is not None:
        ui.failed(failure)
    else:
        show(run)
    return code


def _submit_new(run: Run, value: Recipe) -> ExitCode:
    """A job for a run that was just made; where SLURM refuses it, there is no run either."""
    try:
        job = jobs.submit(run, value)
    except BaseException:
        shutil.rmtree(run.root)
        raise
    return _submitted(run, job)


def _submitted(run: Run, job: Job) -> ExitCode:
    log = run.slurm / f"job-{job.id}.log"
    ui.grid([("job", job.id), ("run", str(run.root)), ("log", str(log))])
    ui.commands_next([f"speechctl {verb} {shlex.quote(str(run.root))}" for verb in ("status", "attach", "stop")])
    return ExitCode.FINISHED
