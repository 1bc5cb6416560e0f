"""Tokens of other programs: adopted as they lie, read like any stream, and every kind of misfit refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import RunHere, TrainHere, records, results
from foreign import CODES, ENDS, MARKS, SEQUENCES, TOKENS, plain, write_llmc, write_megatron, write_npy, write_raw

from rnnlm.config import Config, EvalConfig, ModelConfig, RunConfig, StreamConfig
from rnnlm.data.adopt import adopt
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import StreamError
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.model.evaluate import evaluate
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.inputs import open_streams


def assert_ring(stream: TokenStream, tokens: npt.NDArray[Any]) -> None:
    starts = np.array([0, 3, len(tokens) - 1, -2, 10**9])
    for length in (1, 5, 2 * len(tokens) + 1):
        found = stream.windows(starts, length)
        assert found.dtype.kind == "u" and found.dtype.itemsize <= 4
        assert np.array_equal(found, tokens[(starts[:, None] + np.arange(length)) % len(tokens)])
        assert torch.from_numpy(found).to(torch.int64).tolist() == found.tolist()


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_tokens_are_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int) -> None:
    monkeypatch.setattr("rnnlm.data.adopt.BLOCK", block)
    tokens = np.array([1, 50256, 9, 50256, 50256, 3, 50255])
    path = write_raw(tmp_path / "train.bin", tokens, dtype)
    before = path.read_bytes()
    manifest = adopt(path, tmp_path / "s/train", 50257, 50256, dtype)
    stream = TokenStream(tmp_path / "s/train")
    assert_ring(stream, tokens)
    assert stream.documents.tolist() == [[2, 0, 0], [4, 0, 0], [5, 0, 0], [7, 0, 0]]
    assert (manifest.documents, manifest.eos_tokens, manifest.tokens, manifest.tokenizer) == (4, 3, 7, "")
    assert [name for name, _ in stream.verify()] == ["shard-00000.bin", "documents.npy"]
    assert (tmp_path / "s/train/shard-00000.bin").readlink() == path.resolve() and path.read_bytes() == before
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["train"]


@pytest.mark.parametrize("block", [1, 2, 3, 2**20])
@pytest.mark.parametrize("dtype", CODES)
def test_a_megatron_dataset_is_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int
) -> None:
    monkeypatch.setattr("rnnlm.data.adopt.BLOCK", block)
    manifest = adopt(write_megatron(tmp_path / "corpus.idx", SEQUENCES, MARKS, dtype), tmp_path / "s", 10, 1)
    stream = TokenStream(tmp_path / "s")
    assert_ring(stream, np.array(TOKENS))
    assert stream.documents.tolist() == [[end, 0, 0] for end in ENDS]
    assert (manifest.documents, manifest.eos_tokens) == (5, 3)
    assert [name for name, _ in stream.verify()] == ["shard-00000.bin", "documents.npy"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_an_array_of_numpy_is_a_stream_of_its_numbers_alone(tmp_path: Path, dtype: str) -> None:
    path = write_npy(tmp_path / "t.npy", TOKENS, dtype)
    manifest = adopt(path, tmp_path / "s", 10, 1)
    assert (manifest.tokens, manifest.source["dtype"], manifest.source["adopted"]) == (len(TOKENS), dtype, "npy")
    assert_ring(TokenStream(tmp_path / "s"), np.array(TOKENS))
    assert list(TokenStream(tmp_path / "s").verify())

    path.rename(tmp_path / "t.bin")  # its name does not matter
    assert adopt(tmp_path / "t.bin", tmp_path / "again", 10, 1, dtype).digest == manifest.digest


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_file_of_llmc_is_a_stream_without_its_header(tmp_path: Path, dtype: str) -> None:
    manifest = adopt(write_llmc(tmp_path / "t.bin", TOKENS, dtype), tmp_path / "s", 10, 1)
    assert (manifest.tokens, manifest.source["dtype"], manifest.source["header_bytes"]) == (len(TOKENS), dtype, 1024)
    assert_ring(TokenStream(tmp_path / "s"), np.array(TOKENS))
    assert list(TokenStream(tmp_path / "s").verify())
    write_raw(tmp_path / "t.bin", TOKENS, dtype)
    with pytest.raises(StreamError, match=r"t.bin: has \d+ bytes, expected \d+ bytes; .* adopt the stream again"):
        TokenStream(tmp_path / "s")


def test_a_stream_that_an_earlier_version_adopted_is_read(tmp_path: Path) -> None:
    manifest = adopt(write_raw(tmp_path / "t.bin", TOKENS), tmp_path / "s", 10, 1, "uint16")
    source = {name: value for name, value in manifest.source.items() if name != "header_bytes"}
    (tmp_path / "s/stream.json").write_text(replace(manifest, source=source).to_json())
    assert_ring(TokenStream(tmp_path / "s"), np.array(TOKENS))


def test_a_vocabulary_without_eos_is_one_document(tmp_path: Path) -> None:
    manifest = adopt(write_raw(tmp_path / "c.bin", [3, 1, 2]), tmp_path / "s", 65, -1, "uint16")
    assert (manifest.documents, manifest.eos_tokens) == (1, 0)
    assert list(TokenStream(tmp_path / "s").verify())


def test_the_same_tokens_are_the_same_stream_wherever_they_lie(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.bin", "b.bin"):
        manifest = adopt(write_raw(tmp_path / name, [3, 1, 2]), tmp_path / f"{name}.stream", 10, 1, "uint16")
        digests.add(manifest.digest)
    assert len(digests) == 1


def no_dtype(tmp: Path) -> Path:
    return write_raw(tmp / "t.bin", [3, 1])


def cut_index(tmp: Path) -> Path:
    path = write_megatron(tmp / "t.idx", SEQUENCES, MARKS)
    path.write_bytes(path.read_bytes()[:-3])
    return path


def cut_array(tmp: Path) -> Path:
    path = write_npy(tmp / "t.npy", [3, 1])
    path.write_bytes(path.read_bytes()[:-1])
    return path


def cut_header(tmp: Path) -> Path:
    (tmp / "t.idx").write_bytes(b"MMIDIDX\x00\x00\x01")
    return tmp / "t.idx"


def without_bin(tmp: Path) -> Path:
    path = write_megatron(tmp / "t.idx", SEQUENCES, MARKS)
    path.with_suffix(".bin").unlink()
    return path


def longer_bin(tmp: Path) -> Path:
    path = write_megatron(tmp / "t.idx", SEQUENCES, MARKS)
    write_raw(tmp / "t.bin", [*TOKENS, 4], "int32")
    return path


def of_floats(tmp: Path) -> Path:
    path = write_megatron(tmp / "t.idx", SEQUENCES, MARKS)
    data = bytearray(path.read_bytes())
    data[17] = 6
    path.write_bytes(data)
    return path


def negative_length(tmp: Path) -> Path:
    """Lengths 3, -1, 2, whose sequences seem to lie one behind the other: at bytes 0, 12 and 8."""
    path = write_megatron(tmp / "t.idx", [[5, 9, 1], [7], [8, 1]], [0, 3])
    data = bytearray(path.read_bytes())
    data[38:42], data[62:70] = (-1).to_bytes(4, "little", signed=True), (8).to_bytes(8, "little")
    path.write_bytes(data)
    write_raw(tmp / "t.bin", [5, 9, 1, 7], "int32")
    return path


MISFITS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "dtype too narrow for the file": (
        lambda tmp: write_raw(tmp / "t.bin", [5, 70_000 - 2**16, 9], "uint32"),
        {"dtype": "uint16", "vocab_size": 9},
        r"t.bin: token 2 has the id 4464, outside the vocabulary of 9; give the --vocab-size and the --dtype",
    ),
    "dtype too wide for the file": (
        lambda tmp: write_raw(tmp / "t.bin", [5, 7, 9, 1]),
        {"dtype": "uint32"},
        rf"t.bin: token 0 has the id {7 * 2**16 + 5}, outside the vocabulary of 10",
    ),
    "odd size": (
        lambda tmp: write_raw(tmp / "t.bin", [5, 7, 9], "uint8"),
        {"dtype": "uint16"},
        r"t.bin: has 3 bytes, expected a multiple of 2 above 0 for tokens of uint16",
    ),
    "no tokens": (lambda tmp: write_raw(tmp / "t.bin", []), {"dtype": "uint16"}, r"has 0 bytes, expected a multiple"),
    "vocabulary that the dtype cannot hold": (
        lambda tmp: write_raw(tmp / "t.bin", [5]),
        {"dtype": "uint16", "vocab_size": 100_000},
        r"--vocab-size=100000: .*t.bin has tokens of uint16, whose ids are below 65536",
    ),
    "dtype not given": (no_dtype, {}, r"t.bin: raw tokens do not tell their dtype; give --dtype=uint16 or uint32"),
    "EOS outside": (no_dtype, {"dtype": "uint16", "eos_id": 10}, r"--eos-id=10: outside the vocabulary of 10"),
    "no such file": (lambda tmp: tmp / "no.bin", {"dtype": "uint16"}, r"no.bin: no such file"),
    "no .bin": (without_bin, {}, r"t.bin: no such file; a Megatron-LM dataset is a .idx and a .bin of one name"),
    "negative id": (
        lambda tmp: write_megatron(tmp / "t.idx", [[3, -1]], [0, 1]),
        {},
        r"t.bin: token 1 has the id -1, outside the vocabulary of 10",
    ),
    "truncated index": (cut_index, {}, r"t.idx: has \d+ bytes, expected \d+ for 7 sequences and 6 marks"),
    "truncated header": (cut_header, {}, r"t.idx: has \d+ bytes, and its header alone has 34; copy it again"),
    "text": (
        lambda tmp: write_raw(tmp / "t.txt", [5, 1]),
        {"dtype": "uint16"},
        r"t.txt: a .txt file holds no raw tokens; give a .bin or .npy, or name it .bin if it does",
    ),
    "archive of arrays": (lambda tmp: write_raw(tmp / "t.npz", [5, 1]), {}, r"t.npz: a .npz file holds no raw tokens"),
    "no index": (lambda tmp: write_raw(tmp / "t.idx", [5] * 99), {}, r"t.idx: begins with .*expected b'MMIDIDX"),
    "floats": (of_floats, {}, r"t.idx: version 1, dtype code 6, 6 marks of documents; expected version 1"),
    "other dtype than the index": (
        lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, MARKS),
        {"dtype": "uint16"},
        r"--dtype=uint16: .*t.idx says int32; leave --dtype away",
    ),
    "negative length": (negative_length, {}, r"t.idx: sequence 1 has -1 tokens from byte 12"),
    "array of floats": (
        lambda tmp: write_npy(tmp / "t.npy", [3, 1], "float32"),
        {},
        r"t.npy: an array of float32 and shape \(2,\), expected integers in one dimension, little-endian",
    ),
    "array of two dimensions": (lambda tmp: write_npy(tmp / "t.npy", [[3, 1]]), {}, r"uint16 and shape \(1, 2\)"),
    "big-endian array": (lambda tmp: write_npy(tmp / "t.npy", [3, 1], ">u2"), {}, r"t.npy: an array of >u2 and shape"),
    "array of objects": (lambda tmp: write_npy(tmp / "t.npy", [None], "O"), {}, r"t.npy: cannot be read as an array"),
    "empty array": (lambda tmp: write_npy(tmp / "t.npy", []), {}, r"t.npy: has 0 bytes, expected a multiple of 2"),
    "no array": (lambda tmp: write_raw(tmp / "t.npy", [3, 1]), {"dtype": "uint16"}, r"t.npy: cannot be read as an"),
    "cut array": (cut_array, {}, r"t.npy: cannot be read as an array of numpy .*save it again"),
    "other dtype than the array": (
        lambda tmp: write_npy(tmp / "t.npy", [3, 1], "int32"),
        {"dtype": "uint16"},
        r"--dtype=uint16: .*t.npy says int32; leave --dtype away",
    ),
    "cut file of llm.c": (
        lambda tmp: write_llmc(tmp / "t.bin", [3, 1], count=3),
        {"dtype": "uint16"},
        r"t.bin: its header is llm.c's and tells of 3 tokens of uint16, but it has 1028 bytes; copy it again",
    ),
    "gap": (
        lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, MARKS, gap=4),
        {},
        r"t.idx: sequence 1 has 1 tokens from byte 16 of the .bin, expected them from byte 12.*without gaps",
    ),
    "more tokens than the index tells of": (longer_bin, {}, r"t.bin: has 15 tokens, but .*t.idx tells of 14"),
    "marks that fall": (
        lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, [0, 5, 3, 7]),
        {},
        r"t.idx: its documents are not its 7 sequences in order \(marks 0 ... 7\)",
    ),
    "marks that end early": (
        lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, [0, 5, 6]),
        {},
        r"not its 7 sequences in order \(marks 0 ... 6\)",
    ),
    "marks that begin late": (
        lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, [1, 5, 7]),
        {},
        r"not its 7 sequences in order \(marks 1 ... 7\)",
    ),
    "no marks": (lambda tmp: write_megatron(tmp / "t.idx", SEQUENCES, []), {}, r"0 marks of documents"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    made, options, message = MISFITS[name]
    source = made(tmp_path)
    with pytest.raises(UserError, match=message):
        adopt(source, tmp_path / "streams/train", **{"vocab_size": 10, "eos_id": 1, **options})
    assert not list(tmp_path.glob("streams/*")) and not list(tmp_path.glob("streams/.*"))


def test_a_killed_adoption_is_done_again_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "t.bin", [5, 1])
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial/shard-00000.bin").symlink_to(path)
    adopt(path, tmp_path / "s", 10, 1, "uint16")
    assert list(TokenStream(tmp_path / "s").verify())
    assert path.exists() and not (tmp_path / ".s.partial").exists()
    with pytest.raises(UserError, match="s: is already there; remove it"):
        adopt(path, tmp_path / "s", 10, 1, "uint16")


def test_a_file_that_changes_afterwards_is_refused_by_its_own_name(tmp_path: Path, run_here: RunHere) -> None:
    path = write_raw(tmp_path / "t.bin", [5, 7, 1])
    adopt(path, tmp_path / "s", 10, 1, "uint16")
    assert run_here("tools/verify_stream.py", "s").stdout.startswith("s: right; 3 tokens, 1 documents")

    write_raw(path, [5, 8, 1])
    done = run_here("tools/verify_stream.py", "s")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: s/shard-00000.bin -> {path}: its contents differ from the digest in stream.json\n",
    )

    write_raw(path, [5, 7, 1, 1])
    with pytest.raises(StreamError, match=rf"-> {path}: has 8 bytes, expected 6 bytes; .* adopt the stream again"):
        TokenStream(tmp_path / "s")

    path.unlink()
    with pytest.raises(StreamError, match=rf"-> {path}: is missing, expected 6 bytes; .* adopt the stream again"):
        TokenStream(tmp_path / "s")


def test_a_stream_without_a_tokenizer_says_so_and_takes_none_later(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_raw(tmp_path / "t.bin", [5, 7, 1])
    adopt(path, tmp_path / "s", 300, 1, "uint16")
    with pytest.raises(StreamError, match="adopted without a tokenizer; adopt it again with .*--tokenizer=my.model"):
        TokenStream(tmp_path / "s").tokenizer()
    (tmp_path / "s/tokenizer.model").write_bytes(tokenizer.model)
    with pytest.raises(StreamError, match="no part of the stream: tokenizer.model"):
        list(TokenStream(tmp_path / "s").verify())

    with pytest.raises(UserError, match="the tokenizer's are 300 and 1; give these"):
        adopt(path, tmp_path / "t", 299, 1, "uint16", tokenizer)
    adopt(path, tmp_path / "t", 300, 1, "uint16", tokenizer)
    stream = TokenStream(tmp_path / "t")
    assert stream.tokenizer().digest == tokenizer.digest
    assert [name for name, _ in stream.verify()] == ["tokenizer.model", "shard-00000.bin", "documents.npy"]


@pytest.mark.parametrize("count_eos", [True, False])
def test_evaluation_counts_eos_tokens_not_documents_and_leaves_out_what_is_unknown(
    tmp_path: Path, count_eos: bool
) -> None:
    adopt(write_megatron(tmp_path / "t.idx", SEQUENCES, MARKS), tmp_path / "s", 10, 1)
    model = RecurrentLM(ModelConfig(embedding_size=4, hidden_size=4, layers=1), 10, seed=3)
    found = evaluate(model, TokenStream(tmp_path / "s"), 2, count_eos)
    assert found.scored_tokens == 14 - (0 if count_eos else 3)
    figures = found.to_dict()
    assert figures["loss"] == pytest.approx(np.log(10), rel=0.1)
    assert [figures[key] for key in ("words", "text_bytes", "word_perplexity", "bits_per_byte")] == [None] * 4


def test_streams_of_two_vocabularies_do_not_go_together(tmp_path: Path) -> None:
    for name, size in (("train", 10), ("valid", 11)):
        adopt(write_raw(tmp_path / f"{name}.bin", [5, 7, 1]), tmp_path / "s" / name, size, 1, "uint16")
    config = Config(stream=StreamConfig(directory=str(tmp_path / "s")), eval=EvalConfig(), run=RunConfig(directory="r"))
    with pytest.raises(UserError, match="s/valid: has a vocabulary of 11, .*s/train one of 10; adopt both"):
        open_streams(config)


@pytest.mark.slow
def test_a_run_on_adopted_tokens_is_the_run_on_the_same_stream_but_for_its_text(
    streams: Path, experiment: Path, tmp_path: Path, run_here: RunHere
) -> None:
    """Trained on the tokens of the built streams, adopted as int32 and as uint16: the same losses to the bit."""
    tokens = {name: plain(TokenStream(streams / name)) for name in ("train", "valid")}
    train, vocabulary = tokens["train"], ("--vocab-size=300", "--eos-id=1")
    write_megatron(tmp_path / "train.idx", [train[:5000].tolist(), train[5000:].tolist()], [0, 1, 2])
    write_raw(tmp_path / "valid.bin", tokens["valid"])
    for name, *options in (("train.idx",), ("valid.bin", "--dtype=uint16")):
        done = run_here("tools/adopt_stream.py", name, f"mine/{Path(name).stem}", *options, *vocabulary)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"mine/valid: {len(tokens['valid']):,} tokens of uint16 in {tmp_path}/valid.bin, ")

    short = (f"--config={experiment}", "--train.max_steps=4", "--run.save_every_steps=2")
    assert run_here("launch/train.py", *short, "--run.directory=theirs").returncode == 0
    done = run_here("launch/train.py", *short, "--stream.directory=mine", "--run.directory=r", "--stream.verify=true")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "r") == results(tmp_path / "theirs")
    assert "samples.md" not in done.stdout and "bits/byte" not in done.stderr
    assert records(tmp_path / "r", "valid")[-1]["bits_per_byte"] is None
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "config.yaml", "checkpoints", "metrics.jsonl", "curves.png", "lock",
    }  # fmt: skip

    longer = run_here(
        "launch/train.py", *short[:1], "--stream.directory=mine", "--run.directory=r", "--train.max_steps=5"
    )
    assert longer.returncode == 0 and "resuming from step 4 of 5" in longer.stderr, longer.stderr
    done = run_here("launch/eval.py", "--run.directory=r")
    figures = json.loads(done.stdout)
    assert figures["nats"] > 0 and figures["word_perplexity"] is figures["bits_per_byte"] is figures["words"] is None

    for script, options, message in (
        (
            "launch/generate.py",
            ["--run.directory=r", "--generate.prompts=a"],
            "trained on a stream without a tokenizer",
        ),
        ("launch/eval.py", ["--run.directory=r", f"--stream.directory={streams}"], "no r/tokenizer.model: adopt it"),
        ("launch/eval.py", ["--run.directory=theirs", "--stream.directory=mine"], "with theirs/tokenizer.model"),
    ):
        done = run_here(script, *options)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert re.match(f"error: .*{message}", done.stderr), done.stderr

    run_here("tools/adopt_stream.py", "valid.bin", "wider/valid", "--dtype=uint16", "--vocab-size=301", "--eos-id=1")
    done = run_here("launch/eval.py", "--run.directory=r", "--stream.directory=wider")
    assert done.returncode == 2
    assert "wider/valid: has a vocabulary of 301, the run's model one of 300; adopt the stream with" in done.stderr


def test_a_run_on_tokens_adopted_with_their_tokenizer_writes_samples(
    streams: Path, experiment: Path, tmp_path: Path, run_here: RunHere, train_here: TrainHere
) -> None:
    write_raw(tmp_path / "train.bin", plain(TokenStream(streams / "train")))
    model = f"--tokenizer={streams}/train/tokenizer.model"
    assert run_here("tools/adopt_stream.py", "train.bin", "mine/train", "--dtype=uint16", model).returncode == 0
    short = (f"--config={experiment}", "--train.max_steps=2", "--stream.directory=mine", "--run.directory=r")
    assert train_here(*short).returncode == 0
    done = run_here("launch/generate.py", "--run.directory=r", "--generate.prompts=anna sees")
    assert done.returncode == 0 and done.stdout.startswith("anna sees"), done.stderr
    done = run_here("tools/adopt_stream.py", "train.bin", "other", "--dtype=uint16", "--vocab-size=300")
    assert done.stderr == "error: --vocab-size and --eos-id: both are needed where no --tokenizer tells them\n"
