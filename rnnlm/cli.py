"""The command line of an entry point: files of --config, then options, checked together before anything is done.

jsonargparse reads types and texts from the dataclasses of config.py, but stops at the first fault, and its words are
Python's. So keys are compared with the knobs before it runs, and where it refuses a value, each is given to it alone:
all faults of one kind are reported at once. The price: keys, types and bounds are three kinds, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rnnlm.arguments import FLAGS, Option, faults_of, list_text, split_command_line, warnings_of
from rnnlm.config import Config, is_list, knobs, types
from rnnlm.errors import UserError, is_full, kind_of, line_of
from rnnlm.faults import find_faults
from rnnlm.key_names import READERS, unknown_key
from rnnlm.knob import closest
from rnnlm.texts import SPLITS, faults_of_texts
from rnnlm.yaml_file import Sections, load_yaml


def read_config(
    sections: Sequence[str], doc: str | None, argv: Sequence[str] | None = None, of_run: bool = False
) -> Config:
    """The configuration of an entry point: defaults, then the files of --config in their order, then the other options.

    Args:
        sections: those that it reads and shows under --help; others are checked and left at their defaults.
        doc: its docstring, shown under --help.
        argv: the arguments; None: those of the process.
        of_run: start from the configuration recorded in run.directory, which an option or a file names; what cannot
            change once a run has begun is as recorded there, whatever the files say.

    Raises:
        UserError: naming every unknown key, or every value of a wrong type, or every bad value at once; the file of a
            run that was copied, and names the other one.
    """
    paths, options, stray = split_command_line(sys.argv[1:] if argv is None else argv)
    files = [(path, load_yaml(path)) for path in paths]
    faults = [fault for path, content in files for fault in _unknown_keys(_keys_of_file(content), path)]
    faults += _unknown_keys((option.key for option in options if option.key not in FLAGS), "the command line")
    faults += [*faults_of(options, stray), *_unread_options(sections, options)]

    contents = [content for _, content in files]
    for content in contents:
        for key, value in content.get("corpus", {}).items():
            faults += faults_of_texts(f"corpus.{key}", value) if key in SPLITS else []
    _raise(faults)

    if "run" in sections:
        _follow_moved_run(files, options)
    if of_run and "help" not in {option.key for option in options}:
        contents = _with_record(contents, options)
    config = _parse(sections, doc, contents, options)
    _raise([*_lists_that_are_texts(config), *find_faults(config)])

    for warning in warnings_of(options) if is_first_here() else ():
        print(f"warning: {warning}", file=sys.stderr)
    return config


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise UserError("; ".join(faults))


def _keys_of_file(content: Sections) -> list[str]:
    """The `section.key` of a file; of a section that is unknown and empty, `section.`."""
    empty = [f"{section}." for section, keys in content.items() if not keys and not hasattr(Config(), section)]
    return empty + [f"{section}.{key}" for section, keys in content.items() for key in keys]


def _unknown_keys(keys: Iterable[str], where: str) -> list[str]:
    known = list(knobs())
    return [unknown_key(key, where, known) for key in keys if key not in known]


def _unread_options(sections: Sequence[str], options: Sequence[Option]) -> Iterator[str]:
    """A fault for each option of a section that this script does not read; in a file such a key is for others."""
    for option in options:
        section = option.key.partition(".")[0]
        if option.key in knobs() and section not in sections:
            readers = " or ".join(READERS[section])
            yield f"{option.key}: this script does not read it; give it to {readers}"


def _follow_moved_run(files: Sequence[tuple[str, Sections]], options: Sequence[Option]) -> None:
    """Have the file that names run.directory name the one in which it lies, if it is a run's own and the run was moved.

    Raises:
        UserError: the directory that it names is there too.
    """
    naming = [(path, content["run"]) for path, content in files if content.get("run", {}).get("directory")]
    if not naming or any(option.key == "run.directory" for option in options):
        return

    path, keys = naming[-1]
    here, named = Path(path).parent, Path(str(keys["directory"]))
    is_own = Path(path).name == "config.yaml" and (here / "checkpoints").is_dir()
    if not is_own or named.resolve() == here.resolve():
        return
    if named.exists():
        raise UserError(
            f"--config={path}: names another run.directory, {named}, which is there too; say which "
            f"is meant, with --run.directory={here} or --run.directory={named}"
        )

    keys["directory"] = str(here)
    if is_first_here():
        print(f"note: {path} names run.directory={named}, which is not there; {here} is taken", file=sys.stderr)


def _with_record(contents: Sequence[Sections], options: Sequence[Option]) -> list[Sections]:
    """The files of --config with what is recorded in the run around them.

    Raises:
        UserError: no run is named, there is none, or an option names another model than the run's.
    """
    directory = ""
    for content in contents:
        directory = content.get("run", {}).get("directory") or directory
    for option in options:
        directory = (option.value or "") if option.key == "run.directory" else directory
    if not directory:
        raise UserError(
            "run.directory is not set; name a run, as in --run.directory=runs/imdb, or a file that does, as in "
            "--config=configs/imdb.yaml"
        )

    path = Path(directory) / "config.yaml"
    if not path.is_file():
        raise UserError(f"run.directory={directory}: no run there; train one with launch/train.py")
    record, known = load_yaml(path), knobs()
    _raise(_unknown_keys(_keys_of_file(record), str(path)))
    _raise([
        f"{option.key}: is part of the run's model, which its config.yaml tells; leave the option out"
        for option in options
        if option.key.startswith("model.")
    ])  # fmt: skip

    fixed = {
        section: {name: value for name, value in keys.items() if not known[f"{section}.{name}"].changeable}
        for section, keys in record.items()
    }
    return [record, *contents, fixed]


def _parse(sections: Sequence[str], doc: str | None, contents: Sequence[Sections], options: Sequence[Option]) -> Config:
    """The values of files and options, of the right types; --help prints and exits.

    Raises:
        UserError: naming every value of another type.
    """
    import jsonargparse  # not at the top: readers of a stream need no command line

    # Files were read and checked already; jsonargparse gets what is in them for the sections that are wanted.
    wanted = [{name: keys for name, keys in content.items() if name in sections} for content in contents]
    arguments = [option.argument for option in options]
    parser = _parser(tuple(sections), doc)
    try:
        parsed = parser.instantiate(parser.parse_args([*map(_as_option, wanted), *arguments]))
    except jsonargparse.ArgumentError as error:
        alone = {f"{section}.{key}={value}": _as_option({section: {key: value}})
                 for content in wanted for section, keys in content.items() for key, value in keys.items()}  # fmt: skip
        alone.update({f"{option.key}={option.value}": option.argument for option in options})
        _raise([_expected(given) for given, argument in alone.items() if _is_refused(parser, argument)])
        raise UserError(" ".join(str(error).split())) from error
    return Config(**{section: parsed[section] for section in sections})


@cache  # a sixth of a second
def _parser(sections: tuple[str, ...], doc: str | None) -> Any:
    """jsonargparse's parser of these sections."""
    import jsonargparse

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
    return parser


def _as_option(content: Sections) -> str:
    return f"--config={json.dumps(content, default=str)}"  # a date of YAML is a text


def _is_refused(parser: Any, argument: str) -> bool:
    """Whether an argument has a value of another type than its knob."""
    import jsonargparse

    try:
        parser.parse_args([argument])
    except jsonargparse.ArgumentError:
        return True
    return False


def _expected(given: str) -> str:
    """The fault of `section.key=value` whose value is of another type."""
    key, _, value = given.partition("=")
    kind, default = types()[key], Config().flat()[key]
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return f"{given}: expected one of {', '.join(choices)}; did you mean {closest(value, choices)}?"
    if is_list(kind):
        return f"{given}: expected a text or a list of texts, as in '[one, two]'; put quotes around what has a colon"

    names = {
        bool: "true or false",
        int: f"a whole number, as in {default}",
        float: f"a number, as in {default or 0.001}",
    }
    return f"{given}: expected {names.get(kind, 'a text')}"


def _lists_that_are_texts(config: Config) -> Iterator[str]:
    """A fault for each text in brackets: a list to its author, but not to YAML, for which `a:` is no text."""
    for key, value in config.flat().items():
        if is_list(types()[key]) and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            items = list_text(item.strip().strip("'\"") for item in value[1:-1].split(","))
            yield (
                f"{key}={value}: is one text to YAML, not a list; put quotes around its items, as in '{items}', or "
                f"around the whole if it is one, as in '{list_text([value])}'"
            )


def is_first_here() -> bool:
    """Whether this is the first of the processes that were launched on this machine: one line is enough."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run the main function of a script; its result is the exit code.

    A mistake of the user, a path or a disk is one line and code 2, a run that cannot continue one line and code 1,
    Ctrl-C one line and 130, an output that nobody reads 141.
    """
    # Before torch loads OpenMP: threads that spin while they wait all but stop a run whose cores are not all its own,
    # threads that never spin wait for the scheduler at every step; a few hundred rounds cost neither.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    first_here = is_first_here()

    try:
        code = main()
    except BrokenPipeError:  # who reads what is printed has seen enough, as `head` has
        code = 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not error.filename and not is_full(error):
            raise  # not a path that the user gave: a fault of ours, with its traceback

        if first_here or getattr(error, "may_be_local", False):
            print(f"error: {line_of(error)}", file=sys.stderr)
            _tell_launcher(f"error: {line_of(error)}")
        code = kind_of(error).code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rnnlm"):
            raise  # a fault of ours

        if first_here:
            print(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        if first_here:
            print("\ninterrupted; type the same command again to resume", file=sys.stderr)
        code = 130

    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nobody gets the rest; else Python's own end would fail at it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _tell_launcher(line: str) -> None:
    """Put a line where torchrun looks for the cause, so that its report, which comes last, ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        cause = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")
