"""The benchmark measures the real stages, and the README shows what was measured and nothing else."""

import json

import pytest

from conftest import TINY
from nondecoupling import bench, claims, reinforcement, runs
from nondecoupling.profile import load_study

README = (runs.REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study():
    return load_study("nano", overrides=TINY)


@pytest.mark.parametrize("configuration", bench.CONFIGURATIONS)
def test_every_configuration_is_measured(study, built_base, monkeypatch, configuration):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", "")  # it sets its own, which monkeypatch then takes back
    monkeypatch.setattr(
        reinforcement, "DistinctGRPOTrainer", reinforcement.DistinctGRPOTrainer
    )  # and puts a timed one there
    cost = bench.measure(study, configuration, built_base / "policy", built_base.parent / "data", steps=2)
    assert cost["sft_seconds_per_step"] > 0
    assert cost["answers_per_second"] == pytest.approx(
        cost["rl_answers_per_step"] / cost["rl_seconds_per_step"], rel=0.05
    )
    assert cost["peak_memory_bytes"] > 50e6
    if configuration != "trl's defaults":
        shares = [cost[f"rl_share_{part}"] for part in ("sampling", "reference", "gradient")]
        assert sum(shares) == pytest.approx(1, abs=0.01)
        assert min(shares) > 0


def test_a_configuration_that_fails_is_a_row_that_says_why():
    failed = bench.measured_apart(["--profile", "nanno", "--configuration", "8-bit"])
    assert failed["failed"].startswith("error: There is no profile 'nanno'")
    machine = {
        "machine": "M",
        "memory_of": "host",
        "profiles": {"p": {"random_weights": True, "measured": {"8-bit": failed}}},
    }
    row = bench.bench_table({"m": machine}).iloc[0]
    assert row["profile"] == "p, random weights"
    assert "nanno" in row[bench.SFT_COLUMN]


def test_random_weights_keep_the_shape(study, built_base, tmp_path):
    model = study.profile.model.model_copy(update={"folder": str(built_base / "policy")})
    bench.base_with_random_weights(study.profile.model_copy(update={"model": model}), tmp_path)
    shape, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, built_base / "policy"))
    assert shape["hidden_size"] == original["hidden_size"]
    assert (tmp_path / "tokenizer.json").read_text() == (built_base / "policy" / "tokenizer.json").read_text()
    assert runs.file_hashes(tmp_path, "*.safetensors") != runs.file_hashes(built_base / "policy", "*.safetensors")


def test_the_readme_shows_what_was_measured():
    shown = README.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert shown.strip() == claims.markdown_table(bench.bench_table(bench.committed_machines()))
