"""Looking at all hosts at once, in two rounds with a deadline each: each by itself, then what takes two of them."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlparse

from launcher import bundle_cache, environment, jobs, lock
from launcher.backends import slurm, ssh
from launcher.hosts import Host
from launcher.node import WORKER
from launcher.prepare.findings import AllReduce, Findings, Needs, Seen
from launcher.prepare.session import Session, Silent, Unanswered, here_argv
from launcher.probe.facts import FACTS
from launcher.recipe import Data, Recipe, TinyCtc
from launcher.rundir import Run

LOGIN_S = 11.5
"""For a host to log us in: a little more than ssh's own ConnectTimeout, so that it can give its reason."""
FIRST_S, SECOND_S = 14.0, 5.0
"""For the two rounds: together less than 20 s, however many hosts are slow or dead."""
FACTS_S = 5.0
ALL_REDUCE_S = 90.0
"""Importing torch from a cold network file system takes most of it."""


def packs_to_read(data: Data, subsets: Sequence[str]) -> tuple[str, ...]:
    """The directories of packs whose shards these hosts read; none where that is from a URL of another machine."""
    remote = data.remote
    if remote is None:
        return tuple(os.path.abspath(data.packs / subset) for subset in subsets)
    if not remote.startswith("/"):
        at = urlparse(remote)
        if at.scheme != "file":
            return ()
        remote = unquote(at.path)
    return tuple(os.path.join(remote, subset) for subset in subsets)


def needs_of(recipe: Recipe, machines: Sequence[Host]) -> Needs:
    """What the recipe, with all its paths absolute, needs of these hosts."""
    run, backbone = Run(recipe.run_path), recipe.backbone
    source = None if isinstance(backbone, TinyCtc) else backbone.source
    bundle = source if source is not None and source.startswith(bundle_cache.PREFIX) else None
    if bundle is not None and not isinstance(backbone, TinyCtc):
        source = str(bundle_cache.folder(bundle, backbone.revision))
    if source is not None and (Path(source).exists() or source.startswith(".")):
        source = os.path.abspath(source)
    home = os.environ.get("HF_HOME")
    hidden = tuple(environment.secrets(recipe.launch))
    interfaces = ((name, os.environ.get(name)) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"))
    kept = recipe.checkpoint
    for_good = recipe.max_steps // kept.keep_every_steps if kept.keep_every_steps else 0
    return Needs(
        backend=recipe.launch.backend,
        machines=tuple(machines),
        run=str(run.root),
        interpreter=sys.executable,
        pythonpath=os.environ.get("PYTHONPATH", ""),
        packs=packs_to_read(recipe.data, recipe.subsets),
        source=source,
        bundle=bundle,
        revision=None if isinstance(backbone, TinyCtc) else backbone.revision,
        hub=os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else None),
        builds=os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(sys.prefix, "torch_extensions"),
        device=recipe.launch.device,
        keep_checkpoints=kept.keep_last + kept.keep_best + for_good + 1,  # and the one that is being written
        token=f".speechctl-{secrets.token_hex(8)}",
        holder=lock.holder(run),
        interface_names=tuple((name, value) for name, value in interfaces if value),
        variables=environment.rank_variables(recipe.launch.backend, 1, recipe.launch.device, hidden),
        secrets=hidden,
        stop_grace_s=recipe.launch.stop_grace,
    )


class Crew:
    """A probe on each host, and one here where this machine is not itself the only host."""

    def __init__(self, needs: Needs, argv: Callable[[Host], list[str]]) -> None:
        self.needs = needs
        self.seen = [Seen(host) for host in needs.machines]
        self.here = None if needs.backend == "local" else Seen(Host("localhost", 1))
        self.began = time.monotonic()
        by_slurm = needs.backend == "slurm"
        # srun gives its own environment to what it starts.
        env = jobs.environment_of_a_job(without=needs.secrets) if by_slurm else None
        self.trouble = slurm.trouble if by_slurm else ssh.trouble
        self.sessions = [Session(host, argv(host), env) for host in needs.machines]
        self.session_here = None if self.here is None else Session(self.here.host, here_argv())
        self.shared_here: str | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._on_all(Session.close, [*self.sessions, *([self.session_here] if self.session_here else [])])

    def look(self, names: Sequence[str] = tuple(FACTS), *, between: bool = True) -> Findings:
        """
        Args:
            names: the facts to ask for.
            between: whether hosts also call each other.
        """

        def one(rank: int | None) -> None:
            if rank is not None:
                self._first(self.sessions[rank], self.seen[rank], names, self.needs.for_host(rank))
            elif self.session_here is not None and self.here is not None:
                self._first(self.session_here, self.here, ["environment"], self.needs.for_host(0))

        self._on_all(one, [*range(len(self.sessions)), None])
        if len(self.seen) > 1 or self.here is not None:
            until = time.monotonic() + SECOND_S
            self._share(until)
            if between and len(self.seen) > 1:
                self._call_each_other(until)
        return Findings(self.needs, self.seen, self.here, self.shared_here)

    def reached(self) -> list[tuple[int, Session, Seen]]:
        rows = zip(range(len(self.seen)), self.sessions, self.seen, strict=True)
        return [(k, session, seen) for k, session, seen in rows if seen.trouble is None]

    def _first(self, session: Session, seen: Seen, names: Sequence[str], needs: dict[str, Any]) -> None:
        until = self.began + FIRST_S
        try:
            seen.python = session.connect(session.began + LOGIN_S)["python"]
            seen.reached_s = session.answered_s or 0.0
            if "system" in names:
                seen.clock = session.clock(until)
            timeout_s = max(1.0, min(FACTS_S, until - time.monotonic() - 0.5))
            seen.facts = session.ask("facts", until + 1, names=list(names), needs=needs, timeout_s=timeout_s)
        except Silent as error:
            seen.words = str(error)
            seen.trouble = self.trouble("timed out", seen.host)._replace(what="no answer")
        except Unanswered as error:
            seen.words = str(error)
            seen.trouble = self.trouble(session.said(), seen.host)

    def _share(self, until: float) -> None:
        """The head writes a file where the run will be; all others read it."""
        if not self.seen or self.seen[0].trouble is not None or not self.seen[0].value("disk"):
            return
        path, text = f"{self.seen[0].value('disk')['folder']}/{self.needs.token}", secrets.token_hex(8)
        try:
            self.sessions[0].ask("write", until, path=path, text=text)
        except Unanswered as error:
            self.seen[0].shared = f"it cannot write there: {error}"
            return

        def read(session: Session) -> str:
            try:
                found = session.ask("read", until, path=path, timeout_s=max(0.5, until - time.monotonic() - 1.5))
            except Unanswered as error:
                return str(error)
            return "" if found == text else "another file is there"

        if self.session_here is not None:
            self.shared_here = read(self.session_here)
        rows = self.reached()
        for (_, _, seen), answer in zip(rows, self._on_all(read, [s for _, s, _ in rows]), strict=True):
            seen.shared = answer
        try:
            self.sessions[0].ask("unlink", until + 1, path=path)
        except Unanswered as error:
            self.seen[0].shared = f"it cannot remove {path}: {error}"

    def head_address(self) -> str | None:
        """Where the ranks will meet, as the head itself sees it."""
        head = self.seen[0]
        rows = [r for r in head.value("names") or [] if r["name"] == head.name]
        found = [head.host.address] if head.host.address else [a for r in rows for a in r.get("addresses", [])]
        usable = [a for a in found if a and not a.startswith("127.") and a != "::1"]
        return next((a for a in usable if ":" not in a), usable[0] if usable else None)

    def _call_each_other(self, until: float) -> None:
        """Each host calls the head, at the address at which the ranks would meet, and the next host in the ring."""
        rows, token = self.reached(), self.needs.token
        head = self.head_address() if self.seen[0].trouble is None else None
        seen_as: dict[int, dict[int, str]] = {k: {} for k, _, _ in rows}  # by caller: where it sees whom
        for k, _, seen in rows:
            found = {r["name"]: r["addresses"][0] for r in seen.value("names") or [] if "addresses" in r}
            following = (k + 1) % len(self.seen)
            if following != 0 and self.seen[following].trouble is None and self.seen[following].name in found:
                seen_as[k][following] = found[self.seen[following].name]
            if k != 0 and head is not None:
                seen_as[k][0] = head

        def listen(row: tuple[int, Session, Seen]) -> int | None:
            rank, session, seen = row
            callers = [a[rank] for a in seen_as.values() if rank in a]
            own = head if rank == 0 else "::" if callers and ":" in callers[0] else "0.0.0.0"
            if own is None:
                return None
            try:
                return int(session.ask("listen", until, address=own, token=token))
            except Unanswered as error:
                seen.dialled.append({"name": seen.name, "address": own, "port": 0, "problem": str(error)})
                return None

        ports = {k: port for (k, _, _), port in zip(rows, self._on_all(listen, rows), strict=True)}

        def dial(row: tuple[int, Session, Seen]) -> None:
            rank, session, seen = row
            targets = [
                {"name": self.seen[k].name, "address": address, "port": port}
                for k, address in seen_as[rank].items()
                if (port := ports.get(k)) is not None
            ]
            timeout_s = max(1.0, until - time.monotonic() - 1.5)
            try:
                seen.dialled += session.ask("dial", until + 1, targets=targets, token=token, timeout_s=timeout_s)
            except Unanswered as error:
                seen.dialled += [{**target, "problem": str(error)} for target in targets]

        self._on_all(dial, rows)

    def all_reduce(self) -> AllReduce:
        """A sum over one rank on each host, started like a rank of the run, through its interpreter and variables."""
        needs, until = self.needs, time.monotonic() + ALL_REDUCE_S
        address = self.head_address()
        if address is None:
            return AllReduce(not_tried="the head has no address that the others reach")
        gpus = [(s.value("gpus") or {}).get("devices", 0) for s in self.seen]
        backend = "nccl" if needs.device != "cpu" and all(gpus) else "gloo"
        try:
            port = self.sessions[0].ask("free_port", until, address=address)
        except Unanswered as error:
            return AllReduce(not_tried=f"{self.seen[0].name} has no free port: {error}")

        def one(row: tuple[int, Session, Seen]) -> dict[str, Any] | str:
            rank, session, seen = row
            meeting = ["--address", address, "--port", str(port), "--backend", backend]
            place = ["--rank", str(rank), "--world-size", str(len(self.seen))]
            gpu = ["--gpu", str(seen.host.gpus[0])] if seen.host.gpus and backend == "nccl" else []
            argv = [needs.interpreter, "-m", WORKER, "allreduce", *meeting, *place, *gpu]
            own = {"GLOO_SOCKET_IFNAME": (seen.value("interface") or {}).get("to_head") or ""}
            env = {"PYTHONPATH": needs.pythonpath, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **own}
            try:
                done = session.ask("run", until, argv=argv, env={**env, **needs.variables}, timeout_s=ALL_REDUCE_S - 5)
                if done["returncode"] == 0:
                    return dict(json.loads(done["stdout"].splitlines()[-1]))
                lines = [line.strip() for line in done["stderr"].splitlines() if line.strip()]
                return lines[-1][:300] if lines else f"it ended with {done['returncode']} and said nothing"
            except (Unanswered, ValueError, IndexError) as error:
                return str(error)

        rows = self.reached()
        answers = {s.name: a for (_, _, s), a in zip(rows, self._on_all(one, rows), strict=True)}
        good = [a for a in answers.values() if isinstance(a, dict)]
        return AllReduce(
            problems={name: a for name, a in answers.items() if isinstance(a, str)},
            seconds=max((a["seconds"] for a in good), default=0.0),
            meeting_s=max((a["meeting_s"] for a in good), default=0.0),
            bytes=next((a["bytes"] for a in good), 0),
            backend=backend,
        )

    def _on_all(self, function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
        """The function on each value at once, in as many threads."""
        with ThreadPoolExecutor(max(1, len(values))) as pool:
            try:
                return list(pool.map(function, values))
            except KeyboardInterrupt:
                for session in self.sessions:
                    session.kill()  # or its thread would wait for it to the end of its time
                raise
