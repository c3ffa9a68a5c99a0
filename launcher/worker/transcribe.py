"""The verb `transcribe`: sound files and folders in, what a model hears in them out, as lines or as files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from launcher import rundir, sealing
from launcher.errors import DataError, UsageError, printable
from launcher.worker import captions, sound
from launcher.worker.captions import Transcript


def transcribe(options: argparse.Namespace) -> int:
    """Each file by itself: one that cannot be read is named, and the others follow.

    Raises:
        UsageError: a path is not there, or two files would be written to one place.
        DataError: at the end, where at least one file could not be read; or the model is no sound export.
    """
    files = sound.find(options.files)
    formats = list(dict.fromkeys(options.format or ["txt"]))
    places = check(files, formats, options.output)
    if options.model.is_dir() and (options.model / "speechctl.json").is_file():
        sealing.verify(options.model)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # of libraries: stdout is for what was heard
        from launcher.worker.models import load_export
        from launcher.worker.ranks import Ranks
        from launcher.worker.recognize import recognize

        device = Ranks().device
        model = load_export(options.model).to(device)
        problems: list[DataError] = []
        for file, place in zip(files, places, strict=True):
            try:
                waveform = sound.read(file.path)
            except DataError as problem:
                problems.append(problem)
                if len(files) > 1:
                    print(problem.message, file=sys.stderr, flush=True)
                continue
            heard = recognize(model, waveform, device, file=str(file.path), timed=formats != ["txt"])
            try:
                publish(heard, formats, place, answers)
            except BrokenPipeError:  # such as `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return 0
    if problems and len(files) == 1:
        raise problems[0]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(files)} files were not transcribed; each is named above",
            hint="convert them to FLAC or WAV, or leave them out; what was heard in the others is there",
        )
    return 0


def check(files: list[sound.Found], formats: list[str], output: Path | None) -> list[Path | None]:
    """Where results of each file go, without an ending; None: to stdout.

    Raises:
        UsageError: stdout cannot take what is asked for, or two files would go to one place.
    """
    if output is None:
        if len(formats) > 1 or (formats == ["srt"] and len(files) > 1):
            raise UsageError(
                "more than one result does not go to stdout" if len(formats) > 1 else "SRT of several files is several",
                hint="--output DIR writes a file for each",
            )
        return [None] * len(files)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file", hint="name a directory, or one to be made")
    places = [output / file.name.with_suffix("") for file in files]
    for place, count in Counter(places).items():
        if count > 1:
            both = [str(f.path) for f, p in zip(files, places, strict=True) if p == place]
            raise UsageError(
                f"{' and '.join(both[:2])} would both be written to {place}.{formats[0]}",
                hint="transcribe them into two directories",
            )
    return [*places]


def publish(heard: Transcript, formats: list[str], place: Path | None, answers: TextIO) -> None:
    """To stdout a line, or SRT as it is; else a file of each format, whole or not there, and its path to stdout."""
    if place is None:
        if formats == ["txt"]:
            # A tab, for `cut -f2`.
            print(f"{printable(heard.file)}\t{printable(heard.text)}", file=answers, flush=True)
        elif formats == ["json"]:
            print(json.dumps(asdict(heard)), file=answers, flush=True)
        else:
            print(captions.srt(heard), end="", file=answers, flush=True)
        return
    for ending in formats:
        target = place.with_name(f"{place.name}.{ending}")
        with rundir.storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            rundir.write_bytes(target, captions.FORMATS[ending](heard).encode())
        print(printable(str(target)), file=answers, flush=True)
