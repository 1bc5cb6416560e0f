"""The experiment that --config names: its configuration, and what its streams say."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from rnnlm.cli import read_config
from rnnlm.config import TRAINING_SECTIONS, Config
from rnnlm.data.stream import TokenStream
from rnnlm.model.layers import STATES
from rnnlm.train.inputs import Streams
from rnnlm.train.sizes import follow_text, parameters_of


@dataclass(frozen=True)
class Experiment:
    """What is known of it.

    Args:
        config: with the sizes that follow its text; None: no --config.
        vocab_size: of its streams; 0: they are not there.
    """

    config: Config | None = None
    vocab_size: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return parameters_of(self.config.model, self.vocab_size) if self.config and self.vocab_size else 0

    @property
    def checkpoint_bytes(self) -> int:
        """Of parameters, moments and hidden states; 0 where they are not known."""
        if not (self.config and self.vocab_size):
            return 0
        model, rows = self.config.model, self.config.train.global_batch_size
        states = len(STATES.get(model.cell, ("h", "c"))) * model.layers * model.hidden_size
        return 4 * (self.parameters * (1 + moments(self.config)) + rows * states)


def moments(config: Config) -> int:
    """Numbers that the optimizer keeps for each parameter; other code's is taken for Adam."""
    return int(config.optim.momentum > 0) if config.optim.name == "sgd" else 2


def read_experiment(options: Namespace) -> Experiment:
    """What --config and the options behind -- say.

    Raises:
        UserError: they are wrong, or the streams are damaged.
    """
    if not (options.config or options.arguments):
        return Experiment()
    config = read_config(
        TRAINING_SECTIONS, None, [*(f"--config={path}" for path in options.config), *options.arguments]
    )
    directory = Path(config.stream.directory)
    if not config.stream.directory or not (directory / "train").is_dir():
        return Experiment(config)

    train, place = TokenStream(directory / "train"), directory / config.eval.split
    config, _ = follow_text(config, {}, Streams(train, TokenStream(place) if place.is_dir() else None))
    return Experiment(config, train.manifest.vocab_size)
