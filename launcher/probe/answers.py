"""The probe's side of the conversation: a request is a line of JSON, `{"id": 1, "do": "facts", …}`, and so is its
answer, `{"id": 1, "value": …}` or `{"id": 1, "error": "…"}`, behind a record separator, since a login shell may print
things of its own. When standard input closes, the probe ends, and with it what it has started.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.probe import machine
from launcher.probe.facts import FACTS

MARK = "\x1e"


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """The facts asked for, all at once. What hangs, such as a file system, is left behind in its thread."""
    until = time.monotonic() + request["timeout_s"]
    found: dict[str, Any] = {}

    def one(name: str) -> None:
        began = time.monotonic()
        try:
            said = {"value": FACTS[name](request["needs"], until)}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        found[name] = {**said, "seconds": time.monotonic() - began}

    machine.together(one, request["names"], until)
    late = {"error": f"no answer in {request['timeout_s']:.0f} s"}
    return {name: found.get(name, late) for name in request["names"]}


def clock(request: dict[str, Any]) -> float:
    return time.time()


# The shared directory and the network --------------------------------------------------------------------------------


def write(request: dict[str, Any]) -> None:
    with open(request["path"], "w") as file:
        file.write(request["text"])
        file.flush()
        os.fsync(file.fileno())


def read(request: dict[str, Any]) -> str:
    """What another host has just written: looked for again and again, since NFS remembers what was not there."""
    until = time.monotonic() + request["timeout_s"]
    while True:
        try:
            os.listdir(os.path.dirname(request["path"]))
            with open(request["path"]) as file:
                return file.read(4096)
        except FileNotFoundError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def unlink(request: dict[str, Any]) -> None:
    os.unlink(request["path"])


def listen(request: dict[str, Any]) -> int:
    """Open a port that says a token to whoever connects, for as long as this process lives."""
    address = request["address"] or ""
    server = socket.socket(machine.family(address), socket.SOCK_STREAM)
    server.bind((address, 0))
    server.listen(128)

    def serve() -> None:
        while True:
            peer, _ = server.accept()
            peer.sendall(request["token"].encode())
            peer.close()

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def dial(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Connect to ports that other hosts opened by `listen`, all at once; a row without `problem` was answered."""
    rows = [dict(target) for target in request["targets"]]

    def call(row: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            with socket.create_connection((row["address"], row["port"]), timeout=request["timeout_s"]) as peer:
                said = peer.recv(4096).decode("ascii", "replace")
            row["seconds"] = time.monotonic() - began
            if said != request["token"]:
                row["problem"] = "another program answers there"
        except OSError as error:
            row["problem"] = error.strerror or str(error)

    machine.together(call, rows, time.monotonic() + request["timeout_s"] + 1)
    return [dict(row) if "seconds" in row or "problem" in row else {**row, "problem": "timed out"} for row in rows]


def free_port(request: dict[str, Any]) -> int:
    with socket.socket(machine.family(request["address"]), socket.SOCK_STREAM) as free:
        free.bind((request["address"], 0))
        return int(free.getsockname()[1])


# What may change something -------------------------------------------------------------------------------------------


def run(request: dict[str, Any]) -> dict[str, Any]:
    """A program to its end; it is killed where it takes too long."""
    env = {**os.environ, **request["env"]}
    done = machine.run(request["argv"], time.monotonic() + request["timeout_s"], env)
    return {"returncode": done.returncode, "stdout": done.stdout[-20000:], "stderr": done.stderr[-20000:]}


def put(request: dict[str, Any]) -> str:
    """Write a file into a new directory of its own; says where it is."""
    path = os.path.join(tempfile.mkdtemp(prefix="speechctl-"), os.path.basename(request["name"]))
    with open(path, "wb") as file:
        file.write(base64.b64decode(request["content"]))
    return path


def remove(request: dict[str, Any]) -> None:
    """What `put` wrote."""
    folder = os.path.dirname(request["path"])
    if os.path.basename(folder).startswith("speechctl-"):
        shutil.rmtree(folder)


def remove_segments(request: dict[str, Any]) -> list[str]:
    """Of the segments named, those that are the same still, and stale."""
    stale = {segment["name"]: segment["inode"] for segment in machine.stale_segments()}
    gone = [s["name"] for s in request["segments"] if stale.get(s["name"]) == s["inode"]]
    for name in gone:
        with contextlib.suppress(FileNotFoundError):  # somebody was quicker
            os.unlink(os.path.join(machine.SHARED_MEMORY_AT, name))
    return gone


def end_processes(request: dict[str, Any]) -> list[int]:
    """Of the processes named, those that are the same still. SIGTERM for the agent, which has its ranks seal what they
    have; for all, where there is none. SIGKILL for what is left after `grace_s`."""

    def left() -> list[int]:
        return [p["pid"] for p in request["processes"] if machine.started(p["pid"]) == p["started"]]

    living = left()
    agents = [pid for pid in living if "launcher.node" in machine.words(pid)]
    for number, grace_s in ((signal.SIGTERM, request["grace_s"]), (signal.SIGKILL, 3.0)):
        for pid in (agents or left()) if number == signal.SIGTERM else left():
            machine.send(pid, number)
        until = time.monotonic() + grace_s
        while left() and time.monotonic() < until:
            time.sleep(0.05)
    return sorted(set(living) - set(left()))


REQUESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    f.__name__: f
    for f in (
        *(facts, clock, write, read, unlink, listen, dial, free_port),
        *(run, put, remove, remove_segments, end_processes),
    )
}


def main() -> None:
    lock = threading.Lock()

    def say(value: dict[str, Any]) -> None:
        with lock:
            sys.stdout.write(f"{MARK}{json.dumps(value)}\n")
            sys.stdout.flush()

    def answer(request: dict[str, Any]) -> None:
        try:
            say({"id": request["id"], "value": REQUESTS[request["do"]](request)})
        except Exception as error:
            what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            say({"id": request["id"], "error": what})

    say({"id": 0, "value": {"python": sys.version.split()[0], "pid": os.getpid()}})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["do"] == "clock":  # here and now: a thread would cost what is measured
            answer(request)
        else:
            threading.Thread(target=answer, args=(request,), daemon=True).start()
    for pid in list(machine.CHILDREN):
        machine.send(-pid, signal.SIGKILL)
    os._exit(0)  # a thread may hang in a file system


if __name__ == "__main__":
    main()
