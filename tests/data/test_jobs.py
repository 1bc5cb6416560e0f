"""Sources and jobs: every file is found and read once, however many workers share it."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from reading import COMPRESSED, PACK, Found, all_jobs, read_job, take

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, read
from rnnlm.data.jobs import jobs
from rnnlm.data.sources import sources
from rnnlm.errors import UserError


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
            if job.owns(unit):  # the items of other units are passed over unread, as a build does
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
    assert found == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 0), (2, 1, 0), (2, 2, 0)]
    assert all_jobs(replace(corpus, train=str(tmp_path / "d.txt"))) == []


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


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    for pattern, message in (("*.nothing", "no file matches"), ("gone.txt", "cannot be read"), ("", "is a directory")):
        with pytest.raises(UserError, match=rf"corpus.train=.*{message}"):
            sources(str(tmp_path / pattern), "corpus.train")

    with pytest.raises(UserError, match="corpus.valid=nowhere://text.txt: cannot be opened"):
        sources("nowhere://text.txt", "corpus.valid")

    (tmp_path / "text.txt").write_text("text")
    corpus = CorpusConfig(train=str(tmp_path / "text.txt"), on_bad_record="skip")
    (job,) = all_jobs(corpus)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match="text.txt: cannot be read"):
        read_job(job, corpus)


def test_sources_are_in_order_and_named_within_the_corpus(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = sources([str(tmp_path / "b" / "*.txt"), str(tmp_path / "a" / "3.txt")], "corpus.train")
    assert [source.name for source in found] == ["b/1.txt", "b/2.txt", "a/3.txt"]
    assert [source.size for source in found] == [7, 7, 7]
    assert all(source.stamp for source in found)

    again = sources(str(tmp_path / "a" / "3.txt"), "corpus.train")
    assert again[0].name == "3.txt"
    assert again[0].stamp == found[2].stamp


def test_any_url_of_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"one\ntwo\n")
    with fsspec.open("memory://corpus/b.txt", "wb") as file:
        file.write(b"three\n")
    corpus = CorpusConfig(train="memory://corpus/*.txt")
    found = sources(corpus.train, "corpus.train")
    assert [source.name for source in found] == ["a.txt", "b.txt"]
    items = [item for job in jobs("train", found, corpus, 1) for _, unit in read(job, corpus) for item in unit]
    assert [item.data for item in items if isinstance(item, Document)] == [b"one", b"two", b"three"]
