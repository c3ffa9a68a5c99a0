"""Reads and writes the recipe file: a recipe with its overrides, or every error at once and each where it is.

What a recipe may say, and its units, are in `recipe.py`; the text becomes values with places in `located_yaml.py`.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from launcher.errors import UsageError
from launcher.located_yaml import Problem, Source, Tree, Unreadable, Where, dotted, found, plain
from launcher.recipe import Recipe
from launcher.recipe_values import Section

MAX_BYTES = 2**20
MAX_SHOWN = 50


class RecipeError(UsageError):
    """The recipe cannot be used. `problems` has what is wrong in it, in the order of the file."""

    def __init__(self, message: str, *, hint: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` after `overrides`, each `a.b=c` with c in YAML.

    Text is taken as it stands: neither `~` nor environment variables are expanded. Raises one RecipeError for all
    that is wrong.
    """
    source = Source(str(path), _read(path))
    tree = Tree(source)
    try:
        tree.read()
    except Unreadable as e:
        raise _error(path, [*tree.problems, e.problem]) from e
    for order, override in enumerate(overrides, start=1):
        tree.override(override, order)
    try:
        recipe = Recipe.model_validate(tree.data)
    except ValidationError as e:
        raise _error(path, [*tree.problems, *_explain(e, tree)]) from e
    if tree.problems:
        raise _error(path, tree.problems)
    return recipe


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """`recipe` with every path made absolute against `base`, `run_dir` filled in. Looks on the disk for one thing:
    whether `backbone.source` names a directory rather than a hub id."""
    base = base.absolute()
    data = {"corpus": base / recipe.data.corpus, "packs": base / recipe.data.packs}
    update: dict[str, Any] = {"run_dir": base / recipe.run_path, "data": recipe.data.model_copy(update=data)}
    if recipe.feed.cache is not None:
        update["feed"] = recipe.feed.model_copy(update={"cache": base / recipe.feed.cache})
    if recipe.launch.hostfile is not None:
        update["launch"] = recipe.launch.model_copy(update={"hostfile": base / recipe.launch.hostfile})
    source = getattr(recipe.backbone, "source", None)
    if source is not None and (source.startswith((".", "/")) or os.path.isdir(base / source)):
        update["backbone"] = recipe.backbone.model_copy(update={"source": str(base / source)})
    return recipe.model_copy(update=update)


@contextmanager
def resolved(path: Path, overrides: Sequence[str]) -> Iterator[tuple[Recipe, Path]]:
    """The recipe in `path` with overrides applied and paths made absolute, and a file that says so for the worker."""
    value = absolute(load(path, overrides), Path.cwd())
    with tempfile.TemporaryDirectory(prefix="speechctl-") as folder:
        file = Path(folder) / "resolved.yaml"
        file.write_text(dump(value))
        yield value, file


def dump(recipe: Recipe) -> str:
    """YAML that `load` reads as an equal recipe, with every field in the order of the schema."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel annotates it as None
    yaml.width = 2**20  # one line for one value
    text = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


# The schema's errors in words ----------------------------------------------------------------------------------------

_NAME = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"
_EXPECTED = {
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text",
    "string_pattern_mismatch": _NAME,
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "model_type": "a section with keys below it",
    "model_attributes_type": "a section with keys below it",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
}
_TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _explain(invalid: ValidationError, tree: Tree) -> list[Problem]:
    """One problem for each place; what the members of a union expect there is joined with "or"."""
    groups: dict[tuple[Where, str], list[ErrorDetails]] = {}
    owners: dict[Where, type[Section]] = {}
    for error in invalid.errors(include_url=False):
        where, owner = _locate(error["loc"])
        if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
            where = (*where, "kind")
        if not any(where[: len(lost)] == lost for lost in tree.lost):
            kind = error["type"] if error["type"] in ("missing", "extra_forbidden", "union_tag_not_found") else ""
            groups.setdefault((where, kind), []).append(error)
            owners[where] = owner
    for where, kind in list(groups):  # a misspelt key is not also a missing one
        if kind == "extra_forbidden" and (near := _near(str(where[-1]), owners[where].model_fields)):
            groups.pop(((*where[:-1], near), "missing"), None)
    return [_problem(where, owners[where], errors, tree) for (where, _), errors in groups.items()]


def _problem(where: Where, owner: type[Section], errors: list[ErrorDetails], tree: Tree) -> Problem:
    name, key, kind = str(where[-1]), dotted(where), errors[0]["type"]
    if kind == "union_tag_not_found":
        kinds = ", ".join(n for s in _sections(Recipe.model_fields[str(where[0])]) for n in _tags(s))
        return Problem(tree.place(where[:-1], tree.keys), key, "this key is missing", f"one of {kinds}")
    if kind == "missing":
        field = owner.model_fields[name]
        about = re.split(r"(?<=\.)\s", " ".join((field.description or "").split()))[0]
        hint = f"{about} For example `{_example(name, field)}`"
        return Problem(tree.place(where[:-1], tree.keys), key, "this key is missing", hint)
    if kind == "extra_forbidden":
        tags = _tags(owner) if "kind" in owner.model_fields else ()
        what = "there is no such key" + (f" in kind '{tags[0]}'" if len(tags) == 1 else "")
        near = [near] if (near := _near(name, owner.model_fields)) else _homes(key)
        hint = "" if near else f"the keys here are {', '.join(owner.model_fields)}"
        return Problem(tree.place(where, tree.keys), key, what + _mean(near), hint)
    if kind == "value_error" and not str(errors[0]["ctx"]["error"]).startswith("expected"):
        return Problem(tree.place(where, tree.values), key, str(errors[0]["ctx"]["error"]))
    value = tree.value(where)
    expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
    what = f"expected {expected}, found {found(value)}"
    hint = ""
    if isinstance(value, str) and kind == "bool_type" and value.lower() in _TRUTH:
        what += f"; did you mean {_TRUTH[value.lower()]}?"
    elif isinstance(value, str) and isinstance(plain(value), bool | int | float):
        hint = f"write {value} without quotes"
    elif isinstance(value, str) and kind in ("literal_error", "union_tag_invalid"):
        what += _mean([_near(value, re.findall(r"'([^']+)'", expected))])
    return Problem(tree.place(where, tree.values), key, what, hint)


def _expected(error: ErrorDetails) -> str:
    context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    if error["type"] == "value_error":
        return str(context["error"]).removeprefix("expected ")
    return _EXPECTED[error["type"]].format(**context) if error["type"] in _EXPECTED else error["msg"]


def _locate(loc: tuple[str | int, ...]) -> tuple[Where, type[Section]]:
    """Where pydantic's location is in the file, and the section that has the last key. Pydantic also names the member
    of a union that it tried (`backbone.tiny-ctc.hidden`), which the file does not."""
    where: Where = ()
    owner: type[Section] = Recipe
    inside: list[type[Section]] = [Recipe]
    is_mapping = False
    for part in loc:
        if len(inside) > 1:
            inside = [section for section in inside if part in _tags(section)]
        elif isinstance(part, int) or is_mapping:  # of a list, of sections too; of a mapping, whose keys are anything
            where, is_mapping = (*where, part), False
        elif inside:
            owner, where = inside[0], (*where, part)
            field = owner.model_fields.get(str(part))
            inside, is_mapping = _sections(field), field is not None and get_origin(field.annotation) is dict
    return where, inside[0] if inside and len(loc) > len(where) else owner


def _sections(field: FieldInfo | None) -> list[type[Section]]:
    """The sections that a field may hold: none for a plain value, several for a union by `kind`."""
    types = (get_args(field.annotation) or (field.annotation,)) if field else ()
    return [t for t in types if isinstance(t, type) and issubclass(t, Section)]


def _tags(section: type[Section]) -> tuple[str, ...]:
    return get_args(section.model_fields["kind"].annotation)


def _example(name: str, field: FieldInfo) -> str:
    """A line that could be in a recipe; for a section, with the keys that it needs."""
    if sections := _sections(field):
        needed = [_example(n, f) for n, f in sections[0].model_fields.items() if f.is_required()]
        return f"{name}: {{{', '.join(needed)}}}"
    return f"{name}: {(field.examples or get_args(field.annotation))[0]}"


def _homes(key: str) -> list[str]:
    """Where a key is known that was written into the wrong section."""
    name = key.rsplit(".", 1)[-1]
    sections = [(n, s) for n, f in Recipe.model_fields.items() for s in _sections(f)]
    known = [*Recipe.model_fields, *(f"{n}.{field}" for n, s in sections for field in s.model_fields)]
    return [k for k in dict.fromkeys(known) if k != key and k.rsplit(".", 1)[-1] == name]


def _mean(words: Iterable[str]) -> str:
    text = " or ".join(f"'{word}'" for word in words if word)
    return f"; did you mean {text}?" if text else ""


def _near(word: str, words: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word.lower(), words, n=1)), "")


# Text and files ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    check = "give the path of a recipe, such as recipes/demo.yaml"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as e:
        raise RecipeError(f"{path}: there is no such file", hint=_neighbours(path)) from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise RecipeError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}", hint=check) from e
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, which no recipe is", hint=check)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        source = Source(str(path), raw.decode("utf-8", "replace"))
        spot = source.after(raw[: e.start].decode("utf-8", "replace"))
        what = f"expected UTF-8, found the byte 0x{raw[e.start]:02x}"
        raise _error(path, [Problem(spot, "", what, "save the file as UTF-8")]) from e


def _neighbours(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.yaml"))
    if not names:
        return f"there is no recipe in {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"did you mean {path.parent / near[0]}?" if near else f"{path.parent} has {', '.join(names[:10])}"


def _error(path: Path, problems: list[Problem]) -> RecipeError:
    problems = sorted(problems, key=lambda p: (p.spot.source.order, p.spot.line, p.spot.column))
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    title = f"{path} has {count}" if not problems[0].spot.source.order else f"{path} with its overrides has {count}"
    more = [f"… and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    text = "\n".join([title, "", *map(str, problems[:MAX_SHOWN]), *more])
    hint = f"mend the recipe, then `speechctl recipe check {shlex.quote(str(path))}`"
    text = text.encode("utf-8", "backslashreplace").decode()  # names on the command line need not be UTF-8
    return RecipeError(text, hint=hint, problems=problems)
