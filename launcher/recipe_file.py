"""Reads and writes the recipe file: YAML with positions, overrides, every error at once and each where it is.

What a recipe may say, and its units, are in `recipe.py`.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from launcher.errors import UsageError, printable
from launcher.recipe import Recipe, Section

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_SHOWN = 50

_Where = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""


class RecipeError(UsageError):
    """The recipe cannot be used. `problems` has what is wrong in it, in the order of the file."""

    def __init__(self, message: str, *, hint: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Source:
    """A text that YAML is read from. `order` is 0 for the file; the overrides count from 1."""

    label: str
    text: str
    order: int = 0

    @cached_property
    def lines(self) -> list[str]:
        return _lines(self.text)


@dataclass(frozen=True)
class Spot:
    """`width` characters of one line of a source, all counted from 0. Width 0: the whole source is meant."""

    source: Source
    line: int = 0
    column: int = 0
    width: int = 0

    def heading(self) -> str:
        return self.source.label if self.source.order else f"{self.source.label}:{self.line + 1}:{self.column + 1}"

    def excerpt(self) -> list[str]:
        """The line and the caret under it; nothing for an override, which the heading quotes whole."""
        if self.source.order or not self.width or self.line >= len(self.source.lines):
            return []
        line, number = self.source.lines[self.line], str(self.line + 1)
        cut = max(0, self.column - 60) if len(line) > 120 else 0
        start = self.column - cut
        line = line[cut : cut + 120]
        before, marked = printable(line[:start]), printable(line[start : start + self.width])
        caret = " " * len(before) + "^" * max(1, len(marked))
        return [f"{number:>3} | {printable(line)}", f"{'':>{max(3, len(number))}} | {caret}"]


@dataclass(frozen=True)
class Problem:
    spot: Spot
    key: str
    """Dotted; empty where the text is no YAML."""
    what: str
    hint: str = ""

    def __str__(self) -> str:
        head = f"{self.spot.heading()}: {self.key + ': ' if self.key else ''}{self.what}"
        return "\n".join([head, *self.spot.excerpt(), *([f"    hint: {self.hint}"] if self.hint else [])])


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` after `overrides`, each `a.b=c` with c in YAML.

    Text is taken as it stands: neither `~` nor environment variables are expanded. Raises one RecipeError for all
    that is wrong.
    """
    source = Source(str(path), _read(path))
    tree = _Tree(source)
    try:
        tree.read()
    except _Unreadable as e:
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
    source = getattr(recipe.backbone, "source", None)
    if source is not None and (source.startswith((".", "/")) or os.path.isdir(base / source)):
        update["backbone"] = recipe.backbone.model_copy(update={"source": str(base / source)})
    return recipe.model_copy(update=update)


def dump(recipe: Recipe) -> str:
    """YAML that `load` reads as an equal recipe, with every field in the order of the schema."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel annotates it as None
    yaml.width = 2**20  # one line for one value
    text = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


# YAML to plain values ------------------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """The rest of a source cannot be read."""

    def __init__(self, spot: Spot, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.problem = Problem(spot, "", what, hint)


class _Tree:
    """The values of a source, under `root`, with the place of each. Anchors, tags and duplicate keys become problems
    and reading goes on; after a syntax error it cannot."""

    def __init__(self, source: Source, root: _Where = ()) -> None:
        self.data: Any = None
        self.keys: dict[_Where, Spot] = {}
        self.values: dict[_Where, Spot] = {}
        self.problems: list[Problem] = []
        self.lost: list[_Where] = []
        """Values that could not be taken; what the schema says about them would only confuse."""
        self._source = source
        self._root = root
        self._last = Spot(source)
        self._events: Iterator[Any] = YAML(typ="safe", pure=True, plug_ins=[]).parse(source.text)

    def read(self) -> None:
        try:
            self._document()
        except (YAMLError, ValueError) as e:  # ValueError: "\U00110000", which ruamel hands to chr()
            raise _Unreadable(*_syntax(e, self._source, self._last)) from e

    def override(self, text: str, order: int) -> None:
        """Applies `a.b=c`; makes the sections on the way that are not there."""
        key, equals, value = text.partition("=")
        where = tuple(key.split("."))
        spot = Spot(Source(f"--set {text}", value, order))
        if not equals or not all(where):
            self.problems.append(Problem(spot, "", "expected KEY=VALUE, such as batch.step_seconds=200s"))
            return
        new = _Tree(spot.source, where)
        try:
            if value.strip():
                new.read()
        except _Unreadable as e:
            self.problems += [*new.problems, e.problem]
            return
        section: Any = self.data
        for depth, part in enumerate(where[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
                self.keys[where[:depth]] = self.values[where[:depth]] = spot
            section = section[part]
            if not isinstance(section, dict):
                self.problems.append(Problem(spot, _dotted(where[:depth]), "has a value, and no keys below it"))
                return
        section[where[-1]] = new.data
        self.keys.update({**new.keys, where: spot})
        self.values.update({**new.values, where: spot})
        self.problems += new.problems
        self.lost += new.lost

    def place(self, where: _Where, places: dict[_Where, Spot]) -> Spot:
        """Of `where`, or of the nearest section around it that was written down."""
        while where and where not in places:
            where = where[:-1]
        return places.get(where, Spot(self._source)) if where else Spot(self._source)

    def value(self, where: _Where) -> Any:
        value = self.data
        for part in where:
            value = value[part]
        return value

    def _document(self) -> None:
        self._next()  # the stream starts
        start = self._next()
        if isinstance(start, events.StreamEndEvent):
            raise _Unreadable(Spot(self._source), "there is nothing in it", "a recipe begins with `name: my-run`")
        if getattr(start, "version", None) not in (None, (1, 2)):
            raise _Unreadable(Spot(self._source), "recipes are YAML 1.2", "remove the line that begins with %YAML")
        self.data = self._node(self._next(), self._root, Spot(self._source))
        if not self._root and not isinstance(self.data, dict):
            what = f"expected keys such as `name: my-run`, found {_found(self.data)}"
            raise _Unreadable(self.values[()], what)
        self._next()  # the document ends
        if not isinstance(self._next(), events.StreamEndEvent):
            raise _Unreadable(self._last, "a second document begins here; a recipe is one", "remove the `---`")

    def _next(self) -> Any:
        event = next(self._events)
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 10**6
        left = len("".join(self._source.lines[start.line : start.line + 1]).rstrip()) - start.column
        self._last = Spot(self._source, start.line, start.column, max(1, min(width, left)))
        return event

    def _node(self, event: Any, where: _Where, key: Spot) -> Any:
        block = isinstance(event, events.MappingStartEvent | events.SequenceStartEvent) and not event.flow_style
        empty = isinstance(event, events.ScalarEvent) and event.start_mark.index == event.end_mark.index
        spot = key if key.width and (block or empty) else self._last
        self.values.setdefault(where, spot)
        if len(where) > MAX_DEPTH:
            raise _Unreadable(spot, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, events.AliasEvent):
            self._refuse(where, self._last, "aliases (`*`) and merge keys (`<<`) are not read", "write the value out")
            return None
        if event.tag is not None:
            self._refuse(where, self._last, "tags (`!`) are not read", "write the plain value")
        elif event.anchor is not None:
            problem = Problem(self._last, _dotted(where), "anchors (`&`) are not read", "write the value out each time")
            self.problems.append(problem)
        if isinstance(event, events.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := self._next(), events.SequenceEndEvent):
                items.append(self._node(event, (*where, len(items)), Spot(self._source)))
            return items
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(where)
        if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", event.value):  # `dump` could not write them all
            self._refuse(where, spot, "line breaks and control characters are not read", "write it on one line")
        return _plain(event.value) if event.style is None else event.value

    def _mapping(self, where: _Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := self._next(), events.MappingEndEvent):
            spot = self._last
            if not isinstance(event, events.ScalarEvent) or event.anchor or event.tag:
                raise _Unreadable(spot, "expected a key that is one word, followed by `:`")
            key = (*where, event.value)
            first = self.keys.setdefault(key, spot)
            value = self._node(self._next(), key, spot)
            if event.value in mapping:
                what = f"given twice, on line {first.line + 1} and on line {spot.line + 1}"
                self.problems.append(Problem(spot, _dotted(key), what, "keep one of the two"))
            mapping.setdefault(event.value, value)
        return mapping

    def _refuse(self, where: _Where, spot: Spot, what: str, hint: str) -> None:
        self.lost.append(where)
        self.problems.append(Problem(spot, _dotted(where), what, hint))


def _plain(text: str) -> Any:
    """An unquoted scalar by the core schema of YAML 1.2, with `_` between digits: `no` and `12:00:00` are text, `1e-4`
    is a number. Ours because ruamel's own reads dates too, and fails on some digits."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9](_?[0-9]){0,99}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


def _found(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, str):
        text = " ".join(value.split())
        return f"'{text[:40]}{'…' if len(text) > 40 else ''}'"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a section" if isinstance(value, dict) else repr(value)


_SYNTAX = [
    ("found character '\\t'", "a tab, where YAML takes only spaces", "indent with two spaces"),
    ("found character", "a value cannot begin with this character", "put the value in quotes"),
    ("mapping values are not", "a `:` that cannot be here", "check the indentation, or put the value in quotes"),
    ("could not find expected ':'", "expected `key: value`", "check the line before this one too"),
    ("expected <block end>", "does not continue what is above", "check the indentation here and above"),
]
"""How ruamel begins to say it, how we say it, and a hint."""


def _syntax(error: Exception, source: Source, last: Spot) -> tuple[Spot, str, str]:
    """Where a text stops being YAML, what is wrong there, and a hint."""
    if isinstance(error, ReaderError):
        before = _lines(source.text[: error.position])
        what = f"a character that YAML does not allow, U+{ord(source.text[error.position]):04X}"
        return Spot(source, len(before) - 1, len(before[-1]), 1), what, "remove it"
    if not isinstance(error, MarkedYAMLError):
        return last, "after this comes an escape that names no character", "write it as text, without `\\`"
    problem, start, mark = str(error.problem), error.context_mark, error.problem_mark
    if start and "stream" in problem:
        return Spot(source, start.line, start.column, 1), "what begins here does not end", "close the quote or bracket"
    spot = Spot(source, mark.line, mark.column, 1) if mark else last
    for begin, what, hint in _SYNTAX:
        if problem.startswith(begin):
            return spot, what, hint
    since = f" ({error.context}, which begins on line {start.line + 1})" if start else ""
    return spot, f"{problem}{since}", "check the punctuation here and above"


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


def _explain(invalid: ValidationError, tree: _Tree) -> list[Problem]:
    """One problem for each place; what the members of a union expect there is joined with "or"."""
    groups: dict[tuple[_Where, str], list[ErrorDetails]] = {}
    owners: dict[_Where, type[Section]] = {}
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


def _problem(where: _Where, owner: type[Section], errors: list[ErrorDetails], tree: _Tree) -> Problem:
    name, key, kind = str(where[-1]), _dotted(where), errors[0]["type"]
    if kind == "union_tag_not_found":
        kinds = ", ".join(n for s in _sections(Recipe.model_fields[str(where[0])]) for n in _tags(s))
        return Problem(tree.place(where[:-1], tree.keys), key, "this key is missing", f"one of {kinds}")
    if kind == "missing":
        field = owner.model_fields[name]
        about = re.split(r"(?<=\.)\s", " ".join((field.description or "").split()))[0]
        hint = f"{about} For example `{_example(name, field)}`"
        return Problem(tree.place(where[:-1], tree.keys), key, "this key is missing", hint)
    if kind == "extra_forbidden":
        what = "there is no such key" + (f" in kind '{_tags(owner)[0]}'" if "kind" in owner.model_fields else "")
        near = [near] if (near := _near(name, owner.model_fields)) else _homes(key)
        hint = "" if near else f"the keys here are {', '.join(owner.model_fields)}"
        return Problem(tree.place(where, tree.keys), key, what + _mean(near), hint)
    if kind == "value_error" and not str(errors[0]["ctx"]["error"]).startswith("expected"):
        return Problem(tree.place(where, tree.values), key, str(errors[0]["ctx"]["error"]))
    value = tree.value(where)
    expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
    what = f"expected {expected}, found {_found(value)}"
    hint = ""
    if isinstance(value, str) and kind == "bool_type" and value.lower() in _TRUTH:
        what += f"; did you mean {_TRUTH[value.lower()]}?"
    elif isinstance(value, str) and isinstance(_plain(value), bool | int | float):
        hint = f"write {value} without quotes"
    elif isinstance(value, str) and kind in ("literal_error", "union_tag_invalid"):
        what += _mean([_near(value, re.findall(r"'([^']+)'", expected))])
    return Problem(tree.place(where, tree.values), key, what, hint)


def _expected(error: ErrorDetails) -> str:
    context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    if error["type"] == "value_error":
        return str(context["error"]).removeprefix("expected ")
    return _EXPECTED[error["type"]].format(**context) if error["type"] in _EXPECTED else error["msg"]


def _locate(loc: tuple[str | int, ...]) -> tuple[_Where, type[Section]]:
    """Where pydantic's location is in the file, and the section that has the last key. Pydantic also names the member
    of a union that it tried (`backbone.tiny-ctc.hidden`), which the file does not."""
    where: _Where = ()
    owner: type[Section] = Recipe
    inside: list[type[Section]] = [Recipe]
    for part in loc:
        if len(inside) > 1:
            inside = [section for section in inside if part in _tags(section)]
        elif inside:
            owner, where = inside[0], (*where, part)
            inside = _sections(owner.model_fields.get(str(part)))
        elif isinstance(part, int):
            where = (*where, part)
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
    check = "give the path of a recipe, such as recipes/tiny-cpu.yaml"
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
        before = _lines(raw[: e.start].decode("utf-8", errors="replace"))
        spot = Spot(Source(str(path), raw.decode("utf-8", "replace")), len(before) - 1, len(before[-1]), 1)
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


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)


def _dotted(where: _Where) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
