"""Building: what goes in comes out, splits ignore files and order, finished and foreign streams are known."""

from __future__ import annotations

import dataclasses
import gzip
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_text

from rnnlm.config import Config, CorpusConfig, StreamConfig
from rnnlm.data.build import encode, executor
from rnnlm.data.build.build import Build
from rnnlm.data.build.encode import EncodeContext, EncodeTask, run_encode_task
from rnnlm.data.build.shared_tasks import LOCKS, taken
from rnnlm.data.jobs import jobs
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import fraction_of


def config_of(directory: Path, train: object, **corpus: object) -> Config:
    stream = StreamConfig(directory=str(directory), valid_fraction=0.2, shard_tokens=500)
    return Config(corpus=CorpusConfig(train=train, **corpus), stream=stream)  # type: ignore[arg-type]


def run(config: Config, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Build; the documents of each split, decoded."""
    manifests = Build(config, tokenizer).run(lambda size: None)
    found = {}
    for split in manifests:
        stream = TokenStream(Path(config.stream.directory) / split)
        assert list(stream.verify())
        tokens = stream.windows(np.array([0]), len(stream))[0]
        ends = stream.documents[:, 0]
        found[split] = [tokenizer.decode(tokens[a : b - 1]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return found


def test_every_document_once_in_order_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = list(dict.fromkeys(make_text(300, seed=5)))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")

    found = run(config_of(tmp_path / "out", str(path)), tokenizer)
    assert [text for text in texts if text in set(found["train"])] == found["train"]
    assert [text for text in texts if text in set(found["valid"])] == found["valid"]
    assert sorted(found["train"] + found["valid"]) == sorted(texts)
    assert 0.1 < len(found["valid"]) / len(texts) < 0.3

    manifest = TokenStream(tmp_path / "out/train").manifest
    assert manifest.records["empty"] == len(texts) - 1
    assert manifest.records["read"] == manifest.records["kept"] + manifest.records["empty"]
    assert manifest.text_bytes == sum(len(text.encode()) for text in found["train"])
    assert manifest.words == sum(len(text.split()) for text in found["train"])


def test_one_file_or_seven_small_units_or_large_give_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_text(200, seed=6)
    (tmp_path / "one.txt").write_text("\n".join(texts), encoding="utf-8")
    for file in range(7):
        share = texts[file * 200 // 7 : (file + 1) * 200 // 7]
        (tmp_path / f"file{file}.txt").write_text("\n".join(share), encoding="utf-8")
    run(config_of(tmp_path / "a", str(tmp_path / "one.txt")), tokenizer)
    run(config_of(tmp_path / "b", str(tmp_path / "file*.txt"), unit_bytes=300), tokenizer)
    for split in ("train", "valid"):
        for file in sorted((tmp_path / "a" / split).glob("[sd]*.npy")):  # shards, documents
            assert file.read_bytes() == (tmp_path / "b" / split / file.name).read_bytes()


def test_given_valid_and_test_files_are_taken_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = {split: make_text(30, seed=seed) for seed, split in enumerate(("train", "valid", "test"))}
    for split, lines in texts.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    given = {split: str(tmp_path / f"{split}.txt") for split in ("valid", "test")}
    assert run(config_of(tmp_path / "out", str(tmp_path / "train.txt"), **given), tokenizer) == texts


def test_again_is_done_and_other_inputs_are_refused(tmp_path: Path, tokenizer: Tokenizer, corpus: Path) -> None:
    config = config_of(tmp_path / "out", str(corpus))
    first = Build(config, tokenizer).run(lambda size: None)
    before = (tmp_path / "out/train/stream.json").stat().st_mtime_ns
    assert Build(config, tokenizer).run(lambda size: None) == first
    assert (tmp_path / "out/train/stream.json").stat().st_mtime_ns == before
    other = dataclasses.replace(config, stream=dataclasses.replace(config.stream, split_seed=1))
    with pytest.raises(UserError, match=r"out/train: a stream is there with other split_seed; remove it, set"):
        Build(other, tokenizer).run(lambda size: None)


def test_a_commit_that_died_between_the_splits_is_finished(tmp_path: Path, tokenizer: Tokenizer, corpus: Path) -> None:
    config = config_of(tmp_path / "out", str(corpus))
    run(config, tokenizer)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out/train").iterdir()}
    (tmp_path / "out/train").rename(tmp_path / "out/train.partial")  # valid committed, train not yet
    run(config, tokenizer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/train").iterdir()} == expected


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_an_empty_corpus_is_refused_and_leaves_no_stream(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(UserError, match=r"corpus.train: no text in it"):
        Build(config_of(tmp_path / "out", str(tmp_path / "empty.txt")), tokenizer).run(lambda size: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build"]


def streamed_job(tmp_path: Path, tokenizer: Tokenizer) -> tuple[EncodeContext, EncodeTask]:
    """The one job of a compressed file of several units, and the directories of a build that has not begun it."""
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress("\n".join(make_text(200, seed=6)).encode()))
    build = Build(config_of(tmp_path / "out", str(tmp_path / "text.txt.gz"), unit_bytes=2000), tokenizer)
    context = build.encoding
    for path in (context.work / "jobs", context.work / LOCKS, context.directory("train")):
        path.mkdir(parents=True)
    (context.work / "tokenizer.model").write_bytes(tokenizer.model)
    (job,) = jobs("train", build.inputs.by_split["train"], build.config.corpus, 1)
    return context, EncodeTask(job, context.entry_path(job))


def test_a_job_that_has_to_stop_does_so_between_two_units(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, task = streamed_job(tmp_path, tokenizer)
    stop, write_unit = threading.Event(), encode.write_unit

    def third_is_the_last(path: Path, *arguments: Any) -> None:
        write_unit(path, *arguments)
        if path.stem.endswith("-000002"):
            stop.set()

    monkeypatch.setattr(executor, "_stop", stop)
    monkeypatch.setattr(encode, "write_unit", third_is_the_last)
    run_encode_task(context, task)
    assert len(list(context.directory("train").iterdir())) == 3 and not task.path.exists()

    stop.clear()
    monkeypatch.setattr(encode, "write_unit", write_unit)
    run_encode_task(context, task)
    assert len(list(context.directory("train").glob("*.unit"))) > 3 and task.path.exists()


def test_a_job_is_not_done_while_someone_else_is_at_one_of_its_units(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context, task = streamed_job(tmp_path, tokenizer)
    theirs = context.unit_path(task.job, 2)
    with taken(context.work / LOCKS, theirs) as is_mine:
        assert is_mine
        for _ in range(2):  # which units there are is not known, then known
            run_encode_task(context, task)
            assert len(list(context.directory("train").glob("*.unit"))) > 3
            assert not theirs.exists() and not task.path.exists()

    run_encode_task(context, task)
    assert theirs.exists() and task.path.exists()


@pytest.mark.parametrize("empty", ["train", "valid"])
def test_a_corpus_of_two_documents_says_why_a_split_is_empty_and_what_helps(
    tmp_path: Path, tokenizer: Tokenizer, empty: str
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("anna sees the cat\n\nbob likes a dog\n")
    hashed = [fraction_of(text.encode(), 0) for text in ("anna sees the cat", "bob likes a dog")]
    fraction = (max(hashed) + 1) / 2 if empty == "train" else min(hashed) / 2
    stream = StreamConfig(directory=str(tmp_path / "s"), valid_fraction=fraction)
    two = Config(corpus=CorpusConfig(train=str(path), document="paragraph"), stream=stream)

    other = "valid" if empty == "train" else "train"
    with pytest.raises(
        UserError, match=rf"corpus.train has 2 documents, whose hashes give all of them to {other} .*, so {empty} "
    ):
        Build(two, tokenizer).run(lambda size: None)
    whole = dataclasses.replace(two, stream=dataclasses.replace(stream, valid_fraction=0))
    assert set(run(whole, tokenizer)) == {"train"}, "the last way out that the message names"
