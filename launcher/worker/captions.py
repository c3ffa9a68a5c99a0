"""What was heard and when, and how it is written: TXT, JSON, SRT. Needs no torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

PAUSE_S = 0.8
"""A silence of this length between two words ends a segment."""
LONGEST_S, LINE, LINES = 7.0, 42, 2
"""A subtitle's usual limits: seven seconds, two lines of 42 characters (Netflix, Timed Text Style Guide: English)."""


@dataclass(frozen=True)
class Word:
    word: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Segment:
    text: str
    start_s: float
    end_s: float
    words: list[Word] = field(default_factory=list)
    """Empty where the model does not say when a single word was."""


@dataclass(frozen=True)
class Transcript:
    """Of one file."""

    file: str
    text: str
    duration_s: float
    segments: list[Segment]
    """In order; they do not overlap. Empty where nobody asked for times."""


def segmented(words: Sequence[Word]) -> list[Segment]:
    """Words in segments: one ends at a pause, or before it would be longer than a subtitle should be."""
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1] if groups else []
        characters = sum(len(w.word) + 1 for w in last) + len(word.word)
        if (
            last
            and word.start_s - last[-1].end_s < PAUSE_S
            and word.end_s - last[0].start_s <= LONGEST_S
            and characters <= LINE * LINES
        ):
            last.append(word)
        else:
            groups.append([word])
    return [Segment(" ".join(w.word for w in g), g[0].start_s, g[-1].end_s, g) for g in groups]


def txt(heard: Transcript) -> str:
    return heard.text + "\n"


def as_json(heard: Transcript) -> str:
    return json.dumps(asdict(heard), indent=1) + "\n"


def srt(heard: Transcript) -> str:
    """SubRip: number, times, text, an empty line."""
    cues = []
    for number, segment in enumerate(heard.segments, start=1):
        lines = textwrap.wrap(segment.text, LINE, break_long_words=False) or [""]
        cues.append("\n".join([str(number), f"{clock(segment.start_s)} --> {clock(segment.end_s)}", *lines, ""]))
    return "\n".join(cues)


def clock(seconds: float) -> str:
    """01:02:03,456"""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{milliseconds:03d}"


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": txt, "json": as_json, "srt": srt}
"""By the ending of the file."""
