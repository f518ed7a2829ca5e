"""Every lab that is found: it is clean, runs as a script and as its twin, and opens in each host."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTS, end_group, find_port, run_all_cells, wait_for

from primechat import cli
from primechat.desk.labs import twins
from primechat.desk.labs.twins import LabConfig, build_words, find_lab, list_labs, read_title, write_twin
from primechat.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
LABS = list_labs()
each_lab = pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)


def environment(base_dir: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT)}


def test_labs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert LABS and cli.main(["lab", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(LABS) and all(line.endswith("?") for line in lines), "each title is a question"
    assert all(read_title(path) in path.read_text(encoding="utf-8") for path in LABS)
    assert (
        find_lab("1")
        == find_lab("01")
        == find_lab("01_tokenizer_playground")
        == LABS[[p.stem[:2] for p in LABS].index("01")]
    )
    with pytest.raises(ConfigError, match="lab='99' must be one of"):
        find_lab("99")
    with pytest.raises(ConfigError, match="--app and --edit open one lab"):
        build_words(LabConfig(app=True), None)


def test_commands_that_open_a_lab() -> None:
    words, places = build_words(LabConfig(), LABS[0])
    assert "--MarimoProxyConfig.no_sandbox=True" in words
    assert f"--LabApp.default_url=/lab/tree/notebooks/{LABS[0].stem}.ipynb" in words
    assert places["PATH"].startswith(str(Path(sys.executable).parent))
    app, _ = build_words(LabConfig(app=True, headless=True, port=4321), LABS[0])
    assert app[1:] == ["-m", "marimo", "run", str(LABS[0]), "--headless", "--port", "4321"]


@each_lab
def test_lab_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_":
            assert (node.end_lineno or 0) - node.lineno < 15, (
                f"{node.name}: code of this length is the library's"
            )
    assert "mo.ui." not in text and "mo.hstack" not in text and "# /// script" not in text, "blank in Jupyter"


def test_marimo_finds_nothing() -> None:
    words = [sys.executable, "-m", "marimo", "check", "--strict", *map(str, LABS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@each_lab
def test_twin_is_current(path: Path, tmp_path: Path) -> None:
    twin = ROOT / "labs" / "notebooks" / f"{path.stem}.ipynb"
    text = write_twin(path)
    assert twin.is_file() and twin.read_text(encoding="utf-8") == text, "run `primechat lab sync`"
    import nbformat

    found = nbformat.reads(text, as_version=4)
    nbformat.validate(found)
    assert found.metadata.kernelspec.name == "python3" and "sys.executable" in found.cells[0].source
    assert found.cells[1].cell_type == "markdown" and found.cells[1].source.startswith("# ")
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_no_twin_without_a_lab() -> None:
    assert {path.stem for path in (ROOT / "labs" / "notebooks").glob("[!.]*")} == {path.stem for path in LABS}


LITTLE = """
import marimo

app = marimo.App()


@app.cell(hide_code=True)
def _(mo):
    mo.md("# Is it one?")
    return


@app.cell
def _():
    import marimo as mo
    return (mo,)


@app.cell(hide_code=True)
def _():
    1 + 1
    return


if __name__ == "__main__":
    app.run()
"""


def test_sync_writes_checks_and_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(twins, "ROOT", tmp_path)
    monkeypatch.setattr(twins, "LABS", tmp_path / "labs")
    (tmp_path / "labs" / "notebooks").mkdir(parents=True)
    (tmp_path / "labs" / "00_one.py").write_text(LITTLE)
    (tmp_path / "labs" / "notebooks" / "09_gone.ipynb").write_text("{}")
    assert cli.main(["lab", "sync", "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert cli.main(["lab", "sync"]) == 0 and cli.main(["lab", "sync", "--check"]) == 0
    (twin,) = (tmp_path / "labs" / "notebooks").iterdir()
    first, title, last = json.loads(twin.read_text())["cells"]
    assert title["cell_type"] == "markdown" and "".join(title["source"]).startswith(
        "# Is it one?\n\n*In JupyterLab: press ⏩"
    )
    assert "".join(last["source"]) == "1 + 1" and last["metadata"] == {"jupyter": {"source_hidden": True}}
    code = "".join(first["source"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and sys.executable in done.stdout
    broken = code.replace("import primechat\n", "import primechat_that_is_not_here\n")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 1 and "pip install -e '.[labs]'" in done.stderr and sys.executable in done.stderr
    )
    assert str(tmp_path) not in twin.read_text() and sys.prefix not in twin.read_text()
    (tmp_path / "labs" / "00_one.py").write_text("x = (")
    with pytest.raises(DataError, match="marimo check"):
        write_twin(tmp_path / "labs" / "00_one.py")


def run_script(path: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    base_dir = Path(os.environ["NANOCHAT_BASE_DIR"])
    return subprocess.run(
        [sys.executable, path, *words], env={**environment(base_dir), **extra}, capture_output=True,
        text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
@each_lab
def test_lab_runs_as_a_script(path: Path) -> None:
    """Every cell runs; stages, which take minutes, wait."""
    done = run_script(path, PRIMECHAT_STILL="1")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@each_lab
def test_twin_runs(path: Path, base_dir: Path, tmp_path: Path) -> None:
    import nbformat

    words = [
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output-dir",
        str(tmp_path),
    ]
    twin = ROOT / "labs" / "notebooks" / f"{path.stem}.ipynb"
    env = {
        **environment(base_dir),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path),
    }
    done = subprocess.run([*words, str(twin)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = nbformat.read(tmp_path / twin.name, as_version=4)
    outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@each_lab
def test_lab_opens_without_errors(
    path: Path, host: str, serve: Callable[..., Any], lab_page: Callable[..., Any], tmp_path: Path
) -> None:
    """Every widget is drawn, no console error is heard, and opening a lab changes no file of it."""
    folder = tmp_path / "labs"
    shutil.copytree(ROOT / "labs", folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    opened = folder / (f"notebooks/{path.stem}.ipynb" if host == "jupyter" else path.name)
    before = opened.read_bytes()
    found = lab_page(serve(host, opened).url)
    if host == "jupyter":
        run_all_cells(found.page, timeout_s=240)
    found.page.wait_for_selector(".pc:not(.pc-notice)", timeout=120_000)
    expected = path.read_text(encoding="utf-8").count("\n    show(")
    t_end = time.monotonic() + 60
    while found.page.locator(".pc").count() < max(1, expected) and time.monotonic() < t_end:
        found.page.wait_for_timeout(500)
    assert found.page.locator(".pc").count() >= max(1, expected)
    found.page.wait_for_timeout(1500)
    faults = found.page.locator(
        ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .marimo-error"
    )
    assert faults.count() == 0, faults.all_inner_texts()
    found.check()
    assert opened.read_bytes() == before, "opening a lab rewrites it"


@pytest.mark.slow
def test_command_opens_a_lab_in_jupyterlab(tmp_path: Path, lab_page: Callable[..., Any]) -> None:
    """JupyterLab comes up at the lab's twin, with marimo's extension out of its sandbox."""
    port, log = find_port(), tmp_path / "log"
    words = [sys.executable, "-m", "primechat.cli", "lab", "01", "--headless", "--port", str(port)]
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    places = {name: str(tmp_path / folder) for name, folder in folders.items()}
    extra = {"JUPYTER_TOKEN": "abc", "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "spaces")}
    with log.open("w") as out:
        process = subprocess.Popen(
            words, env={**environment(tmp_path / "base"), **places, **extra}, stdout=out,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token=abc", process, log)
            found = lab_page(f"http://127.0.0.1:{port}/?token=abc")
            found.page.locator(".jp-NotebookPanel h1", has_text="tokens?").wait_for(timeout=90_000)
        finally:
            end_group(process)
    assert "Traceback" not in log.read_text()
