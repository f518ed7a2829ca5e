"""Every lab that is found: it is clean, its twin is current, and it opens in each host."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTS, end_group, find_port, run_all_cells, wait_for
from waiting import wait_until

from primechat.cli import main as cli
from primechat.errors import ConfigError, DataError
from primechat.labkit import copies, twins
from primechat.labkit.twins import (
    LabConfig,
    build_words,
    find_lab,
    list_labs,
    read_title,
    write_twin,
)

ROOT = Path(__file__).resolve().parents[2]
LABS = list_labs()
each_lab = pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)


def environment(base_dir: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT)}


def test_labs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert LABS and cli.main(["lab", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(LABS) and all(line.endswith("?") for line in lines), (
        "each title is a question"
    )
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


def test_answers_wait_for_their_guess() -> None:
    """What shows the answer to a question opens after it; and the question is one that this lab asks."""
    waiting = {}
    for path in LABS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        guesses = [call for call in calls if ast.unparse(call.func) == "predict"]
        asked = {ast.unparse(call.args[0]) for call in guesses}
        if any(
            ast.unparse(call.func) == "offer_model" for call in calls
        ):  # it can be another one by then
            assert all(isinstance(call.args[2], ast.Lambda) for call in guesses), path.stem
        gates = [
            ast.unparse(word.value)
            for call in calls
            for word in call.keywords
            if word.arg == "after"
        ]
        assert set(gates) <= asked, f"{path.stem}: a gate that no guess opens"
        waiting[path.stem[:2]] = len(gates)
    assert (
        waiting["01"] == 1
        and waiting["03"] == 3
        and min(waiting[n] for n in ("04", "06", "08")) == 1
    )


def test_commands_that_open_a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "labs", tmp_path / "labs", ignore=shutil.ignore_patterns("mine"))
    for module in (copies, twins):
        monkeypatch.setattr(module, "LABS", tmp_path / "labs")
    words, places = build_words(LabConfig(), LABS[0])
    assert "--MarimoProxyConfig.no_sandbox=True" in words
    assert f"--LabApp.default_url=/lab/tree/{LABS[0].stem}.ipynb" in words
    assert places["PATH"].startswith(str(Path(sys.executable).parent))
    app, _ = build_words(LabConfig(app=True, headless=True, port=4321), LABS[0])
    assert app[1:4] == ["-m", "primechat.labkit.app", "run"]
    assert app[4:] == [str(LABS[0]), "--port", "4321", "--headless"]
    editor, _ = build_words(LabConfig(edit=True), LABS[0])
    own = tmp_path / "labs" / "mine" / LABS[0].name
    assert editor[1:6] == ["-m", "marimo", "edit", str(own), "--port"] and int(editor[6]) > 1023


READ_AHEAD = """
import socket, sys, threading
from pathlib import Path
from primechat.labkit import app

server = socket.create_server(("127.0.0.1", 0))
finders, begun, given = list(sys.meta_path), set(), app.importlib.import_module
app.importlib.import_module = lambda name: begun.add(name) or given(name)
for path in sys.argv[1:]:
    app.read_ahead(Path(path), server.getsockname()[1])
lesson = "primechat.exercises.attention_internals"
assert {"ipywidgets", "numpy", "primechat.labkit.lab", lesson} <= set(sys.modules)
assert "torch" not in sys.modules and sys.meta_path == finders
kept = {name for name in sys.modules if name.startswith("primechat") and app.needs_torch(name)}
heavy = {"microscope", "explorer", "talks"}
assert not kept and not heavy & {name.rpartition(".")[2] for name in begun}, kept
from primechat.labkit.instruments.microscope import Microscope
assert "torch" in sys.modules
"""


def test_app_reads_ahead_all_but_torch() -> None:
    """Nor is an import begun that cannot be ended: a cell in another thread would get half a module."""
    words = [sys.executable, "-c", READ_AHEAD, *map(str, LABS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


@each_lab
def test_lab_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_":
            assert (node.end_lineno or 0) - node.lineno < 15, (
                f"{node.name}: code of this length is the library's"
            )
    guard = 'if __name__ == "__main__":\n    app.run()\n'  # what tests/browser/test_pages.py runs of each lab
    assert text.endswith(f"\n\n\n{guard}"), "it runs as a script"
    assert "mo.ui." not in text and "mo.hstack" not in text and "# /// script" not in text, (
        "blank in Jupyter"
    )


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
    assert {path.stem for path in (ROOT / "labs" / "notebooks").glob("[!.]*")} == {
        path.stem for path in LABS
    }


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
    assert "".join(last["source"]) == "1 + 1" and last["metadata"] == {
        "jupyter": {"source_hidden": True}
    }
    code = "".join(first["source"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and sys.executable in done.stdout
    broken = code.replace("import primechat\n", "import primechat_that_is_not_here\n")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 1
        and "pip install -e '.[labs]'" in done.stderr
        and sys.executable in done.stderr
    )
    assert str(tmp_path) not in twin.read_text() and sys.prefix not in twin.read_text()
    (tmp_path / "labs" / "00_one.py").write_text("x = (")
    with pytest.raises(DataError, match="marimo check"):
        write_twin(tmp_path / "labs" / "00_one.py")


# These open in tests of their own, which check the same and more: test_lab_tokenizer, test_lab_attention,
# test_lab_atlas, test_lab_training, test_start, test_chatpage.
ELSEWHERE = {
    "00": ("run",),
    "01": HOSTS,
    "02": HOSTS,
    "03": ("run", "jupyter"),
    "05": ("run",),
    "10": ("jupyter",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "host"),
    [
        (path, host)
        for host in HOSTS
        for path in LABS
        if host not in ELSEWHERE.get(path.stem[:2], ())
    ],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_lab_opens_without_errors(
    path: Path, host: str, shared: Callable[..., Any], lab_page: Callable[..., Any]
) -> None:
    """Every widget is drawn, no error is heard or shown, and the lab's file stays as it is."""
    found = lab_page(shared(host, path))
    if host == "jupyter":
        run_all_cells(found.page, timeout_s=240)
    expected = max(1, path.read_text(encoding="utf-8").count("\n    show("))
    found.page.locator(".pc:not(.pc-notice)").nth(expected - 1).wait_for(
        state="attached", timeout=180_000
    )
    found.page.wait_for_timeout(1500)
    found.check()


@pytest.fixture
def open_lab(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`open_lab("04", "--edit")` runs `primechat lab` in a clone and returns the address of its page."""
    clone = tmp_path / "clone"
    leave = shutil.ignore_patterns("__pycache__", "mine")
    for name in ("primechat", "labs"):
        shutil.copytree(ROOT / name, clone / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / "data").symlink_to(ROOT / "data")
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_WORKSPACES_DIR": "spaces",
        "XDG_CONFIG_HOME": "config",
    }
    env = environment(tmp_path / "base") | {k: str(tmp_path / v) for k, v in places.items()}
    env |= {"JUPYTER_TOKEN": "abc", "PYTHONPATH": str(clone)}
    logs: list[Path] = []
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> str:
            port, log = find_port(), tmp_path / f"log-{len(logs)}"
            command = [sys.executable, "-m", "primechat", "lab", *words]
            command += ["--headless", "--port", str(port)]
            out = stack.enter_context(log.open("w"))
            process = subprocess.Popen(
                command,
                env=env,
                cwd=clone,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.callback(end_group, process)
            logs.append(log)
            if "--edit" not in words:
                wait_for(f"http://127.0.0.1:{port}/api?token=abc", process, log)
                return f"http://127.0.0.1:{port}/?token=abc"
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            wait_until(lambda: "access_token" in log.read_text())
            return re.findall(r"http://\S+", log.read_text())[0]

        yield start
    assert not any("Traceback" in log.read_text() for log in logs)


@pytest.mark.slow
def test_a_learners_copy_in_jupyter(
    tmp_path: Path, open_lab: Callable[..., str], lab_page: Callable[..., Any]
) -> None:
    """JupyterLab opens the copy; what is typed and saved there touches nothing that git tracks, and a guess
    is there when the lab is opened again.
    """
    labs = tmp_path / "clone" / "labs"
    shipped = {path: path.read_bytes() for path in labs.rglob("*") if path.is_file()}
    url, copy = open_lab("04"), labs / "mine" / "04_plan_a_run.ipynb"
    for visit in range(2):
        found = lab_page(url)
        page = found.page
        page.locator(".jp-NotebookPanel h1", has_text="pay for it?").wait_for()
        run_all_cells(page)
        guess = page.locator(".pc-prediction").first
        if not visit:
            guess.get_by_label("3.4 times").check()
            guess.get_by_role("button", name="Show the answer").click()
        guess.locator(".pc-mark", has_text="your guess").wait_for()
        page.keyboard.press("Control+s")
        wait_until(lambda: '"output_type"' in copy.read_text())
        # JupyterLab interrupts its kernels when it ends, and one that is still starting complains.
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        page.close()
    assert {path: path.read_bytes() for path in shipped} == shipped


@pytest.mark.slow
def test_a_learners_copy_in_marimo(
    tmp_path: Path, open_lab: Callable[..., str], lab_page: Callable[..., Any]
) -> None:
    """`--edit` opens the copy with the settings and looks of pyproject.toml: cells run by themselves."""
    found = lab_page(open_lab("04", "--edit"))
    found.page.locator(".pc-prediction").first.wait_for()
    own = tmp_path / "clone" / "labs" / "mine" / "04_plan_a_run.py"
    assert own.is_file() and str(Path("mine", own.name)) in found.page.content()
    found.check()
