"""What `prepare --fix` mends, and nothing else: what this run has left behind, a directory or a backbone that is not
there yet, and an environment that is missing or differs from that of this command."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import launcher
from launcher import lock, secret, verbs
from launcher.prepare.checks import Check, several
from launcher.prepare.findings import Needs
from launcher.prepare.look import Crew
from launcher.prepare.session import Session, Unanswered
from launcher.redact import Redactor
from launcher.rundir import Run

MINUTES_S = 1800.0
"""For an environment to be installed: gigabytes, over whatever network there is."""


def mend(crew: Crew, checks: list[Check]) -> list[str]:
    """Mend what is red and safe to mend. A line for each thing that was done, or tried in vain."""
    red = {(c.name, c.host) for c in checks if c.verdict in ("warn", "fail")}
    done = list(_here(crew.needs, red))
    for _, session, seen in crew.reached():
        left = seen.value("leftovers") or {}
        try:
            if ("stale shared memory", seen.name) in red:
                gone = session.ask("remove_segments", time.monotonic() + 10, segments=left["segments"])
                done.append(f"{seen.name}: removed {several(gone) if gone else 'nothing'} from /dev/shm")
            if ("orphans", seen.name) in red:
                done.append(f"{seen.name}: {end(session, crew.needs, left['processes'])}")
            if {("interpreter", seen.name), ("packages", seen.name)} & red:
                done.append(f"{seen.name}: {environment(session, sys.prefix, pins())}")
        except Unanswered as error:
            done.append(f"{seen.name}: could not be mended: {error}")
    return done


def end(session: Session, needs: Needs, processes: list[dict[str, Any]]) -> str:
    """End what a run has left, unless somebody has started it meanwhile: those may be its ranks now."""
    if lock.holder(Run(needs.run)) is not None:
        return "ended nothing: the run is under way by now"
    grace_s = needs.stop_grace_s
    until = time.monotonic() + grace_s + 15
    ended = session.ask("end_processes", until, processes=processes, grace_s=grace_s)
    return f"ended {several([f'pid {p}' for p in ended]) if ended else 'nothing'}"


def _here(needs: Needs, red: set[tuple[str, str]]) -> Iterator[str]:
    """What is mended once, from this machine."""
    parent = Path(needs.run).parent
    if not parent.is_dir():
        try:
            parent.mkdir(parents=True)
            yield f"made {parent}"
        except OSError as error:
            yield f"could not make {parent}: {error.strerror}"
    asked_for = needs.bundle or needs.source
    if asked_for is not None and not os.path.isabs(asked_for) and any(n == "backbone" for n, _ in red):
        revision = ["--revision", needs.revision] if needs.revision else []
        asked = verbs.ask(["fetch", asked_for, *revision], stderr=subprocess.PIPE)
        said = next((line for line in asked.stderr.splitlines() if line.startswith("error: ")), asked.stderr[-300:])
        yield f"fetched {asked_for}" if asked.returncode == 0 else said.removeprefix("error: ")


# The environment of a host -------------------------------------------------------------------------------------------

OFFLINE = re.compile(
    r"name resolution|dns error|NewConnectionError|Network is unreachable|error sending request|Failed to fetch"
    r"|No matching distribution|Connection refused|timed out|No solution found"
)


def pins() -> list[str]:
    """Every package here but our own, with its version."""
    found = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    return sorted(f"{name}=={version}" for name, version in found.items() if name not in ("", "speechctl"))


def wheel() -> tuple[str, bytes]:
    """This very code as a wheel: (its file name, its bytes)."""
    ours = metadata.distribution("speechctl")
    info = f"speechctl-{ours.version}.dist-info"
    files = {f"{info}/{name}": (ours.read_text(name) or "").encode() for name in ("METADATA", "entry_points.txt")}
    if not files[f"{info}/METADATA"]:  # of an editable install by setuptools
        files[f"{info}/METADATA"] = (ours.read_text("PKG-INFO") or "").encode()
    tag = "Wheel-Version: 1.0\nGenerator: speechctl\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/WHEEL"] = tag.encode()
    code = Path(launcher.__path__[0])
    for path in sorted(p for p in code.rglob("*") if p.is_file() and p.suffix in (".py", ".typed")):
        files[str(path.relative_to(code.parent))] = path.read_bytes()
    rows = [f"{name},,\n" for name in [*files, f"{info}/RECORD"]]
    files[f"{info}/RECORD"] = "".join(rows).encode()
    with io.BytesIO() as memory:
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return f"speechctl-{ours.version}-py3-none-any.whl", memory.getvalue()


def environment(session: Session, prefix: str, packages: list[str]) -> str:
    """Make the environment at `prefix` on a host, or bring it to these packages and this code. Says what came of it.

    All versions are given, so nothing is resolved: `uv` installs exactly what this command itself has.
    """
    if sys.prefix == sys.base_prefix:
        return f"not mended: {sys.prefix} is no virtual environment; install speechctl there by hand"
    python, until = f"{prefix}/bin/python", time.monotonic() + MINUTES_S
    where = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "PIP_"))}
    put: list[str] = []
    hidden = Redactor(value for name, value in where.items() if secret.implied(name, value))  # of a package index

    def run(*argv: str) -> tuple[int, str, str]:
        timeout_s = until - time.monotonic()
        done = session.ask("run", until + 5, argv=list(argv), env=where, timeout_s=timeout_s)
        lines = [line.strip() for line in (done["stdout"] + done["stderr"]).splitlines() if line.strip()]
        return done["returncode"], done["stdout"].strip(), lines[-1][:300] if lines else "it said nothing"

    def upload(name: str, content: bytes) -> str:
        text = base64.b64encode(content).decode()
        put.append(session.ask("put", until, name=name, content=text))
        return put[-1]

    def steps() -> str | None:
        """What went wrong, or None."""
        if run(python, "-c", "")[0] != 0:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            said = [run(name, "-m", "venv", prefix) for name in (version, "python3")]
            if all(code != 0 for code, _, _ in said):
                return f"{version} -m venv {prefix}: {said[0][2]}"
        uv = "uv"
        if run(uv, "--version")[0] != 0:
            uv = f"{prefix}/bin/uv"
            if run(uv, "--version")[0] != 0:
                code, _, words = run(python, "-m", "pip", "install", "--quiet", "uv>=0.9,<1")
                if code != 0:
                    return f"uv cannot be installed: {words}"
        links = run(python, "-m", "pip", "config", "get", "global.find-links")
        if links[0] == 0 and links[1]:  # uv does not read pip's configuration
            where.setdefault("UV_FIND_LINKS", ",".join(links[1].split()))
        install = (uv, "pip", "install", "--quiet", "--python", python, "--no-deps")
        wanted = upload("pins.txt", "".join(f"{pin}\n" for pin in packages).encode())
        code, _, words = run(*install, "--requirements", wanted) if packages else (0, "", "")
        if code != 0:
            return f"packages cannot be installed: {words}"
        code, _, words = run(*install, "--reinstall-package", "speechctl", upload(*wheel()))
        return f"speechctl cannot be installed: {words}" if code != 0 else None

    try:
        problem = steps()
    finally:
        for path in put:
            session.ask("remove", time.monotonic() + 10, path=path)
    if problem is None:
        return f"made {prefix} with {len(packages)} packages and this speechctl"
    problem = hidden.text(problem)
    plainly = "; no package index is reached from there, or it lacks them" if OFFLINE.search(problem) else ""
    return f"not mended: {problem}{plainly}"
