"""Checks that need more than one host: who was reached, who differs from the others, who reaches whom. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from launcher import hosts
from launcher.errors import HostError, in_bytes
from launcher.prepare.checks import Check, Verdict, odd_ones, several
from launcher.prepare.findings import Findings

SLOW_LOGIN_S = 2.0
"""More than the others took, or than nothing where there are no others."""
CLOCK_FAIL_S, CLOCK_WARN_S = 1.0, 0.2
THIS_MACHINE = "this machine"


def judge(found: Findings) -> Iterator[Check]:
    yield from _reached(found)
    yield from _machines(found)
    yield from _environments(found)
    yield from _gpu_models(found)
    yield from _limits(found)
    yield from _clocks(found)
    yield from _shared(found)
    yield from _interfaces(found)
    yield from _ports(found)
    yield from _data(found)
    yield from _all_reduce(found)
    for error in found.refused:
        yield Check("launch", THIS_MACHINE, "fail", error.message, "", error.hint)


def _reached(found: Findings) -> Iterator[Check]:
    usual = median([s.reached_s for s in found.reached] or [0.0])
    for s in found.seen:
        if s.trouble is not None:
            name = "host key" if "host key" in s.trouble.what else "reachable"
            words = s.trouble.what if s.words in ("", s.trouble.what) else f"{s.trouble.what}: {s.words}"
            yield Check(name, s.name, "fail", words, "a login that asks nothing", s.trouble.hint)
            continue
        verdict: Verdict = "warn" if s.reached_s > usual + SLOW_LOGIN_S else "ok"
        hint = (
            f"look at `UseDNS no` in sshd's configuration, at shell start-up files and the load of {s.name}"
            if verdict == "warn"
            else ""
        )
        expected = f"about {usual:.1f} s, as the others" if verdict == "warn" else ""
        yield Check("reachable", s.name, verdict, f"in {s.reached_s:.1f} s", expected, hint)
        if found.needs.backend == "ssh":
            yield Check("host key", s.name, "ok", "known")


def _machines(found: Findings) -> Iterator[Check]:
    """Of a hostfile. SLURM knows its nodes, many of which start from one image and have one machine id."""
    if found.needs.backend != "ssh":
        return
    ids = {s.name: s.value("system")["machine_id"] for s in found.reached if s.value("system")}
    try:
        hosts.same_machine(ids)
    except HostError as error:
        for line in error.message.splitlines():
            name = next(n for n in reversed(ids) if f" and {n} are" in f" {line}")
            yield Check("machine", name, "fail", line, "each machine once", error.hint)


def _environments(found: Findings) -> Iterator[Check]:
    values = {s.name: s.value("environment") for s in found.reached if s.value("environment")}
    needs = found.needs
    for name, value in values.items():
        if "missing" in value or "broken" in value:
            is_not = "is not there" if "missing" in value else f"does not start: {value['broken']}"
            what = f"{needs.interpreter} {is_not}"
            hint = f"put the environment on a file system that {name} sees at the same path, or --fix makes one there"
            yield Check("interpreter", name, "fail", what, "the interpreter of this command, at its path", hint)
    usable = {n: v for n, v in values.items() if "python" in v}
    here = found.here.value("environment") if found.here else None
    own = here if here and "python" in here else None
    whole = usable | ({THIS_MACHINE: own} if own else {})
    if not usable:
        return
    usual, odd = odd_ones({n: v["python"] for n, v in whole.items()}, own and own["python"])
    for n, v in whole.items():
        verdict: Verdict = "fail" if n in odd else "ok"
        hint = f"make the environment of {n} anew with Python {usual}: --fix does where there is none"
        if n != THIS_MACHINE or n in odd:
            what = f"Python {v['python']}"
            yield Check("python", n, verdict, what, f"Python {usual}", hint if n in odd else "")
    versions = {n: tuple(sorted(v["packages"].items())) for n, v in whole.items()}
    most, odd = odd_ones(versions, versions.get(THIS_MACHINE))
    for n in whole:
        if n in odd:
            hint = f"install the same there: --fix does, or `uv pip install` what differs into {whole[n]['prefix']}"
            yield Check("packages", n, "fail", _difference(dict(versions[n]), dict(most)), "", hint)
        elif n != THIS_MACHINE:
            yield Check("packages", n, "ok", f"{len(versions[n])} packages, as the others")
    codes = {n: str(v["code"]) for n, v in whole.items()}
    same, odd = odd_ones(codes, codes.get(THIS_MACHINE))
    for n in whole:
        if n in odd:
            hint = f"bring {whole[n]['folder'] or 'speechctl'} there to the same revision as on the other hosts"
            with_it = _revision(next(v for m, v in whole.items() if codes[m] == same))
            yield Check("code", n, "fail", f"speechctl {_revision(whole[n])}", f"speechctl {with_it}", hint)
        elif n != THIS_MACHINE:
            yield Check("code", n, "ok", f"speechctl {_revision(whole[n])}")


def _revision(environment: dict[str, Any]) -> str:
    """The digest of the code, with the git revision where there is one: changed files are in the first alone."""
    if environment["code"] is None:
        return "is not installed"
    revision = environment.get("revision")
    return str(environment["code"]) + (f" (revision {revision})" if revision else "")


def _difference(there: dict[str, str], usual: dict[str, str]) -> str:
    rows = [
        f"{n} {there.get(n, 'missing')}, the others {usual.get(n, 'have none')}"
        for n in sorted(there.keys() | usual.keys())
        if there.get(n) != usual.get(n)
    ]
    return several(rows, most=5)


def _gpu_models(found: Findings) -> Iterator[Check]:
    rows = {s.name: s.value("gpus").get("gpus") for s in found.reached if s.value("gpus")}
    if found.needs.device == "cpu":
        return
    drivers = {n: r[0]["driver_version"] for n, r in rows.items() if r}
    models = {n: f"{r[0]['name']}, {r[0]['memory.total']} MiB" for n, r in rows.items() if r}
    for name, values in (("driver", drivers), ("GPUs", models)):
        if not values:
            continue
        usual, odd = odd_ones(values)
        for n in values:
            if n in odd:
                hint = f"the slowest sets the pace, and libraries may disagree: make {n} as the others, or leave it out"
                yield Check(name, n, "warn", values[n], usual, hint)
            elif name == "driver":
                yield Check(name, n, "ok", values[n])


def _limits(found: Findings) -> Iterator[Check]:
    values = {s.name: tuple(s.value("limits")["soft"].items()) for s in found.reached if s.value("limits")}
    if len(values) < 2:
        return
    usual, odd = odd_ones(values)
    for n in odd:
        rows = [f"{k} {_limit(v)}, the others {_limit(dict(usual)[k])}" for k, v in values[n] if dict(usual)[k] != v]
        hint = f"make /etc/security/limits.conf on {n} as on the others, and log in anew"
        yield Check("limits", n, "warn", several(rows), "", hint)


def _limit(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


def _clocks(found: Findings) -> Iterator[Check]:
    """Against the middle of the hosts, not against this machine, whose own clock may be the one that is wrong."""
    offsets = {s.name: s.clock for s in found.reached if s.clock is not None}
    if not offsets or found.needs.backend == "local":
        return
    middle = median([offset for offset, _ in offsets.values()] + ([0.0] if len(offsets) % 2 == 0 else []))
    for n, (offset, trip) in offsets.items():
        off = offset - middle
        # Half the round trip is what cannot be told.
        sure = max(0.0, abs(off) - trip / 2)
        verdict: Verdict = "fail" if sure > CLOCK_FAIL_S else "warn" if sure > CLOCK_WARN_S else "ok"
        hint = f"have chrony or systemd-timesyncd run on {n}: `chronyc tracking` or `timedatectl` there says more"
        what = f"{abs(off):.1f} s {'ahead' if off > 0 else 'behind'}" if verdict != "ok" else f"{off:+.3f} s"
        yield Check("clock", n, verdict, what, "the time of the others", hint if verdict != "ok" else "")
    if abs(middle) > CLOCK_FAIL_S:
        what = f"{abs(middle):.1f} s {'behind' if middle > 0 else 'ahead'}"
        yield Check("clock", THIS_MACHINE, "warn", what, "the time of the hosts", "set the clock of this machine")


def _shared(found: Findings) -> Iterator[Check]:
    if len(found.needs.machines) == 1 and found.needs.backend == "local":
        return
    head = found.needs.machines[0].name
    hint = (
        "the run's directory must be on a file system that all hosts and this machine see at the same path:"
        " mount it there, or --set run_dir=…"
    )
    places = [(s.name, s.shared, s.value("disk")) for s in found.reached]
    for name, problem, disk in [*places, (THIS_MACHINE, found.shared_here, None)]:
        if problem is None:
            continue
        kind = f", {disk['type']}" if disk else ""
        if problem:
            what = f"a file that {head} wrote is not seen ({problem}{kind})"
            yield Check("shared directory", name, "fail", what, f"the file of {head}", hint)
        elif name != THIS_MACHINE:
            yield Check("shared directory", name, "ok", f"reads what {head} writes{kind}")


def _interfaces(found: Findings) -> Iterator[Check]:
    if len(found.needs.machines) == 1:
        return
    for s in found.reached:
        if (value := s.value("interface")) is None:
            continue
        chosen, there = value["to_head"], value["interfaces"]
        lacking = [f"{k}={v}" for k, v in found.needs.interface_names if not _is_there(v, there)]
        if lacking:
            hint = f"unset it, or name an interface that {s.name} has: {', '.join(there)}"
            yield Check("interface", s.name, "fail", f"{several(lacking)}, which is not there", "an interface", hint)
        elif chosen is None or chosen == "lo":
            what = f"the way to the head leaves by {chosen or value['address']}"
            hint = "give the head an address=… in the hostfile that the other hosts have a way to"
            yield Check("interface", s.name, "fail", what, "an interface of the network", hint)
        else:
            speed = there[chosen]["mbit_s"]
            yield Check("interface", s.name, "ok", f"{chosen}" + (f", {speed / 1000:g} Gbit/s" if speed else ""))


def _is_there(wanted: str, interfaces: dict[str, Any]) -> bool:
    """NCCL's grammar: names or their beginnings, parted by commas; `=` in front means exactly, `^` all but these."""
    if wanted.startswith("^"):
        return True
    exact, texts = wanted.startswith("="), wanted.removeprefix("=").split(",")
    return any(n == t if exact else n.startswith(t) for n in interfaces for t in texts)


def proposals(found: Findings) -> dict[str, str]:
    """NCCL's and gloo's interface by host, as one might set them. Nobody does it for the user."""
    ways = {s.name: (s.value("interface") or {}).get("to_head") for s in found.reached}
    if len(found.needs.machines) == 1:
        return {}
    return {n: f"NCCL_SOCKET_IFNAME={w} GLOO_SOCKET_IFNAME={w}" for n, w in ways.items() if w not in (None, "lo")}


def _ports(found: Findings) -> Iterator[Check]:
    for s in found.reached:
        wrong = [row for row in s.dialled if row.get("problem")]
        if wrong:
            who = several([f"{r['name']} at {r['address']} port {r['port']}: {r['problem']}" for r in wrong])
            both = several(sorted({r["name"] for r in wrong} | {s.name}))
            hint = f"open all ports above 1023 between {both}: see `iptables -L` or `nft list ruleset` there"
            yield Check("ports", s.name, "fail", f"cannot reach {who}", "an open port", hint)
        elif s.dialled:
            yield Check("ports", s.name, "ok", f"reaches {several([r['name'] for r in s.dialled])}")


def _data(found: Findings) -> Iterator[Check]:
    for k, path in enumerate(found.needs.packs):
        rows = {s.name: s.value("packs")[k] for s in found.reached if s.value("packs")}
        there = {n: row["digest"] for n, row in rows.items() if "digest" in row}
        nowhere = all(row.get("missing") for row in rows.values())
        for n, row in rows.items():
            if row.get("missing"):
                hint = "`speechctl pack RECIPE` makes it" if nowhere else f"mount or copy it on {n}, at the same path"
                yield Check("packs", n, "warn" if nowhere else "fail", f"{path} is not there", "a sealed pack", hint)
        if there:
            usual, odd = odd_ones(there)
            for n in there:
                if n in odd:
                    what = f"{path} is another pack: {there[n][:12]}"
                    hint = f"copy the pack to {n} anew"
                    yield Check("packs", n, "fail", what, usual[:12], hint)
                elif not rows[n]["problems"]:
                    yield Check("packs", n, "ok", f"{path}: {rows[n]['files']} files")
    values = {s.name: s.value("backbone") for s in found.reached if s.value("backbone")}
    usual_sizes = {n: tuple(sorted(v["sizes"].items())) for n, v in values.items() if "sizes" in v}
    usual, odd = odd_ones(usual_sizes) if usual_sizes else ((), [])
    for n, v in values.items():
        if "missing" in v:
            fetched = "snapshots" in v["missing"] or found.needs.bundle is not None
            hint = "--fix fetches it once" if fetched else "set backbone.source, or copy it there"
            if "snapshots" in v["missing"] and usual_sizes:
                hint = f"let HF_HOME name a directory that {n} shares with the others, or copy it there"
            yield Check("backbone", n, "fail", f"{v['missing']} is not there", "the backbone", hint)
        elif n in odd:
            hint = f"copy the backbone to {n} anew"
            yield Check("backbone", n, "fail", _sizes(dict(usual_sizes[n]), dict(usual)), "", hint)
        elif not v["problems"]:
            yield Check("backbone", n, "ok", f"{v['folder']}: {in_bytes(sum(v['sizes'].values()))}")


def _sizes(there: dict[str, int], usual: dict[str, int]) -> str:
    wrong = sorted(n for n in there.keys() | usual.keys() if there.get(n) != usual.get(n))
    return several([f"{n}: {there.get(n, 'missing')}, the others {usual.get(n, 'have none')}" for n in wrong])


def _all_reduce(found: Findings) -> Iterator[Check]:
    value, count = found.all_reduce, len(found.needs.machines)
    if value is None:
        return
    if value.not_tried is not None:
        for s in found.reached:
            yield Check("all-reduce", s.name, "unknown", f"not tried: {value.not_tried}")
        return
    for s in found.reached:
        if problem := value.problems.get(s.name):
            hint = "the message is torch's; NCCL_DEBUG=INFO, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, may help"
            yield Check("all-reduce", s.name, "fail", problem, "a sum over all hosts", hint)
        elif not value.problems:
            rate = 2 * (count - 1) / count * value.bytes / value.seconds
            took, speed = f"{value.seconds * 1000:.1f} ms", f"{rate * 8 / 1e9:.1f} Gbit/s"
            what = f"{value.backend}: {took} for {in_bytes(value.bytes)}, {speed}"
            yield Check("all-reduce", s.name, "ok", f"{what}; met in {value.meeting_s:.1f} s")
