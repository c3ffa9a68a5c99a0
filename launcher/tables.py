"""What evaluations look like, in lines: the tables that reviewers know, and the worst utterances word by word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher import ui
from launcher.evaluations import deciding

COLUMNS = ("Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err", "CER")
"""NIST sclite's, which most papers and toolkits print: counts of sentences and words, then percentages."""

GROUPS = {"subsets": "", "sexes": "sex ", "durations": "", "speakers": "speaker "}
"""What a result may be divided by, and what is said before each name."""

WEIGHTS = {"ema": "moving average of the weights", "average": "average of checkpoints"}
"""What is said of weights that are not those that were trained."""

MANY = 12
"""More speakers than this are not all listed: those with most errors are."""


def evaluation(result: Mapping[str, Any]) -> None:
    """One evaluation, all of it."""
    step, criterion = result["step"], result.get("criterion") or {}
    decides = f"; {criterion['subset']} decides" if criterion.get("subset") else ""
    said = [f"normalizer {result.get('normalizer', 'unknown')}", result.get("decoder", "greedy"), result.get("mode")]
    said.append(WEIGHTS.get(result.get("weights", "")))
    ui.answer(f"step {step}: WER {result['wer']:.2%}  ({', '.join(x for x in said if x)}{decides})")
    ui.answer("")
    rows = [("all", result)]
    rows += [(f"{word}{name}", row) for by, word in GROUPS.items() for name, row in _shown(by, result.get(by) or {})]
    table(rows)
    speakers = result.get("speakers") or {}
    if len(speakers) > MANY:
        ui.answer(f"({MANY} of {len(speakers)} speakers, those with the highest WER; --json has all)")
    for row in result.get("worst", ()):
        ui.answer("")
        aligned(row)
    ui.answer("")
    facts = [f"training waited {result['blocked_s']:.1f} s"] if "blocked_s" in result else []
    facts += [f"padding {result['padding']:.1%}"] if "padding" in result else []
    facts += [f"only the first 30 s were heard of {ui.counted(result['truncated'], 'utterance')}"] * bool(
        result.get("truncated")
    )
    if interval := result.get("interval"):
        facts.append(
            f"interval: {interval['level']:.0%} of {interval['resamples']} draws of {interval['speakers']} speakers"
        )
    ui.answer("; ".join(facts))


def _shown(by: str, rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if by != "speakers" or len(rows) <= MANY:
        return list(rows.items())
    return sorted(rows.items(), key=lambda item: -item[1]["wer"])[:MANY]


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A line for each group: counts, then percentages of its words, and of its sentences (S.Err)."""
    width = max(len(name) for name, _ in rows) + 2
    ui.answer(f"{'':<{width}}{''.join(f'{c:>8}' for c in COLUMNS)}  95% interval of Err")
    for name, row in rows:
        words, sentences = row["words"], row["utterances"]
        shares = [row.get(k) for k in ("correct", "substitutions", "deletions", "insertions", "errors")]
        cells = [str(sentences), str(words), *(_share(count, words) for count in shares)]
        cells += [_share(row.get("wrong_utterances"), sentences), _percent(row.get("cer"))]
        interval = row.get("interval")
        about = f"  {100 * interval['low']:.2f} - {100 * interval['high']:.2f}" if interval else ""
        ui.answer(f"{name:<{width}}{''.join(f'{c:>8}' for c in cells)}{about}")


def _share(part: float | None, whole: float) -> str:
    return "-" if part is None or not whole else _percent(part / whole)


def _percent(share: float | None) -> str:
    return "-" if share is None or share != share else f"{100 * share:.2f}"


def aligned(row: Mapping[str, Any], width: int = 100) -> None:
    """What was said and heard, word under word; stars where one side has none, and under it what the error is."""
    of = f"{ui.counted(row['errors'], 'error')} in {ui.counted(row['words'], 'word')}"
    ui.answer(f"{row['utt_id']} ({row['subset']}, speaker {row['speaker']}, {row['seconds']:.1f} s): {of}")
    lines = [["said   ", "heard  ", "       "]]
    for kind, said, heard in row["aligned"]:
        cell = max(len(said), len(heard), 1)
        words = [said or "*" * cell, heard or "*" * cell, "" if kind == "=" else kind]
        if len(lines[-1][0]) + cell > width:
            lines.append(["       "] * 3)
        lines[-1] = [line + f"{word:<{cell}} " for line, word in zip(lines[-1], words, strict=True)]
    for block in lines:
        for line in block:
            ui.answer(f"  {line}".rstrip())


def comparison(named: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A line for each, as they were given; the lowest WER is the brightest."""
    wers = [deciding(dict(result)) for _, result in named]
    width = max(len(name) for name, _ in named) + 2
    ui.answer(f"{'':<{width}}{'step':>8}{'WER':>9}{'CER':>9}  95% interval of WER   decoder")
    for (name, result), wer in zip(named, wers, strict=True):
        interval = result.get("interval")
        about = f"{100 * interval['low']:.2f} - {100 * interval['high']:.2f}" if interval else "-"
        text = f"{name:<{width}}{result['step']:>8}{result['wer']:>9.2%}{result.get('cer', float('nan')):>9.2%}"
        ui.answer(f"{text}  {about:<20}  {result.get('decoder', 'greedy')}", style=ui.purple(wer, max(wers), min(wers)))
