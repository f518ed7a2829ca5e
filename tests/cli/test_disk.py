"""`primechat models`: what takes space, and removing models without touching anything else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from stored_models import CONFIG, make_run, make_state

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import save_snapshot
from primechat.checkpoint.run_dir import RunDirLock
from primechat.cli import main as cli
from primechat.errors import ConfigError


@pytest.fixture
def models(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory with a base model, a chat model, two by-products, an adapter and caches."""
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "data" / "nanochat")
    make_run(registry.SHIPPED, "chatsft_checkpoints/d4")
    mine = make_run(base_dir, "base_checkpoints/mine", (1, 5))
    save_snapshot(mine, 2, make_state(), CONFIG, {})
    (mine / "optim_000005_rank0.pt").write_bytes(b"x" * 3_000_000)
    make_run(base_dir, "chatsft_checkpoints/mine")
    make_run(base_dir, "chatsft_checkpoints/lab07-full-0-6cc07e")
    make_run(base_dir, "chatsft_checkpoints/lab07-full-1-6cc07e")
    adapter = base_dir / "lora_checkpoints" / "pirate"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 500_000)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "sft/mine", "r": 8}')
    for name, size in (("token_cache/a", 2_000_000), ("tokenizer/tokenizer.pkl", 1_000)):
        path = base_dir / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
    return base_dir


def list_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def run(*words: str) -> int:
    return cli.main(["models", *words])


def test_table_leaves_by_products_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert "lab07-full" not in out and "2 by-products of labs are not shown" in out
    assert run("--all") == 0
    out = capsys.readouterr().out
    assert "lab07-full-0-6cc07e" in out and "not shown" not in out
    assert run("--json") == 0
    marks = [entry["by_product"] for entry in json.loads(capsys.readouterr().out)]
    assert sum(marks) == 2 and len(marks) == 6


def test_disk_counts_every_byte_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--disk") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert rows["base/mine"].split()[2] == "3.0", "MB of optimizer state"
    assert {"sft/mine", "lora:pirate", "sft/lab07-full-0-6cc07e"} <= set(rows)
    assert "by-product" in rows["sft/lab07-full-0-6cc07e"]
    whole = sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
    assert rows["total"].split()[-1] == f"{whole / 1e6:,.1f}"
    assert "token caches" in out and "2.0" in rows["token"]


def test_removal_asks_and_takes_only_what_is_named(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list_files(models)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run("rm", "base/mine") == 0
    out = capsys.readouterr().out
    assert (
        "base/mine" in out and "4.1 MB" in out and "[y/N]" in out and "Nothing was removed" in out
    )
    assert list_files(models) == before
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run("rm", "base/mine") == 0
    gone = before - list_files(models)
    assert gone and all(name.startswith("base_checkpoints/mine/") for name in gone)
    assert not (models / "base_checkpoints" / "mine").exists()
    assert "freed" in capsys.readouterr().out


def test_by_products_go_together_or_by_a_pattern(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rm", "--by-products", "--yes") == 0
    left = list_files(models)
    assert not any("lab07" in name for name in left)
    assert {name.split("/")[1] for name in left if "checkpoints" in name} == {"mine", "pirate"}
    assert run("rm", "--by-products", "--yes") == 0
    assert "no by-products" in capsys.readouterr().out.lower()
    for seed in range(2):
        make_run(models, f"chatsft_checkpoints/lab06-faq-{seed}-6cc07e")
    assert run("rm", "sft/lab06-*", "--yes") == 0
    assert list_files(models) == left


def test_what_is_no_run_of_ones_own_is_refused(models: Path) -> None:
    before = list_files(models)
    for name, match in (
        ("shipped/sft", "ships with primechat"),
        ("hf:acme/tiny", "another project's"),
        ("base/nothing", "none of this name.*base/mine"),
        ("sft/x*", "none of this name"),
        ("base", "names no single run"),
        ("base/mine@5", "whole runs"),
        ("../tokenizer", "must be like"),
        ("base/..", "must be like"),
        ("token_cache/a", "must be like"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_raising("rm", name, "--yes")
    with pytest.raises(ConfigError, match="name a model"):
        run_raising("rm", "--yes")
    with pytest.raises(ConfigError, match="action='remove' must be rm"):
        run_raising("remove", "base/mine")
    assert list_files(models) == before


def run_raising(*words: str) -> int:
    return cli.run_verb(["models", *words])


def test_a_run_that_is_being_written_stays(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models / "base_checkpoints" / "mine"
    with RunDirLock(folder):
        assert run("rm", "base/mine", "sft/mine", "--yes") == 1
        assert (folder / "model_000005.pt").is_file()
    said = capsys.readouterr()
    assert "being written" in said.err + said.out
    assert not (models / "chatsft_checkpoints" / "mine").exists(), "the other one went"


def test_a_link_is_not_followed(models: Path, tmp_path: Path) -> None:
    elsewhere = make_run(tmp_path, "big/d20")
    (models / "base_checkpoints" / "d20").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link to"):
        run_raising("rm", "base/d20", "--yes")
    assert (elsewhere / "model_000001.pt").is_file()


def test_what_needs_a_model_is_said(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rm", "sft/mine", "--yes") == 0
    assert "lora:pirate was trained on sft/mine" in capsys.readouterr().out


def test_a_closed_input_removes_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list_files(models)
    for stdin in (None, io.StringIO("")):
        monkeypatch.setattr("sys.stdin", stdin)
        assert run("rm", "base/mine") == 0
        assert "--yes" in capsys.readouterr().out
    assert list_files(models) == before


def test_a_run_without_a_checkpoint_can_go_too(models: Path) -> None:
    torn = models / "base_checkpoints" / "torn"
    torn.mkdir()
    (torn / "model_000001.pt.tmp").write_bytes(b"x" * 1000)
    assert run("rm", "base/torn", "--yes") == 0 and not torn.exists()
