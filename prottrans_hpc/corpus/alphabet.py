"""Which bytes of a sequence are residues, and what becomes of the others: the rules of the papers.

Upper case; B, O, U and Z become X (unless kept); stops and gaps are removed; everything else, J included, is
invalid and falls under the rule that the user chose. One table of 256 bytes says all this to the parser.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

STANDARD = b"ACDEFGHIKLMNPQRSTVWY"
UNKNOWN = b"X"
RARE = b"BOUZ"
"""Ambiguous (B, Z) and rare (O, U) residues."""
REMOVED = b"*-."
"""Stops and gaps: not residues, dropped and counted."""
WHITESPACE = b" \t\r\n\v\f"
INVALID_RULES = {
    "error": "stop at the first one, naming file, line and record",
    "x": "replace it by X; leave out empty records",
    "skip": "leave the whole record out",
}

# Values of the table above 0x7f are counted by the parser (see _kernel.c).
_DROP, _DROP_COUNTED, _COUNTED = 0, 0x80, 0x80
_INVALID = 0x80 | ord("x")


@dataclass(frozen=True)
class Rules:
    """How text becomes residues."""

    invalid: str = "error"
    """What to do with records that are empty, nameless, named twice or hold an invalid character: a key of INVALID_RULES."""
    keep_rare: bool = False
    """Keep B, O, U and Z as they are."""

    def __post_init__(self) -> None:
        if self.invalid not in INVALID_RULES:
            raise ConfigError(f"invalid characters cannot be treated by {self.invalid!r}; the choices are {', '.join(INVALID_RULES)}")

    def table(self) -> bytes:
        """256 bytes, one an input byte."""
        table = bytearray([_INVALID] * 256)
        for byte in WHITESPACE:
            table[byte] = _DROP
        for byte in REMOVED:
            table[byte] = _DROP_COUNTED
        for letter in STANDARD + UNKNOWN + RARE:
            value = letter if self.keep_rare or letter not in RARE else _COUNTED | UNKNOWN[0]
            table[letter] = table[letter | 0x20] = value
        return bytes(table)

    def counts(self, counted: list[int]) -> dict[str, dict[str, int]]:
        """The parser's counts in words: {replaced: {B: n}, removed: {*: n}, invalid: {J: n}}, upper and lower case together."""
        kinds: dict[str, dict[str, int]] = {"replaced": {}, "removed": {}, "invalid": {}}
        for byte, num in enumerate(counted):
            if num:
                letter = chr(byte).upper() if byte < 0x80 else f"0x{byte:02X}"
                name = letter if letter.isprintable() else f"0x{byte:02X}"
                kind = kinds["removed" if byte in REMOVED else "replaced" if letter.encode() in [bytes([b]) for b in RARE] else "invalid"]
                kind[name] = kind.get(name, 0) + num
        return kinds
