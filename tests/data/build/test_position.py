"""A corpus of one document: its end is the valid stream, whatever reads it and however often that dies."""

from __future__ import annotations

import json
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_helpers import digests, digests_of_arrays, faulty, options, prepare

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.build import position
from rnnlm.data.build.build import Build
from rnnlm.data.build.position import split_at
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import fraction_of
from rnnlm.texts import NamedSource

LINES = [f"anna sees {number} cats, Zoë and 漢字 " + "too " * (number % 7) for number in range(60)]
NOVEL = "\n".join(LINES) + "\n"


def config_of(train: Any, directory: Path, workers: int = 1, **given: Any) -> Config:
    stream = {"valid_fraction": 0.2, "shard_tokens": 500, **given.pop("stream", {})}
    return Config(
        corpus=CorpusConfig(train=train, **{"document": "file", **given}),
        stream=StreamConfig(directory=str(directory), **stream),
        build=BuildConfig(workers=workers, replace=True),
    )


def built(config: Config, tokenizer: Tokenizer, threads: int = 1) -> dict[str, Manifest]:
    engine = (lambda: ThreadPoolExecutor(threads)) if threads > 1 else None
    return Build(config, tokenizer).run(lambda size: None, engine)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(NOVEL, encoding="utf-8")
    return path


def halves(text: str, fraction: float) -> list[str]:
    """A slow reference: every place is tried for each kind of cut."""
    data = text.encode()
    begin = len(data) - int(len(data) * fraction)
    ends = [len(text[:count].encode()) for count in range(1, len(text))]
    kinds = (lambda end: data[end - 1 : end] == b"\n", lambda end: data[end - 1 : end].isspace(), lambda end: True)
    for is_cut in kinds:
        found = [end for end in ends if end >= begin and is_cut(end)][:1]
        if found and data[found[0] :].strip():
            return [data[: found[0]].decode(), data[found[0] :].decode()]
    end = max(end for end in ends if data[end:].strip())
    return [data[:end].decode(), data[end:].decode()]


def test_a_text_is_cut_at_the_first_line_end_or_white_space_or_character_however_it_is_read() -> None:
    draw = random.Random(0)
    for alphabet in ("a\n", "ab \n", "é漢 ", "é漢a", "a \n\té漢"):
        for _ in range(400):
            text = "x" + "".join(draw.choices(alphabet, k=draw.randint(0, 30))) + draw.choice(["y", "é", "é\n", "é  "])
            fraction = draw.choice([0.02, 0.3, 0.9])
            place = len(text.encode()) - int(len(text.encode()) * fraction)
            size = draw.randint(1, 9) if text.encode()[place:].strip() else len(text)
            parts = [text[at : at + size].encode() for at in range(0, len(text), size)]

            found = [b"", b""]
            for which, part in split_at(place, iter(parts)):
                found[which] += part
            assert [half.decode() for half in found] == halves(text, fraction), (text, fraction)


def test_a_cut_is_looked_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "LOOK_BYTES", 5)
    for size in (1, 4, 100):  # a text of 22 bytes, its line end 9 behind the place
        parts = [(b"abcdefghijklmnopqrs\ntu")[at : at + size] for at in range(0, 22, size)]
        assert b"".join(part for which, part in split_at(10, iter(parts)) if not which) == b"abcdefghij"


@pytest.mark.parametrize("fraction", [0.02, 0.2])
def test_a_novel_in_one_file_has_a_valid_stream_of_its_last_lines(
    novel: Path, tmp_path: Path, tokenizer: Tokenizer, fraction: float
) -> None:
    manifests = built(config_of(str(novel), tmp_path / "s", stream={"valid_fraction": fraction}), tokenizer)
    assert not 0.01 < fraction_of(NOVEL.encode(), 0) < 0.02, "its hash gives it to one stream, whatever the share is"
    for split, text in zip(("train", "valid"), halves(NOVEL, fraction), strict=True):
        stream, manifest = TokenStream(tmp_path / "s" / split), manifests[split]
        assert list(stream.verify())
        assert stream.windows(np.array([0]), len(stream))[0].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        assert (manifest.documents, manifest.text_bytes, manifest.words) == (1, len(text.encode()), len(text.split()))
        assert manifest.records == {"read": 1, "kept": 1, "empty": 0}
        assert manifest.source["valid_split"] == "by position" and manifest.source["valid_level"] == 1
        assert stream.origins is not None and stream.origins.tolist() == [[0, 0]]
    assert abs(manifests["valid"].text_bytes / len(NOVEL.encode()) - fraction) < 0.01


def test_halves_are_the_same_for_any_workers_units_and_however_long_a_document_may_be(
    novel: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    one, again = config_of(str(novel), tmp_path / "one"), tmp_path / "one/valid/stream.json"
    first = built(one, tokenizer)
    before = again.stat()
    assert built(one, tokenizer) == first and again.stat() == before
    for name, given in {"in parts": {"max_whole_bytes": 500}, "units": {"unit_bytes": 1000}}.items():
        built(config_of(str(novel), tmp_path / name, workers=3, **given), tokenizer, threads=3)
        assert digests_of_arrays(tmp_path / name) == digests_of_arrays(tmp_path / "one")


def test_other_records_and_copies_beside_the_one_document_stay_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.jsonl"
    records = [{"text": "  "}, {"text": NOVEL}, {"other": 1}, {"text": NOVEL}, {"text": ""}, {"text": NOVEL}]
    path.write_text("\n".join(map(json.dumps, records)))
    train = {"books": NamedSource(str(path), 2.0)}
    given = {"deduplicate": True, "document": "jsonl", "on_bad_record": "skip", "shuffle_seed": 1, "unit_bytes": 3000}
    manifests = built(config_of(train, tmp_path / "s", **given), tokenizer)

    assert sum(manifest.records.get("duplicate", 0) for manifest in manifests.values()) == 2
    assert manifests["train"].records["empty"] == 2 and manifests["train"].records["kept"] == 1
    assert manifests["train"].records["invalid JSON or field"] == 1
    assert (manifests["train"].documents, manifests["train"].repeated) == (2, 1), "its share is 2"
    assert (manifests["valid"].documents, manifests["valid"].repeated) == (1, 0)
    first, last = (len(text.encode()) for text in halves(NOVEL, 0.2))
    assert (manifests["train"].text_bytes, manifests["valid"].text_bytes) == (2 * first, last)


def test_the_valid_half_keeps_to_its_ceiling(novel: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = built(config_of(str(novel), tmp_path / "a"), tokenizer)["valid"].tokens
    config = config_of(str(novel), tmp_path / "b", stream={"valid_max_tokens": whole // 3})
    manifests = built(config, tokenizer)
    assert manifests["valid"].source["valid_level"] == 3 and manifests["valid"].tokens <= whole // 3
    assert manifests["valid"].text_bytes == len(halves(NOVEL, 0.05)[1].encode())
    assert manifests["train"].text_bytes + manifests["valid"].text_bytes == len(NOVEL.encode())


def test_with_a_second_document_hashes_decide_again(novel: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    built(config_of(str(tmp_path / "*.txt"), tmp_path / "s"), tokenizer)
    is_valid = fraction_of(NOVEL.encode(), 0) < 0.2
    other = next(text for text in LINES if (fraction_of(text.encode(), 0) < 0.2) != is_valid)
    (tmp_path / "other.txt").write_text(other, encoding="utf-8")
    manifests = built(config_of(str(tmp_path / "*.txt"), tmp_path / "s"), tokenizer)
    assert "valid_split" not in manifests["train"].source
    assert manifests["valid" if is_valid else "train"].text_bytes == len(NOVEL.encode())


@pytest.mark.parametrize("text", ["x", "漢\n"])
def test_a_document_of_one_character_says_that_it_is_too_short(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"corpus.train is one document, too short to be cut in two .*, so \w+ would"):
        built(config_of(str(tmp_path / "short.txt"), tmp_path / "s"), tokenizer)
    whole = config_of(str(tmp_path / "short.txt"), tmp_path / "s", stream={"valid_fraction": 0})
    assert set(built(whole, tokenizer)) == {"train"}, "the last way out that the message names"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["write_half:1", "write_half-end:1", "write_half:2", "write_half-end:2", "commit:2"])
def test_fault_25_killed_while_a_document_is_split(
    novel: Path, tokenizer: Tokenizer, tmp_path: Path, fault: str
) -> None:
    config = config_of(str(novel), tmp_path / "whole", unit_bytes=3000)
    built(config, tokenizer)
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    given = options(novel, directory, document="file", shard_tokens=500)
    assert faulty(fault, log, *given)[0] == -signal.SIGKILL
    assert faulty("none", log, *given)[0] == 0
    assert digests(directory) == digests(tmp_path / "whole")
