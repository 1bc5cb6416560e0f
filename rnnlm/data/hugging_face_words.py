"""How texts are cut into words under a tokenizer.json, and what the ids of a word are.

Hugging Face's library cuts a text into pre-tokens by a regular expression, and the model sees each of them alone. Under
the expressions of GPT-2 and its successors no pre-token has white space behind another character, unless it is line
ends (PATTERNS says which bytes); so the text may be cut before white space that follows another character, and the
expression matches the same on both sides: its only look ahead, \\s+(?!\\S), is at the end of white space, which begins
a word here. Other white space of Unicode is left inside words, and a word that ends with it asks what follows: its text
is encoded whole. Added tokens are found in the text before that: those that take white space along are not cut so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from rnnlm.data.byte_level_kernels import segment_pretokens
from rnnlm.data.byte_level_rules import GPT2, byte_level_tables, learn_classes
from rnnlm.data.hugging_face_tokenizer import HuggingFaceTokenizer, steps
from rnnlm.data.tokenizer import token_dtype
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import BEGINS, LAST, NO_IDS, RUN, WordTable
from rnnlm.data.words import ASCII_SPACES, Words

SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
START = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LOW, HIGH = rf"{START}{UPPER}*{LOWER}+", rf"{START}{UPPER}+{LOWER}*"
MARKS, PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Regular expressions whose pre-tokens are cut so, and the bytes that may stand behind other characters in one.
PATTERNS = {
    GPT2: b"",
    rf"{SUFFIX}|{START}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}|{REST}": b"\r\n",  # LLaMA-3
    rf"{SUFFIX}|{START}\p{{L}}+|\p{{N}}|{MARKS}|{REST}": b"\r\n",  # Qwen
    rf"{LOW}{SUFFIX}?|{HIGH}{SUFFIX}?|\p{{N}}{{1,3}}|{PATHS}|{REST}": b"\r\n",  # o200k
    rf"{LOW}|{HIGH}|\p{{N}}|{PATHS}|{REST}": b"\r\n",  # Mistral's Tekken
}
OTHER_SPACES = ("\u180e", "\u200b", "\ufeff")  # white space in some version of Unicode


class HuggingFaceWords(Words):
    """The words of texts under one tokenizer.json."""

    keep_runs, first_differs = True, False

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self.why_whole = self.why_not_compiled = ""
        inside = _inside(tokenizer)
        if isinstance(inside, str):
            self.why_whole = inside
            return
        self.white = np.zeros(256, np.uint8)
        self.white[list(ASCII_SPACES)] = RUN | BEGINS
        self.white[list(inside)] = RUN
        tables = byte_level_tables(tokenizer)
        if isinstance(tables, str):
            self.why_not_compiled = tables
        else:
            self._tables = tables

    def segment(self, table: WordTable, first: int, last: int) -> None:
        """As Words, by the model's own merges."""
        begin = int(table.key_ends[first - 1]) if first else 0
        learn_classes(self._tables, self._tokenizer, table.keys[begin : int(table.counts[1])].tobytes().decode())
        table.used = segment_pretokens(
            table.keys, table.key_ends, table.kinds, first, last, self._tables, np.empty(0, np.int64), table.entries,
            table.ids, table.used,
        )  # fmt: skip

    def encode(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """As Words."""
        decoded = [text.decode() for text in texts]
        found = self._tokenizer.encode_each(decoded)
        if not kind & LAST:
            found = [[] if _is_open(text) else ids for text, ids in zip(decoded, found, strict=True)]
        sizes = np.array([len(ids) if ids or not text else NO_IDS for text, ids in zip(decoded, found, strict=True)])
        total = int(np.maximum(sizes, 0).sum())
        return np.fromiter(chain.from_iterable(found), token_dtype(self._tokenizer.vocab_size), total), sizes


def _is_open(text: str) -> bool:
    """Whether a text ends with white space that may belong to what follows; a line end only ends a document."""
    last = text[-1:]
    return not last.isascii() and (last.isspace() or last in OTHER_SPACES)


def _inside(tokenizer: HuggingFaceTokenizer) -> bytes | str:
    """The white bytes that may stand behind other characters in a pre-token, or why texts must be encoded whole."""
    spec = tokenizer.spec
    normal = [step["type"] for step in steps(spec.get("normalizer"))]
    if set(normal) - {"NFC"}:  # which neither makes white space nor joins it with what is before
        return f"its normalizer {normal[0]} is not known to leave words alone"
    for token in tokenizer.added_tokens:
        spaces = any(chr(byte) in token["content"] for byte in ASCII_SPACES)
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or spaces:
            return f"its added token {token['content']!r} takes white space along"

    cutting = list(steps(spec.get("pre_tokenizer")))
    types = [step["type"] for step in cutting]
    if types == ["ByteLevel"] and cutting[0].get("use_regex", True):
        # a space is put before a text that does not begin with one: each word must begin as the text did
        return bytes(set(ASCII_SPACES) - {32}) if cutting[0]["add_prefix_space"] else b""
    if types == ["Split", "ByteLevel"] and not (cutting[1].get("use_regex", True) or cutting[1]["add_prefix_space"]):
        split = cutting[0]
        inside = PATTERNS.get(split["pattern"].get("Regex", ""))
        if inside is not None and split["behavior"] == "Isolated" and not split["invert"]:
            return inside
    return f"its pre-tokenizer {' and '.join(types) or 'null'} is not known to cut at white space alone"
