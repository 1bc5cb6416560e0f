"""Prompts that end inside a token continue as a text does."""

from __future__ import annotations

import pytest
import torch
from conftest import make_text

from rnnlm.config import GenerateConfig, ModelConfig, TokenizerConfig
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_training import train
from rnnlm.model.generate import continuations
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.prompt import PieceTable, Prompt

PLAY = ["ROMEO:\nWhat light is this?\n\nJULIET:\nO Romeo, Romeo!\n\n"] * 20


@pytest.fixture(scope="module")
def joining() -> Tokenizer:
    """A tokenizer in which a colon and the line end behind it are one piece, or part of one."""
    config = TokenizerConfig(vocab_size=320, normalization="identity", keep_whitespace=True)
    tokenizer = train(PLAY, config)
    assert any(tokenizer.piece(token).endswith(":\n") for token in range(tokenizer.vocab_size))
    return tokenizer


def model_of(tokenizer: Tokenizer, favourite: list[int]) -> RecurrentLM:
    """A model that would write these tokens rather than others, the first ones most of all."""
    model = RecurrentLM(ModelConfig(embedding_size=4, hidden_size=4, layers=1), tokenizer.vocab_size, seed=1)
    model.head.bias.data.zero_()
    for rank, token in enumerate(favourite):
        model.head.bias.data[token] = 1000.0 - rank
    return model


def test_a_prompt_that_ends_inside_a_piece_is_continued(joining: Tokenizer) -> None:
    """`ROMEO:` alone has other tokens than in the text, after which a trained model knows no continuation."""
    wanted = joining.encode("ROMEO:\nWhat light")
    assert joining.encode("ROMEO:") != wanted[: len(joining.encode("ROMEO:"))], "else nothing is shown"
    model = model_of(joining, [joining.eos_id, *wanted])  # EOS would end it at once
    text = continuations(model, joining, ["ROMEO:"], GenerateConfig(temperature=0, max_tokens=1))[0, 0]
    assert text.startswith("ROMEO:\n")


@pytest.mark.parametrize("text", ["ROMEO:", "What li", "ROMEO", "this? ", "Romeo, Rom", "漢", "x", "", " "])
def test_what_is_drawn_for_the_prompt_is_the_prompt(joining: Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    """Any token that agrees leads to the same text at last, which is not repeated."""
    for each in (joining, tokenizer):
        prompt = PieceTable(each).split(text)
        decoder = each.decoder([each.eos_id, *prompt.ids])
        rest, written = prompt.rest, ""
        while rest:  # the shortest that agrees: one byte often
            token = min(PieceTable(each).agreeing(rest), key=lambda token: (len(each.piece_bytes(token)), token))
            written, rest = written + decoder.push(token), rest[len(each.piece_bytes(token)) :]
        assert len(written) == prompt.characters
        assert (each.decode(prompt.ids) + written).strip() == each.decode(each.encode(text)).strip()


def test_only_tokens_that_can_be_completed_agree(tokenizer: Tokenizer) -> None:
    """Against all tokens, and all ways to go on."""
    table, pieces = PieceTable(tokenizer), list(map(tokenizer.piece_bytes, range(tokenizer.vocab_size)))
    pieces[list(map(tokenizer.piece, range(300))).index("<0x20>")] = b""
    for rest in (b" anna", b"a", "漢".encode(), b" the c"):
        expected = [t for t, piece in enumerate(pieces) if piece and (piece.startswith(rest) or rest.startswith(piece))]
        assert list(table.agreeing(rest)) == expected, "with bytes, every beginning can be completed"


def test_a_beginning_that_nothing_completes_does_not_agree() -> None:
    class Few:
        """A tokenizer of four pieces, without bytes."""

        vocab_size = 4

        def piece_bytes(self, token: int) -> bytes:
            return (b"ab", b"a", b"bc", b"abcd")[token]

        def piece(self, token: int) -> str:
            return self.piece_bytes(token).decode()

    table = PieceTable(Few())  # type: ignore[arg-type]
    assert table.agreeing(b"abc") == (1, 3)  # not `ab`, behind which no piece begins with c
    assert table.agreeing(b"ab") == (0, 1, 3)


def test_certain_tokens_stay(tokenizer: Tokenizer) -> None:
    text = make_text(1)[0]
    whole, prompt = tokenizer.encode(text), PieceTable(tokenizer).split(text)
    assert whole[: len(prompt.ids)] == prompt.ids and len(whole) - len(prompt.ids) < 4
    assert PieceTable(tokenizer).split("") == Prompt([], b"", 0)


def test_a_space_that_is_taken_away_is_not_doubled(tokenizer: Tokenizer) -> None:
    """`anna ` goes on with a word, behind one space."""
    word = tokenizer.encode("sees")
    model = model_of(tokenizer, word)
    config = GenerateConfig(temperature=0, max_tokens=1)
    text = continuations(model, tokenizer, ["anna "], config)[0, 0]
    assert text.startswith("anna ") and not text.startswith("anna  ") and len(text) > len("anna ")
    assert torch.isfinite(model.head.bias).all()
