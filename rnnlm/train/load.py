"""A run's model, for evaluation and generation."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from rnnlm.checkpoint.checkpoint import Checkpoint, copy_tensors, find_newest, load
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.config import Config
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.state import check_state


def choose(config: Config) -> Path:
    """The checkpoint that run.checkpoint names: the best one, or the last where no best one is whole; reads only.

    Raises:
        CheckpointError: no whole checkpoint in the run.
    """
    root = Path(config.run.directory) / "checkpoints"
    refused: CheckpointError | None = None
    if config.run.checkpoint == "best":
        try:
            if (best := find_newest(root, "best")[0]) is not None:
                return best.path
        except CheckpointError as error:
            refused = error

    last, _ = find_newest(root, "step")
    if last is None:
        raise refused or CheckpointError(f"{root}: no checkpoint yet; train first, or wait for run.save_every_steps")
    if refused:
        print(f"warning: {refused}; reading {last.path} instead", file=sys.stderr, flush=True)
    return last.path


def load_model(config: Config, path: Path, device: torch.device) -> tuple[RecurrentLM, Tokenizer | None, Checkpoint]:
    """The model in a checkpoint of the run, on a device, and its tokenizer if its stream had one.

    Raises:
        UserError: a checkpoint that does not fit the run's configuration or tokenizer.
    """
    found = load(path, every_byte=False)  # the model is checked as it is read
    state = check_state(found.state, path)
    tokenizer = None
    if state.tokenizer:
        tokenizer = Tokenizer.load(config.run.directory, state.tokenizer)

    # before a model of that size takes memory
    vocab_size = tokenizer.vocab_size if tokenizer else state.vocab_size
    if vocab_size * config.model.embedding_size > found.bytes("model"):
        raise CheckpointError(f"{path}: a vocabulary of {vocab_size} in a smaller model; give the run its own again")

    def build() -> tuple[RecurrentLM, dict[str, Tensor]]:
        # all parameters are in the checkpoint, or it is refused
        model = RecurrentLM(config.model, vocab_size, config.train.seed, initialise=False)
        return model, dict(model.named_parameters())

    with torch.device("meta"):
        _, expected = build()
    tensors = found.tensors("model", expected)
    model, parameters = build()
    copy_tensors(parameters, tensors, path)
    return model.to(device), tokenizer, found
