"""The commit rule, resuming, pruning, snapshots, the lock and the log."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from primechat.checkpoint import checkpoint, run_dir
from primechat.checkpoint.checkpoint import (
    RunDirLock,
    explain_steps,
    find_steps,
    list_snapshots,
    load_checkpoint,
    measure_snapshots,
    prune_checkpoints,
    save_checkpoint,
    save_snapshot,
)
from primechat.checkpoint.run_dir import MetricsFile, read_metrics
from primechat.config import GPTConfig
from primechat.config.model import list_shapes
from primechat.errors import CheckpointError

NANOCHAT = Path(__file__).parents[1] / "fixtures" / "nanochat"
CONFIG = GPTConfig.modern(2, vocab_size=100, sequence_len=32, head_dim=64)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def make_state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator).to(dtype)
        for key, shape in list_shapes(CONFIG).items()
    }


def make_optim(seed: int) -> dict[str, Any]:
    buffers = {
        "step": seed,
        "exp_avg": torch.full((3, 2), float(seed)),
        "lr": 0.1,
        "pair": (1, None, True),
    }
    return {
        "state": {0: buffers},
        "groups": [{"params": [0]}],
        "rng": torch.Generator().manual_seed(seed).get_state(),
    }


def save(folder: Path, step: int, seed: int | None = None, optim: bool = True, **meta: Any) -> None:
    seed = step if seed is None else seed
    state, optim_state = make_state(seed), make_optim(seed) if optim else None
    save_checkpoint(
        folder,
        step,
        model_state=state,
        config=CONFIG,
        optim_state=optim_state,
        meta={"seed": seed, **meta},
    )


def check_whole(folder: Path, allowed: dict[int, tuple[int, ...]]) -> int:
    """Assert that the newest step loads and holds what one of its writers wrote; return it."""
    loaded = load_checkpoint(folder, want_optim=True)
    assert loaded.optim_state is not None
    seed = loaded.optim_state["state"][0]["step"]
    assert seed in allowed[loaded.step]
    for reading in (loaded, load_checkpoint(folder)):  # the second compares no hashes
        state = make_state(reading.meta["seed"])
        assert all(torch.equal(reading.model_state[key], tensor) for key, tensor in state.items())
    assert loaded.meta["seed"] == seed
    return loaded.step


def kill_everywhere(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int], Callable[[], None]]
) -> int:
    """Run act(k)() once for each file operation k, dying right before it; return how many there were."""
    for k in range(1000):
        run, count = act(k), 0

        def dying(real: Callable[..., Any], k: int = k) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > k:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (torch, "save")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                run()
            except Killed:
                continue
        return k
    raise AssertionError("it never ends")


def test_round_trip(tmp_path: Path) -> None:
    state = make_state(1) | {"transformer.wte.weight": torch.randn(128, 128).to(torch.bfloat16)}
    optim = make_optim(1)
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
    more = {"val_bpb": 1.5, "cursor": {"at": [1, 2]}, "step": 99, "tokenizer_identity": "ab"}
    save_checkpoint(
        tmp_path / "d2", 7, model_state=compiled, config=CONFIG, optim_state=optim, meta=more
    )
    loaded = load_checkpoint(tmp_path / "d2", want_optim=True, verify=True)
    assert (loaded.step, loaded.config, loaded.skipped) == (7, CONFIG, [])
    assert loaded.model_state.keys() == state.keys()
    for key, tensor in state.items():
        assert (
            torch.equal(loaded.model_state[key], tensor)
            and loaded.model_state[key].dtype == tensor.dtype
        )
    found = loaded.optim_state
    assert found is not None and torch.equal(found["rng"], optim["rng"])
    assert found["state"][0]["pair"] == (1, None, True) and found["groups"] == optim["groups"]
    meta = loaded.meta
    assert (meta["step"], meta["val_bpb"], meta["cursor"], meta["architecture"]) == (
        7,
        1.5,
        {"at": [1, 2]},
        "modern",
    )
    assert meta["torch"] == torch.__version__ and meta["schema"] == 1
    names = {"model_000007.pt", "meta_000007.json", "optim_000007_rank0.pt"}
    assert {path.name for path in (tmp_path / "d2").iterdir()} == names
    assert all(
        meta["files"][name]["bytes"] == (tmp_path / "d2" / name).stat().st_size
        for name in meta["files"]
    )


def test_nanochat_reads_ours(tmp_path: Path) -> None:
    save(
        tmp_path, 3
    )  # what its loader does: torch.load without mmap, GPTConfig(**model_config), strict names
    state = torch.load(tmp_path / "model_000003.pt", map_location="cpu", weights_only=True)
    meta = json.loads((tmp_path / "meta_000003.json").read_text())
    theirs = json.loads((NANOCHAT / "head/base_checkpoints/d2/meta_000010.json").read_text())
    assert meta["model_config"].keys() == theirs["model_config"].keys()
    assert {key: tuple(t.shape) for key, t in state.items()} == list_shapes(CONFIG)


def test_views_are_saved_alone(tmp_path: Path) -> None:
    big = torch.arange(100_000, dtype=torch.float32)
    optim = {
        "a": big[10:20],
        "b": big[10:20],
        "c": big[:12].view(3, 4).t(),
        "d": torch.zeros(1).expand(5),
        "e": torch.zeros(0),
    }
    state = make_state(0)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    save_checkpoint(tmp_path, 1, model_state=state, config=CONFIG, optim_state=optim, meta={})
    found = load_checkpoint(tmp_path, want_optim=True).optim_state
    assert found is not None and all(
        torch.equal(found[key], tensor) for key, tensor in optim.items()
    )
    assert (tmp_path / "optim_000001_rank0.pt").stat().st_size < 10_000


def test_only_plain_states(tmp_path: Path) -> None:
    for bad in ({"a": {1, 2}}, {"a": b"x"}, {(1, 2): 3}, {"a": Path("x")}):
        with pytest.raises(TypeError):
            save_checkpoint(
                tmp_path, 1, model_state=make_state(0), config=CONFIG, optim_state=bad, meta={}
            )
    with pytest.raises(ValueError, match="other tensors"):
        save_checkpoint(tmp_path, 1, model_state={}, config=CONFIG, optim_state=None, meta={})
    assert find_steps(tmp_path) == []
    assert not (tmp_path / "r1").exists()


def test_kill_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def act(k: int) -> Callable[[], None]:
        folder = tmp_path / str(k)
        save(folder, 1)
        return lambda: save(folder, 2)

    n = kill_everywhere(monkeypatch, act)
    assert n >= 10  # two parts, three syncs, three renames, two syncs of the folder
    for k in range(n + 1):
        folder = tmp_path / str(k)
        seen.add(check_whole(folder, {1: (1,), 2: (2,)}))
        save(folder, 3)  # the next writer clears away what is left
        assert not list(folder.glob("*.tmp"))
        assert explain_steps(folder) == []
        assert check_whole(folder, {3: (3,)}) == 3
    assert seen == {1, 2}


@pytest.mark.parametrize("n_writes", [0, 1, 30])
def test_kill_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_writes: int) -> None:
    save(tmp_path, 1)
    write, count = checkpoint.HashingFile.write, 0

    def tear(self: Any, data: Any) -> int:
        nonlocal count
        count += 1
        if count > n_writes:
            raise Killed
        return write(self, data)

    with (
        monkeypatch.context() as patch,
        pytest.raises((Killed, CheckpointError)) as end,
    ):  # torch may raise its own, as on a full disk, and what was written is taken back
        patch.setattr(checkpoint.HashingFile, "write", tear)
        save(tmp_path, 2)
    assert bool([*tmp_path.glob("*.tmp")]) == isinstance(end.value, Killed)
    assert check_whole(tmp_path, {1: (1,)}) == 1
    save(tmp_path, 2)
    assert not list(tmp_path.glob("*.tmp")) and check_whole(tmp_path, {2: (2,)}) == 2


@pytest.mark.parametrize("seed", [2, 5])
def test_kill_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def act(k: int) -> Callable[[], None]:
        folder = tmp_path / str(k)
        save(folder, 1)
        save(folder, 2)
        return lambda: save(folder, 2, seed=seed)

    n = kill_everywhere(monkeypatch, act)
    steps = [check_whole(tmp_path / str(k), {1: (1,), 2: (2, seed)}) for k in range(n + 1)]
    assert seed != 2 or set(steps) == {2}, "the same bytes again never put the step at risk"
    assert check_whole(tmp_path / str(n), {2: (seed,)}) == 2


def test_kill_while_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(k: int) -> Callable[[], None]:
        folder = tmp_path / str(k)
        for step in (1, 2, 3):
            save(folder, step)
        return lambda: prune_checkpoints(folder, 1)

    n = kill_everywhere(monkeypatch, act)
    assert n > 4
    for k in range(n + 1):
        folder = tmp_path / str(k)
        assert check_whole(folder, {3: (3,)}) == 3
        for step in find_steps(folder):
            load_checkpoint(folder, step, want_optim=True)
        prune_checkpoints(folder, 1)
        assert len(list(folder.iterdir())) == 3


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, 2)
    assert find_steps(tmp_path) == [3, 4]
    prune_checkpoints(tmp_path, 0)
    assert find_steps(tmp_path) == [4], "one is always kept"


def test_others_steps_stay(tmp_path: Path) -> None:
    theirs = NANOCHAT / "head_d3/base_checkpoints/d3"
    for path in theirs.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert find_steps(tmp_path) == [10]
    with pytest.raises(CheckpointError, match="not written by primechat.*another tag"):
        save(tmp_path, 10)
    save(tmp_path, 11)
    save(tmp_path, 12)
    prune_checkpoints(tmp_path, 1)
    assert find_steps(tmp_path) == [10, 12]
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert load_checkpoint(tmp_path, 10).config.architecture == "modern"
    with pytest.raises(CheckpointError, match="one rank's share"):
        load_checkpoint(tmp_path, 10, want_optim=True)


def test_newest_corrupt_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    os.truncate(tmp_path / "model_000005.pt", 1000)
    (tmp_path / "meta_000004.json").unlink()
    (tmp_path / "optim_000003_rank0.pt").unlink()
    data = bytearray((tmp_path / "model_000002.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model_000002.pt").write_bytes(data)
    assert find_steps(tmp_path) == [1, 2]
    reasons = dict(explain_steps(tmp_path))
    assert sorted(reasons) == [3, 4, 5]
    assert (
        "1,000 bytes" in reasons[5]
        and "meta_000004.json is missing" in reasons[4]
        and "optim" in reasons[3]
    )
    loaded = load_checkpoint(tmp_path, want_optim=True)
    assert loaded.step == 1 and len(loaded.skipped) == 4 and "SHA-256" in loaded.skipped[3]
    assert "step 5" in caplog.text and "step 2" in caplog.text
    assert load_checkpoint(tmp_path).step == 2, "hashes are compared on resuming and on request"
    for step, match in (
        (5, "1,000 bytes"),
        (4, "missing"),
        (3, "missing"),
        (9, "no step 9, there are 1 to 5"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(tmp_path, step)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(tmp_path, 2, verify=True)
    save(tmp_path, 6, optim=False)
    assert "without its optimizer" in load_checkpoint(tmp_path, want_optim=True).skipped[0]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nothing")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Step 2 could not be written.*No space left.*whole"):
        save(tmp_path, 2)
    assert load_checkpoint(tmp_path).step == 1


def test_snapshots(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for step in (1, 2, 64):
        save_snapshot(tmp_path, step, make_state(step), CONFIG, {"val_bpb": 2.0})
    assert find_steps(tmp_path) == [4] and list_snapshots(tmp_path) == [1, 2, 64]
    assert load_checkpoint(tmp_path).step == 4
    loaded = load_checkpoint(tmp_path / "snapshots", 64)
    assert loaded.config == CONFIG and loaded.meta["snapshot"] is True
    for key, tensor in make_state(64).items():
        assert torch.equal(
            loaded.model_state[key], tensor.bfloat16() if tensor.ndim > 1 else tensor
        )
    with pytest.raises(CheckpointError, match="without its optimizer"):
        load_checkpoint(tmp_path / "snapshots", 64, want_optim=True)
    files = list((tmp_path / "snapshots").iterdir())
    assert (
        measure_snapshots(tmp_path)
        == sum(path.stat().st_size for path in files)
        > 3 * 2 * CONFIG.n_params
    )
    assert measure_snapshots(tmp_path / "none") == 0


def test_one_writer(tmp_path: Path) -> None:
    with RunDirLock(tmp_path / "run"):
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=f"this very process .*process {os.getpid()} on .* since "
            ):
                RunDirLock(tmp_path / "run").__enter__()
        refused = []

        def take() -> None:
            try:
                with RunDirLock(tmp_path / "run"):
                    pass
            except CheckpointError as e:
                refused.append(e)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        assert len(refused) == 1
        with RunDirLock(tmp_path / "other"):
            pass
    with RunDirLock(tmp_path / "run"):
        pass


def test_killed_owner_frees_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from primechat.checkpoint.run_dir import RunDirLock\n"
        "lock = RunDirLock(sys.argv[1]).__enter__()\n"
        "print('held', flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"written by process {child.pid} on"):
            RunDirLock(tmp_path).__enter__()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with RunDirLock(tmp_path) as lock:
        assert lock.read_owner()["pid"] == os.getpid()


def test_disk_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_dir.fcntl, "flock", refuse)
    with RunDirLock(tmp_path), pytest.raises(CheckpointError, match="this very process"):
        RunDirLock(tmp_path).__enter__()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    (tmp_path / "run.lock").write_text(json.dumps({"pid": dead.pid, "host": host, "since": "noon"}))
    with RunDirLock(tmp_path):
        pass
    (tmp_path / "run.lock").write_text(
        json.dumps({"pid": dead.pid, "host": host + "-2", "since": "noon"})
    )
    with pytest.raises(CheckpointError, match="since noon"):
        RunDirLock(tmp_path).__enter__()


def test_log_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    assert read_metrics(path) == []
    log = MetricsFile(tmp_path / "run")
    log.drop_after(3)
    log.append({"kind": "note", "text": "né\n"})
    for step in range(1, 7):
        log.append({"kind": "step", "step": step, "loss_nats": 1 / step})
    log.append({"kind": "done", "step": 6})
    events = read_metrics(path)
    assert len(events) == 8 and events[0] == {"kind": "note", "text": "né\n"}
    assert all(json.loads(line)["schema"] == 1 for line in path.read_text().splitlines())
    with path.open("a") as f:
        f.write('{"kind": "step", "st')
    assert read_metrics(path) == events
    MetricsFile(tmp_path / "run").append({"kind": "note", "text": "on"})
    assert [e["kind"] for e in read_metrics(path)] == ["note"] + ["step"] * 6 + ["note"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            MetricsFile(tmp_path / "run").drop_after(4)
    assert len(read_metrics(path)) == 8
    MetricsFile(tmp_path / "run").drop_after(4)
    assert [e.get("step") for e in read_metrics(path)] == [None, 1, 2, 3, 4], (
        "the note behind step 6 went too"
    )
    path.write_text('{"schema": 2, "kind": "step"}\n')
    with pytest.raises(CheckpointError, match="newer primechat"):
        read_metrics(path)


def test_a_full_disk_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(CheckpointError, match="No space left on device; free some space"):
            RunDirLock(tmp_path).__enter__()
    with RunDirLock(tmp_path):  # once there is space again, this very process may go on
        pass
