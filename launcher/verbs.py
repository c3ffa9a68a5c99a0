"""One verb of the worker, such as `pack` or `evaluate`, in a process of its own: what it answers, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from launcher import account, environment
from launcher.errors import AlreadyTold, InfrastructureError, SpeechctlError
from launcher.node import WORKER


def ask(
    arguments: list[str], stderr: int | None = None, stdout: int | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run one verb; its answer is caught and its progress and errors go to our stderr, unless told."""
    env = {**os.environ, **environment.base_variables(1)}
    command = [sys.executable, "-m", WORKER, *arguments]
    return subprocess.run(command, env=env, stdout=stdout, stderr=stderr, text=True, check=False)


def said_by(*arguments: str) -> str:
    """All that a verb wrote to stdout.

    Raises:
        AlreadyTold: it failed in a way that it knows.
        InfrastructureError: it was killed.
        SpeechctlError: it failed in a way that it does not know.
    """
    return _ended_well(arguments[0], ask(list(arguments)))


def shown(*arguments: str) -> None:
    """Run a verb that writes its answer to our stdout, bit by bit. Raises as `said_by` does."""
    _ended_well(arguments[0], ask(list(arguments), stdout=None))


def _ended_well(verb: str, done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        raise InfrastructureError(
            f"the worker's `{verb}` was ended by {account.name_of(-done.returncode)}",
            hint="look at the memory of this machine, then try again",
        )
    if done.returncode == 1:
        raise SpeechctlError(
            f"the worker's `{verb}` failed in a way that it does not expect; its traceback is above",
            hint="mend what it names if that is on this machine; otherwise it is a bug of speechctl: report it",
        )
    if done.returncode != 0:
        print(done.stdout or "", end="")
        raise AlreadyTold(done.returncode)
    return done.stdout


def answer_of(*arguments: str) -> Any:
    """A verb's answer, one line of JSON: the last on its stdout, since libraries may say something before. Raises as
    `said_by` does."""
    return json.loads(said_by(*arguments).splitlines()[-1])
