"""A SentencePiece model as arrays for bpe_kernels: its pieces, its merges, and its rules of normalisation.

The price: a model is read piece by piece in Python, a third of a second for 16,000 of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rnnlm.data.bpe_kernels import MAX_BPE_BYTES, PIECE_BITS, BpeTables, copy_merges, index_pieces
from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer
from rnnlm.data.word_keys import Array

LABEL = 0x800000FF  # of a node of the trie of rules: its byte; the high bit marks a value, which has none


def _split_rules(rules: bytes) -> tuple[Array, Array]:
    """Normalisation rules as (trie, (nodes,) int64; what they write, (bytes,) uint8, each ended by 0).

    The trie is a double array (Darts-clone): a uint32 of its size, then nodes, each with a label in its low eight bits
    and an offset in its high 22, shifted by 8 more if bit 9 is set; bit 8: a rule ends here. The child by byte c of the
    node at base b is node b ^ c, if its label is c, and its own base is its index ^ its offset. The child by byte 0 has
    the high bit set and is the place of what the rule writes.
    """
    size = int.from_bytes(rules[:4], "little")
    trie = np.frombuffer(rules[4 : 4 + size], "<u4").astype(np.int64)
    return trie, np.frombuffer(rules[4 + size :], np.uint8)


def rule_bytes(rules: bytes) -> tuple[list[int], list[int]]:
    """Of all normalisation rules for two bytes or more: their first bytes, and their other bytes."""
    trie, _ = _split_rules(rules)
    if not len(trie):
        return [], []
    bases = np.arange(len(trie)) ^ ((trie >> 10) << ((trie & 0x200) >> 6))
    firsts, others = np.zeros(256, bool), np.zeros(256, bool)

    # from the root, whose children are first bytes, to all other nodes; many at once, as there are 100,000
    roots, _ = _children(trie, bases, np.array([0]))
    seen, waiting = np.zeros(len(trie), bool), roots.tolist()
    seen[roots] = True
    while waiting:
        nodes, waiting = np.array(waiting[:1024]), waiting[1024:]
        children, labels = _children(trie, bases, nodes)
        others[labels] = True
        found = np.unique(children)
        found = found[~seen[found]]
        seen[found] = True
        waiting += found.tolist()

    for root in roots.tolist():
        firsts[trie[root] & 0xFF] = len(_children(trie, bases, np.array([root]))[0]) > 0
    return np.flatnonzero(firsts).tolist(), np.flatnonzero(others).tolist()


def _children(trie: Array, bases: Array, nodes: Array) -> tuple[Array, Array]:
    """(children of nodes, (children,) int64; their labels, (children,) int64).

    trie and bases are (all nodes,) int64, nodes (nodes,) int64.
    """
    labels = np.arange(1, 256)
    children = bases[nodes][:, None] ^ labels
    real = children < len(trie)
    children[~real] = 0
    real &= (trie[children] & LABEL) == labels
    return children[real], np.broadcast_to(labels, real.shape)[real]


def bpe_tables(tokenizer: SentencePieceTokenizer) -> BpeTables | str:
    """The model as arrays, or why only SentencePiece can segment its words."""
    model = tokenizer.proto()
    rules = model.normalizer_spec.precompiled_charsmap
    trie, replacements = _split_rules(rules)
    if why := _why_not_plain(model):
        return why
    if max(map(len, replacements.tobytes().split(b"\0"))) > 4 * MAX_BPE_BYTES:
        return "a normalisation rule writes a long text"

    ids = [token for token, piece in enumerate(model.pieces) if piece.type == piece.NORMAL]
    ids.sort(key=lambda token: model.pieces[token].score)
    texts = [model.pieces[token].piece.encode() for token in ids]
    bytewise = {piece.piece: token for token, piece in enumerate(model.pieces) if piece.type == piece.BYTE}
    single, double = _ascii_pieces(texts)
    pairs = any(byte < 128 for byte in rule_bytes(rules)[1])  # a rule for two ASCII characters: none is alone
    scores = [model.pieces[token].score for token in ids]
    ascii = [0 if pairs else _alone(tokenizer, chr(byte)) for byte in range(128)]

    tables = BpeTables(
        piece_slots=np.zeros(1 << (2 * len(ids)).bit_length(), np.uint64),
        piece_bytes=np.frombuffer(b"".join(texts) + bytes(24), np.uint8),
        piece_ends=np.cumsum([0, *map(len, texts)]),
        piece_ids=np.array([0, *ids]),
        ranks=np.append(0, np.searchsorted(scores, scores, "right")).astype(np.int32),
        made=np.arange(len(ids) + 1, dtype=np.int32),
        single=single,
        double=double,
        merges=np.zeros(1 << (2 * sum(map(len, texts))).bit_length(), np.uint64),
        byte_ids=np.array([bytewise[f"<0x{byte:02X}>"] for byte in range(256)] if bytewise else [], np.int64),
        ascii=np.array(ascii, np.uint8),
        trie=trie,
        replacements=replacements,
        dummy_prefix=model.normalizer_spec.add_dummy_prefix,
        symbol_starts=np.isin(np.arange(256), [symbol.encode()[0] for symbol in _symbols(model)]),
    )
    if not index_pieces(tables):
        return "a piece has a character that is no piece"

    found = tables.merges[tables.merges != 0]
    tables = tables._replace(merges=np.zeros(1 << (2 * len(found)).bit_length(), np.uint64))  # the smaller, the faster
    copy_merges(found, tables.merges)
    return tables


def _why_not_plain(model: Any) -> str:
    """Why words that hold no user-defined symbol are not segmented by merges alone; empty where they are."""
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        return "the model has no merges"
    others = [piece.piece for piece in model.pieces if piece.type not in (piece.NORMAL, piece.USER_DEFINED)]
    if any(len(piece) < 2 for piece in others):
        return "a control piece is a character of texts"
    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    if len(normal) >> PIECE_BITS or any(math.isnan(piece.score) for piece in normal):
        return "a score is no number, or there are too many pieces"
    for symbol in _symbols(model):
        if symbol.startswith(META):
            return f"every word may begin with the user-defined symbol {symbol!r}"
    return ""


def _symbols(model: Any) -> list[str]:
    """The user-defined symbols of a model."""
    return [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]


def _ascii_pieces(texts: list[bytes]) -> tuple[Array, Array]:
    """The number of the piece of each ASCII character, (128,) int32, and of each two, (128, 128) int32; 0: none."""
    single, double = np.zeros(128, np.int32), np.zeros((128, 128), np.int32)
    for number, text in enumerate(texts, 1):
        if text.isascii() and len(text) <= 2:
            (single if len(text) == 1 else double)[tuple(text)] = number
    return single, double


def _alone(tokenizer: SentencePieceTokenizer, character: str) -> int:
    """The ASCII character that the rules make of one between two others; 0 where that is not so simple."""
    found, plain = tokenizer.normalize(f"x{character}x"), tokenizer.normalize("xx")
    simple = plain[-2:] == "xx" and found == f"{plain[:-1]}{found[-2:-1]}x" and "!" <= found[-2] <= "~"
    return ord(found[-2]) if simple else 0
