"""The benchmark measures the real stages, says why one failed, and docs show what was measured."""

import json
import os
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from conftest import tiny
from nondecoupling.pages.documents import markdown_table
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from nondecoupling.workflow import bench


@pytest.mark.parametrize("configuration", bench.CONFIGURATIONS)
def test_every_configuration_is_measured(built_base, monkeypatch, configuration):
    """What it says of its steps is no more than what it took, and no less than a thousandth of that."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", "")  # it sets its own, which monkeypatch then takes back
    steps, start = 2, time.perf_counter()
    cost = bench.measure(tiny(), configuration, built_base / "policy", built_base.parent / "data", steps)
    took = time.perf_counter() - start
    assert took / 1000 < steps * (cost["sft_seconds_per_step"] + cost["rl_seconds_per_step"]) < took
    ours = (16, 4 * 4) if configuration != "trl's defaults" else (8, 8)
    assert (cost["sft_sentences_per_step"], cost["rl_answers_per_step"]) == ours
    assert 1e6 < cost["peak_memory_bytes"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_corpus_is_read_as_the_study_reads_it(built_base, tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("satz\turteil\nEs geht.\t1\nEs gehen.\t0\n")
    columns = {"data.columns": {"sentence": "satz", "label": "urteil"}}
    study = load_study("tiny", str(tmp_path), str(built_base / "policy"), columns)
    stage = bench.bench_stage(study, "sft", built_base / "policy", tmp_path)
    assert stage.corpus["sentence"].tolist() == ["Es geht.", "Es gehen."] * 2


@pytest.mark.parametrize(("first", "expected"), [(9.0, [1, 4]), (11.0, [1, 1])])
def test_steps_are_timed_without_the_first_run_and_only_one_where_they_are_long(first, expected):
    taken = []

    def run(steps):
        taken.append(steps)
        return first if len(taken) == 1 else 2.0 * steps

    assert bench.seconds_per_step(run, steps=4) == 2.0
    assert taken == expected


def test_evaluations_are_not_counted(monkeypatch):
    trained = SimpleNamespace(training={"wall_seconds": 10.0, "evaluation_seconds": 2.0})
    for stage in ("sft", "rl"):
        monkeypatch.setattr(f"nondecoupling.training.{stage}.train_{stage}", lambda _: trained)
    monkeypatch.setattr(bench, "short_stage", lambda *_: None)
    cost = bench.measure_ours(tiny(), None, None, 4)
    assert (cost["sft_seconds_per_step"], cost["rl_seconds_per_step"]) == (2.0, 2.0)


def test_the_median_of_the_rounds_counts_and_a_failure_is_not_hidden():
    rounds = [{"rl_seconds_per_step": x, "rl_answers_per_step": 16} for x in (0.2, 9.0, 0.1)]
    assert bench.median_of(rounds) == {
        "rl_seconds_per_step": 0.2,
        "rl_answers_per_step": 16,
        "spread": {"rl_seconds_per_step": [0.1, 9.0]},
    }
    assert bench.median_of([*rounds, {"failed": "why"}]) == {"failed": "why"}


class Obstacle:
    """Does ``function(argument)`` in a process that is given this."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("base", "limit", "why"),
    [
        (None, bench.LIMIT, "'9-bit'"),
        (Obstacle(os._exit, 9), bench.LIMIT, "killed, most likely for want of memory"),
        (Obstacle(time.sleep, 600), 2, "not done after 0 minutes"),
    ],
)
def test_a_configuration_that_fails_is_a_row_that_says_why(monkeypatch, base, limit, why):
    monkeypatch.setattr(bench, "LIMIT", limit)
    failed = bench.measured_apart(bench.measure, tiny(), "9-bit", base, None, 1)
    assert failed == {"failed": why}
    entry = {"random_weights": True, "measured": {"8-bit": failed}}
    row = bench.bench_table({"m": {"machine": "M", "memory_of": "host", "profiles": {"p": entry}}}).iloc[0]
    assert row["profile"] == "p, random weights"
    assert row[bench.SFT_COLUMN] == why


PARTS = ["data", "base", "sft", "sft-rl", "rl", "rl-sft", "tables", "theory", "claims", "report"]


def test_a_replication_runs_as_a_plain_script_of_the_notebooks_cells():
    start = time.perf_counter()
    took = bench.measured_apart(bench.seconds_of_parts, tiny(), bench.SCRIPT)
    assert list(took) == PARTS
    assert sum(took.values()) < time.perf_counter() - start
    assert min(took["base"], took["rl"]) > 0.1  # which train


def test_a_replication_runs_as_notebooks_in_the_order_of_make(monkeypatch):
    executed = []
    monkeypatch.setenv("NONDECOUPLING_RESULTS", "")
    monkeypatch.setattr(bench, "warm_kernels", nullcontext)
    monkeypatch.setattr(bench, "execute", lambda study, part, options: executed.append((part.name, options["profile"])))
    monkeypatch.setattr(bench.results, "collect", lambda *_: None)
    monkeypatch.setattr(bench.results, "write_results", lambda _: None)
    monkeypatch.setattr("nondecoupling.pages.report.write_report", lambda _: None)
    assert list(bench.seconds_of_parts(tiny(), bench.NOTEBOOKS)) == PARTS
    assert executed == [(name, "tiny") for name in PARTS if name not in ("tables", "report")]


def test_the_parts_are_a_table_that_says_what_notebooks_cost():
    parts = {bench.NOTEBOOKS: {"data": 3.0, "sft": 12.0, "spread": {}}, bench.SCRIPT: {"data": 2.0, "sft": 10.0}}
    text = bench.parts_text({"m": {"machine": "M", "profiles": {"nano": {"parts": parts}, "x": {"measured": {}}}}})
    assert text.startswith("M, one replication of `nano`: notebooks cost 25% more.")
    assert "| plain script | 2.0 | 10.0 | 12.0 |" in text
    assert bench.parts_text({}) == ""
    broken = {"nano": {"parts": parts | {bench.SCRIPT: {"failed": "why"}}}}
    text = bench.parts_text({"m": {"machine": "M", "profiles": broken}})
    assert text == "M, one replication of `nano`: plain script failed: why."


@pytest.mark.parametrize(("late", "rounds"), [(3600, bench.ROUNDS), (-1, 1)])
def test_tasks_take_turns_and_no_round_begins_late(monkeypatch, late, rounds):
    taken = []
    monkeypatch.setattr(bench, "LATE", late)
    monkeypatch.setattr(bench, "measured_apart", lambda name: taken.append(name) or {"seconds": len(taken)})
    found = bench.in_rounds({"one": ("a",), "two": ("b",)})
    assert taken == ["a", "b"] * rounds
    assert found["one"]["seconds"] == rounds  # the median of 1, 3, 5, or of 1


def test_random_weights_keep_the_shape(built_base, tmp_path):
    original = built_base / "policy"
    bench.base_with_random_weights(tiny({"model.folder": str(original)}).profile, tmp_path)
    shape, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path, original))
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert shape[name] == expected[name]
    assert (tmp_path / "tokenizer.json").read_text() == (original / "tokenizer.json").read_text()
    assert folders.file_hashes(tmp_path, "*.safetensors") != folders.file_hashes(original, "*.safetensors")


def test_the_documents_show_what_was_measured():
    text = (folders.REPOSITORY / "docs" / "paper-setting.md").read_text(encoding="utf-8")
    shown = text.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert shown.strip() == markdown_table(bench.bench_table(bench.committed_machines()))
    parts = text.partition(bench.BEGIN_PARTS)[2].partition(bench.END_PARTS)[0]
    assert parts.strip() == bench.parts_text(bench.committed_machines())


def test_docs_say_how_many_rounds_were_run():
    """Of more than one round there is a spread."""
    text = " ".join((folders.REPOSITORY / "docs" / "paper-setting.md").read_text(encoding="utf-8").split())
    assert "On the EPYC three rounds were run, on the Xeon one." in text
    assert "On the real model one round was run" in text
    for content in bench.committed_machines().values():
        several = "EPYC" in content["machine"]
        for entry in content["profiles"].values():
            assert {bool(took["spread"]) for took in entry.get("parts", {}).values()} <= {several}
            if not entry.get("parts"):
                assert not any(cost.get("spread") for cost in entry["measured"].values())
