"""Who may import whom: the only statement of it.

Read from the syntax tree, so that an import inside a function, under TYPE_CHECKING or through `import_module` counts
like any other.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launcher.node import NODE_SCRIPT, WORKER

ROOT = Path(__file__).parent.parent

ORDER = (
    "errors",
    "marks",
    "memory",
    "located_yaml",
    "nodelist",
    "bundle_cache",
    "recipe_values",
    "recipe_backbone",
    "recipe_feed",
    "recipe_launch",
    "recipe_optimization",
    "recipe",
    "recipe_file",
    "redact",
    "secret",
    "rundir",
    "sealing",
    "lock",
    "lines",
    "shard_folder",
    "staging",
    "sealed",
    "retention",
    "committer",
    "facts",
    "ownership",
    "hosts",
    "environment",
    "backends.local",
    "backends.ssh",
    "backends.slurm",
    "backends",
    "plan",
    "cadence",
    "measured",
    "new_run",
    "reshape",
    "report",
    "evaluations",
    "audit",
    "checkpoints",
    "logs",
    "why",
    "vitals",
    "node",
    "account",
    "verbs",
    "failure",
    "cause",
    "recovery",
    "hang",
    "events",
    "supervise",
    "jobs",
    "probe",
    "probe.machine",
    "probe.facts",
    "probe.answers",
    "prepare",
    "prepare.session",
    "prepare.findings",
    "prepare.checks",
    "prepare.of_a_host",
    "prepare.between_hosts",
    "prepare.judge",
    "prepare.look",
    "prepare.mend",
    "prepare.allocation",
    "prepare.new_hostfile",
    "prepare.run",
    "ui",
    "tables",
    "views",
    "follow",
    "start",
    "trials",
    "fit",
    "cli.arguments",
    "cli.before",
    "cli.runs",
    "cli.results",
    "cli.checkpoint",
    "cli",
    "cli.__main__",
)
"""The control side. A module imports only modules that stand before it."""

CONTRACT = {
    *(
        "bundle_cache",
        "committer",
        "errors",
        "lines",
        "marks",
        "recipe",
        "recipe_backbone",
        "recipe_file",
        "recipe_launch",
        "recipe_optimization",
        "redact",
        "retention",
        "rundir",
        "sealed",
        "sealing",
        "shard_folder",
        "staging",
    )
}
"""All of the control side that the worker knows. Both sides write logs, and neither may write a secret there."""

ONLY_IN = {"typer": "cli", "rich": "ui"}
"""A library, and the one module or package that uses it."""

ONLY_IN_WORKER = {
    "accelerate",
    "deepspeed",
    "jiwer",
    "safetensors",
    "sentencepiece",
    "soundfile",
    "streaming",
    "torch",
    "torchaudio",
    "transformers",
}


def sources() -> dict[str, str]:
    """Every module of the package by its name below `launcher`; the package itself is ``."""
    found = {}
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        parts = path.relative_to(ROOT / "launcher").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(source: str) -> Iterator[str]:
    """Full names of what `source` imports, wherever in it. Of `from a import b` both `a` and `a.b`, which may be one.

    Relative imports are refused: the code has none, and they would have to be resolved.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def ours(source: str, known: Mapping[str, str]) -> set[str]:
    """Modules of this package that `source` imports."""
    names = {name.removeprefix("launcher.") for name in imports(source) if name.startswith("launcher.")}
    return {name for name in names if name in known}


def violations(modules: Mapping[str, str]) -> list[str]:
    """Every broken rule, a line each."""
    broken = []
    for name, source in modules.items():
        in_worker = name == "worker" or name.startswith("worker.")
        libraries = {found.partition(".")[0] for found in imports(source)}
        for library, home in ONLY_IN.items():
            if library in libraries and name.partition(".")[0] != home:
                broken.append(f"{name} imports {library}, which only {home} may")
        if not in_worker:
            broken += [f"{name} imports {x}, which only the worker may" for x in sorted(libraries & ONLY_IN_WORKER)]
        below = ours(source, modules) - {name}
        if in_worker:
            control = {other for other in below if other != "worker" and not other.startswith("worker.")}
            broken += [f"{name} imports {other} of the control side" for other in sorted(control - CONTRACT)]
        elif name:
            broken += [f"{name} imports {other}" for other in sorted(below) if not comes_before(other, name)]
        if name.startswith("probe"):
            foreign = sorted(libraries - sys.stdlib_module_names - {"launcher"})
            broken += [f"{name} imports {x}, which a bare host has not" for x in foreign]
            outside = sorted(other for other in below if not other.startswith("probe"))
            broken += [f"{name} imports {other}, which is not sent to a host" for other in outside]
        if source and not ast.get_docstring(ast.parse(source)):
            broken.append(f"{name} has no docstring")
    if found := cycle(modules):
        broken.append(f"import cycle: {' -> '.join(found)}")
    return broken


def comes_before(other: str, name: str) -> bool:
    return other in ORDER and name in ORDER and ORDER.index(other) < ORDER.index(name)


def cycle(modules: Mapping[str, str]) -> list[str]:
    """The first import cycle, if there is any."""
    edges = {name: sorted(ours(source, modules) - {name}) for name, source in modules.items()}
    done: set[str] = set()

    def search(path: list[str]) -> list[str] | None:
        for other in edges[path[-1]]:
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (found := search([*path, other])):
                return found
        done.add(path[-1])
        return None

    return next((found for name in edges if name not in done and (found := search([name]))), [])


def test_imports_point_one_way() -> None:
    modules = sources()
    assert violations(modules) == []
    control = {name for name in modules if name and not name.startswith("worker")}
    assert control == set(ORDER), "a module was added or removed: give it its place in ORDER"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("plan", "import typer", "plan imports typer, which only cli may"),
        ("report", "def f():\n from rich.text import Text", "report imports rich, which only ui may"),
        ("worker.train", "from rich import print", "worker.train imports rich, which only ui may"),
        (
            "supervise",
            "def f():\n  if 1:\n    import torch.distributed",
            "supervise imports torch, which only the worker",
        ),
        (
            "node",
            "import importlib\nimportlib.import_module('deepspeed')",
            "node imports deepspeed, which only the worker",
        ),
        ("cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import jiwer", "cli imports jiwer, which only"),
        ("supervise", "from launcher.worker import train", "supervise imports worker"),
        ("cli", "def f():\n import launcher.worker.train", "cli imports worker.train"),
        ("rundir", "from launcher import plan", "rundir imports plan"),
        ("hosts", "from launcher.plan import Plan", "hosts imports plan"),
        ("worker.train", "from launcher import supervise", "worker.train imports supervise of the control side"),
        ("worker.train", "from launcher.worker import train2", "import cycle: worker.train2 -> worker.train -> worker"),
        ("hosts", "x = 1", "hosts has no docstring"),
        ("probe.facts", "import psutil", "probe.facts imports psutil, which a bare host has not"),
        ("probe.facts", "from launcher.hosts import Host", "probe.facts imports hosts, which is not sent"),
    ],
)
def test_each_rule_can_fail(name: str, source: str, complaint: str) -> None:
    modules = dict.fromkeys((*ORDER, "worker", "worker.train2"), "")
    modules["worker.train2"] = '"""."""\nfrom launcher.worker import train'
    modules["worker.train"] = ""
    assert violations(modules) == []
    modules[name] = source if "docstring" in complaint else f'"""."""\n{source}'
    assert any(complaint in line for line in violations(modules)), violations(modules)


def test_the_worker_is_named_once_and_only_as_a_string() -> None:
    assert WORKER == "launcher.worker"
    places = [
        (name, node.value)
        for name, source in sources().items()
        if name in ORDER
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "launcher.worker" in node.value
    ]
    told = [(name, text) for name, text in places if "\n" not in text and text == WORKER]
    assert told == [("node", WORKER)]
    assert WORKER not in NODE_SCRIPT


def test_the_probe_is_python_3_8() -> None:
    for name, source in sources().items():
        if name.startswith("probe"):
            ast.parse(source, feature_version=(3, 8))


HEAVY = {"torch", "deepspeed", "transformers", "streaming", "numpy", "accelerate"}


def test_the_command_line_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, launcher.cli; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    assert loaded & (HEAVY | {"pydantic"}) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["launch", "--help"], ["status", "no-such-run"]])
def test_a_light_command_starts_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in loaded
    assert loaded & HEAVY == set()
