"""Fault 30: whatever stands in a file, readers take it or say what is wrong: no crash, no hang, bounded memory.

Whole files are mutated: bytes flipped, cut off, inserted, exchanged, extreme integers written over them, values in JSON
replaced; half of them with every digest made right again, so that what lies behind the digests is reached. Each reader
runs in a process of its own with 256 MiB of address space more than it has at the start, ten seconds a file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STATE, write_stream

from rnnlm.checkpoint.checkpoint import find_newest, load, save
from rnnlm.cli import dump_yaml, load_yaml
from rnnlm.config import TRAINING_SECTIONS, Config
from rnnlm.data.adopt import adopt
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import HEADER_BYTES
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.word_tokenizer import WordTokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest
from rnnlm.train.state import check_state

Files = dict[str, bytes]
MEMORY_BYTES = 2**28
SECONDS = 10
INTEGERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
VALUES = (*INTEGERS, 10**30, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "..", "../x", "/etc/passwd", "\0",
          "\ud800", "a" * 10_000, "<u8", "<f4", "|u1", [], {}, None, True, [0] * 100, {"a": {"b": 1}})  # fmt: skip


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four changes anywhere, more often in the first 200 bytes, where headers are."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, min(len(out), 200) if draw.random() < 0.6 else len(out))
        kind, length = draw.randrange(7), draw.choice((1, 2, 4, 8, 16, 100))

        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = draw.choice(
                (draw.randbytes(length), b"[" * 100_000, b"{" * length, b"\0" * length, b"9" * 5000)
            )
        elif kind == 3:
            source = draw.randint(0, len(out))
            out[at : at + length] = out[source : source + length]
        elif kind == 4:
            code = draw.choice(["<I", "<Q", "<H", "<q", "<i"])
            written = struct.pack(code, draw.choice(INTEGERS) % 2 ** (8 * struct.calcsize(code) - code[1].islower()))
            out[at : at + len(written)] = written
        elif kind == 5:
            del out[at : at + length]
        else:
            out[at : at + 1] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF))])
    return bytes(out)


def mutate_value(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one to three places are others, gone, renamed or twice there."""
    top = {"top": copy.deepcopy(value)}
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = []

        def collect(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
                places.append((node, key))
                if isinstance(child, dict | list):
                    collect(child)

        collect(top)
        node, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0 and len(places) > 1 and node is not top:
            del node[key]
        elif kind == 1 and isinstance(node, dict) and node is not top:
            node[draw.choice(("x", "digest", "../x", "files", "a" * 999))] = node.pop(key)
        elif kind == 2:
            other, index = draw.choice(places)
            node[key] = copy.deepcopy(other[index])
        elif kind == 3 and isinstance(node[key], int):
            node[key] += draw.choice((-1, 1, 2, 2**32))
        else:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return top["top"]


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(data), draw), indent=1).encode()


class CheckpointFiles:
    """A checkpoint: manifest, trainer.json and the headers of safetensors, sealed again or not."""

    errors = (UserError,)

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self.expected = {"w": torch.zeros(5, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
        state = {**STATE, "memory": {**STATE["memory"], "best_loss": 1.5, "best_step": 3}}
        path = save(directory, "step-00000007", dict.fromkeys(("model", "optimizer", "hidden"), self.expected), state)
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.folder = path.name

    def mutate(self, draw: random.Random) -> Files:
        name = draw.choice(sorted(self.files))
        data = self.files[name]

        if draw.random() < 0.4:
            data = mutate_bytes(data, draw)
        elif name.endswith(".json"):
            data = mutate_json(data, draw)
        else:
            length = int.from_bytes(data[:8], "little")
            header = mutate_json(data[8 : 8 + length], draw)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]

        changed = {name: data}
        return (
            {**changed, "manifest.json": self.sealed({**self.files, **changed}, draw)}
            if draw.random() < 0.8
            else changed
        )

    def sealed(self, files: Files, draw: random.Random) -> bytes:
        try:
            body = json.loads(files["manifest.json"])
            if files["manifest.json"] == self.files["manifest.json"]:
                body["files"] = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                                 for name, data in files.items() if name != "manifest.json"}  # fmt: skip
            body.pop("digest", None)
            return json.dumps({**body, "digest": json_digest(body)}, indent=1).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return files["manifest.json"]

    def read(self, directory: Path) -> None:
        path = directory / self.folder
        assert find_newest(directory, "step")
        found = load(path)
        check_state(found.state, path)
        for group in ("model", "optimizer", "hidden"):
            tensors = found.tensors(group)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= found.bytes(group)
            assert {*found.tensors(group, self.expected)} == {*self.expected}


class StreamFiles:
    """A stream of two shards with rejected records and a tokenizer."""

    errors = (UserError,)
    folder = "train"

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        directory.mkdir()
        write_stream(directory / "train", tokenizer, [5, 6, 299, 7, 8, 9, 1], shard_tokens=4)
        self.files = {file.name: file.read_bytes() for file in (directory / "train").iterdir()}
        self.files["rejected.jsonl"] = b'{"file": "a", "at": 0, "reason": "utf-8"}\n'
        self.files["stream.json"] = self.sealed(self.files)

    def sealed(self, files: Files) -> bytes:
        """The manifest with all digests right, as far as it is one."""
        try:
            body = json.loads(files["stream.json"])
            body.pop("digest", None)
            for shard in body["shards"]:
                shard["sha256"] = hashlib.sha256(files[shard["name"]][HEADER_BYTES:]).hexdigest()
            body["documents_sha256"] = hashlib.sha256(files["documents.npy"][HEADER_BYTES:]).hexdigest()
            body["rejected_sha256"] = hashlib.sha256(files["rejected.jsonl"]).hexdigest()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        try:
            return json.dumps({**body, "digest": json_digest(body)}, indent=1).encode()
        except (NameError, TypeError, RecursionError):
            return files["stream.json"]

    def mutate(self, draw: random.Random) -> Files:
        name = draw.choice([*sorted(self.files), "stream.json", "stream.json", "stream.json"])
        json_too = name == "stream.json" and draw.random() < 0.8
        changed = {name: (mutate_json if json_too else mutate_bytes)(self.files[name], draw)}
        if name.endswith(".npy") and draw.random() < 0.5:  # of the right size, behind the right header
            data = mutate_bytes(self.files[name][HEADER_BYTES:], draw)
            size = len(self.files[name]) - HEADER_BYTES
            changed[name] = self.files[name][:HEADER_BYTES] + data[:size].ljust(size, b"\0")
        return {**changed, "stream.json": self.sealed({**self.files, **changed})} if draw.random() < 0.8 else changed

    def read(self, directory: Path) -> None:
        stream = TokenStream(directory / "train")
        assert stream.windows(np.array([0, 3, -1]), 9).shape == (3, 9)
        assert stream.documents.shape[1:] == (3,)
        assert list(stream.verify())


class TokenizerFiles:
    """The file of a tokenizer, where its digest is not known and where it is."""

    errors = (UserError,)
    folder = "."

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self.name, self.digest = tokenizer.file_name, tokenizer.digest
        self.files = {self.name: tokenizer.model}

    def mutate(self, draw: random.Random) -> Files:
        return {self.name: mutate_bytes(self.files[self.name], draw)}

    def read(self, directory: Path) -> None:
        path = directory / self.name
        if path.read_bytes() != self.files[self.name]:
            with pytest.raises(UserError, match="not the model that|no tokenizer"):
                Tokenizer.load(path, self.digest)
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("anna sees Zoë 漢字."))


class MegatronFiles:
    """A .idx and its .bin."""

    errors = (UserError,)
    folder = "."

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        lengths, marks = [3, 1, 2, 0, 4, 2, 2], [0, 1, 3, 5, 6, 7]
        tokens = np.array([5, 9, 1, 7, 8, 1, 9, 9, 9, 9, 3, 1, 4, 6], "<i4")
        begins = [4 * sum(lengths[:index]) for index in range(len(lengths))]
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(marks))
        index += struct.pack("<7i7q6q", *lengths, *begins, *marks)
        self.files = {"a.idx": index, "a.bin": tokens.tobytes()}

    def mutate(self, draw: random.Random) -> Files:
        name = draw.choice(("a.idx", "a.idx", "a.bin"))
        data = mutate_bytes(self.files[name], draw)
        if draw.random() < 0.6:  # of the right size
            data = data[: len(self.files[name])].ljust(len(self.files[name]), b"\0")
        return {name: data}

    def read(self, directory: Path) -> None:
        made = directory / "made"
        shutil.rmtree(made, ignore_errors=True)
        adopt(directory / "a.idx", made, 12, 1)
        assert list(TokenStream(made).verify())


class YamlFiles:
    """config.yaml of a run."""

    errors = (UserError,)
    folder = "."

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self.files = {"config.yaml": dump_yaml(Config(), TRAINING_SECTIONS).encode()}

    def mutate(self, draw: random.Random) -> Files:
        data = mutate_bytes(self.files["config.yaml"], draw)
        values = (b"2001-99-99", b"&a [*a, *a]", b"!!python/object:os.system x", b"0b", b"1_:9", b"? [a]: b", b"<<: 1",
                  b"!!int x", b"!!float x", b"!!binary '\xff'", b"!!timestamp x", b"- &b {c: *b}",
                  b"? {a: 1}\n: 2")  # fmt: skip
        if draw.random() < 0.5:
            lines = self.files["config.yaml"].split(b"\n")
            at = draw.randrange(len(lines))
            lines[at] = lines[at].split(b":")[0] + b": " + draw.choice(values)
            data = b"\n".join(lines)
        return {"config.yaml": data}

    def read(self, directory: Path) -> None:
        assert isinstance(load_yaml(directory / "config.yaml"), dict)


WORDS = WordTokenizer.of({"<unk>": 0, "</s>": 1, "anna": 2, "Zoë": 9}, eos="</s>", unknown="<unk>", silent=["#0"])

READERS: dict[str, tuple[Callable[[Path, Tokenizer], Any], int]] = {
    "checkpoint": (CheckpointFiles, 600),
    "stream": (StreamFiles, 600),
    "tokenizer": (TokenizerFiles, 300),
    "words": (lambda directory, tokenizer: TokenizerFiles(directory, WORDS), 200),
    "megatron": (MegatronFiles, 300),
    "yaml": (YamlFiles, 200),
}


def fuzz(reader: Any, root: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """Read one mutated file after the other; how often each thing came of it, and what must not have."""
    folder = root / reader.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in reader.files.items():
        (folder / name).write_bytes(data)
    reader.read(root)  # what is not mutated is accepted

    counts: Counter[str] = Counter()
    faults: list[str] = []
    for seed in seeds:
        (root / "seed").write_text(str(seed))
        changed = reader.mutate(random.Random(seed))
        for name, data in changed.items():
            (folder / name).write_bytes(data)

        signal.alarm(SECONDS)
        try:
            reader.read(root)
            counts["accepted"] += 1
        except reader.errors:
            counts["refused"] += 1
        except BaseException as error:
            counts["faults"] += 1
            faults.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
        signal.alarm(0)

        for name in changed:
            (folder / name).write_bytes(reader.files[name])
    return counts, faults


def in_a_process(reader: Any, root: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """`fuzz` where a crash kills no one else, and memory is limited."""
    result = root / "result.json"
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, in the middle of a library as well
            os.fsync = lambda handle: None  # type: ignore[assignment]
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            result.write_text(json.dumps(fuzz(reader, root, seeds)))
        finally:
            os._exit(not result.exists())

    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Counter(faults=1), [f"seed {(root / 'seed').read_text()}: killed by signal {os.WTERMSIG(status)}"]
    counts, faults = json.loads(result.read_text())
    return Counter(counts), faults


@pytest.mark.parametrize("times", [1, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_fault_30_mutated_files(tmp_path: Path, tokenizer: Tokenizer, name: str, times: int) -> None:
    make, count = READERS[name]
    torch.set_num_threads(1)
    reader = make(tmp_path / "original", tokenizer)
    counts, faults = in_a_process(reader, tmp_path, range(count * times))
    print(f"{name}: {count * times:,} mutated files, {dict(counts)}")
    assert not faults, "\n".join(faults[:20])
    assert counts["refused"] > 0
