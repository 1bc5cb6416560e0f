"""Evaluating a stream on all processes of a run, in training and after it.

The price of one function for both: an evaluation after training starts the processes as training does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rnnlm.config import Config
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer, find
from rnnlm.errors import UserError
from rnnlm.model.evaluate import Evaluation, evaluate, scored_tokens
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.distributed import Accelerator, errors_are_shared, launched, run_on_main
from rnnlm.train.inputs import stream_directory
from rnnlm.train.load import choose, load_model


def evaluate_run(config: Config) -> Evaluation:
    """Evaluate eval.split with the model that run.checkpoint names, on all processes.

    Raises:
        UserError: no run, no stream, one of another tokenizer, or one with nothing to score.
    """
    stream = TokenStream(stream_directory(config) / config.eval.split)
    scored_tokens(stream, config.eval.count_eos)
    own = find(config.run.directory)  # not there after training on a stream without one
    if stream.manifest.tokenizer != (Tokenizer.load(own).digest if own.exists() else ""):
        way_out = f"build or adopt it with {own}" if own.exists() else f"there is no {own}: adopt it without one"
        raise UserError(f"{stream.directory}: built with another tokenizer than the run's; {way_out}")

    exact = dataclasses.replace(config.train, precision="fp32", tf32=False)
    with launched(dataclasses.replace(config, train=exact)) as accelerator:
        path = run_on_main(accelerator, lambda: str(choose(config)))
        model, _, _ = load_model(config, Path(path), accelerator.device)
        with errors_are_shared():
            _check_vocabulary(stream, model)
        return evaluate_on_all_ranks(accelerator, model, stream, config)


def _check_vocabulary(stream: TokenStream, model: RecurrentLM) -> None:
    if model.vocab_size != stream.manifest.vocab_size:
        raise UserError(
            f"{stream.directory}: has a vocabulary of {stream.manifest.vocab_size}, the run's model one of "
            f"{model.vocab_size}; adopt the stream with --vocab-size={model.vocab_size}"
        )


def evaluate_on_all_ranks(
    accelerator: Accelerator,
    model: RecurrentLM,
    stream: TokenStream,
    config: Config,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on all processes, each with its share of the work; all have the result."""
    return evaluate(
        model,
        stream,
        config.eval.batch_size,
        config.eval.count_eos,
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums, "sum"),
        beat,
        config.train.prefetch_threads,
    )
