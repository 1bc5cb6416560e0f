"""Generation: batches equal single prompts, restrictions do what the papers say, draws follow the distribution."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import make_text

from rnnlm.config import GenerateConfig, ModelConfig
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.model.generate import draw, generate, restrict, write_continuations
from rnnlm.model.language_model import RecurrentLM


@pytest.fixture
def model(tokenizer: Tokenizer) -> RecurrentLM:
    config = ModelConfig(embedding_size=10, hidden_size=12, layers=2, init="uniform", init_range=1.0)
    return RecurrentLM(config, tokenizer.vocab_size, seed=3).double()


def texts(
    model: RecurrentLM, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig
) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    for new in generate(model, tokenizer, prompts, config):
        found[new.prompt, new.sample] = found.get((new.prompt, new.sample), "") + new.text
    return found


PROMPTS = ["anna sees the cat. bob", "", "漢", "carol"]


def test_prompts_of_different_lengths_as_one_batch_equal_each_alone(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    config = GenerateConfig(temperature=0, max_tokens=25, stop_at_eos=False)
    together = texts(model, tokenizer, PROMPTS, config)
    for index, prompt in enumerate(PROMPTS):
        assert together[index, 0] == texts(model, tokenizer, [prompt], config)[0, 0] != ""


def certain(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], bytes]:
    """The tokens of a prompt up to where a longer piece could begin, and the bytes behind them; the slow way."""
    ids, pieces = tokenizer.encode(prompt), list(map(tokenizer.piece_bytes, range(tokenizer.vocab_size)))
    for cut in range(len(ids)):
        rest = b"".join(pieces[token] for token in ids[cut:])
        if any(piece.startswith(rest) and len(piece) > len(rest) for piece in pieces):
            return ids[:cut], rest
    return ids, b""


def test_greedy_is_the_likeliest_token_each_time(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Of the tokens that agree with the prompt's text while there is some of it left."""
    prompt = make_text(1)[0]
    ids, rest = certain(tokenizer, prompt)
    ids, made = [tokenizer.eos_id, *ids], 0
    while made < 12:  # the slow way: the whole text again for every token
        logits, _ = model.next_logits(torch.tensor([ids]), model.zero_hidden(1))
        for token in range(tokenizer.vocab_size) if rest else ():
            piece = tokenizer.piece_bytes(token)
            if not piece or not (piece.startswith(rest) or rest.startswith(piece)):
                logits[0, token] = -torch.inf
        ids.append(int(logits.argmax()))
        made += len(tokenizer.piece_bytes(ids[-1])) > len(rest) or not rest
        rest = rest[len(tokenizer.piece_bytes(ids[-1])) :]
    config = GenerateConfig(temperature=0, max_tokens=12, stop_at_eos=False)
    assert prompt + texts(model, tokenizer, [prompt], config)[0, 0] == tokenizer.decode(ids)


def test_samples_are_seeded_differ_and_do_not_depend_on_the_batch(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    config = GenerateConfig(samples=3, max_tokens=15, seed=4)
    first = texts(model, tokenizer, ["anna"], config)
    assert first == texts(model, tokenizer, ["anna"], config)
    assert len(set(first.values())) == 3
    assert first[0, 0] == texts(model, tokenizer, ["anna", "bob"], GenerateConfig(max_tokens=15, seed=4))[0, 0]
    assert first != texts(model, tokenizer, ["anna"], GenerateConfig(samples=3, max_tokens=15, seed=5))


def test_a_document_ends_at_eos(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    model.head.bias.data[tokenizer.eos_id] = 1e3
    assert texts(model, tokenizer, ["anna"], GenerateConfig(max_tokens=50)) == {}

    out = io.StringIO()
    write_continuations(model, tokenizer, ["anna"], GenerateConfig(max_tokens=50), out)
    assert out.getvalue() == "anna\n"


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    drawn = draw(logits, GenerateConfig(temperature=0.5), torch.tensor(0), torch.arange(20_000))
    expected = (logits[0] / 0.5).softmax(dim=0)
    found = drawn.bincount(minlength=4) / 20_000
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(top_k: int, top_p: float) -> list[int]:
        return restrict(logits, top_k, top_p)[0].isfinite().nonzero().flatten().tolist()

    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(9, 1.0) == [0, 1, 2, 3]
    assert kept(0, 0.0) == [1]
    assert kept(0, 0.65) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(2, 0.5) == [1]  # of the two, 0.4 / 0.7 > 0.5
    assert torch.equal(restrict(logits, 2, 1.0)[0, [1, 3]], logits[0, [1, 3]])
    assert restrict(torch.zeros(1, 5), 2, 1.0)[0].isfinite().tolist() == [True, True, False, False, False]


def test_a_temperature_near_zero_draws_the_likeliest() -> None:
    logits = torch.tensor([[-3.0, 1.5, 1.0], [2.0, -torch.inf, 2.5]])
    drawn = draw(logits, GenerateConfig(temperature=1e-320), torch.tensor(0), torch.arange(2))
    assert drawn.tolist() == [1, 2]
