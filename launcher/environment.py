"""What ranks need around them on a host: its GPUs, the environment they run in, and what must be there first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Container, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from launcher import hosts, secret
from launcher.errors import PreflightError, SpeechctlError, UsageError
from launcher.hosts import Host
from launcher.recipe import Recipe
from launcher.recipe_launch import Launch

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHONPATH|LD_LIBRARY_PATH|XDG_\w+|CUDA_\w+|NCCL_\w+"
    r"|GLOO_\w+|TORCH_\w+|PYTORCH_\w+|CUBLAS_\w+|CUDNN_\w+|HF_\w+|TRANSFORMERS_\w+|OMP_\w+|MKL_\w+|DS_\w+"
    r"|(?i:https?|all|no)_(?i:proxy)|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|LD_PRELOAD|PYTHONDEVMODE|COVERAGE_\w+"
)
"""Environment variables that ranks inherit; no other crosses."""


def gpu_count(device: str = "auto", given: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a process with the environment `given` may use here and the recipe wants (`launch.device`),
    without asking torch."""
    if device == "cpu":
        return 0
    visible = given.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus_of_gres(gres: str | None) -> int:
    """GPUs that SLURM's --gres asks for: `gpu:8`, `gpu:h100:8`, `gpu:a100:2,nvme:1`; or that a node has by sinfo:
    `gpu:h100:8(S:0-1)`. 0 where it names none."""
    items = re.sub(r"\([^)]*\)", "", gres or "").split(",")
    found = (re.fullmatch(r"gpu(?::(?!\d+$)[^:]+)?(?::(\d+))?", item) for item in items)
    return sum(int(match[1] or 1) for match in found if match)


def slots_of_job(launch: Launch) -> int:
    """Ranks on each node of a SLURM job."""
    gpus = 0 if launch.device == "cpu" else gpus_of_gres(launch.slurm.gres)
    return (gpus or 1) if launch.processes == "auto" else launch.processes


def base_variables(processes: int, device: str = "auto", given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings that every process of the worker wants on this machine; the user's own values, in `given`, win."""
    variables = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
    }
    gpus = gpu_count(device, given)
    if not gpus:
        # glibc gives freed tensors back to the kernel and asks for them again at every step: measured 221 ms against
        # 148 ms for the same bare loop on a CPU.
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "MALLOC_TRIM_THRESHOLD_": "4000000000",
            "MALLOC_MMAP_THRESHOLD_": "1000000000",
        }
    variables = {name: given.get(name, value) for name, value in variables.items()}
    # Ranks check that torch sees what was counted here, and see no GPU that was not counted.
    return variables | {"SPEECHCTL_GPUS": str(gpus)} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})


OF_A_HOST = re.compile(r"HOME|USER|LOGNAME|TMPDIR|XDG_\w+|CUDA_VISIBLE_DEVICES")
"""Of those, what belongs to one machine and one login: to another host its own go."""


def inherited(backend: str) -> dict[str, str]:
    """The variables here that the ranks are to have too."""
    passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    if backend == "local":
        return passed_on
    return {name: value for name, value in passed_on.items() if not OF_A_HOST.fullmatch(name)}


def secrets(launch: Launch) -> dict[str, str | None]:
    """The variables of the ranks that no file may have, each with the file that its value comes from, or None for the
    environment: those that the recipe names, and of the inherited ones those that look it."""
    implied = {name: None for name, value in inherited(launch.backend).items() if secret.implied(name, value)}
    return implied | secret.sources(launch.secrets)


def rank_variables(backend: str, processes: int, device: str, secrets: Container[str] = ()) -> dict[str, str]:
    """The environment of a rank, as far as it is known here and is to be written down; the node adds what depends on
    its machine, and the secrets."""
    variables = inherited(backend)
    if backend == "local":
        variables |= base_variables(processes, device) | {"GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in variables.items() if name not in secrets}


def on_node(variables: Mapping[str, str], host: Host, device: str) -> dict[str, str]:
    """The environment of the ranks on this machine, which is `host`: `rank_variables` and what was left open there.

    Raises:
        PreflightError: this machine has fewer GPUs than the host has ranks.
    """
    own = {name: value for name, value in os.environ.items() if OF_A_HOST.fullmatch(name)}
    whole = own | dict(variables)
    if host.gpus is not None and device != "cpu" and gpu_count(device, {}):
        whole["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.gpus))
    gpus = gpu_count(device, whole)
    if gpus and host.slots > gpus:
        raise PreflightError(
            f"{host.name} shows {gpus} GPU(s), and {host.slots} ranks are to run there: each needs its own",
            hint=f"set slots={gpus} for {host.name} in the hostfile, or launch.device=cpu to leave the GPUs alone",
        )
    return whole | base_variables(host.slots, device, whole)


def machines(recipe: Recipe, avoided: Collection[str] = ()) -> list[Host]:
    """The hosts that the recipe means, after what can be checked from here.

    Args:
        avoided: names of hosts whose place another takes, where the hostfile has more than are needed.

    Raises:
        UsageError: the hostfile cannot be used, or the run's path cannot be named in a remote shell as it is.
        PreflightError: as `check`.
    """
    found, launch = named(recipe, avoided), recipe.launch
    gpus = 0  # of hosts in a hostfile, of which this machine is none: each node looks for itself
    if launch.backend == "slurm" and launch.device != "cpu":
        gpus = gpus_of_gres(launch.slurm.gres)
    elif launch.backend == "local":
        gpus = gpu_count(launch.device)
    check(recipe, found, gpus)
    return found


def named(recipe: Recipe, avoided: Collection[str] = ()) -> list[Host]:
    """The hosts that the recipe means, as they are named. Raises UsageError as `machines`."""
    launch = recipe.launch
    if launch.backend == "slurm":  # what they are called is known in the job
        assert launch.nodes != "auto", "the recipe's schema sees to that"
        return [Host(f"node-{k:03d}", slots_of_job(launch)) for k in range(launch.nodes)]
    if launch.hostfile is None:
        return hosts.local(launch.processes, gpu_count(launch.device))
    found = hosts.select(hosts.load_hostfile(launch.hostfile), launch.include, launch.exclude)
    if not re.fullmatch(r"[A-Za-z0-9/._@%+=:,-]+", str(recipe.run_path)):
        raise UsageError(
            f"over ssh a run's path has letters, digits and /._@%+=:,- only, and this one is {recipe.run_path}",
            hint="--set run_dir=… somewhere else, where all hosts see it at the same path",
        )
    found = hosts.first(found, launch.nodes, avoided)
    return found


def moved(recipe: Recipe, now: Sequence[Host], avoided: Collection[str]) -> list[Host]:
    """Where the next attempt of a run runs that is on the hosts `now`: elsewhere where one of them is to be avoided and
    a spare one can take its place; as many ranks in all cases."""
    if recipe.launch.backend != "ssh":
        return list(now)
    try:
        found = machines(recipe, avoided)
    except SpeechctlError:  # somebody has edited the hostfile meanwhile
        return list(now)
    return found if [h.slots for h in found] == [h.slots for h in now] else list(now)


def check(recipe: Recipe, machines: Sequence[Host], gpus: int) -> None:
    """Refuse what would fail minutes later on this machine.

    Raises:
        PreflightError: more ranks than GPUs, a precision that processors do not compute in, or a package that the
            recipe needs is not installed.
    """
    local_cpu = recipe.launch.backend == "local" and not gpus
    if recipe.precision == "fp16" and (local_cpu or recipe.launch.device == "cpu"):
        why = "launch.device is cpu" if recipe.launch.device == "cpu" else "this machine shows none"
        raise PreflightError(
            f"precision fp16 needs NVIDIA GPUs, and {why}", hint="--set precision=bf16, or --set precision=fp32"
        )
    slots = max(h.slots for h in machines)
    if gpus and slots > gpus:
        there = "a node of launch.slurm.gres has" if recipe.launch.backend == "slurm" else "this machine shows"
        raise PreflightError(
            f"launch.processes asks for {slots} ranks, and {there} {gpus} GPU(s): each rank needs its own",
            hint=f"--set launch.processes={gpus}, or --set launch.device=cpu to leave the GPUs alone",
        )
    if "tensorboard" in recipe.trackers and find_spec("tensorboard") is None:
        raise PreflightError(
            "the recipe's trackers name tensorboard, which is not installed",
            hint="pip install 'speechctl[tensorboard]', or --set trackers=[]",
        )
