"""What the recipe's values are made of: quantities with units, paths, names, and the mapping that holds them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COUNT = {"k": 10**3, "M": 10**6}


def _with_unit(value: Any, units: dict[str, float], example: str) -> Any:
    """`"2h"` -> 7200 by the table; numbers pass through for pydantic to judge, `1e4` as the whole number it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    if units is _SECONDS and (clock := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value.strip())):
        days, hours, minutes, seconds = (int(g or 0) for g in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]+)", value.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"expected a number, or one with a unit ({', '.join(units)}) such as {example}")
    number = float(match[1]) * units[match[2]]
    return int(number) if number.is_integer() else number


def _whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"expected a share up to 1, or a whole number of steps; {value:g} is neither")
    return value


def _plain_path(value: Any) -> Any:
    """Refuses what would silently make a directory of the wrong name."""
    if value == "":
        raise ValueError("expected a path")
    if isinstance(value, str) and re.search(r"^~|\$\w|\$\{", value):
        raise ValueError("expected a path written out: `~` and environment variables are not expanded")
    return value


Seconds = Annotated[float, BeforeValidator(lambda v: _with_unit(v, _SECONDS, "30s or 02:00:00")), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(lambda v: _with_unit(v, _BYTES, "64MiB")), Field(gt=0)]
Count = Annotated[int, BeforeValidator(lambda v: _with_unit(v, _COUNT, "10k")), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[float, BeforeValidator(lambda v: _with_unit(v, _COUNT, "10k")), AfterValidator(_whole), Field(ge=0)]
"""Of a run: up to 1 a share of its steps, above it a number of them."""
Decay = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[Path, BeforeValidator(_plain_path), Field(strict=False)]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class Section(BaseModel):
    """A mapping of the recipe. A key that is not in the schema is an error, never ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
