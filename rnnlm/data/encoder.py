"""Documents -> tokens, exactly as SentencePiece gives them, each distinct word encoded once.

Under a BPE model with SentencePiece's default whitespace splitting no piece has a space behind another character, so
no merge crosses from a word into the space before the next one, and the ids of a text are those of its words, one
after the other. So the encoder cuts texts at white space, looks each word up in a table that fills itself, and spells
the words that are new by the model's own rules and merges (words.py), or, where those are not plain (user-defined
symbols, white space made by a rule), asks SentencePiece for each in its context:

    "The cat  sat"  ->  "The"  " cat"  " sat"  ->  table: seen / new  ->  merges, or encode("x cat y") without x and y

Where that is not proven, the text is encoded whole: by model (`why_not`: unigram, pieces that span words, rules that
touch white space), and by text, when a word's ids change with what follows it (a normalisation that leaves a space at
its end, for example). The table is bounded; its contents never show in the result. The price: about 70 MiB, a second
to compile the kernels where numba has not yet cached them, and no gain for scripts written without spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm.data.bpe_kernels import (
    BLOCK,
    FIRST,
    LAST,
    MAX_SPELLED,
    PIECE_BITS,
    Speller,
    find_words,
    index_pairs,
    index_pieces,
    keep_first,
    spell_words,
    write_ids,
)
from rnnlm.data.tokenizer import META, Tokenizer, token_dtype

BATCH_BYTES = 2**17  # of text looked up at once: what is written then still lies in the cache when it is read
TABLE_SLOTS = 2**19  # of 32 bytes, so that none lies in two cache lines
MAX_WORDS = TABLE_SLOTS // 2  # held at once; beyond, the first quarter stays: the frequent ones come early
KEY_BYTES = 2**23  # of text of those words
WHITE = (9, 10, 11, 12, 13, 32)  # a word may end at these, if the model makes spaces of them
Array = npt.NDArray[Any]


def why_not(tokenizer: Tokenizer) -> str:
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
    return ""


def _rule_bytes(rules: bytes) -> tuple[list[int], list[int]]:
    """Of all normalisation rules for two bytes or more: their first bytes, and their other bytes.

    The rules are a trie as a double array (Darts-clone): a uint32 of its size, then units of a label in the low eight
    bits and an offset in the high 22, shifted by 8 more if bit 9 is set; the child by byte c of the node at base b is
    unit b ^ c, if its label is c, and its own base is its index ^ its offset.
    """
    if not rules:
        return [], []
    units = np.frombuffer(rules, "<u4", int.from_bytes(rules[:4], "little") // 4, offset=4).astype(np.int64)
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    labels = np.arange(1, 256)
    firsts, others = np.zeros(256, bool), np.zeros(256, bool)
    seen, waiting = np.zeros(len(units), bool), [0]
    while waiting:
        nodes, waiting = np.array(waiting[:1024]), waiting[1024:]
        children = bases[nodes][:, None] ^ labels
        real = children < len(units)
        children[~real] = 0
        real &= (units[children] & 0x800000FF) == labels
        if nodes[0]:
            others[labels[real.any(0)]] = True
        else:
            roots = children[0, real[0]]
        found = np.unique(children[real])
        found = found[~seen[found]]
        seen[found] = True
        waiting += found.tolist()
    for root in roots:
        children = bases[root] ^ labels
        inside = children < len(units)
        firsts[units[root] & 0xFF] = ((units[children[inside]] & 0x800000FF) == labels[inside]).any()
    return np.flatnonzero(firsts).tolist(), np.flatnonzero(others).tolist()


def _is_space(tokenizer: Tokenizer, character: str) -> bool:
    """Whether a character is to this model what a space is, at both ends of a text, alone, and beside a space."""
    texts = (" x y", "x  y", "x y ", "  x   y  ")
    return all(
        tokenizer.normalize(text) == tokenizer.normalize(text.replace(" ", character, times))
        for text in texts
        for times in range(1, 8)
    )


def _alone(tokenizer: Tokenizer, character: str) -> int:
    """The ASCII character that the rules make of one between two others; 0 where that is not so simple."""
    found, plain = tokenizer.normalize(f"x{character}x"), tokenizer.normalize("xx")
    simple = plain[-2:] == "xx" and found == f"{plain[:-1]}{found[-2:-1]}x" and "!" <= found[-2] <= "~"
    return ord(found[-2]) if simple else 0


def _speller(tokenizer: Tokenizer) -> Speller | None:
    """The model as arrays; None where only SentencePiece knows its rules: user-defined symbols, characters."""
    model = tokenizer.proto()
    plain = model.SentencePiece.NORMAL
    special = [piece for piece in model.pieces if piece.type != plain]
    bytewise = {piece.piece: token for token, piece in enumerate(model.pieces) if piece.type == piece.BYTE}
    if model.trainer_spec.model_type != model.trainer_spec.BPE or any(
        piece.type in (piece.USER_DEFINED, piece.UNUSED) or len(piece.piece) < 2 for piece in special
    ):
        return None
    ids = [token for token, piece in enumerate(model.pieces) if piece.type == plain]
    ids.sort(key=lambda token: model.pieces[token].score)
    spellings = [model.pieces[token].piece.encode() for token in ids]
    scores = [model.pieces[token].score for token in ids if len(model.pieces[token].piece) > 1]
    if len(set(scores)) < len(scores) or len(ids) >> PIECE_BITS:
        return None
    single, double = np.zeros(128, np.int32), np.zeros((128, 128), np.int32)
    for number, spelling in enumerate(spellings, 1):
        if spelling.isascii() and len(spelling) <= 2:
            (single if len(spelling) == 1 else double)[tuple(spelling)] = number
    rules = model.normalizer_spec.precompiled_charsmap
    size = int.from_bytes(rules[:4], "little")
    if max(map(len, rules[4 + size :].split(b"\0"))) > 4 * MAX_SPELLED:  # what a rule writes must have room
        return None
    pairs = any(byte < 128 for byte in _rule_bytes(rules)[1])  # a rule for two ASCII characters: none is alone
    ascii = [0 if pairs else _alone(tokenizer, chr(byte)) for byte in range(128)]
    speller = Speller(
        table=np.zeros(1 << (2 * len(ids)).bit_length(), np.uint64),
        spellings=np.frombuffer(b"".join(spellings) + bytes(24), np.uint8),
        ends=np.cumsum([0, *map(len, spellings)]),
        ids=np.array([0, *ids]),
        single=single,
        double=double,
        pairs=np.zeros(1 << (2 * sum(map(len, spellings))).bit_length(), np.uint64),
        byte_ids=np.array([bytewise[f"<0x{byte:02X}>"] for byte in range(256)] if bytewise else [], np.int64),
        ascii=np.array(ascii, np.uint8),
        units=np.frombuffer(rules, "<u4", size // 4, offset=4).astype(np.int64) if rules else np.empty(0, np.int64),
        targets=np.frombuffer(rules[4 + size :], np.uint8),
        dummy_prefix=model.normalizer_spec.add_dummy_prefix,
    )
    if not index_pieces(speller):
        return None
    pairs = speller.pairs[speller.pairs != 0]
    speller = speller._replace(pairs=np.zeros(1 << (2 * len(pairs)).bit_length(), np.uint64))  # the smaller, the faster
    index_pairs(pairs, speller.pairs)
    return speller


class Encoder:
    """Encodes many documents with one tokenizer; holds the table of words. `why_not`: see the function of that name."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self.why_not = why_not(tokenizer)
        if self.why_not:
            return
        self._eos = self.dtype.type(tokenizer.eos_id)
        encode, spec = tokenizer.encode, tokenizer.proto().normalizer_spec
        self._white = np.zeros(256, bool)
        self._white[[byte for byte in WHITE if _is_space(tokenizer, chr(byte))]] = True
        self._white_bytes = bytes(np.flatnonzero(self._white).tolist())
        self._keep_runs = not spec.remove_extra_whitespaces
        self._marked = self._keep_runs or not spec.add_dummy_prefix
        self._head = encode("x")
        self._tail = encode("x y")[len(self._head) :]
        if not tokenizer.normalize("x y").endswith(f"x{META}y") or encode("x y")[: len(self._head)] != self._head:
            self.why_not = "the rules change the words x and y, between which others are tried"
        # ids that may not end a word before another one, or begin one: the space or the unknown run might reach over
        self._open_ended = np.array([tokenizer.piece(token).endswith(META) for token in range(tokenizer.vocab_size)])
        self._table = _touched((TABLE_SLOTS, 4), np.uint64)
        self._block = np.zeros((BLOCK, 4), np.uint64)
        self._counts = np.zeros(2, np.int64)  # entries, bytes of keys
        self._filled = 0  # entries whose ids are known
        self._keys = _touched(KEY_BYTES + 2 * BATCH_BYTES, np.uint8)
        entries = MAX_WORDS + BATCH_BYTES
        self._kinds = _touched(entries, np.uint8)
        self._key_ends = _touched(entries, np.int64)
        self._entries = _touched((entries, 4), np.int32)  # first id, number of ids or -1, words
        self._ids, self._used = _touched(2**21, self.dtype), 0
        self._speller = _speller(tokenizer)

    def encode(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """The tokens of documents, each ended by EOS.

        Args:
            documents: valid UTF-8.

        Returns:
            ids: all tokens in order, uint16 or uint32.
            tokens: (documents,) int64, how many belong to each, EOS included.
            words: (documents,) int64, how many words each has in the sense of str.split.
        """
        parts = []
        for batch in _batches(documents):
            if self.why_not:
                parts.append(self._whole(batch))
            elif len(batch[0]) > BATCH_BYTES:
                pieces = list(self.encode_long(iter(batch)))
                ids = np.concatenate([ids for ids, _ in pieces])
                parts.append((ids, np.array([len(ids)]), np.array([sum(words for _, words in pieces)])))
            else:
                parts.append(self._documents(batch))
        return _join(parts) if parts else (np.empty(0, self.dtype), np.empty(0, np.int64), np.empty(0, np.int64))

    def encode_long(self, parts: Iterator[bytes], max_word_bytes: int = 2**62) -> Iterator[tuple[Array, int]]:
        """The tokens of one document of any length that comes in parts of valid UTF-8: (ids, words) of each piece.

        Raises:
            OverflowError: no place to cut within max_word_bytes.
        """
        assert not self.why_not
        rest, flags = b"", FIRST
        for part in parts:
            for start in range(0, len(part), BATCH_BYTES):
                rest += part[start : start + BATCH_BYTES]
                cut = self._cut(rest)
                ids, words = self._piece(rest[:cut], flags) if cut else (None, 0)
                if ids is not None:
                    yield ids, words
                    rest, flags = rest[cut:], 0
                elif len(rest) > max_word_bytes:
                    raise OverflowError(f"a word of {len(rest):,} bytes")
        ids, words = self._piece(rest, flags | LAST)
        assert ids is not None, "the end of a text is always a place to cut"
        yield np.append(ids, self._eos), words

    def _cut(self, text: bytes) -> int:
        """Where white space begins, as far back as possible, behind a word whose ids do not depend on what follows."""
        end = len(text)
        for _ in range(100):
            end = len(text[: self._last_white(text, end)].rstrip(self._white_bytes))
            word = text[self._last_white(text, end) : end]
            if not word or len(self._in_context([(b" " if end > len(word) else b"") + word], 0)[0]):
                return end
            end -= len(word)
        return 0

    def _last_white(self, text: bytes, end: int) -> int:
        """Behind the last white byte before `end`; 0 if there is none."""
        near = max(0, end - 4096)  # most often it is: some of these bytes occur nowhere
        found = max(text.rfind(byte, near, end) for byte in self._white_bytes)
        return 1 + (found if found >= 0 else max(text.rfind(byte, 0, near) for byte in self._white_bytes))

    def _piece(self, text: bytes, flags: int) -> tuple[Array | None, int]:
        """The ids of a part of a document that white space follows (or, with LAST, nothing), and its words."""
        if len(text) <= 2 * BATCH_BYTES:
            ids, tokens, words = self._by_words([text], flags, eos=-1)
            if tokens[0] >= 0:
                return ids, int(words[0])
        ids, sizes = self._in_context([text], flags)
        return (ids if sizes[0] >= 0 else None), len(text.decode().split())

    def _in_context(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """The ids of texts between the words x and y (not x with FIRST, not y with LAST), and how many each has.

        Where the ids depend on the words around them: no ids and -1.
        """
        before = "" if kind & FIRST or not self._marked else "x" if self._keep_runs else "x "
        after = "" if kind & LAST else " y"
        found = self.tokenizer.encode_each([f"{before}{text.decode()}{after}" for text in texts])
        head, tail = np.array(self._head if before else [], int), np.array(self._tail if after else [], int)
        totals = np.array(list(map(len, found)), np.int64)
        ids = np.fromiter(chain.from_iterable(found), np.int64, int(totals.sum()))
        ends = np.cumsum(totals)
        begins, stops = ends - totals + len(head), ends - len(tail)
        sizes = np.maximum(stops - begins, 0)
        padded = np.concatenate([ids, np.zeros(len(head) + len(tail) + 1, np.int64)])
        right = stops >= begins
        right &= (padded[(begins - len(head))[:, None] + np.arange(len(head))] == head).all(1)
        right &= (padded[np.maximum(stops, 0)[:, None] + np.arange(len(tail))] == tail).all(1)
        some = sizes > 0
        if after:
            right &= ~(some & self._open_ended[padded[stops - 1]])
        if before:
            right &= ~(some & (padded[begins] == self.tokenizer.unknown_id))
        sizes[~right] = 0
        middle = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))
        return ids[middle].astype(self.dtype), np.where(right, sizes, -1)

    def _documents(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """As `encode`, of documents that fit into one batch."""
        ids, tokens, words = self._by_words(documents, FIRST | LAST, self.tokenizer.eos_id)
        if (tokens < 0).any():
            places = np.cumsum(np.maximum(tokens, 0))
            odd = np.flatnonzero(tokens < 0)
            whole = [self._whole([documents[index]]) for index in odd.tolist()]
            ids = np.insert(ids, np.repeat(places[odd], [len(part[0]) for part in whole]), _join(whole)[0])
            tokens[odd], words[odd] = _join(whole)[1:]
        return ids, tokens, words

    def _whole(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """As `encode`, each text given to SentencePiece as it is."""
        texts = [document.decode() for document in documents]
        found = self.tokenizer.encode_each(texts, add_eos=True)
        tokens = np.array(list(map(len, found)), np.int64)
        words = np.array([len(text.split()) for text in texts], np.int64)
        return np.fromiter(chain.from_iterable(found), self.dtype, int(tokens.sum())), tokens, words

    def _by_words(self, texts: Sequence[bytes], flags: int, eos: int) -> tuple[Array, Array, Array]:
        """Ids, tokens and words of texts by their words; -1 tokens where that cannot be, EOS behind each if >= 0."""
        self._make_room()
        data = np.frombuffer(b" ".join(texts) + bytes(24).replace(b"\0", b" "), np.uint8)
        lengths = np.array(list(map(len, texts)), np.int64)
        ends = np.cumsum(lengths + 1) - 1
        words = np.empty(len(data) // 2 + BLOCK, np.int32)
        found = np.empty(len(texts), np.int64)
        find_words(
            data, ends - lengths, ends, flags, self._white, self._keep_runs, self._marked, self._table, self._keys,
            self._key_ends, self._kinds, self._counts, words, found, self._block,
        )  # fmt: skip
        self._fill()
        words = words[: int(found.sum())]
        out = np.empty(int(np.maximum(self._entries[:, 1][words], 0).sum()) + len(texts) + 4, self.dtype)
        tokens, counted = np.empty(len(texts), np.int64), np.empty(len(texts), np.int64)
        size = write_ids(words, found, self._entries, self._ids, eos, out, tokens, counted)
        return out[:size], tokens, counted

    def _fill(self) -> None:
        """Find the ids of the entries that are new: plain words here, others by SentencePiece."""
        first, last = self._filled, int(self._counts[0])
        if first == last:
            return
        begin = int(self._key_ends[first - 1]) if first else 0
        self._reserve(4 * (int(self._counts[1]) - begin))
        if self._speller is None:
            self._entries[first:last, 1] = -2
        else:
            self._used = spell_words(
                self._keys, self._key_ends, self._kinds, first, last, self._white, self._speller, self._entries,
                self._ids, self._used,
            )  # fmt: skip
        asked = first + np.flatnonzero(self._entries[first:last, 1] == -2)
        begins = np.where(asked > 0, self._key_ends[asked - 1], 0)
        spans = zip(begins.tolist(), self._key_ends[asked].tolist(), strict=True)
        texts = [self._keys[begin:end].tobytes() for begin, end in spans]
        kinds = self._kinds[asked]
        for kind in np.unique(kinds).tolist():
            places = np.flatnonzero(kinds == kind)
            ids, counts = self._in_context([texts[place] for place in places], kind)
            self._reserve(len(ids))
            self._ids[self._used : self._used + len(ids)] = ids
            sizes = np.maximum(counts, 0)
            words = [len(texts[place].decode().split()) for place in places]
            self._entries[asked[places], :3] = np.stack([self._used + np.cumsum(sizes) - sizes, counts, words], 1)
            self._used += len(ids)
        self._filled = last

    def _reserve(self, ids: int) -> None:
        """Room for this many more ids, and for one word."""
        while self._used + ids + 8 * MAX_SPELLED > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])

    def _make_room(self) -> None:
        """Before a batch: forget all but the oldest entries, if there are too many."""
        if self._counts[0] <= MAX_WORDS and self._counts[1] <= KEY_BYTES:
            return
        kept = min(MAX_WORDS // 4, int(np.searchsorted(self._key_ends[: self._filled], KEY_BYTES // 4)))
        keep_first(self._table, kept)
        self._filled = kept
        self._used = int((self._entries[:kept, 0] + np.maximum(self._entries[:kept, 1], 0)).max(initial=0))
        self._counts[:] = kept, self._key_ends[kept - 1] if kept else 0


def _touched(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros that take their memory now: what fits at the start fits at the end."""
    made = np.empty(shape, dtype)
    made.fill(0)
    return made


def _join(parts: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    ids, tokens, words = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(tokens), np.concatenate(words)


def _batches(documents: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Documents up to BATCH_BYTES together, longer ones alone."""
    first = size = 0
    for index, document in enumerate(documents):
        if index > first and size + len(document) + 1 > BATCH_BYTES:
            yield documents[first:index]
            first, size = index, 0
        size += len(document) + 1
    if first < len(documents):
        yield documents[first:]
