"""The SLURM jobs of a run: submitted, asked about, cancelled; and what a job knows of itself from the inside.

Every job that a run had is a file of it, `slurm/job-12.json`, beside that job's log.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import environment, lock, report, rundir, secret
from launcher.backends import slurm
from launcher.errors import HostError, InfrastructureError, SpeechctlError, UsageError
from launcher.hosts import Host
from launcher.lock import RunLock
from launcher.nodelist import expand_nodelist
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.recipe_launch import Launch
from launcher.report import Report
from launcher.rundir import Run

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}
"""SLURM's words for a job that will do nothing any more."""

UNKNOWN = "UNKNOWN"

FORGOTTEN = "SLURM has forgotten it"

UNREACHABLE = "Unable to contact slurm controller"
"""SLURM's words where nobody has heard the question, so that it can be asked again."""

PAUSES_S = (1, 2, 4)
"""Before each further try, where something is to be done. Where something is only asked, the answer is UNKNOWN."""


@dataclass(frozen=True)
class Job:
    """A job as SLURM has it."""

    id: str
    state: str
    """One of SLURM's words, or UNKNOWN: SLURM forgets ended jobs, after some minutes where it keeps no accounts."""
    reason: str
    """Why it waits or how it ended; why it is unknown."""

    @property
    def is_there(self) -> bool:
        """Whether it waits, runs or is still ending."""
        return self.state not in ENDED and self.state != UNKNOWN

    @property
    def is_gone(self) -> bool:
        """Whether it is known to do nothing any more."""
        return self.state in ENDED or (self.state == UNKNOWN and self.reason.startswith(FORGOTTEN))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "is_there": self.is_there}

    def __str__(self) -> str:
        return f"{self.id} {self.state}" + (f" ({self.reason})" if self.reason else "")


# From outside --------------------------------------------------------------------------------------------------------


def submit(run: Run, recipe: Recipe, *, fresh: bool = False) -> Job:
    """
    Raises:
        UsageError: SLURM cannot write a log into a directory of this name.
        HostError: SLURM refused, in its own words, or cannot be reached.
    """
    if re.search(r"[\\\x00-\x1f]", str(run.root)):
        raise UsageError(
            f"SLURM takes no backslash and no control character in the path of a log, and the run is {run.root}",
            hint="--set run_dir=… somewhere else",
        )
    run.slurm.mkdir(exist_ok=True)  # sbatch would take a log that cannot be written, and the job would fail unseen
    argv = slurm.sbatch(recipe, run, spared(run, recipe), ["--fresh"] * fresh)
    job = submitted(argv, recipe.launch)
    facts = {"time": time.time(), "argv": argv, "exclude": recipe.launch.slurm.exclude, "folder": str(run.root)}
    rundir.write_json(_record(run, job), {"job": job, **facts})
    return Job(job, "PENDING", "")


def submitted(argv: Sequence[str], launch: Launch) -> str:
    """The number of the job that this sbatch asked for.

    Raises:
        HostError: as `submit`.
    """
    said = ask(argv, PAUSES_S, without=secret.sources(launch.secrets))
    if said.returncode != 0:
        words = words_of(said)
        raise HostError(f"sbatch refused the job: {words}", hint=_hint(words))
    job = said.stdout.strip().rpartition("\n")[2].partition(";")[0]  # the rest is the cluster's name
    if not job.isdecimal():
        raise HostError(
            f"expected the number of a job from sbatch, and it said {said.stdout.strip()!r}",
            hint="look at launch.slurm.options: one of them makes sbatch do something else",
        )
    return job


HINTS = (
    ("configuration source|DNS SRV", "this machine is in no SLURM cluster: go to the login node"),
    ("partition", "`sinfo` lists the partitions; set launch.slurm.partition"),
    ("account|association", "`sacctmgr show associations user=$USER` lists the accounts; set launch.slurm.account"),
    ("(?i)qos", "set launch.slurm.qos, or leave it out"),
    ("gres|generic resource", "`sinfo --format='%P %G'` lists what there is; set launch.slurm.gres"),
    ("(?i)time limit", "`sinfo --format='%P %l'` lists the longest; set launch.slurm.time"),
    ("[Nn]ode count|configuration", "`sinfo` shows what there is; set launch.nodes and launch.slurm for that"),
    (UNREACHABLE, "`scontrol ping` asks for it; try again when it answers"),
    ("unrecognized option|invalid option", "`sbatch --help` lists the options; mend launch.slurm.options"),
)


def _hint(words: str) -> str:
    return next((hint for sign, hint in HINTS if re.search(sign, words)), "mend what it names in launch.slurm")


def current(run: Run) -> Job | None:
    """The last job of this run, as SLURM has it now; None where it never had one."""
    ids = sorted((p.stem.removeprefix("job-") for p in run.slurm.glob("job-*.json")), key=lambda x: (len(x), x))
    return _look_up(run, ids[-1]) if ids else None


def _look_up(run: Run, job: str) -> Job:
    return look_up(job, (rundir.read_json(_record(run, job)) or {}).get("folder"))


def look_up(job: str, folder: str | None = None) -> Job:
    """By squeue, which also knows jobs that ended a while ago; where it does not, by sacct, which may not be there.

    Args:
        folder: the directory that the job starts in. Its number alone does not say which job it is: another cluster on
            the same home directory counts by itself, and one that was set up anew begins again.
    """
    try:
        said = ask(["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%r|%Z"])
        found = re.match(r"([A-Z_]+)\|([^|]*)\|?(.*)", said.stdout.strip()) if said.returncode == 0 else None
        if found is not None:
            return _same(Job(job, found[1], found[2].replace("None", "")), found[3], folder)
        if UNREACHABLE in said.stderr:
            return Job(job, UNKNOWN, UNREACHABLE)
        if said.returncode != 0 and "Invalid job id" not in said.stderr:
            return Job(job, UNKNOWN, words_of(said))
        accounts = ["sacct", "--noheader", "--allocations", f"--jobs={job}", "--parsable2", "--format=State,WorkDir"]
        said = ask(accounts)
        if said.returncode == 0 and said.stdout.strip():
            state, _, where = said.stdout.partition("\n")[0].partition("|")
            return _same(Job(job, state.split()[0], ""), where, folder)  # `CANCELLED by 1000`
        return Job(job, UNKNOWN, FORGOTTEN)
    except HostError as error:
        return Job(job, UNKNOWN, error.message)


def _same(job: Job, where: str, folder: str | None) -> Job:
    if not where or folder is None or where == folder:
        return job
    return Job(job.id, UNKNOWN, f"{FORGOTTEN}: its {job.id} is another job, of {where}")


def report_of(run: Run) -> Report:
    """The report of a run, with what SLURM says of its last job, if it had one."""
    value = report.read(run)
    job = None if is_inside(run) else current(run)
    return value if job is None else replace(value, job=job.to_json())


def refuse_second(run: Run) -> None:
    """
    Raises:
        UsageError: a job of this run is there already.
    """
    job = current(run)
    if job is not None and job.is_there:
        raise UsageError(
            f"{run.root} has a job already: {job}",
            hint=f"watch it with `speechctl status {run.root}`, end it with `speechctl stop {run.root}`",
        )


def cancel(job: Job) -> None:
    """
    Raises:
        HostError: SLURM refused, or cannot be reached.
    """
    said = ask(["scancel", job.id], PAUSES_S)
    if said.returncode != 0:
        raise HostError(f"scancel refused: {words_of(said)}", hint=f"`scancel {job.id}` by hand, when SLURM answers")


def environment_of_a_job(given: Mapping[str, str] = os.environ, *, without: Container[str] = ()) -> dict[str, str]:
    """What a job gets of the user's environment: what ranks may have, this command, and settings for SLURM's own
    commands. SLURM keeps the environment of every job that waits, so that nothing else is sent there.

    Args:
        without: names of secrets, besides what looks like one.
    """
    # Inside a job most of SLURM's variables are that job's, and the commands would take them for settings.
    settings = r"SBATCH_\w+|SLURM_CONF" + ("" if "SLURM_JOB_ID" in given else r"|SLURM_\w+")
    kept = {
        name: value
        for name, value in given.items()
        if (environment.PASSED_ON.fullmatch(name) and not secret.implied(name, value) and name not in without)
        or re.fullmatch(settings, name)
    }
    return kept | {"PATH": f"{Path(sys.executable).parent}:{given.get('PATH', os.defpath)}"}


def ask(
    argv: Sequence[str], pauses_s: Sequence[int] = (), *, without: Container[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, again after each pause while nobody can be reached.

    Args:
        without: as for `environment_of_a_job`.

    Raises:
        HostError: it is not there, or does not end.
    """
    for pause in (*pauses_s, None):
        try:
            said = subprocess.run(
                argv,
                env=environment_of_a_job(without=without),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=120,
                check=False,
            )
        except OSError as error:
            raise HostError(
                f"cannot start {argv[0]}: {error.strerror}",
                hint="run this where SLURM's commands are on PATH, such as the cluster's login node",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise HostError(
                f"{argv[0]} does not end", hint="`scontrol ping` asks whether SLURM's controller answers"
            ) from error
        if said.returncode == 0 or UNREACHABLE not in said.stderr or pause is None:
            return said
        time.sleep(pause)
    raise AssertionError("not reached")


def words_of(said: subprocess.CompletedProcess[str]) -> str:
    """What a command said, in a line, without its own name before each."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line).strip() for line in said.stderr.splitlines()]
    return "; ".join(line for line in lines if line) or f"it ended with {said.returncode} without a word"


def _record(run: Run, job: str) -> Path:
    return run.slurm / f"job-{job}.json"


# From inside ---------------------------------------------------------------------------------------------------------


class LockInJob(RunLock):
    """The run's lock for a job. SLURM starts another life of a job when it has lost the host of the one before, where
    that may still be ending; then this one is to come again, not to fail, but not for ever: it holds its nodes.

    Raises:
        InfrastructureError: on entry, when another process still holds it.
        UsageError: the same, and it is another job that is there, or this one has come `LIVES` times for it.
    """

    PATIENCE_S = 60
    LIVES = 3

    def __enter__(self) -> RunLock:
        job = os.environ.get("SLURM_JOB_ID", "")
        try:
            super().__enter__()
        except UsageError as error:
            if not job:
                raise
            other = (lock.holder(self.run) or {}).get("job")
            record = record_here(self.run)
            record["came"] = record.get("came", 0) + 1
            rundir.write_json(_record(self.run, job), record)
            if record["came"] >= self.LIVES or (
                other is not None and other != job and _look_up(self.run, other).is_there
            ):
                raise
            raise InfrastructureError(error.message, hint=error.hint) from error
        record = rundir.read_json(_record(self.run, job)) or {}
        if record.pop("came", 0):
            rundir.write_json(_record(self.run, job), record)
        return self


def is_inside(run: Run) -> bool:
    """Whether this process is in a job of the run."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and _record(run, job).exists()


def allocation(run: Run, recipe: Recipe, plan: Plan) -> list[Host]:
    """The hosts that SLURM gave to the job that this process runs in, which from here on is a job of the run.

    Raises:
        UsageError: there is no job around this process, or not one for this run.
    """
    job, names = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if job is None or names is None:
        raise UsageError(
            "--in-allocation is for a process in a SLURM job, and this is in none",
            hint=f"`speechctl resume {run.root}` submits a job; slurm/train.sbatch runs this in it",
        )
    if recipe.launch.backend != "slurm":
        raise UsageError(
            f"{run.root} was launched for backend {recipe.launch.backend}, not for a SLURM job",
            hint="launch it with --backend slurm and a run_dir of its own",
        )
    found = expand_nodelist(names)
    record_here(run)
    return [Host(name, plan.hosts[0].slots) for name in found]


def record_here(run: Run) -> dict[str, Any]:
    """What is recorded of the job that this process runs in; of one that was submitted by hand that begins here."""
    job = os.environ["SLURM_JOB_ID"]
    run.slurm.mkdir(exist_ok=True)
    if not _record(run, job).exists():
        said = ask(["squeue", "--noheader", f"--jobs={job}", "--format=%x|%Z"]).stdout.strip()
        excluded, _, folder = said.replace("(null)", "").partition("|")
        facts = {"time": time.time(), "argv": None, "exclude": excluded or None, "folder": folder or None}
        rundir.write_json(_record(run, job), {"job": job, **facts})
    return dict(rundir.read_json(_record(run, job)))


def has_begun(run: Run) -> bool:
    """Whether ranks of this job have trained already, in an earlier life of it."""
    job = os.environ.get("SLURM_JOB_ID")
    mine = [a for a in run.attempts() if any(e.get("job") == job for e in rundir.read_lines(a.supervisor))]
    return any(e["event"] == "started" for a in mine for e in rundir.read_lines(a.events))


def leave_exclusions(run: Run, recipe: Recipe) -> None:
    """Say which hosts the job's next life is to keep away from, where train.sbatch looks for it; also that there are
    none any more, where it was told of some. That this fails is no reason for the attempt to end in another way."""
    with suppress(SpeechctlError):
        own = (rundir.read_json(_record(run, os.environ["SLURM_JOB_ID"])) or {}).get("exclude")
        names, told = spared(run, recipe), run.slurm / "exclude"
        if names or told.exists():
            rundir.write_bytes(told, ",".join(filter(None, [own, *names])).encode())


def spared(run: Run, recipe: Recipe) -> list[str]:
    """Hosts at which something failed not long ago, as far as there are enough others that can take their place: a job
    that cannot have its nodes would wait for ever."""
    avoided = rundir.avoided(run)
    if not avoided or recipe.launch.nodes == "auto":
        return []
    # By its default partition, where neither the recipe nor a job says one.
    partition = recipe.launch.slurm.partition or (os.environ.get("SLURM_JOB_PARTITION") if is_inside(run) else None)
    where = [f"--partition={partition}"] if partition else []
    said = ask(["sinfo", "--noheader", "--Node", "--format=%N|%P|%t|%c|%m|%G|%f", *where])
    rows = [line.split("|", 6) for line in said.stdout.splitlines() if line.count("|") >= 6]
    nodes = {row[0]: _Kind(*row[2:]) for row in rows if partition or row[1].endswith("*")}
    there = [name for name in avoided if name in nodes]  # sbatch refuses a name that it does not know
    left = {n for n, kind in nodes.items() if any(kind.can_replace(nodes[name]) for name in there)} - set(there)
    with suppress(UsageError):  # it may be the name of a file
        left -= set(expand_nodelist(recipe.launch.slurm.exclude or ""))
    return there if said.returncode == 0 and len(left) >= recipe.launch.nodes else []


@dataclass(frozen=True)
class _Kind:
    """What sinfo says of a node."""

    state: str
    processors: str
    megabytes: str
    gres: str
    features: str

    def can_replace(self, other: _Kind) -> bool:
        """Whether a job that could run there can run here, whatever it asks for."""
        same = (self.processors, self.gres, self.features) == (other.processors, other.gres, other.features)
        # Without `*`, which is for a node that does not answer; `~` is one that saves power.
        usable = re.fullmatch(r"(idle|alloc|mix|comp)[~#+]?", self.state) is not None
        return usable and same and float(self.megabytes.rstrip("+")) >= 0.9 * float(other.megabytes.rstrip("+"))
