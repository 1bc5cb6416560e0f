"""Configuration: every fault named at once with its way out; what is written can be read again."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from rnnlm.cli import read_config
from rnnlm.config import BY_SIZE, CELLS, HEADS, OPTIMIZERS, TRAINING_SECTIONS, Config, TokenizerConfig, knobs
from rnnlm.errors import UserError
from rnnlm.faults import find_faults, nearest
from rnnlm.train.run import differing
from rnnlm.yaml_file import dump_yaml, load_yaml


def read(*argv: str) -> Config:
    return read_config(TRAINING_SECTIONS, "doc", argv)


def test_order_is_defaults_then_files_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {hidden_size: 7, layers: 3}\ncorpus: {train: x.txt}\n")
    (tmp_path / "b.yaml").write_text("model: {hidden_size: 8}\n")
    config = read(
        f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "--train.seed=5", "--optim.eps", "1e-6"
    )
    assert (config.model.hidden_size, config.model.layers, config.train.seed, config.optim.eps) == (8, 3, 5, 1e-6)
    assert config.corpus.train == "", "a section that the entry point does not read"


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
    ("text", "message"),
    [
        ("modle: {}", "modle: no such section in .*did you mean model\\?"),
        ("model: {layers: }", "model.layers: has no value"),
        ("train: {accumulation: }", "train.accumulation: has no value"),
    ],
)
def test_empty_sections_and_values(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(f"--config={tmp_path}/a.yaml")


def test_nearest_sizes() -> None:
    assert [nearest(100, 8), nearest(3, 8)] == ["96 or 104", "8"]


CHANGEABLE = {  # what else may differ when a run is resumed, beside all of build, eval, generate and run
    "stream.directory", "stream.verify", "optim.early_stop_patience", "train.epochs", "train.max_steps",
    "train.accumulation", "train.device", "train.cpu_threads", "train.deterministic", "train.prefetch_threads",
    "train.capture", "train.stop_after_skipped", "train.loss_chunk_tokens", "train.gradient_filter",
    "train.gradient_compression",
}  # fmt: skip


def test_what_may_change_on_resume() -> None:
    whole = {key for key in knobs() if key.split(".")[0] in ("build", "eval", "generate", "run")}
    assert {key for key, knob in knobs().items() if knob.changeable} == whole | CHANGEABLE
    assert not CHANGEABLE & {"train.seq_len", "train.global_batch_size", "train.seed", "train.precision"}

    record = {"model": {"hidden_size": 99}, "train": {"epochs": 7, "seed": 1}}
    assert differing(Config(), record) == ["model.hidden_size is 99 there, 0 now"]


def faults_with(key: str, value: Any) -> list[str]:
    """The faults of the default configuration with one other value."""
    section, name = key.split(".")
    values = dataclasses.replace(getattr(Config(), section), **{name: value})
    return find_faults(dataclasses.replace(Config(), **{section: values}))


def beyond(value: float, like: object, direction: int) -> float:
    """The next number of a knob's type, above or below."""
    return int(value) + direction if isinstance(like, int) else math.nextafter(value, direction * math.inf)


BOUNDED = [key for key, knob in knobs().items() if {knob.at_least, knob.below, knob.at_most} != {None}]


@pytest.mark.parametrize("key", BOUNDED)
def test_each_bound_is_refused_one_beyond_and_accepted_at_the_bound(key: str) -> None:
    knob, default = knobs()[key], Config().flat()[key]
    assert type(default) in (int, float)
    if knob.at_least is not None:
        assert faults_with(key, knob.at_least) == []
        under = beyond(knob.at_least, default, -1)
        assert f"{key}={under}: must be at least {knob.at_least}" in faults_with(key, under)
    if knob.below is not None:
        assert faults_with(key, beyond(knob.below, default, -1)) == []
        assert faults_with(key, knob.below) == [f"{key}={knob.below}: must be below {knob.below}"]
    if knob.at_most is not None:
        assert faults_with(key, knob.at_most) == []
        over = beyond(knob.at_most, default, 1)
        assert faults_with(key, over) == [f"{key}={over}: must be at most {knob.at_most}"]


def test_every_number_has_a_lower_bound_but_the_forget_bias() -> None:
    numbers = [key for key, value in Config().flat().items() if type(value) in (int, float)]
    assert [key for key in numbers if knobs()[key].at_least is None] == ["model.forget_bias"]


def test_what_follows_the_size_of_the_text_does_so_by_default_and_within_bounds() -> None:
    defaults = Config().flat()
    assert {key: defaults[key] for key in BY_SIZE} == BY_SIZE
    assert all(knobs()[key].at_least == mark for key, mark in BY_SIZE.items())


@pytest.mark.parametrize(
    ("key", "names", "typed", "near"),
    [
        ("model.cell", CELLS, "gruu", "gru"),
        ("model.head", HEADS, "sofmax", "softmax"),
        ("optim.name", OPTIMIZERS, "adamv", "adam"),
    ],
)
def test_names_that_other_code_registers_are_choices(key: str, names: list[str], typed: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"--{key}={typed}")
    assert str(caught.value) == f"{key}={typed}: not one of {', '.join(names)}; did you mean {near}?"

    names.append(typed)
    try:
        assert read(f"--{key}={typed}").flat()[key] == typed
    finally:
        names.remove(typed)


def test_a_knob_of_an_older_file_is_read_by_its_name_of_today(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {prefetch_workers: 3}\n")
    assert read(f"--config={tmp_path}/config.yaml").train.prefetch_threads == 3
    of_run = read_config(TRAINING_SECTIONS, None, [f"--run.directory={tmp_path}"], of_run=True)
    assert of_run.train.prefetch_threads == 3, "a finished run's record"

    (tmp_path / "both.yaml").write_text("train: {prefetch_workers: 3, prefetch_threads: 2}\n")
    for arguments in ([f"--config={tmp_path}/both.yaml"], ["--train.prefetch_workers=3"]):
        with pytest.raises(UserError, match=r"train.prefetch_workers: .*did you mean train.prefetch_threads\?"):
            read(*arguments)


def test_help_begins_with_the_script_and_names_all_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.match(r"usage: \S+ \[--config FILE\] ... \[--section.key=value\] ...\n\ndoc\n\n", shown)
    for key, knob in knobs().items():
        assert (f"--{key} " in shown) == (key.split(".")[0] in TRAINING_SECTIONS)
        for name in knob.choices or []:
            assert re.search(rf"\b{name}\b", shown), key
    assert "--model CONFIG" not in shown, "a file for one section would be refused as an unknown key"


def test_each_configuration_has_lists_of_its_own() -> None:
    assert Config().tokenizer.user_defined_symbols == []
    assert TokenizerConfig().user_defined_symbols is not TokenizerConfig().user_defined_symbols


def test_every_configuration_of_the_repository_reads() -> None:
    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert found
    for path in found:
        assert read_config(
            [knob.name for knob in dataclasses.fields(Config)], None, [f"--config={path}"]
        ).stream.directory
