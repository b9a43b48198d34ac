"""spiece.model files by hand: the sentencepiece library reads what is written, and files it wrote are read back."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from prottrans_hpc.errors import DataError
from prottrans_hpc.models.sentencepiece_model import BLANK, ModelType, Piece, PieceType, SentencePieceModel, parse, render

RESIDUES = "ALGVSREDTIPKFQNYMHWCXBOUZ"
SPECIALS = (Piece("<pad>", 0.0, PieceType.CONTROL), Piece("</s>", 0.0, PieceType.CONTROL), Piece("<unk>", 0.0, PieceType.UNKNOWN))
MODEL = SentencePieceModel(
    (*SPECIALS, *(Piece(BLANK + letter, -1.0 - index) for index, letter in enumerate(RESIDUES))),
    ModelType.WORD,
    unknown_id=2,
    begin_id=-1,
    end_id=1,
    padding_id=0,
)


def processor(model: SentencePieceModel) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=render(model))


@pytest.mark.parametrize("kind", [ModelType.WORD, ModelType.UNIGRAM])
def test_the_library_reads_it(kind):
    found = processor(SentencePieceModel(MODEL.pieces, kind, unknown_id=2, begin_id=-1, end_id=1, padding_id=0))
    assert [found.id_to_piece(index) for index in range(len(found))] == [piece.text for piece in MODEL.pieces]
    assert (found.pad_id(), found.eos_id(), found.unk_id(), found.bos_id()) == (0, 1, 2, -1)
    assert found.encode("M K T U Z") == [3 + RESIDUES.index(letter) for letter in "MKTUZ"]
    assert found.encode("M J K") == [19, 2, 14], "a letter that is no residue is unknown"
    assert found.decode([19, 14]) == "M K"
    assert found.get_score(4) == -2.0 and found.is_control(1) and found.is_unknown(2) and not found.is_control(3)


def test_special_pieces_of_other_families():
    pieces = (Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("<s>", 0.0, PieceType.CONTROL), Piece("</s>", 0.0, PieceType.CONTROL))
    pieces += (Piece("<mask>", 0.0, PieceType.USER_DEFINED), Piece(BLANK + "A", -1.0), Piece(BLANK + "L", -2.0))
    found = processor(SentencePieceModel(pieces))
    assert (found.unk_id(), found.bos_id(), found.eos_id(), found.pad_id()) == (0, 1, 2, -1)
    assert 3 in found.encode("A <mask> L")


def test_the_protobuf_library_reads_the_same():
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(render(MODEL))
    assert [(piece.piece, piece.score, piece.type) for piece in message.pieces] == [(piece.text, piece.score, piece.kind) for piece in MODEL.pieces]
    trainer = message.trainer_spec
    assert (trainer.model_type, trainer.vocab_size) == (ModelType.WORD, len(MODEL.pieces))
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (2, -1, 1, 0)
    assert (trainer.unk_piece, trainer.eos_piece, trainer.pad_piece) == ("<unk>", "</s>", "<pad>")
    assert message.normalizer_spec.name == "identity" and not message.normalizer_spec.precompiled_charsmap


def test_a_file_that_the_library_wrote_is_read():
    """With what this module does not write: fields left out that have their default, a normaliser's table, unknown fields."""
    message = sentencepiece_model_pb2.ModelProto()
    for piece in MODEL.pieces:
        entry = message.pieces.add(piece=piece.text, score=piece.score)
        if piece.kind != PieceType.NORMAL:
            entry.type = int(piece.kind)
    message.trainer_spec.input.append("all_vocab.txt")
    message.trainer_spec.model_type = ModelType.WORD
    message.trainer_spec.character_coverage = 1.0
    message.trainer_spec.unk_id, message.trainer_spec.bos_id, message.trainer_spec.eos_id, message.trainer_spec.pad_id = 2, -1, 1, 0
    message.normalizer_spec.precompiled_charsmap = bytes(range(256))
    assert parse(message.SerializeToString(), source="a test") == MODEL
    assert parse(message.SerializeToString() + b"\xc9\x1f" + bytes(8), source="a test") == MODEL  # an unknown fixed64 field


@given(
    pieces=st.lists(st.builds(Piece, st.text(), st.floats(width=32, allow_nan=False), st.sampled_from(PieceType)), min_size=1, max_size=20),
    kind=st.sampled_from(ModelType),
    data=st.data(),
)
def test_what_is_written_is_read_back(pieces, kind, data):
    ids = [data.draw(st.integers(-1, len(pieces) - 1)) for _ in range(4)]
    model = SentencePieceModel(tuple(pieces), kind, *ids)
    assert parse(render(model), source="a test") == model


@given(st.binary(max_size=60))
def test_any_other_bytes_are_refused_or_read(content):
    try:
        assert parse(content, source="x.model").pieces
    except DataError as error:
        assert "x.model is damaged or no SentencePiece model" in str(error)


def test_a_file_cut_short_is_never_taken_for_the_whole():
    content = render(MODEL)
    for end in range(len(content) - len("identity") - 4):
        try:
            found = parse(content[:end], source="cut")
        except DataError:
            continue
        assert found != MODEL, f"{end} of {len(content)} bytes"
