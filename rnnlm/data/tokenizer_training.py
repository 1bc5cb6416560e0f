"""Making a tokenizer of text: SentencePiece models of a sample, tables of counted words, or the bytes as they are.

SentencePiece's byte fallback is always on, so no text is ever unknown. Where tokenizer.vocab_size is 0, the size of the
vocabulary follows that of the text. The price: the rule knows neither the language nor the model that will be trained.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece

from rnnlm.config import TokenizerConfig
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.word_tokenizer import WordTokenizer
from rnnlm.errors import UserError

RESERVED = "\u2585"  # SentencePiece's trainer leaves out a whole text in which this stands
EOS_PIECE, UNKNOWN_PIECE = "</s>", "<unk>"
SCARCE_TOKENS = 100  # for each piece: below, its vector is hardly trained
COUNTED_BYTES = 4 * 2**20  # of text in which pieces are looked for that never occur


def vocab_size_for(text_bytes: int) -> int:
    """The number of pieces for a text of this size: 512 for 1 MB, 2,048 for 10 MB, 8,192 for 100 MB, 16,384 for 1 GB,
    32,768 from 6 GB on, always a power of two.

    Each piece has a row in the embedding and in the softmax, which must be met some hundred times to be of use: at
    about three bytes a token the rule leaves several hundred tokens for each piece of a small text, and thousands of a
    large one. Beyond 32,768 texts hardly become shorter, while the softmax costs in proportion.
    """
    decades = math.log10(max(1, text_bytes) / 1e6)
    small = 9 + 2 * decades  # from 2^9 at 1 MB, doubled twice for every tenfold, to 2^13 at 100 MB
    large = 13 + (decades - 2)  # doubled once for every tenfold
    return 1 << round(min(max(9, min(small, large)), 15))


def train(texts: Sequence[str], config: TokenizerConfig, text_bytes: int = 0) -> SentencePieceTokenizer:
    """Train a SentencePiece model on `texts`; the same texts give the same model.

    Args:
        text_bytes: of the corpus whose sample the texts are; 0: they are all of it.

    Raises:
        UserError: no text, or a vocabulary size that the text does not allow.
    """
    parts = [part for text in texts for part in text.split(RESERVED) if part]
    if not parts:
        raise UserError("corpus.train: no text in it that fits into tokenizer.sample_bytes; give a corpus with text")
    if config.vocab_size:
        return _train(parts, config, config.vocab_size)
    if config.kind == "char":
        return _train(parts, config, 2**24)  # as many as there are

    size = vocab_size_for(text_bytes or sum(len(text.encode()) for text in texts))
    try:
        return _train(parts, config, size)
    except VocabularyError as error:
        fitting = error.at_most or 2 ** error.at_least.bit_length()  # twice as many as its characters alone, about
    try:
        return _train(parts, config, fitting)
    except VocabularyError as error:
        return _train(parts, config, error.at_most or error.at_least)


class VocabularyError(UserError):
    """A vocabulary size that a text does not allow; what it does, where it is known."""

    def __init__(self, message: str, at_least: int = 0, at_most: int = 0):
        super().__init__(message)
        self.at_least, self.at_most = at_least, at_most


def _train(texts: Sequence[str], config: TokenizerConfig, vocab_size: int) -> SentencePieceTokenizer:
    """As `train`, with this many pieces."""
    model = io.BytesIO()
    # only where it is asked for: SentencePiece writes into the model what it is given
    options: dict[str, Any] = {"eos_piece": config.eos_piece} if config.eos_piece else {}

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=config.kind,
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=_normalization(config),
            remove_extra_whitespaces=not config.keep_whitespace,
            allow_whitespace_only_pieces=config.keep_whitespace,
            add_dummy_prefix=not config.keep_whitespace,
            user_defined_symbols=config.user_defined_symbols,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=2**30,  # the default silently skips documents above 4192 bytes
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error

    return SentencePieceTokenizer(model.getvalue())


def _normalization(config: TokenizerConfig) -> str:
    """SentencePiece's name of the rules; `auto` keeps the white space that is to be kept."""
    if config.normalization != "auto":
        return config.normalization
    return "nfkc" if config.keep_whitespace else "nmt_nfkc"


def _training_error(message: str, vocab_size: int) -> UserError:
    """SentencePiece's error, with what the text allows."""
    said = f"tokenizer.vocab_size={vocab_size}:"
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        way_out = f"use at most {found[1]}, or give more text"
        return VocabularyError(f"{said} larger than this text allows; {way_out}", at_most=int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        way_out = f"too small; the bytes and characters alone need {found[1]}"
        return VocabularyError(f"{said} {way_out}", at_least=int(found[1]))
    return UserError(f"tokenizer: SentencePiece cannot train: {message}")


def word_table(counts: Mapping[str, int], config: TokenizerConfig) -> WordTokenizer:
    """A tokenizer of the most frequent words; of equally frequent ones those come first whose bytes do.

    Raises:
        UserError: no words.
    """
    eos = config.eos_piece or EOS_PIECE
    words = [word for word, count in counts.items() if count >= config.min_count and word not in (eos, UNKNOWN_PIECE)]
    if not words:
        raise UserError(f"corpus.train: no word in it occurs tokenizer.min_count={config.min_count} times; give more")
    words.sort(key=lambda word: (-counts[word], word.encode()))
    kept = words[: max(0, config.vocab_size - 2)] if config.vocab_size else words
    entries = {piece: token for token, piece in enumerate([UNKNOWN_PIECE, eos, *kept])}
    return WordTokenizer.of(entries, eos=eos, unknown=UNKNOWN_PIECE)


def out_of_proportion(tokenizer: Tokenizer, texts: Sequence[str], text_bytes: int, bytes_per_token: float) -> str:
    """What is wrong with a vocabulary that is too large for its text; nothing where it is not.

    Args:
        texts: some of the text, in which pieces are looked for.
        text_bytes: of all of it.
    """
    size, fitting = tokenizer.vocab_size, vocab_size_for(text_bytes)
    each = text_bytes / bytes_per_token / size
    if each >= SCARCE_TOKENS or size <= fitting:
        return ""

    found, read = set[int](), 0
    for text in texts:
        found.update(tokenizer.encode(text))
        read += len(text.encode())
        if read > COUNTED_BYTES:
            break
    return (
        f"{size:,} pieces are many for {text_bytes / 1e6:.3g} MB of text: {each:.0f} tokens for each, and "
        f"{size - len(found):,} occur nowhere in {read / 1e6:.3g} MB of it; "
        f"tokenizer.vocab_size={fitting} would fit, and 0 chooses it"
    )
