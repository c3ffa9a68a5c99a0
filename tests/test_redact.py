"""What is blacked out: every form that a program prints, wherever a chunk ends, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from launcher.redact import FILTER, MASK, Redactor

ODD = "hf_Zé+/ \"q'\\$x\tB=&k\n2nd line of it"
"""A value that looks different in each form."""


AROUND = ("", '"', "'", "{'token': '", "'}", "[rank 0] ")


def shown(redactor: Redactor, chunks: list[bytes]) -> bytes:
    """What a filter would have written."""
    out, held = b"", b""
    for chunk in chunks:
        done, held = redactor.split(held + chunk)
        out += done
    return out + redactor.data(held)


@pytest.mark.parametrize(
    "form",
    [
        ODD,
        json.dumps(ODD),
        json.dumps(ODD, ensure_ascii=False),
        repr(ODD),
        str({"token": ODD}),
        quote(ODD),
        quote(ODD, safe=""),
        quote_plus(ODD),
        base64.b64encode(ODD.encode()).decode(),
        base64.b64encode(f"me:{ODD}".encode()).decode(),
        base64.urlsafe_b64encode(f"you:{ODD} and more".encode()).decode(),
        ODD.encode().hex(),
        "[rank 0] 2nd line of it",
    ],
)
def test_a_value_is_found_in_the_forms_in_which_programs_print_it(form: str) -> None:
    redactor = Redactor([ODD])
    text = redactor.text(f"before {form} behind")
    # At the ends of a value in base64 there is a character that has bits of its neighbour too.
    around = "[A-Za-z0-9_=-]{0,13}" if form.isascii() and " " not in form else "|".join(map(re.escape, AROUND))
    assert re.fullmatch(f"before (?:{around})\\[secret\\](?:{around}) behind", text), text


def test_what_is_no_secret_is_left_as_it_is() -> None:
    redactor = Redactor(["hunter22"])
    for text in ("", "hunter2", "HUNTER22", "hunter 22", "ü\udcff\ud800"):
        assert redactor.text(text) == text
    assert redactor.text("ü hunter22 \udcff") == f"ü {MASK} \udcff"
    assert not Redactor() and Redactor().text("hunter22") == "hunter22"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("http://me:s3cr3t@proxy:3128", "user me, password s3cr3t"),
        ("http://me:p%40ss%2Fword@proxy", "the password is p@ss/word"),
        ("https://ghp_0123456789@github.com/x", "the token is ghp_0123456789"),
    ],
)
def test_the_password_in_a_url_is_found_alone_too(value: str, text: str) -> None:
    assert MASK in Redactor([value]).text(text)


@pytest.mark.parametrize("seed", range(20))
def test_wherever_chunks_end_and_values_overlap(seed: int) -> None:
    """Against the plain way: every byte that is in any occurrence of any value is gone."""
    rng = random.Random(seed)
    values = ["".join(rng.choices("ab", k=rng.randint(4, 9))) for _ in range(3)]
    redactor = Redactor(values)
    redactor.patterns = [value.encode() for value in values]  # in an alphabet of two, hex and base64 are no matter
    data = "".join(rng.choices("abc", weights=(4, 4, 1), k=2000)).encode()
    secret = bytearray(len(data))
    for value in redactor.patterns:
        for at in range(len(data)):
            if data.startswith(value, at):
                secret[at : at + len(value)] = b"\1" * len(value)
    kept = bytes(byte for byte, hidden in zip(data, secret, strict=True) if not hidden)
    assert len(kept) < len(data)
    chunks, at = [], 0
    while at < len(data):
        size = rng.choice((1, 1, 2, 3, 50))
        chunks.append(data[at : at + size])
        at += size
    assert shown(redactor, chunks).replace(MASK.encode(), b"") == kept
    assert shown(redactor, [data]) == redactor.data(data)


def test_what_can_be_no_value_is_shown_at_once() -> None:
    redactor = Redactor(["hunter22"])
    assert redactor.split(b"step 3\n") == (b"step 3\n", b"")
    assert redactor.split(b"step 3 hunt") == (b"step 3 ", b"hunt")


def test_long_values_and_long_outputs_take_no_time() -> None:
    redactor = Redactor(["a" * 20_000, "x".join(map(str, range(4000)))])
    began = time.process_time()
    assert len(shown(redactor, [b"step 100 loss 0.25 aaaa\n" * 2500] * 20)) == 20 * 2500 * 24
    assert time.process_time() - began < 10


PROGRAM = """\
import os, signal, sys
from launcher import redact
redact.use([os.environ["VALUE"]] if os.environ["VALUE"] else [])
redact.filter_output()
print("filter", redact.own_filter, flush=True)
print("out", "hunter22", flush=True)
print("err", "hunter22", file=sys.stderr, flush=True)
os.write(1, b"cut hunt")
os.write(2, b"er22 and hunt")
if sys.argv[1] == "kill": os.killpg(0, signal.SIGKILL)
if sys.argv[1] == "finish": redact.finish_output(); os.write(3, b"done")
"""


@pytest.mark.parametrize("end", ["kill", "exit", "finish"])
def test_a_log_has_the_last_words_whatever_ends_the_process(tmp_path: Path, end: str) -> None:
    log = tmp_path / "log"
    mark = os.open(tmp_path / "mark", os.O_WRONLY | os.O_CREAT)
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3>&"$0"', str(mark), sys.executable, "-c", PROGRAM, end],
            stdout=file,
            stderr=file,
            env={**os.environ, "VALUE": "hunter22"},
            start_new_session=True,
            pass_fds=(mark,),
        )
    os.close(mark)
    process.wait(20)
    deadline = time.monotonic() + 20
    while not (text := log.read_text()).endswith("hunt"):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    first, rest = text.split("\n", 1)
    assert rest == f"out {MASK}\nerr {MASK}\ncut {MASK} and hunt"
    filter_pid = int(first.split()[1])
    while name_of(filter_pid) == FILTER:
        assert time.monotonic() < deadline, "the filter ends with the last that can print"
        time.sleep(0.01)
    assert (tmp_path / "mark").read_text() == ("done" if end == "finish" else "")


def name_of(pid: int) -> str:
    """Empty where there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_a_filter_does_not_end_with_those_who_are_told_to(tmp_path: Path) -> None:
    program = "import os, sys\nfrom launcher import redact\nredact.use(['hunter22'])\nredact.filter_output()\n"
    program += "os.write(1, b'%d\\n' % redact.own_filter)\nsys.stdin.read()\nos.write(1, b'hunter22')"
    with (tmp_path / "log").open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=file, stderr=file)
    deadline = time.monotonic() + 20
    while not (text := (tmp_path / "log").read_text()).endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int(text)
    assert Path(f"/proc/{pid}/comm").read_text().strip() == FILTER
    assert sorted(os.listdir(f"/proc/{pid}/fd")) != [] and len(os.listdir(f"/proc/{pid}/fd")) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    process.communicate(b"", timeout=20)
    while not (tmp_path / "log").read_text().endswith(MASK):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_secrets_there_is_no_process(tmp_path: Path) -> None:
    env = {**os.environ, "VALUE": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM, "exit"], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("filter None\nout hunter22\n")


def test_a_password_is_hidden_in_a_url_without_its_scheme_too() -> None:
    assert (
        Redactor(["me:hunter22@proxy:3128"]).text("proxy says 407 to me, hunter22") == "proxy says 407 to me, [secret]"
    )
