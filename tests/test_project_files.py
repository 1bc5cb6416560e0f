"""The files around the package say what is there: image, workflow, hooks, changelog."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest of the line) of the Dockerfile."""
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word.isupper()]


def pod() -> dict[str, Any]:
    """The pod of kubernetes.yaml."""
    _, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


def test_the_image_is_the_one_that_kubernetes_starts() -> None:
    last = dict(instructions())
    (container,) = pod()["containers"]
    assert container["image"].endswith(f"/rnnlm:{PROJECT['version']}")
    assert f"--tag {container['image']} " in (ROOT / "launch/Dockerfile").read_text()
    assert container["workingDir"] == last["WORKDIR"]

    user = pod()["securityContext"]
    assert user == {"runAsNonRoot": True, "runAsUser": int(last["USER"]), "fsGroup": int(last["USER"])}
    assert int(last["USER"]) > 0

    assert "ENTRYPOINT" not in last
    command = json.loads(last["CMD"])  # a list: Docker puts no shell before it
    assert command[:2] == container["command"]


def test_the_image_holds_what_its_commands_need() -> None:
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source

    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == {source for source in copied if "/" not in source}
    assert {"launch", "tools", "configs", "rnnlm", PROJECT["readme"], *PROJECT["license-files"]} <= {*copied}

    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert installs and all("--constraint constraints.txt" in rest for rest in installs)
    (python,) = re.findall(r"FROM python:([\d.]+)-slim", (ROOT / "launch/Dockerfile").read_text())
    assert python in pythons()


def pythons() -> list[str]:
    found: list[str] = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    return found


def test_the_workflow_does_what_ci_does_on_every_python_from_the_first_supported_one() -> None:
    (job,) = WORKFLOW["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make check", "make test"]
    assert (ROOT / ".ci/run").read_text().splitlines()[-2:] == commands
    assert pythons() == ["3.11", "3.12", "3.13", "3.14"] and PROJECT["requires-python"] == f">={pythons()[0]}"


def test_before_a_commit_the_same_checks_run() -> None:
    local, shared = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == ["make check"]
    assert {hook["id"] for hook in shared["hooks"]} == {"end-of-file-fixer", "check-added-large-files"}


def test_the_changelog_begins_with_this_version() -> None:
    found = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert found and found[1] == PROJECT["version"]


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = {path for path in re.findall(r"`([\w/]+(?:/|\.py|\.md|\.toml))`", text) if "/" in path}
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "rnnlm" / path).exists(), path

    names = re.findall(r"`(?:[\w.]+\.)?(\w+)(?:\([^`]*\))?`", text)
    sources = "".join(path.read_text() for folder in ("rnnlm", "tests") for path in (ROOT / folder).rglob("*.py"))
    for name in names:
        assert re.search(rf"\b{name}\b", sources) or any(name in path for path in paths), name
