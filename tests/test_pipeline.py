"""The Makefile from the outside: a whole study at toy size, what a second make does, and what it says when asked."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nondecoupling import runs

RUNS = ("sft", "sft-rl", "rl", "rl-sft")
REPOSITORY = Path(__file__).resolve().parents[1]
# Toy sizes: everything runs, nothing but the answer format is learnt.
TOY = " ".join(
    [
        "data.train_size=300",
        "data.dev_size=60",
        "pretrain.corpus_size=2000",
        "pretrain.probe_size=50",
        "pretrain.probe_every=120",
        "pretrain.probe_target=0.0",
        "sft.steps=10",
        "rl.steps=2",
        "rl.prompts_per_step=2",
        "rl.answers_per_prompt=4",
        "evaluation.points=2",
        "evaluation.train_size=50",
    ]
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def toy_command(results: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Words and environment of a make command on the toy study."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment = inherited | {"NONDECOUPLING_RESULTS": str(results), "PYTHONWARNINGS": "ignore"}
    return ["make", *arguments, "SEEDS=0-1", "JOBS=2", f"SET={TOY}"], environment


def make(results: Path, *arguments: str) -> subprocess.CompletedProcess:
    command, environment = toy_command(results, *arguments)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def study(results):
    done = make(results, "reproduce")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = results.iterdir()
    return folder, done.stdout


def test_reproduce_leaves_every_result(study):
    folder, printed = study
    for seed in (0, 1):
        for run in RUNS:
            metrics = json.loads((folder / f"seed{seed}" / run / "metrics.json").read_text())
            assert (metrics["run"], metrics["seed"], metrics["status"]) == (run, seed, "complete")
            assert {path.name for path in (folder / f"seed{seed}" / run).iterdir()} >= {
                "metrics.json",
                "trajectory.csv",
                "predictions.parquet",
                "notebook.ipynb",
                "policy",
            }
    claims = json.loads((folder / "claims.json").read_text())
    assert {row["seeds"] for row in claims} == {2}
    for row in claims:
        assert f"{row['estimate']:+.3f}" in printed or row["id"].startswith("T")
    lines = re.findall(r"^\[(\d+)/12\] (.+) · (\d+):\d\d · (\d+) % done$", printed, flags=re.MULTILINE)
    assert len(lines) == 12  # data, base, four runs of two seeds, theory, claims
    assert lines[0][:2] == ("1", "data")
    assert (lines[-1][0], lines[-1][1], lines[-1][3]) == ("12", "claims", "100")
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg", ".pdf"}
    assert not [path for path in folder.rglob("*") if "partial" in path.name or "failed" in path.name]


def test_executed_notebooks_show_progress_as_lines(study):
    """A bar would stand still at 0 % in a notebook that nobody watched."""
    for run in RUNS:
        text = (study[0] / "seed0" / run / "notebook.ipynb").read_text(encoding="utf-8")
        assert " s left" in text
        assert "widget-view" not in text


def test_report_stands_beside_the_results(study):
    page = (study[0] / "report.html").read_text(encoding="utf-8")
    assert study[0].name in page
    assert "2 (0, 1)" in page  # seeds


def test_second_make_executes_nothing(results, study):
    start = time.perf_counter()
    done = make(results, "reproduce")
    assert done.returncode == 0
    assert " · " not in done.stdout
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("rewritten", "rerun"),
    [
        ("theory", {"theory", "claims"}),
        ("claims", {"claims"}),
        ("rl-sft", {"rl-sft", "theory", "claims"}),
        ("rl", {"rl", "rl-sft", "theory", "claims"}),
        ("report.html.j2", set()),  # the report, and no notebook
    ],
)
def test_edit_reruns_only_what_depends_on_it(study, rewritten, rerun):
    """What an edit rewrites is a run's settings file (tests/test_execute.py), but for the report's template."""
    edited = study[0] / "settings" / f"{rewritten}.json"
    if rewritten.endswith(".j2"):
        edited = REPOSITORY / "src" / "nondecoupling" / "templates" / rewritten
    assert edited.exists()
    rules = study[0] / "plan.mk"
    command = ["make", "-n", "-f", str(rules), "-W", str(edited), "study"]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"--run (\S+)", planned)) == rerun


def test_list_shows_every_run_complete(results, study):
    lines = make(results, "list").stdout.splitlines()
    complete = [line for line in lines if line.startswith("complete")]
    assert len(complete) == 2 + 2 * 4 + 2
    assert not [line for line in complete if "sft-rl-b" in line or "joint" in line]
    assert all(line.startswith("missing") for line in lines if line not in complete)  # make theory, make study


def test_verify_without_reference_says_so(results, study):
    done = make(results, "verify")
    assert done.returncode != 0
    assert "there is nothing to compare" in done.stderr


def execution_of(run: str, command: int) -> psutil.Process:
    """The process under ``command`` that executes the notebook of ``run``, as soon as its kernel is asked for."""
    while True:
        for process in psutil.Process(command).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[-4:-2] == ["--run", run] and process.children():
                    return process
        time.sleep(0.1)


def test_a_dask_cluster_makes_what_make_makes_though_a_worker_is_killed(study, tmp_path):
    made, folder = study[0], tmp_path / study[0].name
    for name in ("data", "base", "settings"):
        shutil.copytree(made / name, folder / name)
    command, environment = toy_command(tmp_path, "sweep", "SCHEDULER=local")
    with subprocess.Popen(
        [*command, "SEEDS=0"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as making:
        execution = execution_of("sft", making.pid)
        worker = next(parent for parent in execution.parents() if "multiprocessing" in " ".join(parent.cmdline()))
        worker.kill()
        assert psutil.wait_procs([execution], timeout=5)[0] == [execution]
        assert execution_of("sft", making.pid) != execution
        printed, complaints = making.communicate(timeout=300)
    assert making.returncode == 0, printed + complaints
    assert complaints == ""
    lines = re.findall(r"^\[\d/6\] (.+) · \d+:\d\d · \d+ % done$", printed, flags=re.MULTILINE)
    assert sorted(lines) == sorted([*(f"seed 0 · {run}" for run in RUNS), "theory", "claims"])

    for run in RUNS:
        mine, its = (root / "seed0" / run for root in (folder, made))
        metrics, same = (json.loads((path / "metrics.json").read_text())["evaluation"] for path in (mine, its))
        assert metrics == same
        assert (mine / "trajectory.csv").read_bytes() == (its / "trajectory.csv").read_bytes()
        assert runs.read_predictions(mine).equals(runs.read_predictions(its))
        weights = runs.file_hashes(mine / "policy", "*.safetensors")
        assert weights
        assert weights == runs.file_hashes(its / "policy", "*.safetensors")

    command, environment = toy_command(tmp_path, "reproduce")
    done = subprocess.run([*command, "SEEDS=0"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 of 8 notebooks to execute" in done.stdout
    assert " · " not in done.stdout


@pytest.mark.parametrize(("words", "seeds"), [([], "0-19"), (["SEEDS=3"], "3")])
def test_sweep_is_reproduce_with_more_seeds(words, seeds):
    command = ["make", "sweep", *words, "--dry-run"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "nondecoupling.execute reproduce " in printed
    assert f'--seeds "{seeds}" ' in printed


def test_help_is_the_default_and_names_every_target():
    printed = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "reproduce", "study", "sweep", "list", "lab", "test", "lint", "verify", "report", "clean"):
        assert f"make {target}" in printed


def test_clean_removes_the_study(results, study):
    assert make(results, "clean").returncode == 0
    assert not study[0].exists()


def test_ctrl_c_says_how_to_go_on_and_leaves_no_half_result(tmp_path):
    command, environment = toy_command(tmp_path, "reproduce")
    making = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # parallel tests have it ignored
    )
    while "data" not in making.stdout.readline():
        assert making.poll() is None
    while not list(tmp_path.glob("*/base.partial")):  # into the next notebook
        assert making.poll() is None
        time.sleep(0.1)
    os.killpg(making.pid, signal.SIGINT)  # what a terminal does
    _, complaints = making.communicate(timeout=60)
    assert making.returncode != 0
    assert "finished runs and checkpoints are kept, the same command goes on from there" in complaints
    assert "Traceback" not in complaints
    (folder,) = tmp_path.iterdir()
    assert (folder / "data" / "metrics.json").exists()
    assert not (folder / "base").exists()
