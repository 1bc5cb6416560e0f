"""What follows the size of the text: tables of the rules, what a run records of them, and that it keeps to that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TrainHere, final_state

from rnnlm.config import Config, ModelConfig, OptimConfig, RunConfig, StreamConfig, TrainConfig
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.inputs import Streams, open_ring, open_streams
from rnnlm.train.sizes import (
    LEAST_STEPS,
    disproportions,
    epochs_for,
    evaluation_interval,
    follow_text,
    learning_rate_for,
    model_for,
    parameter_budget,
    parameters_of,
)

CHOSEN = ("model.embedding_size", "model.hidden_size", "optim.learning_rate", "train.epochs", "eval.every_steps")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(("tied", "embedding_size"), [(False, 6), (True, 6), (True, 8)])
def test_parameters_are_counted_as_the_model_has_them(cell: str, tied: bool, embedding_size: int) -> None:
    config = ModelConfig(cell=cell, tied=tied, embedding_size=embedding_size, hidden_size=8, layers=3)
    assert parameters_of(config, 37) == RecurrentLM(config, 37, seed=1).parameter_counts()["total"]


def test_parameters_of_an_adaptive_head_are_counted() -> None:
    for cutoffs in ([], [5], [3, 9, 20]):
        config = ModelConfig(head="adaptive", adaptive_cutoffs=cutoffs, embedding_size=6, hidden_size=8)
        assert parameters_of(config, 37) == RecurrentLM(config, 37, seed=1).parameter_counts()["total"]


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "width"),
    # about 10 kB, 1 MB, 10 MB, 100 MB, 1 GB and 100 GB of text, with the vocabularies that suit them
    [(5_000, 300, 64), (550_000, 512, 192), (3_500_000, 2048, 384), (28_000_000, 8192, 704),
     (240_000_000, 16000, 1600), (22_000_000_000, 32768, 2048)],
)  # fmt: skip
def test_the_width_of_a_model_grows_with_its_text(tokens: int, vocab_size: int, width: int) -> None:
    found = model_for(ModelConfig(), tokens, vocab_size)
    assert (found.hidden_size, found.embedding_size) == (width, width // 2)
    wider = ModelConfig(hidden_size=width + 64, embedding_size=width // 2 + 32)
    if 64 < width < 2048:
        assert parameters_of(found, vocab_size) <= parameter_budget(tokens) < parameters_of(wider, vocab_size)


def test_sizes_that_are_set_stay_and_the_others_fit_them() -> None:
    def sizes(**values: int) -> tuple[int, int]:
        found = model_for(ModelConfig(**values), 3_500_000, 2048)  # type: ignore[arg-type]
        return found.embedding_size, found.hidden_size

    assert sizes(embedding_size=7, hidden_size=9) == (7, 9)
    assert sizes(hidden_size=1000) == (500, 1000)
    assert sizes(hidden_size=1) == (1, 1)
    assert sizes(hidden_size=96, tied=True) == (96, 96)
    assert sizes(embedding_size=512)[0] == 512 and sizes(embedding_size=512)[1] < sizes()[1]
    assert sizes(layers=1)[1] > sizes(layers=2)[1] > sizes(layers=6)[1]


def test_adams_learning_rate_goes_with_the_width() -> None:
    widths = (64, 256, 512, 1024, 2048)
    assert [learning_rate_for("adamw", width) for width in widths] == [0.004, 0.004, 0.002, 0.001, 0.0005]
    assert [learning_rate_for("sgd", width) for width in widths] == [0.001] * 5


def test_a_small_text_gets_more_epochs_and_a_large_one_is_read_once() -> None:
    assert [epochs_for(steps, LEAST_STEPS) for steps in (1, 270, 1499, 1500, 1501, 10**7)] == [1500, 6, 2, 1, 1, 1]
    assert [epochs_for(270, max_steps) for max_steps in (1, 270, 271, 2700)] == [1, 1, 2, 10]


@pytest.mark.parametrize(
    ("steps", "valid_tokens", "interval"),
    [
        (2710, 8_400, 271),  # ten dots, at little cost
        (2711, 8_400, 272),
        (1000, 2048 * 300, 1000),  # validation as long as 300 steps costs 100 of them: once in 1,000
        (10**6, 2048 * 300, 5000),
        (10**6, 2048 * 3000, 10_000),
        (3, 10, 1),
    ],
)
def test_evaluations_are_ten_or_frequent_but_never_more_than_a_tenth(
    steps: int, valid_tokens: int, interval: int
) -> None:
    assert evaluation_interval(steps, 2048, valid_tokens) == interval


def config_of(streams: Path, **sections: object) -> Config:
    return Config(stream=StreamConfig(directory=str(streams)), run=RunConfig(directory="r"), **sections)  # type: ignore[arg-type]


def test_the_record_comes_before_the_text_and_what_is_set_before_both(streams: Path) -> None:
    config = config_of(streams)
    found, line = follow_text(config, {}, open_streams(config))
    values = found.flat()
    assert line.startswith(", ".join(f"{key}={values[key]}" for key in CHOSEN) + ": by the size of the text, ")
    assert {key for key, value in values.items() if value != config.flat()[key]} == {*CHOSEN}

    record: dict[str, dict[str, Any]] = {
        "model": {"embedding_size": 5, "hidden_size": 6},
        "optim": {"learning_rate": 0.5},
        "train": {"epochs": 7},
        "eval": {"every_steps": 0},
    }
    found, line = follow_text(config, record, open_streams(config))
    assert ([found.flat()[key] for key in CHOSEN], line) == ([5, 6, 0.5, 7, 0], "")

    found, line = follow_text(config_of(streams, model=ModelConfig(hidden_size=9)), record, open_streams(config))
    assert ([found.flat()[key] for key in CHOSEN], line) == ([5, 9, 0.5, 7, 0], "")

    forged = {"model": {"embedding_size": -5, "hidden_size": "6"}, "train": {"epochs": True}, "eval": {}}
    assert follow_text(config, forged, open_streams(config)) == follow_text(config, {}, open_streams(config))


def test_a_run_that_is_to_have_more_steps_gets_the_epochs_for_them(streams: Path) -> None:
    """The record of a first attempt of a few steps says 1 epoch."""

    def epochs(max_steps: int, **given: int) -> int:
        config = config_of(streams, train=TrainConfig(global_batch_size=16, seq_len=40, max_steps=max_steps, **given))
        return follow_text(config, {"train": {"epochs": 1}}, open_streams(config))[0].train.epochs

    config = config_of(streams, train=TrainConfig(global_batch_size=16, seq_len=40))
    per_epoch = open_ring(config, open_streams(config).train).windows_per_epoch
    steps = (0, 1, per_epoch, per_epoch + 1, 5 * per_epoch)
    assert [epochs(max_steps) for max_steps in steps] == [1, 1, 1, 2, 5]
    assert epochs(5 * per_epoch, epochs=2) == 2, "what is set stays"


def test_who_counts_evaluations_counts_epochs_and_without_a_stream_there_are_none(streams: Path) -> None:
    def interval(optim: OptimConfig, valid: bool = True) -> int:
        config = config_of(streams, optim=optim)
        both = open_streams(config)
        return follow_text(config, {}, Streams(both.train, both.valid if valid else None))[0].eval.every_steps

    assert interval(OptimConfig()) > 0
    assert interval(OptimConfig(schedule="plateau")) == interval(OptimConfig(early_stop_patience=3)) == 0
    assert interval(OptimConfig(), valid=False) == 0


def test_a_run_keeps_the_sizes_it_chose_whatever_the_rule_is_by_then(
    train_here: TrainHere, streams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        f"--stream.directory={streams}", f"--run.directory={tmp_path}/run", "--train.cpu_threads=1",
        "--train.global_batch_size=16", "--train.seq_len=40", "--eval.batch_size=8",
    )  # fmt: skip
    begun = train_here(*options, "--train.max_steps=2")
    assert begun.returncode == 0, begun.stderr
    recorded = Config(**{
        name: dataclasses.replace(getattr(Config(), name), **values)
        for name, values in yaml.safe_load((tmp_path / "run/config.yaml").read_text()).items()
    })  # fmt: skip
    expected, line = follow_text(config_of(streams), {}, open_streams(config_of(streams)))
    assert recorded.model == expected.model and recorded.model.hidden_size == 64
    assert line.split(", train.epochs")[0] in begun.stderr, "model and learning rate"
    assert recorded.optim.learning_rate == 0.004
    assert final_state(tmp_path / "run", 2)[1]["configuration"]["model"]["hidden_size"] == 64

    monkeypatch.setattr("rnnlm.train.sizes.WIDTHS", range(72, 80))
    monkeypatch.setattr("rnnlm.train.sizes.EVALUATIONS", 1)
    resumed = train_here(*options, "--train.max_steps=4")
    assert resumed.returncode == 0 and "resuming from step 2 of 4" in resumed.stderr, resumed.stderr
    assert "by the size of the text" not in resumed.stderr
    after = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert after["model"]["hidden_size"] == 64 and after["eval"]["every_steps"] == recorded.eval.every_steps


def test_a_model_or_vocabulary_out_of_proportion_is_warned_of() -> None:
    def doubts(tokens: int, vocab_size: int, dropout: float = 0.0) -> list[str]:
        model = ModelConfig(embedding_size=256, hidden_size=512, dropout=dropout)
        return disproportions(Config(model=model), tokens, vocab_size)

    (vocabulary,), (parameters,) = doubts(240_000, 16_000), doubts(120_000, 512)
    assert vocabulary.startswith("a vocabulary of 16,000 for 240,000 tokens: a piece is there 15 times on the mean")
    assert parameters.startswith("4,071,936 parameters for 120,000 tokens: such a model learns a text by heart")
    assert doubts(120_000, 512, dropout=0.5) == doubts(240_000, 512) == doubts(24_000_000, 16_000) == []


def test_a_new_run_is_warned_of_its_proportions_and_a_resumed_one_no_more(
    train_here: TrainHere, experiment: Path
) -> None:
    options = (f"--config={experiment}", "--model.hidden_size=400", "--model.dropout=0")
    for steps, expected in ((1, 1), (2, 0)):
        done = train_here(*options, f"--train.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(" parameters for 11,354 tokens: such a model learns a text by heart") == expected


def test_a_model_outside_of_a_run_needs_numbers() -> None:
    with pytest.raises(UserError, match=r"model.hidden_size, model.embedding_size: 0 has a meaning only in a run"):
        RecurrentLM(ModelConfig(), 300, seed=1)
