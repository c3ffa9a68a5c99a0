"""What ranks need around them on a host: its GPUs, the environment they run in, and what must be there first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from launcher import hosts
from launcher.errors import PreflightError, UsageError
from launcher.hosts import Host
from launcher.recipe import Recipe

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


def rank_variables(backend: str, processes: int, device: str) -> dict[str, str]:
    """The environment of a rank, as far as it is known here; the node adds what depends on its machine."""
    passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    if backend == "local":
        return passed_on | base_variables(processes, device) | {"GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in passed_on.items() if not OF_A_HOST.fullmatch(name)}


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


def machines(recipe: Recipe) -> list[Host]:
    """The hosts that the recipe means, after what can be checked from here.

    Raises:
        UsageError: the hostfile cannot be used, or the run's path cannot be named in a remote shell as it is.
        PreflightError: as `check`.
    """
    found = named(recipe)
    # Of the hosts in a hostfile this machine is none; each node looks for itself.
    check(recipe, found, gpu_count(recipe.launch.device) if recipe.launch.hostfile is None else 0)
    return found


def named(recipe: Recipe) -> list[Host]:
    """The hosts that the recipe means, as they are named. Raises UsageError as `machines`."""
    launch = recipe.launch
    if launch.hostfile is None:
        return hosts.local(launch.processes, gpu_count(launch.device))
    found = hosts.select(hosts.load_hostfile(launch.hostfile), launch.include, launch.exclude)
    if not re.fullmatch(r"[A-Za-z0-9/._@%+=:,-]+", str(recipe.run_path)):
        raise UsageError(
            f"over ssh a run's path has letters, digits and /._@%+=:,- only, and this one is {recipe.run_path}",
            hint="--set run_dir=… somewhere else, where all hosts see it at the same path",
        )
    return found


def check(recipe: Recipe, machines: Sequence[Host], gpus: int) -> None:
    """Refuse what would fail minutes later on this machine.

    Raises:
        PreflightError: more ranks than GPUs, or a package that the recipe needs is not installed.
    """
    slots = max(h.slots for h in machines)
    if gpus and slots > gpus:
        raise PreflightError(
            f"launch.processes asks for {slots} ranks, and this machine shows {gpus} GPU(s): each rank needs its own",
            hint=f"--set launch.processes={gpus}, or --set launch.device=cpu to leave the GPUs alone",
        )
    if "tensorboard" in recipe.trackers and find_spec("tensorboard") is None:
        raise PreflightError(
            "the recipe's trackers name tensorboard, which is not installed",
            hint="pip install 'speechctl[tensorboard]', or --set trackers=[]",
        )
