"""Configuration files: read with today's names of keys, and written.

YAML has two ways to lose what was written: of two equal keys only the last counts, and lines without dashes are one
text. Both are refused by line. The price: a file is walked once as a tree of nodes before its values are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rnnlm.config import Config, is_list, types
from rnnlm.errors import UserError

Sections = dict[str, dict[str, Any]]  # section -> key -> value, as in a file

# Knobs that had another name in files of earlier versions, a finished run's config.yaml among them.
RENAMED = {("train", "prefetch_workers"): "prefetch_threads"}


def load_yaml(path: str | Path) -> Sections:
    """The sections of a configuration file, with today's names.

    Raises:
        UserError: no such file, not YAML, not `section: {key: value}`, a key that stands twice, or lines that look like
            a list and are one text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config={path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config={path}: not valid YAML: {error}") from error

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        faults = [*_repeated_keys(root), *_folded_lists(root)]
        loaded = loader.construct_document(root) if root is not None else {}
    except Exception as error:  # PyYAML lets through whatever the making of a value raises
        raise UserError(f"--config={path}: not valid YAML: {' '.join(str(error).split())}") from error
    if faults:
        raise UserError("; ".join(f"--config={path}: {fault}" for fault in faults))

    loaded = loaded or {}
    if not isinstance(loaded, dict) or not all(isinstance(keys, dict) for keys in loaded.values()):
        raise UserError(f"--config={path}: expected sections with keys under them, as in configs/imdb.yaml")
    for (section, old), new in RENAMED.items():
        keys = loaded.get(section, {})
        if old in keys and new not in keys:  # with both, the old one is an unknown key
            keys[new] = keys.pop(old)
    return loaded


def _repeated_keys(root: yaml.Node | None) -> Iterator[str]:
    """A fault for each key that stands twice in one mapping, at any depth."""
    ahead, seen = [root], set[int]()
    while ahead:
        node = ahead.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias leads to a node again, or into itself

        lines = dict[str, int]()  # of the keys
        for item in node.value:
            ahead += item if isinstance(item, tuple) else [item]
            if isinstance(item, tuple) and isinstance(item[0], yaml.ScalarNode):
                key, line = item[0].value, item[0].start_mark.line + 1
                if key in lines:
                    yield f"{key} stands on line {lines[key]} and again on line {line}; keep one of them"
                lines[key] = line


def _folded_lists(root: yaml.Node | None) -> Iterator[str]:
    """A fault for each knob that takes a list and is given several lines without dashes, which YAML joins."""
    for section, keys in root.value if isinstance(root, yaml.MappingNode) else ():
        for key, value in keys.value if isinstance(keys, yaml.MappingNode) else ():
            name = f"{section.value}.{key.value}"
            first, last = value.start_mark.line + 1, value.end_mark.line + 1
            is_plain = isinstance(value, yaml.ScalarNode) and value.style is None
            if is_plain and last > first and name in types() and is_list(types()[name]):
                yield f"{name}: lines {first} to {last} are one text; put '- ' before each item, or quotes around all"


def dump_yaml(config: Config, sections: Sequence[str]) -> str:
    """The resolved values of these sections; reading it back gives an equal configuration."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump({name: values[name] for name in sections}, sort_keys=False, allow_unicode=True)
