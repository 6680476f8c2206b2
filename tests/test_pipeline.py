"""The Makefile from the outside: a whole study of profiles/tiny.yaml, what a second make does, and what goes wrong.

One study is made, in a folder whose name is not kind to shells; what changes a study does so to a copy of it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest

from making import REPOSITORY, environment, is_over, make, place_sbatch, script_of_docs, until
from nondecoupling.study import folders
from nondecoupling.study.results import collect, read_results, write_results
from nondecoupling.study.study import load_study
from nondecoupling.task import grammar
from nondecoupling.workflow import executor, graph, reference
from nondecoupling.workflow.__main__ import main
from test_surroundings import FOREIGN

RUNS = ("sft", "sft-rl", "rl", "rl-sft")
NAME = "it's $HOME für uns"
STUDY = load_study("tiny")
SEEDS = [0, 1]
PARTS = graph.parts_of(STUDY, SEEDS, STUDY.runs_of("main"))
MADE_OF_ALL = {"provenance.json", "theory.json", "claims.json", "report.html"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / NAME


@pytest.fixture(scope="module")
def study(results, warm_server):
    """The folder of the finished study, and what make printed."""
    done = make("reproduce", "PROFILE=tiny", "JOBS=2", NONDECOUPLING_RESULTS=str(results), **warm_server)
    assert done.returncode == 0, done.stdout + done.stderr
    return results / "tiny", done.stdout


@pytest.fixture
def copied(study, tmp_path, monkeypatch):
    """A copy of the finished study, with the times of its files, in a results folder of its own."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    return shutil.copytree(study[0], tmp_path / "tiny")


# The finished study


def test_reproduce_leaves_every_result(study):
    folder, printed = study
    for seed in SEEDS:
        for run in RUNS:
            place = folder / f"seed{seed}" / run
            metrics = folders.read_json(place / "metrics.json")
            assert (metrics["run"], metrics["seed"], metrics["status"]) == (run, seed, "complete")
            kept = {"metrics.json", "trajectory.csv", "log.csv", "predictions.parquet", "notebook.ipynb", "policy"}
            assert {path.name for path in place.iterdir()} >= kept
        assert set(folders.read_json(folder / f"seed{seed}" / "base" / "metrics.json")["parents"]) == {"data"}
    first, second = (folders.file_hashes(folder / f"seed{seed}" / "data", "*.tsv") for seed in SEEDS)
    assert all(first[name] != second[name] for name in first)  # a world for each seed
    first, second = (folders.file_hashes(folder / f"seed{seed}" / "base/policy", "*.safetensors") for seed in SEEDS)
    assert first != second
    rows = folders.read_json(folder / "claims.json")
    assert {row["seeds"] for row in rows if row["id"][0] in "AB"} == {2}  # others may lack a seed in which nothing rose
    for row in rows:
        if row["id"][0] in "ABO" and row["ci95"]:
            (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['id']} ")]
            assert f"{row['estimate']:+z.3f}  [" in line
    assert read_results(None, folder).final()["run"].nunique() == 5
    assert str(folder / "report.html") in printed
    assert {path.suffix for path in (folder / "figures").glob("*.*")} == {".png", ".svg", ".pdf"}
    assert {path.name for path in (folder / "figures").rglob("portrait/*")} == {
        path.name for path in (folder / "figures").glob("*.svg")
    }
    assert not [path for path in folder.rglob("*") if re.search("partial|failed|checkpoints|tmp", path.name)]


def test_progress_is_counted_to_the_end(study):
    lines = re.findall(
        r"^\[(\d+)/14\] (.+) · (\d+):\d\d · (\d+) % done(?:, about \d+ min left)?$", study[1], flags=re.MULTILINE
    )
    assert [int(line[0]) for line in lines] == list(range(1, 15))  # data, base, four runs of two seeds, theory, claims
    names = [line[1] for line in lines]
    assert sorted(names[:-2]) == sorted(f"seed {seed} · {run}" for seed in SEEDS for run in ("data", "base", *RUNS))
    assert names[-2:] == ["theory", "claims"]
    for seed in SEEDS:
        assert names.index(f"seed {seed} · data") < names.index(f"seed {seed} · base")
    assert lines[-1][3] == "100"


def test_executed_notebooks_show_progress_as_lines(study):
    """A bar would stand still at 0 % in a notebook that nobody watched."""
    for run in RUNS:
        text = (study[0] / "seed0" / run / "notebook.ipynb").read_text(encoding="utf-8")
        assert " s left" in text
        assert "widget-view" not in text


def test_the_report_shows_the_study(study):
    page = (study[0] / "report.html").read_text(encoding="utf-8")
    assert "2 (seeds 0, 1)" in page
    assert len(re.findall(r"<img ", page)) == len(list((study[0] / "figures").glob("*.svg")))


def test_nothing_of_a_study_without_sweep_and_controls_is_the_references(study):
    folder = study[0]
    assert folders.read_json(folder / "theory.json")["sweep"] is None
    assert not (folder / "controls.json").exists()
    rows = folders.read_json(folder / "claims.json")
    others = [row for row in rows if row["id"].startswith(("T4", "K", "J"))]
    assert {row["id"][0] for row in others} == set("TKJ")
    for row in others:
        assert (row["verdict"], row["estimate"], row["ci95"], row["seeds"]) == ("not run", None, None, 0)
        assert row["note"] == ("make betas" if row["id"].startswith("T4") else "make controls")


def test_verify_without_reference_says_so(results, study):
    done = make("verify", "PROFILE=tiny", NONDECOUPLING_RESULTS=str(results))
    assert done.returncode != 0
    assert "There is no reference of 'tiny'" in done.stderr


def test_a_finished_study_becomes_the_reference_that_it_is_compared_with(copied, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- tiny: generated by make reference --> old <!-- tiny: end --> after")
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setattr(reference, "DOCUMENTS", [readme])
    rules = pd.DataFrame({"claim": ["A1"], "results_known": ["no"]})  # the checkout of this test has no history
    monkeypatch.setattr(reference, "rules_table", lambda ids, repository: rules)
    with pytest.raises(RuntimeError, match=r"has the tables of seeds \[0, 1\], not of \[0\]"):
        reference.make_reference(STUDY, [0])
    reference.make_reference(STUDY, SEEDS)
    kept = folders.reference_folder(STUDY)
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    whole = {"metrics.csv", "trajectories.csv", "answers.parquet", "costs.csv", "rules.csv", "provenance.json"}
    assert {name for name in files if "/" not in name} == whole | MADE_OF_ALL
    assert {name.partition("/")[0] for name in files if "/" in name} == {"figures", "seed0"}
    assert "seed0/base/policy/model.safetensors" in files
    drawn = {name for name in files if name.startswith("figures/")}
    assert {name for name in drawn if not name.endswith(".png")} == {"figures/portrait/experiments.svg"}
    assert {f"seed0/{run}/log.csv" for run in RUNS} < files
    assert not [name for name in files if name.endswith(("ipynb", "predictions.parquet"))]
    assert read_results(STUDY, kept).metrics.equals(read_results(STUDY, copied).metrics)
    assert re.fullmatch(r"before .*\n\| claim .*A1: .*\n\n.* after", readme.read_text(), flags=re.DOTALL)
    assert "old" not in readme.read_text()

    assert pd.read_csv(kept / "rules.csv").equals(rules)


def test_a_study_is_verified_against_its_profiles_reference(copied, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path / "checkout")
    kept = folders.reference_folder(STUDY)
    shutil.copytree(copied, kept, ignore=shutil.ignore_patterns("seed*", "base", "data"))
    assert main(["verify", "--profile=tiny"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 replications could come from the reference's 2: 21 bit-identical" in said

    changed = load_study("tiny", overrides={"rl.beta": 1.0})
    found = read_results(STUDY, copied)
    metrics = found.metrics.assign(sft_loss=found.metrics["sft_loss"] + (found.metrics["run"] == "sft-rl") * 9)
    provenance = found.provenance | {"parameters": changed.profile.model_dump()}
    folder = folders.study_folder(changed)
    write_results(replace(found, study=changed, folder=folder, metrics=metrics, provenance=provenance))
    assert main(["verify", "--profile=tiny", "--set=rl.beta=1.0"]) == 1
    printed = capsys.readouterr()
    said = " ".join(printed.out.split())
    assert "has no reference of its own. It is compared with 'tiny', from which it differs in rl.beta." in said
    assert "* sft-rl: sft_loss is" in printed.out
    assert re.fullmatch(r"error: \d+ of 21 quantities could not come from the reference's.*\n", printed.err)
    assert max(map(len, printed.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("key", "value"),
    [("parameters", {}), ("runs", {"seed0/sft-rl": {"changes": {"rl.beta": 7.0}}})],
    ids=["settings", "plan"],
)
def test_a_reference_of_other_settings_or_another_plan_is_not_compared_with(
    copied, monkeypatch, tmp_path, capsys, key, value
):
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path / "checkout")
    kept = folders.reference_folder(STUDY)
    shutil.copytree(copied, kept, ignore=shutil.ignore_patterns("seed*", "base", "data"))
    folders.write_json(kept / "provenance.json", folders.read_json(kept / "provenance.json") | {key: value})
    assert main(["verify", "--profile=tiny"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {kept} was made with other settings or by another plan than 'tiny' has now;")


def test_a_reference_names_folders_without_their_paths():
    content = {"run": "sft", "parameters": {"data": {"folder": "/home/me/cola", "seed": 7}, "model": {"folder": None}}}
    expected = {"run": "sft", "parameters": {"data": {"folder": "cola", "seed": 7}, "model": {"folder": None}}}
    assert reference.without_paths(content) == expected


def test_a_second_make_executes_nothing_and_the_list_is_complete(results, study):
    done = make("reproduce", "PROFILE=tiny", NONDECOUPLING_RESULTS=str(results))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("study 'tiny': 0 of 14 notebooks to execute")
    assert " % done" not in done.stdout
    lines = make("list", "PROFILE=tiny", NONDECOUPLING_RESULTS=str(results)).stdout.splitlines()
    states = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert states["sft"] == states["rl-sft"] == ["✓", "✓"]
    assert states["joint-m0.2"] == ["·", "·"]
    assert states["main"] == ["12", "of", "12", "complete"]
    assert states["sweep"][-2:] == ["make", "betas"]


def test_the_commands_of_a_list_are_tasks_of_a_batch_system_and_make_finds_their_runs(copied, tmp_path, warm_server):
    """The script of docs/cluster.md that needs no Dask, for one group and one seed."""
    for run in ("rl", "rl-sft"):
        shutil.rmtree(copied / "seed1" / run)
    script = script_of_docs("replications.sh")
    for theirs, ours in {"0-19": "1-1", "PROFILE=nano": "PROFILE=tiny", "| sh": "| grep '# main$' | sh"}.items():
        assert theirs in script
        script = script.replace(theirs, ours)
    (tmp_path / "replications.sh").write_text(script)
    programs = place_sbatch(tmp_path)
    surroundings = environment(**warm_server) | {"PATH": f"{programs}:{environment()['PATH']}"}
    words = ["sbatch", str(tmp_path / "replications.sh")]
    task = int(subprocess.run(words, cwd=REPOSITORY, env=surroundings, stdout=subprocess.PIPE, check=True).stdout)
    until(lambda: is_over(task), "the task ends")
    printed = (programs / "task1.log").read_text(encoding="utf-8")
    assert [line.rpartition(" · ")[0] for line in printed.splitlines()] == ["seed 1 · rl", "seed 1 · rl-sft"], printed
    assert {part.target for part in graph.stale_parts(copied, PARTS)} == MADE_OF_ALL


CONFIGURATION = (
    "c = get_config()\nc.IPKernelApp.exec_lines = ['raise SystemExit(9)', 'import torch', 'torch.tensor = None']\n"
)
TIMED = {folders.METRICS, folders.HASHES, folders.NOTEBOOK}  # say when a run was made, or hold hashes of others that do


def left_by(root: Path) -> tuple[dict, dict]:
    """All that seed 0's SFT, and what it was made from, left but times: metrics by run, other files' bytes by path."""
    places = [root / "seed0" / run for run in ("data", "base", "sft")]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and path.name not in TIMED]
    metrics = {place.name: folders.read_json(place / folders.METRICS)["evaluation"] for place in places}
    return metrics, {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_study_leaves_the_same_files_in_other_surroundings(study, tmp_path):
    """Also with another hash seed, in other processes, in a folder of another name and depth, with other JOBS."""
    home, results = tmp_path / "home" / ".ipython" / "profile_default", tmp_path / "a deeper" / "föreign"
    home.mkdir(parents=True)
    for name in ("ipython_config.py", "ipython_kernel_config.py"):
        (home / name).write_text(CONFIGURATION)
    (tmp_path / "startup.py").write_text("raise SystemExit(9)")
    user = {"IPYTHONDIR": str(home.parent), "PYTHONSTARTUP": str(tmp_path / "startup.py"), "PYTHONHASHSEED": "7"}
    words = ["reproduce", "--profile=tiny", "--seeds=0", "--jobs=1", f"--target={results}/tiny/seed0/sft/metrics.json"]
    done = subprocess.run(
        [sys.executable, "-m", "nondecoupling.workflow", *words],
        env=environment(**FOREIGN, **user, NONDECOUPLING_RESULTS=str(results)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics, files), (others, other_files) = left_by(study[0]), left_by(results / "tiny")
    assert others == metrics
    assert set(other_files) == set(files)
    assert [name for name in files if files[name] != other_files[name]] == []
    assert {"seed0/sft/policy/adapter_config.json", "seed0/sft/trajectory.csv", "seed0/sft/log.csv"} < set(files)


# What is out of date


def made_by_make(root: Path) -> list[str]:
    """The targets that make would make, in its order."""
    command = ["make", "-n", "--no-print-directory", "-f", executor.RULES, "study"]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=True)
    named = r"nondecoupling\.workflow (?:run --run )?(\S+)(?: --seed (\d+))?"
    names = [(name, int(seed) if seed else None) for name, seed in re.findall(named, done.stdout)]
    return [next(part.target for part in PARTS if (part.name, part.seed) == name) for name in names]


def newer(root: Path, name: str) -> None:
    os.utime(root / name)


def gone(root: Path, name: str) -> None:
    (root / name).unlink()


def as_old_as_its_parent(root: Path, name: str) -> None:
    (parent,) = next(part.needs for part in PARTS if part.target == name)
    shutil.copystat(root / parent, root / name)


OF_RL = {f"seed{seed}/{run}/metrics.json" for seed in SEEDS for run in ("rl", "rl-sft")}


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        (newer, "plan.mk", set()),
        (newer, "settings/rl.json", OF_RL | MADE_OF_ALL),
        (newer, "settings/theory.json", {"theory.json", "claims.json", "report.html"}),
        (newer, "settings/tables.json", {"provenance.json"}),
        (newer, "settings/report.json", {"report.html"}),
        (newer, "seed1/rl/metrics.json", {"seed1/rl-sft/metrics.json"} | MADE_OF_ALL),
        (newer, "theory.json", {"claims.json", "report.html"}),
        (as_old_as_its_parent, "seed1/rl-sft/metrics.json", set()),
        (gone, "seed0/sft-rl/metrics.json", {"seed0/sft-rl/metrics.json"} | MADE_OF_ALL),
        (gone, "seed1/rl/metrics.json", {f"seed1/{run}/metrics.json" for run in ("rl", "rl-sft")} | MADE_OF_ALL),
        (gone, "provenance.json", {"provenance.json"}),
        (gone, "claims.json", {"claims.json", "report.html"}),
    ],
)
def test_what_is_stale_is_what_make_would_make(copied, change, name, expected):
    assert graph.stale_parts(copied, PARTS) == made_by_make(copied) == []
    change(copied, name)
    assert {part.target for part in graph.stale_parts(copied, PARTS)} == set(made_by_make(copied)) == expected


def test_an_edit_makes_what_depends_on_it_and_the_list_says_so(copied):
    newer(copied, "settings/rl.json")
    states = {line.split()[0]: line.split()[1:] for line in graph.status_lines(STUDY, SEEDS) if line}
    assert states["rl"] == states["rl-sft"] == ["~", "~"]
    assert states["sft-rl"] == ["✓", "✓"]
    assert states["main"] == ["8", "of", "12", "make", "reproduce"]


def test_a_run_beside_another_parent_than_its_own_is_stale_and_in_no_table(copied, monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path / "checkout")  # where nothing must be written
    parent = copied / "seed0" / "rl" / "metrics.json"
    content = folders.read_json(parent)
    before = parent.stat().st_mtime_ns
    folders.write_json(parent, content | {"status": "complete", "training": {}})
    folders.write_hashes(parent.parent)
    os.utime(parent, ns=(before, before))  # as a copy from elsewhere may be older than what is here
    graph.write_settings(STUDY, PARTS, SEEDS)
    assert {part.target for part in graph.stale_parts(copied, PARTS)} == {"seed0/rl-sft/metrics.json"} | MADE_OF_ALL
    assert set(made_by_make(copied)) == {"seed0/rl-sft/metrics.json"} | MADE_OF_ALL
    sentence = r"seed0/rl-sft was made from another rl than the one beside it; make reproduce makes it again\."
    with pytest.raises(RuntimeError, match=sentence):
        collect(STUDY, SEEDS, STUDY.runs_of("main"))
    with pytest.raises(RuntimeError, match=sentence):
        reference.make_reference(STUDY, SEEDS)
    assert not (tmp_path / "checkout").exists()


def test_what_was_run_by_hand_is_made_again_and_no_part_of_the_study_by_itself(copied, capsys, monkeypatch):
    """Whoever runs a notebook in JupyterLab may have changed its cells, or the library."""
    for run in ("rl", "rl-sft"):  # of which the second is then of another parent
        (copied / "seed1" / run / folders.NOTEBOOK).unlink()
        folders.write_hashes(copied / "seed1" / run)
    states = {line.split()[0]: line.split()[1:] for line in graph.status_lines(STUDY, SEEDS) if line}
    assert states["rl"] == states["rl-sft"] == ["✓", "~"]
    graph.write_settings(STUDY, PARTS, SEEDS)
    again = {f"seed1/{run}/metrics.json" for run in ("rl", "rl-sft")} | MADE_OF_ALL
    assert {part.target for part in graph.stale_parts(copied, PARTS)} == set(made_by_make(copied)) == again
    assert [run.name for run in graph.runs_in(STUDY, SEEDS, [])] == ["data", "base", "sft", "sft-rl"]

    monkeypatch.setattr(executor, "run_make", lambda command, notebooks: 0)
    main(["reproduce", "--profile=tiny", f"--target={copied / 'provenance.json'}"])
    assert "made again, because somebody ran it by hand: seed 1 · rl, seed 1 · rl-sft\n" in capsys.readouterr().out
    main(["reproduce", "--profile=tiny", f"--target={copied / 'seed0' / 'rl' / 'metrics.json'}"])
    assert "by hand" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [newer, gone])
def test_verdicts_by_hand_are_judged_again(copied, capsys, monkeypatch, change):
    """Of a chapter whose rules somebody changed in JupyterLab, or of a copy without the notebook."""
    change(copied, {newer: "claims.json", gone: "claims.ipynb"}[change])
    monkeypatch.setattr(executor, "run_make", lambda command, notebooks: 0)
    for said in (True, False):  # then it is older than all that it is made from, until it is made
        main(["reproduce", "--profile=tiny", f"--target={copied / 'report.html'}"])
        assert ("because somebody ran it by hand: claims\n" in capsys.readouterr().out) == (said or change is gone)
        assert {part.target for part in graph.stale_parts(copied, PARTS)} == {"claims.json", "report.html"}


# What goes wrong, and goes on


def finished_in(printed: str) -> list[str]:
    """What was executed."""
    return re.findall(
        r"^\[\d+/\d+\] (.+) · \d+:\d\d · \d+ % done(?:, about \d+ min left)?$", printed, flags=re.MULTILINE
    )


def execution_of(run: str, command: int) -> psutil.Process:
    """The process under ``command`` that executes the notebook of ``run``, as soon as its kernel is asked for."""

    def found() -> psutil.Process | None:
        for process in psutil.Process(command).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if words[1:6] == ["-m", "nondecoupling.workflow", "run", "--run", run] and process.children():
                    return process
        return None

    return until(found, f"{run} is executed")


def test_a_failed_run_on_a_cluster_goes_on_though_a_worker_is_killed(study, copied, capfd, monkeypatch, warm_server):
    """As a study on a cluster fails: the same command goes on where it was, with what make would have made."""
    for name, address in warm_server.items():
        monkeypatch.setenv(name, address)  # carried to workers as all that begins with NONDECOUPLING_
    made, place = study[0] / "seed0" / "rl-sft", copied / "seed0" / "rl-sft"
    others = {"data", "base", "sft", "sft-rl", "rl"}
    shutil.rmtree(place)
    (copied / "seed0" / "rl" / "policy").rename(copied / "hidden")
    words = ["reproduce", "--profile=tiny", "--jobs=2", "--scheduler=local", f"--target={copied / 'provenance.json'}"]
    assert main(words) == 1
    complaints = capfd.readouterr().err
    assert "error: 03_sft.ipynb failed: " in complaints
    assert f"see {place}.failed.ipynb" in complaints
    assert "the study is not complete; what is finished is kept, and the same command goes on from there." in complaints
    assert {path.name for path in place.parent.iterdir()} == others | {"rl-sft.failed.ipynb"}

    (copied / "hidden").rename(copied / "seed0" / "rl" / "policy")
    command = ["python", "-m", "nondecoupling.workflow", *words]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as making:
        try:
            execution = execution_of("rl-sft", making.pid)
            worker = next(parent for parent in execution.parents() if "multiprocessing" in " ".join(parent.cmdline()))
            worker.kill()
            assert psutil.wait_procs([execution], timeout=30)[0] == [execution]
            assert not place.exists()  # it did not come to its end
            assert execution_of("rl-sft", making.pid) != execution
            printed, complaints = making.communicate(timeout=300)
        finally:
            making.kill()
    assert making.returncode == 0, printed + complaints
    assert complaints == ""
    assert finished_in(printed) == ["seed 0 · rl-sft"]  # the target is the tables: summaries are not asked for
    assert {path.name for path in place.parent.iterdir()} == others | {"rl-sft"}
    assert {part.target for part in graph.stale_parts(copied, PARTS)} == MADE_OF_ALL - {"provenance.json"}

    ours, its = (folders.read_json(folder / "metrics.json") for folder in (place, made))
    assert ours["evaluation"] == its["evaluation"]
    assert (place / "trajectory.csv").read_bytes() == (made / "trajectory.csv").read_bytes()
    assert folders.file_hashes(place, "*.parquet") == folders.file_hashes(made, "*.parquet")
    assert folders.file_hashes(place / "policy", "*.safetensors") == folders.file_hashes(
        made / "policy", "*.safetensors"
    )


def test_ctrl_c_says_how_to_go_on_in_a_checkout_of_any_name_on_a_task_of_ones_own(tmp_path):
    """A checkout, and a folder of data, whose paths are not kind to shells; up to ``results/.../metrics.json``."""
    checkout, data = tmp_path / NAME / "checkout", tmp_path / NAME / '40 % of #1; "mine"'
    for name in ("src", "notebooks"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, checkout / name)
    data.mkdir()
    sentences = grammar.sample_sentences(160, seed=3)
    for name, table in {"train": sentences[:120], "dev": sentences[120:]}.items():
        table[["sentence", "label"]].to_csv(data / f"{name}.tsv", sep="\t", index=False)
    words = [
        "PROFILE=tiny",
        "SEEDS=0",
        "JOBS=2",
        f"DATA={data}",
        'SET=sft.steps=2 prompt.template="{sentence} it\'s $HOME?"',
    ]
    own = {"PYTHONPATH": str(checkout / "src"), "NONDECOUPLING_RESULTS": ""}

    making = subprocess.Popen(
        ["make", "reproduce", *words],
        cwd=checkout,
        env=environment(**own),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # parallel tests have it ignored
    )
    try:
        until(lambda: making.poll() or list(checkout.glob("results/*/seed0/base.partial")), "the base is begun")
        os.killpg(making.pid, signal.SIGINT)  # what a terminal does
        printed, complaints = making.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(making.pid, signal.SIGKILL)
    assert making.returncode != 0
    assert "finished runs and checkpoints are kept, the same command goes on from there" in complaints
    assert "Traceback" not in complaints
    (folder,) = (checkout / "results").iterdir()
    assert (folder / "data" / "metrics.json").exists()
    assert not (folder / "seed0" / "base").exists()

    target = folder.relative_to(checkout) / "seed0" / "sft" / "metrics.json"
    done = make(str(target), *words, folder=checkout, **own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished_in(done.stdout) == ["seed 0 · base", "seed 0 · sft"]
    assert {path.name for path in (folder / "seed0").iterdir()} == {"base", "sft"}
    answers = pd.read_parquet(folder / "seed0" / "sft" / "predictions.parquet")
    assert set(answers["sentence"]) == set(sentences["sentence"][120:])
    metrics = folders.read_json(folder / "seed0" / "sft" / "metrics.json")
    assert metrics["provenance"]["parameters"]["data"]["folder"] == str(data)
    assert metrics["provenance"]["parameters"]["prompt"]["template"] == "{sentence} it's $HOME?"


# The last test: without the study


def test_clean_removes_the_study(results, study):
    assert make("clean", "PROFILE=tiny", NONDECOUPLING_RESULTS=str(results)).returncode == 0
    assert not study[0].exists()
