"""Make the quickstart's corpus: the modules of Python's own standard library, one file per document.

    python tools/make_corpus.py quickstart/corpus

Every machine with Python has this text. Tests and bundled third-party packages are left out. A finished directory is
left as it is; it appears under its name only when it is whole.
"""

import argparse
import shutil
import sys
import sysconfig
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "lib2to3"}


def modules(library: Path) -> list[Path]:
    """The library's modules as paths relative to it, sorted; only valid UTF-8."""
    found = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not SKIPPED & set(relative.parts):
            try:
                path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            found.append(relative)
    return found


def main() -> None:
    """Copy the modules, their paths flattened into names, then rename the directory into place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory to make")
    target: Path = parser.parse_args().directory
    if target.is_dir() and any(target.iterdir()):
        print(f"{target} is already there")
        return

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    library = Path(sysconfig.get_path("stdlib"))
    copied = modules(library)
    for relative in copied:
        shutil.copyfile(library / relative, partial / ".".join(relative.parts))
    if not copied:
        shutil.rmtree(partial)
        sys.exit(f"error: {library}: no modules there; use a Python that has its library as files")

    partial.rename(target)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {len(copied)} documents, {size / 1e6:.1f} MB, from Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
