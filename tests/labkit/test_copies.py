"""A learner's own copies of the labs: made, renewed, kept, restored; nothing tracked is ever written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from primechat.cli import main as cli
from primechat.errors import ConfigError
from primechat.exercises.start_here import EXERCISES
from primechat.labkit import copies, lab, memory, start_stop, twins
from primechat.labkit.twins import LabConfig, build_words

CODE = "import marimo\n\napp = marimo.App()\n\n\n@app.cell\ndef _():\n    {}\n    return\n"
NAME = "02_little"


def write_notebook(path: Path, *sources: str, outputs: int = 0) -> None:
    """Write a notebook of code cells, with outputs as JupyterLab saves them."""
    cells = [
        {
            "cell_type": "code",
            "source": source.splitlines(keepends=True),
            "outputs": [{"output_type": "stream", "text": "x"}] * outputs,
            "execution_count": outputs or None,
            "metadata": {},
        }
        for source in sources
    ]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}), encoding="utf-8")


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one lab and its twin."""
    folder = tmp_path / "labs"
    (folder / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(copies, "LABS", folder)
    monkeypatch.setattr(twins, "LABS", folder)
    monkeypatch.setattr(twins, "ROOT", tmp_path)
    ship(folder, "1 + 1")
    return folder


def ship(folder: Path, code: str) -> None:
    """Write the lab as a new version of primechat would."""
    (folder / f"{NAME}.py").write_text(CODE.format(code))
    write_notebook(folder / "notebooks" / f"{NAME}.ipynb", code)


def read_sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


def test_a_copy_is_made_once_and_kept(labs: Path) -> None:
    twin = labs / "notebooks" / f"{NAME}.ipynb"
    shipped = twin.read_text()
    copy, said = copies.open_copy(twin)
    assert copy == labs / "mine" / f"{NAME}.ipynb" and copy.read_text() == shipped and not said
    write_notebook(copy, "2 + 2", outputs=1)
    assert copies.open_copy(twin) == (copy, "") and read_sources(copy) == ["2 + 2"]
    assert twin.read_text() == shipped


def test_a_copy_follows_the_lab_until_it_is_edited(labs: Path) -> None:
    twin = labs / "notebooks" / f"{NAME}.ipynb"
    copy, _ = copies.open_copy(twin)
    write_notebook(copy, "1 + 1", outputs=2)  # only run: JupyterLab saves what cells gave
    ship(labs, "1 + 1 + 1")
    assert copies.open_copy(twin) == (copy, "") and read_sources(copy) == ["1 + 1 + 1"]
    write_notebook(copy, "my own")
    ship(labs, "4 + 4")
    _, said = copies.open_copy(twin)
    assert read_sources(copy) == ["my own"], "the learner's stays"
    assert "primechat lab reset 02" in said and "changed" in said
    ship(labs, "my own")  # what both have in common is no conflict
    assert copies.open_copy(twin)[1] == ""


def test_a_lost_ledger_loses_no_edit(labs: Path) -> None:
    twin = labs / "notebooks" / f"{NAME}.ipynb"
    copy, _ = copies.open_copy(twin)
    write_notebook(copy, "my own")
    for text in (None, "{", "[]", '{"02_little.ipynb": 7}'):
        ledger = labs / "mine" / copies.LEDGER
        ledger.unlink() if text is None else ledger.write_text(text)
        copies.open_copy(twin)
        assert read_sources(copy) == ["my own"]
    copy.write_text("no notebook at all")
    copies.open_copy(twin)
    assert copy.read_text() == "no notebook at all"


def test_reset_keeps_a_backup(labs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin, path = labs / "notebooks" / f"{NAME}.ipynb", labs / f"{NAME}.py"
    copy, _ = copies.open_copy(twin)
    own, _ = copies.open_copy(path)
    own.write_text(CODE.format("mine"))
    for n in (1, 2):
        write_notebook(copy, f"try {n}")
        assert cli.main(["lab", "reset", "02"]) == 0
        assert copy.read_text() == twin.read_text() and own.read_text() == path.read_text()
        backup = labs / "mine" / f"{NAME}.backup-{n}.ipynb"
        assert read_sources(backup) == [f"try {n}"] and str(backup.name) in capsys.readouterr().out
    assert (labs / "mine" / f"{NAME}.backup-1.py").read_text() == CODE.format("mine")
    assert cli.main(["lab", "reset", "2"]) == 0
    assert "is as it ships" in capsys.readouterr().out
    assert len(list((labs / "mine").glob("*backup*"))) == 3
    with pytest.raises(ConfigError, match="reset needs a lab"):
        cli.run_verb(["lab", "reset"])
    with pytest.raises(ConfigError, match="must be one of 02"):
        cli.run_verb(["lab", "reset", "77"])


def test_sync_leaves_copies_alone(labs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "write_twin", lambda path: path.read_text())
    assert cli.main(["lab", "sync"]) == 0
    twin = labs / "notebooks" / f"{NAME}.ipynb"
    copy, _ = copies.open_copy(twin)
    copy.write_text("mine")
    (labs / f"{NAME}.py").write_text(CODE.format("new"))
    assert cli.main(["lab", "sync"]) == 0 and copy.read_text() == "mine"
    assert cli.main(["lab", "sync", "--check"]) == 0


def test_commands_open_the_copy(labs: Path) -> None:
    path = labs / f"{NAME}.py"
    words, _ = build_words(LabConfig(lab="02"), path)
    assert f"--ServerApp.root_dir={labs / 'mine'}" in words
    assert f"--LabApp.default_url=/lab/tree/{NAME}.ipynb" in words
    assert (labs / "mine" / f"{NAME}.ipynb").is_file()
    words, _ = build_words(LabConfig(lab="02", edit=True), path)
    assert str(labs / "mine" / f"{NAME}.py") in words
    words, _ = build_words(LabConfig(lab="02", app=True), path)
    assert str(path) in words, "an app has no code to edit"
    (labs / "mine" / f"{NAME}.ipynb").unlink()
    words, _ = build_words(LabConfig(), None)
    assert (labs / "mine" / f"{NAME}.ipynb").is_file(), "all labs are at hand"


def test_a_folder_that_cannot_be_written_is_a_sentence(labs: Path) -> None:
    (labs / "mine").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"):
        build_words(LabConfig(lab="02"), labs / f"{NAME}.py")


def test_export_takes_the_learners_own_cells(labs: Path) -> None:
    path = labs / f"{NAME}.py"
    assert copies.choose_source(path) == path
    copy, _ = copies.open_copy(path)
    assert copies.choose_source(path) == path, "not edited"
    copy.write_text(CODE.format("mine"))
    assert copies.choose_source(path) == copy


def test_guesses_and_solutions_are_remembered(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_stop, "in_notebook", lambda: True)
    monkeypatch.setitem(globals(), "__file__", "/labs/mine/02_little.ipynb")

    def guess() -> list[lab.Prediction]:
        options = ["one", "two"]
        return [
            lab.predict("How many?", options, "two"),
            lab.predict("How much?", (0, 9), 5.0),
            lab.predict("Later?", options, lambda: "one"),
        ]

    for card, value in zip(guess(), ("one", 4.5, "two"), strict=True):
        assert card.guess is None and not card.revealed
        card.guess = value
        card.revealed = True
    again = guess()
    assert [card.guess for card in again] == ["one", 4.5, "two"]
    assert all(card.revealed for card in again)
    assert lab.predict("How many?", ["three", "two"], "two").guess is None, "another question now"
    assert lab.predict("How much?", (0, 2), 1.0).guess is None

    def stub(x: int) -> int: ...

    task = EXERCISES[0]
    assert lab.exercise(task, stub).state == "untried"
    assert lab.exercise(task, task.solution).state == "passed"
    card = lab.exercise(task, stub)
    assert card.state == "solved" and "before" in card.message
    assert card.kept.strip() == task.solution_text
    monkeypatch.setitem(globals(), "__file__", "/labs/03_other.py")
    assert lab.exercise(task, stub).state == "untried" and guess()[0].guess is None
    memory.forget("02")
    monkeypatch.setitem(globals(), "__file__", "/labs/02_little.py")
    assert guess()[0].guess is None and lab.exercise(task, stub).state == "untried"


def test_memory_survives_damage_and_stays_out_of_scripts(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = lab.predict("How many?", ["one", "two"], "two")
    card.guess = "one"
    card.revealed = True
    assert not memory.find_file().exists(), "a script remembers nothing"
    monkeypatch.setattr(start_stop, "in_notebook", lambda: True)
    base_dir.mkdir()
    for text in ("{", "[]", '{"02": 3}', '{"test_copies": {"guesses": {"How many?": {}}}}'):
        memory.find_file().write_text(text)
        assert lab.predict("How many?", ["one", "two"], "two").guess is None
    card = lab.predict("How many?", ["one", "two"], "two")
    card.guess = "one"
    card.revealed = True
    assert lab.predict("How many?", ["one", "two"], "two").guess == "one"
    monkeypatch.setattr(start_stop, "still", True)
    assert lab.predict("How many?", ["one", "two"], "two").guess is None, "nor a page to be read"
