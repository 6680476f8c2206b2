"""What the notebook ``explore`` finds, draws and counts."""

import numpy as np
import pandas as pd
import pytest
from ipywidgets import IntSlider
from matplotlib import pyplot as plt

from nondecoupling import explore, figures, runs, theory

REFERENCE = runs.REPOSITORY / "results" / "reference" / "nano"


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def finish(root, run: str, seed: int = 0) -> None:
    folder = runs.run_folder(root, run, seed)
    folder.mkdir(parents=True)
    runs.write_json(folder / runs.METRICS, {})


def test_own_studies_stand_before_references_and_only_whole_ones_are_shown_first(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    assert explore.first_whole(explore.find_studies()) == "nano (reference)"
    for run in ("base", "rl", "sft", "sft-rl", "rl-sft-x"):
        finish(tmp_path / "mine", run)
    studies = explore.find_studies()
    assert next(iter(studies.items())) == ("mine", tmp_path / "mine")
    assert explore.first_whole(studies) == "nano (reference)"
    assert explore.runs_in(studies["mine"]) == ["base", "sft", "sft-rl", "rl", "rl-sft-x"]
    finish(tmp_path / "mine", "rl-sft")
    assert explore.first_whole(studies) == "mine"


def test_trajectories_have_a_thin_line_per_seed_and_a_thick_mean():
    figure = explore.draw_trajectories(REFERENCE, ("sft", "sft-rl"), None, "sft_loss")
    lines = figure.axes[0].lines
    assert len(lines) == 2 * (5 + 1)
    table = explore.read_trajectories(REFERENCE, ("sft",), [0, 1, 2, 3, 4])
    assert lines[5].get_ydata()[-1] == pytest.approx(table[table["step"] == table["step"].max()]["sft_loss"].mean())
    assert len(explore.draw_trajectories(REFERENCE, ("sft",), 3, "mcc").axes[0].lines) == 2


def test_missing_run_is_a_sentence_in_the_picture():
    figure = explore.draw_trajectories(REFERENCE, ("no-such-run",), None, "sft_loss")
    assert "no such run is finished" in figure.axes[0].get_title()


def test_square_stands_where_the_closed_form_says():
    measured = explore.final_states(REFERENCE)
    plane, rise = explore.draw_closed_forms(0.2, 1.0, measured).axes
    square = plane.lines[2]
    assert square.get_xdata() == pytest.approx(theory.rl_loss(0.8, 1.0))
    assert square.get_ydata() == pytest.approx(theory.rl_reward(0.8, 1.0))
    assert rise.lines[1].get_ydata() == pytest.approx(theory.rl_loss(0.8, 1.0) - theory.calibrated_loss(0.8))
    assert np.isfinite(explore.draw_closed_forms(0.0, 0.05, measured).axes[1].lines[0].get_ydata()).all()


def test_measured_rises_are_those_of_the_claims():
    rises = explore.rises_after_sft(explore.final_states(REFERENCE).query("run in ['sft', 'sft-rl']"))
    (claim,) = (row for row in runs.read_json(REFERENCE / "claims.json") if row["id"] == "A1")
    assert rises["rise"].mean() == pytest.approx(claim["estimate"])
    assert set(rises["beta"]) == {0.5}


def test_changed_answers_are_counted_by_source(tmp_path):
    for run, p in (("one", [0.9, 0.9, 0.2, 0.6]), ("two", [0.8, 0.3, 0.7, 0.4])):
        finish(tmp_path, run)
        folder = runs.run_folder(tmp_path, run, 0)
        pd.DataFrame(
            {"sentence": list("abcd"), "source": ["x", "x", "y", "x"], "label": [1, 1, 1, 0]}
            | {"logp_acceptable": np.log(p), "logp_unacceptable": np.log1p(-np.array(p))}
        ).to_parquet(folder / "predictions.parquet")
    changed = explore.changed_answers(tmp_path, "one", "two", 0)
    assert changed["sentence"].tolist() == ["b", "c", "d"]
    assert changed["now"].tolist() == ["wrong", "right", "right"]
    assert changed["p_after"].tolist() == pytest.approx([0.3, 0.7, 0.4])
    counts = explore.count_changes(changed)
    assert counts.loc["x"].tolist() == [1, 1]
    assert counts.loc["y"].tolist() == [1, 0]


@pytest.fixture
def shown(monkeypatch):
    """What has been displayed, in the order of time."""
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content)

    def display(content, display_id):
        shown.append(content)
        return Handle()

    monkeypatch.setattr(explore, "display", display)
    return shown


def test_live_output_is_drawn_again_in_its_place_when_a_control_moves(shown):
    slider = IntSlider(1)
    explore.show_live(lambda number: 10 * number, number=slider)
    slider.value = 7
    assert shown == [10, 70]


def test_where_nothing_can_be_shown_the_reason_is(shown, tmp_path):
    explore.show_live(lambda seed: explore.changed_answers(tmp_path, "rl", "rl-sft", seed), seed=IntSlider(1))
    assert "Comparing answers needs the finished run" in shown[0].data


def test_sentence_is_judged_by_the_policies_that_are_there(tiny_sft):
    root = tiny_sft.folder.parents[1]
    study, tokenizer, policies = explore.load_policies(root, 0)
    assert list(policies) == ["base", "sft"]
    predictions = runs.read_predictions(tiny_sft.folder)
    table = explore.judge_sentence(study, tokenizer, policies, predictions["sentence"].iloc[0])
    assert list(table.index) == [figures.NAMES["base"], figures.NAMES["sft"]]
    assert table.loc["SFT", "log p(acceptable)"] == pytest.approx(predictions["logp_acceptable"].iloc[0], abs=1e-4)
    assert table.loc["base", "KL to base"] == 0
    assert table.loc["SFT", "KL to base"] > 0


def test_without_policies_it_says_how_to_make_them():
    with pytest.raises(FileNotFoundError, match="make reproduce makes them"):
        explore.load_policies(REFERENCE, 0)


def test_policies_of_another_version_are_refused_in_one_sentence(tmp_path):
    for run in ("base", "sft"):
        finish(tmp_path, run)
        (runs.run_folder(tmp_path, run, 0) / runs.POLICY).mkdir()
    runs.write_json(tmp_path / "base" / runs.METRICS, {"provenance": {"parameters": {"name": "nano"}}})
    with pytest.raises(ValueError, match="another version of this artifact, make reproduce renews it"):
        explore.load_policies(tmp_path, 0)
