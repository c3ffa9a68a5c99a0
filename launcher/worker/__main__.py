"""`python -m launcher.worker VERB …`: the one door from the control side to everything that imports torch.

`train` is what torchrun starts, once for each rank; the other verbs run in one process under a command of the CLI.
What a verb answers goes to stdout, progress and errors to stderr, and the exit code is that of `launcher.errors`.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

from launcher import marks, redact, rundir, sealed
from launcher.errors import ExitCode, SpeechctlError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("attempt", type=Path)
    train.add_argument("--fresh", action="store_true")
    train.add_argument("--debug", action="store_true")
    for verb in ("facts", "pack"):
        command = verbs.add_parser(verb)
        command.add_argument("recipe", type=Path)
        if verb == "pack":
            command.add_argument("--processes", type=int, default=1)
        else:
            command.add_argument("--world-size", type=int, required=True)
    for verb in ("evaluate", "export"):
        command = verbs.add_parser(verb)
        command.add_argument("run", type=Path)
        command.add_argument("--step", type=int, required=True, action="append", help="several: their average")
        command.add_argument("--ema", action="store_true", help="the moving average of the weights")
        command.add_argument("--target", type=Path, required=True)
        if verb == "evaluate":
            command.add_argument("--subset", action="append", default=[])
            command.add_argument("--lm", type=Path)
            command.add_argument("--beam", type=int, default=50)
            command.add_argument("--lm-weight", type=float, default=2.0)
            command.add_argument("--word-score", type=float, default=0.0)
    sidecar = verbs.add_parser("sidecar")
    sidecar.add_argument("attempt", type=Path)
    sidecar.add_argument("--step", type=int, required=True)
    reshard = verbs.add_parser("reshard")
    reshard.add_argument("run", type=Path)
    reshard.add_argument("--step", type=int, required=True)
    reshard.add_argument("--ranks", type=int, required=True)
    transcribe = verbs.add_parser("transcribe")
    transcribe.add_argument("model", type=Path)
    transcribe.add_argument("files", type=Path, nargs="+")
    transcribe.add_argument("--format", action="append", choices=("txt", "json", "srt"))
    transcribe.add_argument("--output", type=Path)
    allreduce = verbs.add_parser("allreduce")
    for number in ("rank", "world-size", "port", "gpu"):
        allreduce.add_argument(f"--{number}", type=int, default=0)
    for word in ("address", "backend"):
        allreduce.add_argument(f"--{word}", required=True)
    fit = verbs.add_parser("fit")
    fit.add_argument("recipe", type=Path)
    fit.add_argument("folder", type=Path)
    fit.add_argument("--budget", type=float, required=True)
    fit.add_argument("--memory", type=int)
    fit.add_argument("--headroom", type=float, default=0.0)
    fetch = verbs.add_parser("fetch")
    fetch.add_argument("source")
    fetch.add_argument("--revision")
    options = parser.parse_args(arguments)
    if options.verb == "train":
        return train_rank(rundir.Attempt(options.attempt), options.fresh, options.debug)
    end_with_parent()
    if options.verb == "sidecar":
        beside_training()
    try:
        if options.verb in ("allreduce", "fetch"):
            from launcher.worker import preflight as implementations
        elif options.verb == "fit":
            from launcher.worker import fit as implementations  # type: ignore[no-redef]
        elif options.verb == "transcribe":
            from launcher.worker import transcribe as implementations  # type: ignore[no-redef]
        else:
            from launcher.worker import verbs as implementations  # type: ignore[no-redef]
        with reading(options):
            return int(getattr(implementations, options.verb)(options))
    except SpeechctlError as error:
        print(error.render(), file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130


def reading(options: argparse.Namespace) -> ExitStack:
    """The leases of a verb that works on checkpoints: a run that goes on meanwhile does not remove them."""
    leases = ExitStack()
    if options.verb in ("evaluate", "export", "sidecar"):
        run = rundir.Attempt(options.attempt).run if options.verb == "sidecar" else rundir.Run(options.run)
        for step in [options.step] if options.verb == "sidecar" else options.step:
            leases.enter_context(sealed.lease(run.checkpoint(step)))
    return leases


def beside_training() -> None:
    """What becomes of a process that rank 0 starts must not reach training: the kernel takes it first, for time and for
    memory. Rank 0 ends it, and nobody else."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is said to a rank's group is meant for the rank
    os.nice(10)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    redact.use_environment(os.environ)
    redact.filter_output()
    marks.open_slot(0, 0)
    marks.mark("imports")


def train_rank(attempt: rundir.Attempt, fresh: bool, debug: bool) -> int:
    """One rank, with everything around it that must stand before torch is imported."""
    rank = int(os.environ.get("RANK", "0"))
    stop_flag = [False]
    redact.use_environment(os.environ)
    if not debug:
        end_with_parent()
        log = os.open(attempt.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        redact.filter_output()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's
    else:
        signal.signal(signal.SIGINT, lambda *_: stop_flag.__setitem__(0, True))
    # A handler sets a flag and no more; all ranks agree on it after the step.
    signal.signal(signal.SIGTERM, lambda *_: stop_flag.__setitem__(0, True))
    faulthandler.enable()
    # In its own file, by the handler itself, in C: also where the interpreter is stuck in somebody's library.
    stack = None if debug else attempt.stack(rank).open("ab")
    faulthandler.register(signal.SIGUSR1, file=stack or sys.stderr)
    if not debug:
        marks.open_slot(rank, int(os.environ.get("LOCAL_RANK", "0")))
        marks.mark("imports")
    who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    rundir.write_json(attempt.rank(rank), who)
    try:
        from launcher.worker import train

        train.run(attempt.root, stop_flag, fresh)
        marks.mark(marks.END)
        return 0  # torchrun knows only 0 and not 0: the true code is in exit.json
    except BaseException as error:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        if debug:
            record_failure(attempt, rank, error)
            if sys.stdin.isatty():
                import pdb

                pdb.post_mortem(error.__traceback__)
            return int(failure_code(error))
        try:
            record_failure(attempt, rank, error)
        finally:
            # Not by way of atexit and destructors: a process group whose peers are gone can hang there.
            os._exit(1)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, whatever kills the parent."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent or parent == 1:
        raise SystemExit("the process that started this one is gone")


def record_failure(attempt: rundir.Attempt, rank: int, error: BaseException) -> None:
    """This rank's account of its end, for the launcher, which names the earliest."""
    hide = redact.current.text
    rundir.write_json(
        attempt.rank_failure(rank),
        {
            "rank": rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": hide(error.message) if isinstance(error, SpeechctlError) else hide(str(error))[:4000],
            "hint": hide(error.hint) if isinstance(error, SpeechctlError) else None,
            "code": int(failure_code(error)),
            "lost_peer": lost_peer(error),
            "traceback": [hide(line) for line in traceback.format_exception(error)[-12:]],
        },
    )


def failure_code(error: BaseException) -> ExitCode:
    if isinstance(error, SpeechctlError):
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.INFRASTRUCTURE if lost_peer(error) else ExitCode.TRAINING_RAISED


LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh failed"),  # gloo
    *("NCCL communicator was aborted", "ncclRemoteError", "Connection closed by remote peer"),
    "remote process exited or there was a network error",  # NCCL's own words for ncclRemoteError
    *("Connection was likely closed", "Failed to recv, got 0 bytes", "Failed to send, got 0 bytes"),  # the store
    "failed to connect",
)
"""What gloo, NCCL and the store say where a peer is gone: they have no type for it."""


def lost_peer(error: BaseException) -> bool:
    """Whether this rank only noticed that another one was gone."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in kinds and any(sign in str(error) for sign in LOST)


if __name__ == "__main__":
    sys.exit(main())
