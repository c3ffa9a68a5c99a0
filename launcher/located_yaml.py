"""Located YAML: a text as plain values, with the place of each, so that a complaint can point at what it means.

Knows the recipe only as the example in its messages; what a recipe may say is in `recipe.py`, and `recipe_file.py`
holds the values against that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from launcher.errors import printable

MAX_DEPTH = 20

Where = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""


@dataclass(frozen=True)
class Source:
    """A text that YAML is read from. `order` is 0 for the file; the overrides count from 1."""

    label: str
    text: str
    order: int = 0

    @cached_property
    def lines(self) -> list[str]:
        return _lines(self.text)

    def after(self, before: str) -> Spot:
        """The character that follows `before`, which is how the text begins."""
        lines = _lines(before)
        return Spot(self, len(lines) - 1, len(lines[-1]), 1)


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


class Unreadable(Exception):
    """The rest of a source cannot be read."""

    def __init__(self, spot: Spot, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.problem = Problem(spot, "", what, hint)


class Tree:
    """The values of a source, under `root`, with the place of each. Anchors, tags and duplicate keys become problems
    and reading goes on; after a syntax error it cannot."""

    def __init__(self, source: Source, root: Where = ()) -> None:
        self.data: Any = None
        self.keys: dict[Where, Spot] = {}
        self.values: dict[Where, Spot] = {}
        self.problems: list[Problem] = []
        self.lost: list[Where] = []
        """Values that could not be taken; what the schema says about them would only confuse."""
        self._source = source
        self._root = root
        self._last = Spot(source)
        self._events: Iterator[Any] = YAML(typ="safe", pure=True, plug_ins=[]).parse(source.text)

    def read(self) -> None:
        try:
            self._document()
        except (YAMLError, ValueError) as e:  # ValueError: "\U00110000", which ruamel hands to chr()
            raise Unreadable(*_syntax(e, self._source, self._last)) from e

    def override(self, text: str, order: int) -> None:
        """Applies `a.b=c`; makes the sections on the way that are not there."""
        key, equals, value = text.partition("=")
        where = tuple(key.split("."))
        spot = Spot(Source(f"--set {text}", value, order))
        if not equals or not all(where):
            self.problems.append(Problem(spot, "", "expected KEY=VALUE, such as batch.step_seconds=200s"))
            return
        new = Tree(spot.source, where)
        try:
            if value.strip():
                new.read()
        except Unreadable as e:
            self.problems += [*new.problems, e.problem]
            return
        section: Any = self.data
        for depth, part in enumerate(where[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
                self.keys[where[:depth]] = self.values[where[:depth]] = spot
            section = section[part]
            if not isinstance(section, dict):
                self.problems.append(Problem(spot, dotted(where[:depth]), "has a value, and no keys below it"))
                return
        section[where[-1]] = new.data
        self.keys.update({**new.keys, where: spot})
        self.values.update({**new.values, where: spot})
        self.problems += new.problems
        self.lost += new.lost

    def place(self, where: Where, places: dict[Where, Spot]) -> Spot:
        """Of `where`, or of the nearest section around it that was written down."""
        while where and where not in places:
            where = where[:-1]
        return places.get(where, Spot(self._source)) if where else Spot(self._source)

    def value(self, where: Where) -> Any:
        value = self.data
        for part in where:
            value = value[part]
        return value

    def _document(self) -> None:
        self._next()  # the stream starts
        start = self._next()
        if isinstance(start, events.StreamEndEvent):
            raise Unreadable(Spot(self._source), "there is nothing in it", "a recipe begins with `name: my-run`")
        if getattr(start, "version", None) not in (None, (1, 2)):
            raise Unreadable(Spot(self._source), "recipes are YAML 1.2", "remove the line that begins with %YAML")
        self.data = self._node(self._next(), self._root, Spot(self._source))
        if not self._root and not isinstance(self.data, dict):
            what = f"expected keys such as `name: my-run`, found {found(self.data)}"
            raise Unreadable(self.values[()], what)
        self._next()  # the document ends
        if not isinstance(self._next(), events.StreamEndEvent):
            raise Unreadable(self._last, "a second document begins here; a recipe is one", "remove the `---`")

    def _next(self) -> Any:
        event = next(self._events)
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 10**6
        left = len("".join(self._source.lines[start.line : start.line + 1]).rstrip()) - start.column
        self._last = Spot(self._source, start.line, start.column, max(1, min(width, left)))
        return event

    def _node(self, event: Any, where: Where, key: Spot) -> Any:
        block = isinstance(event, events.MappingStartEvent | events.SequenceStartEvent) and not event.flow_style
        empty = isinstance(event, events.ScalarEvent) and event.start_mark.index == event.end_mark.index
        spot = key if key.width and (block or empty) else self._last
        self.values.setdefault(where, spot)
        if len(where) > MAX_DEPTH:
            raise Unreadable(spot, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, events.AliasEvent):
            self._refuse(where, self._last, "aliases (`*`) and merge keys (`<<`) are not read", "write the value out")
            return None
        if event.tag is not None:
            self._refuse(where, self._last, "tags (`!`) are not read", "write the plain value")
        elif event.anchor is not None:
            problem = Problem(self._last, dotted(where), "anchors (`&`) are not read", "write the value out each time")
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
        return plain(event.value) if event.style is None else event.value

    def _mapping(self, where: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := self._next(), events.MappingEndEvent):
            spot = self._last
            if not isinstance(event, events.ScalarEvent) or event.anchor or event.tag:
                raise Unreadable(spot, "expected a key that is one word, followed by `:`")
            key = (*where, event.value)
            first = self.keys.setdefault(key, spot)
            value = self._node(self._next(), key, spot)
            if event.value in mapping:
                what = f"given twice, on line {first.line + 1} and on line {spot.line + 1}"
                self.problems.append(Problem(spot, dotted(key), what, "keep one of the two"))
            mapping.setdefault(event.value, value)
        return mapping

    def _refuse(self, where: Where, spot: Spot, what: str, hint: str) -> None:
        self.lost.append(where)
        self.problems.append(Problem(spot, dotted(where), what, hint))


def plain(text: str) -> Any:
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


def found(value: Any) -> str:
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
        what = f"a character that YAML does not allow, U+{ord(source.text[error.position]):04X}"
        return source.after(source.text[: error.position]), what, "remove it"
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


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)


def dotted(where: Where) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
