"""What a SentencePiece model's rules say of words: whether a text's ids are those of its words, and which they are.

Under a BPE model with SentencePiece's default whitespace splitting no piece has a space behind another character, so
no merge crosses from a word into the space before the next one. Where the model is not of that kind, or one of its
normalisation rules touches white space, `why_whole` says so. `bpe_tables` makes arrays of a model whose rules are
plain, for bpe_kernels. The price: a model is read piece by piece in Python, a third of a second for 16,000 of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rnnlm.data.bpe_kernels import MAX_BPE_BYTES, PIECE_BITS, BpeTables, copy_merges, index_pieces
from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer
from rnnlm.data.word_keys import Array

WHITE = (9, 10, 11, 12, 13, 32)  # a word may end at these, if the model makes spaces of them
LABEL = 0x800000FF  # of a node of the trie of rules: its byte; the high bit marks a value, which has none


def why_whole(tokenizer: SentencePieceTokenizer) -> str:
    """Why texts must be encoded whole under this model; empty where a text's ids are those of its words."""
    model = tokenizer.proto()
    kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type).lower()
    if kind not in ("bpe", "char"):
        return f"a {kind} model weighs a text as a whole"
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        return "the model does not write white space before words"

    pieces = {piece.piece for piece in model.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED, piece.UNUSED)}
    if META not in pieces:
        return "the model has no piece for a space"
    for piece in pieces:
        if META in piece.lstrip(META) or any(chr(byte) in piece for byte in WHITE):
            return f"the piece {piece!r} reaches over white space"

    if any(set(found) & set(WHITE) for found in _rule_bytes(model.normalizer_spec.precompiled_charsmap)):
        return "a normalisation rule reaches over white space"
    before = tokenizer.encode("x")
    if not tokenizer.normalize("x y").endswith(f"x{META}y") or tokenizer.encode("x y")[: len(before)] != before:
        return "the rules change the words x and y, between which others are tried"
    return ""


def white_bytes(tokenizer: SentencePieceTokenizer) -> Array:
    """(256,) bool: the bytes that are to this model what a space is."""
    white = np.zeros(256, bool)
    white[[byte for byte in WHITE if _is_space(tokenizer, chr(byte))]] = True
    return white


def _is_space(tokenizer: SentencePieceTokenizer, character: str) -> bool:
    """Whether a character is to this model what a space is, at both ends of a text, alone, and beside a space."""
    texts = (" x y", "x  y", "x y ", "  x   y  ")
    return all(
        tokenizer.normalize(text) == tokenizer.normalize(text.replace(" ", character, times))
        for text in texts
        for times in range(1, 8)
    )


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


def _rule_bytes(rules: bytes) -> tuple[list[int], list[int]]:
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


def bpe_tables(tokenizer: SentencePieceTokenizer) -> BpeTables | None:
    """The model as arrays; None where only SentencePiece knows its rules: user-defined symbols, characters."""
    model = tokenizer.proto()
    rules = model.normalizer_spec.precompiled_charsmap
    trie, replacements = _split_rules(rules)
    if not _is_plain(model) or max(map(len, replacements.tobytes().split(b"\0"))) > 4 * MAX_BPE_BYTES:
        return None

    ids = [token for token, piece in enumerate(model.pieces) if piece.type == piece.NORMAL]
    ids.sort(key=lambda token: model.pieces[token].score)
    texts = [model.pieces[token].piece.encode() for token in ids]
    bytewise = {piece.piece: token for token, piece in enumerate(model.pieces) if piece.type == piece.BYTE}
    single, double = _ascii_pieces(texts)
    pairs = any(byte < 128 for byte in _rule_bytes(rules)[1])  # a rule for two ASCII characters: none is alone
    ascii = [0 if pairs else _alone(tokenizer, chr(byte)) for byte in range(128)]

    tables = BpeTables(
        piece_slots=np.zeros(1 << (2 * len(ids)).bit_length(), np.uint64),
        piece_bytes=np.frombuffer(b"".join(texts) + bytes(24), np.uint8),
        piece_ends=np.cumsum([0, *map(len, texts)]),
        piece_ids=np.array([0, *ids]),
        single=single,
        double=double,
        merges=np.zeros(1 << (2 * sum(map(len, texts))).bit_length(), np.uint64),
        byte_ids=np.array([bytewise[f"<0x{byte:02X}>"] for byte in range(256)] if bytewise else [], np.int64),
        ascii=np.array(ascii, np.uint8),
        trie=trie,
        replacements=replacements,
        dummy_prefix=model.normalizer_spec.add_dummy_prefix,
    )
    if not index_pieces(tables):
        return None

    found = tables.merges[tables.merges != 0]
    tables = tables._replace(merges=np.zeros(1 << (2 * len(found)).bit_length(), np.uint64))  # the smaller, the faster
    copy_merges(found, tables.merges)
    return tables


def _is_plain(model: Any) -> bool:
    """Whether a model is BPE and nothing else: no symbols found before the merges, no two merges equally good."""
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        return False
    special = [piece for piece in model.pieces if piece.type != piece.NORMAL]
    if any(piece.type in (piece.USER_DEFINED, piece.UNUSED) or len(piece.piece) < 2 for piece in special):
        return False

    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    scores = [piece.score for piece in normal if len(piece.piece) > 1]
    return len(set(scores)) == len(scores) and not len(normal) >> PIECE_BITS


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
