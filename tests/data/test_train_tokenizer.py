"""The tools that make tokenizers and streams: every kind from text to stream, what is refused or warned of."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunHere, make_text

from rnnlm.data.stream import TokenStream

TRAIN, BUILD = "tools/train_tokenizer.py", "tools/build_stream.py"
Tool = Callable[..., str]


@pytest.fixture
def tool(run_here: RunHere, tmp_path: Path) -> Tool:
    """Run a tool on text.txt of 300 documents; what it prints. An error where `refused` is given."""
    (tmp_path / "text.txt").write_text("\n".join(make_text(300)), encoding="utf-8")

    def run(script: str, *options: str, refused: bool = False) -> str:
        done = run_here(script, "--corpus.train=text.txt", "--stream.directory=s", *options)
        assert done.returncode == (2 if refused else 0), done.stderr
        return done.stdout + done.stderr

    return run


def test_words_of_a_tokenised_text(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("anna <unk> <unk> a zebra\n")
    options = ("--tokenizer.kind=word", "--corpus.valid=valid.txt")
    said = tool(TRAIN, *options)

    words = [text.split() for text in make_text(300)]
    types = {word for text in words for word in text}
    assert f"s/words.txt: {len(types) + 2} pieces (word)" in said
    assert "0 of " in said and "words of the text are unknown (0.00%)" in said
    assert "1 tokens" not in tool(BUILD, *options)
    assert TokenStream(tmp_path / "s/train").tokens == sum(map(len, words)) + 300
    valid = TokenStream(tmp_path / "s/valid")
    assert (valid.tokens, valid.manifest.unknown_tokens) == (6, 3)
    assert valid.tokenizer().decode(valid.shard(0)) == "anna <unk> <unk> a <unk>"


def test_documents_of_valid_do_not_shape_a_table_of_words(tool: Tool, tmp_path: Path) -> None:
    options = ("--tokenizer.kind=word", "--stream.valid_fraction=0.3")
    tool(TRAIN, *options)
    tool(BUILD, *options)
    assert TokenStream(tmp_path / "s/train").manifest.unknown_tokens == 0
    (tmp_path / "text.txt").write_text("\n".join(f"w{i}" for i in range(100)))
    tool(TRAIN, *options, "--tokenizer.model=other.txt")
    assert 50 < len((tmp_path / "other.txt").read_text().splitlines()) < 95


def test_bytes_need_no_text(tool: Tool, run_here: RunHere, tmp_path: Path) -> None:
    said = run_here(TRAIN, "--tokenizer.kind=byte", "--stream.directory=s").stdout
    assert said == "s/bytes.txt: 257 ids: the bytes of UTF-8, and EOS\n"
    said = tool(BUILD, "--tokenizer.kind=byte", "--stream.valid_fraction=0")
    assert said.startswith("each byte is its own id\n"), "how texts are encoded is said first"
    stream = TokenStream(tmp_path / "s/train")
    text = (tmp_path / "text.txt").read_bytes()
    assert stream.shard(0).tolist() == [256 if byte == 10 else byte for byte in text] + [256]


def test_the_size_of_a_vocabulary_is_chosen_and_said(tool: Tool) -> None:
    said = tool(TRAIN)
    size = re.search(r"(\d+) pieces \(bpe\), chosen by the size of the text \(tokenizer.vocab_size=0\)", said)
    assert size, said
    assert "warning" not in said
    assert f"is already there: {size[1]} pieces (bpe); remove it to train another" in tool(TRAIN)
    assert f"{size[1]} pieces" in tool(TRAIN, f"--tokenizer.vocab_size={size[1]}")


def test_a_vocabulary_too_large_for_its_text_is_trained_with_a_warning(tool: Tool, tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(900)))
    said = tool(TRAIN, "--tokenizer.vocab_size=600")
    assert re.search(r"warning: 600 pieces are many for 0.0\d+ MB of text: \d+ tokens for each, and \d+ occur no", said)
    assert "chosen" not in said


def test_another_size_or_kind_than_that_of_the_tokenizer_that_is_there_is_refused(tool: Tool) -> None:
    tool(TRAIN, "--tokenizer.vocab_size=300")
    for script in (TRAIN, BUILD):
        said = tool(script, "--tokenizer.vocab_size=4096", refused=True)
        assert "tokenizer.vocab_size=4096: s/tokenizer.model is there with 300 pieces; remove it to train" in said
        said = tool(script, "--tokenizer.kind=word", refused=True)
        assert "tokenizer.kind=word: s/tokenizer.model is there, of kind bpe" in said


def test_values_that_cannot_work(tool: Tool) -> None:
    said = tool(TRAIN, f"--tokenizer.vocab_size={2**31}", refused=True)
    assert said == "error: tokenizer.vocab_size=2147483648: must be at most 16777216\n"
    said = tool(TRAIN, "--tokenizer.keep_whitespace=true", "--tokenizer.normalization=nmt_nfkc", refused=True)
    assert "tokenizer.keep_whitespace=True is to keep; use nfkc or identity" in said


def test_a_recognisers_table_needs_no_training(tool: Tool, tmp_path: Path) -> None:
    tool(TRAIN, "--tokenizer.vocab_size=300", "--tokenizer.model=bpe.model")
    from rnnlm.data.tokenizer import Tokenizer

    model = Tokenizer.load(tmp_path / "bpe.model")
    pieces = [model.piece(token) for token in range(300) if token != model.eos_id]
    (tmp_path / "tokens.txt").write_text("\n".join(["<blk>", *pieces, "<sos/eos>"]), encoding="utf-8")

    theirs = ("--tokenizer.model=bpe.model", "--tokenizer.table=tokens.txt", "--tokenizer.eos_piece=<sos/eos>")
    assert tool(TRAIN, *theirs) == "tokens.txt: 301 ids, <sos/eos> is 300; nothing to train\n"
    assert tool(BUILD, *theirs).startswith("texts are encoded by words, new words by compiled kernels\n")
    stream = TokenStream(tmp_path / "s/train")
    assert (stream.manifest.vocab_size, stream.manifest.eos_id) == (301, 300)
    assert stream.manifest.eos_tokens == stream.manifest.documents
    assert "anna" in stream.tokenizer().decode(stream.shard(0)[:200])
