"""What users type and write in YAML: nothing is dropped in silence, and what is refused is named in plain words."""

from __future__ import annotations

import ast
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, RunHere, environment

from rnnlm.cli import read_config, run_entry_point
from rnnlm.config import TRAINING_SECTIONS, Config, knobs
from rnnlm.errors import UserError
from rnnlm.key_names import KEY_OF, READERS, nearest_key
from rnnlm.yaml_file import dump_yaml, load_yaml

SCRIPTS = [path for folder in ("launch", "tools") for path in sorted((ROOT / folder).glob("*.py"))]
BUILDING_SECTIONS = ("corpus", "tokenizer", "stream", "build")


def read(*argv: str, sections: Sequence[str] = TRAINING_SECTIONS) -> Config:
    return read_config(sections, None, argv)


def refused(*argv: str, sections: Sequence[str] = TRAINING_SECTIONS) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*argv, sections=sections)
    return str(caught.value).split("; ")


# Options


def test_a_list_that_is_given_twice_is_refused_with_both_and_a_list_that_grows_is_not() -> None:
    assert refused("--corpus.train=a.txt", "--corpus.train", "b 1.txt", sections=BUILDING_SECTIONS) == [
        "corpus.train: given twice, as a.txt and as b 1.txt, of which the last alone would count",
        "give both as --corpus.train='[a.txt, b 1.txt]'",
    ]
    both = read("--corpus.train=[a.txt, b 1.txt]", sections=BUILDING_SECTIONS)
    assert both.corpus.train == ["a.txt", "b 1.txt"]
    assert read("--corpus.train=[a.txt]", "--corpus.train+=b 1.txt", sections=BUILDING_SECTIONS) == both


def test_a_single_value_that_is_given_twice_counts_as_the_last_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert read("--train.seed=3", "--train.seed=3", "--train.seed", "4").train.seed == 4
    assert capsys.readouterr().err == "warning: train.seed: given twice, as 3 and as 4; the last counts\n"


def test_the_file_of_a_run_that_was_moved_names_the_place_where_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, named = tmp_path / "new", tmp_path / "old"
    (here / "checkpoints").mkdir(parents=True)
    (here / "config.yaml").write_text(f"run: {{directory: {named}}}")
    given = f"--config={here}/config.yaml"
    assert read(given).run.directory == str(here)
    note = f"note: {here}/config.yaml names run.directory={named}, which is not there; {here} is taken\n"
    assert capsys.readouterr().err == note
    read(given, sections=BUILDING_SECTIONS)  # which has no use for a run

    # whoever names another one has chosen, and a file elsewhere is an experiment
    (tmp_path / "later.yaml").write_text("run: {directory: mine}")
    assert read(given, f"--config={tmp_path}/later.yaml").run.directory == "mine"
    assert read(given, "--run.directory=mine").run.directory == "mine"
    (tmp_path / "config.yaml").write_bytes((here / "config.yaml").read_bytes())
    assert read(f"--config={tmp_path}/config.yaml").run.directory == str(named)
    assert not capsys.readouterr().err

    named.mkdir()
    (fault, way_out) = refused(given)
    assert fault.endswith(f"new/config.yaml: names another run.directory, {named}, which is there too")
    assert way_out == f"say which is meant, with --run.directory={here} or --run.directory={named}"
    named.rmdir()
    named.symlink_to(here)
    assert read(given).run.directory == str(named), "another name of the same place"


def test_files_count_in_the_order_they_are_named_also_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("model: {layers: 1}")
    (tmp_path / "b").write_text("model: {layers: 2}")
    a, b = f"--config={tmp_path}/a", f"--config={tmp_path}/b"
    assert [read(*order).model.layers for order in ((a, b), (b, a), (a, b, a))] == [2, 1, 1]


def test_arguments_without_an_option_and_options_without_a_value_are_named() -> None:
    assert refused("--corpus.train", "a.txt", "b.txt", "--build.dask", sections=BUILDING_SECTIONS) == [
        "b.txt: belongs to no option",
        "several values are a list, as in --corpus.train='[a.txt, b.txt]'",
        "build.dask: has no value",
        "give one, as in --build.dask=...",
    ]


def test_an_option_that_this_script_does_not_read_names_those_that_do(tmp_path: Path) -> None:
    assert refused("--tokenizer.vocab_size=3", "--build.workers=1") == [
        "tokenizer.vocab_size: this script does not read it",
        "give it to tools/train_tokenizer.py or tools/build_stream.py",
        "build.workers: this script does not read it",
        "give it to tools/train_tokenizer.py or tools/build_stream.py",
    ]
    (tmp_path / "all").write_text("tokenizer: {vocab_size: 3}")
    assert read(f"--config={tmp_path}/all") == Config()


def test_the_readers_of_a_section_are_the_scripts_that_ask_for_it() -> None:
    found: dict[str, list[str]] = {section: [] for section in READERS}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "read_config":
                sections = ast.unparse(node.args[0])
                asked = TRAINING_SECTIONS if sections == "TRAINING_SECTIONS" else ast.literal_eval(sections)
                for section in asked:
                    found[section].append(path.relative_to(ROOT).as_posix())
    assert {section: set(names) for section, names in READERS.items()} == {k: set(v) for k, v in found.items()}


# Names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("train.batch-size", "train.global_batch_size"),
        ("bs", "train.global_batch_size"),
        ("train.bptt", "train.seq_len"),
        ("nlayers", "model.layers"),
        ("model.nhid", "model.hidden_size"),
        ("emsize", "model.embedding_size"),
        ("wd", "optim.weight_decay"),
        ("optim.clip", "optim.clip_norm"),
        ("epochs", "train.epochs"),
        ("optim.epochs", "train.epochs"),
        ("train.hidden_size", "model.hidden_size"),
        ("model.hiden_size", "model.hidden_size"),
        ("trian.seed", "train.seed"),
        ("generate.sed", "generate.seed"),
        ("run.dir", "run.directory"),
        ("optim.moment", "optim.momentum"),
        ("model.qqq", None),
    ],
)
def test_the_knob_that_was_meant(typed: str, meant: str | None) -> None:
    assert nearest_key(typed, knobs()) == meant


def test_other_names_lead_to_knobs_and_hide_none() -> None:
    assert set(KEY_OF.values()) <= set(knobs())
    own = {key.partition(".")[2] for key in knobs()}
    assert own & set(KEY_OF) == {"batch_size"}, "eval's is one, but train's is meant"


def test_a_key_that_looks_like_none_gets_no_guess() -> None:
    assert refused("--model.qqq=1") == [
        "model.qqq: no such key in the command line",
        "--help lists those that there are",
    ]


# Values


def test_all_values_of_wrong_types_are_named_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("model: {tied: maybe, layers: 2.5}\ngenerate:\n  prompts:\n  - ROMEO:\n  - x\n")
    assert refused(f"--config={tmp_path}/a", "--optim.learning_rate=abc", "--model.dropout_kind=lock") == [
        "model.tied=maybe: expected true or false",
        "model.layers=2.5: expected a whole number, as in 2",
        "generate.prompts=[{'ROMEO': None}, 'x']: expected a text or a list of texts, as in '[one, two]'",
        "put quotes around what has a colon",
        "optim.learning_rate=abc: expected a number, as in 0.001",
        "model.dropout_kind=lock: expected one of ordinary, locked",
        "did you mean locked?",
    ]


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [("[First Citizen:, ROMEO:]", '["First Citizen:", "ROMEO:"]'), ("[1984, 'a']", '["1984", a]')],
)
def test_a_list_of_prompts_that_yaml_reads_as_one_text_is_refused(typed: str, quoted: str) -> None:
    faults = refused(f"--generate.prompts={typed}")
    assert faults[0] == f"generate.prompts={typed}: is one text to YAML, not a list"
    assert f"as in '{quoted}'" in faults[1]
    assert len(read(f"--generate.prompts={quoted}").generate.prompts) == 2


# YAML


def test_a_key_that_stands_twice_in_yaml_is_refused_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("train: {seed: 1}\nmodel:\n  layers: 1\n  tied: true\n  layers: 2\ntrain: {seed: 2}\n")
    with pytest.raises(UserError) as caught:
        load_yaml(tmp_path / "a")
    for fault in ("train stands on line 1 and again on line 6", "layers stands on line 3 and again on line 5"):
        assert f"--config={tmp_path}/a: {fault}; keep one of them" in str(caught.value)


def test_lines_without_dashes_are_refused_for_a_list_and_one_text_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("generate:\n  prompts:\n    this film\n    the acting\nrun:\n  directory: a\n    b\n")
    with pytest.raises(UserError, match=r"generate.prompts: lines 3 to 4 are one text; put '- ' before each"):
        load_yaml(tmp_path / "a")
    (tmp_path / "b").write_text('generate:\n  prompts: "this film\n    the acting"\nrun:\n  directory: a\n    b\n')
    assert load_yaml(tmp_path / "b") == {"generate": {"prompts": "this film the acting"}, "run": {"directory": "a b"}}


def test_yaml_that_refers_to_itself_is_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("model: &all {layers: *all}\n")
    assert load_yaml(tmp_path / "a")["model"].keys() == {"layers"}


# The run of an evaluation


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with the record of a run, and two files of experiments that name it, one with another model."""
    directory = tmp_path / "run"
    directory.mkdir()
    recorded = read("--model.hidden_size=48", "--eval.batch_size=3", f"--run.directory={directory}")
    (directory / "config.yaml").write_text(dump_yaml(recorded, TRAINING_SECTIONS))
    (tmp_path / "mine.yaml").write_text(f"run: {{directory: {directory}}}\nmodel: {{hidden_size: 9}}\n")
    return directory


def of_run(*argv: str) -> Config:
    return read_config(("stream", "model", "train", "eval", "run"), None, argv, of_run=True)


def test_the_file_of_an_experiment_names_its_run_and_an_option_another(run: Path, tmp_path: Path) -> None:
    mine = f"--config={tmp_path}/mine.yaml"
    config = of_run(mine)
    assert (config.run.directory, config.eval.batch_size) == (str(run), 3)
    assert config.model.hidden_size == 48, "the run's model is the one that was trained"
    assert of_run("--run.directory", str(run)) == of_run("--config", f"{tmp_path}/mine.yaml") == config
    assert of_run(mine, "--eval.batch_size=4").eval.batch_size == 4

    with pytest.raises(UserError, match=r"run.directory=elsewhere: no run there"):
        of_run(mine, "--run.directory=elsewhere")
    with pytest.raises(UserError, match=r"model.hidden_size: is part of the run's model"):
        of_run(mine, "--model.hidden_size=48")


@pytest.mark.parametrize("options", [(), ("--eval.split=test",), ("--config={}/empty",)])
def test_without_a_run_there_is_one_line_with_the_way_out(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match=r"run.directory is not set; name a run, as in .*, or a file that does, as in"):
        of_run(*(option.format(tmp_path) for option in options))


@pytest.mark.parametrize("script", ["launch/eval.py", "launch/generate.py"])
def test_scripts_without_arguments_say_what_they_need(script: str, run_here: RunHere) -> None:
    done = run_here(script)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run.directory is not set; name a run") and done.stderr.count("\n") == 1


# Launchers


def test_a_mistake_is_left_where_torchrun_looks_for_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise UserError("train.seed=x: too odd")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        run_entry_point(main)
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: train.seed=x: too odd"
    assert capsys.readouterr().err == "error: train.seed=x: too odd\n"


# Outputs


def test_an_output_that_nobody_reads_to_its_end_is_no_fault() -> None:
    """As of `launch/eval.py | head`."""
    code = "from rnnlm.cli import run_entry_point\nrun_entry_point(lambda: print('x' * 10**6))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


# No virtual environment


STARTED_BY_USERS = [path for path in SCRIPTS if "run_entry_point" in path.read_text() and "benchmark" not in path.stem]


@pytest.mark.parametrize("script", STARTED_BY_USERS, ids=lambda path: path.stem)
def test_without_the_package_a_script_says_what_to_type(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rnnlm.cli", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert str(ended.value.code).startswith("error: ") and ". .venv/bin/activate" in str(ended.value.code)


def test_a_python_without_packages_gets_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / TRAIN)], env={**environment(), "PYTHONPATH": ""}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: No module named 'rnnlm'; type this first: ") and done.stderr.count("\n") == 1


def test_a_library_that_is_missing_is_one_line_and_a_module_of_ours_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.raises(SystemExit) as ended:
        run_entry_point(lambda: main("accelerate"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: No module named 'accelerate'; type this first: . .venv")
    with pytest.raises(ModuleNotFoundError):
        run_entry_point(lambda: main("rnnlm.train.nothing"))
