"""Which documents a stream takes, and how often: shares of named sources, and the ceiling of the valid stream."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from build_helpers import decoded, digests_of_arrays
from conftest import make_text

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.build.build import Build
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.hashing import fraction_of
from rnnlm.texts import NamedSource

SHARES = {"books": 2.5, "news": 0.4, "web": 1.0, "rare": 2.0}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Documents by source; each source repeats some of its own, and some of the one before."""
    found: dict[str, list[str]] = {}
    before: list[str] = []
    for seed, name in enumerate(SHARES):
        own = [f"{text} in {name} {number}" for number, text in enumerate(make_text(60, seed=seed))]
        found[name] = [*own, *own[:9], *before[:9]]
        before = own
    return found


@pytest.fixture(scope="module")
def named(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, NamedSource]:
    directory = tmp_path_factory.mktemp("named")
    for name, lines in texts.items():
        for part in (0, 1):
            lines_of_part = lines[40:] if part else lines[:40]
            (directory / f"{name}-{part}.txt").write_text("\n".join(lines_of_part), encoding="utf-8")
    return {name: NamedSource(str(directory / f"{name}-*.txt"), share) for name, share in SHARES.items()}


Make = Callable[..., tuple[Path, dict[str, Manifest]]]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    """Build in a directory of its own."""

    def build(train: Any, threads: int = 1, valid_max_tokens: int = 2**24, **corpus: Any) -> Any:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        stream = StreamConfig(
            directory=str(directory), valid_fraction=0.2, shard_tokens=700, valid_max_tokens=valid_max_tokens
        )
        corpus = {"unit_bytes": 2000, **corpus}
        engine = (lambda: ThreadPoolExecutor(threads)) if threads > 1 else None
        manifests = Build(
            Config(corpus=CorpusConfig(train=train, **corpus), stream=stream, build=BuildConfig(workers=threads)),
            tokenizer,
        ).run(lambda size: None, engine)
        for split in manifests:
            assert list(TokenStream(directory / split).verify())
        return directory, manifests

    return build


def copies_of(text: str, share: float) -> int:
    """How often a share takes a document: its whole part, and once more if the hash of the text is below the rest."""
    hashed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little")
    return int(share) + (hashed < share % 1 * 2**64)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_shares_take_exactly_these_documents_so_often(
    make: Make, named: dict[str, NamedSource], texts: dict[str, list[str]], tokenizer: Tokenizer, deduplicate: bool
) -> None:
    expected: dict[str, Counter[str]] = {"train": Counter(), "valid": Counter()}
    seen, left_out, counts = set[str](), Counter[str](), Counter[tuple[str, str]]()
    for name, share in SHARES.items():
        for text in texts[name]:
            if deduplicate and text in seen:
                continue
            seen.add(text)
            split = "valid" if fraction_of(text.encode(), 0) < 0.2 else "train"
            copies = copies_of(text, share if split == "train" else min(share, 1))
            expected[split][text] += copies
            counts[split, name] += copies
            left_out[split] += not copies

    directory, manifests = make(named, deduplicate=deduplicate, shuffle_seed=4)
    for split, manifest in manifests.items():
        found = decoded(directory, split, tokenizer)
        assert Counter(found) == +expected[split]
        assert {name: count["documents"] for name, count in manifest.sources.items()} == {
            name: counts[split, name] for name in SHARES
        }
        for key in ("documents", "tokens", "text_bytes"):
            assert sum(count[key] for count in manifest.sources.values()) == getattr(manifest, key)
        assert manifest.records["left out by share"] == left_out[split]
        assert manifest.documents == manifest.records["kept"] + manifest.repeated
        assert ("duplicate" in manifest.records) == deduplicate
    assert manifests["train"].repeated > 50 and not manifests["valid"].repeated


def test_shares_and_shuffle_give_the_same_for_any_units_and_workers(make: Make, named: dict[str, NamedSource]) -> None:
    one, _ = make(named, shuffle_seed=4, deduplicate=True)
    other, _ = make(named, shuffle_seed=4, deduplicate=True, unit_bytes=2**20, threads=3)
    assert digests_of_arrays(other) == digests_of_arrays(one)


def test_origins_name_file_and_place_of_every_document(
    make: Make, named: dict[str, NamedSource], tokenizer: Tokenizer
) -> None:
    directory, _ = make(named, shuffle_seed=4, deduplicate=True)
    paths = {path.name: path for path in Path(str(named["books"].paths)).parent.iterdir()}
    for split in ("train", "valid"):
        lines = [json.loads(line) for line in (directory / split / "sources.jsonl").read_text().splitlines()]
        found = decoded(directory, split, tokenizer)
        for text, (line, at) in zip(found, TokenStream(directory / split).origins.tolist(), strict=True):
            assert lines[line]["file"].startswith(lines[line]["source"])
            assert paths[lines[line]["file"]].read_bytes()[at:].startswith(text.encode())


def test_a_share_below_one_keeps_the_order(make: Make, named: dict[str, NamedSource], tokenizer: Tokenizer) -> None:
    half = {"web": NamedSource(named["web"].paths, 0.5)}
    whole = decoded(make({"web": NamedSource(named["web"].paths)})[0], "train", tokenizer)
    assert decoded(make(half)[0], "train", tokenizer) == [text for text in whole if copies_of(text, 0.5)]


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{text} {number}" for number, text in enumerate(make_text(400, seed=5))))
    return path


def test_a_ceiling_that_is_not_reached_changes_no_byte(make: Make, text: Path) -> None:
    free, manifests = make(str(text), valid_max_tokens=0)
    just = manifests["valid"].tokens
    for ceiling in (just, 2**24):
        directory, found = make(str(text), valid_max_tokens=ceiling)
        assert digests_of_arrays(directory) == digests_of_arrays(free)
        assert found["train"].source["valid_level"] == 1


def test_a_ceiling_leaves_what_does_not_fit_to_training(make: Make, text: Path, tokenizer: Tokenizer) -> None:
    free, manifests = make(str(text), valid_max_tokens=0)
    before, lines = manifests["valid"].tokens, text.read_text().split("\n")
    smaller = set(decoded(free, "valid", tokenizer))
    for ceiling in (before - 1, before // 5):
        directory, found = make(str(text), valid_max_tokens=ceiling)
        train, valid = (decoded(directory, split, tokenizer) for split in ("train", "valid"))
        assert 0 < found["valid"].tokens <= ceiling
        assert sorted(train + valid) == sorted(lines), "every document is in exactly one of the two"
        assert train == [line for line in lines if line in set(train)]
        assert set(valid) < smaller, "a smaller stream is a part of a larger one"
        smaller = set(valid)

        level = found["valid"].source["valid_level"]
        assert set(valid) == {line for line in lines if fraction_of(line.encode(), 0) < 0.2 / 2 ** (level - 1)}


def test_a_ceiling_below_any_document_leaves_some(make: Make, text: Path) -> None:
    assert make(str(text), valid_max_tokens=1)[1]["valid"].documents > 0
