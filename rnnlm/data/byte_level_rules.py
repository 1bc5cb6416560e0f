"""A byte-level BPE model of a tokenizer.json as arrays for byte_level_kernels.

Letters, numbers and white space are those of the library's own version of Unicode: it is asked for each character when
it is first met, so that both always agree.
"""

from __future__ import annotations

import numpy as np

from rnnlm.data.bpe_kernels import PIECE_BITS
from rnnlm.data.byte_level_kernels import LETTER, MARK, NUMBER, WHITE, ByteLevelTables, put_merges
from rnnlm.data.hugging_face_tokenizer import BYTES, HuggingFaceTokenizer, steps

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level_tables(tokenizer: HuggingFaceTokenizer) -> ByteLevelTables | str:
    """The model as arrays, or why only the library can segment its words."""
    spec = tokenizer.spec
    if why := _why_not_plain(tokenizer):
        return why
    vocab, pairs = dict(spec["model"]["vocab"]), _pairs(spec["model"]["merges"])
    single = np.array([vocab[character] + 1 for character in sorted(BYTES, key=BYTES.__getitem__)], np.int32)

    # a merge's number is the higher the earlier it comes; a pair that stands twice counts where it stands last
    numbers = {pair: len(pairs) - place for place, pair in enumerate(pairs)}
    made, double = np.zeros(len(pairs) + 1, np.int32), np.zeros((128, 128), np.int32)
    found = np.zeros(len(numbers), np.uint64)
    for place, ((left, right), number) in enumerate(numbers.items()):
        made[number] = vocab[left + right] + 1
        found[place] = (vocab[left] + 1) << 2 * PIECE_BITS | (vocab[right] + 1) << PIECE_BITS | number
        if len(left + right) == 2 and BYTES[left] < 128 and BYTES[right] < 128:
            double[BYTES[left], BYTES[right]] = number
    merges = np.zeros(1 << (2 * len(found)).bit_length(), np.uint64)
    put_merges(found, merges)

    tables = ByteLevelTables(
        piece_ids=np.arange(-1, tokenizer.vocab_size),
        single=single,
        double=double,
        merges=merges,
        ranks=np.arange(len(pairs) + 1, dtype=np.int32),
        made=made,
        classes=np.zeros(0x110000, np.uint8),
        added_starts=np.isin(np.arange(256), [each["content"].encode()[0] for each in tokenizer.added_tokens]),
    )
    learn_classes(tables, tokenizer, "".join(map(chr, range(128))))
    return tables


def _why_not_plain(tokenizer: HuggingFaceTokenizer) -> str:
    """Why words that hold no added token are not segmented by GPT-2's rules; empty where they are."""
    model = tokenizer.spec["model"]
    cutting = list(steps(tokenizer.spec.get("pre_tokenizer")))
    if tokenizer.spec.get("normalizer") is not None:
        return "it has a normalizer"
    if len(cutting) != 1 or cutting[0]["type"] != "ByteLevel" or cutting[0]["add_prefix_space"]:
        return "its pre-tokenizer is not that of GPT-2"

    odd = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in odd):
        return "its model is not plain BPE"
    vocab = model["vocab"]
    if not all(character in vocab for character in BYTES) or max(*vocab.values(), len(model["merges"])) >> PIECE_BITS:
        return "a byte has no piece, or there are too many pieces"
    if any(
        left + right not in vocab or not set(left + right) <= BYTES.keys() for left, right in _pairs(model["merges"])
    ):
        return "a merge makes no piece of bytes"
    return ""


def _pairs(merges: list[str | list[str]]) -> list[tuple[str, str]]:
    """The merges of a file, which are pairs, or in older files texts with a space between the two."""
    found = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return [(left, right) for left, right in found]


def learn_classes(tables: ByteLevelTables, tokenizer: HuggingFaceTokenizer, text: str) -> None:
    """Ask the library for the class of each character of a text that is not known yet."""
    codes = np.array(sorted({ord(character) for character in set(text)}), np.int64)
    for code in codes[tables.classes[codes] == 0].tolist():
        tables.classes[code] = _class_of(tokenizer, chr(code))


def _class_of(tokenizer: HuggingFaceTokenizer, character: str) -> int:
    """What a character continues: letters, numbers or marks, or none of these."""
    cut = tokenizer.library.pre_tokenizer.pre_tokenize_str
    for kind, before in ((LETTER, "a"), (NUMBER, "1"), (MARK, "!")):
        if len(cut(before + character)) == 1:
            return kind
    return WHITE
