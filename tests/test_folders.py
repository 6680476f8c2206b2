"""Run folders: a result exists or it does not, and holds what the contract says."""

import fcntl
import os
import subprocess
from dataclasses import replace
from datetime import datetime

import pandas as pd
import pytest
from pydantic import TypeAdapter

from making import flip
from nondecoupling.study import folders, provenance
from nondecoupling.study.contracts import RunFile
from nondecoupling.study.study import load_study
from nondecoupling.workflow.executor import alone

EVALUATION = {
    "n",
    "majority_reward",
    "sft_loss",
    "sft_loss_per_token",
    "label_loss",
    "label_mass",
    "reward_exact",
    "reward_sampled",
    "reward_sampled_strict",
    "reward_greedy",
    "accuracy",
    "balanced_accuracy",
    "mcc",
    "predicted_acceptable_rate",
    "entropy",
    "kl_to_parent",
    "kl_to_base",
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The nano study, with empty results and reference folders."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path / "repository")
    return load_study("nano")


@pytest.fixture
def partial(study):
    """An empty partial folder of the run `sft`, seed 0."""
    return folders.open_run(folders.study_folder(study), study.run("sft"), 0)


def finish(study, name, seed, **evaluation):
    """Publish a run that holds metrics only."""
    root, run = folders.study_folder(study), study.run(name)
    made = folders.open_run(root, run, seed)
    provenance.write_metrics(root, made, study, run, seed, provenance.now(), {"dev": evaluation}, {})
    return folders.publish(made)


# Where results are


def test_folders(study, tmp_path, monkeypatch):
    root = folders.study_folder(study)
    assert root == tmp_path / "results" / "nano"
    assert folders.run_folder(root, study.run("sft-rl"), 3) == root / "seed3" / "sft-rl"
    for name in ("data", "base"):
        assert folders.run_folder(root, study.run(name), 3) == root / "seed3" / name
        assert folders.run_folder(root, load_study("paper").run(name), 3) == root / name  # there once
    assert folders.reference_folder(study) == tmp_path / "repository" / "results" / "reference" / "nano"
    for value in ("", None):
        monkeypatch.setenv("NONDECOUPLING_RESULTS", "") if value == "" else monkeypatch.delenv("NONDECOUPLING_RESULTS")
        assert folders.results_root() == tmp_path / "repository" / "results"


# All at once or not at all


def test_a_run_without_metrics_is_not_published(partial):
    (partial / "trajectory.csv").write_text("step\n0\n")
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        folders.publish(partial)
    assert not partial.with_name("sft").exists()


@pytest.mark.parametrize("content", ['{"status": "failed"}', "{}"])
def test_a_run_that_is_not_complete_is_not_published(partial, content):
    (partial / folders.METRICS).write_text(content)
    with pytest.raises(ValueError, match="only complete runs are published"):
        folders.publish(partial)
    assert not partial.with_name("sft").exists()


def test_a_run_with_half_written_metrics_is_not_published(partial):
    (partial / folders.METRICS).write_text('{"status": "comp')
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .*; remove .*make makes it again"):
        folders.publish(partial)
    assert not partial.with_name("sft").exists()


def test_a_partial_run_is_no_result_even_with_metrics(study, partial):
    folders.write_json(partial / folders.METRICS, {"status": "complete"})
    folder = folders.run_folder(folders.study_folder(study), study.run("sft"), 0)
    assert not folders.is_complete(folder)
    with pytest.raises(FileNotFoundError, match=f"Run 'x' needs the finished run {folder}"):
        folders.require_complete(folder, "Run 'x'")
    assert folders.publish(partial) == folder
    assert folders.require_complete(folder, "Run 'x'") == folder
    assert not partial.exists()


def test_a_new_result_replaces_the_old_one_whole(study):
    old = finish(study, "sft", 0, n=1)
    (old / "left over.txt").write_text("old")
    new = finish(study, "sft", 0, n=2)
    assert new == old
    assert folders.read_json(new / folders.METRICS)["evaluation"]["dev"]["n"] == 2
    assert {path.name for path in new.iterdir()} == {folders.METRICS, folders.HASHES}
    assert [path.name for path in new.parent.iterdir()] == ["sft"]


def test_the_old_result_stays_while_the_new_one_is_made(study):
    old = finish(study, "sft", 0, n=1)
    again = folders.open_run(folders.study_folder(study), study.run("sft"), 0)
    (again / folders.METRICS).write_text("{}")
    with pytest.raises(ValueError, match="status"):
        folders.publish(again)
    assert folders.read_json(old / folders.METRICS)["evaluation"]["dev"]["n"] == 1


def test_a_second_attempt_starts_empty(study, partial):
    (partial / "half.txt").write_text("half")
    again = folders.open_run(folders.study_folder(study), study.run("sft"), 0)
    assert again == partial
    assert list(again.iterdir()) == []


def test_a_published_result_is_newer_than_what_it_was_made_from(partial):
    folders.write_json(partial / folders.METRICS, {"status": "complete"})
    os.utime(partial / folders.METRICS, (1, 1))
    assert (folders.publish(partial) / folders.METRICS).stat().st_mtime > 1


# Damage


def a_result(partial):
    """A finished run with a file of each kind."""
    (partial / "policy").mkdir()
    (partial / "policy" / "adapter_model.safetensors").write_bytes(bytes(range(200)))
    (partial / "predictions.parquet").write_bytes(b"PAR1" * 20)
    (partial / "trajectory.csv").write_text("step,sft_loss\n0,0.5\n")
    folders.write_json(partial / folders.METRICS, {"status": "complete", "evaluation": {"dev": {"sft_loss": 0.512}}})
    return folders.publish(partial)


@pytest.mark.parametrize(
    "name", ["metrics.json", "policy/adapter_model.safetensors", "predictions.parquet", "trajectory.csv"]
)
@pytest.mark.parametrize(
    "damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.unlink()]
)
def test_a_file_that_is_not_the_runs_own_is_named(partial, name, damage):
    folder = a_result(partial)
    damage(folder / name)
    if (folder / folders.METRICS).exists():
        with pytest.raises(RuntimeError) as caught:
            folders.require_complete(folder, "Run 'x'")
        for words in (f"{folder / name} is not the file that the run wrote", f"remove {folder}", "make reproduce"):
            assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        assert not folders.is_complete(folder)


def test_another_runs_file_in_its_place_is_found_out(study, partial):
    folder = a_result(partial)
    other = finish(study, "sft", 1, n=2)
    os.replace(other / folders.METRICS, folder / folders.METRICS)
    with pytest.raises(RuntimeError, match="metrics.json is not the file that the run wrote"):
        folders.require_complete(folder, "Run 'x'")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"metrics.json": 1}', "\x00"])
def test_a_damaged_list_of_hashes_is_damage(partial, content):
    folder = a_result(partial)
    (folder / folders.HASHES).write_text(content)
    with pytest.raises(RuntimeError, match=r"is not the file that the run wrote"):
        folders.require_complete(folder, "Run 'x'")


def test_nobody_runs_a_notebook_by_hand_in_a_study_that_make_makes(study, monkeypatch):
    root, run = folders.study_folder(study), study.run("sft")
    with alone(root):
        with pytest.raises(
            RuntimeError, match=f"nano is being made by process {os.getpid()} on .*; wait for it, or stop"
        ):
            folders.open_run(root, run, 0)
        assert [path.name for path in root.rglob("*")] == [folders.LOCK]
        with monkeypatch.context() as kernel:
            kernel.setenv(folders.EXECUTED, "1")
            assert folders.open_run(root, run, 0).exists()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(fcntl, "flock", lambda *_: os.open("/", os.O_WRONLY))  # where nothing can be locked
            assert folders.open_run(root, run, 0).exists()
    assert folders.open_run(root, run, 0).exists()


def test_a_run_is_published_with_its_executed_notebook(partial, monkeypatch):
    """By make, once the notebook has ended; the kernel in which it runs leaves the run as it is until then."""
    folders.write_json(partial / folders.METRICS, {"status": "complete"})
    working = partial.with_name("sft.partial.ipynb")
    working.write_text('{"cells": []}')
    with monkeypatch.context() as kernel:
        kernel.setenv(folders.EXECUTED, "1")
        assert folders.publish(partial) == partial
        assert [path.name for path in partial.iterdir()] == [folders.METRICS]
    folder = folders.publish(partial, working)
    assert set(folders.read_json(folder / folders.HASHES)) == {folders.METRICS, folders.NOTEBOOK}
    assert [path.name for path in folder.parent.iterdir()] == ["sft"]
    (folder / folders.NOTEBOOK).write_text("{}")
    with pytest.raises(RuntimeError, match=r"notebook\.ipynb is not the file that the run wrote"):
        folders.require_complete(folder, "Run 'x'")
    (folder / folders.NOTEBOOK).unlink()
    with pytest.raises(RuntimeError, match=r"notebook\.ipynb is not the file that the run wrote"):
        folders.require_complete(folder, "Run 'x'")


def test_nothing_is_written_after_a_run_is_published(partial):
    folders.write_json(partial / folders.METRICS, {"status": "complete"})
    os.utime(partial / folders.METRICS, (1, 1))
    folder = folders.publish(partial)
    listed = folder / folders.HASHES
    assert 1 < listed.stat().st_mtime <= (folder / folders.METRICS).stat().st_mtime  # as make wants it
    assert (folder / folders.METRICS).stat().st_mtime_ns <= folder.stat().st_ctime_ns  # when it was renamed


def test_a_run_without_its_list_is_not_finished(partial):
    folder = a_result(partial)
    (folder / folders.HASHES).unlink()
    assert not folders.is_complete(folder)


# Parents


def test_a_run_says_which_parent_it_was_made_from(study):
    finish(study, "sft", 1, n=1)
    parents = folders.read_json(finish(study, "sft-rl", 1) / folders.METRICS)["parents"]
    root, run = folders.study_folder(study), study.run("sft-rl")
    assert parents == folders.parent_hashes(study, root, run, 1) == {"sft": parents["sft"]}
    finish(study, "sft", 1, n=2)
    assert folders.parent_hashes(study, root, run, 1) != parents
    assert list(folders.parent_hashes(study, root, study.run("sft-rl-proxy"), 1)) == ["sft", "reward-model"]
    assert folders.parent_hashes(study, root, study.run("rl"), 1) == {"base": None}  # not finished


# JSON


def test_json_is_written_whole_and_read_back(tmp_path):
    content = {"é": [1, 2.5, None, True], "nested": {"a": "b"}}
    folders.write_json(tmp_path / "x.json", content)
    assert folders.read_json(tmp_path / "x.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, number):
    folders.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folders.write_json(tmp_path / "x.json", {"a": number})
    assert folders.read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# The contract of a finished run


@pytest.fixture
def metrics(tiny_sft):
    return folders.read_json(tiny_sft.folder / folders.METRICS)


def test_metrics_say_what_was_run(metrics, tiny_study):
    expected = {"run": "sft", "stage": "sft", "parent": "base", "profile": "tiny", "seed": 0, "status": "complete"}
    assert expected.items() <= metrics.items()
    TypeAdapter(RunFile).validate_python(metrics)
    base = folders.study_folder(tiny_study) / "seed0" / "base" / folders.METRICS
    assert metrics["parents"] == {"base": folders.sha256(base)}


@pytest.mark.parametrize(("split", "n"), [("dev", 60), ("train", 40)])
def test_each_evaluation_has_exactly_the_contracts_numbers(metrics, split, n):
    assert set(metrics["evaluation"]) == {"dev", "train"}
    block = metrics["evaluation"][split]
    assert set(block) == EVALUATION
    assert block["n"] == n
    assert all(isinstance(value, int | float) for value in block.values())


def test_training_has_the_contracts_numbers(metrics):
    block = metrics["training"]
    assert {"steps", "wall_seconds", "peak_memory_bytes", "samples_per_second"} <= set(block)
    assert block["steps"] == 4
    assert block["wall_seconds"] > 0
    assert block["samples_per_second"] > 0
    assert block["peak_memory_bytes"] > 50e6  # bytes, not kilobytes


@pytest.mark.parametrize(
    "key",
    [
        "git_commit",
        "git_dirty",
        "profile_sha256",
        "parameters",
        "data_sha256",
        "model",
        "packages",
        "python",
        "os",
        "cpu",
        "gpu",
        "started",
        "finished",
    ],
)
def test_provenance_says_what_the_contract_asks_for(metrics, key):
    assert key in metrics["provenance"]


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ("cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: A CPU\n\nmodel\t\t: 7\n", "A CPU family 6 model 143, "),
        ("model name\t: A CPU\n", "A CPU, "),
    ],
)
def test_processors_of_one_name_are_told_apart_by_their_model(monkeypatch, known, name):
    monkeypatch.setattr(provenance.Path, "exists", lambda path: True)
    monkeypatch.setattr(provenance.Path, "read_text", lambda path: known)
    assert provenance.cpu_name() == f"{name}{os.cpu_count()} cores"


def test_provenance_holds(metrics, tiny_study):
    found = metrics["provenance"]
    assert found["parameters"] == tiny_study.profile.model_dump()
    assert found["data_sha256"] == folders.file_hashes(folders.study_folder(tiny_study) / "seed0" / "data", "*.tsv")
    assert len(found["data_sha256"]) == 2
    started, finished = (datetime.fromisoformat(found[name]) for name in ("started", "finished"))
    assert started <= finished
    assert started.tzinfo is not None
    assert {"torch", "transformers", "trl", "peft"} <= set(found["packages"])


def test_only_this_checkouts_commit_counts(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True)

    inside = tmp_path / "unpacked"
    inside.mkdir()
    monkeypatch.setattr(folders, "REPOSITORY", inside)
    unknown = {"git_commit": None, "git_dirty": None}
    assert provenance.code_version() == unknown
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "other")
    assert provenance.code_version() == unknown  # of somebody else's repository
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path)
    known = provenance.code_version()
    assert len(known["git_commit"]) == 40
    assert known["git_dirty"] is False
    (tmp_path / "new").touch()
    assert provenance.code_version()["git_dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert provenance.code_version() == unknown


def test_asking_for_the_commit_writes_nothing(tmp_path, monkeypatch):
    """A run that is killed meanwhile would leave git's lock."""
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path)
    (tmp_path / "kept").touch()
    for words in (["init", "-q"], ["add", "kept"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    os.utime(tmp_path / "kept", (1, 1))  # which git would note in its index
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    assert provenance.code_version()["git_dirty"] is False
    assert index.read_bytes() == before


def test_the_profiles_hash_tells_profiles_apart(tiny_study):
    def digest(study):
        return provenance.describe_provenance(study, study.run("sft"), provenance.now())["profile_sha256"]

    other = replace(tiny_study, profile=tiny_study.profile.model_copy(update={"seeds": "0-9"}))
    assert digest(tiny_study) == digest(replace(tiny_study, name="renamed"))
    assert digest(tiny_study) != digest(other)


def test_a_finished_run_holds_its_files(tiny_sft):
    names = {path.name for path in tiny_sft.folder.iterdir()}
    assert {folders.METRICS, folders.TRAJECTORY, "predictions.parquet", "predictions_train.parquet", "policy"} <= names
    policy = {path.name for path in (tiny_sft.folder / "policy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= policy
    assert not [name for name in policy if name.endswith((".bin", ".pt", ".pkl"))]
    assert "ref" not in policy


def test_the_trajectory_has_the_step_and_the_dev_numbers(tiny_sft):
    trajectory = pd.read_csv(tiny_sft.folder / folders.TRAJECTORY)
    assert trajectory.columns[0] == "step"
    assert set(trajectory.columns[1:]) == EVALUATION
    assert trajectory["step"].tolist() == [0, 4]
    assert trajectory.notna().all(axis=None)


def test_predictions_have_a_row_per_dev_sentence(tiny_sft):
    table = pd.read_parquet(tiny_sft.folder / folders.answers_file("dev"))
    known, found = ["sentence", "label", "source", "truth", "agreement"], ["logp_acceptable", "logp_unacceptable"]
    assert table.columns.tolist() == [*known, *found, "sampled", "greedy"]
    assert table["agreement"].tolist() == [0.9] * 60
    assert len(table) == table["sentence"].nunique() == 60
    assert (table[["logp_acceptable", "logp_unacceptable"]] <= 0).all(axis=None)
    assert len(pd.read_parquet(tiny_sft.folder / folders.answers_file("train"))) == 40


def test_metrics_follow_from_the_predictions(tiny_sft, metrics):
    table = pd.read_parquet(tiny_sft.folder / folders.answers_file("dev"))
    logp = table["logp_acceptable"].where(table["label"] == 1, table["logp_unacceptable"])
    assert metrics["evaluation"]["dev"]["sft_loss"] == pytest.approx(-logp.mean())
