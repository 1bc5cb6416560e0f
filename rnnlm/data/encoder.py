"""Documents -> tokens, exactly as the tokenizer's own library gives them, each distinct word encoded once.

Where a model's ids of a text are those of its words, one after the other (`words`, and a module for each kind), the
encoder cuts texts at white space, looks each word up in a table that fills itself, and segments the words that are new
by the model's own rules and merges (kernels), or, where those are not plain (a user-defined symbol in the word, white
space made by a rule), asks the library for each in its context:

    "The cat  sat"  ->  "The"  " cat"  " sat"  ->  table: seen / new  ->  merges, or encode("x cat y") without x and y

Otherwise the text is encoded whole: by model (`why_whole`: unigram, pieces that span words, rules that touch white
space), and by text, when a word's ids change with what follows it (a normalisation that leaves a space at its end, for
example). The table is bounded; its contents never show in the result. The price: about 70 MiB, ten seconds to compile
the kernels where no process has done so before (`prepare`), and no gain for scripts written without spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from rnnlm.data.hugging_face_tokenizer import HuggingFaceTokenizer
from rnnlm.data.hugging_face_words import HuggingFaceWords
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.sentencepiece_words import SentencePieceWords
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import BEGINS, FIRST, LAST, MAX_WORDS, NEW, NO_IDS, WordTable
from rnnlm.data.words import NoWords, TableWords, Words

BATCH_BYTES = 2**17  # of text looked up at once: what is written then still lies in the cache when it is read


class Encoder:
    """Encodes many documents with one tokenizer; holds the table of words.

    `why_whole`: why texts are encoded whole under this tokenizer; empty where they are encoded by words.
    """

    def __init__(self, tokenizer: Tokenizer, batch_bytes: int = BATCH_BYTES, max_words: int = MAX_WORDS):
        """Read the tokenizer's rules, and take all memory.

        Args:
            tokenizer: of any kind.
            batch_bytes: of text looked up at once, and the most of a long document.
            max_words: held in the table; a power of two.
        """
        self.tokenizer = tokenizer
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self._batch_bytes = batch_bytes
        self._is_bytes = tokenizer.encodes == "bytes"
        self._words = _words_of(tokenizer)
        self.why_whole = "" if self._is_bytes else self._words.why_whole
        if not self._words.why_whole:
            self._table = WordTable(self.dtype, 2 * batch_bytes, max_words)

    @property
    def path(self) -> str:
        """How texts are encoded, and why, in a line."""
        if self._is_bytes:
            return "each byte is its own id"
        if self.why_whole:
            return f"texts are encoded whole by the tokenizer's library, without a table of words: {self.why_whole}"
        if why := self._words.why_not_compiled:
            return f"texts are encoded by words, new words by the tokenizer's library: {why}"
        return "texts are encoded by words, new words by compiled kernels"

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
        for batch in _batches(documents, self._batch_bytes):
            if self._is_bytes:
                encoded.append(self._encode_bytes(batch))
            elif self.why_whole:
                encoded.append(self._encode_whole(batch))
            elif len(batch[0]) > self._batch_bytes:
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
        if self._is_bytes:
            yield from self._long_bytes(blocks)
            return

        rest, flags = b"", FIRST
        for block in blocks:
            for start in range(0, len(block), self._batch_bytes):
                rest += block[start : start + self._batch_bytes]
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
        end = self._cut_before(text, len(text))
        for _ in range(100):
            begin = self._cut_before(text, end)
            if not end or self._words.encode([text[begin:end]], 0)[1][0] != NO_IDS:
                return end
            end = begin
        return 0

    def _cut_before(self, text: bytes, end: int) -> int:
        """The last place below `end` where white space begins behind a word; 0 if there is none."""
        for size in (2**12, 2**62):  # most often it is near
            begin = max(0, end - size)
            white = self._words.white[np.frombuffer(text, np.uint8)[begin:end]]
            found = np.flatnonzero((white[1:] & BEGINS).astype(bool) & (white[:-1] == 0))
            if len(found):
                return begin + 1 + int(found[-1])
        return 0

    def _encode_between(self, text: bytes, flags: int) -> tuple[Array | None, int]:
        """The ids of some of a document that white space follows (or, with LAST, nothing), and its words."""
        if len(text) <= 2 * self._batch_bytes:
            ids, tokens, words = self._encode_by_words([text], flags, eos=-1)
            if tokens[0] >= 0:
                return ids, int(words[0])
        ids, sizes = self._words.encode([text], flags)
        return (ids if sizes[0] != NO_IDS else None), len(text.decode().split())

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
        rules = self._words
        self._table.make_room()
        words, found = self._table.find(texts, flags, rules.white, rules.keep_runs, rules.first_differs)
        self._fill_table()
        return self._table.write(words, found, eos)

    def _fill_table(self) -> None:
        """Find the ids of the entries that are new."""
        table = self._table
        first, last = table.filled, int(table.counts[0])
        if first == last:
            return

        begin = int(table.key_ends[first - 1]) if first else 0
        table.reserve(4 * (int(table.counts[1]) - begin))
        self._words.fill(table, first, last)

        left = first + np.flatnonzero(table.entries[first:last, 1] == NEW)
        for kind in np.unique(table.kinds[left]).tolist():
            entries = left[table.kinds[left] == kind]
            texts = table.texts(entries)
            ids, counts = self._words.encode(texts, kind)
            table.set_ids(entries, ids, counts, [len(text.decode().split()) for text in texts])
        table.filled = last


def prepare(tokenizer: Tokenizer) -> str:
    """Compile what an encoder of this tokenizer calls, for this process and others; returns its `path`.

    It takes ten seconds of a core, once for each version of the kernels: see `kernels`. Workers that start after it
    find all compiled.
    """
    encoder = Encoder(tokenizer, batch_bytes=16, max_words=2)  # small, so that the table also forgets
    encoder.encode([b"a b c d e f"] * 2)
    return encoder.path


def _words_of(tokenizer: Tokenizer) -> Words:
    if tokenizer.encodes == "words":
        return TableWords(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return SentencePieceWords(tokenizer)
    return HuggingFaceWords(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else NoWords(tokenizer)


def _join(encoded: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    ids, tokens, words = zip(*encoded, strict=True)
    return np.concatenate(ids), np.concatenate(tokens), np.concatenate(words)


def _batches(documents: Sequence[bytes], batch_bytes: int) -> Iterator[Sequence[bytes]]:
    """Documents up to batch_bytes together, longer ones alone."""
    first = size = 0
    for index, document in enumerate(documents):
        if index > first and size + len(document) + 1 > batch_bytes:
            yield documents[first:index]
            first, size = index, 0
        size += len(document) + 1
    if first < len(documents):
        yield documents[first:]
