"""The encoder gives SentencePiece's ids, whatever the model, the options and the text, however small its table."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import RunHere, make_text
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.data.encoder import Encoder, prepare
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer, parse
from rnnlm.data.tokenizer import Tokenizer

TEXTS = [
    *make_text(300),
    "naïve café ﬁne Ⅷ ｆｕｌｌ a\u0308o\u0301 don't stop-it, (really) x+y 漢字仮名 καλημέρα 🎉👩‍👩‍👧",
] * 2


def model(**options: Any) -> Tokenizer:
    """A model trained by SentencePiece itself, on its defaults but for these options."""
    out = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=out, minloglevel=2, **{**defaults, **options}
    )
    return SentencePieceTokenizer(out.getvalue())


def keeping(**options: Any) -> dict[str, Any]:
    return {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, **options}


BY_WORDS = {
    "default": {},
    "folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "identity": {"normalization_rule_name": "identity"},
    "identity kept": keeping(normalization_rule_name="identity", add_dummy_prefix=False),
    "kept": keeping(),
    "kept bare": keeping(add_dummy_prefix=False),
    "bare": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
    "no bytes kept": keeping(byte_fallback=False, vocab_size=150),
    "characters": {"model_type": "char"},
    "symbols": {"user_defined_symbols": ["<user>", "sees", "▁the", "x", "é"]},
    "rules": {"normalization_rule_name": "user", "rules": [("ab", "c d"), ("e", " "), ("o", ""), ("é", "e\u0301  ")]},
    "tab is the sign itself": {"normalization_rule_name": "user", "rules": [("\t", "\u2581")]},
}
WHOLE = {
    "unigram": {"model_type": "unigram"},
    "suffix": {"treat_whitespace_as_suffix": True},
    "spanning": {"split_by_whitespace": False},
    "symbols with spaces": {"user_defined_symbols": ["anna sees", "a\u2581b"]},
    "a space for x": {"normalization_rule_name": "user", "rules": [("x", "\u2581")], "add_dummy_prefix": False},
    "a space is the sign itself": {"normalization_rule_name": "user", "rules": [(" ", "\u2581")]},
    "rules with spaces": {"normalization_rule_name": "user", "rules": [("a b", "c")]},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name, options in {**BY_WORDS, **WHOLE}.items():
        options = dict(options)
        if rules := options.pop("rules", None):
            path = tmp_path_factory.mktemp("rules") / "rules.tsv"
            in_hex = [[" ".join(f"{ord(c):x}" for c in side) for side in rule] for rule in rules]
            path.write_text("".join(f"{source}\t{target}\n" for source, target in in_hex))
            options = {**options, "normalization_rule_tsv": str(path)}
            del options["normalization_rule_name"]
        found[name] = model(**options)
    return found


@pytest.fixture(scope="module")
def encoders(tokenizers: dict[str, Tokenizer]) -> dict[str, Encoder]:
    return {name: Encoder(tokenizer) for name, tokenizer in tokenizers.items()}


SPACES = " \t\n\r\x0b\x0c\x00\x1c\x1f\x85\xa0\u1680\u2000\u200a\u200b\u200d\u2028\u2029\u202f\u205f\u3000\ufeff\u2581"
MARKS = "\u0300\u0301\u0308\u0345\u3099\u20dd\ufe0f\u0e33"
ODD = st.sampled_from(SPACES + MARKS + "¨´¯ﷺﹰ゛‗ﬀİıſKÅẞ<>anebdox.'é")
FRAGMENTS = st.one_of(
    st.text(ODD, max_size=6),
    st.text(max_size=8),
    st.sampled_from(["anna sees the cat", " ", "  ", "Zoë", "<user>", "the", "naïve", "a\u2581b", "a b", "ab", "e o"]),
    st.builds(
        lambda text, times: text * times, st.sampled_from(["ab", "x", " ", "漢", "sees", "é "]), st.integers(1, 90)
    ),
)
DOCUMENTS = st.lists(st.lists(FRAGMENTS, max_size=6).map("".join), max_size=5)


def expected(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int], list[int]]:
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    return [*chain.from_iterable(ids)], list(map(len, ids)), [len(text.split()) for text in texts]


def check(encoder: Encoder, texts: list[str]) -> None:
    found = encoder.encode([text.encode() for text in texts])
    assert tuple(array.tolist() for array in found) == expected(encoder.tokenizer, texts), texts


def check_blocks(encoder: Encoder, text: str, cuts: list[int]) -> None:
    blocks, rest = [], text
    for cut in cuts:
        blocks.append(rest[:cut].encode())
        rest = rest[cut:]

    found = list(encoder.encode_long(iter([*blocks, rest.encode()])))
    ids, _, words = expected(encoder.tokenizer, [text])
    assert np.concatenate([ids for ids, _ in found]).tolist() == ids
    assert sum(words for _, words in found) == words[0]


@pytest.mark.parametrize("name", [*BY_WORDS, *WHOLE])
@given(texts=DOCUMENTS)
def test_any_text_has_sentencepieces_ids(encoders: dict[str, Encoder], name: str, texts: list[str]) -> None:
    check(encoders[name], texts)


Score = Callable[[int, float], float]


def edited(tokenizer: Tokenizer, added: dict[str, float], score: Score) -> Tokenizer:
    """A model with more pieces and other scores, as other people's have them; score: of a number and its own score."""
    proto = parse(tokenizer.model)
    there = {piece.piece for piece in proto.pieces}
    for piece, own in added.items():
        if piece not in there:
            proto.pieces.add(piece=piece, score=own)
    for number, piece in enumerate(proto.pieces):
        piece.score = score(number, piece.score)
    return SentencePieceTokenizer(proto.SerializeToString())


CODE = [
    "if (anna  sees) {\r\n    the cat;\r\n}\r\n", "a {\r", "{\r{\r \r\n", "(the\n)\nanna)\n )", "\n\n\n",
    " \n x\t\t\ty", "x\n", "\nx", "a" + " " * 40 + "b" + " " * 7 + "c  ", "see" * 30, "cat\n" * 30,
    "the dog\u2581\u2581 \u2581x", "",
]  # fmt: skip


@pytest.mark.parametrize(
    ("added", "score"),
    [
        # LLaMA-2 and Mistral: line ends in pieces, and runs of spaces, all of which are equally good
        (
            {"{": -9.0, "\r": -9.5, "{\r": -3.5, "\u2581" * 2: -1e9, "\u2581" * 4: -1e9, "\u2581" * 9: -1e9},
            lambda _, own: own,
        ),
        ({")\n": -0.5, "\n": -80.0, ")": -81.0, "\u2581\n": -82.0}, lambda _, own: own),
        ({"\n\n": -0.5, "\n": -80.0}, lambda number, _: -(number % 7)),  # where merges are equal, the leftmost is first
        ({}, lambda number, own: 0.0),
    ],
)
def test_models_that_people_bring_are_compiled(
    added: dict[str, float], score: Score, tokenizers: dict[str, Tokenizer]
) -> None:
    for name in ("identity kept", "identity"):
        encoder = Encoder(edited(tokenizers[name], added, score), batch_bytes=64)
        assert encoder.path.endswith("compiled kernels")
        check(encoder, [*CODE, *TEXTS[:40]])
        check_blocks(encoder, " ".join(CODE), [5] * 60)


def test_words_without_user_defined_symbols_are_compiled(tokenizers: dict[str, Tokenizer]) -> None:
    proto = parse(tokenizers["default"].model)
    proto.pieces.add(piece="[INST]", score=0.0, type=proto.pieces[0].USER_DEFINED)
    encoder = Encoder(SentencePieceTokenizer(proto.SerializeToString()))
    assert encoder.path.endswith("compiled kernels")
    check(encoder, ["[INST] anna [INST]sees[INST]", "a[INST", "[[INST]]", *TEXTS[:20]])


def test_a_document_larger_than_any_text_is_cut_under_these_models(tokenizers: dict[str, Tokenizer]) -> None:
    encoder = Encoder(edited(tokenizers["identity kept"], {"{\r": -3.5, "\r": -9.0}, lambda number, own: own))
    text = "if (anna sees) {\r\n  the cat;\r\n}\r\n" * 40_000
    blocks = (text[at : at + 2**16].encode() for at in range(0, len(text), 2**16))
    found = list(encoder.encode_long(blocks, max_word_bytes=2**18))
    assert max(len(ids) for ids, _ in found) < 2**18
    assert np.concatenate([ids for ids, _ in found]).tolist() == expected(encoder.tokenizer, [text])[0]


def test_an_encoder_says_how_it_encodes(tokenizers: dict[str, Tokenizer], encoders: dict[str, Encoder]) -> None:
    ends = {name: prepare(tokenizers[name]) for name in ("default", "characters", "unigram")}
    assert ends["default"].endswith("by words, new words by compiled kernels")
    assert "new words by the tokenizer's library: the model has no merges" in ends["characters"]
    assert "whole by the tokenizer's library" in ends["unigram"] and "a unigram model" in ends["unigram"]
    assert encoders["default"].path == ends["default"]


def test_random_models(run_here: RunHere) -> None:
    done = run_here("tools/fuzz_encoder.py", "--models=2", "--texts=40", "--seed=3")
    assert done.returncode == 0 and "2 models, 80 texts, 0 mismatches" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_many_random_models(run_here: RunHere) -> None:
    done = run_here("tools/fuzz_encoder.py", "--models=80", "--texts=500", "--seed=4")
    assert done.returncode == 0 and "80 models, 40,000 texts, 0 mismatches" in done.stdout, done.stdout + done.stderr


def test_models_that_need_whole_texts_are_known(encoders: dict[str, Encoder]) -> None:
    assert {name for name, encoder in encoders.items() if not encoder.why_whole} == set(BY_WORDS)
    assert "unigram" in encoders["unigram"].why_whole
    assert (
        "anna" in encoders["symbols with spaces"].why_whole or "a\u2581b" in encoders["symbols with spaces"].why_whole
    )
    assert "rule" in encoders["rules with spaces"].why_whole


@pytest.mark.parametrize("name", ["default", "identity kept", "symbols", "no bytes kept"])
def test_a_table_that_forgets_changes_nothing(tokenizers: dict[str, Tokenizer], name: str) -> None:
    encoder = Encoder(tokenizers[name], batch_bytes=128, max_words=32)
    for batch in range(20):
        check(encoder, [f"{text} {batch * 7}{index}" for index, text in enumerate(make_text(30, seed=batch))])
        check(encoder, ["a " * 300, " b" * 100, "word" * 100, " " * 500, "c\u3000 d " * 40, "\u200b " * 60])
    assert encoder._table.counts[0] < 160


@pytest.mark.parametrize("name", BY_WORDS)
@given(text=DOCUMENTS.map(" ".join), cuts=st.lists(st.integers(1, 40), max_size=30))
def test_a_long_document_may_come_in_any_blocks(
    encoders: dict[str, Encoder], name: str, text: str, cuts: list[int]
) -> None:
    check_blocks(encoders[name], text, cuts)


def test_characters_that_become_many_bytes_overrun_nothing() -> None:
    """Six ids for each byte, of words that are all new: more than the store of ids had room for."""
    encoder = Encoder(model(vocab_size=420))
    texts = [f"a{number}" + "\u3316" * 24 for number in range(6000)]
    for first in range(0, len(texts), 1000):
        check(encoder, texts[first : first + 1000])


def test_a_word_without_end_is_refused(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(OverflowError, match="a word of 1,0"):
        list(encoders["default"].encode_long((b"x" * 10 for _ in range(10**6)), max_word_bytes=1000))
