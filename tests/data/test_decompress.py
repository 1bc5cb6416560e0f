"""Compressed files: damage is an error or a rejected record, never a shorter corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstandard
from reading import COMPRESSED, PACK, all_jobs, chunks_of, read_all, read_job, rejected, take, texts

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, Rejected, read
from rnnlm.errors import UserError


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compression_is_an_error_not_a_shorter_corpus(tmp_path: Path, suffix: str, damage: str) -> None:
    data = "\n".join(f"line {i}" for i in range(5000)).encode()
    packed = bytearray(PACK[suffix](data))
    packed = packed[:-9] if damage == "cut" else packed
    packed[len(packed) // 2] ^= damage == "flipped"
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(packed)
    what = "damaged file" if damage == "cut" else "(damaged file|invalid UTF-8)"
    with pytest.raises(UserError, match=rf"text.txt{suffix}: record at byte \d+: {what} .*on_bad_record=skip"):
        read_all(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("unit_bytes", [1000, 2**20])
def test_what_stands_before_the_damage_is_kept(tmp_path: Path, suffix: str, chunk: int, unit_bytes: int) -> None:
    data = b"".join(b"line %d\n" % number for number in range(400))
    half = len(data) // 2
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(PACK[suffix](data[:half]) + PACK[suffix](data[half:])[:-12])

    with chunks_of(chunk):
        found = read_all(path, on_bad_record="skip", unit_bytes=unit_bytes)

    *kept, last = found
    assert isinstance(last, Rejected)
    assert (last.name, last.reason) == (path.name, "damaged file")

    lines = data.split(b"\n")
    assert [item.data for item in kept if isinstance(item, Document)] == lines[: len(kept)], "as they were, no gap"
    assert len(b"\n".join(lines[: len(kept) + 1])) >= half, "all lines of the whole first member"
    assert last.offset == len(b"".join(line + b"\n" for line in lines[: len(kept)]))


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("content", ["garbage", "cut"])
def test_each_job_of_a_damaged_file_passes_each_unit_once(tmp_path: Path, suffix: str, content: str) -> None:
    data = b"".join(b"line %d\n" % number for number in range(400))
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(b"no such format" * 9 if content == "garbage" else PACK[suffix](data) + PACK[suffix](data)[:-12])
    corpus = CorpusConfig(train=str(path), unit_bytes=1000, on_bad_record="skip")

    (alone,) = all_jobs(corpus)
    whole = read_job(alone, corpus)
    assert [unit for unit, _ in whole] == list(range(len(whole)))
    assert whole[-1][1][-1].__class__ is Rejected

    mine = {}
    for job in all_jobs(corpus, workers=3):
        passed = []
        for unit, items in read(job, corpus):
            passed.append(unit)
            if unit % job.stride == job.unit:
                mine[unit] = [take(item) for item in items]
        assert passed == [unit for unit, _ in whole]
    assert sorted(mine.items()) == whole


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("place", range(0, 12, 3))
def test_a_damaged_header_of_a_second_part_is_not_the_end_of_the_file(tmp_path: Path, suffix: str, place: int) -> None:
    first, second = (PACK[suffix](b"".join(b"%d line\n" % (i + k) for i in range(900))) for k in (0, 900))
    damaged = bytearray(second)
    damaged[0 if suffix == ".gz" else place] ^= 64
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(first + damaged)
    with pytest.raises(UserError, match="damaged file"):
        read_all(path)

    path.write_bytes(b"")
    with pytest.raises(UserError, match="it is empty"):
        read_all(path)


def with_window(log: int) -> bytes:
    """A zstd frame of a hundred lines whose header asks for a window of 2**log bytes, as of --long."""
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = bytearray(packer.compress(b"line\n" * 100) + packer.flush())
    frame[5] = (log - 10) << 3  # RFC 8878, 3.1.1.1.2: the window's descriptor
    return bytes(frame)


@pytest.mark.parametrize("log", [27, 28, 31])
def test_a_long_window_of_zstd_is_read(tmp_path: Path, log: int) -> None:
    (tmp_path / "text.txt.zst").write_bytes(with_window(log))
    assert texts(read_all(tmp_path / "text.txt.zst")) == ["line"] * 100


def test_a_window_that_no_machine_has_is_called_so_and_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.zst"
    path.write_bytes(with_window(35))
    with pytest.raises(UserError, match=r"text.txt.zst: record at byte 0: too large a window .*--long=31 or less"):
        read_all(path)
    assert rejected(read_all(path, on_bad_record="skip")) == [(0, "too large a window")]


@pytest.mark.parametrize("size", [0, 4, 7])
@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_file_that_ends_elsewhere_than_when_it_was_found_is_an_error(tmp_path: Path, size: int, policy: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\ntwo\n")
    corpus = CorpusConfig(train=str(path), unit_bytes=4, on_bad_record=policy)  # type: ignore[arg-type]
    found = all_jobs(corpus)
    path.write_bytes(b"one\ntwo\nthree\n"[:size])
    with pytest.raises(UserError, match=r"text.txt: reading ended at byte \d+, and it had 8 bytes.*let nobody write"):
        for job in found:
            read_job(job, corpus)
