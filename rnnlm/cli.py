"""The command line of an entry point: files of --config, then options, checked together before anything is done.

jsonargparse reads types and texts from the dataclasses of config.py, but stops at the first unknown key. So keys are
compared with the knobs before it runs, and values checked after it; everything wrong is reported at once. The price: a
value of the wrong type, which jsonargparse finds in between, is reported alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rnnlm.config import Config, knobs
from rnnlm.errors import UserError
from rnnlm.knob import closest
from rnnlm.texts import SPLITS, faults_of_texts

Sections = dict[str, dict[str, Any]]  # section -> key -> value, as in a file

# Knobs that had another name in files of earlier versions, a finished run's config.yaml among them.
RENAMED = {("train", "prefetch_workers"): "prefetch_threads"}


def load_yaml(path: str | Path) -> Sections:
    """The sections of a configuration file, with today's names.

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

    if not isinstance(loaded, dict) or not all(isinstance(keys, dict) for keys in loaded.values()):
        raise UserError(f"--config={path}: expected sections with keys under them, as in configs/imdb.yaml")
    for (section, old), new in RENAMED.items():
        keys = loaded.get(section, {})
        if old in keys and new not in keys:  # with both, the old one is an unknown key
            keys[new] = keys.pop(old)
    return loaded


def dump_yaml(config: Config, sections: Sequence[str]) -> str:
    """The resolved values of these sections; reading it back gives an equal configuration."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump({name: values[name] for name in sections}, sort_keys=False, allow_unicode=True)


def read_config(
    sections: Sequence[str], doc: str | None, argv: Sequence[str] | None = None, of_run: bool = False
) -> Config:
    """The configuration of an entry point: defaults, then the files of --config, then the other options.

    Args:
        sections: those that it reads and shows under --help; others are checked and left at their defaults.
        doc: its docstring, shown under --help.
        argv: the arguments; None: those of the process.
        of_run: start from the configuration recorded in run.directory, which must be an option.

    Raises:
        UserError: naming every unknown key and every bad value at once.
    """
    files, options = _split_command_line(sys.argv[1:] if argv is None else argv)
    if of_run and not {"-h", "--help"} & set(options):
        files.insert(0, _recorded_config(options))  # so that the files of --config, and options, come after it
    loaded = {path: load_yaml(path) for path in files}

    faults = [fault for path, content in loaded.items() for fault in _unknown_keys(_keys_of_file(content), path)]
    faults += _unknown_keys(_keys_of_options(options), "the command line")
    for content in loaded.values():
        for key, value in content.get("corpus", {}).items():
            faults += faults_of_texts(f"corpus.{key}", value) if key in SPLITS else []
    if faults:
        raise UserError("; ".join(faults))

    config = _parse(sections, doc, loaded.values(), options)
    if faults := config.faults():
        raise UserError("; ".join(faults))
    return config


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


def _recorded_config(options: Sequence[str]) -> str:
    """The path of the configuration of the run that `--run.directory` names."""
    name = "--run.directory"
    for option, following in zip(options, [*options[1:], ""], strict=True):
        if option == name or option.startswith(f"{name}="):
            directory = following if option == name else option.removeprefix(f"{name}=")
            path = Path(directory) / "config.yaml"
            if not path.is_file():
                raise UserError(f"run.directory={directory}: no run there; train one with launch/train.py")
            return str(path)
    raise UserError("run.directory is not set; name a run, as in --run.directory=runs/imdb")


def _keys_of_file(content: Sections) -> list[str]:
    """The `section.key` of a file; of a section that is unknown and empty, `section.`."""
    empty = [f"{section}." for section, keys in content.items() if not keys and not hasattr(Config(), section)]
    return empty + [f"{section}.{key}" for section, keys in content.items() for key in keys]


def _keys_of_options(options: Sequence[str]) -> list[str]:
    """The `section.key` of options, also of those that append to a list, as in `--corpus.train+=b.txt`."""
    names = [option[2:].split("=")[0].rstrip("+") for option in options if option.startswith("--")]
    return [name for name in names if name not in ("help", "print_config")]


def _unknown_keys(keys: Iterable[str], where: str) -> list[str]:
    """A fault for each key that no section has, with the nearest one that exists."""
    known = list(knobs())
    return [f"{key}: no such key in {where}; did you mean {closest(key, known)}?" for key in keys if key not in known]


def _parse(sections: Sequence[str], doc: str | None, contents: Iterable[Sections], options: Sequence[str]) -> Config:
    """The values of files and options, of the right types; --help prints and exits."""
    import jsonargparse  # not at the top: readers of a stream need no command line

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the scripts' docstrings, and leaves out --section=FILE, which is no key here."""

        def add_argument(self, action: argparse.Action) -> None:
            if action.dest not in sections:
                super().add_argument(action)

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        usage="%(prog)s [--config FILE] ... [--section.key=value] ...",
        description=doc,
        exit_on_error=False,
        formatter_class=Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of an experiment; may be given several times.")
    for section in sections:
        parser.add_class_arguments(type(getattr(Config(), section)), section)

    # Files were read and checked already; jsonargparse gets what is in them for the sections that are wanted.
    wanted = [{name: keys for name, keys in content.items() if name in sections} for content in contents]
    files = [f"--config={json.dumps(each, default=str)}" for each in wanted]  # a date of YAML is a text
    try:
        parsed = parser.instantiate(parser.parse_args([*files, *options]))
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    return Config(**{section: parsed[section] for section in sections})


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run the main function of a script; its result is the exit code.

    A mistake of the user, a path or a disk is one line and code 2, a run that cannot continue one line and code 1,
    Ctrl-C one line and 130.
    """
    # Before torch loads OpenMP: threads that spin while they wait all but stop a run whose cores are not all its own,
    # threads that never spin wait for the scheduler at every step; a few hundred rounds cost neither.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine: one line is enough

    try:
        code = main()
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and not error.filename and not full:
            raise  # not a path that the user gave: a fault of ours, with its traceback

        if first_here or getattr(error, "may_be_local", False):
            way_out = "; make room on the disk and type the same command again" if full else ""
            print(f"error: {error}{way_out}", file=sys.stderr)
        code = 1 if full else getattr(error, "code", 2)
    except KeyboardInterrupt:
        if first_here:
            print("\ninterrupted; type the same command again to resume", file=sys.stderr)
        code = 130

    sys.stdout.flush()
    sys.exit(code)
