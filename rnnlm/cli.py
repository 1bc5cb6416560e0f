"""The command line of an entry point: files of --config, then options, checked together before anything is done."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rnnlm.config import Config, field_kinds
from rnnlm.errors import UserError


def load_yaml(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a configuration file.

    Raises:
        UserError: no such file, not YAML, or not `section: {key: value}`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config={path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config={path}: not valid YAML: {error}") from error
    try:
        loaded = yaml.safe_load(text) or {}
    except Exception as error:  # PyYAML lets through whatever the making of a value raises
        raise UserError(f"--config={path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not all(isinstance(part, dict) for part in loaded.values()):
        raise UserError(f"--config={path}: expected sections with keys under them, as in configs/imdb.yaml")
    return loaded


def dump_yaml(config: Config, sections: Sequence[str]) -> str:
    """The resolved values of these sections; reading it back gives an equal configuration."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump({name: values[name] for name in sections}, sort_keys=False, allow_unicode=True)


def unknown_keys(keys: Iterable[str], where: str) -> list[str]:
    """A fault for each key that no section has, with the nearest one that exists."""
    known = list(field_kinds())
    found = []
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            found.append(f"{key}: no such key in {where}; did you mean {near}?")
    return found


def _split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths of --config, all other arguments), in their order."""
    files, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def _recorded(arguments: Sequence[str]) -> str:
    """The path of the configuration of the run that `--run.directory` names."""
    option = "--run.directory"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option or argument.startswith(f"{option}="):
            directory = following if argument == option else argument.removeprefix(f"{option}=")
            if not (Path(directory) / "config.yaml").is_file():
                raise UserError(f"run.directory={directory}: no run there; train one with launch/train.py")
            return str(Path(directory) / "config.yaml")
    raise UserError("run.directory is not set; name a run, as in --run.directory=runs/imdb")


def read_config(
    sections: Sequence[str], doc: str | None, argv: Sequence[str] | None = None, of_run: bool = False
) -> Config:
    """The configuration of a door: defaults, then the files of --config, then the other options.

    Args:
        sections: the sections that this door reads and shows under --help; others are checked and left at default.
        doc: the door's docstring, shown under --help.
        argv: the arguments; None: those of the process.
        of_run: start from the configuration recorded in run.directory, which must be an option.

    Raises:
        UserError: naming every unknown key and every bad value at once.
    """
    files, rest = _split_command_line(sys.argv[1:] if argv is None else argv)
    if of_run and not {"-h", "--help"} & set(rest):
        files.insert(0, _recorded(rest))
    loaded = {path: load_yaml(path) for path in files}
    faults = []
    for path, content in loaded.items():
        empty = [f"{section}." for section, part in content.items() if not part and not hasattr(Config(), section)]
        keys = [f"{section}.{key}" for section, part in content.items() for key in part]
        faults += unknown_keys(empty + keys, path)
    names = [argument[2:].split("=")[0].rstrip("+") for argument in rest if argument.startswith("--")]
    faults += unknown_keys((name for name in names if name not in ("help", "print_config")), "the command line")
    if faults:
        raise UserError("; ".join(faults))

    texts = [
        f"--config={json.dumps({name: content[name] for name in content if name in sections})}"
        for content in loaded.values()
    ]
    config = _parse(sections, doc, texts + rest)
    if faults := config.faults():
        raise UserError("; ".join(faults))
    return config


def _parse(sections: Sequence[str], doc: str | None, arguments: list[str]) -> Config:
    import jsonargparse  # not at the top: readers of a stream need no command line

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the doors' docstrings."""

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=doc, exit_on_error=False, formatter_class=Formatter)
    parser.add_argument("--config", action="config", help="YAML file of an experiment; may be given several times.")
    for section in sections:
        parser.add_class_arguments(type(getattr(Config(), section)), section)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    return Config(**{section: parsed[section] for section in sections})


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run a door's main; its result is the exit code.

    A mistake of the user, a path or a disk is one line and code 2, a run that cannot go on one line and code 1, Ctrl-C
    one line and 130.
    """
    # Before torch loads OpenMP: threads that spin while they wait all but stop a run whose cores are not all its own,
    # threads that never spin wait for the scheduler at every step; a few hundred rounds cost neither.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    try:
        code = main()
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and not error.filename and not full:
            raise  # not a path that the user gave: a fault of ours, with its traceback
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "is_alone", False):  # one line per machine
            way_out = "; make room on the disk and type the same command again" if full else ""
            print(f"error: {error}{way_out}", file=sys.stderr)
        code = 1 if full else getattr(error, "code", 2)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\ninterrupted; type the same command again to go on", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)
