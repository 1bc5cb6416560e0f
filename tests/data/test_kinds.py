"""Every kind of tokenizer: what it promises, by the encoder and in a stream; words and bytes exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm.config import Config, CorpusConfig, StreamConfig, TokenizerConfig
from rnnlm.data.build.build import Build
from rnnlm.data.byte_tokenizer import ByteTokenizer
from rnnlm.data.encoder import Encoder
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer, find
from rnnlm.data.tokenizer_training import train
from rnnlm.data.word_tokenizer import WordTokenizer
from rnnlm.errors import UserError

WORDS = WordTokenizer.of(
    {"<unk>": 0, "</s>": 1, "the": 2, "cat": 3, "a\u2581b": 4, "é": 7}, eos="</s>", unknown="<unk>"
)
CHARACTERS = WordTokenizer.of(
    {"<blk>": 0, "<sos/eos>": 5, "<unk>": 2, "<space>": 3, "a": 1, "é": 4, "漢": 6},
    eos="<sos/eos>", unknown="<unk>", space="<space>", characters=True, silent=["<blk>"],
)  # fmt: skip
UNSPACED = WordTokenizer.of({"<unk>": 0, "<eos>": 1, "a": 2, "漢": 3}, eos="<eos>", unknown="<unk>", characters=True)
KINDS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(), "word": WORDS, "characters": CHARACTERS, "no space": UNSPACED,
    "bpe": train(make_text(300), TokenizerConfig(vocab_size=300)),
}  # fmt: skip
TEXT = st.lists(
    st.sampled_from(["the", "cat", "<unk>", "</s>", "é", "漢a", " ", "  ", "\n", "\t", "\u3000", "\xa0", "\x1c", "x"])
).map("".join)


@pytest.mark.parametrize("name", ["byte", "word", "characters", "no space"])
@settings(max_examples=30)
@given(texts=st.lists(TEXT | st.text(), min_size=1, max_size=5), size=st.integers(1, 9))
def test_the_encoder_gives_what_the_tokenizer_does(name: str, texts: list[str], size: int) -> None:
    tokenizer = KINDS[name]
    encoder = ENCODERS.setdefault(name, Encoder(tokenizer))
    ids, tokens, words = encoder.encode([text.encode() for text in texts])
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert ids.tolist() == [token for each in expected for token in each]
    assert tokens.tolist() == [len(each) for each in expected]
    assert words.tolist() == [len(text.split()) for text in texts]

    parts = [texts[0][start : start + size].encode() for start in range(0, len(texts[0]) + 1, size)]
    blocks = list(encoder.encode_long(iter(parts)))
    assert np.concatenate([block for block, _ in blocks]).tolist() == expected[0]
    assert sum(count for _, count in blocks) == len(texts[0].split())


ENCODERS: dict[str, Encoder] = {}


@pytest.mark.parametrize("name", KINDS)
@given(text=TEXT)
def test_streaming_equals_decoding(name: str, text: str) -> None:
    tokenizer = KINDS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids, "no text says EOS"
    decoder = tokenizer.decoder([tokenizer.eos_id])
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode([*ids, tokenizer.eos_id])


@given(st.text())
def test_bytes_are_exact(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_is_what_str_split_finds_and_each_unknown_one_is_a_token() -> None:
    assert WORDS.encode("  the\tcat <unk> <unk> dog\u3000the </s>") == [2, 3, 0, 0, 0, 2, 0]
    assert WORDS.decode([2, 3, 1, 0, 4]) == "the cat <unk> a\u2581b"
    assert WORDS.vocab_size == 8, "an id without an entry, 5, takes a place too"
    assert [WORDS.piece(token) for token in (0, 5, 7)] == ["<unk>", "<no piece 5>", "é"]


def test_characters_of_a_table() -> None:
    assert CHARACTERS.encode(" a é  漢x<blk>") == [1, 3, 4, 3, 6, 2, *[2] * 5]
    assert CHARACTERS.decode([0, 1, 3, 4, 5]) == "a é"
    assert UNSPACED.encode("a 漢") == [2, 3]


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_holds_its_tokenizer_under_the_name_of_its_kind(name: str, tmp_path: Path) -> None:
    tokenizer = KINDS[name]
    (tmp_path / "text.txt").write_text("the cat\nthe dog é漢\n", encoding="utf-8")
    config = Config(
        corpus=CorpusConfig(train=str(tmp_path / "text.txt")),
        stream=StreamConfig(directory=str(tmp_path), valid_fraction=0),
    )
    Build(config, tokenizer).run(lambda size: None)
    stream = TokenStream(tmp_path / "train")
    assert (tmp_path / "train" / tokenizer.file_name).read_bytes() == tokenizer.model
    assert next(stream.verify()) == (tokenizer.file_name, len(tokenizer.model))
    assert len(list(stream.verify())) == 5
    assert type(stream.tokenizer()) is type(tokenizer)
    assert stream.tokens == sum(len(tokenizer.encode(text)) + 1 for text in ("the cat", "the dog é漢"))


def test_of_two_tokenizers_in_a_directory_the_digest_tells_which(tmp_path: Path) -> None:
    for tokenizer in (WORDS, KINDS["bpe"]):
        (tmp_path / tokenizer.file_name).write_bytes(tokenizer.model)
    assert Tokenizer.load(tmp_path, WORDS.digest).model == WORDS.model
    assert Tokenizer.load(tmp_path, KINDS["bpe"].digest).model == KINDS["bpe"].model
    with pytest.raises(UserError, match=r"tokenizer.model and .*words.txt: which one is the tokenizer\?"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"# rnnlm bytes 2\n", "not the file of a byte tokenizer"),
        (b"# rnnlm words 1 {\n", "its first line is '# rnnlm words 1 {'"),
        (b"# rnnlm words 1 []\n", "its first line is"),
        (b'# rnnlm words 1 {"eos": "b", "unknown": "a"}\na 0\n', "its eos piece 'b' has no id"),
        (b'# rnnlm words 1 {"eos": "a", "unknown": "b"}\na 0\na 1\n', "line 3 is 'a 1'"),
        (b'# rnnlm words 1 {"eos": "a", "unknown": "b"}\na 0\nb 0\n', "line 3 is 'b 0'"),
        (b'# rnnlm words 1 {"eos": "a", "unknown": "b"}\na -1\n', "line 2 is 'a -1'"),
        (b'# rnnlm words 1 {"eos": "a", "unknown": "b", "silent": 3}\na 0\nb 1\n', "silent in its first line"),
        (b"# rnnlm words 1 \xff\n", "not a table of words"),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path: Path, model: bytes, message: str) -> None:
    (tmp_path / "mine").write_bytes(model)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "mine")
