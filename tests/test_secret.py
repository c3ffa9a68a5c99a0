"""Secrets reach the ranks whole, and nobody else: no file, no command line, no message, whatever a rank says."""

from __future__ import annotations

import hashlib
import os
import select
from pathlib import Path
from typing import Any

import pytest

from launcher import environment, recipe_file, redact, rundir, secret
from launcher.errors import ExitCode, HostError, PreflightError, UsageError
from launcher.recipe_file import RecipeError
from launcher.recipe_launch import Launch
from tests.canaries import Watch
from tests.conftest import RECIPE, Stub, gone

TOKEN = "hf_canary'\"\\ $(touch x)\té=&+/%n"
PROXY = "http://me:proxycanary@127.0.0.1:3128"
KEY = "-----BEGIN-----\ncanaryline one\ncanaryline two\n-----END-----"


@pytest.fixture
def keeping(stub: Stub) -> Stub:
    """A stub with three secrets: from the environment, from a file, and a proxy that looks like one."""
    key = stub.root / "key"
    key.write_bytes(f"{KEY}\n".encode())
    key.chmod(0o600)
    launch = f"{{processes: 2, stop_grace: 2s, secrets: [HF_TOKEN, DEPLOY={key}]}}"
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))
    stub.env |= {"HF_TOKEN": TOKEN, "https_proxy": PROXY, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HOME": "/hub"}
    return stub


def no_canary(stub: Stub, watch: Watch, done: Any) -> None:
    (stub.root / "key").unlink()
    assert watch.in_files(stub.root) == []
    assert watch.files > 20
    assert watch.in_command_lines() == []
    assert any(b"torch.distributed.run" in line for line in watch.seen)
    assert not watch.redactor.found((done.stdout + done.stderr).encode())
    assert gone(stub.pids(), within_s=0)


def sha256(value: str) -> str:
    return hashlib.sha256(os.fsencode(value)).hexdigest()


@pytest.mark.parametrize(
    ("how", "code"),
    [("leak 30", ExitCode.FINISHED), ("leak-raise", ExitCode.TRAINING_RAISED), ("leak-kill", ExitCode.NO_PROGRESS)],
)
def test_no_canary_is_anywhere_after_a_run(keeping: Stub, how: str, code: ExitCode) -> None:
    keeping.behave("train 30" if code == ExitCode.FINISHED else "deaf", how, patience_s=0.3)
    with Watch([TOKEN, PROXY, KEY]).running() as watch:
        done = keeping.speechctl("launch", "stub.yaml", "--set", "launch.relaunch.attempts=1")
    assert done.returncode == code, done.stderr
    no_canary(keeping, watch, done)
    (attempt,) = keeping.run.attempts()
    env = rundir.read_json(attempt.env)
    assert env["secrets"] == {"https_proxy": None, "HF_TOKEN": None, "DEPLOY": str(keeping.root / "key")}
    assert env["variables"]["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1" and env["variables"]["HF_HOME"] == "/hub"
    assert not {"https_proxy", "HF_TOKEN", "DEPLOY"} & set(env["variables"])
    there = rundir.read_json(attempt.root / "torchrun.json")["variables"]
    assert there["HF_TOKEN"] == f"sha256:{sha256(TOKEN)}" and there["DEPLOY"] == f"sha256:{sha256(KEY)}"
    log = attempt.rank_log(1).read_text()
    (said,) = [line.split() for line in log.splitlines() if line.startswith("these are what they were")]
    assert set(said[5:]) == {sha256(PROXY), sha256(TOKEN), sha256(KEY)}
    assert f"HF_TOKEN={redact.MASK}\n" in log, "what its children print passes too"
    if how == "leak-raise":
        failure = rundir.read_json(attempt.rank_failure(1))
        assert failure["message"].startswith(f"401 for https://me:{redact.MASK}@hub, [")
        assert f": ValueError: 401 for https://me:{redact.MASK}@hub" in done.stderr
    if how == "leak-kill":
        assert log.endswith(f"the last words {redact.MASK}"), "the filter outlives the rank"
        assert " was ended by SIGKILL" in done.stderr, "the node waits for its own"


def test_a_run_without_secrets_has_no_filter(stub: Stub) -> None:
    stub.behave("train 20", "train 20")
    with Watch(["nothing like it"]).running():
        assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.FINISHED
    (attempt,) = stub.run.attempts()
    assert rundir.read_json(attempt.env)["secrets"] == {}
    assert redact.NAMES not in rundir.read_json(attempt.root / "torchrun.json")["variables"]


def test_resume_reads_them_anew(keeping: Stub) -> None:
    keeping.behave("kill 0.2", "train")
    keeping.speechctl("launch", "stub.yaml", "--set", "launch.relaunch.attempts=1")
    keeping.behave("train 20", "train 20")
    done = keeping.speechctl("resume", "runs/stub", env={**keeping.env, "HF_TOKEN": "another value"})
    assert done.returncode == ExitCode.FINISHED, done.stderr
    variables = rundir.read_json(keeping.run.attempts()[-1].root / "torchrun.json")["variables"]
    assert variables["HF_TOKEN"] == f"sha256:{sha256('another value')}"


def test_a_resume_without_them_makes_no_attempt(keeping: Stub) -> None:
    keeping.behave("kill 0.2", "train")
    keeping.speechctl("launch", "stub.yaml", "--set", "launch.relaunch.attempts=1")
    (keeping.root / "key").unlink()
    done = keeping.speechctl("resume", "runs/stub")
    assert done.returncode == ExitCode.PREFLIGHT
    assert f"error: the secret DEPLOY: {keeping.root}/key cannot be read: No such file" in done.stderr
    assert len(keeping.run.attempts()) == 1


@pytest.mark.parametrize(("present", "file"), [(False, "600"), (True, "644")])
def test_what_cannot_be_had_is_named_before_anything_is_made(keeping: Stub, present: bool, file: str) -> None:
    (keeping.root / "key").chmod(int(file, 8))
    env = {k: v for k, v in keeping.env.items() if present or k != "HF_TOKEN"}
    done = keeping.speechctl("launch", "stub.yaml", env=env)
    assert done.returncode == ExitCode.PREFLIGHT
    assert not keeping.run.root.exists()
    if present:
        assert f"error: the secret DEPLOY: {keeping.root}/key is open to others, with mode 0644" in done.stderr
        assert f"hint: chmod 600 {keeping.root}/key" in done.stderr
    else:
        assert "error: the secret HF_TOKEN: expected in the environment, and it is not there" in done.stderr
        assert "hint: export HF_TOKEN, or" in done.stderr


def test_a_recipe_that_says_a_secret_is_refused(keeping: Stub) -> None:
    env = {**keeping.env, "HF_TOKEN": "canary-in-recipe"}
    done = keeping.speechctl("launch", "stub.yaml", "--set", "name=canary-in-recipe", env=env)
    assert done.returncode == ExitCode.USAGE
    assert "the value of the secret HF_TOKEN" in done.stderr and "canary-in" not in done.stderr
    assert not (keeping.root / "runs").exists()


def test_the_command_is_recorded_without_them(keeping: Stub) -> None:
    """An override that a later one overrides is in no recipe, but it is in the command."""
    keeping.behave("train", "train")
    env = {**keeping.env, "HF_TOKEN": "canary-in-argv"}
    argv = ("launch", "stub.yaml", "--set", "name=canary-in-argv", "--set", "name=stub")
    with keeping.start(*keeping.command, *argv, env=env) as process:
        keeping.wait_for_ranks()
        assert Watch(["canary-in-argv"]).in_files(keeping.run.root) == []
        assert redact.MASK in rundir.read_json(keeping.run.lock)["command"]
        assert f"name={redact.MASK}" in rundir.read_json(keeping.run.provenance)["command"]
        process.terminate()
        process.communicate(timeout=20)


# Where a value comes from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"token", "token"),
        (b"token\n", "token"),
        (b"token\n\n", "token\n"),
        (b"token\r\n", "token"),
        (b"t\xff\xfe!", "t\udcff\udcfe!"),
    ],
)
def test_a_file_is_read_as_it_is_but_for_the_newline_at_its_end(tmp_path: Path, content: bytes, value: str) -> None:
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "file").chmod(0o400)
    assert secret.read({"X": str(tmp_path / "file")}) == {"X": value}


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def file_of(content: bytes, mode: int) -> Any:
    def make(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(mode)

    return make


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(mode=0o700), "is no regular file"),
        (fifo, "is no regular file"),
        (file_of(b"secret", 0o640), "is open to others, with mode 0640"),
        (file_of(b"secret", 0o604), "is open to others, with mode 0604"),
        (file_of(b"", 0o600), "has 0 characters, expected at least 4"),
        (file_of(b"abc\n", 0o600), "has 3 characters, expected at least 4"),
        (file_of(b"a\0bcd", 0o600), "has a NUL"),
        (file_of(b"x" * 2**16, 0o600), "more than 32 KiB"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, make: Any, complaint: str) -> None:
    make(tmp_path / "file")
    with pytest.raises(PreflightError, match=complaint) as caught:
        secret.read({"X": str(tmp_path / "file")})
    assert "X" in caught.value.message and "secret\n" not in caught.value.render()


def test_all_that_is_missing_is_said_at_once() -> None:
    with pytest.raises(PreflightError) as caught:
        secret.read({"A_TOKEN": None, "B": "/no/such", "C": None}, {"C": "fine"})
    assert [line.split(":")[0] for line in caught.value.message.splitlines()] == ["the secret A_TOKEN", "the secret B"]


@pytest.mark.parametrize(
    ("name", "value", "is_one"),
    [
        ("HF_TOKEN", "hf_0123456789", True),
        ("HF_API_KEY", "0123456789", True),
        ("NCCL_PASSWORD", "0123456789", True),
        ("HF_AWS_SECRET_ACCESS_KEY", "0123456789", True),
        ("HF_TOKEN_PATH", "/home/me/.token", False),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1", False),
        ("HF_TOKENIZERS", "whatever it is", False),
        ("https_proxy", "http://proxy:3128", False),
        ("https_proxy", "http://me:pw@proxy:3128", True),
        ("http_proxy", "me:hunter22@proxy:3128", True),  # curl takes that too, and it went to every host in the clear
        ("HTTPS_PROXY", "proxy:3128", False),
        ("NCCL_SOCKET_IFNAME", "=eth0:1@x", False),
        ("ALL_PROXY", "socks5h://token@proxy", True),
        ("HF_ENDPOINT", "https://mirror/path@x?a=b@c", False),
        ("PATH", "/usr/bin:/home/me@work/bin", False),
    ],
)
def test_what_looks_secret_is_taken_for_one(
    name: str, value: str, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secret.implied(name, value) is is_one
    monkeypatch.setenv(name, value)
    assert (name in environment.secrets(Launch())) is is_one
    assert (environment.rank_variables("ssh", 1, "cpu", environment.secrets(Launch())).get(name) == value) is not is_one


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("launch={backend: slurm, nodes: 2, secrets: [HF_TOKEN]}", "HF_TOKEN=/path/of/a/file"),
        ("launch.secrets=[A, B=/x, A=/y]", "secrets names A twice"),
        ("launch.secrets=[A=relative]", "absolute path"),
        ("launch.secrets=['A B']", "expected NAME"),
    ],
)
def test_a_recipe_whose_secrets_cannot_work_is_refused(stub: Stub, override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe_file.load(stub.recipe, [override])
    recipe_file.load(stub.recipe, ["launch={backend: slurm, nodes: 2, secrets: [HF_TOKEN=/x]}"])


def test_refusal_of_a_recipe_finds_other_forms_and_not_parts() -> None:
    with pytest.raises(UsageError, match="the value of the secret A"):
        secret.refuse_in_recipe({"A": "a b&c d"}, "x: https://h/?q=a%20b%26c%20d")
    secret.refuse_in_recipe({"P": "http://me:demo@proxy"}, "name: demo")


# To a node ------------------------------------------------------------------------------------------------------------


def pipe(content: bytes) -> int:
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return read


def test_a_node_reads_its_line_and_not_a_byte_more() -> None:
    values = {"A": "x\ny\udcff", "B": "ü" * 100}
    read, write = os.pipe()
    with open(write, "wb") as stdin:
        secret.send(stdin, {})
        assert not select.select([read], [], [], 0)[0], "nothing is sent where there is nothing"
        secret.send(stdin, values)
        os.write(write, b"end\n")
    assert secret.receive(["B", "A"], read) == values
    assert os.read(read, 100) == b"end\n"
    assert secret.receive([], -1) == {}
    os.close(read)


@pytest.mark.parametrize(
    "line", [b"", b"end\n", b'{"A": "hush"}', b'{"B": "hush"}\n', b'{"A": 5}\n', b"[]\n", b"5\n", b"\xff\n"]
)
def test_what_is_no_such_line_is_refused_and_not_shown(line: bytes) -> None:
    read = pipe(line)
    with pytest.raises(HostError, match="the secrets A") as caught:
        secret.receive(["A"], read)
    assert "hush" not in caught.value.render()
    os.close(read)


def test_a_node_does_not_wait_for_ever() -> None:
    read, write = os.pipe()
    with pytest.raises(HostError, match=r"did not come within 0\.1 s"):
        secret.receive(["A"], read, wait_s=0.1)
    os.close(read)
    os.close(write)


def test_the_longest_values_that_are_taken_fit_into_a_pipe(tmp_path: Path) -> None:
    values = secret.read({"A": None}, {"A": "x" * (secret.MAX_BYTES - 20)})
    read, write = os.pipe()
    os.set_blocking(write, False)
    with open(write, "wb") as stdin:
        secret.send(stdin, values)
    assert secret.receive(["A"], read) == values
    os.close(read)
