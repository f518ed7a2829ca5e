"""A headless browser, and the hosts of a lab for it to open: `marimo run`, alone and as `primechat lab --app`
starts it, `marimo edit`, JupyterLab.

Every test can ask for the fixtures `browser`, `serve`, `shared` and `lab_page`. A server gets a free port, no
token and a base directory of its own. What `serve` starts ends with the test; `shared` starts each host once
in a process of tests, for labs that write nothing: those of labs/ and the small ones of tests/support/labs/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from primechat.labkit.memory import find_file
from primechat.labkit.twins import LabConfig, build_words, write_twin

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
SMALL_LABS = SUPPORT / "labs"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
expect.set_options(timeout=120_000)  # a busy machine is slow, not wrong
HOSTS = ("run", "edit", "jupyter")
# What hosts themselves say of things that no lab can help; anything else is a fault.
HARMLESS = re.compile(
    r"favicon|ResizeObserver loop|/lsp|jupyterlab-lsp|custom\.css|/api/ai|copilot|third-party cookie"
    r"|Canceled future for create_subshell_request"  # the kernel was restarted meanwhile
    r"|restore the debugger state|WebGL.*(?:fallback|Performance)|GPU stall|autocomplete attribute",
    re.I,
)
FAULTS = ", ".join(
    [".marimo-error"]
    + [
        f".jp-RenderedText[data-mime-type='application/vnd.jupyter.{kind}']"
        for kind in ("stderr", "error")
    ]
)


@dataclass
class LabPage:
    """A page with what went wrong on it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)

    def set_theme(self, theme: str) -> None:
        """Force dark or light in whichever host this is."""
        self.page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        self.page.evaluate(
            """(theme) => {
              const body = document.body, page = document.documentElement;
              if (body.dataset.jpThemeLight !== undefined) {
                body.dataset.jpThemeLight = String(theme === "light");
                const name = theme === "light" ? "JupyterLab Light" : "JupyterLab Dark";
                window.jupyterapp?.commands?.execute("apputils:change-theme", { theme: name });
              }
              for (const node of [body, page]) {
                node.classList.remove("dark", "light");
                node.classList.add(theme);
                if (node.dataset.theme) node.dataset.theme = theme;
              }
              page.style.colorScheme = theme;
            }""",
            theme,
        )
        self.page.wait_for_timeout(300)

    def check(self) -> None:
        """Fail on anything that the console called an error, and on what a cell complains of."""
        if not self.page.is_closed():
            faults = self.page.locator(FAULTS)
            assert faults.count() == 0, faults.all_inner_texts()
        assert not self.errors, "\n".join(self.errors)


@dataclass
class Server:
    """A running host."""

    url: str
    process: subprocess.Popen[str]
    base_dir: Path
    log: Path


def measure_load() -> float:
    """Return how many times slower than alone this machine runs one more process, roughly."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a server and its children: each was started as a group of its own."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=8)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived their parent


def build_command(host: str, path: Path, port: int) -> list[str]:
    """Return the command that serves a lab, or all labs of a folder."""
    if host == "app":
        return build_words(LabConfig(app=True, headless=True, port=port), path)[0]
    if host in ("run", "edit"):
        words = [
            sys.executable,
            "-m",
            "marimo",
            "-y",
            "-q",
            host,
            str(path),
            "--headless",
            "--no-token",
        ]
        # A kernel of the editor would outlive its page.
        words += (
            ["--skip-update-check", "--session-ttl", "5"]
            if host == "edit" and path.is_dir()
            else []
        )
        words += ["--skip-update-check"] if host == "edit" and path.is_file() else []
        return [*words, "--port", str(port)]
    settings = {
        "ServerApp.port": port,
        "IdentityProvider.token": "''",
        "ServerApp.password": "''",
        "ServerApp.disable_check_xsrf": "True",
        "ServerApp.allow_root": "True",
        "ServerApp.port_retries": "0",
        "ServerApp.root_dir": path if path.is_dir() else path.parent,
        "LabApp.news_url": "None",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "MultiKernelManager.default_kernel_name": "python3",
    }
    words = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    return [*words, *(f"--{key}={value}" for key, value in settings.items())]


@contextlib.contextmanager
def start_host(
    host: str, path: Path, scratch: Path, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve a lab (its .py, or for Jupyter its .ipynb), or a folder of them, until the block ends."""
    port, base, log = find_port(), scratch / "nanochat", scratch / f"{host}.log"
    words, url = build_command(host, path, port), f"http://127.0.0.1:{port}"
    places = {
        "JUPYTER_CONFIG_DIR": "jupyter",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    env = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
        **{name: str(scratch / folder) for name, folder in places.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "spaces"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
        **(environment or {}),
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(url, process, log)
            # Reset, so that no tab of another test comes back.
            page = f"/lab/tree/{path.name}?reset" if host == "jupyter" and path.is_file() else ""
            yield Server(url + page, process, base, log)
        finally:
            end_group(process)


def wait_for(url: str, process: subprocess.Popen[str], log: Path, seconds: float = 90) -> None:
    t_start = time.monotonic()
    while time.monotonic() - t_start < seconds:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not come up:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a file of tests."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(host, path)` starts a host for a lab; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(host: str, path: Path, environment: dict[str, str] | None = None) -> Server:
            scratch = tmp_path / f"host-{host}"
            scratch.mkdir(exist_ok=True)
            return stack.enter_context(start_host(host, path, scratch, environment))

        yield start


@pytest.fixture(scope="session")
def hosts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], tuple[Server, Path]]]:
    """Hosts of a copy of labs/ and tests/support/labs/; each starts when it is first asked for."""
    found: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def start(host: str) -> tuple[Server, Path]:
            folder = tmp_path_factory.getbasetemp() / "shared"
            if not folder.exists():
                not_mine = shutil.ignore_patterns("mine")
                shutil.copytree(ROOT / "labs", folder / "labs", ignore=not_mine)
                shutil.copytree(SMALL_LABS, folder / "labs", dirs_exist_ok=True)
                shutil.copy(ROOT / "pyproject.toml", folder)
            if host not in found:
                scratch = tmp_path_factory.mktemp(host)
                found[host] = stack.enter_context(start_host(host, folder / "labs", scratch))
            return found[host], folder / "labs"

        yield start


@pytest.fixture
def shared(hosts: Callable[[str], tuple[Server, Path]]) -> Iterator[Callable[[str, Path], str]]:
    """`shared(host, path)` returns the address of a lab in a host that other tests use too.

    Afterwards the lab's file must be as it was, and the kernels that JupyterLab started end.
    """
    kernels, opened = "", []

    def find(host: str, path: Path) -> str:
        nonlocal kernels
        server, labs = hosts(host)
        # what another test has guessed
        (server.base_dir / find_file().name).unlink(missing_ok=True)
        name = f"notebooks/{path.stem}.ipynb" if host == "jupyter" else path.name
        if host == "jupyter":  # anew: JupyterLab may have saved what another test saw
            twin = (
                write_twin(path)
                if path.parent == SMALL_LABS
                else (ROOT / "labs" / name).read_text()
            )
            (labs / name).write_text(twin, encoding="utf-8")
        opened.append((labs / name, read_source(labs / name)))
        if host != "jupyter":
            return f"{server.url}/?file={name}"
        kernels = f"{server.url}/api/kernels"
        return f"{server.url}/lab/tree/{name}?reset"

    yield find
    if kernels:
        with urllib.request.urlopen(kernels) as answer:
            running = json.load(answer)
        for kernel in running:
            wish = urllib.request.Request(f"{kernels}/{kernel['id']}", method="DELETE")
            urllib.request.urlopen(wish).close()
    for mine, source in opened:
        assert read_source(mine) == source, "opening a lab rewrites it"


def read_source(path: Path) -> list[str]:
    """Return a lab's text, of a notebook its cells: JupyterLab saves what they gave every two minutes."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"]]


@pytest.fixture
def lab_page(browser: Browser) -> Iterator[Callable[..., LabPage]]:
    """`lab_page(url)` opens a page of 1280 x 900 whose errors are collected."""
    with contextlib.ExitStack() as stack:

        def open_page(url: str, theme: str = "light", **settings: Any) -> LabPage:
            size: Any = {"width": 1280, "height": 900}
            context = browser.new_context(viewport=size, color_scheme=theme, **settings)  # type: ignore[arg-type]
            stack.callback(context.close)
            context.set_default_timeout(120_000)  # a busy machine is slow, not wrong
            found = LabPage(context.new_page(), url)

            def hear(text: str, where: str = "") -> None:
                if not HARMLESS.search(f"{text} {where}"):
                    found.errors.append(f"{text} ({where})" if where else text)

            found.page.on("pageerror", lambda error: hear(f"page error: {error}"))
            found.page.on(
                "console",
                # marimo logs an exception of a cell as plain text
                lambda said: (
                    hear(said.text, str(said.location.get("url")))
                    if said.type == "error" or "internal error" in said.text
                    else None
                ),
            )
            found.page.goto(url)
            return found

        yield open_page


def run_all_cells(page: Page, timeout_s: float = 120) -> None:
    """In JupyterLab: restart the kernel, run all cells and wait until it is idle."""
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    idle.wait_for(state="attached", timeout=120_000)
    # The notebook is idle also while there is no kernel yet, and then nothing can be restarted.
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=120_000)
    t_end = time.monotonic() + timeout_s
    while time.monotonic() < t_end:
        press_restart(page)
        quiet = 0
        # A folded cell shows no number: what tells is a kernel that stays idle once there are outputs.
        while time.monotonic() < t_end and quiet < 20:
            page.wait_for_timeout(500)
            busy = any(
                "*" in text
                for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
            )
            quiet = quiet + 1 if idle.count() > 0 and not busy else 0
            if quiet >= 4 and page.locator(".jp-OutputArea-output").count() > 0:
                return
        # On a busy machine JupyterLab restarts the kernel and now and then forgets to run the cells.
    raise AssertionError("cells are still running")


def press_restart(page: Page) -> None:
    """Press "Restart the kernel and run all cells" and confirm it."""
    command = '[data-command="notebook:restart-run-all"]'
    button = f"button{command}, {command} button"
    page.locator(button).first.click()
    accept = page.locator(".jp-Dialog .jp-mod-accept")
    accept.wait_for(timeout=10_000)
    accept.click()
