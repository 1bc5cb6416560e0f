"""Tokenizer: nothing is unknown, streaming equals decoding, samples are bounded and ignore order."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from conftest import make_text
from hypothesis import example, given
from hypothesis import strategies as st

from rnnlm.config import TokenizerConfig
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_training import Sample, train
from rnnlm.errors import UserError

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


def test_sample_is_bounded_and_ignores_order() -> None:
    texts = make_text(2000, seed=1)
    shuffled = random.Random(0).sample(texts, len(texts))
    samples = [Sample(10_000, seed) for seed in (0, 0, 1)]
    for sample, source in zip(samples, (texts, shuffled, texts), strict=True):
        for text in source:
            sample.add(text)
            assert sample.kept_bytes <= 10_000
    assert samples[0].texts() == samples[1].texts() != samples[2].texts()
    assert samples[0].kept_bytes == sum(len(text.encode()) for text in samples[0].texts()) > 9_500
    assert samples[0].seen_bytes == sum(len(text.encode()) for text in texts)


def test_long_documents_enter_the_sample_whole_in_excerpts() -> None:
    sample = Sample(10**6, 0)
    text = " ".join(f"word{i}" for i in range(20_000)) + "x" * 50_000
    sample.add(text)
    assert sample.seen_bytes == len(text)
    assert sorted("".join(sample.texts())) == sorted(text)
    assert max(map(len, sample.texts())) <= 16_384
