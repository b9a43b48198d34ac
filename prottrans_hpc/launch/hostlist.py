"""Slurm's short way to write many names, `n[01-03,7],login`: read it, and write it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_PART = re.compile(r"((?:[^,\[\]]|\[[^\[\]]*\])+)(?:,|$)")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_NUMBERED = re.compile(r"(.*?)(\d+)")


def expand(text: str) -> list[str]:
    """The names of a host list, in its order. Raises ValueError when it is none."""
    names: list[str] = []
    position = 0
    while position < len(text):
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(f"{text!r} is not a list of nodes at character {position + 1}")
        names += _expand_part(match[1])
        position = match.end()
    return names


def _expand_part(part: str) -> list[str]:
    """`a[1-2]b[3]` -> a1b3, a2b3."""
    match = _BRACKETS.search(part)
    if match is None:
        return [part]
    tails = _expand_part(part[match.end() :])
    return [f"{part[: match.start()]}{number}{tail}" for number in _numbers(match[1]) for tail in tails]


def _numbers(text: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise ValueError(f"{item!r} is not a range of numbers")
        low, high = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers


def compress(names: Iterable[str]) -> str:
    """A host list of these names, in their order: numbers that follow one another become a range."""
    parts: list[str] = []
    run: list[tuple[str, str]] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        here = (match[1], match[2]) if match else (name, "")
        if run and not _follows(run[-1], here):
            parts.append(_range_text(run))
            run = []
        run.append(here)
    return ",".join([*parts, _range_text(run)] if run else parts)


def _follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
    return before[0] == after[0] and bool(before[1] and after[1]) and str(int(before[1]) + 1).zfill(len(before[1])) == after[1]


def _range_text(run: Sequence[tuple[str, str]]) -> str:
    (stem, first), (_, last) = run[0], run[-1]
    return f"{stem}{first}" if len(run) == 1 else f"{stem}[{first}-{last}]"
