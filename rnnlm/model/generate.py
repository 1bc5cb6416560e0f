"""Text from the model: prompts warm up the hidden state, then tokens are drawn one at a time.

All samples of all prompts advance as one batch, each from the state at its own prompt's end. A draw is a hash of
(seed, prompt, sample, place), so a sample is the same whatever else is in the batch. It is made where the logits are,
and only the ids that were drawn go to the host, on a GPU BLOCK_TOKENS of each sample at once: the device is not waited
for at every token. The price: a sample that has ended keeps its row of the batch until the last one ends; some tokens
are drawn behind the last end; and another device may round a logarithm otherwise, and so, rarely, draw another token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from rnnlm.config import GenerateConfig
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden
from rnnlm.model.prompt import Prompt, piece_table
from rnnlm.model.random_bits import hashed_bits, mix

PLACE = 0x67656E  # in place of a place in the network, whose numbers are hashes: keeps draws apart from masks
BLOCK_TOKENS = {"cpu": 1, "cuda": 16}  # drawn before the host looks at them: a hundredth of a second on a GPU


@dataclass(frozen=True)
class Fragment:
    """Text that became certain: of which prompt, of which of its samples."""

    prompt: int
    sample: int
    text: str


def generate(
    model: RecurrentLM, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig
) -> Iterator[Fragment]:
    """Continue each prompt `config.samples` times; fragments of text come as they are made.

    A prompt is read like the beginning of a document, after an EOS; the empty prompt starts a new document. Where more
    text could make other tokens of its end, these are drawn again among all that agree with it (prompt.py).

    Raises:
        UserError: the model's head does not predict tokens.
    """
    if not model.head.predicts_tokens:
        raise UserError(f"model.head={model.config.head}: does not predict tokens, so there is no text; evaluate it")

    table = piece_table(tokenizer)
    split = [table.split(prompt) for prompt in prompts]
    contexts = [[tokenizer.eos_id, *each.ids] for each in split]
    device = model.embedding.weight.device

    # one row of the batch for each sample of each prompt, from the state at its own prompt's end
    warm = [model.next_logits(torch.tensor([ids], device=device), model.zero_hidden(1)) for ids in contexts]
    owners = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(config.samples)]
    logits = torch.cat([warm[prompt][0] for prompt, _ in owners])  # (B, V)
    hidden: Hidden = {name: torch.cat([warm[prompt][1][name] for prompt, _ in owners]) for name in warm[0][1]}

    rows = [_Row(tokenizer, contexts[prompt], split[prompt], config) for prompt, _ in owners]
    numbers = torch.tensor([(prompt << 20) + sample for prompt, sample in owners], device=device)
    place = 0
    while True:
        for index, row in enumerate(rows):
            if row.rest:
                logits[index] = _only(logits[index], table.agreeing(row.rest))

        # what may be drawn next depends on what was, as long as one has to write its prompt's end
        left = max(row.left for row in rows if row.is_running)
        size = 1 if any(row.rest for row in rows) else min(BLOCK_TOKENS[device.type], left)
        block, hidden = draw_block(model, logits, hidden, config, range(place, place + size), numbers)
        place += size

        for tokens in block.t().tolist():  # the device is waited for here alone
            for row, owner, token in zip(rows, owners, tokens, strict=True):
                if row.is_running and (text := row.push(token)):
                    yield Fragment(*owner, text)
        if not any(row.is_running for row in rows):
            break
        logits, hidden = model.next_logits(block[:, -1:], hidden)

    for owner, row in zip(owners, rows, strict=True):
        if text := row.decoder.finish():
            yield Fragment(*owner, text)


class _Row:
    """A sample as it is drawn."""

    def __init__(self, tokenizer: Tokenizer, context: list[int], prompt: Prompt, config: GenerateConfig):
        self.tokenizer, self.config = tokenizer, config
        self.decoder = tokenizer.decoder(context)
        self.rest, self._hidden = prompt.rest, prompt.characters  # of the prompt, still to be written; shown already
        self.left = config.max_tokens
        self.is_running = True

    def push(self, token: int) -> str:
        """The text that is certain once a token has come, without that of the prompt."""
        data = self.tokenizer.piece_bytes(token)
        self.left -= len(data) > len(self.rest) or not self.rest  # a token of the prompt alone is none of the sample
        self.rest = self.rest[len(data) :]
        ended = self.config.stop_at_eos and token == self.tokenizer.eos_id
        self.is_running = not ended and self.left > 0

        text = self.decoder.push(token)
        shown = text[: self._hidden]
        self._hidden -= len(shown)
        return text[len(shown) :]


def _only(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """(V,) logits with -inf for all but some tokens."""
    index = torch.tensor(tokens, device=logits.device)
    return torch.full_like(logits, -torch.inf).index_copy(0, index, logits[index])


def continuations(
    model: RecurrentLM, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig
) -> dict[tuple[int, int], str]:
    """(number of the prompt, number of the sample) -> the prompt and its continuation."""
    texts = {(prompt, sample): prompts[prompt] for prompt in range(len(prompts)) for sample in range(config.samples)}
    for fragment in generate(model, tokenizer, prompts, config) if prompts else ():
        texts[fragment.prompt, fragment.sample] += fragment.text
    return texts


def write_continuations(
    model: RecurrentLM, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig, out: TextIO
) -> None:
    """Print each prompt with its continuation: a single one as it is made, several when all are done."""
    if len(prompts) * config.samples == 1:
        out.write(prompts[0])
        for fragment in generate(model, tokenizer, prompts, config):
            out.write(fragment.text)
            out.flush()
    else:
        out.write("\n---\n".join(continuations(model, tokenizer, prompts, config).values()))
    out.write("\n")
    out.flush()


def draw_block(
    model: RecurrentLM, logits: Tensor, hidden: Hidden, config: GenerateConfig, places: range, rows: Tensor
) -> tuple[Tensor, Hidden]:
    """Tokens one after the other, without a look at any of them.

    Args:
        logits: (B, V) of the first.
        hidden: the state that they came with.
        places: how many tokens came before each.
        rows: (B,) as in `draw`.

    Returns:
        (B, len(places)) int64, and the state before the last one.
    """
    drawn = list[Tensor]()  # (B,) each
    for place in places:
        if drawn:
            logits, hidden = model.next_logits(drawn[-1][:, None], hidden)
        drawn.append(draw(logits, config, torch.full((), place, device=rows.device), rows))
    return torch.stack(drawn, dim=1), hidden


def draw(logits: Tensor, config: GenerateConfig, place: Tensor, rows: Tensor) -> Tensor:
    """One token per row.

    The largest of logits / temperature + Gumbel noise is a draw from the softmax (Gumbel 1954; Maddison et al. 2014);
    top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020) first take away the unlikely tokens.

    Args:
        logits: (B, V)
        place: () int64, how many tokens came before.
        rows: (B,) int64, which stream of random numbers.

    Returns:
        (B,) int64
    """
    if config.temperature == 0:
        return logits.argmax(dim=1)
    logits = logits.double()
    logits = logits - logits.amax(dim=1, keepdim=True)  # else a temperature near 0 makes the largest ones infinite
    logits = restrict(logits / config.temperature, config.top_k, config.top_p)
    bits = mix(hashed_bits(config.seed, PLACE, place, rows, 1, logits.shape[1])[0])  # (B, V)
    uniform = (bits.double() + (2**31 + 0.5)) / 2**32  # in (0, 1), both ends excluded
    return (logits - (-uniform.log()).log()).argmax(dim=1)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens, and of these all but the fewest with probability >= `top_p`.

    The likeliest token always stays; of equal ones, those with smaller ids.
    """
    if not 0 < top_k < logits.shape[1] and top_p >= 1:
        return logits

    ordered, ids = logits.sort(dim=1, descending=True, stable=True)  # (B, V)
    if 0 < top_k < logits.shape[1]:
        ordered[:, top_k:] = -torch.inf

    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, -torch.inf) if top_p < 1 else ordered
    ordered[:, 0] = logits.amax(dim=1)  # stays even where top_p is 0

    return torch.full_like(logits, -torch.inf).scatter(1, ids, ordered)
