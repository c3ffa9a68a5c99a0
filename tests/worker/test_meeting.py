"""Two nodes of the real torchrun meet at one address, and listen nowhere else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher import environment
from launcher.hosts import Host
from launcher.node import torchrun_argv
from tests.conftest import wait_until

pytestmark = pytest.mark.ranks

RANK = """\
import os, sys, time
from pathlib import Path
import torch.distributed
from launcher.worker.ranks import Ranks
folder = Path(sys.argv[1])
ranks = Ranks()
ranks.connect()
said = {"rank": ranks.rank, "text": "x" * ranks.rank + "\\xe9", "none": None, "half": 0.1}
assert ranks.gather(said) == [{**said, "rank": k, "text": "x" * k + "\\xe9"} for k in range(2)]
assert ranks.gather((ranks.rank, "a")) == [[0, "a"], [1, "a"]] and ranks.gather(None) == [None, None]
(folder / f"up-{ranks.rank}").touch()
while not (folder / "go").exists():
    time.sleep(0.05)
ranks.close()
"""


def test_two_nodes_meet_at_one_address(tmp_path: Path) -> None:
    """torch's own static rendezvous listened on every interface, also of a run on one machine."""
    (tmp_path / "rank.py").write_text(RANK)
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.listen(16)
    meeting = {"address": "127.0.0.1", "port": door.getsockname()[1], "id": "0f"}
    env = {**os.environ, **environment.base_variables(2, "cpu"), "GLOO_SOCKET_IFNAME": "lo", "PET_RDZV_ID": "0f"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    nodes = []
    for k in range(2):
        listening = door.fileno() if k == 0 else None
        argv = torchrun_argv(sys.executable, [Host("a", 1), Host("b", 1)], k, meeting, tmp_path, listening)
        argv = [*argv[: argv.index("-m", 3)], str(tmp_path / "rank.py"), str(tmp_path)]
        log = (tmp_path / f"log-{k}").open("wb")
        nodes.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log, pass_fds=() if k else (door.fileno(),)))
        log.close()
    door.close()
    try:
        up = [tmp_path / f"up-{k}" for k in range(2)]
        wait_until(lambda: all(p.exists() for p in up) or any(n.poll() is not None for n in nodes), timeout_s=120)
        assert all(p.exists() for p in up), "".join((tmp_path / f"log-{k}").read_text() for k in range(2))
        family = [p for n in nodes for p in (psutil.Process(n.pid), *psutil.Process(n.pid).children(recursive=True))]
        found = {c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert (meeting["address"], meeting["port"]) in found
        assert {address for address, _ in found} == {"127.0.0.1"}, json.dumps(sorted(found))
        (tmp_path / "go").touch()
        assert [node.wait(60) for node in nodes] == [0, 0]
        assert "rdzv" not in (tmp_path / "log-1").read_text(), "it has nothing to complain about"
    finally:
        for node in nodes:
            node.kill()
            node.wait()
