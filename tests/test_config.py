"""Configuration: every fault named at once with its way out; what is written can be read again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

from rnnlm.cli import dump_yaml, load_yaml, read_config
from rnnlm.config import TRAINING_SECTIONS, Config, field_kinds, nearest
from rnnlm.errors import UserError
from rnnlm.train.run import differing


def read(*argv: str) -> Config:
    return read_config(TRAINING_SECTIONS, "doc", argv)


def test_order_is_defaults_then_files_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {hidden_size: 7, layers: 3}\ncorpus: {train: x.txt}\n")
    (tmp_path / "b.yaml").write_text("model: {hidden_size: 8}\n")
    config = read(
        f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "--train.seed=5", "--optim.eps", "1e-6"
    )
    assert (config.model.hidden_size, config.model.layers, config.train.seed, config.optim.eps) == (8, 3, 5, 1e-6)
    assert config.corpus.train == "", "a section that the door does not read"


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = read("--model.dropout=0.1", "--generate.prompts=[one, 'two: x']", "--optim.learning_rate=1e-5")
    (tmp_path / "c.yaml").write_text(dump_yaml(config, TRAINING_SECTIONS))
    assert read(f"--config={tmp_path}/c.yaml") == config
    assert differing(config, load_yaml(tmp_path / "c.yaml")) == []


def test_misspelt_keys_of_file_and_command_line_are_all_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {hiden_size: 7}\ntrian: {seed: 3}\n")
    with pytest.raises(UserError) as caught:
        read(f"--config={tmp_path}/a.yaml", "--optim.learning_rat=1")
    for near in ("did you mean model.hidden_size?", "did you mean train.seed?", "did you mean optim.learning_rate?"):
        assert near in str(caught.value)


def test_bad_values_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        read("--model.dropout=1", "--train.seq_len=0", "--run.keep_last=1", "--optim.learning_rate=.inf")
    assert str(caught.value).split("; ") == [
        "model.dropout=1.0: must be below 1",
        "optim.learning_rate=inf: must be a finite number",
        "train.seq_len=0: must be at least 1",
        "run.keep_last=1: must be at least 2",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.hidden_size=x", "model.hidden_size"),
        ("--model.cell=gruu", "model.cell"),
        ("--config=/nowhere.yaml", "/nowhere.yaml: No such file"),
        ("--train.accumulation=3", "not divisible by train.accumulation=3; use 63 or 66"),
    ],
)
def test_one_bad_value(option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(option)


@pytest.mark.parametrize("text", ["model: 3", "- a", "model: {a: [}"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a.yaml: "):
        read(f"--config={tmp_path}/a.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("modle: {}", "modle.: no such key"), ("model: {layers: }", "model.layers: has no value")]
)
def test_empty_sections_and_values(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(f"--config={tmp_path}/a.yaml")


def test_nearest_sizes() -> None:
    assert [nearest(100, 8), nearest(3, 8)] == ["96 or 104", "8"]


def test_what_may_change_on_resume() -> None:
    kinds = field_kinds()
    assert all(kinds[f"{section}.{knob}"] for section in ("run", "eval", "generate") for knob in names(section))
    assert kinds["train.epochs"] and kinds["stream.directory"]
    for fixed in ("model.hidden_size", "train.seq_len", "train.global_batch_size", "train.seed", "train.precision"):
        assert not kinds[fixed]
    config = Config()
    record = {"model": {"hidden_size": 99}, "train": {"epochs": 7, "seed": 1}}
    assert differing(config, record) == ["model.hidden_size is 99 there, 512 now"]


def names(section: str) -> list[str]:
    return [knob.name for knob in dataclasses.fields(getattr(Config(), section))]


def test_every_configuration_of_the_repository_reads() -> None:
    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert found
    for path in found:
        assert read_config(
            [knob.name for knob in dataclasses.fields(Config)], None, [f"--config={path}"]
        ).stream.directory
