"""Which small faults in the code no test notices: mutants of the modules that hold the promise, and their tests.

    make mutants                                                # all of MODULES, hours; taken up again where it ended
    make mutants SAMPLE=20                                      # 20 of each module, chosen by --seed
    python tools/mutate.py rnnlm/data/ring.py --jobs 2
    python tools/mutate.py rnnlm/data/ring.py --slow            # what survived, given to the slow tests as well
    python tools/mutate.py rnnlm/data/ring.py --list            # how many there are

The mutants are mutmut's (its operators on libcst's trees), and a few that matter here: a call that is left out, a
condition turned round, a copy that is not made. mutmut's own runner mutates no decorated function and no constant, and
cannot give tests to modules by name; so this script runs them: each mutant lies in a copy of the repository, where
scripts that tests start find it too, and a fork of a process that has the libraries already imported runs pytest there.
Texts of errors and annotations are left alone. Results are in .mutants/results.jsonl: who was killed stays so, who
survived is tried again when its tests have changed. Prints counts, and a diff for each survivor; `hung`: took too long.
"""

import argparse
import difflib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".mutants"
MODULES = {  # module -> the files of tests that concern it, the quickest first
    "rnnlm/data/ring.py": ("data/test_ring_offsets", "data/test_ring", "data/test_substreams"),
    "rnnlm/data/substreams.py": ("data/test_substreams", "train/test_continuity"),
    "rnnlm/data/build/unit_file.py": (
        "data/build/test_units",
        "data/build/test_selections",
        "data/build/test_external_sort",
        "data/build/test_kept",
        "data/build/test_durable",
    ),
    "rnnlm/data/build/units.py": (
        "data/build/test_units",
        "data/test_documents",
        "data/build/test_kept",
        "data/build/test_build",
        "data/build/test_kills",
    ),
    "rnnlm/data/build/encode.py": (
        "data/build/test_kept",
        "data/build/test_inputs",
        "data/build/test_build",
        "data/build/test_interrupt",
        "data/build/test_kills",
    ),
    "rnnlm/data/build/selections.py": (
        "data/build/test_selections",
        "data/build/test_build",
        "data/build/test_external_sort",
        "data/build/test_durable",
    ),
    "rnnlm/data/build/stream_tasks.py": (
        "data/build/test_build",
        "data/build/test_inputs",
        "data/build/test_engines",
        "data/build/test_kills",
    ),
    "rnnlm/data/build/assemble.py": (
        "data/build/test_build",
        "data/build/test_selections",
        "data/build/test_external_sort",
        "data/build/test_inputs",
        "data/build/test_durable",
        "data/build/test_engines",
        "data/build/test_kills",
    ),
    "rnnlm/model/generate.py": ("model/test_generate", "model/test_generated_rows", "train/test_trained_run"),
    "rnnlm/checkpoint/checkpoint.py": (
        "checkpoint/test_read_back",
        "checkpoint/test_checkpoint",
        "checkpoint/test_untrusted",
        "checkpoint/test_crash",
    ),
    "rnnlm/checkpoint/saver.py": ("checkpoint/test_read_back", "checkpoint/test_saver", "train/test_faults"),
    "rnnlm/train/guard.py": ("train/test_guard_edges", "train/test_guard", "train/test_restore"),
    "rnnlm/train/step.py": (
        "train/test_buckets",
        "train/test_baselines",
        "train/test_restore",
        "train/test_guard",
        "train/test_state",
        "train/test_trainer",
        "train/test_elastic",
    ),
    "rnnlm/train/run.py": (
        "train/test_run_directory",
        "train/test_run_tokenizer",
        "train/test_restore",
        "train/test_sizes",
        "train/test_state",
        "train/test_trainer",
        "train/test_elastic",
        "train/test_faults",
    ),
}
LIBRARIES = ("torch", "accelerate", "numba", "safetensors.torch", "sentencepiece", "pydantic", "jsonargparse", "yaml",
             "matplotlib.pyplot", "pytest")  # fmt: skip  # imported once for all mutants
PATIENCE = 3  # a mutant may take so many times as long as its tests do without it, and half a minute; else it hangs
TEST_SECONDS = 90  # of one default test, which then fails: a build that waits for ever is known by the first that hangs
DEFAULT, SLOW = "not gpu and not slow", "not gpu and slow"


@dataclass(frozen=True)
class Mutant:
    """A module with one small fault."""

    module: str
    code: str

    @property
    def key(self) -> str:
        """Stands for it in the results."""
        return hashlib.sha256(f"{self.module}\n{self.code}".encode()).hexdigest()[:16]

    def diff(self) -> str:
        """What was changed, in the format of a patch."""
        lines = (ROOT / self.module).read_text().splitlines(), self.code.splitlines()
        return "\n".join(difflib.unified_diff(*lines, self.module, self.key, n=1, lineterm=""))


def mutants_of(module: str, sample: int, seed: int) -> list[Mutant]:
    """Mutants of a module that are Python, each once: a sample, which begins with any smaller one; 0: all."""
    import libcst as cst

    source = (ROOT / module).read_text()
    tree, found = cst.parse_module(source), dict[str, Mutant]()
    ahead = list(changes(tree))
    if sample:
        random.Random(f"{seed} {module}").shuffle(ahead)

    for node, changed in ahead:
        if sample and len(found) == sample:
            break
        code = tree.deep_replace(node, changed).code
        try:
            compile(code, module, "exec")
        except SyntaxError:
            continue
        if code != source:
            found.setdefault(code, Mutant(module, code))
    return list(found.values())


def changes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(node, what takes its place) for every mutant of a module."""
    import libcst as cst
    import libcst.matchers as m
    from mutmut.mutation.mutators import mutation_operators, operator_string

    texts = m.Raise() | m.Annotation() | m.Decorator() | m.Import() | m.ImportFrom()
    counted = m.Call(func=m.Name("len") | m.Name("isinstance"))  # without its argument it only raises
    ahead = [tree]
    while ahead:
        node = ahead.pop()
        if m.matches(node, texts):
            continue

        for kind, operator in (*mutation_operators, *OWN_OPERATORS):
            if isinstance(node, getattr(cst, kind) if isinstance(kind, str) else kind) and not m.matches(node, counted):
                changed = list(operator(node))
                yield from ((node, each) for each in (changed[:1] if operator is operator_string else changed))
        children = node.children[:1] if isinstance(node, cst.Assert) else node.children
        ahead += reversed(children)


def leave_out(statement: Any) -> Iterator[Any]:
    """A statement that is a call, or that raises, is not there."""
    import libcst as cst
    import libcst.matchers as m

    if m.matches(statement, m.Expr(m.Call()) | m.Raise()):
        yield cst.Pass()


def turn_round(statement: Any) -> Iterator[Any]:
    """The condition of an if or while, or its opposite."""
    import libcst as cst

    inner = statement.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield statement.with_changes(test=cst.UnaryOperation(cst.Not(), inner))


def share(call: Any) -> Iterator[Any]:
    """No copy of a tensor or array: x.clone() is x."""
    import libcst.matchers as m

    if m.matches(call, m.Call(func=m.Attribute(attr=m.Name("clone") | m.Name("copy") | m.Name("detach")), args=[])):
        yield call.func.value


OWN_OPERATORS: Any = [("BaseSmallStatement", leave_out), ("If", turn_round), ("While", turn_round), ("Call", share)]


class Place:
    """A copy of the repository in which one mutant at a time is tested."""

    def __init__(self, number: int):
        self.root, self.number = WORK / f"copy-{number}", number
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        for name in listed.stdout.split("\n"):
            source, target = ROOT / name, self.root / name
            if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def start(self, module: str, code: str, tests: list[str], marks: str) -> int:
        """Fork a process that puts code into a module's place and runs tests; its number."""
        (self.root / module).write_text(code)
        child = os.fork()
        if child:
            return child

        os.setsid()
        os.chdir(self.root)
        output = os.open(WORK / f"output-{self.number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        # a mutant may be as long as the one before, and come in the same second
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": f"{self.root}:{os.environ.get('PYTHONPATH', '')}"}
        sys.path[0], sys.dont_write_bytecode = str(self.root), True
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS if marks == DEFAULT else 0}"]
        options += [f"--basetemp={WORK}/temporary-{self.number}", "-m", marks]
        ended = pytest.main([*options, *tests])
        os._exit(0 if ended == pytest.ExitCode.NO_TESTS_COLLECTED else int(ended))  # none of them is slow

    def clear(self, module: str) -> None:
        """The module as it is, and no process left."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                # what tests start is given a path of the copy, and a launcher's children are in sessions of their own
                if str(self.root).encode() in (path / "cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)
            except OSError:
                continue
        shutil.copy2(ROOT / module, self.root / module)


def run(place: Place, module: str, code: str, tests: list[str], marks: str, limit: float) -> Iterator[str | None]:
    """None while it runs, then "killed", "hung" or "survived"."""
    begun, child = time.monotonic(), place.start(module, code, tests, marks)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        late = time.monotonic() - begun > limit
        if ended or late:
            break
        yield None

    if not ended:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    place.clear(module)
    yield "hung" if not ended else "killed" if status else "survived"


def try_all(wanted: list[Mutant], places: list[Place], marks: str) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with what became of it, as they end."""
    running: dict[Place, tuple[Mutant, Iterator[str | None]]] = {}
    ahead = list(reversed(wanted))
    while ahead or running:
        for place in places:
            if place not in running and ahead:
                mutant = ahead.pop()
                tests = tests_of(mutant.module)
                limit = 30 + PATIENCE * sum(seconds_without(place, path, marks) for path in tests)
                running[place] = mutant, run(place, mutant.module, mutant.code, tests, marks, limit)

        time.sleep(0.05)
        for place, (mutant, states) in list(running.items()):
            if state := next(states):
                del running[place]
                yield mutant, state


def seconds_without(place: Place, path: str, marks: str) -> float:
    """How long a file of tests takes without a mutant; it must pass."""
    file, key = WORK / "seconds.json", f"{path} {marks} {hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]}"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    if key in known:
        return known[key]

    begun, module = time.monotonic(), next(iter(MODULES))
    for state in run(place, module, (ROOT / module).read_text(), [path], marks, 3600):
        time.sleep(0.05)
        if state not in (None, "survived"):
            sys.exit(f"{path} fails without a mutant; see {WORK}/output-{place.number}")
    known[key] = time.monotonic() - begun
    file.write_text(json.dumps(known, indent=1))
    return known[key]


def tests_of(module: str) -> list[str]:
    """The files of tests that concern a module, of those that are there."""
    paths = [f"tests/{name}.py" for name in MODULES[module]]
    return [path for path in paths if (ROOT / path).exists()]


def version_of(module: str, marks: str) -> str:
    """Changes when a survivor of these tests is to be tried again."""
    sources = b"".join((ROOT / path).read_bytes() for path in tests_of(module))
    return hashlib.sha256(sources + marks.encode()).hexdigest()[:16]


# Results


def main() -> None:
    """Make the mutants, try those whose end is not known, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all of MODULES")
    parser.add_argument("--sample", type=int, default=0, help="so many of each module, chosen by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--slow", action="store_true", help="give what survived to the slow tests too")
    parser.add_argument("--list", action="store_true", help="count them, and run nothing")
    options = parser.parse_args()
    if unknown := [module for module in options.modules if module not in MODULES]:
        parser.error(f"{', '.join(unknown)}: not among the modules with tests to try; these are {', '.join(MODULES)}")

    wanted = draw(options.modules or list(MODULES), options.sample, options.seed)
    if not options.list:
        WORK.mkdir(exist_ok=True)
        for library in LIBRARIES:
            importlib.import_module(library)
        places = [Place(number) for number in range(options.jobs)]
        for marks in (DEFAULT, SLOW)[: 1 + options.slow]:
            try_unknown(wanted, places, marks)
    report(wanted)


def draw(modules: list[str], sample: int, seed: int) -> list[Mutant]:
    """Mutants of all modules in turn, so that whoever ends early has tried as many of each; 0: all there are."""
    drawn = [mutants_of(module, sample, seed) for module in modules]
    return [mutant for turn in zip_longest(*drawn) for mutant in turn if mutant]


def results() -> dict[str, dict[str, str]]:
    """Key of a mutant -> the last that is known of it."""
    path = WORK / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def try_unknown(wanted: list[Mutant], places: list[Place], marks: str) -> None:
    """Try those whose end under these tests is not known, and note it as they end."""
    known = results()
    versions = {module: version_of(module, marks) for module in {mutant.module for mutant in wanted}}

    def is_known(mutant: Mutant) -> bool:
        found = known.get(mutant.key, {})
        return found.get("state") in ("killed", "hung") or found.get(marks) == versions[mutant.module]

    ahead = [mutant for mutant in wanted if not is_known(mutant)]
    with (WORK / "results.jsonl").open("a") as file:
        for count, (mutant, state) in enumerate(try_all(ahead, places, marks), 1):
            tried = {**known.get(mutant.key, {}), marks: versions[mutant.module]}
            file.write(json.dumps({**tried, "key": mutant.key, "module": mutant.module, "state": state}) + "\n")
            file.flush()
            if sys.stderr.isatty() or count % 20 == 0:
                print(f"{count} of {len(ahead)} ({marks})", file=sys.stderr, flush=True)


def report(wanted: list[Mutant]) -> None:
    """A line for each module, and a diff for each survivor."""
    known = results()
    modules = list(dict.fromkeys(mutant.module for mutant in wanted))
    for mutant in sorted(wanted, key=lambda each: modules.index(each.module)):
        if known.get(mutant.key, {}).get("state") == "survived":
            print(f"\n{mutant.diff()}")

    columns = ("killed", "hung", "survived", "")
    print(f"\n{'module':36}{'mutants':>10}" + "".join(f"{name or 'not tried':>10}" for name in columns))
    for module in [*modules, "all"]:
        states = [known.get(each.key, {}).get("state", "") for each in wanted if module in (each.module, "all")]
        print(f"{module:36}{len(states):10}" + "".join(f"{states.count(name):10}" for name in columns))


if __name__ == "__main__":
    main()
