"""Checks of a host by itself: (what the recipe needs, what was found there) -> checks. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import in_bytes
from launcher.prepare.checks import Check, Verdict, several
from launcher.prepare.findings import Findings, Seen

SHARED_MEMORY_PER_RANK = 64 * 2**20
"""What NCCL and torch may take of /dev/shm for a rank; 64 MiB is what containers have unless told otherwise."""

LATE = {
    "environment": ("interpreter", "look at the file system of the environment there: `ls` on it may hang"),
    "gpus": ("GPUs", "run `nvidia-smi` there: a GPU or its driver may hang; reboot {host} or leave it out"),
    "memory": ("RAM", "look at /proc/meminfo there"),
    "shared_memory": ("/dev/shm", "mount a tmpfs there: `mount -t tmpfs tmpfs /dev/shm`"),
    "limits": ("limits", "run `ulimit -a` there"),
    "disk": ("writable", "look at the run's file system there: `df` on it may hang, or it may not be mounted"),
    "interface": ("interface", "{host} must know the way to the head: give the head address=… in the hostfile"),
    "packs": ("packs", "look at the packs' file system there: `ls` on it may hang, or a pack is damaged"),
    "backbone": ("backbone", "look at the file system of the backbone there"),
    "leftovers": ("orphans", "look at the processes there by hand: `ps aux`"),
}
"""For a fact that the probe could not tell: the check that fails, and a hint."""


def judge(all_found: Findings, rank: int, seen: Seen) -> Iterator[Check]:
    """All checks of one host that can be judged without looking at the others."""
    for fact, (name, hint) in LATE.items():
        if (error := seen.facts.get(fact, {}).get("error")) is not None:
            yield Check(name, seen.name, "fail", error, "an answer", hint.format(host=seen.name))
    yield from _gpus(all_found, seen)
    yield from _memory(all_found, seen)
    yield from _limits(seen)
    yield from _disk(all_found, seen)
    yield from _names(all_found, rank, seen)
    yield from _data(seen)
    yield from _leftovers(all_found, seen)


def _gpus(found: Findings, seen: Seen) -> Iterator[Check]:
    value, slots, name = seen.value("gpus"), seen.host.slots, seen.name
    counts = [s.value("gpus")["devices"] for s in found.seen if s.value("gpus")]
    if value is None or found.needs.device == "cpu" or not any(counts):
        return  # nothing computes on a GPU
    listed = len(value.get("gpus") or []) or value["devices"]
    visible = len([v for v in (value["visible"] or "").split(",") if v.strip() not in ("", "-1")])
    count = listed if value["visible"] is None or seen.host.gpus is not None else visible
    wanted = max(slots, 1 + max(seen.host.gpus or (0,)))
    if count < wanted:
        expected = f"{slots} slots" if wanted == slots else f"GPU {wanted - 1}"
        hint = f"set slots={count} for {name} in the hostfile" if count else f"leave {name} out, or mend its driver"
        yield Check("GPUs", name, "fail", f"{count} GPU(s)", expected, f"{hint}, or look at `nvidia-smi` there")
    else:
        yield Check("GPUs", name, "ok", f"{count} GPU(s) for {slots} slot(s)")
    environment = seen.value("environment") or {}
    has, wants = value.get("cuda"), environment.get("cuda")
    if count and wants is None and "torch" in environment.get("packages", {}):
        hint = f"install torch for CUDA {has or '(see `nvidia-smi`)'} into {environment['prefix']} on {name}, or"
        hint += " --set launch.device=cpu to leave the GPUs alone"
        yield Check("CUDA", name, "fail", "torch without CUDA", "torch for CUDA, as there are GPUs", hint)
    elif has and wants:
        older = _numbers(has)[:1] < _numbers(wants)[:1]
        hint = f"update the driver of {name}, or install torch for CUDA {has}" if older else ""
        yield Check("CUDA", name, "fail" if older else "ok", f"driver for CUDA {has}", f"torch for CUDA {wants}", hint)
    if nccl := next((v for p, v in environment.get("packages", {}).items() if p.startswith("nvidia-nccl")), None):
        yield Check("NCCL", name, "ok", nccl)
    used = _used(seen)
    processes = [p for p in value.get("processes", []) if p["gpu"] is None or p["gpu"] in used]
    foreign = [p for p in processes if not p["ours"]]
    if foreign:
        who = several([f"{p['name']} (pid {p['pid']})" for p in foreign])
        out = f"launch.slurm.exclude={name}" if found.needs.backend == "slurm" else f"'launch.exclude=[{name}]'"
        hint = f"ask whose they are; leave {name} out with --set {out}, or wait for their end"
        yield Check("GPU processes", name, "fail", f"{who} compute there", "no process of others", hint)
    elif "processes" in value:
        yield Check("GPU processes", name, "ok", "none of others")
    if rows := [r for r in value.get("gpus") or [] if r["index"] in used]:
        yield from _gpu_memory(found, seen, rows, nobody=not processes)
    if rows := [r for r in value.get("health") or [] if r["index"] in used]:
        yield _health(seen, rows)


def _used(seen: Seen) -> set[str]:
    """The GPUs that the ranks there will have, by nvidia-smi's numbers."""
    visible = [v.strip() for v in (seen.value("gpus")["visible"] or "").split(",") if v.strip().isdigit()]
    chosen = seen.host.gpus if seen.host.gpus is not None else visible or range(seen.host.slots)
    return {str(index) for index in list(chosen)[: seen.host.slots]}


TAKEN_MIB = 1024
"""Of a GPU's memory, by nobody that is seen; a driver itself takes some hundred MiB."""


def _gpu_memory(found: Findings, seen: Seen, rows: list[dict[str, str]], *, nobody: bool) -> Iterator[Check]:
    taken = {r["index"]: int(r["memory.used"]) for r in rows if r.get("memory.used", "").isdigit()}
    free = {r["index"]: int(r["memory.total"]) - taken[r["index"]] for r in rows if r["index"] in taken}
    if not free:
        return
    least = min(free, key=lambda index: free[index])
    needed = found.state_bytes_per_rank
    what = f"GPU {least}: {in_bytes(free[least] * 2**20)} free"
    if needed is not None and nobody and free[least] * 2**20 < needed:
        hint = "a higher zero_stage, more GPUs or a smaller backbone; `speechctl plan` shows what a rank needs"
        yield Check("GPU memory", seen.name, "fail", what, f"{in_bytes(needed)} of model states a rank", hint)
    elif nobody and (lost := [i for i, mib in taken.items() if mib > TAKEN_MIB]):
        what = several([f"GPU {i} has {in_bytes(taken[i] * 2**20)} taken" for i in lost])
        hint = (
            f"somebody in another container, or a process that died badly: see `nvidia-smi` and `fuser` on {seen.name}"
        )
        yield Check("GPU memory", seen.name, "warn", f"{what}, and no process of it is seen", "all free", hint)
    else:
        yield Check("GPU memory", seen.name, "ok", what)


SLOWED = 0x8 | 0x20 | 0x40 | 0x80
"""Of NVML's reasons to throttle: hardware, too hot, power brake. Idle and set limits are in good order."""


def _health(seen: Seen, rows: list[dict[str, str]]) -> Check:
    bad, slow = [], []
    for row in rows:
        gpu = f"GPU {row['index']}"
        errors, reasons = row.get("ecc", ""), row.get("slowed", "")
        if errors.isdigit() and int(errors):
            bad.append(f"{gpu} has {errors} uncorrected memory errors")
        if _yes(row.get("retired")):
            bad.append(f"{gpu} has pages to retire")
        if _yes(row.get("remap_pending")):
            bad.append(f"{gpu} has rows to remap")
        if _yes(row.get("remap_failure")):
            bad.append(f"{gpu} has no spare rows left: it is to be replaced")
        if reasons.startswith("0x") and int(reasons, 16) & SLOWED:
            slow.append(f"{gpu} is slowed by heat or power ({reasons})")
    hint = f"reset the GPU or reboot {seen.name} (`nvidia-smi -q -d ECC,ROW_REMAPPER,PERFORMANCE` says more)"
    if bad or slow:
        return Check("GPU health", seen.name, "fail" if bad else "warn", several(bad + slow), "healthy GPUs", hint)
    return Check("GPU health", seen.name, "ok", f"{len(rows)} healthy")


def _yes(said: str | None) -> bool:
    """Drivers say Yes and No, or a number."""
    return said is not None and (said.lower() == "yes" or (said.isdigit() and int(said) > 0))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".") if n.isdigit())


def _memory(found: Findings, seen: Seen) -> Iterator[Check]:
    slots = seen.host.slots
    if (value := seen.value("memory")) is not None:
        has = f"{in_bytes(value['available'])} of {in_bytes(value['total'])} available"
        if found.state_bytes_per_rank is None:
            yield Check("RAM", seen.name, "ok", has)
        else:
            # The states, or where a GPU has them, the copy of them that a checkpoint is written from.
            needed = found.state_bytes_per_rank * slots
            verdict: Verdict = "fail" if value["available"] < needed else "ok"
            more = ", or ask for more: launch.slurm.options=[--mem=0]" if found.needs.backend == "slurm" else ""
            hint = f"end what else runs on {seen.name}, or give it fewer slots{more}" if verdict == "fail" else ""
            yield Check("RAM", seen.name, verdict, has, f"{in_bytes(needed)} for {slots} rank(s)", hint)
    if (value := seen.value("shared_memory")) is not None:
        needed = SHARED_MEMORY_PER_RANK * slots
        has = f"{in_bytes(value['free'])} of {in_bytes(value['total'])} free"
        if value["free"] < needed:
            hint = (
                f"see `ls -l /dev/shm` on {seen.name} and remove what nobody uses (--fix removes what runs left), or"
                " make it larger: `mount -o remount,size=8G /dev/shm`; in a container --shm-size"
            )
            yield Check("/dev/shm", seen.name, "fail", has, f"{in_bytes(needed)} for {slots} rank(s)", hint)
        else:
            yield Check("/dev/shm", seen.name, "ok", has, f"{in_bytes(needed)}")


def _limits(seen: Seen) -> Iterator[Check]:
    if (value := seen.value("limits")) is None:
        return
    soft, slots = value["soft"], seen.host.slots
    least = {"open files": 1024, "processes": 256 * slots, "stack": 2**20}
    expected = ", ".join(f"{n} {v}" for n, v in least.items())
    low = [f"{n}: {soft[n]}" for n, wanted in least.items() if soft[n] is not None and soft[n] < wanted]
    if value["infiniband"] and soft["locked memory"] is not None:
        low.append(f"locked memory: {in_bytes(soft['locked memory'])}, and InfiniBand needs it unlimited")
    found = ", ".join(f"{n} {'unlimited' if v is None else v}" for n, v in soft.items())
    if low:
        hint = f"raise it in /etc/security/limits.conf on {seen.name}, then log in anew; it is the limit of this way in"
        yield Check("limits", seen.name, "fail", several(low), f"at least {expected}", hint)
    else:
        yield Check("limits", seen.name, "ok", found)


def _disk(found: Findings, seen: Seen) -> Iterator[Check]:
    if (value := seen.value("disk")) is None:
        return
    where, name, needs = value["folder"], seen.name, found.needs
    if value["problem"]:
        hint = f"make {where} writable for this user on {name}, or --set run_dir=… elsewhere"
        yield Check("writable", name, "fail", f"{where}: {value['problem']}", "a file written there", hint)
    else:
        yield Check("writable", name, "ok", f"{where} ({value['type']})")
    count = needs.keep_checkpoints
    if found.checkpoint_bytes is None:
        yield Check("space", name, "ok", f"{in_bytes(value['free'])} free; {found.sizes_unknown or 'size unknown'}")
    else:
        needed = found.checkpoint_bytes * count
        expected = f"{in_bytes(needed)} for {count} checkpoints"
        enough: Verdict = "fail" if value["free"] < needed else "ok"
        hint = "make room there, keep fewer (checkpoint.keep_last), or --set run_dir=… elsewhere"
        has = f"{in_bytes(value['free'])} free in {where}"
        yield Check("space", name, enough, has, expected, hint if enough == "fail" else "")
    if value["inodes"] is not None:
        ranks = sum(h.slots for h in needs.machines)
        files = count * (4 * ranks + 20) + 20 * ranks
        verdict: Verdict = "fail" if value["inodes"] < files else "ok"
        hint = f"remove small files from the file system of {where}" if verdict == "fail" else ""
        has = f"{value['inodes']} inodes free"
        yield Check("inodes", name, verdict, has, f"{files} for {count} checkpoints", hint)


SLOW_LOOKUP_S = 1.0


def _names(found: Findings, rank: int, seen: Seen) -> Iterator[Check]:
    rows = seen.value("names")
    if rows is None or len(found.needs.machines) == 1:
        return
    name, head = seen.name, found.needs.machines[0]
    wrong, hint = [], "put the names into DNS or /etc/hosts there, or give address=… for each host in the hostfile"
    for row in rows:
        if "error" in row:
            wrong.append(f"{row['name']}: {row['error']}")
        elif "forward_s" not in row:
            wrong.append(f"{row['name']}: no answer of the resolver")
        elif row["name"] == head.name and all(_is_loopback(a) for a in row["addresses"]):
            wrong.append(f"{row['name']} means {row['addresses'][0]}, where no other host reaches it")
            hint = f"give it in the hostfile, at the line of the head node: {head.name} slots={head.slots} address=…"
    if wrong:
        yield Check("look-up", name, "fail", several(wrong), "an address of each host", hint)
    else:
        longest = max((row["forward_s"] for row in rows), default=0.0)
        yield Check("look-up", name, "ok", f"{len(rows)} names in {longest:.1f} s")
    slow = [r for r in rows if "forward_s" in r and r.get("reverse_s", SLOW_LOOKUP_S + 1) > SLOW_LOOKUP_S]
    if slow:
        longest = max(r.get("reverse_s", float("inf")) for r in slow)
        took = "gave no answer in time" if longest == float("inf") else f"took {longest:.1f} s"
        hint = (
            f"the ranks look each other up so and wait for it at every start: put all hosts into /etc/hosts on {name},"
            " or `hosts: files` into /etc/nsswitch.conf, or mend the name server in /etc/resolv.conf"
        )
        who = several([r["addresses"][0] for r in slow])
        found_text = f"the name of {who} {took}"
        yield Check("reverse look-up", name, "warn", found_text, f"{SLOW_LOOKUP_S:.0f} s", hint)
    elif rows:
        yield Check("reverse look-up", name, "ok", f"{max(r.get('reverse_s', 0.0) for r in rows):.1f} s")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _data(seen: Seen) -> Iterator[Check]:
    for pack in seen.value("packs") or []:
        if problems := pack["problems"]:
            first, more = problems[0], f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            hint = f"make it readable on {seen.name}, restore it from a copy, or look at the file system there"
            what = f"{first['file']}: {first['problem']}{more}"
            yield Check("packs", seen.name, "fail", what, "every file as it was sealed", hint)
        elif "digest" in pack and pack["looked_at"] < pack["files"]:
            what = f"{pack['path']}: only {pack['looked_at']} of {pack['files']} files could be looked at in time"
            yield Check("packs", seen.name, "warn", what, "", "the file system is slow there: `ls -l` on the pack")
    backbone = seen.value("backbone")
    for row in (backbone or {}).get("problems", []):
        hint = f"make it readable on {seen.name}, or copy it there anew"
        yield Check("backbone", seen.name, "fail", f"{row['file']}: {row['problem']}", "a file that can be read", hint)


def _leftovers(found: Findings, seen: Seen) -> Iterator[Check]:
    if (value := seen.value("leftovers")) is None:
        return
    name, holder = seen.name, found.needs.holder
    if holder is not None and value["holder_is_alive"] is False:
        what = f"{found.needs.run} is held by pid {holder.get('pid')}, which is gone"
        hint = f"the file system has kept the lock of a dead process: remove {found.needs.run}/lock"
        yield Check("locks", name, "fail", what, "a free lock", hint)
    elif value["locks"]:
        hint = f"a build was killed, and others wait for it for ever: `rm {value['locks'][0]}` on {name}"
        yield Check("locks", name, "fail", several(value["locks"]), "no stale lock", hint)
    else:
        yield Check("locks", name, "ok", "none" if holder is None else f"held by pid {holder.get('pid')}")
    if segments := value["segments"]:
        what = f"{len(segments)} segment(s) that nobody has open, {in_bytes(sum(s['bytes'] for s in segments))}"
        what += f": {several([s['name'] for s in segments])}"
        yield Check("stale shared memory", name, "warn", what, "none", "--fix removes them")
    else:
        yield Check("stale shared memory", name, "ok", "none")
    processes = value["processes"]
    if processes and holder is None:
        who = several([f"pid {p['pid']}: {p['command'][:80]}" for p in processes])
        yield Check("orphans", name, "fail", who, "no process of this run", "--fix ends them")
    else:
        yield Check("orphans", name, "ok", "none" if not processes else f"the run is under way: {len(processes)}")
