"""What corpus.train, corpus.valid and corpus.test may be: paths, or sources with a name and a share each.

    corpus:
      train:
        reviews: {paths: reviews/*.txt, share: 2.0}
        wiki: {paths: [wiki/a.txt, wiki/b.txt]}

Paths alone are one source without a name. The command line takes the same as JSON. jsonargparse reads a mapping that
does not fit the type as a path, or lists every type that it tried; so what is wrong with one is found here, by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

SPLITS = ("train", "valid", "test")  # the knobs of the corpus section that take texts
MOST_SHARE = 1000.0


@dataclass(frozen=True)
class NamedSource:
    """Texts under a name of the user's, and how often their documents are taken."""

    paths: list[str] | str = ""
    """Files, globs or fsspec URLs; must be given."""
    share: float = 1.0
    """Below 1: this share of the documents, chosen by their hash; above 1: each document so many times."""


Texts = dict[str, NamedSource] | list[str] | str


def named_sources(texts: Texts) -> dict[str, NamedSource]:
    """The sources by name, in the order given; paths alone are one source named ''."""
    if isinstance(texts, dict):
        return texts
    return {"": NamedSource(texts)} if texts else {}


def faults_of_texts(key: str, value: Any) -> Iterator[str]:
    """Everything wrong with named sources, as in a file or as parsed, as `key: what is expected`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):  # of the command line, and not of the type
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if not isinstance(value, dict):
        return

    for name, source in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            yield f"{key}: {name!r} is no name of a source; give letters, digits, '_', '-' and '.'"
            continue

        given = dataclasses.asdict(source) if isinstance(source, NamedSource) else source
        if not isinstance(given, dict):
            yield f"{key}.{name}={given}: expected paths under it, as in {name}: {{paths: {given}, share: 1.0}}"
            continue
        yield from _faults_of_source(f"{key}.{name}", given)


def _faults_of_source(key: str, given: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one source: its keys, its paths, its share."""
    for unknown in given.keys() - {"paths", "share"}:
        yield f"{key}.{unknown}: no such key; a source has paths and share"

    paths = given.get("paths", "")
    listed = paths if isinstance(paths, list) else [paths]
    if not listed or not all(isinstance(path, str) and path for path in listed):
        yield f"{key}.paths={paths}: expected a file, a glob, a URL, or a list of them"

    share = given.get("share", 1.0)
    number = isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
    if not number or not 0 < share <= MOST_SHARE:
        yield f"{key}.share={share}: expected a number above 0 and up to {MOST_SHARE:g}; 1 takes each document once"
