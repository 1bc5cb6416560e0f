"""Write docs/faults.md: the faults that training and building must survive, and the tests that show it.

    python tools/list_faults.py
    python tools/list_faults.py --check     # writes nothing

Tests are found by their names: test_fault_07_..., _16_and_17_..., _21_22_..., _08_to_11_... Exit code 1 if a fault has
no test or, with --check, if the table is not the present one.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FAULTS = (  # the number of a fault never changes: tests and messages of commits refer to it
    ("killed, or power lost, in the middle of a checkpoint", "the newest whole one is used; one interval is lost"),
    (
        "disk full or failing while saving",
        "training continues with a warning; older checkpoints stay, no remains",
    ),
    ("only one checkpoint kept, and saving fails", "nothing older is deleted before the new one is read back"),
    ("one flipped bit in a checkpoint", "found when loading, renamed, reported; an older one is used"),
    ("a truncated or empty file in a checkpoint", "as 4"),
    ("ranks race to make and rename directories", "one rank alone writes"),
    ("ranks disagree on the time", "the clock of rank 0 decides when all save"),
    ("SIGTERM", "saved at the next step, marker in the run, exit code 75"),
    ("SIGTERM, with loader workers", "as 8: workers ignore it"),
    ("SIGUSR1, as from Slurm", "as 8"),
    ("SIGTERM to the launcher", "as 8, and no process is left"),
    ("saving takes longer than the grace period", "a warning, as soon as one save did"),
    ("a second signal, Ctrl-C twice", "stops at once; files are whole"),
    ("one rank raises an error", "all stop, the cause is printed once, exit code not 0"),
    (
        "one rank hangs",
        "all stop within run.timeout_minutes, with stacks; a disk that hangs is given six times as long",
    ),
    ("a loss or gradient is not finite", "the step is skipped and counted; many in a row end the run; none is saved"),
    ("the hidden state of one substream is not finite", "it alone starts from zero, and is counted"),
    ("the loss jumps", "on request, steps beyond k sigma are skipped"),
    ("resumed on another number of processes", "the same tokens and hidden states, or a refusal that says what fits"),
    ("resumed with other data, tokenizer, windows or batch", "refused, naming the field and both values"),
    (
        "a shard replaced by one of the same size",
        "with stream.verify, and by tools/verify_stream.py, refused by its digest; otherwise only sizes are looked at",
    ),
    ("a shard truncated before it is opened", "refused, with the file and both sizes"),
    ("a shard removed while it is read", "reading continues; the next start names it; nothing is rewritten in place"),
    ("disk full while building", "a clear error; the same command resumes when there is room"),
    ("a build killed at any moment", "only unfinished units are done again; the same bytes"),
    ("a worker of a build killed", "its unit is tried again, then marked as failed and named; nothing hangs"),
    (
        "bad input: encodings, long lines, broken archives or JSON",
        "fail, skip or replace; counted, with file and place",
    ),
    ("a token outside of the dtype or the vocabulary", "refused, never wrapped"),
    ("two runs write to one directory", "the second is refused; the lock names host, process and time"),
    ("a malicious checkpoint, tokenizer, shard or manifest", "a typed error in bounded memory; nothing is executed"),
    ("wandb is down, slow, missing or without a key", "training and metrics.jsonl do not notice"),
    ("machines start with other code, configuration or data", "refused before anything is written, naming which"),
    ("a run that is restarted again and again", "limited by number, and by progress where it can be seen"),
    ("a slow disk", "training waits for the copy to memory alone; one save in flight; its failure is reported"),
    ("resumed exactly where an epoch ends", "the next epoch starts once: nothing repeated, nothing left out"),
)
NAME = re.compile(r"test_fault_(\d\d(?:_(?:and_|to_)?\d\d)*)_")


def rows_of(name: str) -> set[int]:
    """The faults in a test's name."""
    if not (found := NAME.match(name)):
        return set()
    first, *_, last = numbers = [int(number) for number in re.findall(r"\d\d", found[1]) * 2]
    return set(range(first, last + 1)) if "_to_" in found[1] else set(numbers)


def tests(root: Path) -> Iterator[tuple[set[int], str]]:
    """(faults, what the table says) of every test that has some; tests are read, not imported."""
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (rows := rows_of(node.name)):
                name = path.relative_to(root / "tests").as_posix()
                yield rows, f"`{name}::{node.name}`{slow_mark(node)}"


def slow_mark(test: ast.FunctionDef) -> str:
    """Whether a test, or some of its cases, need `-m slow`."""
    marks = [ast.unparse(each) for each in test.decorator_list]
    if "pytest.mark.slow" in marks:
        return " (slow)"
    return " (more cases slow)" if "slow" in str(marks) else ""


def table(found: Sequence[tuple[set[int], str]]) -> tuple[str, list[str]]:
    """(the table, an error for each fault without a test)."""
    lines = [
        "# Faults, what happens, and the tests that show it",
        "",
        "Written by `python tools/list_faults.py` from the names in tests/; what is marked slow needs `-m slow`.",
        "",
        "| | fault | what happens | tests |",
        "|---|---|---|---|",
    ]
    errors = []
    for number, (fault, happens) in enumerate(FAULTS, 1):
        names = [name for rows, name in found if number in rows]
        lines.append(f"| {number} | {fault} | {happens} | {'<br>'.join(names) or 'none'} |")
        errors += [] if names else [f"no test for fault {number}"]
    return "\n".join(lines) + "\n", errors


def main() -> None:
    """Write or compare the table, and report which faults have no test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="of the repository")
    options = parser.parse_args()

    text, errors = table(list(tests(options.root)))
    path = options.root / "docs/faults.md"
    if not options.check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        errors.append("docs/faults.md is not what the tests say; run python tools/list_faults.py")

    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
