"""Which lines of which logs: files that grow, are torn, cut short or junk, and the run that goes on meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import logs, rundir
from launcher.errors import NotFoundError, UsageError
from launcher.logs import BLOCK_BYTES, LINE_BYTES, Reader, Selection, View
from launcher.rundir import Run
from tests.conftest import Golden, Stub, made_run
from tests.test_cli import Transcript, compare, speechctl
from tests.test_rundir import held

__all__ = ["speechctl"]  # a fixture


def anything(_: str) -> bool:
    return True


# One file -------------------------------------------------------------------------------------------------------------


def test_a_line_is_told_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    reader = Reader(path)
    assert list(reader.fresh()) == []
    with path.open("ab", buffering=0) as file:
        for piece, lines in [
            (b"one\ntw", ["one"]),
            (b"o", []),
            (b"\r\nthree\r", ["two"]),  # may be half of \r\n
            (b"\n10%\r20%\r", ["three", "10%"]),
            (b"30%\n\n", ["20%", "30%", ""]),
            ("né".encode()[:-1], []),
            ("né".encode()[-1:] + b"\n", ["né"]),
            (b"last", []),
        ]:
            file.write(piece)
            assert list(reader.fresh()) == lines, piece
    assert reader.rest() == ["last"]
    assert reader.rest() == []


def test_a_file_that_is_cut_short_or_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\nto")
    reader = Reader(path)
    assert list(reader.fresh()) == ["one", "two"]
    path.write_text("1\n")
    assert list(reader.fresh()) == ["1"]
    path.rename(tmp_path / "log.1")
    path.write_text("a longer line than before\n")
    assert list(reader.fresh()) == ["a longer line than before"]
    path.unlink()
    assert list(reader.fresh()) == []


def test_the_tail_of_a_large_file_is_read_from_its_end(tmp_path: Path) -> None:
    """100 MB, of which nobody has the time to read all."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(100 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"line %d\n" % k for k in range(20_000)) + b"torn")
    before = psutil.Process().io_counters().read_chars
    reader = Reader(path)
    assert reader.tail(3, anything) == ["line 19997", "line 19998", "line 19999"]
    assert reader.tail(2, lambda text: text.endswith("00")) == ["line 19800", "line 19900"]
    assert psutil.Process().io_counters().read_chars - before < 1 << 20
    assert reader.rest() == ["torn"]
    assert list(reader.fresh()) == []


@pytest.mark.parametrize("length", [1, 7, 20_000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
@pytest.mark.parametrize("end", [b"", b"torn", b"\r"])
def test_the_tail_is_the_end_of_the_whole(tmp_path: Path, length: int, end: bytes) -> None:
    """Wherever the blocks are cut: in a line, in \\r\\n, before the first byte."""
    path = tmp_path / "log"
    line = b"x" * (length - 1)
    path.write_bytes(b"first\r\n" + b"".join(line + b"%d\r\n" % k for k in range(5)) + b"\r\n" * 3 + end)
    whole = list(Reader(path).all())
    for count in (0, 1, 4, 9, 100):
        reader = Reader(path)
        found = [*reader.tail(count + 1, anything), *reader.rest()]
        if length < LINE_BYTES - 1:  # longer ones come in pieces
            assert found[-count - 1 :] == whole[-count - 1 :]
        if count == 100:
            assert "".join(found) == "".join(whole)


def test_junk_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(os.urandom(1 << 20) + b"\n" + b"\x00" * (3 << 20) + b"\nlast\n")
    assert list(Reader(path).fresh())[-1] == "last"
    assert Reader(path).tail(1, anything) == ["last"]
    assert max(map(len, Reader(path).tail(10**6, anything))) <= 4 * (BLOCK_BYTES + LINE_BYTES)


# Which files ----------------------------------------------------------------------------------------------------------


def lab_run(root: Path) -> Run:
    """Two hosts with two ranks each; rank 3 failed in the second attempt, rank 0 lost it, rank 2 never spoke."""
    run = made_run(root, "failed")
    for attempt in run.attempts():
        rundir.write_json(attempt.hosts, [{"name": "gpu-03", "slots": 2}, {"name": "gpu-04", "slots": 2}])
        for k in range(2):
            attempt.node_log(k).write_text(f"node {k}: the ranks meet\n")
            attempt.ssh_log(k).touch()
        for rank in (0, 1, 3):
            attempt.rank_log(rank).write_text(f"loading\n\x1b[31mrank\t{rank}\x07 of attempt {attempt.number}\n")
    with attempt.rank_log(3).open("a") as file:
        file.write(f"Traceback (most recent call last):\n{TRACEBACK[1]}{TRACEBACK[2]}\n")
    attempt.rank_log(0).write_text("")
    write_failure(run, 3)
    return run


TRACEBACK = [
    "Traceback (most recent call last):\n",
    '  File "train.py", line 7, in run\n    raise ValueError("boom")\n',
    "ValueError: boom\n",
]


def write_failure(run: Run, rank: int, **more: Any) -> None:
    attempt = run.attempts()[-1]
    log = str(attempt.rank_log(rank))
    said = {"rank": rank, "message": f"rank {rank} on gpu-04: ValueError: boom", "hint": f"read {log}, mend it"}
    rundir.write_json(attempt.failure, {"code": 1, **said, "evidence": log, **more})
    for other in (0, rank):
        lost = other != rank
        record = {"rank": other, "host": "gpu", "time": 1.0, "hint": None, "code": 76 if lost else 1, "lost_peer": lost}
        words = {"type": "RuntimeError", "message": "Connection closed by peer"} if lost else {"type": "ValueError"}
        record |= {"message": "boom", "traceback": TRACEBACK, **words}
        rundir.write_json(attempt.rank_failure(other), record)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("rank", "--rank 1", 0),
        ("two-ranks", "--rank 1,3", 0),
        ("one-silent", "--rank 1-2", 0),
        ("failed", "--rank failed", 0),
        ("attempts", "--rank 1 --attempt all", 0),
        ("node", "--node gpu-04", 0),
        ("node-and-rank", "--node 0 --rank all", 0),
        ("all", "--node all --tail 1", 0),
        ("json", "--rank 1 --json", 0),
        ("grep", "--rank all --grep 'rank|File' --tail 1", 0),
        ("empty", "", 0),
        ("follow-ended", "--rank 1 -f", 0),
        ("none-failed", "--rank failed --attempt 1", 6),
        ("no-log", "--rank 2", 6),
        ("no-attempt", "--attempt 3", 6),
        ("no-rank", "--rank 1,4-6", 2),
        ("no-node", "--node gpu-05", 2),
        ("bad-ranks", "--rank 3-1", 2),
        ("worse-ranks", "--rank 0,,1", 2),
        ("bad-since", "--since yesterday", 2),
        ("bad-grep", "--grep '('", 2),
    ],
)
def test_logs(name: str, arguments: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    lab_run(tmp_path / "runs" / "stub")
    compare(f"logs-{name}", f"logs runs/stub {arguments}", code, speechctl, tmp_path, golden)


def test_logs_of_a_run_that_was_not_started(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    made_run(tmp_path / "runs" / "stub", "created")
    compare("logs-created", "logs stub", 6, speechctl, tmp_path, golden)


def test_since_leaves_out_what_has_not_grown(tmp_path: Path) -> None:
    run = lab_run(tmp_path / "run")
    attempt = run.attempts()[-1]
    os.utime(attempt.rank_log(1), (1, 1))
    shown = [line.log.number for line in logs.show(run, Selection("all"), View(tail=1, since_s=600), print)]
    assert shown == [3]


def test_a_rank_that_only_lost_its_peers_did_not_fail(tmp_path: Path) -> None:
    attempt = lab_run(tmp_path / "run").attempts()[-1]
    assert rundir.read_json(attempt.rank_failure(0))["lost_peer"]
    assert [log.number for log in Selection("failed").pick_logs(attempt)] == [3]


def test_where_no_rank_failed_the_nodes_are_shown(tmp_path: Path) -> None:
    run = lab_run(tmp_path / "run")
    attempt = run.attempts()[-1]
    for path in attempt.failures.iterdir():
        path.unlink()
    rundir.write_json(attempt.failure, {"code": 3, "rank": None, "message": "lost it", "hint": "", "evidence": ""})
    shown = [line.log.path for line in logs.show(run, Selection("failed"), View(), print)]
    assert shown == [attempt.node_log(0), attempt.node_log(1)]
    rundir.write_json(attempt.failure, {"code": 3, "message": "lost it", "hint": "", "evidence": [], "node_rank": 1})
    shown = [line.log.path for line in logs.show(run, Selection("failed"), View(), print)]
    assert shown == [attempt.node_log(1)]


def test_what_srun_said_of_a_node_is_shown(tmp_path: Path) -> None:
    """Of a node that SLURM lost nothing else says so, and `logs` knew ssh's logs only."""
    run = lab_run(tmp_path / "run")
    attempt = run.attempts()[-1]
    attempt.srun_log(1).write_text("srun: error: Node failure on gpu-04\n")
    said = "[srun 1 gpu-04] srun: error: Node failure on gpu-04"
    assert said in [line.render() for line in logs.show(run, Selection(nodes="all"), View(), print)]
    for path in attempt.failures.iterdir():
        path.unlink()
    rundir.write_json(attempt.failure, {"code": 76, "message": "lost it", "hint": "", "evidence": [], "node_rank": 1})
    shown = [line.render() for line in logs.show(run, Selection("failed"), View(), print)]
    assert shown == [said, "[node 1 gpu-04] node 1: the ranks meet"]


def test_an_attempt_that_has_not_said_who_is_in_it(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "interrupted")
    run.attempts()[-1].rank_log(5).write_text("here\n")
    assert [line.render() for line in logs.show(run, Selection("all"), View(), print)] == ["[rank 5] here"]
    with pytest.raises(UsageError, match="no rank 6"):
        list(logs.show(run, Selection("6"), View(), print))
    with pytest.raises(NotFoundError, match="no log of rank 0"):
        list(logs.show(run, Selection(), View(), print))


# While the run goes on ------------------------------------------------------------------------------------------------


def take(lines: Iterator[logs.Line], count: int) -> list[str]:
    return [next(lines).render() for _ in range(count)]


def test_following_meets_a_new_attempt_and_ends_with_the_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "interrupted")
    old = run.attempts()[-1]
    old.rank_log(0).write_text("1\n2\n3\nto")
    with held(run, "speechctl resume run") as holder:
        lines = logs.follow(run, Selection(), View(tail=2))
        assert take(lines, 2) == ["[rank 0] 2", "[rank 0] 3"]
        with old.rank_log(0).open("a") as file:
            file.write("rn\n")
        assert take(lines, 1) == ["[rank 0] torn"]
        attempt = run.new_attempt()
        attempt.rank_log(0).write_text("1\n2\n3\nlast words")  # all of what came after us is shown
        assert take(lines, 3) == [f"[a3 rank 0] {k}" for k in (1, 2, 3)]
        holder.kill()
        holder.wait()
        assert [line.render() for line in lines] == ["[a3 rank 0] last words"]


def test_following_one_attempt_ends_where_the_run_is_at_another(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "interrupted")
    for attempt in run.attempts():
        attempt.rank_log(0).write_text(f"{attempt.number}\n")
    with held(run, "speechctl resume run") as holder:
        assert [line.text for line in logs.follow(run, Selection(attempts="1"), View())] == ["1"]
        assert holder.poll() is None


def test_following_a_living_run_to_its_end(stub: Stub) -> None:
    stub.behave("raise 0.5", "lost")
    with stub.start(*stub.command, "launch", "stub.yaml"):
        stub.wait_for_ranks()
        with stub.start(*stub.command, "logs", "runs/stub", "-f", "--rank", "all", "--json") as follower:
            said, error = follower.communicate(timeout=30)
    assert (follower.returncode, error) == (0, "")
    rows = [json.loads(line) for line in said.splitlines()]
    assert {"ValueError: boom of rank 0"} <= {row["line"] for row in rows if row["number"] == 0}
    assert any("Connection closed by peer" in row["line"] for row in rows if row["number"] == 1)


def test_ctrl_c_leaves_quietly(stub: Stub) -> None:
    with stub.start(*stub.command, "launch", "stub.yaml") as launch:
        stub.wait_for_ranks()
        stub.run.attempts()[0].rank_log(0).write_text("hello\n")
        with stub.start(*stub.command, "logs", "stub", "-f") as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline() == "[rank 0] hello\n"
            follower.send_signal(signal.SIGINT)
            assert follower.communicate(timeout=10) == ("", "")
            assert follower.returncode == 130
        assert launch.poll() is None
        launch.send_signal(signal.SIGINT)
        launch.communicate(timeout=20)


def test_a_reader_that_has_seen_enough_ends_quietly(stub: Stub) -> None:
    run = made_run(stub.run.root, "finished")
    run.attempts()[-1].rank_log(0).write_text("line\n" * 100_000)
    command = f"{' '.join(stub.command)} logs stub | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=stub.root, env=stub.env, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[rank 0] line\n", "", 141)
