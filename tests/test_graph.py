"""The plan as make rules, and what is refused before a kernel starts."""

import argparse
import json
import re
import shutil

import pytest

from nondecoupling import execute, runs
from nondecoupling.profile import Study, load_study, parse_seeds, with_overrides

STAGES = {"corpus", "evaluation", "grammar", "hub", "models", "profile", "prompts", "runs", "training"}
SUMMARIES = {"claims", "corpus", "figures", "flags", "grammar", "hub", "profile", "runs", "statistics", "theory"}
MODULES = {
    "01_data": {"corpus", "grammar", "hub", "profile", "runs"},
    "02_base": STAGES | {"pretrain"},
    "03_sft": STAGES | {"flags"},
    "04_proxy": STAGES,
    "04_rl": STAGES | {"flags", "reinforcement"},
    "05_joint": STAGES | {"flags", "reinforcement", "theory"},
    "06_theory": SUMMARIES | {"sweep"},
    "06_controls": SUMMARIES | {"controls"},
    "07_claims": SUMMARIES,
}
ARGUMENTS = argparse.Namespace(profile="nano", data="", model="", set="", jobs=2)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def no_kernel(monkeypatch):
    """Any attempt to execute a notebook fails the test."""
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def write_rules(study, seeds="0", groups=("main",), arguments=ARGUMENTS):
    plan = execute.planned_runs(study, parse_seeds(seeds), groups)
    return execute.write_rules(study, plan, seeds, arguments).read_text(encoding="utf-8")


def rules_of(study, groups=("main",)):
    """Target -> prerequisites of the rules written for two seeds of ``study``."""
    text = write_rules(study, "0-1", groups)
    lines = [line.partition(": ") for line in text.splitlines() if ": " in line and not line.startswith("\t")]
    return {target: needed.split() for target, _, needed in lines}


# What a notebook is made from


def test_every_stage_has_its_notebook():
    assert {f"{name}.ipynb" for name in execute.NOTEBOOK_OF.values()} <= {
        path.name for path in execute.NOTEBOOKS.glob("*.ipynb")
    }
    assert set(execute.NOTEBOOK_OF) == set(execute.SETTINGS_OF)


@pytest.mark.parametrize("notebook", MODULES)
def test_the_modules_a_notebook_uses(notebook):
    used = execute.used_modules(execute.NOTEBOOKS / f"{notebook}.ipynb")
    assert {path.stem for path in used} == MODULES[notebook]
    assert all(path.exists() for path in used)


def test_an_edited_figure_concerns_only_the_notebooks_that_draw():
    users = {
        name
        for name in execute.NOTEBOOK_OF.values()
        if "figures" in {path.stem for path in execute.used_modules(execute.NOTEBOOKS / f"{name}.ipynb")}
    }
    assert users == {"06_theory", "06_controls", "07_claims"}


def test_imports_are_found_in_every_form():
    lines = [
        "import pandas",
        "from nondecoupling import corpus, runs as r",
        "from nondecoupling.profile import load_study",
        "def f():",
        "    from nondecoupling.theory import tilt",
        "from os import path",
        "x = 'from nondecoupling import prompts'",
    ]
    assert execute.imported_modules("\n".join(lines)) == {"corpus", "runs", "profile", "theory"}


# The rules


@pytest.mark.parametrize("groups", [["main"], ["main", "sweep"], execute.GROUPS])
def test_every_run_of_every_seed_waits_for_its_parent(results, groups):
    study = load_study("nano")
    root, rules = results / "nano", rules_of(study, groups)
    planned = [run for run in study.profile.runs if run.group in groups]
    once = [run for run in planned if run.stage == "base"]
    summaries = 3 if "controls" in groups else 2
    assert len(rules) == 2 + 2 + len(once) + (len(planned) - len(once)) * 2 + summaries
    notebooks = {"base": "02_base", "sft": "03_sft", "reward": "04_proxy", "rl": "04_rl", "joint": "05_joint"}
    for seed in (0, 1):
        for run in planned:
            needed = rules[str(runs.run_folder(root, run.name, seed) / "metrics.json")]
            before = [name for name in (run.parent, run.proxy) if name]
            expected = {str(runs.run_folder(root, name, seed) / "metrics.json") for name in before}
            assert {path for path in needed if path.endswith("metrics.json")} == expected
            settings = root / "settings" / f"{run.name}.json"
            assert str(settings) in needed
            assert {f"{notebooks[run.stage]}.ipynb", "training.py"} < set(runs.read_json(settings)["code"])
    assert str(root / "data" / "metrics.json") in rules[str(root / "base" / "metrics.json")]


@pytest.mark.parametrize("groups", [["main"], ["main", "sweep"], execute.GROUPS])
def test_summaries_wait_for_the_runs_they_read_and_the_report_for_the_claims(results, groups):
    study = load_study("nano")
    root, rules = results / "nano", rules_of(study, groups)
    has_controls = "controls" in groups
    assert (str(root / "controls.json") in rules) == has_controls
    for summary, read in execute.READS.items():
        planned = [run for run in study.profile.runs if run.group in groups and run.group in read]
        expected = {str(runs.run_folder(root, run.name, seed) / "metrics.json") for seed in (0, 1) for run in planned}
        needed = rules.get(str(root / f"{summary}.json"), [])
        if needed or summary != "controls":
            assert {path for path in needed if path.endswith("metrics.json")} == expected
    assert str(root / "theory.json") in rules[str(root / "claims.json")]
    assert (str(root / "controls.json") in rules[str(root / "claims.json")]) == has_controls
    first, *drawn_with = rules[str(root / "report.html")]
    assert first == str(root / "claims.json")
    assert {runs.Path(path).name for path in drawn_with} >= {"report.py", "report.html.j2"}
    assert rules["study"] == [str(root / "report.html")]


def test_all_prerequisites_exist_or_are_made(results):
    rules = rules_of(load_study("nano"))
    for needed in rules.values():
        for path in needed:
            assert path in rules or runs.Path(path).exists(), path


def test_the_data_run_waits_for_the_users_files(results, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "in_domain_dev.tsv").write_text("x\t1\t\tFine.\n")
    study = load_study("nano", data=str(folder))
    rules = rules_of(study)
    assert str(folder / "in_domain_dev.tsv") in rules[str(results / study.name / "data" / "metrics.json")]


@pytest.mark.parametrize("groups", [["main"], ["main", "sweep"], execute.GROUPS])
def test_every_run_is_planned_after_its_parent(groups):
    study = load_study("nano")
    planned = execute.planned_runs(study, [0, 1], groups)
    assert planned[:2] == [("data", 0), ("base", 0)]
    summaries = [name for name in execute.SUMMARIES if name != "controls" or "controls" in groups]
    assert planned[-len(summaries) :] == [(name, 0) for name in summaries]
    assert len(planned) == len(set(planned))
    for seed in (0, 1):
        for run in [run for run in study.profile.runs if run.group in groups]:
            own = (run.name, 0 if run.name in runs.SHARED_RUNS else seed)
            for before in filter(None, (run.parent, run.proxy)):
                assert planned.index((before, 0 if before in runs.SHARED_RUNS else seed)) < planned.index(own)


def test_recipes_carry_the_users_words_through_make_and_shell(results):
    words = argparse.Namespace(profile="nano", data="my data", model="", set="prompt.acceptable=$HOME'x", jobs=1)
    text = write_rules(load_study("nano"), arguments=words)
    recipe = next(line for line in text.splitlines() if "--run sft-rl" in line)
    assert "'my data'" in recipe
    assert "$$HOME" in recipe


# Settings


@pytest.mark.parametrize(
    ("changes", "rewritten"),
    [
        ({}, set()),
        ({"rl.reward": "robust"}, {"rl", "sft-rl", "theory", "claims"}),
        ({"sft.steps": 7}, {"sft", "rl-sft"}),
        ({"pretrain.max_steps": 7000}, {"base"}),
        ({"adaptation.rank": 2}, {"sft", "sft-rl", "rl", "rl-sft"}),
        ({"data.disagreement": 0.2}, {"data", "base", "sft", "sft-rl", "rl", "rl-sft", "theory", "claims"}),
        ({"evaluation.seed": 5}, {"base", "sft", "sft-rl", "rl", "rl-sft"}),
    ],
)
def test_settings_files_change_only_with_what_concerns_the_run(results, changes, rewritten):
    study = load_study("nano")
    write_rules(study)
    files = {path.stem: path for path in (results / "nano" / "settings").iterdir()}
    assert set(files) == {"data", "base", "sft", "sft-rl", "rl", "rl-sft", "theory", "claims"}
    for path in files.values():
        runs.os.utime(path, (1, 1))
    changed = Study(name="nano", profile=with_overrides(study.profile, changes))
    write_rules(changed)
    assert {stem for stem, path in files.items() if path.stat().st_mtime != 1} == rewritten


def test_other_seeds_concern_the_summaries_only(results):
    study = load_study("nano")
    write_rules(study)
    files = list((results / "nano" / "settings").iterdir())
    for path in files:
        runs.os.utime(path, (1, 1))
    write_rules(study, "0-1")
    assert {path.stem for path in files if path.stat().st_mtime != 1} == {"theory", "claims"}


@pytest.mark.parametrize("run", ["base", "sft", "rl-sft"])
def test_the_length_of_measured_answers_concerns_every_run_that_measures(run):
    """Sampled and greedy answers of every policy are cut at ``prompt.max_new_tokens``."""
    plain = load_study("nano")
    cut = Study(name="nano", profile=with_overrides(plain.profile, {"prompt.max_new_tokens": 1}))
    assert execute.relevant_settings(plain, run) != execute.relevant_settings(cut, run)


def test_overrides_of_a_run_are_in_its_settings():
    study = load_study("nano")
    plan = [
        run.model_copy(update={"overrides": {"rl.beta": 9.0}}) if run.name == "sft-rl" else run
        for run in study.profile.runs
    ]
    study = study.model_copy(update={"profile": study.profile.model_copy(update={"runs": plan})})
    assert execute.relevant_settings(study, "sft-rl")["rl"]["beta"] == 9.0
    assert execute.relevant_settings(study, "rl")["rl"]["beta"] == 0.5


# Code


def edited(notebook, folder, edit):
    """A copy in ``folder`` of a committed notebook, after ``edit`` has changed its cells."""
    content = json.loads((execute.NOTEBOOKS / notebook).read_text(encoding="utf-8"))
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
    assert (execute.code_hashes(changed) == execute.code_hashes(execute.NOTEBOOKS / "04_rl.ipynb")) == same


def forget_code():
    for function in (execute.used_modules, execute.code_hashes):
        function.cache_clear()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the package's sources, in which rules look for modules."""
    shutil.copytree(execute.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(execute, "SOURCES", tmp_path / "sources")
    yield tmp_path / "sources"
    forget_code()


def test_an_edited_module_makes_the_runs_that_use_it_stale_and_a_new_time_does_not(results, sources):
    def rewritten():
        forget_code()  # each make is a process of its own
        for path in (results / "nano" / "settings").glob("*.json"):
            runs.os.utime(path, (1, 1))
        write_rules(load_study("nano"))
        return {path.stem for path in (results / "nano" / "settings").glob("*.json") if path.stat().st_mtime != 1}

    assert rewritten() == {"data", "base", "sft", "sft-rl", "rl", "rl-sft", "theory", "claims"}
    for path in sources.glob("*.py"):
        runs.os.utime(path)
    assert rewritten() == set()
    with (sources / "figures.py").open("a") as module:
        module.write("# an edit\n")
    assert rewritten() == {"theory", "claims"}
    with (sources / "reinforcement.py").open("a") as module:
        module.write("# an edit\n")
    assert rewritten() == {"rl", "sft-rl"}


# Parameters of notebooks


@pytest.mark.parametrize("notebook", execute.NOTEBOOK_OF.values())
def test_notebooks_take_what_they_are_given(notebook):
    parameters = {"profile": "nano", "data": "", "model": "", "overrides": {"rl.beta": 0.5}}
    own = {"03_sft": {"run": "sft", "seed": 1}, "04_rl": {"run": "rl", "seed": 1}}
    own |= {"06_theory": {"seeds": "0-4"}, "06_controls": {"seeds": "0-4"}, "07_claims": {"seeds": "0-4"}}
    execute.check_parameters(execute.NOTEBOOKS / f"{notebook}.ipynb", parameters | own.get(notebook, {}))


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
        execute.check_parameters(execute.NOTEBOOKS / "03_sft.ipynb", parameters)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--run", "sft", "--profile", "nanno"], ["'nanno'", "'nano'"]),
        (["run", "--run", "sft", "--seeds", "4-0"], ["'4-0'", "0,3,7"]),
        (["run", "--run", "sft", "--set", "rl.betta=1"], ["'rl.betta'", "'rl.beta'"]),
        (["run", "--run", "sft", "--set", "rl.beta"], ["'rl.beta'", "rl.beta=0.25"]),
        (["run", "--run", "sft", "--set", "rl.beta=-1"], ["'rl.beta'", "-1"]),
        (["run", "--run", "sft-lr"], ["'sft-lr'", "'sft-rl'"]),
        (["run"], ["''", "sft-rl"]),
        (["run", "--run", "data", "--data", "/no/such/folder"], ["data.folder", "/no/such/folder"]),
        (["run", "--run", "sft", "--seed", "-1"], ["-1"]),
        (["reproduce", "--seeds", "five"], ["'five'"]),
        (["reproduce", "--set", "sft.steps=0"], ["'sft.steps'"]),
        (["list", "--seeds", "0-"], ["'0-'"]),
        (["report"], ["claims.json", "make reproduce"]),
        (["verify"], ["claims.json", "nothing to compare"]),
    ],
)
def test_a_bad_argument_is_answered_in_one_line_before_a_kernel_starts(results, no_kernel, capsys, arguments, words):
    assert execute.main(arguments) == 1
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert printed.out == ""
    assert not results.exists() or not list(results.rglob("*.ipynb"))


def test_a_good_command_reaches_the_notebook_with_its_parameters(results, monkeypatch, capsys):
    import papermill

    calls, root = [], results / load_study("nano", overrides={"rl.beta": 0.25}).name
    monkeypatch.setattr(
        papermill,
        "execute_notebook",
        lambda notebook, working, parameters, **_: (
            calls.append((notebook, parameters)),
            runs.Path(working).write_text("{}"),
            runs.run_folder(root, "sft-rl", 3).mkdir(parents=True),
        ),
    )
    command = ["run", "--run", "sft-rl", "--seed", "3", "--set", "rl.beta=0.25"]
    assert execute.main(command) == 0
    [(notebook, parameters)] = calls
    assert notebook.endswith("04_rl.ipynb")
    assert parameters == {
        "profile": "nano",
        "overrides": {"rl.beta": 0.25},
        "data": "",
        "model": "",
        "run": "sft-rl",
        "seed": 3,
    }
    assert (root / "seed3" / "sft-rl" / "notebook.ipynb").exists()
    assert capsys.readouterr().out.startswith("seed 3 · sft-rl · ")


# A notebook that fails


def test_a_failing_notebook_leaves_its_traceback_and_no_result(results, tmp_path, capsys, hand_made):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "in_domain_train.tsv").write_text("x\t1\t\tFine.\nx\tmaybe\t\tHm.\n")
    (folder / "in_domain_dev.tsv").write_text("x\t1\t\tFiner.\nx\t0\t*\tFinest fine.\n")
    command = ["run", "--run", "data", "--data", str(folder)]
    root = results / load_study("nano", data=str(folder)).name

    assert execute.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 01_data.ipynb failed: ValueError: ")
    assert f"{folder / 'in_domain_train.tsv'}, line 2" in error
    assert str(root / "data.failed.ipynb") in error
    assert [path.name for path in root.iterdir()] == ["data.failed.ipynb"]
    cells = json.loads((root / "data.failed.ipynb").read_text())["cells"]
    failures = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert failures[-1]["ename"] == "ValueError"
    assert "read_tsv" in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(failures[-1]["traceback"]))
    study = load_study("nano", data=str(folder))
    assert execute.status_lines(study, [0])[0].split()[0] == "failed"

    (folder / "in_domain_train.tsv").write_text("x\t1\t\tFine.\nx\t0\t\tHm.\n")
    assert execute.main(command) == 0
    mended = load_study("nano", data=str(folder))
    assert mended.name != study.name  # other data, another study
    assert {"metrics.json", "notebook.ipynb"} <= {path.name for path in (results / mended.name / "data").iterdir()}
    assert execute.status_lines(mended, [0])[0].split()[0] == "complete"


def test_the_state_of_every_run_is_listed(results, capsys):
    study = load_study("nano")
    root = runs.study_folder(study)
    for folder in ("data", "seed0/sft"):
        (root / folder).mkdir(parents=True)
        (root / folder / "metrics.json").write_text("{}")
    (root / "seed0" / "rl.partial").mkdir()
    (root / "seed0" / "sft-rl.failed.ipynb").write_text("{}")
    (root / "seed0" / "sft-rl-b0.5.failed.ipynb").write_text("{}")
    (root / "seed0" / "sft-rl-b0.25.partial").mkdir()
    (root / "theory.json").write_text("{}")
    assert execute.main(["list", "--seeds", "0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = {" ".join(words[1:-1]): words[0] for words in lines}
    others = {f"seed 0 · {run.name}": "missing" for run in study.runs_of("sweep") + study.runs_of("controls")}
    others |= {"seed 0 · sft-rl-b0.5": "failed", "seed 0 · sft-rl-b0.25": "interrupted"}
    del others["seed 0 · base-weak"]  # stands once, as all bases do
    assert states == others | {
        "base-weak": "missing",
        "data": "complete",
        "base": "missing",
        "seed 0 · sft": "complete",
        "seed 0 · sft-rl": "failed",
        "seed 0 · rl": "interrupted",
        "seed 0 · rl-sft": "missing",
        "theory": "complete",
        "controls": "missing",
        "claims": "missing",
    }


def test_clean_removes_this_study_only(results, capsys):
    for name in ("nano", load_study("nano", overrides={"rl.beta": 0.25}).name):
        (results / name / "data").mkdir(parents=True)
    assert execute.main(["clean", "--set", "rl.beta=0.25"]) == 0
    assert [path.name for path in results.iterdir()] == ["nano"]
    shutil.rmtree(results)


def test_a_reference_names_folders_without_their_paths():
    metrics = {
        "run": "sft",
        "provenance": {"parameters": {"data": {"folder": "/home/me/cola", "seed": 7}, "model": {"folder": None}}},
    }
    expected = {
        "run": "sft",
        "provenance": {"parameters": {"data": {"folder": "cola", "seed": 7}, "model": {"folder": None}}},
    }
    assert execute.without_paths(metrics) == expected
