"""Documents -> tokens, exactly as SentencePiece gives them, each distinct word encoded once.

Where a model's ids of a text are those of its words, one after the other (tokenizer_rules), the encoder cuts texts at
white space, looks each word up in a table that fills itself, and segments the words that are new by the model's own
rules and merges (bpe_kernels), or, where those are not plain (user-defined symbols, white space made by a rule), asks
SentencePiece for each in its context:

    "The cat  sat"  ->  "The"  " cat"  " sat"  ->  table: seen / new  ->  merges, or encode("x cat y") without x and y

Otherwise the text is encoded whole: by model (`why_whole`: unigram, pieces that span words, rules that touch white
space), and by text, when a word's ids change with what follows it (a normalisation that leaves a space at its end, for
example). The table is bounded; its contents never show in the result. The price: about 70 MiB, a second to compile the
kernels where numba has not yet cached them, and no gain for scripts written without spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from rnnlm.data.bpe_kernels import BpeTables, segment_words
from rnnlm.data.known_words import KnownWords
from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.data.tokenizer_rules import WHITE, bpe_tables, white_bytes, why_whole
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import FIRST, LAST, NEW, NO_IDS, WordTable
from rnnlm.data.word_tokenizer import WordTokenizer

BATCH_BYTES = 2**17  # of text looked up at once: what is written then still lies in the cache when it is read


class Encoder:
    """Encodes many documents with one tokenizer; holds the table of words.

    `why_whole`: why texts are encoded whole under this tokenizer; empty where they are encoded by words.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self.why_whole = ""
        self._bpe: BpeTables | None = None
        self._known: KnownWords | None = None
        if tokenizer.encodes == "bytes":
            return
        if tokenizer.encodes == "words":
            self._white = np.isin(np.arange(256), WHITE)
            self._keep_runs, self._first_differs = False, True
            if isinstance(tokenizer, WordTokenizer) and not tokenizer.by_characters:
                self._first_differs = False
                self._known = KnownWords(tokenizer.known, tokenizer.unknown_id)
        elif isinstance(tokenizer, SentencePieceTokenizer):
            self._read_rules(tokenizer)
        else:
            self.why_whole = f"the rules of {tokenizer.description} are not known"
        if self.why_whole:
            return

        self._white_bytes = bytes(np.flatnonzero(self._white).tolist())
        self._table = WordTable(self.dtype, 2 * BATCH_BYTES)

    def _read_rules(self, tokenizer: SentencePieceTokenizer) -> None:
        """How this model's words are found and encoded, or why they are not."""
        self.why_whole = why_whole(tokenizer)
        if self.why_whole:
            return

        self._white = white_bytes(tokenizer)
        spec = tokenizer.proto().normalizer_spec
        self._keep_runs = not spec.remove_extra_whitespaces
        self._first_differs = self._keep_runs or not spec.add_dummy_prefix

        # words that SentencePiece is asked for stand between these: "x cat y"
        self._ids_before = tokenizer.encode("x")
        self._ids_after = tokenizer.encode("x y")[len(self._ids_before) :]
        # ids that may not end a word before another one, or begin one: the space or the unknown run might reach over
        self._open_ended = np.array([tokenizer.piece(token).endswith(META) for token in range(tokenizer.vocab_size)])
        self._bpe = bpe_tables(tokenizer)

    def encode(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """The tokens of documents, each ended by EOS.

        Args:
            documents: valid UTF-8.

        Returns:
            ids: all tokens in order, uint16 or uint32.
            tokens: (documents,) int64, how many belong to each, EOS included.
            words: (documents,) int64, how many words each has in the sense of str.split.
        """
        encoded = []
        for batch in _batches(documents):
            if self.tokenizer.encodes == "bytes":
                encoded.append(self._encode_bytes(batch))
            elif self.why_whole:
                encoded.append(self._encode_whole(batch))
            elif len(batch[0]) > BATCH_BYTES:
                blocks = list(self.encode_long(iter(batch)))
                ids = np.concatenate([ids for ids, _ in blocks])
                encoded.append((ids, np.array([len(ids)]), np.array([sum(words for _, words in blocks)])))
            else:
                encoded.append(self._encode_batch(batch))

        return _join(encoded) if encoded else (np.empty(0, self.dtype), np.empty(0, np.int64), np.empty(0, np.int64))

    def encode_long(self, blocks: Iterator[bytes], max_word_bytes: int = 2**62) -> Iterator[tuple[Array, int]]:
        """The tokens of one document of any length that comes in blocks of valid UTF-8: (ids, words), some at a time.

        Raises:
            OverflowError: no place to cut within max_word_bytes.
        """
        assert not self.why_whole
        if self.tokenizer.encodes == "bytes":
            yield from self._long_bytes(blocks)
            return

        rest, flags = b"", FIRST
        for block in blocks:
            for start in range(0, len(block), BATCH_BYTES):
                rest += block[start : start + BATCH_BYTES]
                cut = self._last_cut(rest)
                ids, words = self._encode_between(rest[:cut], flags) if cut else (None, 0)
                if ids is not None:
                    yield ids, words
                    rest, flags = rest[cut:], 0
                elif len(rest) > max_word_bytes:
                    raise OverflowError(f"a word of {len(rest):,} bytes")

        ids, words = self._encode_between(rest, flags | LAST)
        assert ids is not None, "the end of a text is always a place to cut"
        yield np.append(ids, self.dtype.type(self.tokenizer.eos_id)), words

    def _encode_bytes(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """As `encode`, each byte its own id."""
        tokens = np.array([len(document) + 1 for document in documents], np.int64)
        data = np.frombuffer(b" ".join([*documents, b""]), np.uint8)  # a space stands where each EOS comes
        ids = data.astype(self.dtype)
        ids[np.cumsum(tokens) - 1] = self.tokenizer.eos_id
        return ids, tokens, np.array([len(document.decode().split()) for document in documents], np.int64)

    def _long_bytes(self, blocks: Iterator[bytes]) -> Iterator[tuple[Array, int]]:
        """As `encode_long`, each byte its own id."""
        inside = False  # whether the block before ended within a word
        for block in filter(None, blocks):
            text = block.decode()
            words = len(text.split()) - (inside and not text[:1].isspace())
            inside = not text[-1:].isspace()
            yield np.frombuffer(block, np.uint8).astype(self.dtype), words
        yield np.array([self.tokenizer.eos_id], self.dtype), 0

    def _last_cut(self, text: bytes) -> int:
        """Where white space begins, as far back as possible, behind a word whose ids do not depend on what follows."""
        end = len(text)
        for _ in range(100):
            end = len(text[: self._last_white(text, end)].rstrip(self._white_bytes))
            word = text[self._last_white(text, end) : end]
            if not word or len(self._encode_in_context([(b" " if end > len(word) else b"") + word], 0)[0]):
                return end
            end -= len(word)
        return 0

    def _last_white(self, text: bytes, end: int) -> int:
        """Behind the last white byte before `end`; 0 if there is none."""
        near = max(0, end - 4096)  # most often it is: some of these bytes occur nowhere
        found = max(text.rfind(byte, near, end) for byte in self._white_bytes)
        return 1 + (found if found >= 0 else max(text.rfind(byte, 0, near) for byte in self._white_bytes))

    def _encode_between(self, text: bytes, flags: int) -> tuple[Array | None, int]:
        """The ids of some of a document that white space follows (or, with LAST, nothing), and its words."""
        if len(text) <= 2 * BATCH_BYTES:
            ids, tokens, words = self._encode_by_words([text], flags, eos=-1)
            if tokens[0] >= 0:
                return ids, int(words[0])
        ids, sizes = self._encode_in_context([text], flags)
        return (ids if sizes[0] != NO_IDS else None), len(text.decode().split())

    def _encode_in_context(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """The ids of texts between the words x and y (not x with FIRST, not y with LAST), and how many each has.

        Where the ids depend on the words around them: no ids and NO_IDS.
        """
        if self.tokenizer.encodes == "words":
            each = self.tokenizer.word_ids([text.decode() for text in texts], first=bool(kind & FIRST))
            nothing = NO_IDS if kind == FIRST else 0  # white space alone: the next word may be the first one
            return np.fromiter(chain.from_iterable(each), self.dtype), np.array([len(ids) or nothing for ids in each])

        before = "" if kind & FIRST or not self._first_differs else "x" if self._keep_runs else "x "
        after = "" if kind & LAST else " y"
        found = self.tokenizer.encode_each([f"{before}{text.decode()}{after}" for text in texts])
        head, tail = np.array(self._ids_before if before else [], int), np.array(self._ids_after if after else [], int)

        # all ids one behind the other; those of text i lie in ids[begins[i]:stops[i]], between head and tail
        totals = np.array(list(map(len, found)), np.int64)
        ids = np.fromiter(chain.from_iterable(found), np.int64, int(totals.sum()))
        ends = np.cumsum(totals)
        begins, stops = ends - totals + len(head), ends - len(tail)
        sizes = np.maximum(stops - begins, 0)

        # right where head and tail are there, and nothing between them could have merged with another neighbour
        padded = np.concatenate([ids, np.zeros(len(head) + len(tail) + 1, np.int64)])  # a text may have fewer ids
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
        return ids[middle].astype(self.dtype), np.where(right, sizes, NO_IDS)

    def _encode_batch(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """As `encode`, of documents that fit into one batch."""
        ids, tokens, words = self._encode_by_words(documents, FIRST | LAST, self.tokenizer.eos_id)
        if (tokens < 0).any():
            places = np.cumsum(np.maximum(tokens, 0))
            odd = np.flatnonzero(tokens < 0)
            whole = [self._encode_whole([documents[index]]) for index in odd.tolist()]
            ids = np.insert(ids, np.repeat(places[odd], [len(each[0]) for each in whole]), _join(whole)[0])
            tokens[odd], words[odd] = _join(whole)[1:]
        return ids, tokens, words

    def _encode_whole(self, documents: Sequence[bytes]) -> tuple[Array, Array, Array]:
        """As `encode`, each text given to SentencePiece as it is."""
        texts = [document.decode() for document in documents]
        found = self.tokenizer.encode_each(texts, add_eos=True)
        tokens = np.array(list(map(len, found)), np.int64)
        words = np.array([len(text.split()) for text in texts], np.int64)
        return np.fromiter(chain.from_iterable(found), self.dtype, int(tokens.sum())), tokens, words

    def _encode_by_words(self, texts: Sequence[bytes], flags: int, eos: int) -> tuple[Array, Array, Array]:
        """Ids, tokens and words of texts by their words; -1 tokens where that cannot be, EOS behind each if >= 0."""
        self._table.make_room()
        words, found = self._table.find(texts, flags, self._white, self._keep_runs, self._first_differs)
        self._fill_table()
        return self._table.write(words, found, eos)

    def _fill_table(self) -> None:
        """Find the ids of the entries that are new: plain words here, others by SentencePiece."""
        table = self._table
        first, last = table.filled, int(table.counts[0])
        if first == last:
            return

        begin = int(table.key_ends[first - 1]) if first else 0
        table.reserve(4 * (int(table.counts[1]) - begin))
        if self._known is not None:
            self._known.fill(table, first, last)
        elif self._bpe is None:
            table.entries[first:last, 1] = NEW
        else:
            table.used = segment_words(
                table.keys, table.key_ends, table.kinds, first, last, self._white, self._bpe, table.entries, table.ids,
                table.used,
            )  # fmt: skip

        left = first + np.flatnonzero(table.entries[first:last, 1] == NEW)
        for kind in np.unique(table.kinds[left]).tolist():
            entries = left[table.kinds[left] == kind]
            texts = table.texts(entries)
            ids, counts = self._encode_in_context(texts, kind)
            table.set_ids(entries, ids, counts, [len(text.decode().split()) for text in texts])
        table.filled = last


def _join(encoded: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    ids, tokens, words = zip(*encoded, strict=True)
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
