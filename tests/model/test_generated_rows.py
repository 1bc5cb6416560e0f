"""Rows of one generated batch: each ends for itself, draws for itself, and is decoded after its own prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from io import StringIO
from itertools import product
from typing import Any

import pytest
import torch

from rnnlm.config import GenerateConfig, ModelConfig
from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer
from rnnlm.data.tokenizer import StreamDecoder, Tokenizer
from rnnlm.model import generate as generate_module
from rnnlm.model.generate import continuations, draw, generate, restrict, write_continuations
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden

Rows = dict[tuple[int, int], list[int]]


class Listening(SentencePieceTokenizer):
    """A tokenizer that notes, for each row of a batch, the context and the tokens that its decoder is given."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer.model)
        self.contexts: list[list[int]] = []
        self.tokens: list[list[int]] = []

    def decoder(self, context: Iterable[int] = ()) -> StreamDecoder:
        tokens: list[int] = []
        self.contexts.append([*context])
        self.tokens.append(tokens)
        honest = super().decoder(self.contexts[-1])
        push = honest.push
        honest.push = lambda token: (tokens.append(token), push(token))[1]  # type: ignore[method-assign]
        return honest


@pytest.fixture
def listening(tokenizer: Tokenizer) -> Listening:
    return Listening(tokenizer)


@pytest.fixture
def model(tokenizer: Tokenizer) -> RecurrentLM:
    config = ModelConfig(embedding_size=10, hidden_size=12, layers=2, init="uniform", init_range=1.0)
    return RecurrentLM(config, tokenizer.vocab_size, seed=3).double()


def generated(
    model: RecurrentLM, listening: Listening, prompts: list[str], config: GenerateConfig
) -> tuple[Rows, dict[tuple[int, int], str]]:
    """(prompt, sample) -> tokens, and -> text; of prompts that end where no longer piece could begin."""
    listening.contexts.clear()
    listening.tokens.clear()
    texts: dict[tuple[int, int], str] = defaultdict(str)
    for fragment in generate(model, listening, prompts, config):
        texts[fragment.prompt, fragment.sample] += fragment.text
    owners = [*product(range(len(prompts)), range(config.samples))]
    listening.contexts, listening.tokens = (of[-len(owners) :] for of in (listening.contexts, listening.tokens))
    return dict(zip(owners, listening.tokens, strict=True)), texts


def test_a_row_that_has_ended_writes_nothing_while_others_go_on(model: RecurrentLM, listening: Listening) -> None:
    model.head.bias.data[listening.eos_id] = 2.0
    prompts, options = ["anna.", "bob sees.", ""], {"samples": 4, "max_tokens": 30, "temperature": 1.0}
    endless, _ = generated(model, listening, prompts, GenerateConfig(**options, stop_at_eos=False))  # type: ignore[arg-type]
    ended, _ = generated(model, listening, prompts, GenerateConfig(**options))  # type: ignore[arg-type]

    for owner, tokens in endless.items():
        assert len(tokens) == 30
        end = tokens.index(listening.eos_id) + 1 if listening.eos_id in tokens else 30
        assert ended[owner] == tokens[:end], "the same draws, up to its own end"
    lengths = {len(tokens) for tokens in ended.values()}
    assert len(lengths) >= 4 and min(lengths) < 10, "rows end at different times"


@pytest.mark.parametrize(("temperature", "max_tokens"), [(1.0, 23), (0.0, 3)])
def test_blocks_of_tokens_are_those_drawn_one_by_one(
    model: RecurrentLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, temperature: float, max_tokens: int
) -> None:
    """Prompts end inside a token, so that the first ones are drawn alone, and rows within a block."""
    model.head.bias.data[tokenizer.eos_id] = 2.0
    config = GenerateConfig(samples=3, max_tokens=max_tokens, temperature=temperature)
    prompts, looks = ["anna se", "bob sees.", ""], list[int]()
    honest = generate_module.draw_block

    def draw_block(*arguments: Any) -> Any:
        looks.append(len(arguments[4]))
        return honest(*arguments)

    monkeypatch.setattr(generate_module, "draw_block", draw_block)
    one_by_one = continuations(model, tokenizer, prompts, config)
    tokens = len(looks)
    assert set(looks) == {1}
    looks.clear()
    monkeypatch.setitem(generate_module.BLOCK_TOKENS, "cpu", 5)
    assert continuations(model, tokenizer, prompts, config) == one_by_one
    assert len(looks) <= tokens <= sum(looks) < tokens + 5
    assert looks[0] == 1 and max(looks) == min(5, max_tokens), "no more than are wanted"


def test_a_row_is_decoded_after_its_own_prompt(model: RecurrentLM, listening: Listening) -> None:
    """A word that begins within a text has a space before it, one at the beginning of a text has none."""
    prompts = ["anna sees the cat.", "", "bob likes."]
    model.head.weight.data.zero_()
    word = next(i for i in range(listening.vocab_size) if listening.piece(i)[:1] == META != listening.piece(i))
    text = listening.piece(word).replace(META, " ")
    model.head.bias.data[word] = 1e3  # whatever came before, the next token is this one

    _, texts = generated(model, listening, prompts, GenerateConfig(max_tokens=2))
    assert texts == {(0, 0): 2 * text, (1, 0): (2 * text)[1:], (2, 0): 2 * text}
    for context, tokens, prompt in zip(listening.contexts, listening.tokens, prompts, strict=True):
        assert listening.decode([*context, *tokens]) == (prompt + 2 * text).lstrip()


def test_every_place_of_every_sample_of_every_prompt_has_noise_of_its_own(
    model: RecurrentLM, listening: Listening
) -> None:
    """All logits are equal, so that what is drawn is the noise: 300 tokens, so equal places are rare."""
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    config = GenerateConfig(samples=4, max_tokens=40, stop_at_eos=False, temperature=1.0)
    rows, _ = generated(model, listening, ["anna."] * 4, config)

    for owner, tokens in rows.items():
        assert len(set(tokens)) > 25, f"{owner}: other noise at every place"
        for other in rows:
            if other != owner:
                same = sum(a == b for a, b in zip(tokens, rows[other], strict=True))
                assert same < 8, f"{owner} and {other}, as (0, 1) and (1, 0) would by the sum of both"


def test_noise_depends_on_place_row_and_seed_alone() -> None:
    logits, rows = torch.zeros(64, 1000), torch.arange(64)
    drawn = {
        (place, seed): draw(logits, GenerateConfig(seed=seed), torch.tensor(place), rows)
        for place, seed in product((0, 1, 2), (0, 1))
    }
    for one, other in product(drawn, drawn):
        assert ((drawn[one] == drawn[other]).sum() < 8) == (one != other)
    some = torch.tensor([5, 63, 0])
    assert torch.equal(draw(logits[:3], GenerateConfig(), torch.tensor(1), some), drawn[1, 0][some])


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)])
def test_top_p_that_probabilities_meet_exactly_takes_no_token_more(top_p: float, kept: int) -> None:
    """Four tokens of 1/4, exact in binary: the fewest whose probabilities together are at least p."""
    found = restrict(torch.zeros(1, 4, dtype=torch.float64), 0, top_p)
    assert found[0].isfinite().tolist() == [place < kept for place in range(4)]


def test_restrictions_are_those_of_a_slow_reference() -> None:
    """What goes is -inf, what stays is as it was; of equal tokens those with smaller ids stay."""
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[1] = 0.0
    logits[2, 4:] = logits[2, 3]
    logits[3] *= 40  # so unlike that the likeliest have all the probability that numbers can hold

    for top_k, top_p in product((0, 1, 2, 5, 8, 9, 10), (0.0, 0.3, 0.9, 1 - 1e-12, 1.0)):
        found = restrict(logits, top_k, top_p)
        for row, kept in zip(logits, found, strict=True):
            order = sorted(range(9), key=lambda token: (-float(row[token]), token))[: top_k or 9]
            probabilities, before, stay = row[order].softmax(dim=0).tolist(), 0.0, set[int]()
            for token, probability in zip(order, probabilities, strict=True):
                if not stay or before < top_p - 1e-15 or top_p == 1:
                    stay.add(token)
                before += probability
            expected = [float(row[token]) if token in stay else -torch.inf for token in range(9)]
            assert kept.tolist() == expected, (top_k, top_p)


@pytest.mark.parametrize(("logits", "drawn"), [([10.0, 0.0], 1), ([100.0, 0.0], 0)])
def test_the_least_and_the_largest_noise_are_numbers(
    monkeypatch: pytest.MonkeyPatch, logits: list[float], drawn: int
) -> None:
    """Of all 2^32 draws, which are never 0 nor 1: noise of -3.1 and of 22.9."""
    extremes = torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32)
    monkeypatch.setattr("rnnlm.model.generate.mix", lambda bits: extremes)
    config = GenerateConfig(temperature=1.0)
    assert draw(torch.tensor([logits]), config, torch.tensor(0), torch.tensor([0])).tolist() == [drawn]


def always(model: RecurrentLM, *tokens: int) -> None:
    """Make the model draw these tokens in turn, whatever came before the first."""
    model.head.weight.data.zero_()
    ahead = iter(tokens)
    honest = model.next_logits

    def next_logits(inputs: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        logits, hidden = honest(inputs, hidden)
        return logits.index_fill(1, torch.tensor([next(ahead, tokens[-1])]), 1e3), hidden

    model.next_logits = next_logits  # type: ignore[method-assign]


@pytest.mark.parametrize("max_tokens", [1, 9])
def test_of_a_character_that_ends_in_its_middle_a_mark_is_left(
    model: RecurrentLM, listening: Listening, max_tokens: int
) -> None:
    """Whether the length ends there or the document does."""
    (byte,) = [i for i in range(listening.vocab_size) if listening.piece(i) == "<0xE6>"]  # the first of three
    always(model, byte, listening.eos_id)
    _, texts = generated(model, listening, ["anna"], GenerateConfig(max_tokens=max_tokens))
    assert texts == {(0, 0): "\ufffd"}


def test_draws_never_change(model: RecurrentLM, listening: Listening) -> None:
    """The same seed is the same text in every version: what is drawn among 300 equal tokens, as literal numbers."""
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    config = GenerateConfig(samples=2, max_tokens=5, stop_at_eos=False, seed=2**40 + 3)
    rows, _ = generated(model, listening, ["", ""], config)
    assert rows == {
        (0, 0): [155, 227, 167, 257, 2],
        (0, 1): [155, 271, 80, 114, 244],
        (1, 0): [125, 62, 170, 173, 166],
        (1, 1): [75, 49, 275, 260, 118],
    }


def test_continuations_begin_with_their_prompts(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    config = GenerateConfig(samples=2, max_tokens=6, stop_at_eos=False)
    texts: dict[tuple[int, int], str] = defaultdict(str)
    for fragment in generate(model, tokenizer, ["anna", ""], config):
        texts[fragment.prompt, fragment.sample] += fragment.text
    found = continuations(model, tokenizer, ["anna", ""], config)
    assert found == {(prompt, sample): ["anna", ""][prompt] + texts[prompt, sample] for prompt, sample in found}
    assert [*found] == [(0, 0), (0, 1), (1, 0), (1, 1)] and len(set(found.values())) == 4
    assert continuations(model, tokenizer, [], config) == {}

    out = StringIO()
    write_continuations(model, tokenizer, ["anna", ""], config, out)
    assert out.getvalue() == "\n---\n".join(found.values()) + "\n"


def test_a_single_continuation_is_shown_as_it_is_made(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    shown: list[str] = []

    class Screen(StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    config = GenerateConfig(max_tokens=6, stop_at_eos=False)
    texts = [fragment.text for fragment in generate(model, tokenizer, ["anna"], config)]
    write_continuations(model, tokenizer, ["anna"], config, Screen())
    whole = ["anna" + "".join(texts[: count + 1]) for count in range(len(texts))]
    assert len(texts) > 3 and shown == [*whole, whole[-1] + "\n"]
