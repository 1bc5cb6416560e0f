"""The sources themselves: import order, one home per library, no pickle, plain --help, no torch in tools."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT, command, environment

ROOMS = ("", "data", "data/build", "model", "checkpoint", "train")  # each imports only from those before it
GROUND = (
    "errors", "hashing", "machine", "files", "knob", "texts", "config", "faults", "yaml_file", "key_names",
    "arguments", "cli", "kernels",
)  # fmt: skip
ALONE = {"checkpoint"}  # rooms that import from the ground floor alone
TORCH = {"data/substreams", "model", "checkpoint", "train"}  # where torch may be imported
HOMES = {
    "sentencepiece": "data/sentencepiece_tokenizer data/tokenizer_training tools/fuzz_encoder",
    "tokenizers": "data/hugging_face_tokenizer tools/fuzz_encoder",
    "numba": "kernels",
    "triton": "model/dropout_triton",
    "liger_kernel": "model/liger",
    "pyarrow": "data/tables",
    "distributed": "data/build/executor",
    "safetensors": "checkpoint/safetensors_file",
    "accelerate": "train/distributed",
    "wandb": "train/trackers",
    "pydantic": "train/state",
}
PACKAGE = ROOT / "rnnlm"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_of(path: Path) -> str:
    """A file's name in the package, as data/build/units; of a file outside, its folder and name."""
    root = PACKAGE if PACKAGE in path.parents else ROOT
    return path.relative_to(root).with_suffix("").as_posix()


def room_of(module: str) -> str:
    return module.rpartition("/")[0]


SOURCES = sources("rnnlm", "launch", "tools")
MODULES = [module_of(path) for path in sources("rnnlm") if path.name != "__init__.py"]


def imported_modules(module: str) -> list[str]:
    """The package's own modules that one of them imports."""
    found = []
    for name in imports(PACKAGE / f"{module}.py"):
        path = name.removeprefix("rnnlm.").replace(".", "/")
        if name.startswith("rnnlm."):
            found += [each for each in MODULES if each == path or each == path.rpartition("/")[0]]
    return found


def order_of(room: str) -> list[str]:
    """The modules of a room in the order that its __init__.py states."""
    if not room:
        return list(GROUND)
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert text is not None
    order = re.search(r"The order: ([\w,\s]+)\.", text)
    assert order, f"{room}/__init__.py states no order"
    return [f"{room}/{name}" for name in re.findall(r"\w+", order[1])]


def test_rooms_import_only_from_those_before_them() -> None:
    """`pytest -s -k rooms` prints the table of arrows."""
    arrows = Counter[tuple[str, str]]()
    for module in MODULES:
        for imported in imported_modules(module):
            room, other = room_of(module), room_of(imported)
            arrows[room, other] += 1
            assert ROOMS.index(other) <= ROOMS.index(room), f"{module} imports {imported}"
            assert not (room in ALONE and other not in ("", room)), f"{module} imports {imported}"

    print("\nimports of the room at the left from the room above")
    print(f"{'':12}" + "".join(f"{room or 'ground':>12}" for room in ROOMS))
    for room in ROOMS:
        print(f"{room or 'ground':12}" + "".join(f"{arrows[room, other] or '':>12}" for other in ROOMS))


@pytest.mark.parametrize("room", ROOMS)
def test_modules_import_only_those_before_them_in_their_room(room: str) -> None:
    order = order_of(room)
    assert sorted(order) == sorted(module for module in MODULES if room_of(module) == room)
    for module in order:
        for imported in imported_modules(module):
            if room_of(imported) == room:
                assert order.index(imported) < order.index(module), f"{module} imports {imported}"


def test_a_reader_of_a_stream_needs_no_parser_of_text() -> None:
    """Nor does a user of a tokenizer: training on streams imports nothing of what makes them."""
    reached, ahead = set[str](), ["data/stream", "data/tokenizer"]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            ahead += imported_modules(module)
    assert "data/stream_format" in reached, "else nothing was followed"
    parsers = {"data/sources", "data/decompress", "data/jobs", "data/records", "data/tables", "data/documents"}
    assert not reached & parsers
    assert {room_of(module) for module in imported_modules("data/tokenizer")} == {""}


def test_training_loads_a_compiler_only_when_something_is_dropped() -> None:
    """What a module imports within a function is imported when it is called."""
    reached, ahead = set[str](), ["train/trainer"]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            statements = ast.parse((PACKAGE / f"{module}.py").read_text()).body
            outermost = [each for each in statements if isinstance(each, ast.ImportFrom)]
            names = {f"{each.module}{end}" for each in outermost for end in ("", *(f".{a.name}" for a in each.names))}
            paths = {name.removeprefix("rnnlm.").replace(".", "/") for name in names}
            ahead += [each for each in imported_modules(module) if each in paths]

    assert {"model/dropout", "data/substreams"} <= reached, "else nothing was followed"
    assert not reached & {"kernels", "model/dropout_kernels", "model/dropout_triton"}


def test_torch_is_imported_only_where_tensors_are() -> None:
    for module in MODULES:
        if any(name.split(".")[0] == "torch" for name in imports(PACKAGE / f"{module}.py")):
            assert any(module == place or module.startswith(f"{place}/") for place in TORCH), module


def test_pytest_collects_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """By default it leaves out folders called build."""
    for folder in {path.parent for path in sources("tests") if path.name.startswith("test_")}:
        for name in folder.relative_to(ROOT).parts:
            assert not any(fnmatch(name, pattern) for pattern in pytestconfig.getini("norecursedirs")), folder


def test_tests_of_sources_see_files_in_folders() -> None:
    assert PACKAGE / "data/build/units.py" in SOURCES
    assert len(MODULES) > len(list(PACKAGE.glob("*.py"))), "else only the ground floor is looked at"


def test_each_library_has_one_home() -> None:
    for path in SOURCES:
        if path.stem.startswith("benchmark_"):  # may use what it measures with
            continue
        for imported in imports(path):
            library = imported.split(".")[0]
            homes = HOMES.get(library, module_of(path)).split()
            assert module_of(path) in homes, f"{path} imports {imported}"


def test_nothing_is_pickled_and_nothing_is_left_for_later() -> None:
    for path in SOURCES:
        text = path.read_text()
        for banned in (
            r"\bpickle\.",
            r"import pickle",
            r"torch\.(load|save)\(",
            r"\bTODO\b",
            r"\bFIXME\b",
            "NotImplemented",
        ):
            assert not re.search(banned, text), f"{path.name}: {banned}"


def test_every_module_says_what_it_is() -> None:
    for path in [*SOURCES, *sources("tests")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_never_import_torch(script: Path) -> None:
    """--help and everything that main() imports."""
    if script.stem.startswith("benchmark"):
        pytest.skip("benchmarks measure the library, and may")
    watched = (
        f"import runpy, sys\nsys.argv = [{str(script)!r}, '--help']\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n"  # as Python does for a script
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
        "import rnnlm.data.build.build, rnnlm.data.stream, rnnlm.data.tokenizer, rnnlm.data.adopt\n"
        "assert 'torch' not in sys.modules\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", watched], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_explain_themselves(script: Path) -> None:
    done = subprocess.run(
        command(script, "--help"), env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"launch/{script.name}" in done.stdout
