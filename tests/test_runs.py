"""Run folders: a result exists or it does not, and holds what the contract says."""

import json
import os
from datetime import datetime

import pandas as pd
import pytest

from nondecoupling import runs
from nondecoupling.profile import Run, load_study

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
    """A study of two runs and a sweep of one, with empty results and reference folders."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path / "repository")
    study = load_study("nano")
    kept = [run for run in study.profile.runs if run.name in ("sft", "sft-rl")]
    sweep = Run(name="sft-rl-b1", group="sweep", stage="rl", parent="sft", overrides={"rl.beta": 1.0})
    return study.model_copy(update={"profile": study.profile.model_copy(update={"runs": [*kept, sweep]})})


def finish(study, root, run, seed, **evaluation):
    """Publish a run that holds metrics only."""
    partial = runs.open_run(root, run, seed)
    runs.write_metrics(
        partial,
        study,
        run=run,
        stage="sft",
        parent="base",
        seed=seed,
        evaluation={"dev": evaluation},
        training={},
        provenance={},
    )
    return runs.publish(partial)


# Where results stand


def test_folders(study, tmp_path, monkeypatch):
    root = runs.study_folder(study)
    assert root == tmp_path / "results" / "nano"
    assert runs.run_folder(root, "sft-rl", 3) == root / "seed3" / "sft-rl"
    assert runs.run_folder(root, "data", 3) == root / "data"
    assert runs.run_folder(root, "base", 3) == root / "base"
    assert runs.reference_folder(study) == tmp_path / "repository" / "results" / "reference" / "nano"
    for value in ("", None):
        monkeypatch.setenv("NONDECOUPLING_RESULTS", "") if value == "" else monkeypatch.delenv("NONDECOUPLING_RESULTS")
        assert runs.results_root() == tmp_path / "repository" / "results"


# All at once or not at all


def test_a_run_without_metrics_is_not_published(tmp_path):
    partial = runs.open_run(tmp_path, "sft", 0)
    (partial / "trajectory.csv").write_text("step\n0\n")
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        runs.publish(partial)
    assert not (tmp_path / "seed0" / "sft").exists()


@pytest.mark.parametrize("content", ['{"status": "failed"}', "{}"])
def test_a_run_that_is_not_complete_is_not_published(tmp_path, content):
    partial = runs.open_run(tmp_path, "sft", 0)
    (partial / runs.METRICS).write_text(content)
    with pytest.raises(ValueError, match="only complete runs are published"):
        runs.publish(partial)
    assert not (tmp_path / "seed0" / "sft").exists()


def test_a_run_with_half_written_metrics_is_not_published(tmp_path):
    partial = runs.open_run(tmp_path, "sft", 0)
    (partial / runs.METRICS).write_text('{"status": "comp')
    with pytest.raises(json.JSONDecodeError):
        runs.publish(partial)
    assert not (tmp_path / "seed0" / "sft").exists()


def test_a_partial_run_is_no_result_even_with_metrics(study):
    root = runs.study_folder(study)
    partial = runs.open_run(root, "sft", 0)
    runs.write_json(partial / runs.METRICS, {"status": "complete"})
    folder = runs.run_folder(root, "sft", 0)
    assert not runs.is_complete(folder)
    assert runs.missing_runs(root, study, [0]) == [("sft", 0), ("sft-rl", 0)]
    with pytest.raises(FileNotFoundError, match=f"Run 'x' needs the finished run {folder}"):
        runs.require_complete(folder, "Run 'x'")
    assert runs.publish(partial) == folder
    assert runs.require_complete(folder, "Run 'x'") == folder
    assert runs.missing_runs(root, study, [0]) == [("sft-rl", 0)]
    assert not partial.exists()


def test_a_new_result_replaces_the_old_one_whole(study):
    root = runs.study_folder(study)
    old = finish(study, root, "sft", 0, n=1)
    (old / "left over.txt").write_text("old")
    new = finish(study, root, "sft", 0, n=2)
    assert new == old
    assert runs.read_json(new / runs.METRICS)["evaluation"]["dev"]["n"] == 2
    assert [path.name for path in new.iterdir()] == [runs.METRICS]
    assert [path.name for path in new.parent.iterdir()] == ["sft"]


def test_the_old_result_stays_while_the_new_one_is_made(study):
    root = runs.study_folder(study)
    old = finish(study, root, "sft", 0, n=1)
    partial = runs.open_run(root, "sft", 0)
    (partial / runs.METRICS).write_text("{}")
    with pytest.raises(ValueError, match="status"):
        runs.publish(partial)
    assert runs.read_json(old / runs.METRICS)["evaluation"]["dev"]["n"] == 1


def test_a_second_attempt_starts_empty(tmp_path):
    partial = runs.open_run(tmp_path, "sft", 0)
    (partial / "half.txt").write_text("half")
    again = runs.open_run(tmp_path, "sft", 0)
    assert again == partial
    assert list(again.iterdir()) == []


def test_a_published_result_is_newer_than_what_it_was_made_from(study):
    root = runs.study_folder(study)
    partial = runs.open_run(root, "sft", 0)
    runs.write_json(partial / runs.METRICS, {"status": "complete"})
    os.utime(partial / runs.METRICS, (1, 1))
    folder = runs.publish(partial)
    assert (folder / runs.METRICS).stat().st_mtime > 1


# JSON


def test_json_is_written_whole_and_read_back(tmp_path):
    content = {"é": [1, 2.5, None, True], "nested": {"a": "b"}}
    runs.write_json(tmp_path / "x.json", content)
    assert runs.read_json(tmp_path / "x.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, number):
    runs.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "x.json", {"a": number})
    assert runs.read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# What is read


def test_without_any_results_one_is_told_what_to_run(study):
    with pytest.raises(FileNotFoundError, match=r"no reference results of 'nano'.*make reproduce"):
        runs.results_to_read(study, [0])


def test_the_reference_is_read_until_all_runs_of_all_seeds_are_finished(study):
    root, reference = runs.study_folder(study), runs.reference_folder(study)
    for run, seed in (("sft", 0), ("sft-rl", 0), ("sft", 1)):
        finish(study, root, run, seed)
        finish(study, reference, run, seed)
    with pytest.raises(FileNotFoundError, match=r"for these seeds.*make reproduce"):
        runs.results_to_read(study, [0, 1])
    finish(study, reference, "sft-rl", 1)
    assert runs.results_to_read(study, [0]) == root
    assert runs.results_to_read(study, [0, 1]) == reference
    finish(study, root, "sft-rl", 1)
    assert runs.results_to_read(study, [0, 1]) == root


def test_the_sweep_is_read_only_where_it_is_finished(study):
    root, reference = runs.study_folder(study), runs.reference_folder(study)
    assert runs.missing_runs(root, study, [0, 1], "sweep") == [("sft-rl-b1", 0), ("sft-rl-b1", 1)]
    assert runs.sweep_to_read(study, [0, 1]) is None
    for seed in (0, 1):
        finish(study, reference, "sft-rl-b1", seed)
    assert runs.sweep_to_read(study, [0, 1]) == reference
    for seed in (0, 1):
        finish(study, root, "sft-rl-b1", seed)
    assert runs.sweep_to_read(study, [0, 1]) == root
    assert runs.sweep_to_read(study, [0, 1, 2]) is None
    alone = study.profile.model_copy(update={"runs": study.runs_of("main")})
    assert runs.sweep_to_read(study.model_copy(update={"profile": alone}), [0]) is None


def test_metrics_are_read_with_the_base_once_per_seed(study):
    root = runs.study_folder(study)
    finish(study, root, "base", 0, sft_loss=1.0)
    for seed in (0, 3):
        finish(study, root, "sft", seed, sft_loss=0.5 + seed)
        finish(study, root, "sft-rl", seed, sft_loss=0.7 + seed)
    table = runs.read_metrics(root, study, [0, 3])
    assert table.to_dict("list") == {
        "run": ["base", "sft", "sft-rl"] * 2,
        "seed": [0] * 3 + [3] * 3,
        "sft_loss": [1.0, 0.5, 0.7, 1.0, 3.5, 3.7],
    }


def test_trajectories_are_read_with_run_and_seed(study):
    root = runs.study_folder(study)
    for run in ("sft", "sft-rl"):
        folder = finish(study, root, run, 2)
        pd.DataFrame({"step": [0, 4], "sft_loss": [1.0, 0.5]}).to_csv(folder / runs.TRAJECTORY, index=False)
    table = runs.read_trajectories(root, study, [2])
    assert table["run"].tolist() == ["sft", "sft", "sft-rl", "sft-rl"]
    assert table["seed"].tolist() == [2] * 4
    assert table["step"].tolist() == [0, 4, 0, 4]


# The contract of a finished run


@pytest.fixture
def metrics(tiny_sft):
    return runs.read_json(tiny_sft.folder / runs.METRICS)


def test_metrics_say_what_was_run(metrics, tiny_study):
    expected = {"run": "sft", "stage": "sft", "parent": "base", "profile": "nano", "seed": 0, "status": "complete"}
    assert expected.items() <= metrics.items()
    assert {"evaluation", "training", "provenance"} <= set(metrics)


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


def test_provenance_holds(metrics, tiny_study):
    provenance = metrics["provenance"]
    assert provenance["parameters"] == tiny_study.profile.model_dump()
    assert provenance["data_sha256"] == runs.file_hashes(runs.study_folder(tiny_study) / "data", "*.tsv")
    assert len(provenance["data_sha256"]) == 2
    started, finished = (datetime.fromisoformat(provenance[name]) for name in ("started", "finished"))
    assert started <= finished
    assert started.tzinfo is not None
    assert {"torch", "transformers", "trl", "peft"} <= set(provenance["packages"])


def test_the_profiles_hash_tells_profiles_apart(tiny_study):
    def digest(study):
        return runs.describe_provenance(study, runs.now())["profile_sha256"]

    other = tiny_study.model_copy(
        update={"profile": tiny_study.profile.model_copy(update={"seeds": "0-9"})},
    )
    assert digest(tiny_study) == digest(tiny_study.model_copy(update={"name": "renamed"}))
    assert digest(tiny_study) != digest(other)


def test_a_finished_run_holds_its_files(tiny_sft):
    names = {path.name for path in tiny_sft.folder.iterdir()}
    assert {runs.METRICS, runs.TRAJECTORY, "predictions.parquet", "predictions_train.parquet", "policy"} <= names
    policy = {path.name for path in (tiny_sft.folder / "policy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= policy
    assert not [name for name in policy if name.endswith((".bin", ".pt", ".pkl"))]
    assert "ref" not in policy


def test_the_trajectory_has_the_step_and_the_dev_numbers(tiny_sft):
    trajectory = pd.read_csv(tiny_sft.folder / runs.TRAJECTORY)
    assert trajectory.columns[0] == "step"
    assert set(trajectory.columns[1:]) == EVALUATION
    assert trajectory["step"].tolist() == [0, 4]
    assert trajectory.notna().all(axis=None)


def test_predictions_have_a_row_per_dev_sentence(tiny_sft):
    table = runs.read_predictions(tiny_sft.folder)
    expected = ["sentence", "label", "source", "logp_acceptable", "logp_unacceptable", "sampled", "greedy"]
    assert table.columns.tolist() == expected
    assert len(table) == table["sentence"].nunique() == 60
    assert (table[["logp_acceptable", "logp_unacceptable"]] <= 0).all(axis=None)
    assert len(runs.read_predictions(tiny_sft.folder, "train")) == 40


def test_metrics_follow_from_the_predictions(tiny_sft, metrics):
    table = runs.read_predictions(tiny_sft.folder)
    logp = table["logp_acceptable"].where(table["label"] == 1, table["logp_unacceptable"])
    assert metrics["evaluation"]["dev"]["sft_loss"] == pytest.approx(-logp.mean())
