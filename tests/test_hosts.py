"""What a person writes about machines, and what comes back: hosts, or a letter with every mistake in it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Literal

import pytest

from launcher.errors import ExitCode, HostError, UsageError
from launcher.hosts import (
    MAX_BYTES,
    Host,
    HostfileError,
    dump_hostfile,
    load_hostfile,
    local,
    parse_hostfile,
    same_machine,
    select,
)
from launcher.nodelist import NodelistError, expand_nodelist

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "hosts"


def refusal(text: str) -> str:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.render()


@pytest.mark.parametrize(
    ("processes", "gpus", "ranks"), [("auto", 0, 1), ("auto", 4, 4), (2, 0, 2), (2, 8, 2), (1, 4, 1)]
)
def test_this_machine_takes_what_was_asked_for_or_a_rank_for_each_gpu(
    processes: int | Literal["auto"], gpus: int, ranks: int
) -> None:
    assert local(processes, gpus) == [Host("localhost", ranks)]


def test_json_has_what_was_said_and_nothing_else() -> None:
    assert Host("gpu-01", 8).to_json() == {"name": "gpu-01", "slots": 8}
    host = Host("gpu-01", 2, "trainer", 2222, "10.0.0.5", (0, 2))
    assert Host.from_json(json.loads(json.dumps(host.to_json()))) == host
    assert Host.from_json({"name": "gpu-01", "slots": 8}) == Host("gpu-01", 8)


# Hostfiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("worker-0 slots=16", Host("worker-0", 16)),
        ("\t worker-0\t slots=16 \t", Host("worker-0", 16)),
        ("worker-0 slots=1024 # all of it", Host("worker-0", 1024)),
        ("worker-0 slots=1 # für später\t…", Host("worker-0", 1)),
        ("GPU-01.Lab.Example slots=8", Host("GPU-01.Lab.Example", 8)),
        ("0a slots=8", Host("0a", 8)),
        (f"{'a' * 253} slots=8", Host("a" * 253, 8)),
        ("_trainer.x-1@gpu slots=8", Host("gpu", 8, user="_trainer.x-1")),
        ("gpu port=65535 slots=8", Host("gpu", 8, port=65535)),
        ("gpu slots=8 address=10.0.0.5", Host("gpu", 8, address="10.0.0.5")),
        ("gpu slots=8 address=FD00:0:0::0005", Host("gpu", 8, address="fd00::5")),
        ("10.0.0.5 slots=8 address=10.0.0.5", Host("10.0.0.5", 8, address="10.0.0.5")),
        ("trainer@[FD00::05] slots=8", Host("fd00::5", 8, user="trainer")),
        ("gpu gpus=0,2-3", Host("gpu", 3, gpus=(0, 2, 3))),
        ("gpu gpus=5,3,7 slots=3", Host("gpu", 3, gpus=(5, 3, 7))),
        ("gpu slots=1 gpus=4-4", Host("gpu", 1, gpus=(4,))),
    ],
)
def test_a_line_is_a_host(line: str, host: Host) -> None:
    assert parse_hostfile(line, "hosts") == [host]
    assert parse_hostfile(f"# one\r\n\r\n{line}\r\nnext slots=2\r\n", "hosts") == [host, Host("next", 2)]


@pytest.mark.parametrize(
    ("line", "column", "expected"),
    [
        ("gpu", 4, "slots=N"),
        ("gpu # slots=8", 4, "slots=N"),
        ("gpu port=22", 12, "slots=N"),
        ("gpu slots=4x", 11, "a number from 1 to 1024"),
        ("gpu slots=0", 11, "a number from 1 to 1024"),
        ("gpu slots=-1", 11, "a number from 1 to 1024"),
        ("gpu slots=+1", 11, "a number from 1 to 1024"),
        ("gpu slots=08", 11, "a number from 1 to 1024"),
        ("gpu slots=10^9", 11, "a number from 1 to 1024"),
        ("gpu slots=1000000000", 11, "a number from 1 to 1024"),
        ("gpu slots=1025", 11, "a number from 1 to 1024"),
        ("gpu slots=1_0", 11, "a number from 1 to 1024"),
        ("gpu slots=８", 11, "a number from 1 to 1024"),
        ("gpu slots=", 11, "a number from 1 to 1024"),
        ("gpu slots=8#", 11, "a number from 1 to 1024"),
        ("gpu slots=8\0", 12, "a number from 1 to 1024"),
        ("gpu slots = 8", 5, "key=value"),
        ("gpu 8", 5, "key=value"),
        ("gpu =8", 5, "key=value"),
        ("gpu slot=8", 5, "slots, port, address or gpus"),
        ("gpu SLOTS=8", 5, "slots, port, address or gpus"),
        ("gpu name=x slots=8", 5, "slots, port, address or gpus"),
        ("gpu user=x slots=8", 5, "slots, port, address or gpus"),
        ("gpu slots=8 slots=8", 19, "each key once"),
        ("gpu slots=8 port=0", 18, "a number from 1 to 65535"),
        ("gpu slots=8 port=65536", 18, "a number from 1 to 65535"),
        ("gpu slots=8 port=ssh", 18, "a number from 1 to 65535"),
        ("gpu slots=8 address=gpu", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=10.0.0.05", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=10.5", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=0.0.0.0", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=ff02::1", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=fe80::1%eth0", 21, "the IPv4 or IPv6 address"),
        ("gpu slots=8 address=fe80::1%$(id)", 21, "the IPv4 or IPv6 address"),
        ("gpu gpus=", 10, "GPU numbers"),
        ("gpu gpus=0,", 10, "GPU numbers"),
        ("gpu gpus=0,0", 10, "GPU numbers"),
        ("gpu gpus=0-2,1", 10, "GPU numbers"),
        ("gpu gpus=3-1", 10, "GPU numbers"),
        ("gpu gpus=0-1024", 10, "GPU numbers"),
        ("gpu gpus=a", 10, "GPU numbers"),
        ("gpu gpus=0,2-3 slots=4", 22, "slots=3, one for each of the gpus"),
        ("slots=8", 1, "a host name or an IP address"),
        ("-oProxyCommand=id slots=8", 1, "a host name or an IP address"),
        (".gpu slots=8", 1, "a host name or an IP address"),
        ("gpu_1 slots=8", 1, "a host name or an IP address"),
        ("gpu;id slots=8", 1, "a host name or an IP address"),
        ("gpu$(id) slots=8", 1, "a host name or an IP address"),
        ("gpu%n slots=8", 1, "a host name or an IP address"),
        ("büro slots=8", 2, "a host name or an IP address"),
        ("gpu\u00a0slots=8", 4, "a host name or an IP address"),
        ("gpu\x1b[31m slots=8", 4, "a host name or an IP address"),
        ("\ufeffgpu slots=8", 1, "a host name or an IP address"),
        (f"{'a' * 254} slots=8", 1, "a host name or an IP address"),
        ("gpu:22 slots=8", 1, "a host name or an IP address"),
        ("fd00::1 slots=8", 1, "a host name or an IP address"),
        ("[fd00::1 slots=8", 1, "a host name or an IP address"),
        ("[gpu] slots=8", 1, "a host name or an IP address"),
        ("[10.0.0.5] slots=8", 1, "a host name or an IP address"),
        ("10.0.0.256 slots=8", 1, "a host name or an IP address"),
        ("17 slots=8", 1, "a host name or an IP address"),
        ("trainer@ slots=8", 9, "a host name or an IP address"),
        ("@gpu slots=8", 1, "a user name"),
        ("-l@gpu slots=8", 1, "a user name"),
        ("a@b@gpu slots=8", 1, "a user name"),
        ("$USER@gpu slots=8", 1, "a user name"),
        ("gpu slots=8 # \x1b[2J", 15, "text"),
        ("gpu slots=8 # \u202e", 15, "text"),
        ("gpu slots=8\rb slots=8", 12, "lines that end in LF or CRLF"),
    ],
)
def test_a_bad_line_is_refused_where_it_is_bad(line: str, column: int, expected: str) -> None:
    text = refusal(f"# one\n{line}\nb1 slots=2\n")
    assert text.startswith(f"error: hosts has 1 error\n\nhosts:2:{column}: expected {expected}"), text
    assert ", found " in text.splitlines()[2]
    assert text.splitlines()[3].startswith("  2 | ")
    assert text.splitlines()[4].strip("| ^") == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\ufeff]", text)


def test_every_mistake_is_in_one_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(HostfileError) as caught:
        load_hostfile(Path("mistakes.hosts"))
    assert caught.value.render() + "\n" == (GOLDEN / "mistakes.txt").read_text(encoding="utf-8")
    assert [p.spot.line + 1 for p in caught.value.problems] == [3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 11, 12, 13, 14, 16]


def test_a_long_letter_ends_early() -> None:
    text = refusal("".join(f"gpu-{k}\n" for k in range(60)))
    assert text.count("hosts:") == 50
    assert "hosts has 60 errors" in text and "… and 10 more" in text


@pytest.mark.parametrize(
    "second",
    ["gpu-01 slots=4", "GPU-01 slots=8", "trainer@gpu-01 slots=8", "gpu-01. slots=8", "gpu-01 slots=8 port=2222"],
)
def test_one_host_twice_is_refused_with_both_lines(second: str) -> None:
    text = refusal(f"# lab\ngpu-01 slots=8\n\n{second}\n")
    assert "hosts:4:" in text and "on line 2 and on line 4" in text and text.count("hosts:") == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("[fd00::1] slots=1", "[FD00:0::0001] slots=1"),
        ("a slots=1 address=10.0.0.5", "b slots=1 address=10.0.0.5"),
        ("a slots=1 address=10.0.0.5", "10.0.0.5 slots=1"),
    ],
)
def test_one_address_twice_is_refused_with_both_lines(first: str, second: str) -> None:
    assert "on line 1 and on line 2" in refusal(f"{first}\n{second}\n")


@pytest.mark.parametrize(
    ("text", "found"), [("", "nothing"), ("\r\n \t\n", "nothing"), ("# gpu-01 slots=8\n", "only comments")]
)
def test_no_hosts_never_mean_a_smaller_run(text: str, found: str) -> None:
    """DeepSpeed trains on this machine alone after a hostfile that it did not find."""
    assert f"hosts:1:1: expected at least one host, found {found}" in refusal(text)


def test_a_file_that_cannot_be_used_is_named_with_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "lab.txt").write_bytes(b"\xef\xbb\xbfgpu-01 slots=8\r\n")
    (tmp_path / "large.txt").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "utf16.txt").write_bytes("gpu-01 slots=8\n".encode("utf-16"))
    (tmp_path / "folder").mkdir()
    assert load_hostfile(tmp_path / "lab.txt") == [Host("gpu-01", 8)]
    cases = {
        "lap.txt": ("there is no such file", f"did you mean lab.txt or large.txt in {tmp_path}?"),
        "q": ("there is no such file", f"{tmp_path} has lab.txt, large.txt, utf16.txt"),
        "gone/lab.txt": ("there is no such file", f"there is no directory {tmp_path / 'gone'}"),
        "folder": ("expected a hostfile, found a directory", f"there is no file in {tmp_path / 'folder'}"),
        "large.txt": ("larger than 1 MiB", "large.txt"),
        "lab.txt/x": ("cannot be read: Not a directory", "there is no directory"),
        "a\0b": ("cannot be read: embedded null byte", "lab.txt"),
        "utf16.txt": ("expected UTF-8, found the byte 0xff", "a line is `gpu-01 slots=8`"),
    }
    for name, (message, hint) in cases.items():
        with pytest.raises(HostfileError) as caught:
            load_hostfile(tmp_path / name)
        assert message in caught.value.message and hint in caught.value.hint, caught.value.render()


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """Nor its directory, where a root's is: that ended in a traceback, behind a test that was skipped for root."""
    path, user = tmp_path / "lab.txt", os.geteuid()
    path.touch(mode=0o000)
    if user == 0:
        os.seteuid(65534)  # root reads every file
    try:
        with pytest.raises(HostfileError, match="cannot be read: Permission denied"):
            load_hostfile(path)
    finally:
        os.seteuid(user)


def test_the_shipped_hostfiles_are_read() -> None:
    hosts = {path.name: load_hostfile(path) for path in sorted((ROOT / "hostfiles").iterdir())}
    assert hosts["lab.txt"] == [Host("gpu-01", 8), Host("gpu-02", 8)]
    assert hosts["mixed.txt"] == [
        Host("gpu-01", 4, user="trainer", port=2222),
        Host("gpu-02", 3, user="trainer", gpus=(0, 2, 3)),
        Host("gpu-03.lab.example", 8, address="10.0.0.3"),
        Host("192.0.2.17", 2),
        Host("2001:db8::18", 2, port=2200),
    ]


def random_host(rng: random.Random, k: int) -> Host:
    """The k-th of a list: k keeps its name and its address from being another's."""
    letters = "abcxyzABCXYZ0189.-"
    name = rng.choice([f"h{k}{''.join(rng.choices(letters, k=rng.randint(0, 9)))}0", f"10.1.{k // 256}.{k % 256}"])
    name = rng.choice([name, name, f"fd00::1:{k + 1:x}"])
    gpus = tuple(rng.sample(range(1024), rng.randint(1, 16))) if rng.random() < 0.5 else None
    return Host(
        name,
        len(gpus) if gpus else rng.randint(1, 1024),
        user=rng.choice([None, "trainer", "_x.y-z", "0"]),
        port=rng.choice([None, 1, 22, 65535]),
        address=rng.choice([None, f"10.2.{k // 256}.{k % 256}", f"fd00::2:{k + 1:x}"]),
        gpus=gpus,
    )


def test_what_is_dumped_is_read_again() -> None:
    rng = random.Random(6)
    hosts = [random_host(rng, k) for k in range(500)]
    assert parse_hostfile(dump_hostfile(hosts), "hosts") == hosts
    assert parse_hostfile(dump_hostfile(hosts).replace("\n", " # x\r\n\n"), "hosts") == hosts
    assert [Host.from_json(json.loads(json.dumps(host.to_json()))) for host in hosts] == hosts


HOSTILE = [
    *";|&><`'\"\\*?~$(){}[]!#%@=,:/-.+^\n\r\t \0\x1b\x7f\x85\xa0",
    *("$()", "${IFS}", "$(touch x)", "`id`", "-oProxyCommand=", "%n", "%h", "&&", "||", "\r\n", "--", "../"),
    *("ü", "gpu–1", "８", "\u202e", "\u2028", "\u200b", "\ud800", "🎈", "ſ", "\u212a", "İ"),
    *("gpu", "gpu-01", "trainer", "10.0.0.5", "fe80::1", "[fd00::1]", "slots=8", "8", "0,2-3", " slots=2"),
    *(" port=22", " address=", " gpus=", " slots="),
]


def test_no_field_ever_has_a_character_that_a_shell_or_ssh_reads() -> None:
    rng = random.Random(8)
    shapes = ["{}", "{} slots=8", "{}@gpu slots=8", "gpu{} slots=8", "gpu slots=8 {}", "gpu slots=8 address={}"]
    shapes += ["gpu slots={}", "gpu slots=8 port=2{}", "gpu gpus=0{}", "trainer@[fd00::{}] slots=8", "gpu slots=8 #{}"]
    taken = 0
    for _ in range(2000):
        text = rng.choice(shapes).replace("{}", "".join(rng.choices(HOSTILE, k=rng.randint(1, 5))))
        try:
            hosts = parse_hostfile(text, "hosts")
        except HostfileError as error:
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\ud800]", error.render())
            continue
        taken += 1
        for host in hosts:
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*|[0-9a-f:.]*:[0-9a-f:.]*", host.name), text
            assert host.user is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", host.user), text
            assert host.address is None or re.fullmatch(r"[0-9a-f:.]+", host.address), text
            numbers = [host.slots, host.port or 1, *(host.gpus or ())]
            assert all(type(n) is int and 0 <= n <= 65535 for n in numbers) and host.slots > 0, text
    assert taken > 50  # else this shows nothing


# Selections ----------------------------------------------------------------------------------------------------------

POOL = [
    Host("worker-0", 4),
    Host("worker-1", 4, user="trainer"),
    Host("gpu-01", 3, gpus=(7, 5, 3)),
    Host("fd00::1", 2),
]


def chosen(include: list[str], exclude: list[str]) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    return {host.name: (host.slots, host.gpus) for host in select(POOL, include, exclude)}


def test_no_selection_leaves_every_host_as_it_is() -> None:
    assert select(POOL) == POOL


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        # As in the documentation of DeepSpeed's parse_resource_filter, with these hosts.
        (["worker-0@worker-1:0,2"], [], {"worker-0": (4, None), "worker-1": (2, (0, 2))}),
        ([], ["worker-1:0@gpu-01@[fd00::1]"], {"worker-0": (4, None), "worker-1": (3, (1, 2, 3))}),
        # The order is the hostfile's.
        (["worker-1:3,0", "worker-0:1"], [], {"worker-0": (1, (1,)), "worker-1": (2, (0, 3))}),
        (["worker-1:0@worker-1:2"], [], {"worker-1": (2, (0, 2))}),
        (["worker-1:0@worker-1"], [], {"worker-1": (4, None)}),
        (["worker-0:0-3"], [], {"worker-0": (4, None)}),
        (["worker-0:0,2-3"], [], {"worker-0": (3, (0, 2, 3))}),
        (["WORKER-0"], [], {"worker-0": (4, None)}),
        (["worker-*:1"], [], {"worker-0": (1, (1,)), "worker-1": (1, (1,))}),
        (["worker-[!0]@gpu-0?"], [], {"worker-1": (4, None), "gpu-01": (3, (7, 5, 3))}),
        (["[FD00:0::1]:1"], [], {"fd00::1": (1, (1,))}),
        # A position in the list of GPUs, not the number of a GPU.
        (["gpu-01:0,2"], [], {"gpu-01": (2, (7, 3))}),
        (["gpu-01"], ["gpu-01:1"], {"gpu-01": (2, (7, 3))}),
        # The slots keep their numbers: 3 is still 3 after an include of 2 and 3.
        (["worker-0:2-3"], ["worker-0:3"], {"worker-0": (1, (2,))}),
        (["worker-*"], ["worker-0", "worker-1:1-2"], {"worker-1": (2, (0, 3))}),
        (["worker-0"], ["worker-1"], {"worker-0": (4, None)}),
    ],
)
def test_a_selection_keeps_what_it_says(
    include: list[str], exclude: list[str], left: dict[str, tuple[int, tuple[int, ...] | None]]
) -> None:
    assert chosen(include, exclude) == left
    assert list(chosen(include, exclude)) == list(left)


def test_a_selected_host_keeps_its_login() -> None:
    assert select(POOL, ["worker-1:1"]) == [Host("worker-1", 1, user="trainer", gpus=(1,))]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["worker-2"], [], "launch.include: expected a host, found 'worker-2'; did you mean 'worker-1'?"),
        ([], ["wroker-0:0"], "launch.exclude: expected a host, found 'wroker-0'; did you mean 'worker-0'?"),
        (["node-*"], [], "launch.include: expected a host, found 'node-*'"),
        ([""], [], "launch.include: expected a host, found nothing"),
        (["worker-0@"], [], "launch.include: expected a host, found nothing"),
        (["trainer@worker-1"], [], "launch.include: expected a host, found 'trainer'"),
        (["worker-0:4"], [], "launch.include worker-0:4: expected slots of worker-0, which has slots 0-3, found 4"),
        ([], ["*:2"], "launch.exclude *:2: expected slots of fd00::1, which has slots 0-1, found 2"),
        (["gpu-01:7"], [], "launch.include gpu-01:7: expected slots of gpu-01, which has slots 0-2, found 7"),
        (["worker-0:"], [], "launch.include worker-0:: expected slots such as 0,2-3, each once, found nothing"),
        (["worker-0:1x"], [], "launch.include worker-0:1x: expected slots such as 0,2-3, each once, found '1x'"),
        (["worker-0:3-1"], [], "launch.include worker-0:3-1: expected slots such as 0,2-3, each once, found '3-1'"),
        (["worker-0:0:1"], [], "launch.include worker-0:0:1: expected slots such as 0,2-3, each once, found '0:1'"),
        (
            ["worker-0"],
            ["worker-*"],
            "expected at least one host, found none left by launch.include worker-0 launch.exclude",
        ),
        ([], ["*"], "expected at least one host, found none left by launch.exclude *"),
    ],
)
def test_a_selection_that_means_nothing_is_refused(include: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(POOL, include, exclude)
    assert caught.value.message.startswith(message), caught.value.message
    assert "the hosts are worker-0, worker-1, gpu-01, fd00::1" in caught.value.hint


def test_all_that_is_wrong_with_a_selection_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        select(POOL, ["worker-9@worker-0:9"], ["x"])
    assert len(caught.value.message.splitlines()) == 3


def test_two_names_of_one_machine_are_refused() -> None:
    same_machine({})
    same_machine({"a": "1", "b": "2", "c": "", "d": ""})
    with pytest.raises(HostError) as caught:
        same_machine({"gpu-01": "4f2a", "gpu-02": "77", "gpu-01.lab.example": "4F2A\n", "x": "9", "y": "9"})
    assert caught.value.exit_code == ExitCode.HOST
    assert caught.value.message.splitlines() == [
        "gpu-01 and gpu-01.lab.example are one machine, with the machine id 4f2a",
        "x and y are one machine, with the machine id 9",
    ]


# SLURM's node lists --------------------------------------------------------------------------------------------------

RECORDED = [line.split(" -> ") for line in (GOLDEN / "nodelists.txt").read_text().splitlines() if line[0] != "#"]
"""Lists with the names that scontrol 22.05 printed."""


def scontrol(text: str, folder: Path) -> list[str]:
    """scontrol's own answer. It asks for a configuration, and for no cluster."""
    config = folder / "slurm.conf"
    config.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    argv = ["scontrol", "show", "hostnames", text]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, env={**os.environ, "SLURM_CONF": str(config)}
    )
    return done.stdout.split()


def random_nodelist(rng: random.Random) -> str:
    def bracket() -> str:
        parts = []
        for _ in range(rng.randint(1, 3)):
            first = rng.choice([0, 1, 7, 9, 98, 99, 100, rng.randrange(2000)])
            last, width = first + rng.choice([0, 1, 3, 12]), rng.choice([1, 1, 2, 3, 5])
            parts.append(f"{first:0{width}}" + rng.choice(["", f"-{last:0{rng.choice([1, width])}}"]))
        return f"[{','.join(parts)}]"

    def entry() -> str:
        if rng.random() < 0.3:
            return rng.choice(["login1", "n1", "gpu01", "gpu1", "a-b.c", "7", "007", "no_de"])
        between = [rng.choice(["n", "-", "0", "", "x.y", "_"]) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
        return rng.choice(["gpu", "n", "rack", "a1", "x-", "A", "r0", ""]) + bracket().join(["", *between, ""])

    return rng.choice([",", ",", ",,", ", ", " "]).join(entry() for _ in range(rng.randint(1, 4)))


@pytest.mark.parametrize(("text", "names"), RECORDED)
def test_a_nodelist_has_the_names_that_scontrol_gave_it(text: str, names: str) -> None:
    assert expand_nodelist(text) == names.split()


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol, in the package slurm-client")
def test_a_nodelist_has_the_names_that_scontrol_gives_it(tmp_path: Path) -> None:
    rng = random.Random(11)
    for text in [text for text, _ in RECORDED] + [random_nodelist(rng) for _ in range(300)]:
        assert expand_nodelist(text) == scontrol(text, tmp_path), text


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("", 1, "a name, found nothing"),
        (" ,\n", 1, "a name, found nothing"),
        ("gpu[1", 4, "a `]` for this, found '['"),
        ("a,gpu[1-3,b", 6, "a `]` for this, found '['"),
        ("gpu1]", 5, "letters, digits, '.', '_' and '-', found ']'"),
        ("gpu[[1-2]]", 4, "a `]` for this, found '['"),
        ("gpu[]", 5, "a number or a range such as 01-03, found nothing"),
        ("gpu[1,,2]", 7, "a number or a range such as 01-03, found nothing"),
        ("gpu[1-]", 5, "a number or a range such as 01-03, found '1-'"),
        ("gpu[1, 2]", 7, "a number or a range such as 01-03, found '2'"),
        ("gpu[1,x]", 7, "a number or a range such as 01-03, found 'x'"),
        ("gpu[1-9:2]", 5, "a number or a range such as 01-03, found '1-9:2'"),
        ("gpu[1,٣]", 7, "a number or a range such as 01-03, found '٣'"),
        ("gpu[1,3-2]", 7, "a range that counts up, found '3-2'"),
        ("gpu[1-2]x,b", 9, "a comma, since SLURM's names end at their last bracket, found 'x'"),
        ("-gpu", 1, "letters, digits, '.', '_' and '-', found '-'"),
        ("a,b;id", 4, "letters, digits, '.', '_' and '-', found ';'"),
        ("a,$(id)", 3, "letters, digits, '.', '_' and '-', found '$'"),
        ("(null)", 1, "letters, digits, '.', '_' and '-', found '('"),
        ("a,bü", 4, "letters, digits, '.', '_' and '-', found 'ü'"),
        (f"a,{'x' * 250}[1-1000]", 3, "names of at most 253 characters, found '254 characters'"),
        ("a[1-100001]", 1, "at most 100000 names, found '100001'"),
        ("a[1-99999],b,c", 14, "at most 100000 names, found '100001'"),
        ("a[1-1000]b[1-1000]", 1, "at most 100000 names, found '1000000'"),
        ("a[0-999999999999999999]", 1, "at most 100000 names, found '1000000000000000000'"),
    ],
)
def test_a_text_that_is_no_nodelist_is_refused_where_it_goes_wrong(text: str, column: int, expected: str) -> None:
    with pytest.raises(NodelistError) as caught:
        expand_nodelist(text)
    assert caught.value.message.startswith(f"node list:1:{column}: expected {expected}\n"), caught.value.message


def test_a_nodelist_that_is_large_or_hostile_takes_no_time() -> None:
    begin = time.monotonic()
    assert len(expand_nodelist("n[1-100000]")) == 100_000
    for text in ["[" * 10**5, "a[1," * 10**5, "a[0-9]" * 10**4, "a[" + "1," * 10**5]:
        with pytest.raises(NodelistError):
            expand_nodelist(text)
    assert time.monotonic() - begin < 10
