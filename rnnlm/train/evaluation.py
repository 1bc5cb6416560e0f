"""Scoring a stream on all processes of a run, in training and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rnnlm.config import Config
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.model.evaluate import Evaluation, evaluate
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.distributed import Accelerator, Meeting, end, from_main, start_accelerator
from rnnlm.train.load import choose, load_model


def evaluate_run(config: Config) -> Evaluation:
    """Score eval.split with the model that run.checkpoint names, on all processes.

    Raises:
        UserError: no run, no stream, or a stream of another tokenizer.
    """
    stream = TokenStream(Path(config.stream.directory) / config.eval.split)
    own = Path(config.run.directory) / "tokenizer.model"  # not there after training on a stream without one
    if stream.manifest.tokenizer != (Tokenizer.load(own).digest if own.exists() else ""):
        way_out = f"build or adopt it with {own}" if own.exists() else f"there is no {own}: adopt it without one"
        raise UserError(f"{stream.directory}: built with another tokenizer than the run's; {way_out}")
    exact = dataclasses.replace(config.train, precision="fp32", tf32=False)
    accelerator = start_accelerator(dataclasses.replace(config, train=exact))
    path = from_main(accelerator, lambda: str(choose(config)))
    model, _, _ = load_model(config, Path(path), accelerator.device)
    if model.vocab_size != stream.manifest.vocab_size:
        end(accelerator)
        raise UserError(
            f"{stream.directory}: has a vocabulary of {stream.manifest.vocab_size}, the run's model one of "
            f"{model.vocab_size}; adopt the stream with --vocab-size={model.vocab_size}"
        )
    result = score(accelerator, model, stream, config)
    end(accelerator)
    return result


def score(
    accelerator: Accelerator,
    model: RecurrentLM,
    stream: TokenStream,
    config: Config,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on all processes, each with its share of the blocks; the result is everyone's."""
    return evaluate(
        model,
        stream,
        config.eval.batch_size,
        config.eval.count_eos,
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums, "sum"),
        Meeting(accelerator, beat),
    )
