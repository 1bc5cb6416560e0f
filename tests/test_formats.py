"""docs/formats.md against real files: its tables name every field, and its two programs read what the library reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TrainHere, make_text, records
from safetensors.torch import load_file

from rnnlm.config import Config, CorpusConfig, ModelConfig, RunConfig, StreamConfig
from rnnlm.data.adopt import adopt
from rnnlm.data.build.build import Build
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.substreams import SubstreamDataset
from rnnlm.data.token_table import table_alone
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.model.language_model import RecurrentLM
from rnnlm.texts import NamedSource
from rnnlm.train.ending import mark_preempted
from rnnlm.train.load import load_model
from rnnlm.yaml_file import load_yaml

TEXT = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
NUMPY, PYTORCH = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
WHOLE = {"records", "files", "sources", "source.shares", "configuration", "scaler", "ranks", "parameters", "ran_in"}


def documented(heading: str) -> set[str]:
    """The names in the first column of the tables between a heading, as `stream.json`, and the next one."""
    section = re.split(r"\n#+ ", TEXT.split(f"# `{heading}`\n")[1])[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def fields(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names in a JSON object, as `memory.best_loss` and `shards[].name`; what is in WHOLE has no parts."""
    for key, each in value.items():
        name = prefix + key
        if isinstance(each, dict) and name not in WHOLE:
            yield from fields(each, f"{name}.")
            continue
        yield name
        if isinstance(each, list) and each and isinstance(each[0], dict) and name not in WHOLE:
            yield from fields(each[0], f"{name}[].")


def fields_of(path: Path) -> set[str]:
    return {*fields(json.loads(path.read_text()))}


@pytest.fixture
def run(train_here: TrainHere, experiment: Path, tmp_path: Path) -> Path:
    """A run of four steps."""
    done = train_here(f"--config={experiment}", "--train.max_steps=4")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_the_numpy_program_reads_windows_and_documents(streams: Path, train_stream: TokenStream) -> None:
    assert len([line for line in NUMPY.splitlines() if line]) == 10
    names: dict[str, Any] = {}
    exec(NUMPY.replace("streams/my", str(streams)), names)

    ring = Ring(len(train_stream), names["rows"], names["seq_len"])
    batch = SubstreamDataset(train_stream, ring, 0, names["rows"], 0, ring.windows_per_epoch).batch(names["step"])
    assert np.array_equal(names["windows"], batch.tokens.numpy())

    tokenizer, texts = train_stream.tokenizer(), {*make_text(400)}
    assert len(names["documents"]) == train_stream.manifest.documents
    for document in names["documents"]:
        assert document[-1] == tokenizer.eos_id and tokenizer.decode(document[:-1]) in texts


def test_the_pytorch_program_computes_what_the_model_does(run: Path, train_stream: TokenStream) -> None:
    assert len([line for line in PYTORCH.splitlines() if line]) == 10
    directory, names = run / "checkpoints/step-00000004", dict[str, Any]()
    exec(PYTORCH.replace("runs/my/checkpoints/step-00000500", str(directory)), names)

    recorded = load_yaml(run / "config.yaml")
    config = Config(model=ModelConfig(**recorded["model"]), run=RunConfig(**recorded["run"]))
    model, _, _ = load_model(config, directory, torch.device("cpu"))
    hidden = load_file(directory / "hidden.safetensors")
    rows, seq_len = (recorded["train"][name] for name in ("global_batch_size", "seq_len"))
    assert hidden.pop("ended").tolist() == Ring(len(train_stream), rows, seq_len).place(4, 0, rows)[0].tolist()

    logits, hidden = model.next_logits(names["ids"], hidden)
    assert torch.allclose(names["log_probabilities"][:, -1], logits.log_softmax(dim=-1), rtol=0, atol=1e-6)
    assert len(hidden) == 2 * config.model.layers
    for name, state in hidden.items():
        assert torch.allclose(names[name[-1]][int(name[5])], state, rtol=0, atol=1e-6), name


def test_every_field_of_a_stream_is_documented(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text.txt").write_bytes("\n".join(make_text(50)).encode() + b"\nbad \xff\n\n")
    named = {"web": NamedSource(str(tmp_path / "text.txt"))}
    corpus = CorpusConfig(train=named, on_bad_record="replace")
    built = Build(Config(corpus=corpus, stream=StreamConfig(directory=str(tmp_path / "built"))), tokenizer)
    assert built.run(lambda size: None)["train"].mended == 1
    (tmp_path / "one.txt").write_text("one document")
    one = Config(corpus=CorpusConfig(str(tmp_path / "one.txt")), stream=StreamConfig(str(tmp_path / "one")))
    assert Build(one, tokenizer).run(lambda size: None)["train"].source["valid_split"] == "by position"
    np.array([5, 9, 1, 7], "<u2").tofile(tmp_path / "raw.bin")
    adopt(tmp_path / "raw.bin", tmp_path / "adopted/train", vocab_size=300, eos_id=1, dtype="uint16")

    manifests = [tmp_path / name / "train/stream.json" for name in ("built", "adopted", "one")]
    assert documented("stream.json") == set().union(*map(fields_of, manifests))
    dtype = json.loads(manifests[1].read_text())["dtype"]
    assert np.memmap(tmp_path / "adopted/train/shard-00000.bin", dtype, "r").tolist() == [5, 9, 1, 7]

    assert documented("sources.jsonl") == fields_of(tmp_path / "built/train/sources.jsonl")
    rejected = tmp_path / "built/train/rejected.jsonl"
    assert documented("rejected.jsonl") == fields_of(rejected)
    assert f"`{json.loads(rejected.read_text())['reason']}`" in TEXT


def test_every_field_of_a_table_of_words_is_documented() -> None:
    table = table_alone({"<unk>": 0, "</s>": 1, "a": 2, "<space>": 3, "<blk>": 4}, "")
    head, *lines = table.model.decode().splitlines()
    assert documented("words.txt") == {*json.loads(head.removeprefix("# rnnlm words 1 "))}
    assert lines == ["<unk> 0", "</s> 1", "a 2", "<space> 3", "<blk> 4"]


def test_every_field_of_a_run_is_documented(run: Path) -> None:
    for kind in ("start", "train", "valid"):
        assert documented(kind) | {"kind"} == {*records(run, kind)[0]}, kind
    mark_preempted(run, "SIGTERM", 4, 4)
    assert documented("preempted.json") == fields_of(run / "preempted.json")

    checkpoint = run / "checkpoints/step-00000004"
    for name in ("manifest.json", "trainer.json"):
        assert documented(name) == fields_of(checkpoint / name), name

    for part in ("model", "optimizer", "hidden"):
        names = {re.sub(r"\d+", "k", name) for name in load_file(checkpoint / f"{part}.safetensors")}
        if part == "optimizer":
            names = {f"<parameter>.{name.rpartition('.')[2]}" for name in names} | {"<parameter>.momentum_buffer"}
        assert documented(f"{part}.safetensors") == names, part


def test_a_tied_head_is_not_stored() -> None:
    model = RecurrentLM(ModelConfig(embedding_size=8, hidden_size=8, tied=True), 300, seed=1)
    names = {name for name, _ in model.named_parameters()}
    assert "embedding.weight" in names and "head.weight" not in names
