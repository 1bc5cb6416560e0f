"""Units that stay: a build encodes what is new and nothing else, makes damaged ones again, and deletes with a word."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_helpers import build, decoded, digests, write_text
from conftest import make_text

from rnnlm.config import BuildConfig
from rnnlm.data.build.kept import check_directory
from rnnlm.data.build.unit_file import UnitFile
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError

REPLACE = BuildConfig(workers=1, replace=True)
OPTIONS = {"unit_bytes": 700}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two files of some units each."""
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text("\n".join(make_text(40, seed)), encoding="utf-8")
    return tmp_path


def units(directory: Path) -> dict[str, int]:
    """The unit files of a directory of streams, by name, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("build/units/*/*.unit")}


def rebuilt(texts: Path, directory: Path, tokenizer: Tokenizer, **changed: object) -> tuple[set[str], set[str]]:
    """Build again in place of the streams that are there; the units that were written, and those that went."""
    before = units(directory)
    build(str(texts / "*.txt"), directory, tokenizer, **{**OPTIONS, "build": REPLACE, **changed})
    after = units(directory)
    return {name for name in after if before.get(name) != after[name]}, before.keys() - after.keys()


def test_a_file_more_encodes_that_file_and_gives_what_a_build_of_all_gives(
    texts: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "s"
    build(str(texts / "*.txt"), directory, tokenizer, **OPTIONS)
    before = units(directory)
    assert "stay for the next build" in capsys.readouterr().err

    (texts / "aa.txt").write_text("\n".join(make_text(40, seed=3)), encoding="utf-8")
    with pytest.raises(UserError, match=r"aa.txt added\); .*build.replace=true.* encodes \d of \d+ units") as refused:
        build(str(texts / "*.txt"), directory, tokenizer, **OPTIONS)
    written, gone = rebuilt(texts, directory, tokenizer)
    assert f"encodes {len(written)} of {len(units(directory))} units" in str(refused.value)
    assert 0 < len(written) < len(before) and not gone
    build(str(texts / "*.txt"), tmp_path / "anew", tokenizer, **OPTIONS)
    assert digests(directory) == digests(tmp_path / "anew")


@pytest.mark.parametrize(
    "changed", [{"shuffle_seed": 4}, {"on_bad_record": "skip"}, {"stream": {"shard_tokens": 99}}], ids=str
)
def test_options_that_shape_no_unit_encode_nothing(
    texts: Path, tokenizer: Tokenizer, tmp_path: Path, changed: dict[str, object]
) -> None:
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    assert rebuilt(texts, tmp_path / "s", tokenizer, **changed) == (set(), set())
    build(str(texts / "*.txt"), tmp_path / "anew", tokenizer, **{**OPTIONS, **changed})
    assert digests(tmp_path / "s") == digests(tmp_path / "anew")


def test_a_touched_file_is_encoded_again_and_a_removed_ones_units_go_with_a_word(
    texts: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    before = units(tmp_path / "s")
    os.utime(texts / "b.txt", (1, 1))
    written, gone = rebuilt(texts, tmp_path / "s", tokenizer)
    assert not written and not gone, "it holds what it held, so the streams are what they were"
    assert f"{texts}/b.txt: touched since" in capsys.readouterr().err

    written, gone = rebuilt(texts, tmp_path / "s", tokenizer, shuffle_seed=1)
    assert written and len(written) == len(gone) < len(before)
    assert f"{len(gone)} unit(s) removed, of files that" in capsys.readouterr().err

    (texts / "a.txt").unlink()
    written, gone = rebuilt(texts, tmp_path / "s", tokenizer)
    assert not written and len(gone) == len(before) - len(units(tmp_path / "s")) > 0


def test_units_with_bad_records_serve_their_policy_alone(texts: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = (texts / "a.txt").read_bytes().split(b"\n")
    lines[3] += b"\xff"
    (texts / "a.txt").write_bytes(b"\n".join(lines))
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS, on_bad_record="skip")
    assert TokenStream(tmp_path / "s/train").manifest.mended == 0

    written, _ = rebuilt(texts, tmp_path / "s", tokenizer, on_bad_record="replace")
    assert len(written) == 1
    mended = [TokenStream(tmp_path / "s" / split).manifest.mended for split in ("train", "valid")]
    assert sorted(mended) == [0, 1]
    with pytest.raises(UserError, match="invalid UTF-8"):
        rebuilt(texts, tmp_path / "s", tokenizer, on_bad_record="fail")


def flip(place: int) -> Callable[[Path, Path], None]:
    """Flip a bit, without a trace in the file's time."""

    def damage(path: Path, other: Path) -> None:
        data, status = bytearray(path.read_bytes()), path.stat()
        data[place] ^= 4
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return damage


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a flipped token": flip(2),
    "a flipped row": flip(-700),
    "a flipped footer": flip(-100),
    "cut short": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, other: os.truncate(path, 0),
    "another unit": lambda path, other: shutil.copyfile(other, path),
    "removed": lambda path, other: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_unit_is_made_again(
    texts: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    damage: Callable[[Path, Path], object],
) -> None:
    """The streams are gone, so that the units are read again: no wrong token gets into the new ones."""
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    whole = digests(tmp_path / "s")
    for split in ("train", "valid"):
        shutil.rmtree(tmp_path / "s" / split)

    path, other, *_ = sorted(tmp_path.glob("s/build/units/*/*.unit"))
    good = path.read_bytes()
    assert len(UnitFile(path).tokens) * 2 + 700 < len(good), "else a row is elsewhere"
    damage(path, other)
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    assert digests(tmp_path / "s") == whole
    assert path.read_bytes() == good


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_units_are_damaged_or_lost_while_their_build_is_interrupted(
    texts: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """What was noted as done is not believed: half of the units of a file do not pass for all."""
    if suffix:
        for path in texts.glob("*.txt"):
            (texts / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    build(str(texts / f"*.txt{suffix}"), tmp_path / "whole", tokenizer, **OPTIONS)

    def interrupt(target: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rnnlm.data.stream_writer.TokenStream", interrupt)  # all units are there, no stream is
        build(str(texts / f"*.txt{suffix}"), tmp_path / "s", tokenizer, **OPTIONS)
    for number, path in enumerate(sorted(tmp_path.glob("s/build/units/*/*.unit"))):
        flip(2)(path, path) if number % 2 else path.unlink()
    shutil.rmtree(next(tmp_path.glob("s/build/work-*/valid")))
    for path in tmp_path.glob("s/build/work-*/*shard*.json"):
        path.unlink()

    build(str(texts / f"*.txt{suffix}"), tmp_path / "s", tokenizer, **OPTIONS)
    assert "its contents differ from its digest; it is made again" in capsys.readouterr().err
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")


def test_streams_stay_until_the_new_ones_are_whole(texts: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = tmp_path / "s"
    build(str(texts / "*.txt"), directory, tokenizer, **OPTIONS)
    old = digests(directory)
    (texts / "c.txt").write_bytes(b"bad \xff record")
    with pytest.raises(UserError, match="invalid UTF-8"):
        rebuilt(texts, directory, tokenizer)
    assert digests(directory) == old

    (texts / "c.txt").write_bytes(b"a good record")
    rebuilt(texts, directory, tokenizer)
    assert "a good record" in decoded(directory, "train", tokenizer) + decoded(directory, "valid", tokenizer)
    assert sorted(path.name for path in directory.iterdir()) == ["build", "train", "valid"]


def test_without_keep_units_nothing_stays_but_the_lock(texts: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    whole = digests(tmp_path / "s")
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS, build=BuildConfig(workers=1, keep_units=False))
    assert digests(tmp_path / "s") == whole
    assert not units(tmp_path / "s")
    stays = {path.name for path in tmp_path.glob("s/build/**/*") if path.is_file()}
    assert stays == {"lock", "inputs.jsonl"}


def test_unfinished_builds_of_others_are_left_and_named(
    texts: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [tmp_path / "s/build/work-0123456789abcdef/jobs/entry.json", tmp_path / "s/build.partial/x/units/a.unit"]
    for path in others:
        path.parent.mkdir(parents=True)
        path.touch()
    build(str(texts / "*.txt"), tmp_path / "s", tokenizer, **OPTIONS)
    assert all(path.exists() for path in others)
    said = capsys.readouterr().err
    assert "s/build/work-0123456789abcdef: of another build" in said and "s/build.partial: of another build" in said


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_small_files_are_few_units_and_one_more_changes_few_of_them(
    tokenizer: Tokenizer, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "in").mkdir()
    texts = make_text(150, seed=9)
    for number, text in enumerate(texts):
        data = text.encode() + b"\n"
        (tmp_path / f"in/{number:03d}.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    given = {"unit_bytes": 2000, "valid_fraction": 0}
    build(str(tmp_path / "in/*"), tmp_path / "s", tokenizer, **given)
    before = units(tmp_path / "s")
    assert 2 < len(before) < 9
    assert decoded(tmp_path / "s", "train", tokenizer) == texts

    (tmp_path / f"in/075-more.txt{suffix}").write_bytes(gzip.compress(b"more\n") if suffix else b"more\n")
    build(str(tmp_path / "in/*"), tmp_path / "s", tokenizer, **given, build=REPLACE)
    assert decoded(tmp_path / "s", "train", tokenizer) == [*texts[:75], "more", *texts[75:]]
    unchanged = before.keys() & units(tmp_path / "s").keys()
    assert len(unchanged) >= len(before) // 3, "those before it at least"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stream.json", "is a stream itself; give the directory above"),
        ("metrics.jsonl", "is the directory of a run"),
        ("build/Makefile", "build: is in the way and of no build of streams"),
    ],
)
def test_a_directory_of_something_else_is_refused(tmp_path: Path, name: str, message: str) -> None:
    check_directory(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        check_directory(tmp_path)
    with pytest.raises(UserError, match="is a file; give a directory"):
        check_directory(tmp_path / name)


def test_one_key_stands_for_the_same_file_alone(texts: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two files of one size and time, of the same text or not, in two builds of one directory."""
    directory = write_text(tmp_path).parent
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("one text\n" if name == "a" else "two more\n")
        os.utime(tmp_path / name / "x.txt", (5, 5))
    build(str(tmp_path / "a/x.txt"), directory / "s", tokenizer, valid_fraction=0)
    with pytest.raises(UserError, match=r"other input files \(x.txt edited\)"):
        build(str(tmp_path / "b/x.txt"), directory / "s", tokenizer, valid_fraction=0)
    build(str(tmp_path / "b/x.txt"), directory / "s", tokenizer, valid_fraction=0, build=REPLACE)
    assert decoded(directory / "s", "train", tokenizer) == ["two more"]
