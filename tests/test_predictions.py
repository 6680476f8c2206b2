"""What a perfect learner and a policy's own belief predict, by hand for policies made by hand."""

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from nondecoupling.analysis import predictions, theory
from nondecoupling.analysis.controls import CONTROLS
from nondecoupling.study.study import load_study
from tables import MEASURED, SEEDS, metrics_of, odds_of, policy, results_of

LABELS = np.array([1, 0])


def measured(study):
    """Results whose base knows nothing, and whose SFT policies give the right label 0.9, 0.8 and 0.7."""
    answers = [policy("base", 0.0, LABELS), policy("sft", odds_of([[0.9], [0.8], [0.7]], LABELS), LABELS)]
    return results_of(study, answers, metrics_of(MEASURED))


# The paper's claims


def test_closed_forms_by_hand():
    """q = 3/4 and beta = 1/ln 3: RL multiplies the odds by exp(2(2q-1)/beta) = 3, from 3 to 9 or from 1 to 3."""
    study = load_study("nano", overrides={"data.disagreement": 0.25, "rl.beta": 1 / math.log(3)})
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
    assert predictions.for_perfect_learner(measured(study)) == pytest.approx(expected)


def test_closed_forms_need_a_known_disagreement(tmp_path):
    assert predictions.for_perfect_learner(measured(load_study("nano", data=str(tmp_path)))) == {}


def test_predictions_from_measured_policies_by_hand():
    """A calibrated policy at p has expected reward 2p-1 for "acceptable": its log-odds grow by 2(2p-1)/beta."""
    beta = 2.0
    p = np.array([0.9, 0.8, 0.7])  # of the right label, both sentences alike
    odds = p / (1 - p) * np.exp(2 * (2 * p - 1) / beta)
    tilted = odds / (1 + odds)
    rise, gain = (np.log(p) - np.log(tilted)).mean(), (2 * tilted - 2 * p).mean()
    metrics = metrics_of(MEASURED).assign(reward_sampled=lambda table: 2 * table["reward_exact"])
    results = measured(load_study("nano", overrides={"rl.beta": beta}))._replace(metrics=metrics)
    mean = {run: {name: np.mean(values) for name, values in MEASURED[run].items()} for run in MEASURED}
    expected = {
        "A1": rise,
        "A2": mean["sft"]["sft_loss"] + rise - mean["base"]["sft_loss"],
        "B1": 2 * (mean["sft"]["reward_exact"] - mean["rl"]["reward_exact"]),
        "B2": mean["sft"]["reward_exact"] - mean["rl"]["reward_exact"],
        "B3": 0.7 - 0.71,
        "O1": gain,
    }
    assert predictions.from_policies(results) == pytest.approx(expected, abs=1e-5)


def test_frontiers_begin_at_the_policy_and_are_the_closed_forms():
    results = measured(load_study("nano"))
    own = predictions.own_frontier(results, [predictions.NO_RL, 1.0])
    p = np.array([0.9, 0.8, 0.7])
    assert own["sft_loss"].iloc[0] == pytest.approx(-np.log(p).mean(), abs=1e-5)
    assert own["reward"].iloc[1] == pytest.approx((2 * expit(logit(p) + 2 * (2 * p - 1)) - 1).mean())
    perfect = predictions.perfect_frontier(0.9, np.array([1e6, 0.5]))
    assert perfect.iloc[0].tolist() == pytest.approx([theory.calibrated_loss(0.9), 0.64], abs=1e-5)
    assert perfect.iloc[1].tolist() == pytest.approx([theory.rl_loss(0.9, 0.5), theory.rl_reward(0.9, 0.5)])


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


A1 = {"id": "A1", "predicted": 0.2, "predicted_from_policies": 0.21}


def with_controls(study, gone=()):
    """Policies of every control that a prediction reads, and a proxy that prefers each right label by two."""
    p = 0.8 + 0.001 * np.array([SEEDS]).T
    sides = np.where(LABELS == 1, 1.0, -1.0)
    answers = [
        policy(run, odds_of(at, LABELS), LABELS) for run, at in (("sft", p), ("rl", p + 0.05)) if run not in gone
    ]
    answers += [policy("sft-clean", odds_of(p + 0.1, LABELS), LABELS)] if "sft-clean" not in gone else []
    answers += [policy("sft-wordings", odds_of(p, LABELS), LABELS, mass=0.9)]
    answers += [policy("reward-model", 0.0, LABELS, score_acceptable=sides, score_unacceptable=-sides)]
    runs = {run.name for run in study.runs} - {*gone, "data", "reward-model"}
    given = {"sft": {"reward_exact": 0.3}, "rl-weak": {"reward_exact": 0.1}}
    return results_of(study, answers, metrics_of({run: given.get(run, {}) for run in runs}))


def test_predictions_of_the_controls_by_hand():
    study = load_study("nano", overrides={"rl.beta": 0.5, "data.disagreement": 0.1})
    perfect, own = predictions.of_controls(with_controls(study), [A1])
    assert [perfect[name] for name in ("K1", "K3", "K10")] == [0.2] * 3
    assert [own[name] for name in ("K1", "K3", "K10")] == [0.21] * 3
    p = 0.8 + 0.001 * np.array(SEEDS)

    def tilted(p):
        return expit(logit(p) + 2 * (2 * p - 1) / 0.5)

    # the reward of SFT, minus that of RL's policy after one more tilt
    assert own["K2"] == pytest.approx(0.3 - (2 * tilted(p + 0.05) - 1).mean())
    share = np.full(1, 0.1)  # of the answers in the other wording; p of "acceptable" is p or 1 - p
    usual = [predictions.wording_rise(np.array([at, 1 - at]), share, 0.5) for at in p]
    assert own["K4"] == pytest.approx(np.mean(usual))
    assert own["K6"] == pytest.approx(np.mean(np.log((p + 0.1) / tilted(p + 0.1))))
    assert own["K8"] == pytest.approx(0.2)
    # the proxy prefers every right label by 2, of which RL adds 2 / beta
    by_proxy, by_truth = 2 * expit(logit(p) + 2 / 0.5) - 1, 2 * tilted(p) - 1
    assert own["K9"] == pytest.approx((by_proxy - by_truth).mean())

    twice = 0.8 * (2 * expit(logit(0.9) + 2 * 1.6 / 0.5) - 1)  # two tilts
    once = 0.8 * (2 * expit(logit(0.9) + 1.6 / 0.5) - 1)
    learnt = 0.8 * (2 * expit(logit(0.9) * (1 + 1 / 0.5)) - 1)  # the proxy's scores are calibrated log-odds
    assert perfect["K2"] == pytest.approx(0.64 - twice)
    assert perfect["K4"] == pytest.approx(predictions.wording_rise(np.array([0.9]), share, 0.5))
    assert perfect["K6"] == 0
    assert perfect["K8"] == pytest.approx(0.64 - 0.37)
    assert perfect["K9"] == pytest.approx(learnt - once)
    assert set(own) == set(perfect) <= {claim.id for claim in CONTROLS}


def test_controls_that_a_study_cannot_have_are_not_predicted(tmp_path):
    study = load_study("nano", data=str(tmp_path), model=str(tmp_path))
    results = with_controls(study, gone=("sft-clean", "rl-weak"))
    perfect, own = predictions.of_controls(results, [A1 | {"predicted": None}])
    assert set(own) == {"K1", "K2", "K3", "K4", "K9", "K10"}
    assert set(perfect.values()) == {None}


def test_a_reward_without_disagreement_is_learnt_whole_by_the_proxy():
    perfect, _ = predictions.of_controls(with_controls(load_study("nano", overrides={"data.disagreement": 0.0})), [A1])
    assert (perfect["K9"], perfect["K2"]) == (0, 0)


def test_rl_that_pays_nothing_for_kl_has_no_closed_form():
    results = with_controls(load_study("nano", overrides={"rl.beta": 0.0}))
    assert predictions.for_perfect_learner(results) == {}
    assert set(predictions.from_policies(results)) == {"B1", "B2", "B3"}
    assert predictions.of_controls(results, [A1]) == ({}, {})
