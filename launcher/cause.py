"""Why an attempt failed: what happened first, and to whom.

Everything is read from the attempt's files. Hosts do not agree on the time: the order in which the launcher saw the
nodes end comes first, and clocks are compared within one host only.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import account, report, rundir
from launcher.backends import slurm, ssh
from launcher.errors import ExitCode
from launcher.failure import OF_CODE, Failure, places, read_progress, resume
from launcher.hosts import Host
from launcher.node import ANOTHER, SILENCE, STOP
from launcher.rundir import Attempt

DEVICE = (
    r"uncorrectable ECC|fallen off the bus|device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
    r"|[Uu]nable to determine the device handle"
)
"""How CUDA says that a GPU is broken, whatever runs on it."""


OF_A_CONNECTION = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Types of torch for what goes wrong between ranks, whoever is to blame."""


def conclude(
    attempt: Attempt, returncodes: Sequence[int], order: Sequence[int] = (), seen: Failure | None = None
) -> ExitCode:
    """The attempt's exit code, from what its ranks and nodes wrote; `failure.json` says why where it failed.

    Args:
        returncodes: of the processes that stood for the nodes. None of them alone makes a success.
        order: the nodes in the order in which they ended, as seen from here.
        seen: what the launcher itself ended the attempt for.
    """
    order = order or range(len(returncodes))
    ended = rundir.read_json(attempt.exit) if rundir.there(attempt.exit) else None
    if ended is None:
        failure = seen or first_cause(attempt, returncodes, order)
    else:  # rank 0 writes it after the last seal
        unasked = ended["code"] == ExitCode.STOPPED and not attempt.run.stop_request.exists()
        cause = (seen or _unasked(_Ended(attempt, list(returncodes), list(order)))) if unasked else None
        if cause is None:
            return ExitCode(ended["code"])
        failure = cause
    rundir.write_json(attempt.failure, failure.to_json())
    return failure.code


def first_cause(attempt: Attempt, returncodes: Sequence[int], order: Sequence[int]) -> Failure:
    ended = _Ended(attempt, list(returncodes), list(order))
    for rule in (
        _first_never_came_up,
        _lost_launcher,
        _first_node,
        _rank,
        _never_came_up,
        _port,
        _exited,
        _lost_node,
        _stopped,
        _torchrun,
        _lost_peer,
    ):
        if (failure := rule(ended)) is not None:
            return failure
    return _unexplained(ended)


def _unasked(ended: _Ended) -> Failure | None:
    """Why all ranks sealed and ended though nobody had asked the run to stop."""
    # Where ranks still reach each other, as over a network of their own, they seal although a node was lost to us.
    if (lost := _lost_launcher(ended) or _lost_node(ended)) is not None:
        return lost
    if ended.in_job or any(node["asked"] == STOP for node in ended.nodes.values()):
        return None  # SLURM makes room for another job, and the batch script has this one queued again
    if not ended.nodes:
        return None  # `--debug`: one rank in somebody's terminal, where Ctrl-C goes to it
    for k in ended.order:
        asked = ended.nodes.get(k, {}).get("asked")
        if asked and asked != ANOTHER:
            return ended.of_node("node lost", k, f"the ranks sealed and ended because of {ended.node(k)}: {asked}")
    message = "the ranks sealed and ended because one of them was sent SIGTERM, and not by a request to stop"
    return Failure("killed", message, resume(ended.attempt), evidence=[str(ended.attempt.logs)])


class _Ended:
    """The files of an attempt whose processes are gone."""

    def __init__(self, attempt: Attempt, returncodes: list[int], order: list[int]) -> None:
        self.attempt = attempt
        self.returncodes = returncodes
        self.order = order
        self.hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts) or ()]
        self.nodes: dict[int, dict[str, Any]] = {k: n for k in order if (n := rundir.read_json(attempt.node(k)))}
        self.places = places(attempt)
        self.over_ssh, self.in_job = (any(attempt.logs.glob(f"{way}-*.log")) for way in ("ssh", "srun"))
        records = [rundir.read_json(p) for p in sorted(attempt.failures.glob("rank-*.json"))]
        self.records: list[dict[str, Any]] = sorted(records, key=lambda r: (self.turn(r["rank"]), float(r["time"])))
        """What ranks said of their ends: by the order of their nodes, and within a node by its clock."""

    def turn(self, rank: int) -> int:
        node_rank = self.node_of(rank)
        return self.order.index(node_rank) if node_rank in self.order else len(self.order)

    def node_of(self, rank: int) -> int:
        return self.places[rank][1] if rank < len(self.places) else 0

    def host(self, node_rank: int) -> str:
        if node_rank < len(self.hosts):
            return self.hosts[node_rank].name
        return str(self.nodes.get(node_rank, {}).get("host", "its host"))

    def node(self, node_rank: int) -> str:
        return f"node {node_rank} on {self.host(node_rank)}"

    def who(self, rank: int) -> str:
        return f"rank {rank} on {self.host(self.node_of(rank))}"

    def log(self, rank: int) -> Path:
        """Where that rank's own words are, or else its node's."""
        own = self.attempt.rank_log(rank)
        return own if own.exists() and own.stat().st_size else self.attempt.node_log(self.node_of(rank))

    def account(self, node_rank: int) -> list[tuple[int, int]]:
        """(rank, exit code) of its ranks that failed, as torchrun saw it."""
        silenced = self.nodes.get(node_rank, {}).get("silenced", ())
        return account.of_torchrun(self.attempt.node_log(node_rank), silenced)

    def memory(self, node_rank: int) -> dict[str, Any]:
        """What the node saw of the kernel's memory killer (`memory.Watch`), also where the node itself was its prey."""
        record = self.nodes.get(node_rank, {}).get("memory") or read_progress(self.attempt, node_rank).get("memory")
        return dict(record or {})

    def of_node(self, kind: str, node_rank: int, message: str, hint: str = "", *evidence: Path) -> Failure:
        files = evidence or (self.attempt.node_log(node_rank),)
        where: dict[str, Any] = {"host": self.host(node_rank), "node_rank": node_rank}
        return Failure(kind, message, hint or resume(self.attempt), evidence=[str(f) for f in files], **where)

    def of_rank(self, kind: str, rank: int, message: str, hint: str = "", *evidence: str) -> Failure:
        node_rank = self.node_of(rank)
        where: dict[str, Any] = {"rank": rank, "host": self.host(node_rank), "node_rank": node_rank}
        return Failure(kind, message, hint or resume(self.attempt), evidence=[str(self.log(rank)), *evidence], **where)


# Rules, the first that answers wins ----------------------------------------------------------------------------------


def _first_never_came_up(ended: _Ended) -> Failure | None:
    return _refused(ended, ended.order[0])


def _never_came_up(ended: _Ended) -> Failure | None:
    """Nor did one that was still on its way when another had failed; what we killed then did not refuse."""
    killed = (0, -signal.SIGKILL)
    return next((f for k in ended.order if ended.returncodes[k] not in killed and (f := _refused(ended, k))), None)


def _refused(ended: _Ended, k: int) -> Failure | None:
    if k in ended.nodes or ended.returncodes[k] == 0:
        return None
    if ended.over_ssh:
        error = ssh.refusal(ended.attempt, k, ended.hosts[k])
        hint = f"{error.hint}; then `speechctl resume {ended.attempt.run.root}`"
        return ended.of_node("host refused", k, error.message, hint, ended.attempt.ssh_log(k))
    if ended.in_job and slurm.lost(ended.attempt, k):
        return _lost_by_slurm(ended, k)
    if ended.in_job:
        error = slurm.refusal(ended.attempt, k, ended.hosts[k])
        return ended.of_node("host refused", k, error.message, error.hint, ended.attempt.srun_log(k))
    log = ended.attempt.node_log(k)
    words = account.last_error(log)
    if ended.returncodes[k] < 0:
        words = f"its process was ended by {account.name_of(-ended.returncodes[k])}"
    return ended.of_node("host refused", k, f"cannot start {ended.node(k)}: {words}", f"read {log} and mend it")


def _first_node(ended: _Ended) -> Failure | None:
    """The failure of the node that ended first, where it is the node's own."""
    k = ended.order[0]
    if "error" in ended.nodes.get(k, {}):
        error = ended.nodes[k]["error"]
        logs = [ended.attempt.node_log(n) for n in dict.fromkeys((error["node_rank"], k))]
        kind = OF_CODE[ExitCode(error["code"])]
        return ended.of_node(kind, error["node_rank"], error["message"], error["hint"], *logs)
    return _lost(ended, k)


def _lost_node(ended: _Ended) -> Failure | None:
    return next((f for k in ended.order if (f := _lost(ended, k))), None)


def _lost_launcher(ended: _Ended) -> Failure | None:
    """No node heard anything of this launcher: it was suspended, or the file server did not answer. No host's fault."""
    asked = [str(ended.nodes.get(k, {}).get("asked")) for k in ended.order]
    if not all(why.startswith(SILENCE) for why in asked):
        return None
    message = f"all nodes ended their ranks, on each {asked[0]}: it was suspended, or its files did not get there"
    evidence = [str(ended.attempt.supervisor), str(ended.attempt.lease)]
    return Failure("launcher lost", message, resume(ended.attempt), evidence=evidence)


def _lost(ended: _Ended, k: int) -> Failure | None:
    node, returncode = ended.nodes.get(k), ended.returncodes[k]
    if ended.in_job and slurm.lost(ended.attempt, k):  # srun may return 0 then
        return _lost_by_slurm(ended, k)
    if node is None or returncode == 0:
        return None
    if ended.over_ssh and returncode == ssh.FAILED and (words := ssh.lost_words(ended.attempt, k)):
        host = ended.host(k)
        hint = f"when `ssh {host} true` works again, {resume(ended.attempt)}"
        return ended.of_node("node lost", k, f"lost {host}: {words}", hint, ended.attempt.ssh_log(k))
    if node["returncode"] is None and node["asked"] is None:  # it had no time to say how it ended
        if ended.over_ssh and returncode == ssh.FAILED:  # which is all it says of a process that a signal ended
            message = f"the agent of {ended.node(k)} was ended by a signal, and its ranks with it"
            return ended.of_node("node lost", k, message)
        if 0 < returncode < 128:
            words = account.last_error(ended.attempt.node_log(k))
            return ended.of_node("node failed", k, f"the agent of {ended.node(k)} failed: {words}")
        by = account.name_of(-returncode if returncode < 0 else returncode - 128)  # as a shell or srun tells it
        if returncode == -signal.SIGKILL and (memory := _memory(ended, k, f"the agent of {ended.node(k)}", None)):
            return ended.of_node("host memory", k, *memory)
        return ended.of_node("node lost", k, f"the agent of {ended.node(k)} was ended by {by}, and its ranks with it")
    if str(node["asked"]).startswith(SILENCE):
        return ended.of_node("node lost", k, f"{ended.node(k)} and the launcher lost each other: {node['asked']}")
    return None


def _lost_by_slurm(ended: _Ended, k: int) -> Failure:
    host = ended.host(k)
    hint = f"`scontrol show node {host}` says how it is; the job is requeued, or else {resume(ended.attempt)}"
    message = f"lost {host}: {slurm.last_words(ended.attempt, k)}"
    return ended.of_node("node lost", k, message, hint, ended.attempt.srun_log(k))


def _rank(ended: _Ended) -> Failure | None:
    """A rank that was ended by a signal, or that gave a cause of its own."""
    said = [r for r in ended.records if not r["lost_peer"]]
    # torch's own errors of a connection are a cause only where there is no other.
    causes = [r for r in said if r["type"] not in OF_A_CONNECTION]
    raised = {r["rank"] for r in causes}
    signalled: list[tuple[int, int]] = []
    for k in ended.order:
        here = {r for r in raised if ended.node_of(r) == k}
        first = account.first_signalled(ended.account(k), here)
        # Nobody sends SIGKILL but the kernel, a person, and we: a node that was left alone saw a cause. An abort of
        # another node's ranks follows from whatever was raised.
        strong = first is not None and first[1] == signal.SIGKILL and not ended.nodes.get(k, {}).get("asked")
        if first is not None and (strong or not raised):
            signalled.append(first)
    if signalled:  # the watchdog of NCCL aborts ranks, also on a node that ends before the one with the cause
        return _signalled(ended, *min(signalled, key=lambda one: one[1] == signal.SIGABRT))
    return _raised(ended, (causes or said)[0]) if said else None


def _signalled(ended: _Ended, rank: int, number: int) -> Failure:
    if number == signal.SIGKILL:
        memory = _memory(ended, ended.node_of(rank), ended.who(rank), rank)
        if memory is not None:
            return ended.of_rank("host memory", rank, *memory)
    return ended.of_rank("killed", rank, f"{ended.who(rank)} was ended by {account.name_of(number)}")


def _memory(ended: _Ended, k: int, who: str, rank: int | None) -> tuple[str, str] | None:
    """Message and hint, where the kernel ended processes of this node, or on its machine, for want of memory."""
    seen = ended.memory(k)
    in_cgroup, on_machine = seen.get("oom_kills", 0), seen.get("oom_kills_on_machine", 0)
    if not in_cgroup and not on_machine:
        return None
    peak = seen.get("peak_rss", {}).get(str(rank))
    had = "" if peak is None else f"; it had used {_gib(peak)} at least"
    hint = "use less: batch.max_rank_seconds, fewer ranks on a host, a higher zero_stage; or get more memory"
    if in_cgroup:
        limit = seen.get("limit")
        may = "" if limit is None else f" of the {_gib(limit)} that its cgroup may use"
        return f"{who} was ended by the kernel because memory ran out{had}{may}", hint
    whole = f" of the machine's {_gib(seen['machine'])}" if "machine" in seen else ""
    message = f"{who} was ended by SIGKILL, and the kernel ended processes there at that time because memory ran out"
    return f"{message}{had}{whole}", hint


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _raised(ended: _Ended, cause: dict[str, Any]) -> Failure:
    rank, log = cause["rank"], ended.log(cause["rank"])
    known = cause["hint"] is not None
    kind = OF_CODE.get(cause["code"], "bug")
    hint = cause["hint"] if known else f"read {log}, mend it, then {resume(ended.attempt)}"
    if re.search(DEVICE, cause["message"]):
        kind, hint = "device", f"look at the GPUs of {ended.host(ended.node_of(rank))}; {resume(ended.attempt)}"
    elif cause["type"] == "OutOfMemoryError":
        kind = "device memory"
        hint = "use less: batch.max_rank_seconds (`speechctl fit RECIPE` finds the largest that fits), a higher"
        hint += " zero_stage; or GPUs with more memory"
    elif cause["type"] == "MemoryExhausted" and re.search(r"CUDA|cuda", cause["message"]):
        kind = "device memory"
    said = cause["message"] if known else f"{cause['type']}: {cause['message']}"
    return ended.of_rank(kind, rank, f"{ended.who(rank)}: {said}", hint)


def _port(ended: _Ended) -> Failure | None:
    head = ended.attempt.node_log(0)
    if 0 not in ended.nodes or ended.account(0) or not account.port_taken(head):
        return None
    meeting = rundir.read_json(ended.attempt.rendezvous) or {}
    at = f"{meeting.get('address')} port {meeting.get('port')}"
    message = f"{ended.node(0)} could not listen at {at}, which somebody else had taken: {account.last_error(head)}"
    return ended.of_node("port", 0, message, f"{resume(ended.attempt)}, at another port")


def _exited(ended: _Ended) -> Failure | None:
    """A rank that ended by a code of its own and said nothing."""
    for k in ended.order:
        for rank, code in ended.account(k):
            if code > 0 and rank not in {r["rank"] for r in ended.records}:
                log = ended.log(rank)
                message = f"{ended.who(rank)} ended with code {code} and without a word: {account.last_error(log)}"
                return ended.of_rank("training", rank, message, f"read {log}, mend it, then {resume(ended.attempt)}")
    return None


def _stopped(ended: _Ended) -> Failure | None:
    """The ranks were ended because somebody asked for it, and that took too long or went wrong."""
    nodes = [n for k in ended.order if (n := ended.nodes.get(k)) and n["asked"] != ANOTHER]  # no cause, but one's work
    killed = next((n for n in nodes if n["killed"]), None)
    asked = next((n for n in nodes if n["asked"]), None)
    if killed is None and asked is None:
        return None
    message = (
        f"the ranks were killed before their work was sealed: {killed['killed']}"
        if killed is not None
        else f"the ranks ended before their work was sealed: {asked['asked'] if asked else ''}"
    )
    kind = "stopped by force" if STOP in message or "told to end at once" in message else "lost peer"
    evidence = [str(ended.attempt.supervisor), str(ended.attempt.logs)]
    return Failure(_asked_by(ended.attempt) or kind, message, resume(ended.attempt), evidence=evidence)


def _asked_by(attempt: Attempt) -> str | None:
    """`time limit` or `preempted`, where the request to stop says that it comes from the scheduler."""
    try:
        kind = json.loads(attempt.run.stop_request.read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):  # a file that was only touched asks as well
        return None
    return kind if kind in ("time limit", "preempted") else None


def _torchrun(ended: _Ended) -> Failure | None:
    """torchrun itself was ended by a signal, and not by its node."""
    for k in ended.order:
        node = ended.nodes.get(k, {})
        returncode = node.get("returncode") or 0
        if returncode < 0 and not node["killed"]:
            who = f"torchrun of {ended.node(k)}"
            if returncode == -signal.SIGKILL and (memory := _memory(ended, k, who, None)):
                return ended.of_node("host memory", k, *memory)
            return ended.of_node("killed", k, f"{who} was ended by {account.name_of(-returncode)}")
    return None


def _lost_peer(ended: _Ended) -> Failure | None:
    if not ended.records:
        return None
    rank, said = ended.records[0]["rank"], ended.records[0]["message"]
    return ended.of_rank("lost peer", rank, f"{ended.who(rank)} lost its peers: {said}")


def _unexplained(ended: _Ended) -> Failure:
    """What can be said where no rank said anything."""
    k = next((k for k in ended.order if ended.returncodes[k] != 0), ended.order[0])
    words = account.last_error(ended.attempt.node_log(k))
    return ended.of_node("node failed", k, f"the ranks of {ended.node(k)} ended without a word: {words}")


# A launcher that was lost --------------------------------------------------------------------------------------------


def of_lost_launcher(attempt: Attempt) -> Failure | None:
    """Of an attempt that nobody concluded and nobody follows any more; None where it was concluded.

    The caller has made sure that no launcher holds the run. Ranks that were left alone seal and end by themselves, and
    `exit.json` then says so; that nobody had asked for it stands in the nodes' records.
    """
    if attempt.failure.exists():
        return None
    ended = rundir.read_json(attempt.exit)
    if ended is not None and not report.left_alone(attempt, ended):
        return None
    done = f"; its ranks sealed step {ended['sealed_step']} and ended" if ended is not None else ""
    message = f"the launcher of attempt {attempt.number} went away without a word{done}"
    evidence = [str(attempt.supervisor), str(attempt.logs)]
    return Failure("launcher lost", message, resume(attempt), evidence=evidence)
