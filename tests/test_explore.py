"""What the notebook ``explore`` finds, draws and counts."""

import numpy as np
import pandas as pd
import pytest
from ipywidgets import Dropdown, IntSlider, SelectMultiple
from matplotlib import pyplot as plt

from nondecoupling.analysis import geometry, theory
from nondecoupling.pages import explore
from nondecoupling.study import folders
from nondecoupling.study.plan import NAMES, STATES
from nondecoupling.study.results import PROVENANCE, read_results, write_results
from nondecoupling.study.study import load_study
from tables import odds_of, policy, results_of

STUDY = load_study("tiny")


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def nano():
    return read_results(None, folders.REPOSITORY / "results" / "reference" / "nano")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder of a study that was run here, whose tables hold a policy of the main runs and one control."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    answers = [policy(run, 0.0, [1, 0]) for run in ("rl-rl", "sft")]
    write_results(results_of(STUDY, answers, folder=tmp_path / "mine"))
    return tmp_path / "mine"


def test_own_studies_are_before_references(mine):
    studies = explore.find_studies()
    assert list(studies)[0] == explore.first_shown(studies) == "mine"
    assert list(studies)[1:] == sorted(name for name in studies if name.endswith(" (reference)"))
    found = studies["mine"]
    assert (found.study.name, found.study.profile, found.seeds) == ("mine", STUDY.profile, [0, 1, 2])
    assert found.answers_of("sft", 2)["label"].tolist() == [1, 0]
    assert explore.policies_in(found) == ["sft", "rl-rl"]  # and no other


def test_what_is_begun_replaced_or_put_aside_is_no_result(mine):
    before = explore.policies_in(explore.find_studies()["mine"])
    for name in (
        "seed0.bak/rl",
        "seed0/rl.partial",
        "seed0/rl.old",
        "seed3/sft-rl.checkpoints",
        "../other.bak/rl",
    ):
        (mine / name / folders.POLICY).mkdir(parents=True)
    studies = explore.find_studies()
    assert [name for name in studies if not name.endswith(explore.REFERENCE)] == ["mine"]
    assert explore.policies_in(studies["mine"]) == before
    assert [seed for _, seed in explore.replications_in(studies["mine"])] == [None, 0, 1, 2]
    assert list(explore.policy_folders(studies["mine"], 0)) == ["base"]


def test_where_nothing_was_run_the_embedded_studys_reference_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    studies = explore.find_studies()
    assert explore.first_shown(studies) == "nano (reference)"
    assert {"sft-rl-b1", "joint-m0.5"} <= set(explore.policies_in(studies["nano (reference)"]))


def test_a_study_of_another_version_does_not_hide_the_others(mine):
    (old := mine.with_name("old")).mkdir()
    folders.write_json(old / PROVENANCE, {"parameters": {"name": "tiny"}, "chosen": []})
    assert "mine" in explore.find_studies()


def test_a_damaged_study_does_not_hide_the_others(mine, capsys):
    with open(mine / "metrics.csv", "a", encoding="utf-8") as table:
        table.write("\n")
    assert "mine" not in explore.find_studies()
    assert "left out: " in capsys.readouterr().out


def test_controls_offer_what_the_chosen_study_has(nano, mine):
    """What was chosen stays chosen where it is there, too."""
    studies = {"nano": nano, "mine": explore.find_studies()["mine"]}
    bar = explore.control_bar(studies)
    assert (bar.study.value, bar.replication.index) == ("nano", 0)
    assert bar.replication.options == (("all", None), *((str(seed), seed) for seed in nano.seeds))
    runs = SelectMultiple(options=["sft", "sft-rl"], value=["sft", "sft-rl"])
    one = Dropdown(options=["sft"], value="sft")
    explore.offer(bar.study, runs, lambda name: explore.policies_in(studies[name]))
    explore.offer(bar.study, one, lambda name: explore.policies_in(studies[name]))
    assert set(one.options) > set(STATES)
    one.value, bar.replication.value = "sft-rl", 2
    bar.study.value = "mine"
    assert (runs.value, one.value, one.options) == (("sft",), "sft", ("sft", "rl-rl"))
    assert (bar.replication.value, len(bar.replication.options)) == (2, 4)
    bar.study.value = "nano"
    assert (runs.value, one.value, bar.replication.value) == (("sft",), "sft", 2)
    bar.replication.value = 9
    bar.study.value = "mine"
    assert (bar.replication.value, bar.replication.index) == (None, 0)


def test_reset_puts_the_bar_back(nano, mine):
    bar = explore.control_bar({"nano": nano, "mine": explore.find_studies()["mine"]})
    button, first = explore.reset_button(bar), [control.value for control in bar]
    bar.study.value, bar.replication.value, bar.disagreement.value, bar.beta.value = "mine", 2, 0.3, 2.0
    button.click()
    assert [control.value for control in bar] == first


def test_only_what_was_trained_has_a_trajectory(nano):
    assert explore.trained_in(nano)[:4] == STATES[1:]
    assert "base" not in explore.trained_in(nano)


def test_trajectories_have_a_thin_line_per_seed_and_a_thick_mean(nano):
    figure = explore.draw_trajectories(nano, ("sft", "sft-rl"), None, "sft_loss")
    lines = figure.axes[0].lines
    assert len(lines) == 2 * (len(nano.seeds) + 1)
    table = nano.trajectories.query("run == 'sft'")
    assert lines[len(nano.seeds)].get_ydata()[-1] == pytest.approx(
        table[table["step"] == table["step"].max()]["sft_loss"].mean()
    )
    assert len(explore.draw_trajectories(nano, ("sft",), 3, "mcc").axes[0].lines) == 2


def test_missing_run_is_a_sentence_in_the_picture(nano):
    figure = explore.draw_trajectories(nano, ("no-such-run",), None, "sft_loss")
    assert "no run is chosen" in figure.axes[0].get_title()


def test_square_is_where_the_closed_form_says(nano):
    measured = explore.final_states(nano)
    plane, rise = explore.draw_closed_forms(0.2, 1.0, measured).axes
    square = plane.lines[2]
    assert square.get_xdata() == pytest.approx(theory.rl_loss(0.8, 1.0))
    assert square.get_ydata() == pytest.approx(theory.rl_reward(0.8, 1.0))
    assert rise.lines[1].get_ydata() == pytest.approx(theory.rl_loss(0.8, 1.0) - theory.calibrated_loss(0.8))
    assert np.isfinite(explore.draw_closed_forms(0.0, 0.05, measured).axes[1].lines[0].get_ydata()).all()


def test_only_what_rl_made_has_a_beta(nano):
    betas = explore.final_states(nano).groupby("run")["beta"].agg(lambda beta: set(beta.dropna()))
    assert (betas["sft-rl"], betas["sft-rl-b5-half"], betas["sft"], betas["base"]) == ({0.5}, {5.0}, set(), set())


def test_measured_rises_are_those_of_the_claims(nano):
    rises = explore.rises_after_sft(explore.final_states(nano))
    once = dict.fromkeys(nano.study.profile.sweep.betas, len(nano.seeds))  # a row per seed: no halves, no controls
    assert rises["beta"].value_counts().to_dict() == once | {0.5: 2 * len(nano.seeds)}
    measured = {row["id"]: row["estimate"] for row in nano.read("claims.json")}
    own = explore.rises_after_sft(explore.final_states(nano).query("run in ['sft', 'sft-rl']"))["rise"]
    assert own.mean() == pytest.approx(measured["A1"])
    by_beta = rises.groupby("beta")["rise"].mean()
    # T4 is of the two labels, renormalised
    assert by_beta[5.0] == pytest.approx(measured["T4-b5"], abs=1e-3)


def test_a_stop_shows_what_was_earned_and_paid_up_to_there(nano, mine):
    path = geometry.ascent(nano, "plain", 3)
    for share, step in ((0.0, 0), (1.0, path.index.max())):
        figure = explore.draw_stopped(nano, 3, share)
        (here,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert (here.get_xdata()[0], here.get_ydata()[0]) == pytest.approx(tuple(path.loc[step, ["reward", "loss"]]))
    assert "(100% of the way's gain for 100% of its price)" in figure.axes[0].get_title()
    means = [geometry.ascent(nano, "plain", seed)["loss"].iloc[-1] for seed in nano.seeds]
    assert f"for {np.mean(means):+.3f} nats" in explore.draw_stopped(nano, None, 1.0).axes[0].get_title()
    with pytest.raises(ValueError, match="make geometry does"):
        explore.draw_stopped(explore.find_studies()["mine"], None, 0.5)


def test_changed_answers_are_counted_by_source(tmp_path):
    labels, sources = np.array([1, 1, 1, 0]), ["x", "x", "y", "x"]
    runs = [
        policy(run, odds_of(np.array(p), np.ones(4)), labels, [0]).assign(source=sources)
        for run, p in (("rl", [0.9, 0.9, 0.2, 0.6]), ("rl-sft", [0.8, 0.3, 0.7, 0.4]))
    ]
    found = results_of(STUDY, runs, seeds=[0])
    changed = explore.changed_answers(found, "rl", "rl-sft", 0)
    assert explore.changed_answers(found, "rl", "rl-sft", None).equals(changed)  # all, of which there is one
    assert changed["sentence"].tolist() == ["s1", "s2", "s3"]
    assert changed["now"].tolist() == ["wrong", "right", "right"]
    assert changed["p_after"].tolist() == pytest.approx([0.3, 0.7, 0.4])
    listed = explore.list_changes(changed, "x", True)
    assert listed.data["sentence"].tolist() == ["s1"]
    assert listed.caption == "1 of 1 sentences"
    assert "holds none" in explore.list_changes(changed.assign(sentence=""), "every phenomenon", False).caption
    assert explore.outcome_of_changes(changed.assign(now="right").head(1)).startswith(
        "1 became right, 0 wrong: as a coin"
    )
    many = pd.DataFrame({"now": ["right"] * 58 + ["wrong"] * 12})
    assert explore.outcome_of_changes(many).startswith("58 became right, 12 wrong: no coin's doing (p = 2e-08)")
    assert explore.outcome_of_changes(many.head(0)) == "0 became right, 0 wrong"
    counts = explore.count_changes(changed)
    assert counts.loc["x"].tolist() == [1, 1]
    assert counts.loc["y"].tolist() == [1, 0]


def test_all_replications_are_counted_together():
    runs = [
        policy(run, [[2.0, 2.0], [2.0, odds], [2.0, odds]], [1, 0]) for run, odds in (("rl", 2.0), ("rl-sft", -2.0))
    ]
    found = results_of(STUDY, runs)
    assert [len(explore.changed_answers(found, "rl", "rl-sft", seed)) for seed in (0, 1, None)] == [0, 1, 2]


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


def test_where_nothing_can_be_shown_the_reason_is(shown):
    empty = results_of(STUDY, [policy("rl", 0.0, [1])])
    explore.show_live(lambda seed: explore.changed_answers(empty, "rl", "rl-sft", seed), seed=IntSlider(1))
    assert "have no answers of" in shown[0].data
    assert "rl-sft" in shown[0].data


# A sentence under every policy


def test_a_sentence_is_judged_by_the_policies_that_are_there(nano):
    results, tokenizer, policies, seed = explore.load_policies("nano (reference)", None)
    assert (list(policies), seed) == (STATES, 0)  # the one replication whose weights are committed
    answers = {run: results.answers_of(run, 0).iloc[3] for run in STATES}
    table = explore.judge_sentence(results, tokenizer, policies, answers["sft"]["sentence"])
    assert list(table.index) == [NAMES[run] for run in STATES]
    for run in STATES:
        assert table.loc[NAMES[run], "log p(acceptable)"] == pytest.approx(answers[run]["logp_acceptable"], abs=1e-4)
        assert table.loc[NAMES[run], "greedy answer"] == answers[run]["greedy"]
    assert table.loc["base", "KL to base"] == 0
    assert table.loc["SFT", "KL to base"] == table.loc["SFT", "KL to the stage before"] > 0
    few = {run: policies[run] for run in ("base", "sft-rl")}
    alone = explore.judge_sentence(results, tokenizer, few, answers["sft"]["sentence"]).loc["SFT → RL"]
    assert alone["KL to base"] == table.loc["SFT → RL", "KL to base"]
    assert np.isnan(alone["KL to the stage before"])  # whose policy is not there


@pytest.mark.parametrize(
    ("name", "seed", "words"),
    [
        ("mine", 0, "policies of mine, replication 0."),
        ("mine", None, "policies of mine. "),
        ("nano (reference)", 4, "replication 4; those of replication 0 are there"),
    ],
)
def test_without_policies_it_says_how_to_make_them(mine, name, seed, words):
    with pytest.raises(FileNotFoundError, match="make reproduce makes them") as caught:
        explore.load_policies(name, seed)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("The kings slept.", "The kings slept."),
        ("the Kings slept at home.", "the <mark>Kings</mark> slept at home."),
        ("No xyzzy 123 & <b>", "No <mark>xyzzy</mark> <mark>123</mark> &amp; &lt;<mark>b</mark>&gt;"),
    ],
)
def test_words_outside_the_grammar_are_marked(sentence, shown):
    assert explore.marked(sentence) == shown


def test_the_grammar_knows_the_words_of_its_sentences(nano):
    sentences = nano.answers["sentence"].drop_duplicates()
    assert len(sentences) > 1000
    assert [sentence for sentence in sentences if "<mark>" in explore.marked(sentence)] == []


def test_a_judgement_shows_the_sentence_and_asks_for_one():
    content = explore.judgement("nano (reference)", None, " The  xyzzy slept.").data
    assert "The <mark>xyzzy</mark> slept." in content
    assert "never seen" in content
    assert "replication 0" in content
    assert "never seen" not in explore.judgement("nano (reference)", 0, "The king slept.").data
    with pytest.raises(ValueError, match="Type a sentence"):
        explore.judgement("nano (reference)", 0, " ")
