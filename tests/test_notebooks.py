"""Notebooks as programs: their parameters, and what one leaves that fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from nbclient.exceptions import DeadKernelError

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import NOTEBOOKS, code_of, kind_of, notebook_of
from nondecoupling.study.plan import DRAWS, SUMMARIES
from nondecoupling.study.results import Results
from nondecoupling.study.study import load_study
from nondecoupling.workflow import graph, notebooks
from nondecoupling.workflow.__main__ import main


@pytest.fixture
def calls(monkeypatch):
    """Notebook and parameters of each that would be executed; none is."""
    import papermill

    calls = []

    def execute_notebook(notebook, working, parameters, **_):
        assert os.environ[folders.EXECUTED]
        calls.append((notebook, parameters))
        folders.write_text(Path(working), "{}")
        if "run" in parameters or "data" in notebook:  # what a stage leaves
            partial = Path(working.removesuffix(".ipynb"))
            partial.mkdir(parents=True)
            folders.write_json(partial / folders.METRICS, {"status": "complete"})

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    return calls


@pytest.mark.parametrize("name", ["data", "base", "sft", "rl", "joint-m0.2", "reward-model", *SUMMARIES])
def test_every_notebook_takes_what_it_is_given(results, calls, name):
    study = replace(load_study("four" if name == "labels" else "nano"), name="nano")
    part = next(part for part in graph.parts_of(study, [3], study.runs) if part.name == name)
    made = notebooks.execute(study, part, {"profile": "nano", "data": "", "model": "", "overrides": {"rl.beta": 0.5}})
    [(notebook, parameters)] = calls
    assert made == results / "nano" / part.target
    assert folders.EXECUTED not in os.environ
    assert notebook == str(notebook_of(kind_of(study, name)))
    assert parameters.get("run") == (name if name not in ("data", *SUMMARIES) else None)
    assert parameters.get("seed") == part.seed


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"profil": "nano"}, ["03_sft.ipynb", "'profil'", "'profile'"]),
        ({"sed": 0}, ["'sed'", "'seed'"]),
        ({"seeds": "0"}, ["'seeds'", "'seed'"]),
        ({"seed": "0"}, ["'seed'", "'0'", "int"]),
        ({"seed": 0.0}, ["'seed'", "0.0", "int"]),
        ({"seed": True}, ["'seed'", "True", "int"]),
        ({"run": 3}, ["'run'", "3", "str"]),
        ({"overrides": "rl.beta=1"}, ["'overrides'", "'rl.beta=1'", "dict"]),
    ],
)
def test_unknown_and_mistyped_parameters_are_refused(parameters, words):
    with pytest.raises(ValueError, match="parameter") as caught:
        notebooks.check_parameters(NOTEBOOKS / "03_sft.ipynb", parameters)
    for word in words:
        assert word in str(caught.value)


def test_a_good_command_reaches_the_notebook_with_its_parameters(results, calls, capsys):
    root = results / load_study("nano", overrides={"rl.beta": 0.25}).name
    (root / "seed3").mkdir(parents=True)
    (root / "seed3" / "sft-rl.failed.ipynb").write_text("{}")
    assert main(["run", "--run", "sft-rl", "--seed", "3", "--set", "rl.beta=0.25"]) == 0
    [(notebook, parameters)] = calls
    assert notebook.endswith("04_rl.ipynb")
    options = {"profile": "nano", "overrides": {"rl.beta": 0.25}, "data": "", "model": ""}
    assert parameters == options | {"run": "sft-rl", "seed": 3}
    kept = {path.name for path in (root / "seed3" / "sft-rl").iterdir()}
    assert kept == {"metrics.json", "sha256.json", "notebook.ipynb"}
    assert [path.name for path in (root / "seed3").iterdir()] == ["sft-rl"]  # no trace of a failed attempt
    assert capsys.readouterr().out.startswith("seed 3 · sft-rl · 0:0")


@pytest.mark.parametrize(("edits", "executed"), [([1], 0), ([0, 1], 1), ([0, 0], 1)], ids=["before", "while", "never"])
def test_no_result_is_of_code_that_was_edited_while_the_study_was_made(
    results, calls, capsys, monkeypatch, edits, executed
):
    """Which would be taken for today's as soon as the edit is taken back."""
    study = load_study("nano")
    root, parts = results / "nano", [graph.run_part(study, "sft", 3)]
    graph.write_settings(study, parts, [3])
    hashes, looks = notebooks.code_hashes, iter(edits)

    def code_hashes(notebook):
        return hashes(notebook) | ({"training/sft.py": "edited"} if next(looks) else {})

    monkeypatch.setattr(notebooks, "code_hashes", code_hashes)
    assert main(["run", "--run", "sft", "--seed", "3"]) == int(any(edits))
    assert len(calls) == executed
    assert folders.is_complete(root / "seed3" / "sft") == (not any(edits))
    said = "error: training/sft.py changed while the study was made; make begins with what is there now\n"
    assert capsys.readouterr().err == (said if any(edits) else "")


def test_a_failing_notebook_leaves_its_traceback_and_no_result(results, tmp_path, capsys, monkeypatch, warm_server):
    for name, address in warm_server.items():
        monkeypatch.setenv(name, address)
    # A free TCP port that is chosen for a kernel may be another's when it opens it.
    monkeypatch.setattr("jupyter_client.connect.localhost", lambda: pytest.fail("the kernel is spoken to through TCP"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "in_domain_train.tsv").write_text("x\t1\t\tFine.\nx\tmaybe\t\tHm.\n")
    (folder / "in_domain_dev.tsv").write_text("x\t1\t\tFiner.\nx\t0\t*\tFinest fine.\n")
    command = ["run", "--run", "data", "--data", str(folder)]
    study = load_study("nano", data=str(folder))
    root = results / study.name

    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 01_data.ipynb failed: ValueError: ")
    assert f"{folder / 'in_domain_train.tsv'}, line 2" in error
    assert str(root / "data.failed.ipynb") in error
    assert [path.name for path in root.iterdir()] == ["data.failed.ipynb"]
    cells = json.loads((root / "data.failed.ipynb").read_text())["cells"]
    failures = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert failures[-1]["ename"] == "ValueError"
    assert "read_file" in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(failures[-1]["traceback"]))
    assert graph.status_lines(study, [0])[1].split() == ["data", "✗"]

    (folder / "in_domain_train.tsv").write_text("x\t1\t\tFine.\nx\t0\t\tHm.\n")
    assert main(command) == 0
    mended = load_study("nano", data=str(folder))
    assert mended.name != study.name  # other data, another study
    kept = {path.name for path in (results / mended.name / "data").iterdir()}
    assert kept == {"metrics.json", "sha256.json", "notebook.ipynb"}
    assert graph.status_lines(mended, [0])[1].split() == ["data", "~"]  # make has not noted what it depends on


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DeadKernelError("Kernel died"), "its kernel died, most likely for want of memory; use JOBS=1"),
        (RuntimeError("No reply"), "its kernel did not start (No reply); the same command tries again"),
    ],
)
def test_a_kernel_that_dies_or_does_not_start_is_said_with_what_helps(error, words, results, monkeypatch, capsys):
    import papermill

    def execute_notebook(notebook, working, *_, **__):
        folders.write_text(Path(working), "{}")
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    partial = results / "nano" / "seed0" / "sft.partial"
    partial.mkdir(parents=True)
    assert main(["run", "--run", "sft"]) == 1
    assert f"03_sft.ipynb failed: {words}" in capsys.readouterr().err
    assert [path.name for path in partial.parent.iterdir()] == ["sft.failed.ipynb"]


def test_a_figure_that_is_no_longer_drawn_is_removed_and_what_fails_removes_nothing(results, monkeypatch):
    import papermill

    root = results / "nano"
    kept, again, gone = (root / "figures" / name for name in ("plane.svg", "theory.png", "portrait/crossing.svg"))
    gone.parent.mkdir(parents=True)
    for path in (kept, again, gone, root / "theory.json"):
        path.write_text("{}")
    os.utime(again, (0, 0))

    def fails(notebook, working, *_, **__):
        folders.write_text(Path(working), "{}")
        raise DeadKernelError("Kernel died")

    def draws(notebook, working, *_, **__):
        folders.write_text(Path(working), "{}")
        again.write_text("{}")

    for execute_notebook, code in ((fails, 1), (draws, 0)):
        monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
        assert main(["run", "--run", "theory"]) == code
        assert gone.exists() == bool(code)
        assert all(path.exists() for path in (kept, again, root / "theory.json"))


def test_the_figures_of_a_summary_are_known_by_name():
    """What removes an old summary removes its figures."""
    for name, figures in DRAWS.items():
        cells = folders.read_json(notebook_of(name))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert sorted(re.findall(r'save_figure\(.*, "(\w+)"\)', code)) == sorted(figures), name


# As a book

CHAPTERS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("place", range(len(CHAPTERS)), ids=lambda place: CHAPTERS[place].stem)
def test_a_chapter_leads_to_its_neighbours_at_top_and_bottom_and_has_a_bound(place):
    cells = cells_of(CHAPTERS[place])
    top, bottom = ("".join(cells[end]["source"]).splitlines()[0] for end in (0, -1))
    assert top == bottom
    links = re.findall(r"\]\(([^)]+)\)", top)
    neighbours = [path.name for path in (CHAPTERS[max(place - 1, 0)], *CHAPTERS[place + 1 : place + 2])]
    assert {"../README.md", *neighbours} - {CHAPTERS[place].name} <= set(links)
    assert len(cells) < (20 if place == 0 else 45)


# Chapters that train are renewed with the reference, at a cost of minutes; these whenever what they show changes.
READERS = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if "nondecoupling.training" not in code_of(path)]


@pytest.mark.parametrize("chapter", READERS, ids=lambda path: path.stem)
def test_outputs_are_made_for_readers(chapter):
    """Figures have words, what a cell prints is one output, and tables have no names of columns in files."""
    for cell in cells_of(chapter):
        outputs = cell.get("outputs", [])
        names = [output.get("name") for output in outputs]  # of streams
        assert all(one is None or one != other for one, other in pairwise(names))
        for output in outputs:
            assert not re.search(
                "_bytes|reward_exact|frac_reward|NaN", "".join(output.get("data", {}).get("text/html", ""))
            )
            assert not "".join(output.get("data", {}).get("text/plain", "")).startswith("Text(")
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"]["image/png"]["alt"]) > 20


NO_TORCH = """
import sys
class Barred:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Barred())
"""


def test_the_tour_needs_no_torch_and_makes_no_file(tmp_path):
    """It is read where nothing but the tables is: all of it runs with torch out of reach."""
    code = NO_TORCH + code_of(NOTEBOOKS / "00_tour.ipynb")
    environment = {**os.environ, "NONDECOUPLING_RESULTS": str(tmp_path), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the committed reference" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_tour_says_what_is_not_made_yet(results, monkeypatch, capsys):
    """A study whose theory is not made, or that has no sweep, has a sentence in place of a figure."""
    monkeypatch.setattr(Results, "read", lambda *_: None)
    exec(code_of(NOTEBOOKS / "00_tour.ipynb"), {})
    assert "theory.json is not made yet" in (printed := capsys.readouterr().out)
    assert "make betas runs it" in printed
