"""What decides a result besides its parents: the settings and the code that are its own, and nothing else."""

import json
import os
import shutil
from typing import get_args

import pytest

from nondecoupling.study import fingerprint as fingerprints
from nondecoupling.study.fingerprint import NOTEBOOK_OF, NOTEBOOKS, PACKAGE, SECTIONS_OF, code_hashes, fingerprint
from nondecoupling.study.plan import SUMMARIES, StageKind
from nondecoupling.study.study import PROFILES, load_study, study_of, with_overrides

STAGES = set(get_args(StageKind))
ALL = {*STAGES, *SUMMARIES}


def test_every_kind_of_part_has_a_notebook_and_settings():
    assert set(NOTEBOOK_OF) == set(SECTIONS_OF) == ALL
    assert all(fingerprints.notebook_of(kind).exists() for kind in ALL)


# Settings


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_what_a_run_changes_is_in_its_fingerprint(profile):
    study = load_study(profile)
    for run in study.runs:
        settings = fingerprint(study, run.name, code={})["settings"]
        for key, value in run.changes.items():
            section, _, name = key.partition(".")
            assert settings[section][name] == value, (run.name, key)


@pytest.mark.parametrize(
    ("changes", "concerned"),
    [
        ({"prompt.max_new_tokens": 3}, {"base", "sft", "sft-rl", "joint-m0.2", "reward-model"}),  # answers are cut
        ({"model.dtype": "bfloat16"}, {"base", "sft", "sft-rl", "joint-m0.2", "reward-model"}),
        ({"joint.learning_rate": 0.1}, {"joint-m0.2"}),
        ({"rl.beta": 9.0}, {"sft-rl", "joint-m0.2", *SUMMARIES}),
        ({"data.disagreement": 0.2}, {"data", "base", "sft", "sft-rl", "joint-m0.2", "reward-model", *SUMMARIES}),
        ({"evaluation.train_size": 5}, {"base", "sft", "sft-rl", "joint-m0.2", "reward-model"}),
    ],
)
def test_a_setting_concerns_the_parts_that_use_it(changes, concerned):
    plain = load_study("nano")
    changed = study_of("nano", with_overrides(plain.profile, changes))
    parts = ["data", "base", "sft", "sft-rl", "joint-m0.2", "reward-model", *SUMMARIES]
    assert {part for part in parts if fingerprint(plain, part, {}) != fingerprint(changed, part, {})} == concerned


# Code


def edited(notebook, folder, edit):
    """A copy in ``folder`` of a committed notebook, after ``edit`` has changed its cells."""
    content = json.loads((NOTEBOOKS / notebook).read_text(encoding="utf-8"))
    edit(content["cells"])
    (folder / notebook).write_text(json.dumps(content), encoding="utf-8")
    return folder / notebook


def clear_outputs(cells):
    for cell in cells:
        cell.pop("outputs", None)
        cell["id"] = "another"


def reword(cells):
    cells[0]["source"] = ["# Another title"]


def recode(cells):
    next(cell for cell in cells if cell["cell_type"] == "code")["source"].append("\nfirst = 1")


@pytest.mark.parametrize(("edit", "same"), [(clear_outputs, True), (reword, True), (recode, False)])
def test_only_the_code_of_a_notebook_makes_its_results_stale(tmp_path, edit, same):
    changed = edited("04_rl.ipynb", tmp_path, edit)
    assert (code_hashes(changed) == code_hashes(NOTEBOOKS / "04_rl.ipynb")) == same


@pytest.fixture
def concerned_by(tmp_path, monkeypatch):
    """The kinds of parts that an edit of a module, in a copy of the package, concerns."""
    monkeypatch.setattr(fingerprints, "PACKAGE", shutil.copytree(PACKAGE, tmp_path / "package"))

    def hashes():
        return {kind: code_hashes(fingerprints.notebook_of(kind)) for kind in NOTEBOOK_OF}

    def concerned(module):
        before = hashes()
        with (tmp_path / "package" / module).open("a") as file:
            file.write("# an edit\n")
        after = hashes()
        return {kind for kind in NOTEBOOK_OF if before[kind] != after[kind]}

    return concerned


@pytest.mark.parametrize(
    ("module", "concerned"),
    [
        ("task/grammar.py", {*STAGES}),
        ("task/seeds.py", {*STAGES}),
        ("training/generation.py", STAGES - {"data"}),
        ("training/rl.py", {"rl", "joint"}),
        ("training/joint.py", {"joint"}),
        ("training/pretrain.py", {"base"}),
        ("analysis/theory.py", {*SUMMARIES}),
        ("analysis/figures.py", {*SUMMARIES}),  # stages draw with it, too, what nobody reads
        ("analysis/identities.py", {"theory"}),
        ("pages/report.py", set()),
        ("workflow/carry.py", set()),
        ("study/plan.py", set()),  # what it says is in the settings
    ],
)
def test_an_edited_module_concerns_the_parts_whose_results_it_decides(concerned_by, module, concerned):
    assert concerned_by(module) == concerned


def test_a_new_time_of_a_file_says_nothing(concerned_by):
    before = code_hashes(fingerprints.notebook_of("rl"))
    for path in fingerprints.PACKAGE.rglob("*.py"):
        os.utime(path)
    assert code_hashes(fingerprints.notebook_of("rl")) == before


def test_imports_are_found_in_every_form_and_room_that_was_asked_for():
    lines = [
        "%matplotlib inline",
        "import pandas",
        "from nondecoupling.task import corpus, grammar as g",
        "from nondecoupling.training.rl import train_rl",
        "from nondecoupling.study.study import load_study",
        "def f():",
        "    from nondecoupling.analysis.theory import tilt",
        "from os import path",
        "x = 'from nondecoupling.task import prompts'",
    ]
    found = fingerprints.imported_modules("\n".join(lines), ("task", "training", "analysis"))
    assert sorted(found) == ["analysis/theory.py", "task/corpus.py", "task/grammar.py", "training/rl.py"]
