"""What follows the size of the text where the user sets nothing: model, learning rate, epochs, evaluations.

A rule of thumb, not a recipe: it keeps a first run on any text from being hopeless. Too large a model for a small text
is slow and learns it by heart; too small a one for a large text stops learning; one epoch of a small text is too few
steps to learn anything. What was chosen is recorded with the run, so a later version of the rule changes no run that
has begun. The price: a run must know its text before its model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rnnlm.config import BY_SIZE, Config, ModelConfig, knobs
from rnnlm.model.adaptive import adaptive_parameters
from rnnlm.model.layers import GATES
from rnnlm.train.inputs import Streams, open_ring

# Parameters: twice as many as tokens where there are half a million (1 MB of text), and a third as many at 250 million
# (1 GB), since the time of a training is their product.
SMALL_TEXT_TOKENS, SMALL_MODEL, GROWTH = 500_000, 1_000_000, 0.7
WIDTHS = range(64, 2049, 64)  # of the layers; a wider one should be somebody's decision

LEAST_STEPS = 1500  # of a run: fewer teach a new model little, whatever the text
EVALUATIONS = 10  # of a run: a curve with a dot for each tenth
MOST_STEPS_BETWEEN = 5000  # evaluations of a long run
EVALUATION_SHARE = 0.1  # of the time of training, at most; a token's forward pass alone takes a third of its training

LARGE_MODEL = 8  # times the rule's parameters, from which on a model without dropout is warned of
RARE_PIECES = 50  # occurrences of a piece, on the mean, below which a vocabulary is warned of
SMALL_VOCABULARY = 512  # which is never warned of: any text needs the bytes, and some pieces


def parameter_budget(tokens: int) -> int:
    """Parameters for a text of so many tokens: 1,000,000 * (tokens / 500,000) ** 0.7."""
    return int(SMALL_MODEL * math.pow(tokens / SMALL_TEXT_TOKENS, GROWTH))


def parameters_of(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of a model; other code's cells are taken for an LSTM, its heads for a softmax."""
    embedding, hidden = model.embedding_size, model.hidden_size
    rows = GATES.get(model.cell, 4) * hidden
    recurrent = rows * (embedding + hidden + 2) + (model.layers - 1) * rows * (2 * hidden + 2)
    projection = embedding * hidden if embedding != hidden else 0  # to the width of tied vectors
    softmax = projection if model.tied else vocab_size * hidden
    head = adaptive_parameters(model, vocab_size, hidden) if model.head == "adaptive" else softmax + vocab_size
    return vocab_size * embedding + recurrent + head


def model_for(model: ModelConfig, tokens: int, vocab_size: int) -> ModelConfig:
    """The model with the sizes that are 0 filled in: the widest layers within the budget, vectors half as wide.

    Vectors that are tied to the softmax are as wide as the layers.
    """

    def with_width(hidden: int) -> ModelConfig:
        embedding = model.embedding_size or (hidden if model.tied else max(1, hidden // 2))
        return dataclasses.replace(model, hidden_size=hidden, embedding_size=embedding)

    if model.hidden_size:
        return with_width(model.hidden_size)
    budget = parameter_budget(tokens)
    fitting = [width for width in WIDTHS if parameters_of(with_width(width), vocab_size) <= budget]
    return with_width(max(fitting, default=WIDTHS[0]))


def learning_rate_for(optimizer: str, hidden_size: int) -> float:
    """Adam's goes with 1 / width (Yang et al. 2022, table 3), from 0.001 at 1,024, to 0.004 at most."""
    return min(0.004, 1.024 / hidden_size) if optimizer in ("adam", "adamw") else 0.001


def epochs_for(steps_per_epoch: int, steps: int) -> int:
    """As many epochs as so many steps take: train.max_steps, or else LEAST_STEPS."""
    return math.ceil(steps / steps_per_epoch)


def evaluation_interval(steps: int, tokens_per_step: int, valid_tokens: int) -> int:
    """Steps between evaluations.

    Args:
        steps: of the whole run.
        valid_tokens: of the validation stream.
    """
    wanted = min(math.ceil(steps / EVALUATIONS), MOST_STEPS_BETWEEN)
    affordable = math.ceil(valid_tokens / 3 / EVALUATION_SHARE / tokens_per_step)
    return max(wanted, affordable)


def follow_text(config: Config, recorded: dict[str, dict[str, Any]], streams: Streams) -> tuple[Config, str]:
    """The configuration with what is unset taken from the run's record or, where that says nothing, from the text.

    Args:
        recorded: section -> key -> value, of the run's config.yaml; empty: it begins.

    Returns:
        (configuration, one line that says what was chosen, and why; empty: nothing was).
    """
    unset = [key for key, mark in BY_SIZE.items() if config.flat()[key] == mark]
    for key in unset:
        section, name = key.split(".")
        value: Any = recorded.get(section, {}).get(name)
        if type(value) in (int, type(BY_SIZE[key])) and not knobs()[key].fault(key, value):
            config = _with(config, section, **{name: value})  # where nothing was chosen, it still says so

    tokens, vocab_size = streams.train.tokens, streams.train.manifest.vocab_size
    before, ring = config.flat(), open_ring(config, streams.train)
    config = dataclasses.replace(config, model=model_for(config.model, tokens, vocab_size))
    if "train.epochs" in unset and config.train.max_steps:  # more than the run has recorded, where it is to be longer
        enough = epochs_for(ring.windows_per_epoch, config.train.max_steps)
        config = _with(config, "train", epochs=max(config.train.epochs, enough))
    if not config.optim.learning_rate:
        config = _with(config, "optim", learning_rate=learning_rate_for(config.optim.name, config.model.hidden_size))
    if not config.train.epochs:
        config = _with(config, "train", epochs=epochs_for(ring.windows_per_epoch, LEAST_STEPS))
    if config.eval.every_steps < 0:
        config = _with(config, "eval", every_steps=_interval(config, streams))

    chosen = [f"{key}={value}" for key, value in config.flat().items() if value != before[key]]
    if not chosen:
        return config, ""
    parameters = parameters_of(config.model, vocab_size)
    return config, (
        f"{', '.join(chosen)}: by the size of the text, {tokens:,} tokens in {ring.windows_per_epoch:,} steps an epoch "
        f"for a model of {parameters:,} parameters; set them to choose others"
    )


def _interval(config: Config, streams: Streams) -> int:
    """0, the end of each epoch, where nothing is evaluated, or plateau and early stopping count the evaluations."""
    if streams.valid is None or config.optim.schedule == "plateau" or config.optim.early_stop_patience:
        return 0
    train, ring = config.train, open_ring(config, streams.train)
    planned = ring.steps_before(train.epochs)
    steps = min(planned, train.max_steps or planned)
    return evaluation_interval(steps, train.global_batch_size * train.seq_len, streams.valid.tokens)


def _with(config: Config, section: str, **values: float) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def disproportions(config: Config, tokens: int, vocab_size: int) -> list[str]:
    """A warning for a model, and for a vocabulary, that is far too large for the text."""
    found, parameters, budget = [], parameters_of(config.model, vocab_size), parameter_budget(tokens)
    if vocab_size > SMALL_VOCABULARY and tokens < RARE_PIECES * vocab_size:
        found.append(
            f"a vocabulary of {vocab_size:,} for {tokens:,} tokens: a piece is there {tokens / vocab_size:.0f} times "
            "on the mean, too seldom to be learnt; build the streams with a smaller tokenizer.vocab_size"
        )
    elif parameters > LARGE_MODEL * budget and not config.model.dropout:
        found.append(
            f"{parameters:,} parameters for {tokens:,} tokens: such a model learns a text by heart; about {budget:,} "
            "fit it, which model.embedding_size=0 and model.hidden_size=0 choose"
        )
    return found
