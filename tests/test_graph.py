"""The graph that make gets: what each part waits for, and which settings files are rewritten by what."""

import itertools
import os
import shlex
import shutil
import subprocess

import pytest

from making import environment
from nondecoupling.study import fingerprint as fingerprints
from nondecoupling.study import folders
from nondecoupling.study.plan import MAKES, SUMMARIES
from nondecoupling.study.study import load_study, study_of, with_overrides
from nondecoupling.workflow import executor, graph

MAIN = {"data", "base", "sft", "sft-rl", "rl", "rl-sft"}
MADE_OF_ALL = {"theory", "claims", "tables", "report"}
ALL_GROUPS = [["main"], ["main", "sweep"], list(MAKES)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of the study nano, in a results folder of its own."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "nano"


# Parts


@pytest.mark.parametrize("groups", ALL_GROUPS)
def test_every_run_of_every_seed_waits_for_its_parents(groups):
    study = load_study("nano")
    parts = graph.parts_of(study, [0, 3], study.runs_of(*groups))
    targets = [part.target for part in parts]
    by_name = {(part.name, part.seed): part for part in parts}
    assert len(targets) == len(set(targets)) == len(by_name)
    for part in parts:
        place = targets.index(part.target)
        assert {*part.needs, *part.after} <= set(targets[:place])  # each after all that it needs
    for run in study.runs_of(*groups):
        for seed in [None] if run.once else [0, 3]:
            parents = [
                by_name[name, None if study.run(name).once else seed] for name in (run.parent, run.proxy) if name
            ]
            assert by_name[run.name, seed].needs == [parent.target for parent in parents]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["seed0/data", "seed0/base", "seed1/data", "seed1/base"]),
        (["data"], ["data", "seed0/base", "seed1/base"]),
        (["model"], ["seed0/data", "seed0/base", "seed1/data", "seed1/base"]),
        (["data", "model"], ["data", "base"]),
    ],
)
def test_what_is_there_once_is_one_part_and_what_is_drawn_is_one_for_each_seed(tmp_path, given, expected):
    study = load_study("nano", **dict.fromkeys(given, str(tmp_path)))
    parts = [part for part in graph.parts_of(study, [0, 1], study.runs_of("main")) if part.name in ("data", "base")]
    assert [part.target for part in parts] == [f"{place}/metrics.json" for place in expected]
    for part in parts:
        assert part.seed == (int(part.target[4]) if part.target.startswith("seed") else None)
        own = "data" if "data" in given else f"seed{part.seed}/data"
        assert part.needs == ([f"{own}/metrics.json"] if part.name == "base" else [])


@pytest.mark.parametrize("groups", ALL_GROUPS)
def test_summaries_wait_for_the_runs_they_read_and_the_report_for_the_claims(groups):
    study = load_study("nano")
    parts = graph.parts_of(study, [0, 1], study.runs_of(*groups))
    by_name = {part.name: part for part in parts if part.seed is None}
    for group in ("controls", "geometry"):
        assert (group in by_name) == (group in groups)
    assert "labels" not in by_name  # of studies with more than two answers
    for summary, read in SUMMARIES.items():
        runs = {run.name for run in study.runs_of(*set(groups).intersection(read))}
        if summary in by_name:
            needed = {target for target in by_name[summary].needs if target.endswith(folders.METRICS)}
            assert needed == {part.target for part in parts if part.name in runs}
            assert by_name[summary].after == ["provenance.json"]  # the tables that it reads
    others = {need for need in by_name["claims"].needs if not need.endswith(folders.METRICS)}
    assert others == {"theory.json", *(f"{group}.json" for group in ("controls", "geometry") if group in groups)}
    assert by_name["report"].needs == ["claims.json"]


def test_what_else_is_finished_for_all_seeds_belongs_to_the_study(begun, root):
    def finish(name, *seeds):
        for seed in seeds:
            folder = folders.run_folder(root, begun.run(name), seed)
            folder.mkdir(parents=True)
            folders.write_json(folder / folders.METRICS, {})
            (folder / folders.NOTEBOOK).touch()
            folders.write_hashes(folder)

    finish("sft-sft", 0, 1)
    finish("sft-again", 1)
    finish("rl-rl", 0, 1)  # without the policy that it goes on from
    assert {run.name for run in graph.runs_in(begun, [0, 1], [])} == {"data", "base", "sft", "sft-sft"}
    runs = graph.runs_in(begun, [0, 1], ["main"])
    assert {run.name for run in runs} == MAIN | {"sft-sft", "rl-rl"}
    parts = {part.name: part for part in graph.parts_of(begun, [0, 1], runs)}
    assert "seed1/sft-sft/metrics.json" in parts["controls"].needs  # which judges those that are there
    assert "geometry" not in parts


def test_recipes_carry_the_users_words_through_make_and_shell(root):
    study, words = load_study("nano"), ["--data=my data", '--set=prompt.acceptable="$HOME it\'s" # 5 % \\', "--jobs=1"]
    parts = graph.parts_of(study, [3], study.runs_of("main"))
    graph.write_settings(study, parts, [3])
    executor.write_rules(root, parts, words)
    command = ["make", "-n", "-f", executor.RULES, "study"]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=True)
    recipes = [shlex.split(line)[3:] for line in done.stdout.splitlines()]
    assert len(recipes) == len(parts)
    assert ["run", "--run", "data", "--seed", "3", *words] in recipes
    assert ["run", "--run", "sft-rl", "--seed", "3", *words] in recipes
    assert recipes[-1] == ["report", *words]


# Settings files


@pytest.fixture
def rewritten(root):
    """Write the settings files of a study's parts; returns the names of those that this has changed."""

    def write(study, seeds=(0,), groups=("main",)):
        for path in (root / "settings").glob("*.json"):
            os.utime(path, (1, 1))
        parts = graph.parts_of(study, list(seeds), study.runs_of(*groups))
        graph.write_settings(study, parts, list(seeds))
        return {path.stem for path in (root / "settings").glob("*.json") if path.stat().st_mtime != 1}

    return write


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"rl.reward": "robust"}, {"rl", "sft-rl", "theory", "claims"}),
        ({"sft.steps": 7}, {"sft", "rl-sft"}),
        ({"pretrain.steps": 7}, {"base"}),
        ({"adaptation.rank": 2}, {"sft", "sft-rl", "rl", "rl-sft"}),
        ({"data.disagreement": 0.2}, MAIN | {"theory", "claims"}),
        ({"evaluation.train_size": 5}, MAIN - {"data"}),
    ],
)
def test_a_setting_rewrites_the_files_of_the_parts_that_it_concerns(rewritten, changes, expected):
    study = load_study("nano")
    assert rewritten(study) == MAIN | MADE_OF_ALL
    assert rewritten(study_of("nano", with_overrides(study.profile, changes))) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"seeds": (0, 1)}, MADE_OF_ALL),
        ({"groups": ("main", "sweep")}, {"tables", "report"}),  # theory and claims wait for the new runs themselves
    ],
)
def test_other_seeds_and_groups_concern_what_is_made_of_all_runs(rewritten, more, expected):
    rewritten(load_study("nano"))
    new = {run.name for run in load_study("nano").runs_of("sweep")} if "groups" in more else set()
    assert rewritten(load_study("nano"), **more) - new == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("task/corpus.py", MAIN),
        ("task/seeds.py", MAIN),
        ("training/rl.py", {"rl", "sft-rl"}),
        ("analysis/identities.py", {"theory"}),
        ("pages/templates/report.css", {"report"}),
        ("study/results.py", {"tables", "theory", "claims"}),
        ("workflow/carry.py", set()),
    ],
)
def test_an_edited_file_rewrites_the_files_of_the_parts_that_it_makes(rewritten, tmp_path, monkeypatch, file, expected):
    for module in (fingerprints, graph):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / "package")
    shutil.copytree(folders.REPOSITORY / "src" / "nondecoupling", tmp_path / "package")
    rewritten(load_study("nano"))
    with (tmp_path / "package" / file).open("a") as edited:
        edited.write("# an edit\n" if file.endswith(".py") else "/* an edit */\n")
    assert rewritten(load_study("nano")) == expected


# How far a study is


@pytest.fixture
def begun(root):
    """The study nano with two seeds of sft, its settings written, and these runs newer than they are."""
    study = load_study("nano")
    graph.write_settings(study, graph.parts_of(study, [0, 1], study.runs_of("main")), [0, 1])
    for name, seed in itertools.product(("data", "base", "sft"), (0, 1)):
        folder = folders.run_folder(root, study.run(name), seed)
        folder.mkdir(parents=True)
        parents = folders.parent_hashes(study, root, study.run(name), seed)
        folders.write_json(folder / folders.METRICS, {"parents": parents})
        (folder / folders.NOTEBOOK).touch()
        folders.write_hashes(folder)
    return study


def states_in(study):
    """The words behind the first of each line."""
    return {words[0]: words[1:] for line in graph.status_lines(study, [0, 1]) if (words := line.split())}


def test_the_state_of_every_run_is_listed(root, begun):
    (root / "seed0" / "rl.partial").mkdir()
    (root / "seed1" / "rl.checkpoints").mkdir()
    (root / "seed0" / "sft-rl.failed.ipynb").write_text("{}")
    os.utime(root / "seed1" / "sft" / folders.METRICS, (1, 1))  # older than the base
    states = states_in(begun)
    expected = {"data": ["✓"] * 2, "base": ["✓"] * 2, "sft": ["✓", "~"], "rl": ["…", "…"], "sft-rl": ["✗", "·"]}
    assert expected.items() <= states.items()
    assert states["main"] == ["5", "of", "12", "make", "reproduce"]  # what is out of date is yet to be made
    assert states["controls"][-2:] == ["make", "controls"]
    first, *_, last = graph.status_lines(begun, [0, 1])
    assert first.split() == ["0", "1"]
    assert last == str(root)


def test_the_list_says_what_an_edit_or_another_parent_makes_out_of_date(root, begun):
    assert states_in(begun)["sft"] == ["✓", "✓"]
    changed = study_of("nano", with_overrides(begun.profile, {"sft.steps": 7}))
    assert (states_in(changed)["base"], states_in(changed)["sft"]) == (["✓", "✓"], ["~", "~"])
    base = root / "seed1" / "base" / folders.METRICS
    folders.write_json(base, folders.read_json(base) | {"training": {}})
    before = (root / "seed1" / "data" / folders.METRICS).stat().st_mtime_ns
    os.utime(base, ns=(before, before))
    assert (states_in(begun)["base"], states_in(begun)["sft"]) == (["✓", "✓"], ["✓", "~"])  # of that seed alone


def test_the_list_has_one_mark_for_what_is_there_once(root, tmp_path):
    marks = graph.status_lines(load_study("nano", data=str(tmp_path)), [0, 1])[1:3]
    assert [line.split() for line in marks] == [["data", "·"], ["base", "·", "·"]]


# Commands for batch systems


def test_commands_are_those_of_the_unfinished_runs_each_after_what_it_needs(root):
    study = load_study("nano")
    parts = [part for part in graph.parts_of(study, [0, 3], study.runs) if part.target.endswith(folders.METRICS)]
    lines = executor.commands_of_runs(study, [0, 3], ["--profile=nano", "--data=it's"])
    assert len(lines) == len(parts)
    for line, part in zip(lines, parts, strict=True):
        words = ["run", "--run", part.name, "--seed", str(part.seed), "--profile=nano", "--data=it's"]
        assert shlex.split(line, comments=True)[2:] == ["nondecoupling.workflow", *words]
        assert line.endswith(f"  # {study.run(part.name).group}")
    made = [part for part in parts if part.name in ("data", "base", "rl")]
    for part in made:  # as the commands would: later than the settings that they found
        (root / part.target).parent.mkdir(parents=True, exist_ok=True)
        parents = folders.parent_hashes(study, root, study.run(part.name), part.seed)
        folders.write_json(root / part.target, {"parents": parents})
        (root / part.target).with_name(folders.NOTEBOOK).touch()
    left = executor.commands_of_runs(study, [0, 3], ["--profile=nano", "--data=it's"])
    assert left == [line for line, part in zip(lines, parts, strict=True) if part not in made]


def test_a_study_of_four_answers_has_its_chapter_before_the_claims():
    study = load_study("four")
    parts = {part.name: part for part in graph.parts_of(study, [0], study.runs)}
    assert list(parts) == ["data", "base", "sft", "sft-rl", "rl", "rl-sft", "tables", "labels", "claims", "report"]
    assert parts["claims"].needs[-1] == parts["labels"].target == "labels.json"
