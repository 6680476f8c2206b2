"""What a perfect learner and a policy's own belief predict, by hand for policies made by hand."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from nondecoupling.analysis import predictions, theory
from nondecoupling.study.contracts import Level
from nondecoupling.study.study import load_study
from tables import MEASURED, SEEDS, is_a, metrics_of, odds_of, policy, results_of

LABELS = np.array([1, 0])
P = np.array([0.9, 0.8, 0.7])  # that the SFT policies of three seeds give to the right label


def measured(study, base=0.5, agreement=0.9, **more):
    """Results whose base gives the right label ``base``, one for all sentences or one for each."""
    p = {"base": base, "sft": P[:, None], "sft-rl": 0.95, "rl": 0.9, "rl-sft": 0.8}
    answers = [policy(run, odds_of(p[run], LABELS), LABELS, agreement=agreement, **more) for run in p]
    return results_of(study, answers, metrics_of(MEASURED))


# The paper's claims


def test_closed_forms_by_hand():
    """q = 3/4 and beta = 1/ln 3: RL multiplies the odds by exp(2(2q-1)/beta) = 3, from 3 to 9 or from 1 to 3."""
    study = load_study("nano", overrides={"rl.beta": 1 / math.log(3)})
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    after = -0.75 * math.log(0.9) - 0.25 * math.log(0.1)
    deficit = 0.5**2 - 0.5 * (2 * 0.75 - 1)  # calibrated reward, minus the base's own tilt to 3/4
    expected = {
        "A1": after - entropy,
        "A2": after - 0.60,
        "B1": deficit,
        "B2": deficit,
        "B3": 0.0,
        "O1": 0.8 * 0.5 - 0.25,
    }
    found = predictions.for_perfect_learner(measured(study, agreement=0.75))
    assert found == pytest.approx(expected)


def test_closed_forms_are_means_over_the_sentences_disagreement():
    """q = 3/4 and 1: of the certain sentence the calibrated policy is sure already, and only the base learns it."""
    beta = 1 / math.log(3)
    found = predictions.for_perfect_learner(
        measured(load_study("nano", overrides={"rl.beta": beta}), agreement=[0.75, 1.0])
    )
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    after = -0.75 * math.log(0.9) - 0.25 * math.log(0.1)
    from_base = (0.5 * (2 * 0.75 - 1) + (2 * 0.9 - 1)) / 2  # odds of 1 become 3, and 9 where annotators agree
    assert found["A1"] == pytest.approx((after - entropy) / 2)
    assert found["A2"] == pytest.approx(after / 2 - 0.60)
    assert found["O1"] == pytest.approx((0.8 * 0.5 - 0.25) / 2)
    assert found["B2"] == pytest.approx((0.25 + 1) / 2 - from_base)


def test_greedy_answers_of_rl_from_the_base_are_those_of_the_tilted_base():
    """From odds of 1/27 a threefold gain leaves the wrong answer the likelier one, from 1/2 it does not."""
    study = load_study("nano", overrides={"rl.beta": 1 / math.log(3)})
    found = predictions.for_perfect_learner(measured(study, base=[1 / 28, 1 / 3], agreement=0.75))
    assert found["B3"] == pytest.approx(0.5 - 0.0)


def test_closed_forms_need_a_known_disagreement():
    assert predictions.for_perfect_learner(measured(load_study("nano"), agreement=np.nan)) == {}
    half_known = measured(load_study("nano"), agreement=[0.9, np.nan])
    assert predictions.for_perfect_learner(half_known) == {}
    assert predictions.perfect_frontier(half_known, np.array([1.0])) is None


def tilted(p, beta):
    """What a calibrated policy at p becomes: "acceptable" earns 2p-1, and log-odds grow by 2(2p-1)/beta."""
    return expit(logit(p) + 2 * (2 * p - 1) / beta)


def test_own_belief_by_hand_reads_no_policy_that_it_predicts():
    beta = 2.0
    after, base = tilted(P, beta), tilted(0.6, beta)
    rise = (np.log(P) - np.log(after)).mean()
    deficit = (2 * P - 1).mean() - (2 * base - 1)  # of SFT from the base, minus the base's own tilt
    expected = {
        "A1": rise,
        "A2": -np.log(after).mean() - 0.60,
        "B1": deficit,
        "B2": deficit,
        "B3": 0.0,  # every answer is right
        "O1": (2 * after - 2 * P).mean(),
    }
    results = measured(load_study("nano", overrides={"rl.beta": beta}), base=0.6)
    assert predictions.from_policies(results) == pytest.approx(expected)
    trained = results.answers["run"].isin(["sft-rl", "rl", "rl-sft"])
    unseen = replace(results, answers=results.answers[~trained], metrics=results.final("base"))
    assert predictions.from_policies(unseen) == pytest.approx(expected)


def test_own_belief_of_an_overconfident_base_can_have_the_wrong_sign():
    """A base that is sure and right of one sentence, sure and wrong of the other, believes that RL gains nothing."""
    found = predictions.from_policies(measured(load_study("nano"), base=[0.99, 0.01]))
    assert found["B2"] == pytest.approx((2 * P - 1).mean() - 0.0)


def test_levels_by_hand():
    beta = 1 / math.log(3)
    rows = predictions.levels(measured(load_study("nano", overrides={"rl.beta": beta}), base=0.6, agreement=0.75))
    assert is_a(list[Level], rows)
    table = pd.DataFrame(rows).set_index(["quantity", "run"])
    assert table.index.tolist() == [(q, run) for q in ("loss", "reward", "greedy") for run in predictions.AFTER_BASE]
    means = table["measured"].map(lambda measured: measured["mean"])
    assert means["reward"].tolist() == pytest.approx([2 * P.mean() - 1, 0.9, 0.8, 0.6])
    assert means["loss", "sft"] == pytest.approx(-np.log(P).mean())
    own, perfect = table["own_belief"], table["perfect_learner"]
    assert own["reward", "sft-rl"] == pytest.approx((2 * tilted(P, beta) - 1).mean())
    assert own["loss", "rl"] == pytest.approx(-np.log(tilted(0.6, beta)))
    assert own["reward", "rl-sft"] == pytest.approx(2 * P.mean() - 1)
    assert own.isna().tolist() == [run == "sft" for _, run in table.index]
    assert perfect["reward"].tolist() == pytest.approx(
        [0.25, 0.8 * 0.5, 0.5 * (2 * expit(logit(0.6) + math.log(3)) - 1), 0.25]
    )
    assert perfect["greedy"].tolist() == pytest.approx([0.5] * 4)


def test_levels_without_predictions():
    rows = predictions.levels(measured(load_study("nano", overrides={"rl.beta": 0.0}), agreement=np.nan))
    assert is_a(list[Level], rows)
    assert {row[name] for row in rows for name in ("own_belief", "perfect_learner")} == {None}


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_where_a_loss_is_reached_is_the_beta_that_has_it(beta):
    q = np.array([0.6, 0.9, 1.0])

    def loss_at(b):
        return float(np.mean(theory.rl_loss(q, b)))

    assert predictions.where_loss_is(loss_at(beta), loss_at) == pytest.approx(beta, rel=1e-6)
    assert predictions.where_loss_is(float(np.mean(theory.calibrated_loss(q))), loss_at) is None
    assert predictions.where_loss_is(0.1, loss_at) is None
    assert predictions.where_loss_is(500.0, loss_at) is None  # further than any beta takes it
    assert predictions.where_loss_is(0.5, lambda b: 0.0) is None  # labels that are certain


def test_frontiers_are_the_closed_forms():
    results = measured(load_study("nano"), agreement=[0.9, 0.7])
    own = predictions.own_frontier(results, [1e6, 1.0])
    assert own["sft_loss"].iloc[0] == pytest.approx(-np.log(P).mean(), abs=1e-5)
    assert own["reward"].iloc[1] == pytest.approx((2 * tilted(P, 1.0) - 1).mean())
    path = predictions.perfect_frontier(results, np.array([1e6, 0.5]))
    for place, beta in enumerate((1e6, 0.5)):
        expected = [(f(0.9, beta) + f(0.7, beta)) / 2 for f in (theory.rl_loss, theory.rl_reward)]
        assert path.iloc[place].tolist() == pytest.approx(expected)


def test_paths_weigh_each_disagreement_by_its_sentences():
    q = [0.9, 0.6, 0.9, 0.9]
    for curve, points in ((predictions.ideal_path, [0.5, 2.0]), (predictions.frontier, [0.1, 3.0])):
        apart = [curve(one, points) for one in (0.9, 0.6)]
        assert (curve(q, points) - (3 * apart[0] + apart[1]) / 4).abs().max().max() < 1e-12


def test_the_frontier_is_rls_path_for_one_disagreement_and_above_it_for_several():
    prices, betas = np.geomspace(1e-3, 1e3, 4000), np.array([4.0, 1.0, 0.5])
    for q, gap in ((0.8, 0.0), (np.array([0.55, 0.6, 0.95]), 1e-5)):
        best, path = predictions.frontier(q, prices), predictions.ideal_path(q, betas)
        above = np.interp(path["sft_loss"], best["sft_loss"], best["reward"]) - path["reward"]
        assert (above >= gap - 1e-6).all()
        assert gap or (above < 1e-6).all()


# Controls


def test_the_rise_by_another_wording_is_the_closed_form_of_the_tilt():
    """Four answers: either label in either wording, of which only the right label in the other wording earns +1."""
    q, share, beta = 0.9, 0.1, 0.5
    p0 = np.array([(1 - share) * q, (1 - share) * (1 - q), share * q, share * (1 - q)])
    reward = np.array([-1, -1, 2 * q - 1, 1 - 2 * q])  # expected over annotators
    tilted = np.exp(theory.tilt(np.log(p0)[None], reward[None], beta))[0]
    rise = np.log(p0[:2] / tilted[:2])
    assert rise[0] == pytest.approx(rise[1])  # whatever the label
    assert predictions.wording_rise(np.array([q]), np.array([share]), beta) == pytest.approx(rise[0])


CLAIMS = [
    {"id": "A1", "predicted": 0.2, "predicted_from_policies": 0.21},
    {"id": "O1", "predicted": 0.3, "predicted_from_policies": 0.31},
]


def with_controls(study, gone=(), agreement=0.9):
    """Policies of every control that a prediction reads, and a proxy that prefers each right label by two."""
    p = 0.8 + 0.001 * np.array([SEEDS]).T
    sides = np.where(LABELS == 1, 1.0, -1.0)
    known = {"agreement": agreement}
    answers = [policy(run, odds_of(at, LABELS), LABELS, **known) for run, at in (("base", p - 0.2), ("sft", p))]
    answers += [policy("sft-clean", odds_of(p + 0.1, LABELS), LABELS)] if "sft-clean" not in gone else []
    answers += [policy("sft-wordings", odds_of(p, LABELS), LABELS, mass=0.9)]
    answers += [policy("reward-model", 0.0, LABELS, score_acceptable=sides, score_unacceptable=-sides)]
    return results_of(study, answers)


def test_predictions_of_the_controls_by_hand():
    study = load_study("nano", overrides={"rl.beta": 0.5})
    perfect, own = predictions.of_controls(with_controls(study), CLAIMS)
    assert [perfect[name] for name in ("K1", "K3r", "K10")] == [0.2, 0.3, 0.2]
    assert [own[name] for name in ("K1", "K3r", "K10")] == [0.21, 0.31, 0.21]
    p = 0.8 + 0.001 * np.array(SEEDS)
    # the reward of SFT, minus that of the base after two tilts by what it believes
    assert own["K2"] == pytest.approx((2 * p - 1).mean() - (2 * tilted(p - 0.2, 0.25) - 1).mean())
    share = np.full(1, 0.1)  # of the answers in the other wording; p of "acceptable" is p or 1 - p
    usual = [predictions.wording_rise(np.array([at, 1 - at]), share, 0.5) for at in p]
    assert own["K4"] == pytest.approx(np.mean(usual))
    assert own["K6"] == pytest.approx(np.mean(np.log((p + 0.1) / tilted(p + 0.1, 0.5))))
    # the proxy prefers every right label by 2, of which RL adds 2 / beta
    by_proxy, by_truth = 2 * expit(logit(p) + 2 / 0.5) - 1, 2 * tilted(p, 0.5) - 1
    assert own["K9"] == pytest.approx((by_proxy - by_truth).mean())

    twice = 0.8 * (2 * expit(logit(0.9) + 2 * 1.6 / 0.5) - 1)  # two tilts
    once = 0.8 * (2 * expit(logit(0.9) + 1.6 / 0.5) - 1)
    learnt = 0.8 * (2 * expit(logit(0.9) * (1 + 1 / 0.5)) - 1)  # the proxy's scores are calibrated log-odds
    assert perfect["K2"] == pytest.approx(0.64 - twice)
    assert perfect["K4"] == pytest.approx(predictions.wording_rise(np.array([0.9]), share, 0.5))
    assert perfect["K6"] == 0
    assert perfect["K9"] == pytest.approx(learnt - once)
    assert set(own) == set(perfect) == {"K1", "K2", "K3r", "K4", "K6", "K9", "K10"}


def test_a_perfect_learners_controls_are_means_over_the_sentences():
    study = load_study("nano", overrides={"rl.beta": 0.5})
    apart = [predictions.of_controls(with_controls(study, agreement=q), CLAIMS)[0] for q in (0.9, 0.7)]
    together = predictions.of_controls(with_controls(study, agreement=[0.9, 0.7]), CLAIMS)[0]
    assert together == pytest.approx({name: (apart[0][name] + apart[1][name]) / 2 for name in together})
    assert apart[0]["K9"] != pytest.approx(apart[1]["K9"])


def test_controls_that_a_study_cannot_have_are_not_predicted():
    results = with_controls(load_study("nano"), gone=("sft-clean",), agreement=np.nan)
    perfect, own = predictions.of_controls(results, [claim | {"predicted": None} for claim in CLAIMS])
    assert set(own) == {"K1", "K2", "K3r", "K4", "K9", "K10"}
    assert perfect == {}


def test_a_reward_without_disagreement_is_learnt_whole_by_the_proxy():
    perfect, _ = predictions.of_controls(with_controls(load_study("nano"), agreement=1.0), CLAIMS)
    assert (perfect["K9"], perfect["K2"]) == (0, 0)


def test_rl_that_pays_nothing_for_kl_has_no_closed_form():
    study = load_study("nano", overrides={"rl.beta": 0.0})
    assert predictions.for_perfect_learner(measured(study)) == {}
    assert predictions.from_policies(measured(study)) == {}
    assert predictions.of_controls(with_controls(study), CLAIMS) == ({}, {})
