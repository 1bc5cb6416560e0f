"""Tokenizers that are trained: nothing is unknown, streaming equals decoding; vocabularies fit their text."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import sentencepiece
from conftest import make_text
from hypothesis import example, given
from hypothesis import strategies as st

from rnnlm.config import Config, TokenizerConfig
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_training import out_of_proportion, train, vocab_size_for, word_table
from rnnlm.errors import UserError
from rnnlm.faults import find_faults

TEXTS = make_text(300)
EXACT = train(TEXTS, TokenizerConfig(vocab_size=300, normalization="identity", keep_whitespace=True))
KINDS = {
    "bpe": train(TEXTS, TokenizerConfig(vocab_size=300)),
    "unigram": train(TEXTS, TokenizerConfig(vocab_size=285, kind="unigram")),
    "char": train(TEXTS, TokenizerConfig(vocab_size=400, kind="char")),
}


@given(st.text())
def test_kept_whitespace_and_identity_lose_nothing(text: str) -> None:
    ids = EXACT.encode(text)
    assert EXACT.decode(ids) == text.replace("\u2581", " ")  # SentencePiece's own sign for a space cannot be told apart


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
def test_no_text_is_unknown_and_streaming_equals_decoding(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert 0 not in ids and tokenizer.eos_id not in ids
    decoder = tokenizer.decoder([tokenizer.eos_id])
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)


@given(st.lists(st.integers(2, 299), max_size=12))
@example([34])  # <0x20>
def test_streaming_any_ids_a_model_may_draw(ids: list[int]) -> None:
    for tokenizer in (EXACT, KINDS["bpe"]):
        decoder = tokenizer.decoder()
        text = "".join(map(decoder.push, ids)) + decoder.finish()
        # SentencePiece writes U+FFFD for every byte of a broken character, Python once
        assert re.sub("\ufffd+", "?", text) == re.sub("\ufffd+", "?", tokenizer.decode(ids))


def test_incomplete_characters_are_held_back() -> None:
    decoder = EXACT.decoder()
    ids = EXACT.encode("é🎉")
    assert len(ids) == 6, "written as bytes"
    assert [decoder.push(token) for token in ids] == ["", "é", "", "", "", "🎉"]
    cut = EXACT.decoder()
    assert cut.push(ids[0]) == ""
    assert cut.finish() == "\ufffd"


def test_options_do_what_they_say() -> None:
    folded = train(TEXTS, TokenizerConfig(vocab_size=300, normalization="nmt_nfkc_cf"))
    assert folded.decode(folded.encode("ANNA Sees  ＺＯË")) == "anna sees zoë"
    symbols = train(TEXTS, TokenizerConfig(vocab_size=300, user_defined_symbols=["<user>"]))
    assert len(symbols.encode("<user>")) == 2  # the leading space, and the symbol
    assert train(TEXTS, TokenizerConfig(vocab_size=300)).model == KINDS["bpe"].model, "same text, same model"


def test_vocabulary_faults_say_what_the_text_allows() -> None:
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=5000: larger than this text allows; use at most \d+"):
        train(TEXTS, TokenizerConfig(vocab_size=5000))
    with pytest.raises(
        UserError, match=r"tokenizer.vocab_size=100: too small; the bytes and characters alone need \d+"
    ):
        train(TEXTS, TokenizerConfig(vocab_size=100))
    with pytest.raises(UserError, match="no text in it"):
        train([], TokenizerConfig())


def test_foreign_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.model: No such file.*train_tokenizer.py"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"nonsense")

    out = io.BytesIO()
    options = {"sentence_iterator": iter(TEXTS), "model_writer": out, "vocab_size": 60, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**options, model_type="bpe")  # no byte fallback, its own ids
    theirs = SentencePieceTokenizer(out.getvalue())
    ids = theirs.encode("anna sees Q")
    decoder = theirs.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == theirs.decode(ids) == "anna sees  ⁇ "

    out = io.BytesIO()
    options = {"sentence_iterator": iter(TEXTS), "model_writer": out, "vocab_size": 60, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**options, model_type="bpe", eos_id=-1)
    with pytest.raises(UserError, match="has no EOS piece"):
        SentencePieceTokenizer(out.getvalue())


def test_line_ends_and_tabs_are_kept_where_white_space_is() -> None:
    kept = train(TEXTS, TokenizerConfig(vocab_size=300, keep_whitespace=True))
    text = "def f():\n\tif x:\n\t\treturn  1\r\n"
    assert kept.decode(kept.encode(text)) == text
    assert kept.decode(kept.encode("Ａ")) == "A", "other characters are normalised all the same"
    assert train(TEXTS, TokenizerConfig(vocab_size=300, normalization="nmt_nfkc")).model == KINDS["bpe"].model

    rules = TokenizerConfig(keep_whitespace=True, normalization="nmt_nfkc_cf")
    assert find_faults(Config(tokenizer=rules)) == [
        "tokenizer.normalization=nmt_nfkc_cf: makes spaces of line ends and tabs, which "
        "tokenizer.keep_whitespace=True is to keep; use nfkc_cf or identity"
    ]


def test_a_text_with_sentencepieces_own_sign_is_not_left_out() -> None:
    """SentencePiece's trainer drops every text that holds U+2585."""
    texts = [*TEXTS, *["zebra quiz \u2585 zebra quiz"] * 50]
    tokenizer = train(texts, TokenizerConfig(vocab_size=320))
    assert "z" in {tokenizer.piece(token) for token in range(tokenizer.vocab_size)}, "no other text has it"
    assert tokenizer.decode(tokenizer.encode("a \u2585 b")) == "a \u2585 b"


def test_the_vocabulary_follows_the_size_of_the_text() -> None:
    sizes = {1e3: 512, 1e6: 512, 1e7: 2048, 3e7: 4096, 1e8: 8192, 1e9: 16384, 1e10: 32768, 1e13: 32768}
    assert {size: vocab_size_for(int(size)) for size in sizes} == sizes

    text = make_text(3000)
    assert train(text, TokenizerConfig()).vocab_size == train(text, TokenizerConfig(), 10**6).vocab_size
    assert train(TEXTS[:20], TokenizerConfig()).vocab_size < 512, "as many as a short text allows"
    many = ["".join(chr(0x4E00 + (7 * i + j) % 3000) for j in range(60)) for i in range(300)]
    assert train(many, TokenizerConfig(character_coverage=1.0)).vocab_size > 3000, "room for all characters"
    every = train(TEXTS, TokenizerConfig(kind="char", character_coverage=1.0))
    assert {every.piece(token) for token in range(every.vocab_size)} >= {*"".join(TEXTS)} - {" "}


def test_a_vocabulary_out_of_proportion_is_said() -> None:
    table = word_table({f"w{i}": 1 for i in range(998)}, TokenizerConfig(kind="word"))
    texts = ["w1 w2 w3", "w1 " * 17_000]
    assert out_of_proportion(table, texts, 150_000, 3.0) == (
        "1,000 pieces are many for 0.15 MB of text: 50 tokens for each, and 997 occur nowhere in 0.051 MB of it; "
        "tokenizer.vocab_size=512 would fit, and 0 chooses it"
    )
    assert out_of_proportion(table, texts, 400_000, 3.0) == "", "133 tokens for each"
    assert out_of_proportion(KINDS["bpe"], texts, 1000, 3.0) == "", "no smaller one would be chosen"


def test_words_are_counted_most_frequent_first_and_ties_go_by_their_bytes() -> None:
    counts = {"b": 2, "a": 2, "é": 2, "c": 5, "rare": 1, "<unk>": 9, "</s>": 4}
    table = word_table(counts, TokenizerConfig(kind="word", min_count=2))
    assert [table.piece(token) for token in range(table.vocab_size)] == ["<unk>", "</s>", "c", "a", "b", "é"]
    reverse = word_table(dict(reversed(counts.items())), TokenizerConfig(kind="word", min_count=2))
    assert reverse.model == table.model
    assert word_table(counts, TokenizerConfig(kind="word", vocab_size=4)).vocab_size == 4
    assert word_table(counts, TokenizerConfig(kind="word", eos_piece="<eos>")).piece(1) == "<eos>"
    with pytest.raises(UserError, match=r"no word in it occurs tokenizer.min_count=10 times"):
        word_table(counts, TokenizerConfig(kind="word", min_count=10))
