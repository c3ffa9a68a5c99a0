"""What ranks need around them on a host: its GPUs, the environment they run in, and what must be there first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from launcher.errors import PreflightError
from launcher.hosts import Host
from launcher.recipe import Recipe

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHONPATH|LD_LIBRARY_PATH|XDG_\w+|CUDA_\w+|NCCL_\w+"
    r"|GLOO_\w+|TORCH_\w+|PYTORCH_\w+|CUBLAS_\w+|CUDNN_\w+|HF_\w+|TRANSFORMERS_\w+|OMP_\w+|MKL_\w+|DS_\w+"
    r"|(?i:https?|all|no)_(?i:proxy)|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|LD_PRELOAD|PYTHONDEVMODE|COVERAGE_\w+"
)
"""Environment variables that ranks inherit; no other crosses."""


def gpu_count(device: str = "auto") -> int:
    """NVIDIA GPUs that this process may use and the recipe wants (`launch.device`), without asking torch."""
    if device == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def base_variables(processes: int, device: str = "auto") -> dict[str, str]:
    """Settings that every process of the worker wants; the user's own values win."""
    variables = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
    }
    gpus = gpu_count(device)
    if not gpus:
        # glibc gives freed tensors back to the kernel and asks for them again at every step: measured 221 ms against
        # 148 ms for the same bare loop on a CPU.
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "MALLOC_TRIM_THRESHOLD_": "4000000000",
            "MALLOC_MMAP_THRESHOLD_": "1000000000",
        }
    variables = {name: os.environ.get(name, value) for name, value in variables.items()}
    # Ranks check that torch sees what was counted here, and see no GPU that was not counted.
    return variables | {"SPEECHCTL_GPUS": str(gpus)} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})


def rank_variables(backend: str, processes: int, device: str) -> dict[str, str]:
    """The whole environment of a rank: what is passed on, and our own settings."""
    passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if backend == "local" else {}
    return passed_on | base_variables(processes, device) | interface


def check(recipe: Recipe, hosts: Sequence[Host], gpus: int) -> None:
    """Refuse what would fail minutes later on this machine.

    Raises:
        PreflightError: more ranks than GPUs, or a package that the recipe needs is not installed.
    """
    slots = max(h.slots for h in hosts)
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
