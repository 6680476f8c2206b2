"""Results as tables: what is collected, what is read back to the last digit, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from nondecoupling.analysis import claims, controls, geometry, many_answers, measures
from nondecoupling.study import contracts, folders, results
from nondecoupling.study.study import load_study

REFERENCES = sorted((folders.REPOSITORY / "results" / "reference").iterdir())
SEEDS = [3, 5]
TABLES = (results.METRICS, results.TRAJECTORIES, results.ANSWERS, results.COSTS)


def answers_of(run, seed):
    rng = np.random.default_rng(len(run) + seed)
    log_odds = rng.normal(size=4)
    return pd.DataFrame(
        {
            "sentence": list("abcd"),
            "label": [1, 0, 1, 1],
            "source": "s",
            "truth": pd.array([1, 0, 0, 1], "Int64"),
            "agreement": [0.9, 0.75, 0.9, np.nan],
            "logp_acceptable": -np.log1p(np.exp(-log_odds)).astype("float32").astype(float),  # as models measure
            "logp_unacceptable": -np.log1p(np.exp(log_odds)).astype("float32").astype(float),
            "sampled": "acceptable",
            "greedy": "acceptable",
        }
    )


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study with empty run folders of the main runs, as if they had been trained."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / "results"))

    def finished(profile):
        study = load_study(profile)
        for run in study.runs_of("main"):
            for seed in SEEDS[:1] if run.once else SEEDS:
                finish(study, run, seed)
        return study

    return finished


@pytest.fixture
def study(finished):
    """The tiny study, of which every seed draws everything."""
    return finished("tiny")


def finish(study, run, seed, **changed):
    """A finished run folder with the contract's files."""
    root = folders.study_folder(study)
    folder = folders.run_folder(root, run, seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"n": 4, "sft_loss": 0.1 + seed / 3, "reward_exact": 0.5} if run.stage != "data" else {"n": 4}
    record = {
        "run": run.name,
        "stage": run.stage,
        "parent": run.parent,
        "parents": folders.parent_hashes(study, root, run, seed),
        "profile": study.profile.name,
        "study": study.name,
        "seed": None if run.once else seed,
        "status": "complete",
        "evaluation": {"dev": metrics, "train": metrics},
        "training": {"steps": 4} if run.stage in results.TRAINED else {},
        "provenance": {
            "git_commit": "c" * 40,
            "git_dirty": False,
            "parameters": study.profile.model_dump(),
            "chosen": [],
            "cpu": "one",
            "started": f"2026-01-0{1 + seed % 2}T00:00:00+00:00",
            "finished": "2026-01-03T00:00:00+00:00",
        },
    }
    folders.write_json(folder / folders.METRICS, record | changed)
    if run.stage != "data":
        answers_of(run.name, seed).to_parquet(folder / folders.answers_file("dev"))
    if run.stage in results.TRAINED:
        table = pd.DataFrame({"step": [0, 4], "sft_loss": [1 / 3, 0.1 + seed / 7]})
        table.to_csv(folder / folders.TRAJECTORY, index=False)
    folders.write_hashes(folder)


def test_runs_become_tables_and_are_read_back_to_the_last_digit(study):
    collected = results.collect(study, SEEDS, study.runs_of("main"))
    results.write_results(collected)
    read = results.read_results(study, folders.study_folder(study))
    for name in ("metrics", "trajectories", "answers"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(collected, name), check_exact=True)
    assert read.provenance | {"tables": {}} == collected.provenance
    assert set(read.provenance["tables"]) == set(TABLES)
    assert read.seeds == SEEDS
    assert (read.own, read.source) == (True, "this study's own runs")


@pytest.mark.parametrize("name", [*TABLES, results.PROVENANCE])
def test_a_damaged_table_is_named(study, name):
    results.write_results(results.collect(study, SEEDS, study.runs_of("main")))
    path = folders.study_folder(study) / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content.replace(b"3", b"4", 1), b""):
        path.write_bytes(damaged)
        if name != results.PROVENANCE or damaged != content.replace(b"3", b"4", 1):  # it is not hashed itself
            with pytest.raises(RuntimeError, match=f"{name} is not the file that was written"):
                results.read_results(study, path.parent)
    path.write_bytes(content)
    assert results.read_results(study, path.parent).seeds == SEEDS


def test_every_seed_has_a_base_of_its_own(study):
    collected = results.collect(study, SEEDS, study.runs_of("main"))
    assert collected.final("base")["sft_loss"].tolist() == [0.1 + seed / 3 for seed in SEEDS]
    assert collected.costs.query("run in ['data', 'base']")["seed"].tolist() == [*SEEDS, *SEEDS]
    assert {"seed3/data", "seed5/data", "seed3/base", "seed5/base"} <= set(collected.provenance["runs"])


def test_a_run_that_serves_all_seeds_has_rows_for_each_and_one_cost(finished):
    study = finished("paper")
    collected = results.collect(study, SEEDS, study.runs_of("main"))
    assert {"data", "base", "seed3/sft", "seed5/sft"} <= set(collected.provenance["runs"])
    base = collected.final("base")
    assert base["seed"].tolist() == SEEDS
    assert base["sft_loss"].nunique() == 1
    assert collected.final("base", "sft")["run"].tolist() == ["base", "base", "sft", "sft"]
    assert collected.final(split="train")["run"].nunique() == 5  # no data run, which is no policy
    assert collected.costs["run"].tolist().count("base") == 1
    assert collected.costs["run"].tolist().count("sft") == 2
    assert (
        collected.answers_of("base", 3)
        .drop(columns="seed")
        .equals(collected.answers_of("base", 5).drop(columns="seed"))
    )


def test_trajectories_have_run_seed_and_step(study):
    table = results.collect(study, SEEDS, study.runs_of("main")).trajectories
    assert table.columns[:3].tolist() == ["run", "seed", "step"]
    assert len(table) == 4 * 2 * 2
    assert set(table["run"]) == {"sft", "sft-rl", "rl", "rl-sft"}


def test_a_missing_run_is_named(study):
    (folders.study_folder(study) / "seed5" / "rl-sft" / folders.METRICS).unlink()
    with pytest.raises(FileNotFoundError, match=r"seed5/rl-sft, which is not there"):
        results.collect(study, SEEDS, study.runs_of("main"))


def test_a_run_beside_another_parent_than_its_own_is_refused(study):
    finish(study, study.run("sft"), 5, training={"steps": 5})
    with pytest.raises(RuntimeError, match=r"seed5/sft-rl was made from another sft than the one beside it"):
        results.collect(study, SEEDS, study.runs_of("main"))


def test_provenance_says_once_what_runs_share_and_by_run_what_differs(study):
    run = study.run("rl")
    record = folders.read_json(folders.study_folder(study) / "seed5" / "rl" / folders.METRICS)
    finish(study, run, 5, provenance=record["provenance"] | {"cpu": "another"})
    finish(study, study.run("rl-sft"), 5)
    provenance = results.collect(study, SEEDS, study.runs_of("main")).provenance
    TypeAdapter(contracts.ProvenanceFile).validate_python(provenance)
    assert provenance["parameters"] == study.profile.model_dump()
    assert provenance["shared"]["cpu"] == "one"
    by_run = provenance["runs"]
    assert by_run["seed5/rl"]["cpu"] == "another"
    assert "cpu" not in by_run["seed3/rl"]
    assert "parameters" not in by_run["seed3/rl"]
    assert by_run["seed3/sft-rl"]["parents"] == {"sft": by_run["seed3/sft"]["sha256"]}
    assert by_run["seed3/sft"]["parents"] == {"base": by_run["seed3/base"]["sha256"]}


def test_without_tables_the_reference_is_read_and_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    found = results.results_to_read(load_study("nano"), "sft", "sft-rl-b1")
    assert found.source == "the committed reference"
    assert not found.own
    before = (found.folder / "claims.json").read_bytes()
    found.write("claims.json", [])
    assert "not written" in capsys.readouterr().out
    assert (found.folder / "claims.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_the_study_is_read_where_it_has_what_is_asked_for(study):
    results.write_results(results.collect(study, SEEDS, study.runs_of("main")))
    assert results.results_to_read(study, "sft", "rl").own
    assert results.results_to_read(study, "sft", any_of=["rl-rl", "rl"]).own
    with pytest.raises(FileNotFoundError, match=r"no reference of 'tiny'.*make controls"):
        results.results_to_read(study, "sft", any_of=["rl-rl", "sft-sft"])
    with pytest.raises(FileNotFoundError, match=r"no reference of 'tiny'.*make controls"):
        results.results_to_read(study, "sft", "rl-rl")
    with pytest.raises(KeyError, match="no answers of 'rl-rl', seed 3"):
        results.results_to_read(study, "sft").answers_of("rl-rl", 3)


def test_tables_of_another_version_are_refused_in_one_sentence(study):
    results.write_results(results.collect(study, SEEDS, study.runs_of("main")))
    path = folders.study_folder(study) / results.PROVENANCE
    content = folders.read_json(path)
    content["parameters"]["rl"].pop("beta")
    folders.write_json(path, content)
    with pytest.raises(ValueError, match=r"'tiny' was made by another version.*make reproduce renews it.*rl.beta"):
        results.read_results(None, path.parent)


# What is committed


@pytest.fixture(params=REFERENCES, ids=lambda folder: folder.name)
def reference(request) -> Path:
    return request.param


def test_committed_files_keep_their_contracts(reference):
    files = {
        "claims.json": list[contracts.ClaimRow],
        "controls.json": list[contracts.ClaimRow],
        "theory.json": contracts.TheoryFile,
        "provenance.json": contracts.ProvenanceFile,
        "geometry.json": contracts.GeometryFile,
        "score.json": list[contracts.Score],
    }
    for name, kind in files.items():
        if (reference / name).exists():
            TypeAdapter(kind).validate_python(folders.read_json(reference / name))
    found = results.read_results(None, reference)
    assert found.study.name == reference.name
    assert set(found.metrics.columns[:3]) == {"run", "seed", "split"}
    assert sorted(found.metrics["seed"].unique()) == found.seeds
    assert (found.answers.groupby(["run", "seed"]).size() == found.final()["n"].iloc[0]).all()
    if not found.study.profile.data.generated:
        assert set(found.answers["sentence"]) == {""}  # their copyright is not ours


def test_committed_runs_are_beside_their_own_parents(reference):
    study, runs = results.read_results(None, reference).study, folders.read_json(reference / "provenance.json")["runs"]
    for place, entry in runs.items():
        seed, _, name = place.rpartition("/")
        for parent, digest in entry["parents"].items():
            where = parent if study.run(parent).once else f"{seed}/{parent}"
            assert digest == runs[where]["sha256"], place
        assert list(entry["parents"]) == study.run(name).parents


def test_committed_bases_of_the_main_study_are_alike_and_know_what_they_were_taught():
    found = results.read_results(None, folders.REPOSITORY / "results" / "reference" / "nano")
    base = found.final("base")
    for metric, width in (("sft_loss", 0.05), ("balanced_accuracy", 0.04)):
        assert (base[metric] - base[metric].mean()).abs().max() <= width
    assert base["label_mass"].min() > 0.99
    taught = [name for name, (low, high) in found.study.profile.pretrain.taught.items() if low != high]
    answers = found.answers[found.answers["run"] == "base"]
    for (seed, source), part in answers[answers["source"].isin(taught)].groupby(["seed", "source"]):
        assert measures.auroc(part) > 0.9, (seed, source)


def test_committed_claims_follow_from_the_committed_tables(reference):
    found = results.read_results(None, reference)
    rows = claims.judge_claims(found)
    stored = folders.read_json(reference / "claims.json")
    rows += claims.judge_theory(found, found.read("theory.json"))
    if found.read("controls.json"):
        rows += controls.judge_controls(found, rows) + controls.judge_joint(found)
    else:
        rows += controls.controls_not_run(found.study)
    if len(found.gradients):
        rows += geometry.judge_geometry(found, geometry.changes_by_start(found))
    else:
        rows += geometry.geometry_not_run(found.study)
    if found.read("labels.json"):
        rows += many_answers.judge(many_answers.by_sentence(found))
    assert [row["id"] for row in rows] == [row["id"] for row in stored]
    for fresh, old in zip(rows, stored, strict=True):
        for key, value in fresh.items():
            assert value == pytest.approx(old[key]) if isinstance(value, float | list) else value == old[key], fresh[
                "id"
            ]


def test_a_committed_reference_is_small_and_names_no_machines_path(reference):
    files = [path for path in reference.rglob("*") if path.is_file() and "policy" not in path.parts]
    assert len(files) < 38
    assert sum(path.stat().st_size for path in files) < 18e6  # most of it every answer of twenty replications
    for path in {*reference.rglob("*.json")} - {*reference.rglob("tokenizer*.json")}:
        text = path.read_text(encoding="utf-8")
        assert str(Path.home()) not in text
        assert '"/' not in text, path
        json.loads(text)
