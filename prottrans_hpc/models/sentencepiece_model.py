"""spiece.model files, read and written by hand: the vocabulary of a SentencePiece tokenizer as a protobuf message.

A protein tokenizer needs little of the format: the pieces with their scores and types, which of them mean unknown,
beginning, end and padding, and the kind of the model. Text is left as it is (normaliser "identity"): the published
files carry a table of 238 KB that maps characters of other scripts, which no residue is. The field numbers are those
of sentencepiece_model.proto (Kudo and Richardson 2018), the encoding is that of protobuf; neither library is needed.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import DataError

BLANK = "\u2581"
"""Stands for the blank in front of a word, in pieces."""


class PieceType(enum.IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Never found in text: padding, end of sequence."""
    USER_DEFINED = 4
    """Found in text before anything else: sentinels, masks."""
    UNUSED = 5
    BYTE = 6


class ModelType(enum.IntEnum):
    """How text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    """At blanks alone: ProtT5's."""
    CHARACTER = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    """A residue is `BLANK` + its letter, as proteins are written with blanks between residues."""
    score: float = 0.0
    """Natural logarithm of its frequency; 0 for special pieces."""
    kind: PieceType = PieceType.NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a spiece.model says. An id of -1 means that there is no such piece."""

    pieces: tuple[Piece, ...]
    model_type: ModelType = ModelType.UNIGRAM
    unknown_id: int = 0
    begin_id: int = 1
    end_id: int = 2
    padding_id: int = -1

    def piece(self, index: int) -> str | None:
        """The text of a piece; None for -1."""
        return self.pieces[index].text if index >= 0 else None


# Field numbers of the messages ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _NORMALIZER_NAME = 3, 4, 1
_IDS = {"unknown_id": 40, "begin_id": 41, "end_id": 42, "padding_id": 43}
_ID_PIECES = {"unknown_id": 45, "begin_id": 46, "end_id": 47, "padding_id": 48}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WORD = 1 << 64


def render(model: SentencePieceModel) -> bytes:
    """The file. The same model gives the same bytes."""
    pieces = b"".join(_field(_PIECES, _render_piece(piece)) for piece in model.pieces)
    trainer = _number(_MODEL_TYPE, model.model_type) + _number(_VOCAB_SIZE, len(model.pieces))
    trainer += b"".join(_number(field, getattr(model, name)) for name, field in _IDS.items())
    for name, field in _ID_PIECES.items():
        text = model.piece(getattr(model, name))
        trainer += b"" if text is None else _field(field, text.encode("utf-8"))
    return pieces + _field(_TRAINER, trainer) + _field(_NORMALIZER, _field(_NORMALIZER_NAME, b"identity"))


def parse(content: bytes, *, source: str) -> SentencePieceModel:
    """Read a file's bytes. Raises DataError when they are no SentencePiece model."""
    try:
        pieces, trainer = [], b""
        for field, value in _fields(content):
            if field == _PIECES:
                pieces.append(_parse_piece(_as_bytes(value)))
            elif field == _TRAINER:
                trainer = _as_bytes(value)
        numbers = {field: value for field, value in _fields(trainer) if isinstance(value, int)}
        defaults = SentencePieceModel(())
        ids = {name: _signed(numbers.get(field, getattr(defaults, name))) for name, field in _IDS.items()}
        model = SentencePieceModel(tuple(pieces), ModelType(numbers.get(_MODEL_TYPE, ModelType.UNIGRAM)), **ids)
    except (IndexError, ValueError, struct.error) as error:
        raise DataError(f"{source} is damaged or no SentencePiece model: {error}") from error
    if not pieces or any(index >= len(pieces) for index in ids.values()):
        raise DataError(f"{source} is damaged or no SentencePiece model: it has {len(pieces)} pieces")
    return model


def _render_piece(piece: Piece) -> bytes:
    return _field(_TEXT, piece.text.encode("utf-8")) + _key(_SCORE, _FIXED32) + struct.pack("<f", piece.score) + _number(_KIND, piece.kind)


def _parse_piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for field, value in _fields(content):
        if field == _TEXT:
            text = _as_bytes(value).decode("utf-8")
        elif field == _SCORE:
            (score,) = struct.unpack("<f", _as_bytes(value))
        elif field == _KIND:
            kind = PieceType(_as_number(value))
    return Piece(text, score, kind)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value % _WORD)  # negative ones as their two's complement, in ten bytes


def _field(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: numbers for varints, bytes for the rest."""
    place = 0
    while place < len(content):
        key, place = _read_varint(content, place)
        field, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, place = _read_varint(content, place)
            yield field, value
            continue
        if wire_type == _BYTES:
            length, place = _read_varint(content, place)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"byte {place} has the unknown wire type {wire_type}")
        if place + length > len(content):
            raise ValueError(f"a field of {length} bytes at byte {place} does not fit into {len(content)}")
        yield field, content[place : place + length]
        place += length


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value % _WORD, place
        if shift >= 70:
            raise ValueError(f"the number before byte {place} is too long")


def _signed(value: int) -> int:
    return value - _WORD if value >= _WORD >> 1 else value


def _as_number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError(f"text ({value!r}) stands where a number belongs")
    return value


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"a number ({value}) stands where text belongs")
    return value
