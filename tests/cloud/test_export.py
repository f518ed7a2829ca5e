"""A lab becomes a folder that runs: what it holds, that it computes the same, that it is rehearsed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

import primechat
from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import read_metrics
from primechat.cli import main as cli
from primechat.cli.cloud import PullFlags, plan_pull, rehearse
from primechat.cloud.export import (
    IMAGE,
    POD_BASE,
    STAGE_OF,
    TEMPLATES,
    export_lab,
    find_lab,
    full_stage,
    name_job,
    read_cells,
    shrink_config,
    write_script,
)
from primechat.cloud.plan import find_machine, full_config, make_plan
from primechat.config import PretrainConfig, decode_config, encode_config
from primechat.config.names import FAMILIES
from primechat.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import marimo\n\napp = marimo.App()\n\n\n"


def write_lab(folder: Path, *cells: str) -> Path:
    path = folder / "05_small.py"
    path.write_text(
        HEAD + "\n\n\n".join(cells) + '\n\n\nif __name__ == "__main__":\n    app.run()\n'
    )
    return path


PROSE = (
    "@app.cell(hide_code=True)\ndef _(mo):\n"
    '    mo.md(r"""\n    # Why?\n\n    Because.\n    """)\n    return'
)
HIDDEN = "@app.cell(hide_code=True)\ndef _():\n    import marimo as mo\n    return (mo,)"
PROGRAM = (
    "@app.cell\ndef _():\n    import math\n    from primechat.labkit.lab import settings, show\n"
    "    return math, settings, show",
    "@app.cell\ndef _(math, show):\n    # a comment\n    x = [\n        math.pi,\n    ]\n"
    "    show(x)\n    x\n    return (x,)",
)


def test_cells_and_script(tmp_path: Path) -> None:
    lab = write_lab(tmp_path, HIDDEN, PROSE, *PROGRAM)
    kinds = [cell.kind for cell in read_cells(lab.read_text())]
    assert kinds == ["display", "prose", "program", "program"]
    script = write_script(lab)
    assert "# # Why?\n#\n# Because." in script and "marimo" not in script.replace("labs", "")
    assert "from primechat.cli.script import settings\n" in script and "show" not in script
    assert script.rstrip().endswith("x = [\n    math.pi,\n]")
    given = (
        "@app.cell\ndef _(hidden):\n    z = dict(\n        a=1,\n        b=hidden.text,\n    )\n"
        "    return"
    )
    task = "@app.cell\ndef _(exercise):\n    def f(x): ...\n\n    exercise(f)\n    return"
    assert "z = dict(\n    a=1,\n)" in write_script(
        write_lab(tmp_path, given, task)
    )  # a widget gives b
    compile(script, "run.py", "exec")


def test_script_refuses(tmp_path: Path) -> None:
    needs = "@app.cell\ndef _(hidden):\n    y = hidden + 1\n    return (y,)"
    makes = "@app.cell(hide_code=True)\ndef _():\n    hidden = 1\n    return (hidden,)"
    with pytest.raises(ConfigError, match="needs hidden, which only hidden cells define"):
        write_script(write_lab(tmp_path, makes, needs))
    with pytest.raises(ConfigError, match="nothing to export"):
        write_script(write_lab(tmp_path, PROSE, makes))
    tools = (
        "@app.cell\ndef _():\n    from primechat.labkit.lab import predict\n    return (predict,)"
    )
    with pytest.raises(ConfigError, match="imports predict from primechat.labkit.lab"):
        write_script(write_lab(tmp_path, tools))
    for number in ("77", "03", "02", "055", "x"):
        with pytest.raises(ConfigError, match="only labs 05 to 09"):
            find_lab(number)
    assert find_lab("5").name.startswith("05_")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "d20"
    config = full_config(20)
    export_lab(
        find_lab("05"), config, make_plan(config, find_machine("8xH200")), folder, base_dir=folder
    )
    assert not list(folder.rglob("__pycache__"))  # runs of it leave some
    return folder


def test_folder(exported: Path) -> None:
    config = decode_config(json.loads((exported / "config.json").read_text()), PretrainConfig)
    assert config == full_config(20)
    read_me, launch = (exported / "README.md").read_text(), (exported / "launch.sh").read_text()
    for words in (
        "export NANOCHAT_BASE_DIR=/workspace/cache/nanochat",
        IMAGE,
        "2.96 h and $85",
        "tmux -L primechat attach",
    ):
        assert words in read_me, words
    (budget,) = re.findall(
        "bash launch.sh start --max_dollars .* --dollars_per_hour [0-9.]+", read_me
    )
    guide = (ROOT / "primechat" / "cloud" / "README.md").read_text()
    assert budget in guide, "the one README of the d20 says what the other says"
    assert "--recipe nanochat2026" in read_me and "whose cost has been measured" in read_me
    assert "primechat pull root@POD:base/d20" in read_me and "@" not in read_me.replace("root@", "")
    assert '--nproc_per_node="${RANKS:-8}"' in launch and os.access(exported / "launch.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", exported / "launch.sh"]).returncode == 0
    source, copied = ROOT / "primechat", exported / "src" / "primechat"
    assert (copied / "train" / "loop.py").read_bytes() == (
        source / "train" / "loop.py"
    ).read_bytes()


def test_sky_task(exported: Path) -> None:
    """The keys and values that SkyPilot 0.14's schema has for a RunPod task."""
    task = yaml.safe_load((exported / "sky.yaml").read_text())
    assert set(task) <= {
        "name",
        "resources",
        "workdir",
        "envs",
        "secrets",
        "setup",
        "run",
        "num_nodes",
    }
    found = task["resources"]
    assert set(found) <= {"infra", "accelerators", "image_id", "disk_size"}
    assert (found["infra"], found["accelerators"]) == ("runpod", "H200-SXM:8")
    assert found["image_id"] == f"docker:{IMAGE}"
    assert "autostop" not in found, (
        "RunPod only deletes: nothing may take the machine down with the model"
    )
    assert "costs\n$28.72 an hour until `sky down`" in (exported / "README.md").read_text()
    assert found["disk_size"] >= 80 and task["secrets"] == {"HF_TOKEN": None}
    assert (
        "launch.sh preflight && bash launch.sh run" in task["run"]
        and task["name"] == "primechat-d20"
    )


def check_shell(*scripts: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck, which is not installed here")
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_templates_are_real_files(exported: Path, tmp_path: Path) -> None:
    """An editor and shellcheck read them as they lie there, and the wheel brings them to the reader."""
    task = yaml.safe_load((TEMPLATES / "sky.yaml").read_text())
    assert task["resources"]["disk_size"] == "__DISK__"
    copy = tmp_path / "src"  # a build leaves folders beside the package
    shutil.copytree(exported / "src", copy)
    build = ["pip", "wheel", str(copy), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    names = {path.name for path in TEMPLATES.iterdir()}
    assert {"launch.sh", "sky.yaml", "README.md"} < names
    assert {Path("primechat/cloud/templates", name) for name in names} <= shipped
    check_shell(TEMPLATES / "launch.sh")


@pytest.mark.parametrize("number", ["05", *STAGE_OF])
def test_every_launcher_is_sound_shell(number: str, tmp_path: Path) -> None:
    lab, run = find_lab(number), replace(full_config(2), corpus="my 'own' text.txt")
    plan = make_plan(run, find_machine("8xH200"))
    export_lab(lab, full_stage(lab, run), plan, tmp_path / "out", base_dir=tmp_path)
    for name in ("launch.sh", "sky.yaml", "README.md"):
        assert not re.search("__[A-Z]+__", (tmp_path / "out" / name).read_text())
    check_shell(tmp_path / "out" / "launch.sh")


@pytest.mark.parametrize(
    ("number", "tried"),
    [
        ("05", "-m primechat preflight --gpus 8xH200 --config config.json --json"),
        ("07", "--nproc_per_node=8 run.py --config config.json --tag preflight-"),
        ("09", "run.py --config config.json --tag preflight-"),
    ],
)
def test_preflight_tries_the_stage(number: str, tried: str, tmp_path: Path) -> None:
    """What a trial wrote is removed if it went well, and stays to be looked at if not."""
    lab, run, out = find_lab(number), full_config(2), tmp_path / "out"
    config = full_stage(lab, run)
    export_lab(lab, config, make_plan(run, find_machine("8xH200")), out, base_dir=tmp_path)
    place = {"05": "base_checkpoints", "07": "lora_checkpoints", "09": "autochat"}[number]
    (tmp_path / "python").write_text(
        '#!/usr/bin/env bash\necho "$@"\n'
        f'mkdir -p "$NANOCHAT_BASE_DIR/{place}/preflight-$PPID" "$NANOCHAT_BASE_DIR/{place}/mine"\n'
        "exit ${FAILS:-0}\n"
    )
    (tmp_path / "python").chmod(0o755)
    path, base = f"{tmp_path}:{os.environ['PATH']}", tmp_path / "base"
    for fails in (0, 3):
        done = subprocess.run(
            ["bash", out / "launch.sh", "preflight", "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "NANOCHAT_BASE_DIR": str(base), "FAILS": str(fails)},
        )
        assert done.returncode == fails and tried in done.stdout, done.stderr
        assert done.stdout.endswith("--json\n")
        if number != "05":  # `primechat preflight` cleans up itself
            left = sorted(item.name.partition("-")[0] for item in (base / place).iterdir())
            assert left == ["mine", "preflight"][: 1 + bool(fails)]


def run_script(folder: Path, base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(folder / "src")},
    )


@pytest.mark.slow
def test_script_is_the_library_call(exported: Path, tmp_path: Path, base_dir: Path) -> None:
    """Lab, exported script and library call: bit-identical losses for 20 steps."""
    config = replace(shrink_config(full_config(2)), tag="same")
    primechat.pretrain(config)
    asked = run_script(exported, tmp_path, "--help")
    assert (
        asked.returncode == 0
        and "--model.n_layer" in asked.stdout
        and "--tokens_per_param" in asked.stdout
    )
    file = tmp_path / "same.json"
    file.write_text(json.dumps(encode_config(config)))
    done = run_script(exported, tmp_path / "script", "--config", str(file))
    assert done.returncode == 0, done.stderr
    lab = subprocess.run(
        [sys.executable, "labs/05_pretraining.py", "--config", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "lab"), "PYTHONPATH": str(ROOT)},
    )
    assert lab.returncode == 0, lab.stderr
    losses = [
        [
            e["loss_nats"]
            for e in read_metrics(base / "base_checkpoints/same/metrics.jsonl")
            if e["kind"] == "step"
        ]
        for base in (base_dir, tmp_path / "script", tmp_path / "lab")
    ]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 20
    wrong = run_script(exported, tmp_path, "--batch_tokens", "7")
    assert (
        wrong.returncode == 2
        and "batch_tokens=7" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


STAGES = {
    "06": (primechat.finetune, "sft"),
    "07": (primechat.train_lora, "lora"),
    "08": (primechat.distill, "base"),
}


@pytest.mark.parametrize("number", STAGES)
def test_stages_of_other_labs(
    number: str, tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert cli.main(["export", number, "--depth", "20", "-o", str(folder)]) == 0
    config = decode_config(json.loads((folder / "config.json").read_text()), STAGE_OF[number])
    source = getattr(config, "teacher", "") or config.base
    assert source in ("base/d20", "sft/d20") and config.batch_tokens % 2048 == 0
    read_me, launch = (folder / "README.md").read_text(), (folder / "launch.sh").read_text()
    assert (
        f"`{source}`" in read_me
        and "_checkpoints/d20" in read_me
        and not re.search("__[A-Z]+__", launch + read_me)
    )
    assert subprocess.run(["bash", "-n", folder / "launch.sh"]).returncode == 0
    script = (folder / "run.py").read_text()
    code = "\n".join(line for line in script.splitlines() if not line.startswith("#"))
    assert (
        "= settings(" in code
        and "= stage(" in code
        and "exercise" not in code
        and "shelf" not in code
    )
    task = yaml.safe_load((folder / "sky.yaml").read_text())
    place = f"{FAMILIES[source.partition('/')[0]]}/d20"
    assert task["file_mounts"] == {f"{POD_BASE}/{place}": f"{base_dir.resolve()}/{place}"}
    assert f"rsync -a --exclude='optim_*' {base_dir.resolve()}/{place}/ root@" in read_me
    mine = replace(config, tag="mine", seed=7)
    (tmp_path / "mine.json").write_text(json.dumps(encode_config(mine)))
    words = ["export", number, "--config", str(tmp_path / "mine.json"), "-o", str(folder)]
    capsys.readouterr()
    assert cli.main(words) == 2 and "holds an export of other settings" in capsys.readouterr().err
    assert cli.main([*words, "--force"]) == 0 == cli.main(words)
    assert decode_config(json.loads((folder / "config.json").read_text()), STAGE_OF[number]) == mine


@pytest.mark.slow
@pytest.mark.parametrize("number", STAGES)
def test_stage_script_runs(number: str, tmp_path: Path, base_dir: Path) -> None:
    """The losses of the exported script are those of the library's call, to the bit."""
    function, family = STAGES[number]
    primechat.pretrain(replace(shrink_config(full_config(2)), tag="small", steps=2))
    lab, folder = find_lab(number), tmp_path / "out"
    config = full_stage(lab, full_config(2))
    export_lab(
        lab, config, make_plan(full_config(2), find_machine("8xH200")), folder, base_dir=folder
    )
    tiny = replace(shrink_config(config), steps=4)
    (tmp_path / "tiny.json").write_text(json.dumps(encode_config(tiny)))
    done = run_script(folder, base_dir, "--config", str(tmp_path / "tiny.json"), "--tag", "script")
    assert done.returncode == 0, done.stderr
    function(replace(tiny, tag="library"))
    losses = [
        [
            e["loss_nats"]
            for e in read_metrics(registry.run_dir(family, tag) / "metrics.jsonl")
            if e["kind"] == "step"
        ]
        for tag in ("script", "library")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", STAGES)
def test_stage_rehearsal(number: str, tmp_path: Path) -> None:
    lab = find_lab(number)
    config = full_stage(lab, full_config(20))
    export_lab(
        lab,
        config,
        make_plan(full_config(20), find_machine("8xH200")),
        tmp_path / "out",
        base_dir=tmp_path,
    )
    said: list[str] = []
    assert rehearse(tmp_path / "out", say=said.append, kind=type(config)) == 0, said
    assert "20 steps, loss" in said[-1]


def test_talk_study(tmp_path: Path, base_dir: Path) -> None:
    """Lab 09 as a folder: its script tells its flags, and lets a tiny model talk and learn from itself."""
    folder = tmp_path / "out"
    assert cli.main(["export", "09", "--depth", "20", "-o", str(folder)]) == 0
    config = decode_config(json.loads((folder / "config.json").read_text()), STAGE_OF["09"])
    assert config.model == "sft/d20" and config.generations == 3 and config.resume
    read_me, launch = (folder / "README.md").read_text(), (folder / "launch.sh").read_text()
    assert "`sft/d20`" in read_me and not re.search("__[A-Z]+__", launch + read_me)
    assert (
        "pull root@POD:sft/d20-g3" in read_me
        and "pull root@primechat-d20-autochat:sft/d20-g1" in read_me
    )
    assert 'nproc_per_node="${RANKS:-1}"' in launch, "one process talks"
    asked = run_script(folder, base_dir, "--help")
    assert asked.returncode == 0 and "--repetition_penalty" in asked.stdout, asked.stderr
    shutil.copytree(
        registry.SHIPPED / "chatsft_checkpoints" / "d4", base_dir / "chatsft_checkpoints" / "d4"
    )
    words = ["--model", "sft/d4", "--n_conversations", "2", "--turns", "3", "--max_new_tokens", "4"]
    done = run_script(folder, base_dir, *words, "--generations", "0", "--tag", "script")
    assert done.returncode == 0, done.stderr
    (talks,) = (base_dir / "autochat").glob("script-*/talks.jsonl")
    assert len(talks.read_text().splitlines()) == 6


@pytest.mark.slow
def test_talk_rehearsal(tmp_path: Path) -> None:
    lab = find_lab("09")
    config = full_stage(lab, full_config(20))
    export_lab(
        lab,
        config,
        make_plan(full_config(20), find_machine("8xH200")),
        tmp_path / "out",
        base_dir=tmp_path,
    )
    said: list[str] = []
    assert rehearse(tmp_path / "out", say=said.append, kind=type(config)) == 0, said
    assert "20 steps, loss" in said[-1]


@pytest.mark.slow
def test_rehearsal(exported: Path) -> None:
    said: list[str] = []
    assert rehearse(exported, say=said.append) == 0, said
    assert "20 steps, loss" in said[-1]
    launcher = exported / "launch.sh"
    whole = launcher.read_text()
    launcher.write_text(whole.replace("run.py --config", "run.py --no_such_flag --config"))
    assert rehearse(exported, say=said.append) == 1 and "no_such_flag" in said[-1]
    launcher.write_text(whole)


def test_ctrl_c_saves_and_flags_stay_whole(exported: Path, tmp_path: Path) -> None:
    """`start` in a stand-in for tmux: an interrupt, which reaches all that it started, still lets it save."""
    tools = {
        "tmux": 'exec bash -c "${@: -1}"',
        "python": f"exec {sys.executable} {tmp_path}/trainer.py " + '"$@"',
    }
    (tmp_path / "trainer.py").write_text(
        "import pathlib, signal, sys, time\n"
        "stop = []\n"
        "signal.signal(signal.SIGINT, lambda *_: stop.append(1))\n"
        "print('running', flush=True)\n"
        "while not stop: time.sleep(0.02)\n"
        "time.sleep(0.3)\n"
        "print('saving', flush=True)\n"
        "pathlib.Path('saved').write_text(repr(sys.argv))\n"
    )
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(exported / "launch.sh", tmp_path)
    run = subprocess.Popen(
        ["bash", "launch.sh", "start", "--tag", "a b;c"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    log, saved = tmp_path / "run.log", tmp_path / "saved"
    while not (log.is_file() and "running" in log.read_text()):
        assert run.poll() is None, "it ended before it ran"
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(60)
    for _ in range(200):  # what it started may outlive it
        if saved.is_file():
            break
        time.sleep(0.05)
    assert "'--tag', 'a b;c'" in saved.read_text() and "saving" in log.read_text()


@pytest.mark.parametrize(
    ("words", "resumes"),
    [("", False), ("--tag mine", True), ("--steps 4 --tag=mine", True), ("--tag new", False)],
)
def test_going_on_is_of_the_tag(exported: Path, tmp_path: Path, words: str, resumes: bool) -> None:
    """A run goes on where its own tag has one, whichever of the flags names it."""
    run = tmp_path / "base_checkpoints" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = subprocess.run(
        ["bash", exported / "launch.sh", "run", *words.split()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path, "NANOCHAT_BASE_DIR": str(tmp_path)},
    )
    assert ("--resume" in said.stdout) == resumes and said.stdout.strip().endswith(words)


def test_names_and_folders(tmp_path: Path) -> None:
    """No two stages of a tag share a folder or a machine; what somebody has in a folder stays there."""
    stages = [full_stage(find_lab(number), full_config(20)) for number in ("05", *STAGE_OF)]
    names = [name_job(stage) for stage in stages]
    assert names == ["d20", "d20-chat", "pirate-d20-lora", "d20-100m", "d20-autochat"]
    (tmp_path / "src").mkdir()
    plan = make_plan(full_config(20), find_machine("8xH200"))
    with pytest.raises(ConfigError, match="something else than an export"):
        export_lab(find_lab("05"), full_config(20), plan, tmp_path, base_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_what_was_edited_stays(tmp_path: Path) -> None:
    """The same export again is fine; with an edited script it is refused, and forced it is as it was."""
    run, plan = full_config(2), make_plan(full_config(2), find_machine("8xH200"))
    write = partial(export_lab, find_lab("05"), run, plan, tmp_path / "d2", base_dir=tmp_path)
    script = write()[0]
    first = script.read_text()
    write()
    script.write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"holds run\.py with changes.*--force"):
        write()
    assert script.read_text() == "# mine\n"
    write(force=True)
    assert script.read_text() == first
    module = tmp_path / "d2" / "src" / "primechat" / "seeds.py"
    module.write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"holds src/primechat with changes.*--force"):
        write()
    assert module.read_text() == "# mine\n"
    write(force=True)
    assert module.read_text() == (ROOT / "primechat" / "seeds.py").read_text()


def test_export_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "05", "--depth", "32", "--gpus", "8xH100", "-o", str(tmp_path / "d32")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "It will not fit on 8xH100 as planned" in said and "README.md" in said
    assert json.loads((tmp_path / "d32" / "config.json").read_text())["model"]["n_layer"] == 32


def test_export_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no place is told in a sentence; what the shell would run or stumble over is quoted."""
    (tmp_path / "file").touch()
    assert cli.main(["export", "05", "-o"]) == 2
    assert "-o stands alone, a value must follow it; try -o FOLDER." in capsys.readouterr().err
    assert cli.main(["export", "05", "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be used (a part of it is a file, not a folder)" in capsys.readouterr().err
    assert cli.main(["plan", "--gpus", "00xH100"]) == 2 and "try 8xH200" in capsys.readouterr().err
    text, folder = f'{tmp_path}/a "b" $(touch {tmp_path}/run).jsonl', tmp_path / "d2"
    run = replace(full_config(2), corpus=text)
    export_lab(find_lab("05"), run, make_plan(run, find_machine("4090")), folder, base_dir=tmp_path)
    assert "--max_dollars 1 " in (folder / "README.md").read_text(), "0 is no limit"
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s" "$5"')
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", folder / "launch.sh", "data"], capture_output=True, text=True, env=env
    )
    assert (said.returncode, said.stderr) == (0, "") and said.stdout.rpartition(":")[0] == text
    assert not (tmp_path / "run").exists()


def test_pull(
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, target = plan_pull(PullFlags(source="root@1.2.3.4:base/d20", port=22001))
    assert target == base_dir / "base_checkpoints" / "d20" and "--exclude=optim_*" in command
    assert command[-2] == "root@1.2.3.4:/workspace/cache/nanochat/base_checkpoints/d20/"
    assert command[command.index("-e") + 1] == "ssh -p 22001"
    command, target = plan_pull(
        PullFlags(source="me@pod:/data/x/chatsft_checkpoints/mine/", optim=True)
    )
    assert target == registry.run_dir("sft", "mine") and "--exclude=optim_*" not in command
    command, target = plan_pull(PullFlags(source="root@pod:lora/pirate"))
    assert (
        target == registry.run_dir("lora", "pirate") and command[command.index("-e") + 1] == "ssh"
    )
    assert plan_pull(PullFlags(source="root@pod:/x/autochat"))[1] == base_dir / "autochat"
    for wrong in ("", "base/d20", "pod:base/d20", "-oX@h:base/d20", "a@b:"):
        with pytest.raises(ConfigError, match="must be USER@HOST:RUN"):
            plan_pull(PullFlags(source=wrong))
    far, bin_ = tmp_path / "far" / "base_checkpoints" / "d9", tmp_path / "bin"
    far.mkdir(parents=True)
    bin_.mkdir()
    for name in ("metrics.jsonl", "model_000001.pt", "optim_000001_rank0.pt"):
        (far / name).write_text("x")
    fake = bin_ / "rsync"  # copies like rsync over ssh, minus the network
    fake.write_text(
        "#!/usr/bin/env python3\nimport glob, os, shutil, sys\nsource, target = sys.argv[-2:]\n"
        "for p in glob.glob(source.split(':', 1)[1] + '*'):\n"
        "    if not ('--exclude=optim_*' in sys.argv and 'optim_' in p): shutil.copy(p, target)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    assert cli.main(["pull", "me@pod:base/d9", "--base_dir", str(tmp_path / "far")]) == 0
    assert sorted(p.name for p in registry.run_dir("base", "d9").iterdir()) == [
        "metrics.jsonl",
        "model_000001.pt",
    ]
    assert "primechat report" in capsys.readouterr().out


@pytest.mark.slow
def test_preflight_on_cpu(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(encode_config(shrink_config(full_config(2)))))
    code = cli.main(["preflight", "--config", str(file), "--cpu_ranks", "2", "--disk_gb", "100"])
    said = capsys.readouterr().out
    assert "2 ranks over gloo" in said and "tokens a second" in said and "free in" in said
    assert code == (0 if "Ready" in said else 1)
    assert cli.main(["preflight", "--config", str(file), "--gpus", "8xH200"]) == 1
    said = capsys.readouterr().out
    assert "NO  GPUs        0 of 8 wanted" in said and "do not start" in said
