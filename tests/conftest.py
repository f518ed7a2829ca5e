"""Every test runs in its own base directory, without a network, on one thread.

The environment is set before torch and huggingface_hub are first imported, because both read it at import.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_CACHES = tempfile.TemporaryDirectory(prefix="primechat-tests-")
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=f"{_CACHES.name}/huggingface",
    XDG_CACHE_HOME=f"{_CACHES.name}/cache",
    COLUMNS="100",
)
# Under nohup, or in the background of a script, these are ignored, and what the tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FORCE_COLOR", "HF_TOKEN"):
    os.environ.pop(_name, None)

from browser import browser, hosts, lab_page, serve, shared  # noqa: E402, F401  # fixtures for every test


class HostScheduling(LoadScopeScheduling):
    """Which tests run on one worker of pytest-xdist: of those in a browser all that open JupyterLab, and all
    others. So hosts start once, and no more than two pages are open at a time.
    """

    GROUPED = re.compile(
        r"\bbrowser/test_\w+\.py::"
        r"(?!test_(twin_is_current|scripts_of_other_tools))"  # slow, and no page is opened
    )

    def _split_scope(self, nodeid: str) -> str:
        return (
            nodeid
            if not self.GROUPED.search(nodeid)
            else "jupyter"
            if "jupyter" in nodeid
            else "marimo"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Take the tests in groups."""
    return HostScheduling(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a test that opens a browser outside tests/browser, where the scheduler would not group it."""
    if "browser" in getattr(item, "fixturenames", ()):
        assert HostScheduling.GROUPED.search(item.nodeid), (
            f"{item.nodeid} opens a browser; move it into tests/browser"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long; what is short fills the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class NetworkUsed(RuntimeError):
    """A test left this machine; no OSError, so that the code under test cannot take it for a bad line."""


def is_local(host: Any) -> bool:
    """Tell whether a host name or address is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1", "0.0.0.0") or str(name).startswith("127.")


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a base directory of its own; it does not exist yet."""
    path = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def nothing_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave other people's models out of the list; tests/model/test_foreign.py lists them."""
    monkeypatch.setattr("primechat.checkpoint.registry.walk_foreign", lambda: iter(()))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections and name look-ups beyond the loopback."""
    look_up = socket.getaddrinfo

    def refuse_remote(address: Any) -> None:
        if isinstance(address, tuple) and not is_local(address[0]):
            raise NetworkUsed(f"this test connects to {address[0]}; tests use no network")

    class LocalSocket(socket.socket):
        def connect(self, address: Any, /) -> None:
            refuse_remote(address)
            super().connect(address)

        def connect_ex(self, address: Any, /) -> int:
            refuse_remote(address)
            return super().connect_ex(address)

    def look_up_locally(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_remote((host,))
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", LocalSocket)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_locally)
    yield
