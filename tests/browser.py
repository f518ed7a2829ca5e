"""A headless browser, and the hosts of a lab for it to open: `marimo run`, `marimo edit`, JupyterLab.

Every test can ask for the fixtures `browser`, `serve` and `lab_page`. Each server gets a free port, no token
and a base directory of its own, and it and its children end with the test.
"""

from __future__ import annotations

import contextlib
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
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
HOSTS = ("run", "edit", "jupyter")
# What hosts themselves say of things that no lab can help; anything else is a fault.
HARMLESS = re.compile(
    r"favicon|ResizeObserver loop|/lsp|jupyterlab-lsp|custom\.css|/api/ai|copilot|third-party cookie"
    r"|restore the debugger state|WebGL.*(?:fallback|Performance)|GPU stall|autocomplete attribute",
    re.I,
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
        """Fail on anything that the console called an error."""
        assert not self.errors, "\n".join(self.errors)


@dataclass
class Server:
    """A running host."""

    url: str
    process: subprocess.Popen[str]
    base_dir: Path
    log: Path


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


def build_command(host: str, path: Path, port: int) -> tuple[list[str], str]:
    """Return the command that serves a lab, and the address of its page."""
    url = f"http://127.0.0.1:{port}"
    if host in ("run", "edit"):
        words = [sys.executable, "-m", "marimo", "-y", "-q", host, str(path), "--headless", "--no-token"]
        return [*words, "--port", str(port), *(["--skip-update-check"] if host == "edit" else [])], url
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    settings = {
        "IdentityProvider.token": "''", "ServerApp.password": "''", "ServerApp.disable_check_xsrf": "True",
        "ServerApp.root_dir": str(path.parent), "ServerApp.allow_root": "True", "ServerApp.port_retries": "0",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate", "LabApp.news_url": "None",
        "MultiKernelManager.default_kernel_name": "python3",
    }  # fmt: skip
    # Reset, so that no tab of another test comes back.
    return [
        *words,
        *(f"--{key}={value}" for key, value in settings.items()),
    ], f"{url}/lab/tree/{path.name}?reset"


@contextlib.contextmanager
def start_host(
    host: str, path: Path, scratch: Path, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve a lab (its .py, or for Jupyter its .ipynb) until the block ends."""
    port, base, log = find_port(), scratch / "nanochat", scratch / f"{host}.log"
    words, url = build_command(host, path, port)
    places = {"JUPYTER_CONFIG_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    env = {
        **os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(ROOT),
        **{name: str(scratch / folder) for name, folder in places.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "spaces"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
        **(environment or {}),
    }  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            wait_for(url.partition("?")[0], process, log)
            yield Server(url, process, base, log)
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
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


@pytest.fixture
def lab_page(browser: Browser) -> Iterator[Callable[..., LabPage]]:
    """`lab_page(url)` opens a page of 1280 x 900 whose errors are collected."""
    with contextlib.ExitStack() as stack:

        def open_page(url: str, theme: str = "light", **settings: Any) -> LabPage:
            size: Any = {"width": 1280, "height": 900}
            context = browser.new_context(viewport=size, color_scheme=theme, **settings)  # type: ignore[arg-type]
            stack.callback(context.close)
            context.set_default_timeout(90_000)  # a busy machine is slow, not wrong
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
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    idle.wait_for(state="attached", timeout=60_000)
    # The notebook is idle also while there is no kernel yet, and then nothing can be restarted.
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)
    t_end = time.monotonic() + timeout_s
    while time.monotonic() < t_end:
        press_restart(page)
        quiet = 0
        # A folded cell shows no number: what tells is a kernel that stays idle once there are outputs.
        while time.monotonic() < t_end and quiet < 20:
            page.wait_for_timeout(500)
            busy = any("*" in text for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts())
            quiet = quiet + 1 if idle.count() > 0 and not busy else 0
            if quiet >= 4 and page.locator(".jp-OutputArea-output").count() > 0:
                return
        # On a busy machine JupyterLab restarts the kernel and now and then forgets to run the cells.
    raise AssertionError("cells are still running")


def press_restart(page: Page) -> None:
    """Press "Restart the kernel and run all cells" and confirm it."""
    button = (
        'button[data-command="notebook:restart-run-all"], [data-command="notebook:restart-run-all"] button'
    )
    page.locator(button).first.click()
    accept = page.locator(".jp-Dialog .jp-mod-accept")
    accept.wait_for(timeout=10_000)
    accept.click()
