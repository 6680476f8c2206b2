"""The README's commands exist and its tables are those of the committed reference."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from nondecoupling import claims, controls, runs
from nondecoupling.profile import Study, load_study, parse_overrides, parse_seeds
from test_pipeline import TOY

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
REFERENCES = REPOSITORY / "results" / "reference"
# Enough for RL to gain something: notebook 6 judges shares of that gain.
LEARNS = "sft.steps=30 rl.steps=8 rl.prompts_per_step=16"
OPTIONS = {"RANDOM_WEIGHTS", "PROFILE", "SEEDS", "DATA", "MODEL", "SET", "JOBS", "SCHEDULER"}


def test_readme_shows_the_main_commands():
    assert {"make reproduce", "make lab", "make test", "make verify", "make list"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command):
    """Make accepts the target (its recipe is tested in test_pipeline.py); options name real settings and seeds."""
    words = shlex.split(command)
    assert words[0] == "make"
    subprocess.run([*words, "--dry-run"], cwd=REPOSITORY, check=True, capture_output=True)
    options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    assert set(options) <= OPTIONS
    parse_seeds(options.get("SEEDS", "0"))
    load_study(options.get("PROFILE", "nano"), overrides=parse_overrides(options.get("SET", "")))


@pytest.mark.parametrize(("gpu", "profile", "jobs"), [(True, "paper", "1"), (False, "nano", "[0-9]+")])
def test_a_gpu_selects_the_papers_setting(tmp_path, gpu, profile, jobs):
    """Without PROFILE; the driver's own tool says whether there is a GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nexit {0 if gpu else 1}\n")
    tool.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PROFILE", "JOBS", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "reproduce", "--dry-run"],
        cwd=REPOSITORY,
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert re.search(rf'--profile "{profile}" .* --jobs {jobs}$', done.stdout, flags=re.MULTILINE)


def test_worked_example_of_another_task_runs(tmp_path):
    """The README's own code and command, at toy size and for one seed."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    shown = README.partition("```text\n")[2].partition("```")[0]
    assert (tmp_path / "my-task" / "dev.tsv").read_text(encoding="utf-8").startswith(shown)
    (command,) = (shlex.split(line) for line in COMMANDS if "DATA=my-task" in line)
    changed = {"DATA=my-task": f"DATA={tmp_path / 'my-task'}", "SEEDS=0-1": "SEEDS=0"}
    words = [changed.get(word, f"{word} {TOY} {LEARNS}" if word.startswith("SET=") else word) for word in command]
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment = inherited | {"NONDECOUPLING_RESULTS": str(tmp_path / "results"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*words, "JOBS=2"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "results").iterdir()
    metrics = runs.read_json(folder / "seed0" / "sft" / runs.METRICS)
    assert metrics["provenance"]["parameters"]["prompt"]["template"] == "Is this a question?\n\n{sentence}"
    assert metrics["evaluation"]["dev"]["n"] == 1000
    assert set(runs.read_predictions(folder / "seed0" / "sft")["greedy"]) <= {"yes", "no"}
    assert "my-task" in (folder / "report.html").read_text(encoding="utf-8")


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


@pytest.fixture(params=sorted(path.name for path in REFERENCES.iterdir()))
def reference(request):
    """Each committed reference: its study, its folder, and its final metrics."""
    folder = REFERENCES / request.param
    written = runs.read_json(folder / "base" / runs.METRICS)
    study = Study(name=request.param, profile=load_study(written["profile"]).profile)
    seeds = sorted(int(path.name.removeprefix("seed")) for path in folder.glob("seed*"))
    return study, folder, runs.read_metrics(folder, study, seeds)


def test_tables_are_those_of_the_reference(reference):
    study, folder, metrics = reference
    rows = runs.read_json(folder / "claims.json")
    begin, end = f"<!-- {study.name}: generated by make reference -->", f"<!-- {study.name}: end -->"
    shown = README.partition(begin)[2].partition(end)[0]
    sweep = runs.read_json(folder / "theory.json")["sweep"]
    assert shown.strip() == claims.readme_tables(rows, metrics, sweep)


def seeds_of(metrics):
    return sorted(metrics["seed"].unique().tolist())


def has_controls(study, folder, metrics):
    return bool(study.runs_of("controls")) and not runs.missing_runs(folder, study, seeds_of(metrics), "controls")


def test_controls_are_those_of_the_reference(reference):
    study, folder, metrics = reference
    begin, end = (
        f"<!-- {study.name}, controls: generated by make reference -->",
        f"<!-- {study.name}, controls: end -->",
    )
    assert (begin in README) == has_controls(study, folder, metrics)
    if begin in README:
        shown = README.partition(begin)[2].partition(end)[0]
        final = runs.read_metrics(folder, study, seeds_of(metrics), group="controls")
        assert shown.strip() == claims.readme_controls(runs.read_json(folder / "claims.json"), final)


def test_claims_of_the_reference_follow_from_its_metrics(reference):
    study, reference, metrics = reference
    judged = claims.judge_claims(
        metrics,
        claims.predictions_of_theory(study, reference, metrics),
        claims.predictions_from_policies(study, reference, metrics),
    )
    judged += claims.judge_theory(runs.read_json(reference / "theory.json"), metrics)
    if has_controls(study, reference, metrics):
        final = pd.concat([metrics, runs.read_metrics(reference, study, seeds_of(metrics), group="controls")])
        paths = runs.read_trajectories(reference, study, seeds_of(metrics))
        joint = [entry.name for entry in study.runs_of("controls") if entry.stage == "joint"]
        judged += controls.judge_controls(study, reference, judged, final, paths)
        judged += controls.judge_joint(reference, final, joint)
    for fresh, stored in zip(judged, runs.read_json(reference / "claims.json"), strict=True):
        assert fresh["verdict"] == stored["verdict"]
        assert fresh["estimate"] == pytest.approx(stored["estimate"])
        assert fresh["predicted"] == pytest.approx(stored["predicted"])
        assert fresh["ci95"] == pytest.approx(stored["ci95"])


def test_the_errors_it_explains_are_those_of_the_code():
    explained = re.findall(r"^\* \*\*\"(.+?)\"\*\*", README, flags=re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src" / "nondecoupling").glob("*.py"))
    code = re.sub(r'"\n\s+f?"', "", code)  # literals that continue on the next line
    assert len(explained) >= 8
    assert [words for words in explained if words not in code] == []
