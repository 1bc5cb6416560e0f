"""Jobs: every file is read once, however many workers share it."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from reading import COMPRESSED, PACK, Found, all_jobs, read_job, take

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, read
from rnnlm.texts import NamedSource


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_the_jobs_of_a_compressed_file_share_its_units(tmp_path: Path, suffix: str) -> None:
    lines = [b"line %d" % number for number in range(200)]
    (tmp_path / f"text.txt{suffix}").write_bytes(PACK[suffix](b"\n".join(lines)))
    corpus = CorpusConfig(train=str(tmp_path / "text.txt*"), unit_bytes=100)

    (alone,) = all_jobs(corpus)
    whole = dict(read_job(alone, corpus))
    three = all_jobs(corpus, workers=3)
    assert [(job.unit, job.stride) for job in three] == [(0, 3), (1, 3), (2, 3)]

    mine: dict[int, list[Found]] = {}
    for job in three:
        passed = []
        for unit, items in read(job, corpus):
            passed.append(unit)
            if unit % job.stride == job.unit:  # the items of other units are passed over unread, as a build does
                assert unit not in mine
                mine[unit] = [take(item) for item in items]
        assert passed == list(whole)
    assert mine == whole
    assert [item.data for unit in sorted(mine) for item in mine[unit] if isinstance(item, Document)] == lines


def test_jobs_are_enough_for_the_workers_and_no_more(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"text\n"))
    (tmp_path / "c.txt").write_bytes(b"x" * 25)
    (tmp_path / "d.txt").write_bytes(b"")
    corpus = CorpusConfig(train=str(tmp_path / "*"), unit_bytes=10)
    found = [(job.file, job.unit, job.stride) for job in all_jobs(corpus, workers=3)]
    assert found == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 0), (2, 1, 0), (2, 2, 0), (3, 0, 0)]
    (empty,) = all_jobs(replace(corpus, train=str(tmp_path / "d.txt")))
    assert read_job(empty, corpus) == [(0, [])]


def test_small_files_share_a_unit_and_a_large_one_has_its_own(tmp_path: Path) -> None:
    sizes = {"a.txt": 100, "b.txt.gz": 0, "c.txt": 30, "d.txt": 30, "e.txt": 100, "f.txt": 10}
    for name, size in sizes.items():
        text = name[0].encode() * size if size else b"bbb"
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    corpus = CorpusConfig(train=str(tmp_path / "*"), unit_bytes=60, document="file")

    found = all_jobs(corpus, workers=7)
    assert [name for job in found for name in (source.name for source in job.sources)] == list(sizes), "once each"
    assert [job.sources[0].name for job in found if len(job.sources) == 1][:1] == ["a.txt"]
    assert [job.file for job in found] == [list(sizes).index(job.sources[0].name) for job in found]
    assert [len(job.sources) for job in found] == [1, 3, 1, 1]

    for job in found:
        ((unit, items),) = read_job(job, corpus)
        assert unit == job.unit == job.stride == 0
        assert [item.name for item in items] == [source.name for source in job.sources]
        assert job.bytes(corpus) == sum(source.size for source in job.sources)


def test_groups_of_small_files_end_where_names_say_so_or_a_larger_file_stands(tmp_path: Path) -> None:
    """A file more changes the group that it is in and few behind it; a group belongs to one named source."""
    for number in range(1200):
        (tmp_path / f"{number:04d}.txt").write_bytes(b"x" * (700 if number == 900 else 3))
    corpus = CorpusConfig(train=str(tmp_path / "*.txt"), unit_bytes=600)
    before = all_jobs(corpus)
    assert [source.name for job in before if job.unit == 0 for source in job.sources] == [
        f"{number:04d}.txt" for number in range(1200)
    ]
    assert all(sum(source.size for source in job.sources) < 603 for job in before if job.whole)
    assert len([job for job in before if job.sources[0].name == "0900.txt"]) == 2

    (tmp_path / "0500-more.txt").write_bytes(b"x")
    changed = {job.key for job in all_jobs(corpus)} - {job.key for job in before}
    assert 0 < len(changed) <= len(before) // 2
    assert not changed & {job.key for job in before if job.file > 900}, "a larger file ends a group whatever is before"

    named = {name: NamedSource(str(tmp_path / f"{name}*.txt")) for name in ("00", "01")}
    for job in all_jobs(replace(corpus, train=named)):
        assert len({source.group for source in job.sources}) == 1
