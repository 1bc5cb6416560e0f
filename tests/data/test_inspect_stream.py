"""tools/inspect_stream.py: what it prints is what numpy finds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from conftest import RunHere, build_streams
from foreign import MARKS, SEQUENCES, plain, write_megatron

from rnnlm.data.adopt import adopt
from rnnlm.data.sample import Sample
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer


def shown(text: str) -> dict[str, list[str]]:
    """The words of each line of a report, by its first one."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_inspection_of_a_built_stream_tells_what_numpy_tells(streams: Path, run_here: RunHere) -> None:
    done = run_here("tools/inspect_stream.py", streams / "train", "--pieces", "3")
    assert done.returncode == 0, done.stderr

    stream, lines = TokenStream(streams / "train"), done.stdout.splitlines()
    tokens, manifest = plain(stream), stream.manifest
    size = sum(path.stat().st_size for path in (streams / "train").iterdir())
    assert lines[0] == f"{streams}/train: {size:,} bytes on disk, 2 shard(s) of <u2"
    assert f"  {manifest.documents:,} documents, {manifest.tokens:,} tokens" in lines
    each = manifest.text_bytes / manifest.tokens
    assert f"  {manifest.text_bytes:,} bytes of text, {each:.3f} per token; {manifest.words:,} words" in lines

    ids, counts = np.unique(tokens, return_counts=True)
    top, rows = ids[np.argsort(-counts, kind="stable")][:3], shown(done.stdout)
    assert f"{len(ids)} of 300 ids occur; the most frequent:" in lines
    for token in top.tolist():
        count = int((tokens == token).sum())
        piece = repr(stream.tokenizer().piece(token))
        assert rows[str(token)] == [f"{count:,}", f"{count / len(tokens):.2%}", piece]

    lengths = np.diff(stream.documents[:, 0], prepend=0)
    middle = np.sort(lengths)[(len(lengths) - 1) // 2]
    assert f"documents by length in tokens: median {middle}, longest {lengths.max()}" in lines

    bars = [line.split() for line in lines if re.search(r"\d #+$", line)]
    assert sum(int(bar[-2]) for bar in bars) == manifest.documents
    for bar in bars:
        low, high = int(bar[0]), int(bar[2] if bar[1] == "-" else bar[0])
        assert int(bar[-2]) == ((lengths >= low) & (lengths <= high)).sum()
    assert max(len(bar[-1]) for bar in bars) == 40


def test_inspection_of_an_adopted_stream_shows_ids(tmp_path: Path, run_here: RunHere) -> None:
    adopt(write_megatron(tmp_path / "t.idx", SEQUENCES, MARKS, "int64"), tmp_path / "s", 10, 1)
    done = run_here("tools/inspect_stream.py", "s")
    assert done.returncode == 0, done.stderr
    lines, rows = done.stdout.splitlines(), shown(done.stdout)
    assert lines[1] == f"  shard-00000.bin is a link to {tmp_path}/t.bin"
    assert "  bytes and words of the text: unknown" in lines
    assert (rows["9"], rows["1"]) == (["5", "35.71%"], ["3", "21.43%", "EOS"])
    assert lines[-3:] == [
        "documents by length in tokens: median 3, longest 4",
        f"  {'2 - 3':>23} {4:>13} {'#' * 40}",
        f"  {'4 - 7':>23} {1:>13} {'#' * 10}",
    ]


def test_a_document_is_shown_with_its_tokens_and_its_origin(
    streams: Path, corpus: Path, run_here: RunHere, tmp_path: Path
) -> None:
    stream = TokenStream(streams / "train")
    number = 17
    begin, end = stream.documents[number - 1 : number + 1, 0].tolist()
    ids = plain(stream)[begin:end].tolist()
    text = stream.tokenizer().decode(ids[:-1])
    at = stream.origins[number, 1]
    assert corpus.read_bytes()[at:].startswith(text.encode() + b"\n")

    done = run_here("tools/inspect_stream.py", streams / "train", f"--document={number}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f": document 17 of {stream.manifest.documents}, tokens {begin:,} to {end - 1:,}")
    assert lines[1].startswith(f"text, {len(text.encode())} bytes and {len(text.split())} words") and lines[2] == text
    assert lines[3] == f"{len(ids)} tokens:"
    shown = [piece.strip() for line in lines[4:-1] for piece in re.split("  +", line.strip())]
    assert shown == [f"{token} {stream.tokenizer().piece(token)!r}" for token in ids]
    assert lines[-1] == f"from corpus.train: text.txt, byte {at:,}"

    for outside in (-1, stream.manifest.documents):
        done = run_here("tools/inspect_stream.py", streams / "train", f"--document={outside}")
        assert done.returncode == 2
        assert f"error: --document={outside}: {streams}/train has" in done.stderr
        assert f"documents, 0 to {stream.manifest.documents - 1}" in done.stderr


def test_a_file_whose_name_is_not_utf8_is_sampled_built_and_shown_as_an_origin(
    tmp_path: Path, tokenizer: Tokenizer, run_here: RunHere
) -> None:
    text = tmp_path / os.fsdecode(b"na\xffme.txt")
    text.write_text("".join(f"{number}\n" for number in range(60)))
    sample = Sample(2**20, seed=0)
    sample.add(["one"], text.name, 0)
    assert sample.texts() == ["one"]

    (tmp_path / "s").mkdir()
    build_streams(tmp_path / "s", text, tokenizer)
    done = run_here("tools/inspect_stream.py", "s/train", "--document=0")
    assert done.returncode == 0, done.stderr
    assert r"from corpus.train: na\xffme.txt, byte 0" in done.stdout


def test_a_stream_that_knows_no_origins_says_so_behind_the_text(tmp_path: Path, run_here: RunHere) -> None:
    adopt(write_megatron(tmp_path / "t.idx", SEQUENCES, MARKS, "int64"), tmp_path / "s", 10, 1)
    done = run_here("tools/inspect_stream.py", "s", "--document=0")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].strip().split() == [str(token) for token in SEQUENCES[0]]
    assert "s: was adopted, and does not say where its documents are from" in done.stderr
