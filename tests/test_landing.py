"""Where RL was to land and where it did, what decoding gets, theory.json, and the identities: all on known policies."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from nondecoupling.analysis import identities, landing, sweep, theory
from nondecoupling.study.contracts import Payer, TheoryFile, Tilt
from nondecoupling.study.plan import STATES
from nondecoupling.study.study import load_study
from tables import SEEDS, is_a, metrics_of, odds_of, policy, results_of

LABELS = np.array([1, 0, 1, 1])
P = {"base": 0.6, "sft": 0.75, "sft-rl": 0.9, "rl": 0.8, "rl-sft": 0.75}  # of the right label, of every sentence
BETA = 0.5
STUDY = load_study("nano", overrides={"rl.beta": BETA})


def constant(study=STUDY, changes=None, **more):
    """Results in which each policy is as sure of the right label of every sentence."""
    p = P | (changes or {})
    return results_of(study, [policy(run, odds_of(p[run], LABELS), LABELS, **more) for run in STATES])


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(identities, "PROBLEMS", 50)


def point(p):
    return {"loss": pytest.approx(-math.log(p)), "reward": pytest.approx(2 * p - 1)}


def sharper(p, by):
    """The probability whose log-odds are larger ``by`` that many."""
    return float(expit(logit(p) + by))


# Landings


def test_landings_by_hand():
    records = landing.landings(constant())
    assert [(record["run"], record["parent"], record["seed"]) for record in records] == [
        ("sft-rl", "sft", seed) for seed in SEEDS
    ] + [("rl", "base", seed) for seed in SEEDS]
    after_sft, after_base = records[0], records[-1]
    assert (after_sft["start"], after_sft["measured"]) == (point(0.75), point(0.9))
    # annotators agree with the truth in nine of ten cases: the right label earns 0.8 and the wrong one -0.8
    assert after_sft["tilted"] == point(sharper(0.75, 1.6 / BETA))
    # the policy believes that 0.75 of them do
    assert after_sft["self_tilted"] == point(sharper(0.75, 1.0 / BETA))
    assert (after_base["start"], after_base["measured"]) == (point(0.6), point(0.8))
    assert after_base["tilted"] == point(sharper(0.6, 1.6 / BETA))
    assert after_base["self_tilted"] == point(sharper(0.6, 0.4 / BETA))


def test_a_tilt_by_the_truth_does_not_follow_a_label_that_contradicts_it():
    contradicted = constant(truth=1 - LABELS)
    assert landing.landings(contradicted)[0]["tilted"] == point(sharper(0.75, -1.6 / BETA))


def test_a_tilt_by_the_truth_is_each_sentences_own():
    tilted = landing.landings(constant(agreement=[0.9, 0.9, 0.6, 0.6]))[0]["tilted"]
    ends = np.array([sharper(0.75, 1.6 / BETA), sharper(0.75, 0.4 / BETA)])
    assert tilted == {"loss": pytest.approx(-np.log(ends).mean()), "reward": pytest.approx((2 * ends - 1).mean())}


# Sentence by sentence

Q = [0.9, 0.6, 0.9, 0.6]
START = [0.75, 0.75, 0.25, 0.75]  # of the label, before RL


def moved(shift, q=Q, start=START, seeds=SEEDS, study=STUDY):
    """RL from a start that gives the labels ``start``: in seed k it moves each label's log-odds by ``shift[k]``."""
    side = np.where(LABELS == 1, 1, -1)
    after = side * (logit(start) + np.asarray(shift))
    runs = {"base": odds_of(start, LABELS), "sft": odds_of(start, LABELS), "sft-rl": after, "rl": after}
    return results_of(study, [policy(run, x, LABELS, seeds, agreement=q) for run, x in runs.items()], seeds=seeds)


def test_who_pays_by_hand():
    shift = np.array([[1.0, 2.0, -1.0, 2.0], [1.0, 2.0, -1.0, 3.0], [1.0, 2.0, -1.0, 4.0]])
    sure, contested = landing.who_pays(moved(shift))
    assert is_a(list[Payer], [sure, contested])
    assert [(row["q"], row["share"]) for row in (sure, contested)] == [(0.9, 0.5), (0.6, 0.5)]
    rise = [[math.log(start / sharper(start, by)) for start, by in zip(START, row, strict=True)] for row in shift]
    first, second = np.array(rise)[:, [0, 2]].mean(1), np.array(rise)[:, [1, 3]].mean(1)
    assert sure["measured"]["mean"] == pytest.approx(first.mean())
    assert contested["measured"]["mean"] == pytest.approx(second.mean())
    assert contested["measured"]["ci95"] == pytest.approx(stats.ttest_1samp(second, 0).confidence_interval())
    up, down = (math.log(p / sharper(p, by / BETA)) for p, by in ((0.75, 1.0), (0.25, -1.0)))
    assert (sure["own_belief"], contested["own_belief"]) == pytest.approx(((up + down) / 2, up))
    assert contested["gap_to_own_belief"]["mean"] == pytest.approx(second.mean() - up)
    for row, q in ((sure, 0.9), (contested, 0.6)):
        assert row["perfect_learner"] == pytest.approx(theory.rl_loss(q, BETA) - theory.calibrated_loss(q))


def test_nobody_is_said_to_pay_where_disagreement_is_unknown_or_kl_costs_nothing():
    assert landing.who_pays(moved(np.ones(4), q=np.nan)) == []
    free = moved(np.ones(4), study=load_study("nano", overrides={"rl.beta": 0.0}))
    assert (landing.who_pays(free), landing.tilt_calibration(free)) == ([], [])


def test_a_closed_form_has_slope_one_and_half_of_it_one_half():
    ideal = np.array([1, 1, -1, 1]) / BETA  # 2 (2p - 1) is 1 at 3/4
    factors = np.array([[0.5], [1.0], [1.5]])
    after_sft, after_base = landing.tilt_calibration(moved(factors * ideal))
    assert is_a(list[Tilt], [after_sft, after_base])
    assert (after_sft["run"], after_base["run"]) == ("sft-rl", "rl")
    assert after_sft["slope"]["mean"] == pytest.approx(1)
    assert after_sft["slope"]["ci95"] == pytest.approx(stats.ttest_1samp([0.5, 1, 1.5], 0).confidence_interval())
    assert after_sft["cosine"]["mean"] == pytest.approx(1)


def test_a_mean_that_agrees_can_hide_that_wrong_sentences_move_too_little():
    """Three sentences should gain 2 and one, which the start has wrong, should lose 2."""
    [tilt, _] = landing.tilt_calibration(moved([3.0, 3.0, -0.5, 3.0]))
    wrong, right = tilt["bins"]
    assert [(row["low"], row["high"], row["share"]) for row in (wrong, right)] == [(0.1, 0.3, 0.25), (0.7, 0.9, 0.75)]
    assert (wrong["ideal_shift"], wrong["measured_shift"]["mean"]) == pytest.approx((-2, -0.5))
    assert (right["ideal_shift"], right["measured_shift"]["mean"]) == pytest.approx((2, 3))
    assert wrong["own_belief"] == pytest.approx(math.log(0.25 / sharper(0.25, -2)))
    assert wrong["measured"]["mean"] == pytest.approx(math.log(0.25 / sharper(0.25, -0.5)))
    assert tilt["slope"]["mean"] == pytest.approx((3 * 6 + 1) / 16)
    assert tilt["cosine"]["mean"] == pytest.approx((3 * 6 + 1) / math.sqrt(16 * (3 * 9 + 0.25)))
    assert {row["perfect_learner"] for row in tilt["bins"]} == {None}


def test_every_sentence_is_in_a_bin():
    [tilt, _] = landing.tilt_calibration(moved(np.zeros(4) + 0.1, start=[1e-9, 0.09, 0.5, 1 - 1e-9]))
    assert [(row["low"], row["share"]) for row in tilt["bins"]] == [(0, 0.5), (0.3, 0.25), (0.9, 0.25)]


def test_train_against_dev_by_hand():
    splits = [
        metrics_of(
            {"sft": {"label_loss": 0.4}, "sft-rl": {"label_loss": [0.4 + rise, 0.5 + rise, 0.6 + rise]}}, split=s
        )
        for s, rise in (("dev", 0.2), ("train", 0.1))
    ]
    found = landing.train_against_dev(replace(constant(), metrics=pd.concat(splits)))
    predicts, remembers = (math.log(0.75 / sharper(0.75, by / BETA)) for by in (1.0, 2.0))
    assert {name: change.tolist() for name, change in found.items()} == {  # the profile's dev_out was not measured
        "measured on dev": pytest.approx([0.2, 0.3, 0.4]),
        "measured on train": pytest.approx([0.1, 0.2, 0.3]),
        "ideal, predicts": pytest.approx([predicts] * 3),
        "ideal, remembers": pytest.approx([remembers] * 3),
    }


# Decoding


def test_shares_of_a_policy_that_is_right_by_hand():
    found = landing.decoding(constant())
    majority_of_3 = 0.75**3 + 3 * 0.75**2 * 0.25
    assert found["gain_of_reward"]["mean"] == pytest.approx(0.3)
    assert found["rise_of_loss"]["mean"] == pytest.approx(math.log(0.75 / 0.9))
    assert found["shares"]["greedy"]["seeds"] == pytest.approx([0.5 / 0.3] * 3)
    assert found["shares"]["majority of 3"]["mean"] == pytest.approx((2 * majority_of_3 - 1.5) / 0.3)
    assert found["gain_of_greedy_reward"] == {"mean": 0, "ci95": [0, 0]}
    # every answer is right, so that the coldest policy has the least loss: no temperature costs what RL ended with
    assert found["above_temperature_curve"] is None


def test_greedy_answers_that_rl_turns_are_what_it_taught():
    p = np.array([0.75, 0.75, 0.75, 0.4])
    results = results_of(
        STUDY, [policy("sft", odds_of(p, LABELS), LABELS), policy("sft-rl", odds_of(0.9, LABELS), LABELS)]
    )
    found = landing.decoding(results)
    assert found["gain_of_greedy_reward"]["mean"] == pytest.approx(1 - 0.5)
    start = (3 * 0.5 - 0.2) / 4
    assert found["shares"]["greedy"]["mean"] == pytest.approx((0.5 - start) / (0.8 - start))


@pytest.mark.parametrize("p", [0.7, P["sft"]])
@pytest.mark.filterwarnings("error")
def test_where_rl_gained_nothing_there_is_no_share(p):
    assert landing.decoding(constant(changes={"sft-rl": p}))["shares"] == {}


def test_rl_that_is_the_sft_policy_at_another_temperature_is_on_its_curve():
    # one answer in four is wrong, so that neither the coldest nor the hottest policy has the least loss
    log_odds = np.array([2.0, -1.0, 1.5, -0.2])
    for temperature in (0.15, 0.3):
        runs = [policy("sft", log_odds, LABELS), policy("sft-rl", log_odds / temperature, LABELS)]
        found = landing.sharpened_alike(results_of(STUDY, runs))
        assert found["T at RL's L"].tolist() == pytest.approx([temperature] * 3)
        assert found["difference"].tolist() == pytest.approx([0] * 3, abs=1e-9)
        assert found["L"].iloc[0] == pytest.approx(theory.loss_on_labels(log_odds / temperature, LABELS))
        least = found["T of least L"].iloc[0]
        colder, there, hotter = (theory.loss_on_labels(log_odds / (least * by), LABELS) for by in (0.99, 1, 1.01))
        assert there < min(colder, hotter)
        assert there < found["L"].iloc[0]


def test_rl_that_learnt_something_is_above_the_curve():
    log_odds = np.array([2.0, -1.0, 0.5, -1.5])
    better = 3 * log_odds + np.array([0, 0, 0, 2.0])
    runs = [policy("sft", log_odds, LABELS, seeds=[4]), policy("sft-rl", better, LABELS, seeds=[4])]
    found = landing.sharpened_alike(results_of(STUDY, runs, seeds=[4]))
    reached = theory.tempered_log_odds(log_odds, found["T at RL's L"].item())
    assert theory.loss_on_labels(reached, LABELS) == pytest.approx(theory.loss_on_labels(better, LABELS))
    gain = theory.reward_on_labels(better, LABELS) - theory.reward_on_labels(reached, LABELS)
    assert found["difference"].item() == pytest.approx(gain)
    assert gain > 0.05


def test_a_loss_below_the_whole_curve_has_no_temperature():
    runs = [policy("sft", [2.0, -1.0, 0.5, -1.5], LABELS), policy("sft-rl", odds_of(0.9, LABELS), LABELS)]
    found = landing.sharpened_alike(results_of(STUDY, runs))
    assert found["T at RL's L"].isna().all()
    assert found["difference"].isna().all()
    assert landing.decoding(results_of(STUDY, runs))["above_temperature_curve"] is None


def test_the_temperature_of_least_loss_says_how_overconfident_a_policy_is():
    """Nine labels of ten are the likelier one, of which a policy that is calibrated is as sure as 0.9."""
    labels = np.array([1] * 9 + [0])
    runs = [
        policy(run, np.full(10, factor * logit(0.9)), labels)
        for run, factor in zip(STATES, (2, 1, 1, 1, 0.5), strict=True)
    ]
    found = landing.calibration(results_of(STUDY, runs))
    assert list(found) == STATES
    assert [found[run]["mean"] for run in STATES] == pytest.approx([2, 1, 1, 1, 0.5], rel=1e-4)


def test_sides_are_told_by_whole_intervals():
    above, below, neither = ({"mean": m, "ci95": [m - 0.5, m + 0.5]} for m in (1.6, 0.4, 1.1))
    assert [landing.side(found, 1) for found in (above, below, neither)] == ["above", "below", "not told apart from"]
    assert landing.side({"mean": 7.0, "ci95": None}, 1) == "not told apart from"
    gaps = {"x": above, "y": {"mean": -1.0, "ci95": [-2.0, -0.1]}, "z": {"mean": 1.0, "ci95": [-1.0, 3.0]}, "w": above}
    assert landing.sides_in_words(gaps) == "more than predicted: x, w; less: y; not told apart from it: z."


def test_rl_that_cannot_tell_sentences_apart_is_paid_for_the_commoner_answer():
    """Three of four labels are 1: saying 1 earns 0.5 on average, saying 0 as much less than nothing."""
    labels = [1, 1, 1, 0]
    runs = [policy("base", 0.0, labels, mass=0.6), policy("rl", odds_of(0.9, labels), labels)]
    found = landing.uninformed_rl(results_of(STUDY, runs))
    weights = np.array([0.3 * math.exp(-0.5 / BETA), 0.3 * math.exp(0.5 / BETA), 0.4 * math.exp(-1 / BETA)])
    wrong, right, _ = weights / weights.sum()
    assert found["loss_uninformed"]["mean"] == pytest.approx(-(3 * math.log(right) + math.log(wrong)) / 4)
    assert found["reward_uninformed"]["mean"] == pytest.approx((3 * right + wrong) / 2 - 1)
    assert (found["loss"]["mean"], found["reward"]["mean"]) == pytest.approx((-math.log(0.9), 0.8))
    free = load_study("nano", overrides={"rl.beta": 0.0})
    assert landing.uninformed_rl(results_of(free, runs)) is None


# theory.json


def test_theory_file_of_a_known_disagreement():
    content = landing.theory_file(constant(agreement=[0.9, 0.9, 0.9, 0.6]), None)
    assert is_a(TheoryFile, content)
    assert content["agreement"] == [{"q": 0.9, "share": 0.75}, {"q": 0.6, "share": 0.25}]
    assert content["beta"] == BETA
    assert (content["sweep"], content["crossing"]) == (None, None)
    assert [row["q"] for row in content["who_pays"]] == [0.9, 0.6]


def test_fixed_points_are_those_of_the_example():
    found = landing.fixed_points(STUDY.profile)
    variants, p = found["variants"], sharper(0.9, 1.6 / BETA)
    assert (found["q"], found["beta"]) == (0.9, BETA)
    assert variants["(i) beta as it is"]["effective beta"] == pytest.approx(BETA * 8 / 7)  # groups of eight
    ideal = variants["ideal RL; normalisation: none"]
    loss, h = -0.9 * math.log(p) - 0.1 * math.log(1 - p), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert (ideal["p"], ideal["effective beta"]) == pytest.approx((p, BETA))
    assert (ideal["L"], ideal["rise of L"], ideal["J"]) == pytest.approx((loss, loss - h, 0.8 * (2 * p - 1)))


def test_theory_file_of_real_annotators_names_no_number_that_nobody_knows():
    content = landing.theory_file(constant(truth=[None] * 4, agreement=np.nan), None)
    assert is_a(TheoryFile, content)
    assert (content["agreement"], content["sweep"]) == (None, None)
    assert content["who_pays"] == []
    assert content["runs"][0]["tilted"] is None
    assert content["runs"][0]["self_tilted"] == point(sharper(0.75, 1.0 / BETA))


def test_theory_file_of_rl_that_pays_nothing_for_kl():
    """beta = 0 has no closed form, though the labels' q is known."""
    content = landing.theory_file(constant(load_study("nano", overrides={"rl.beta": 0.0})), None)
    assert is_a(TheoryFile, content)
    assert content["agreement"] == [{"q": 0.9, "share": 1.0}]
    assert {record[name] for record in content["runs"] for name in ("tilted", "self_tilted")} == {None}
    assert content["fixed_points"]["beta"] == landing.EXAMPLE_BETA


def test_theory_file_of_certain_labels():
    content = landing.theory_file(constant(agreement=1.0), None)
    assert is_a(TheoryFile, content)
    assert content["agreement"] == [{"q": 1.0, "share": 1.0}]
    assert content["runs"][0]["tilted"] == point(sharper(0.75, 2 / BETA))


def test_theory_file_has_the_sweep_where_there_is_one():
    names = [run.name for run in STUDY.runs_of("sweep")]
    swept = [policy(run, odds_of(0.9, LABELS), LABELS) for run in names]
    results = results_of(STUDY, [constant().answers, *swept])
    content = landing.theory_file(results, sweep.confront_sweep(results))
    assert is_a(TheoryFile, content)
    assert {entry["run"] for entry in content["sweep"]} <= set(names)
    assert [point["run"] for point in content["crossing"]["points"]][-1] == "sft-rl"


# The identities


@pytest.mark.parametrize(("q", "answers"), [(0.51, 2), (0.75, 3), (0.9, 8), (0.9, 32), (1.0, 5)])
def test_every_identity_holds_up_to_rounding(q, answers):
    gaps = identities.identity_gaps(q, answers)
    assert len(gaps) == 7
    assert all(0 <= gap < 1e-9 for gap in gaps.values()), gaps


@pytest.mark.parametrize(
    ("function", "wrong", "noticed"),
    [
        (
            "tilt",
            lambda right, logp, r, beta: right(logp, r, 1.01 * beta),
            {"theorem_3_1", "sign_rule", "perfect_demonstrations", "regularised_objective"},
        ),
        (
            "log_normaliser",
            lambda right, *given: right(*given) + 1e-3,
            {"theorem_3_1", "sign_rule", "closed_forms"},
        ),
        ("rl_loss", lambda right, *given: 1.001 * right(*given), {"closed_forms"}),
        ("perfect_demonstration_change", lambda right, *given: 1.001 * right(*given), {"perfect_demonstrations"}),
        ("pinsker_bound", lambda right, *given: 0.1 * right(*given), {"regularised_objective"}),
        ("expected_loss", lambda right, *given: -right(*given), {"frontier"}),
        ("frontier_probability", lambda right, *given: 0.99 * right(*given), {"frontier"}),
        ("grpo_gradient", lambda right, *given: 1.001 * right(*given), {"groups"}),
        ("deviation_factor", lambda right, *given: 1.001 * right(*given), {"groups"}),
    ],
)
def test_a_theory_that_is_slightly_wrong_is_noticed(monkeypatch, function, wrong, noticed):
    right = getattr(theory, function)
    monkeypatch.setattr(theory, function, lambda *given: wrong(right, *given))
    gaps = identities.identity_gaps(0.9, 4)
    assert {name for name, gap in gaps.items() if gap > 1e-5} == noticed


def test_a_number_that_is_none_is_no_small_gap(monkeypatch):
    right, numbers = theory.log_normaliser, iter(range(10**6))
    monkeypatch.setattr(theory, "log_normaliser", lambda *given: right(*given) * (np.nan if next(numbers) == 9 else 1))
    assert np.isnan(identities.identity_gaps(0.9, 4)["theorem_3_1"])
