"""Sources: every file is found once, named, and known again; what would double documents or read nothing is refused."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from reading import all_jobs, read_job

from rnnlm.cli import read_config
from rnnlm.config import Config, CorpusConfig
from rnnlm.data.documents import Document, read
from rnnlm.data.jobs import jobs
from rnnlm.data.sources import Source, content_digest, corpus_sources, sources, unchanged
from rnnlm.errors import UserError
from rnnlm.texts import NamedSource
from rnnlm.yaml_file import dump_yaml


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)


def read_corpus(*argv: str) -> CorpusConfig:
    return read_config(["corpus"], None, argv).corpus


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
    write(tmp_path, "b/2.txt", "b/1.txt", "a/3.txt")
    found = sources([str(tmp_path / "b" / "*.txt"), str(tmp_path / "a" / "3.txt")], "corpus.train")
    assert [source.name for source in found] == ["b/1.txt", "b/2.txt", "a/3.txt"]
    assert [source.size for source in found] == [7, 7, 7]
    assert all(source.stamp for source in found)

    again = sources(str(tmp_path / "a" / "3.txt"), "corpus.train")
    assert again[0].name == "3.txt"
    assert again[0].stamp == found[2].stamp


def test_any_url_of_fsspec() -> None:
    for name, text in (("a", b"one\ntwo\n"), ("b", b"three\n")):
        with fsspec.open(f"memory://corpus/{name}.txt", "wb") as file:
            file.write(text)
    corpus = CorpusConfig(train="memory://corpus/*.txt")
    found = sources(corpus.train, "corpus.train")
    assert [source.name for source in found] == ["a.txt", "b.txt"]
    assert all(source.stamp for source in found)
    items = [item for job in jobs("train", found, corpus, 1) for _, unit in read(job, corpus) for item in unit]
    assert [item.data for item in items if isinstance(item, Document)] == [b"one", b"two", b"three"]


def test_local_and_remote_paths_mix(tmp_path: Path) -> None:
    write(tmp_path, "c/a.txt", "d/a.txt")
    with fsspec.open("memory://c/a.txt", "wb") as file:
        file.write(b"elsewhere")
    found = sources([str(tmp_path / "*/a.txt"), "memory://c/a.txt"], "corpus.train")
    assert [source.name for source in found] == ["c/a.txt", "d/a.txt", "memory:///c/a.txt"]
    assert [source.open().read() for source in pickle.loads(pickle.dumps(found))] == [
        b"c/a.txt", b"d/a.txt", b"elsewhere",
    ]  # fmt: skip


def test_a_directory_that_cannot_be_listed_is_named_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "open/a.txt", "closed/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> Any:  # permissions do not stop root, as whom tests may run
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [source.name for source in sources(str(tmp_path / "*/*.txt"), "corpus.train")] == ["a.txt"]
    assert re.search(
        r"warning: corpus.train=\S+: \S+/closed: cannot be listed \(Permission denied\); no file in it is taken",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    "pattern", ["d/*/*.txt", "d/**/*.txt", "d/**", "d/*/*", "*/linked/*", "*/*", "d/**/c.txt", "d/real/a*"]
)
def test_a_glob_takes_what_pythons_own_does_links_to_directories_with_it(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "d/top.txt", "e/b.txt", "e/c.txt")
    (tmp_path / "d/real").mkdir()
    (tmp_path / "d/real/a.txt").write_text("a")
    (tmp_path / "d/linked").symlink_to("../e")
    (tmp_path / "d/real/up").symlink_to("..")  # which leads in circles

    expected = {Path(each).resolve() for each in glob.glob(str(tmp_path / pattern), recursive=True)}  # noqa: PTH207
    found = [Path(source.path) for source in sources(str(tmp_path / pattern), "corpus.train")]
    assert len({path.resolve() for path in found}) == len(found)
    assert {path.resolve() for path in found} == {path for path in expected if path.is_file()}


class Unsized(MemoryFileSystem):
    """Files of which nobody says how large they are, as of a web server without Content-Length."""

    protocol: ClassVar[str] = "unsized"  # type: ignore[misc]
    store: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {**super().info(path, **options), "size": None}


def test_a_source_of_unknown_size_is_refused_not_passed_over() -> None:
    fsspec.register_implementation("unsized", Unsized, clobber=True)
    with fsspec.open("unsized://text.txt", "wb") as file:
        file.write(b"one\n")
    with pytest.raises(UserError, match=r"corpus.train=unsized://text.txt: .*does not say how many bytes.*download it"):
        sources("unsized://text.txt", "corpus.train")


def test_a_pipe_is_refused_not_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe.txt is a pipe or a device; write what it gives to a file"):
        sources(str(tmp_path / "*.txt"), "corpus.train")


@pytest.mark.parametrize("link", ["same path", "symlink", "hard link", "directory"])
def test_the_same_file_twice_is_refused_within_a_split_and_between_splits(tmp_path: Path, link: str) -> None:
    write(tmp_path, "a/one.txt", "a/two.txt")
    other = tmp_path / "a" / "one.txt"
    if link == "symlink":
        other = tmp_path / "a" / "three.txt"
        other.symlink_to("one.txt")
    elif link == "hard link":
        other = tmp_path / "three.txt"
        other.hardlink_to(tmp_path / "a" / "one.txt")
    elif link == "directory":
        (tmp_path / "b").symlink_to("a")
        other = tmp_path / "b" / "one.txt"

    paths = [str(tmp_path / "a" / "one.txt"), str(other)]
    with pytest.raises(UserError, match=r"one.txt.* is twice in corpus.train: its documents would count twice"):
        sources(paths, "corpus.train")
    with pytest.raises(UserError, match=r"one.txt.* is in corpus.train and in corpus.valid"):
        corpus_sources(CorpusConfig(train=paths[0], valid=str(other)))
    named = {"x": NamedSource(paths[0]), "y": NamedSource(paths[1])}
    with pytest.raises(UserError, match=r"one.txt.* is in corpus.train.x and in corpus.train.y"):
        corpus_sources(CorpusConfig(train=named))


def test_files_of_equal_content_are_no_repeats(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the same")
    found = corpus_sources(CorpusConfig(train=str(tmp_path / "a.txt"), valid=str(tmp_path / "b.txt"),
                                        test=str(tmp_path / "c.txt")))  # fmt: skip
    assert {split: [source.name for source in files] for split, files in found.items()} == {
        "train": ["a.txt"], "valid": ["b.txt"], "test": ["c.txt"],
    }  # fmt: skip


def test_named_sources_are_read_from_a_file_and_from_the_command_line_and_recorded(tmp_path: Path) -> None:
    write(tmp_path, "r/1.txt", "r/2.txt", "w/1.txt")
    reviews, wiki = f"{tmp_path}/r/*.txt", [f"{tmp_path}/w/1.txt"]
    (tmp_path / "c.yaml").write_text(
        f"corpus: {{shuffle_seed: 3, train: {{reviews: {{paths: {reviews}, share: 2}}, wiki: {{paths: {wiki}}}}}}}"
    )
    corpus = read_corpus(f"--config={tmp_path}/c.yaml")
    assert corpus.train == {"reviews": NamedSource(reviews, 2.0), "wiki": NamedSource(wiki)}
    assert corpus.shares == {"reviews": 2.0, "wiki": 1.0}

    option = f'--corpus.train={{"reviews": {{"paths": "{reviews}", "share": 2}}, "wiki": {{"paths": ["{wiki[0]}"]}}}}'
    assert read_corpus(option, "--corpus.shuffle_seed=3") == corpus
    (tmp_path / "again.yaml").write_text(dump_yaml(Config(corpus=corpus), ["corpus"]))
    assert read_corpus(f"--config={tmp_path}/again.yaml") == corpus

    found = corpus_sources(corpus)["train"]
    assert [(source.group, source.name) for source in found] == [
        ("reviews", "r/1.txt"), ("reviews", "r/2.txt"), ("wiki", "w/1.txt"),
    ]  # fmt: skip
    assert [source.group for source in sources([reviews], "corpus.train")] == ["", ""]
    assert (CorpusConfig(train="x").shares, CorpusConfig().shares) == ({"": 1.0}, {})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{reviews: {pathz: x, paths: y}}", "corpus.train.reviews.pathz: no such key; a source has paths and share"),
        ("{reviews: {share: 1}}", "corpus.train.reviews.paths=: expected a file, a glob"),
        ("{reviews: {paths: []}}", r"corpus.train.reviews.paths=\[\]: expected"),
        ("{reviews: x.txt}", "corpus.train.reviews=x.txt: expected paths under it, as in reviews: {paths: x.txt"),
        ("{reviews: {paths: x, share: many}}", "corpus.train.reviews.share=many: expected a number above 0"),
        ("{reviews: {paths: x, share: 0}}", "corpus.train.reviews.share=0.*: expected a number above 0"),
        ("{reviews: {paths: x, share: .inf}}", "corpus.train.reviews.share=inf: expected a number"),
        ("{a b: {paths: x}}", "corpus.train: 'a b' is no name of a source; give letters"),
        ("{reviews: {paths: x, share: 1.5}}", "corpus.train.reviews.share=1.5: repeats .*set corpus.shuffle_seed"),
    ],
)
def test_mistakes_in_named_sources_are_named(tmp_path: Path, train: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(f"corpus: {{train: {train}}}")
    for argument in (f"--config={tmp_path}/c.yaml", f"--corpus.train={train}"):
        with pytest.raises(UserError, match=message):
            read_corpus(argument)


def test_shares_are_for_training_alone() -> None:
    with pytest.raises(UserError, match=r"corpus.valid.a.share=0.5: shares are for corpus.train"):
        read_corpus("--corpus.valid={a: {paths: x, share: 0.5}}")
    assert read_corpus("--corpus.valid={a: {paths: x}}").valid == {"a": NamedSource("x")}


def test_a_file_that_changes_or_vanishes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    (source,) = sources(str(path), "corpus.train")
    assert unchanged(source)
    os.utime(path, ns=(1, 1))
    assert not unchanged(source)
    path.unlink()
    assert not unchanged(source)

    with fsspec.open("memory://changing.txt", "wb") as file:
        file.write(b"one")
    (source,) = sources("memory://changing.txt", "corpus.train")
    assert unchanged(source)
    with fsspec.open("memory://changing.txt", "wb") as file:
        file.write(b"two")
    assert not unchanged(source)


class Unstamped(MemoryFileSystem):
    """Files of which nobody says when they were written, as of a web server without any such header."""

    protocol: ClassVar[str] = "unstamped"  # type: ignore[misc]
    store: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {key: value for key, value in super().info(path, **options).items() if key in ("name", "size", "type")}


def test_an_edited_file_of_the_same_size_is_noticed_where_its_file_system_has_no_times(tmp_path: Path) -> None:
    fsspec.register_implementation("unstamped", Unstamped, clobber=True)
    keys = set()
    for text in (b"one", b"two"):
        with fsspec.open("unstamped://text.txt", "wb") as file:
            file.write(text)
        corpus = CorpusConfig(train="unstamped://text.txt")
        (source,) = sources(corpus.train, "corpus.train")
        assert unchanged(source)
        keys |= {job.key for job in jobs("train", [source], corpus, 1)}
    assert len(keys) == 2, "the unit of the first would serve for the second"

    with fsspec.open("unstamped://text.txt", "wb") as file:
        file.write(b"six")
    assert not unchanged(source)


def test_a_digest_of_content_sees_every_byte_of_short_files_and_samples_long_ones(tmp_path: Path) -> None:
    def digest(data: bytes) -> str:
        (tmp_path / "text.txt").write_bytes(data)
        (source,) = sources(str(tmp_path / "text.txt"), "corpus.train")
        return content_digest(source)

    short, long = bytearray(188_416), bytearray(1_000_000)
    assert digest(b"") == hashlib.sha256(bytes(8)).hexdigest()
    assert digest(short) == hashlib.sha256((188_416).to_bytes(8, "little") + short).hexdigest()

    # the reference: size, first and last 64 KiB, and 14 blocks of 4 KiB, evenly from just behind to just before them
    begins = [65_536 + (1_000_000 - 131_072 - 4096) * block // 13 for block in range(14)]
    assert begins[-1] + 4096 == 1_000_000 - 65_536
    parts = [long[:65_536], *(long[at : at + 4096] for at in begins), long[-65_536:]]
    assert digest(long) == hashlib.sha256((1_000_000).to_bytes(8, "little") + b"".join(parts)).hexdigest()

    seen = {digest(long)}
    for place in (0, 65_535, begins[3], begins[13] + 4095, 999_999):
        changed = bytearray(long)
        changed[place] = 1
        seen.add(digest(changed))
    assert len(seen) == 6
    with pytest.raises(UserError, match=r"gone.txt: cannot be read \(No such file"):
        content_digest(Source("gone.txt", str(tmp_path / "gone.txt"), 5, "", "", fsspec.filesystem("file")))


def test_many_sources_take_little_memory(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"a-rather-long-name-of-a-file-{number:08d}.txt").touch()
    sources(f"{tmp_path}/*0.txt", "corpus.train")  # so that all is imported

    tracemalloc.start()
    found = sources(f"{tmp_path}/*.txt", "corpus.train")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 300
    assert held / len(found) < 500 + len(str(tmp_path)), "so that 300,000 are below 150 MB"
