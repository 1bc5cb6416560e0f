"""The sample of a corpus: bounded, the same for any order, parts and workers, and fair to lines that repeat."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make_text

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig, TokenizerConfig
from rnnlm.data.build.survey import train_on_corpus
from rnnlm.data.sample import EXCERPT_CHARACTERS, Sample, excerpts
from rnnlm.hashing import fraction_of


def sample_of(texts: list[tuple[int, str]], max_bytes: int, seed: int) -> Sample:
    sample = Sample(max_bytes, seed)
    for offset, text in texts:
        sample.add([text], "text.txt", offset)
        assert sample.kept_bytes <= max_bytes
    return sample


def test_sample_is_bounded_and_ignores_order() -> None:
    texts = list(enumerate(make_text(2000, seed=1)))
    shuffled = random.Random(0).sample(texts, len(texts))
    one, same, other = sample_of(texts, 10_000, 0), sample_of(shuffled, 10_000, 0), sample_of(texts, 10_000, 1)
    assert one.texts() == same.texts() != other.texts()
    assert one.kept_bytes == sum(len(text.encode()) for text in one.texts()) > 9_500
    assert one.seen_bytes == sum(len(text.encode()) for _, text in texts)
    whole = sample_of(shuffled, 10**6, 0).texts()
    assert whole == sorted((text for _, text in texts), key=lambda text: (-fraction_of(text.encode(), 0), text)), (
        "a model of a corpus that fits depends on no place"
    )


def test_samples_of_parts_add_up_also_below_a_limit_that_was_reached() -> None:
    texts = list(enumerate(make_text(1000, seed=1)))
    whole, joined = sample_of(texts, 5_000, 0), Sample(5_000, 0)
    for first in range(0, 1000, 100):
        part = Sample(5_000, 0, limit=joined.limit)
        for offset, text in texts[first : first + 100]:
            part.add([text], "text.txt", offset)
        for number, text in part.numbered():
            joined.keep(number, text)
    assert joined.texts() == whole.texts()
    assert joined.limit < 0.5, "most parts handed on little"


@pytest.mark.parametrize("seed", range(4))
def test_a_repeated_line_enters_with_its_share_of_copies(seed: int) -> None:
    draw = random.Random(5)
    lines = [f"boilerplate number {i} of this site, all rights reserved" for i in range(30)]
    own = [f"{draw.random()} is a line that stands only once here." for _ in range(2500)]
    texts = [*own, *(draw.choice(lines) for _ in range(2400))]
    draw.shuffle(texts)

    found = sample_of(list(enumerate(texts)), 50_000, seed).texts()
    assert len(found) > 800
    assert 0.43 < sum(text.startswith("boilerplate") for text in found) / len(found) < 0.55


def test_long_documents_enter_the_sample_whole_in_excerpts_whatever_their_parts() -> None:
    text = " ".join(f"word{i}" for i in range(20_000)) + "x" * 50_000
    sample = sample_of([(0, text)], 10**6, 0)
    assert sample.seen_bytes == len(text)
    assert sorted("".join(sample.texts())) == sorted(text)
    assert max(map(len, sample.texts())) <= EXCERPT_CHARACTERS
    for size in (777, 16_384, 50_001):
        assert [*excerpts(text[i : i + size] for i in range(0, len(text), size))] == [*excerpts([text])]


def trained(
    paths: list[Path], directory: Path, unit_bytes: int, make: Callable[[], Executor] | None = None, **chosen: object
) -> bytes:
    config = Config(
        corpus=CorpusConfig(train=[str(path) for path in paths], unit_bytes=unit_bytes),
        tokenizer=TokenizerConfig(**chosen),  # type: ignore[arg-type]
        stream=StreamConfig(directory=str(directory)),
        build=BuildConfig(workers=3 if make else 1),
    )
    read: list[int] = []
    tokenizer = train_on_corpus(config, read.append, make).tokenizer
    assert sum(read) == sum(path.stat().st_size for path in paths)
    assert not [*directory.iterdir()], "nothing is left behind"
    return tokenizer.model


@pytest.mark.parametrize("chosen", [{"vocab_size": 300, "sample_bytes": 9000}, {"kind": "word", "vocab_size": 20}])
def test_a_tokenizer_is_the_same_for_any_workers_units_and_order(tmp_path: Path, chosen: dict[str, object]) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(paths):
        path.write_text("\n".join(make_text(300, seed)), encoding="utf-8")
    (tmp_path / "s").mkdir()
    one = trained(paths, tmp_path / "s", 10**6, **chosen)
    assert trained(paths, tmp_path / "s", 2000, lambda: ThreadPoolExecutor(3), **chosen) == one
    assert trained(paths[::-1], tmp_path / "s", 5000, **chosen) == one


def test_words_of_a_document_longer_than_memory_allows_are_counted_across_its_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join([" ".join(make_text(40)), "rare"]), encoding="utf-8")
    models = []
    for whole in (2**20, 50):
        config = Config(
            corpus=CorpusConfig(train=str(tmp_path / "a.txt"), max_whole_bytes=whole),
            tokenizer=TokenizerConfig(kind="word"),
            stream=StreamConfig(directory=str(tmp_path / "s"), valid_fraction=0),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rnnlm.data.decompress.CHUNK_BYTES", 64)
            patch.setattr("rnnlm.data.records.CHUNK_BYTES", 64)
            models.append(train_on_corpus(config, lambda size: None).tokenizer.model)
    assert models[0] == models[1]
