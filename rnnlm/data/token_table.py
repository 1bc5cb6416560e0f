"""Other people's ids: a tokens.txt with or without its SentencePiece model, and models whose EOS has another name.

Speech recognisers list their tokens as `piece id` a line (icefall, k2, sherpa, Kaldi) or as a piece a line (ESPnet):

    <blk> 0           with its bpe.model: the same model with its pieces in the order of the table, so that the ids
    <sos/eos> 1       are the table's; what the model does not have, as <blk>, becomes a control piece
    <unk> 2           without a model: a table of words, or of characters if no entry has two (WordTokenizer)
    ▁the 3

Scores and rules decide how SentencePiece cuts a text, and ids do not, so the pieces of a text stay what they were. The
piece that ends documents, and a blank, become control pieces: a text that says <sos/eos> does not end its document. The
price: where such a text stands in the corpus, its ids are not those of the original model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rnnlm.data.sentencepiece_tokenizer import META, parse
from rnnlm.data.tokenizer import read_bounded
from rnnlm.data.word_tokenizer import WordTokenizer
from rnnlm.errors import UserError

BLANKS = ("<blk>", "<blank>", "<eps>")  # of recognisers; no text has them
SENTENCE_ENDS = ("</s>", "<sos/eos>", "<eos>", "<s>", "<sos>", "<bos>", "<pad>")
UNKNOWNS = ("<unk>", "<UNK>", "[UNK]")
SPACES = ("<space>", META)  # between words, in a table of characters
DISAMBIGUATION = re.compile(r"#\d+")  # Kaldi's, of lexicons
LARGEST = 10**7  # ids are below it


def read_table(path: Path) -> dict[str, int]:
    """Piece -> id of a tokens.txt.

    Raises:
        UserError: missing, no text, or a line that is not as the others.
    """
    way_out = "give a table of pieces and ids"
    try:
        text = read_bounded(path, "tokenizer.table", way_out).decode("utf-8-sig")  # some editors write a BOM
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.table={path}: not valid UTF-8 ({error}); {way_out}") from error

    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    found = [re.fullmatch(r"(.+?)[ \t]+(\d+)", line, re.ASCII) for line in lines]
    if not any(found):  # ESPnet's: the number of the line is the id
        return _checked(path, ((line, str(number)) for number, line in enumerate(lines)))
    return _checked(path, (each.groups() if each else (line, "") for each, line in zip(found, lines, strict=True)))


def _checked(path: Path, entries: Iterable[tuple[str | Any, ...]]) -> dict[str, int]:
    """Entries (piece, digits) as a table, in which each piece and each id stands once."""
    table: dict[str, int] = {}
    seen = set[int]()
    for number, (piece, digits) in enumerate(entries, 1):
        token = int(digits) if 0 < len(digits) < 10 else LARGEST
        if not piece or piece in table or token in seen or token >= LARGEST:
            raise UserError(
                f"tokenizer.table={path}: line {number} is {f'{piece} {digits}'[:80]!r}, expected a piece and an id "
                f"below {LARGEST:,}, each of them once"
            )
        table[piece] = token
        seen.add(token)
    return table


def rewrite_model(model: bytes, name: str, eos_piece: str, table: Mapping[str, int] | None = None) -> bytes:
    """A serialized SentencePiece model whose EOS is this piece, and whose ids are those of a table.

    Args:
        name: what errors call the model.
        eos_piece: empty: the model's own.
        table: None: the ids stay.

    Raises:
        UserError: no model, a piece without an id, no such EOS, or one that texts are made of.
    """
    proto = parse(model, name)
    own = proto.trainer_spec.eos_piece
    controls = {piece.piece for piece in proto.pieces if piece.type == piece.CONTROL}
    if table is None and eos_piece in ("", own) and own in controls:
        return model

    pieces = [type(proto).SentencePiece.FromString(piece.SerializeToString()) for piece in proto.pieces]
    if table is not None:
        pieces = _in_order(pieces, table, name)
    _mark(pieces, eos_piece or own, name)

    spec, names = proto.trainer_spec, [piece.piece for piece in pieces]
    spec.vocab_size, spec.eos_piece = len(pieces), eos_piece or own
    for role in ("unk", "eos", "bos", "pad"):  # SentencePiece goes by the names; who reads the numbers finds them right
        piece = getattr(spec, f"{role}_piece")
        setattr(spec, f"{role}_id", names.index(piece) if piece in names else -1)
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    return bytes(proto.SerializeToString(deterministic=True))


def _in_order(pieces: list[Any], table: Mapping[str, int], name: str) -> list[Any]:
    """The pieces of a model in the order of a table, with control pieces for what only the table has."""
    kind = type(pieces[0])
    missing = [piece.piece for piece in pieces if piece.piece not in table and piece.type != piece.CONTROL]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"tokenizer.table: {len(missing):,} of the {len(pieces):,} pieces of {name} have no id in it ({shown}); "
            "give the table that belongs to the model"
        )

    theirs, by_id = {piece.piece: piece for piece in pieces}, {token: piece for piece, token in table.items()}
    names = [by_id.get(token, f"<no piece {token}>") for token in range(max(by_id) + 1)]
    return [theirs.get(each) or kind(piece=each, type=kind.CONTROL) for each in names]


def _mark(pieces: list[Any], eos_piece: str, name: str) -> None:
    """Make control pieces of EOS and of blanks, so that no text has them.

    Raises:
        UserError: there is no such EOS, or texts are made of it.
    """
    marks = [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.USER_DEFINED)]
    if eos_piece not in marks:
        is_there = any(piece.piece == eos_piece for piece in pieces)
        found = "texts are made of that piece" if is_there else "there is no such piece"
        known = ", ".join([mark for mark in marks if not mark.startswith("<no piece")][:8]) or "none that it has"
        raise UserError(
            f"tokenizer.eos_piece={eos_piece}: {found} in {name}; name the one that ends a text, of {known}"
        )
    for piece in pieces:
        if piece.piece == eos_piece or piece.piece in BLANKS:
            piece.type = piece.CONTROL


def table_alone(table: Mapping[str, int], eos_piece: str) -> WordTokenizer:
    """The entries of a table as tokens: words, or characters if none but the special ones is longer.

    Raises:
        UserError: no EOS, or no entry for what is unknown.
    """
    unknown = next((name for name in UNKNOWNS if name in table), "")
    eos = eos_piece or ("</s>" if "</s>" in table else "")
    if eos not in table or eos == unknown:
        near = ", ".join(name for name in SENTENCE_ENDS if name in table) or "its entries"
        raise UserError(
            f"tokenizer.eos_piece={eos_piece}: not in tokenizer.table; name the entry that ends a text, of {near}"
        )
    if not unknown:
        raise UserError(
            f"tokenizer.table: has none of {', '.join(UNKNOWNS)}, and words that it lacks have no id; add one"
        )

    space = next((name for name in SPACES if name in table), "")
    silent = [name for name in table if name in (*BLANKS, *SENTENCE_ENDS) or DISAMBIGUATION.fullmatch(name)]
    ordinary = [name for name in table if name not in (*silent, eos, unknown, space)]
    if max(map(len, ordinary), default=0) > 1:
        return WordTokenizer.of(table, eos=eos, unknown=unknown, silent=silent)
    return WordTokenizer.of(table, eos=eos, unknown=unknown, silent=silent, characters=True, space=space)
