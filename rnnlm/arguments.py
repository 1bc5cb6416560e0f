"""The command line as it was typed: options, and what is wrong with them before anybody asks what they mean.

An option that is given twice would count once, in silence. The price of looking first: an option's value is what stands
behind it, also where that looks like nothing that could be one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rnnlm.config import is_list, types

FLAGS = ("help", "print_config")  # of jsonargparse; they need no value


@dataclass(frozen=True)
class Option:
    """`--key=value`, `--key value`, or `--key+=value`, which appends to a list."""

    key: str
    value: str | None  # as it was typed; None: there is none
    appends: bool = False

    @property
    def argument(self) -> str:
        """The option as one argument."""
        sign = "+=" if self.appends else "="
        return f"--{self.key}" if self.value is None else f"--{self.key}{sign}{self.value}"


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[Option], list[str]]:
    """(paths of --config, options, arguments that belong to no option), each in their order."""
    files, options, stray = list[str](), list[Option](), list[str]()
    ahead = list(argv)
    while ahead:
        argument = ahead.pop(0)
        key, sign, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help"):
            options.append(Option("help", None))
        elif not argument.startswith("--"):
            stray.append(argument)
        elif sign:
            options.append(Option(key.removesuffix("+"), value, key.endswith("+")))
        else:
            has_value = key not in FLAGS and ahead and not ahead[0].startswith("--")
            options.append(Option(key, ahead.pop(0) if has_value else None))

    files = [option.value or "" for option in options if option.key == "config"]
    return files, [option for option in options if option.key != "config"], stray


def faults_of(options: Sequence[Option], stray: Sequence[str]) -> Iterator[str]:
    """What cannot be meant: arguments without an option, options without a value, lists that are given twice."""
    for argument in stray:
        yield f"{argument}: belongs to no option; several values are a list, as in --corpus.train='[a.txt, b.txt]'"
    for option in options:
        if option.value is None and option.key not in FLAGS:
            yield f"{option.key}: has no value; give one, as in --{option.key}=..."

    for before, after in _repeated(options):
        if is_list(types().get(after.key)):
            both = list_text([before.value or "", after.value or ""])
            yield (
                f"{after.key}: given twice, as {before.value} and as {after.value}, of which the last alone would "
                f"count; give both as --{after.key}='{both}'"
            )


def warnings_of(options: Sequence[Option]) -> Iterator[str]:
    """What may be meant, as by a script that adds to the options of another: single values that are given twice."""
    for before, after in _repeated(options):
        if not is_list(types().get(after.key)):
            yield f"{after.key}: given twice, as {before.value} and as {after.value}; the last counts"


def _repeated(options: Iterable[Option]) -> Iterator[tuple[Option, Option]]:
    """Each option that replaces an earlier one with another value, after that one."""
    last = dict[str, Option]()
    for option in options:
        before = last.get(option.key)
        if before and not option.appends and before.value != option.value:
            yield before, option
        last[option.key] = option


def list_text(items: Iterable[str]) -> str:
    """Texts as one YAML list, quoted where they would be read as something else."""
    plain = re.compile(r"[A-Za-z_./*~][\w ./*~-]*")
    return f"[{', '.join(item if plain.fullmatch(item) else json.dumps(item, ensure_ascii=False) for item in items)}]"
