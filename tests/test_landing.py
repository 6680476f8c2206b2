"""Where RL was to land and where it did, what decoding gets, theory.json, and the identities: all on known policies."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from nondecoupling.analysis import identities, landing, sweep, theory
from nondecoupling.study.contracts import SweepEntry, TheoryFile
from nondecoupling.study.plan import STATES
from nondecoupling.study.study import load_study
from tables import SEEDS, is_a, metrics_of, odds_of, policy, results_of

LABELS = np.array([1, 0, 1, 1])
P = {"base": 0.6, "sft": 0.75, "sft-rl": 0.9, "rl": 0.8, "rl-sft": 0.75}  # of the right label, of every sentence
BETA = 0.5
KNOWN = load_study("nano", overrides={"rl.beta": BETA, "data.disagreement": 0.1})


def constant(study=KNOWN, changes=None, **more):
    """Results in which each policy is as sure of the right label of every sentence."""
    p = P | (changes or {})
    return results_of(study, [policy(run, odds_of(p[run], LABELS), LABELS, **more) for run in STATES])


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(identities, "PROBLEMS", 50)


@pytest.fixture
def unknown(tmp_path):
    """A study of real annotators, who disagree nobody knows how often."""
    return load_study("nano", data=str(tmp_path), overrides={"rl.beta": BETA})


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


def test_where_policies_landed_is_a_row_per_policy_and_seed():
    table = landing.landed(constant(changes={"rl": 0.4}))
    assert table[["run", "seed"]].to_numpy().tolist() == [[run, seed] for run in STATES for seed in SEEDS]
    by_run = table.groupby("run")[["loss", "reward", "greedy"]].mean()
    assert by_run.loc["sft"].tolist() == pytest.approx([-math.log(0.75), 0.5, 1.0])
    assert by_run.loc["rl"].tolist() == pytest.approx([-math.log(0.4), -0.2, -1.0])


def test_train_against_dev_by_hand():
    splits = [
        metrics_of(
            {"sft": {"label_loss": 0.4}, "sft-rl": {"label_loss": [0.4 + rise, 0.5 + rise, 0.6 + rise]}}, split=s
        )
        for s, rise in (("dev", 0.2), ("train", 0.1))
    ]
    found = landing.train_against_dev(constant()._replace(metrics=pd.concat(splits)))
    predicts, remembers = (math.log(0.75 / sharper(0.75, by / BETA)) for by in (1.0, 2.0))
    assert {name: change.tolist() for name, change in found.items()} == {  # the profile's dev_out was not measured
        "measured on dev": pytest.approx([0.2, 0.3, 0.4]),
        "measured on train": pytest.approx([0.1, 0.2, 0.3]),
        "ideal, predicts": pytest.approx([predicts] * 3),
        "ideal, remembers": pytest.approx([remembers] * 3),
    }


@pytest.mark.parametrize("q", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_beta_at_a_loss_is_the_beta_that_has_it(q, beta):
    assert landing.beta_at(q, float(theory.rl_loss(q, beta))) == pytest.approx(beta, rel=1e-6)


def test_no_beta_brings_rl_below_the_calibrated_policy_or_labels_that_are_certain_anywhere():
    assert landing.beta_at(0.9, float(theory.calibrated_loss(0.9))) is None
    assert landing.beta_at(0.9, 0.1) is None
    assert landing.beta_at(1.0, 0.5) is None
    assert landing.beta_at(0.9, 500.0) is None  # further than any beta takes it


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
        KNOWN, [policy("sft", odds_of(p, LABELS), LABELS), policy("sft-rl", odds_of(0.9, LABELS), LABELS)]
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
        found = landing.sharpened_alike(results_of(KNOWN, runs))
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
    found = landing.sharpened_alike(results_of(KNOWN, runs, seeds=[4]))
    reached = theory.tempered_log_odds(log_odds, found["T at RL's L"].item())
    assert theory.loss_on_labels(reached, LABELS) == pytest.approx(theory.loss_on_labels(better, LABELS))
    gain = theory.reward_on_labels(better, LABELS) - theory.reward_on_labels(reached, LABELS)
    assert found["difference"].item() == pytest.approx(gain)
    assert gain > 0.05


def test_a_loss_below_the_whole_curve_has_no_temperature():
    runs = [policy("sft", [2.0, -1.0, 0.5, -1.5], LABELS), policy("sft-rl", odds_of(0.9, LABELS), LABELS)]
    found = landing.sharpened_alike(results_of(KNOWN, runs))
    assert found["T at RL's L"].isna().all()
    assert found["difference"].isna().all()
    assert landing.decoding(results_of(KNOWN, runs))["above_temperature_curve"] is None


# theory.json


def test_theory_file_of_a_known_disagreement():
    content = landing.theory_file(constant(), None)
    assert is_a(TheoryFile, content)
    h = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    p = sharper(0.9, 1.6 / BETA)
    loss = -0.9 * math.log(p) - 0.1 * math.log(1 - p)
    assert (content["q"], content["beta"]) == (0.9, BETA)
    assert [content[name] for name in ("calibrated_loss", "calibrated_reward", "sharp_reward")] == pytest.approx(
        [h, 0.64, 0.8]
    )
    assert [content[name] for name in ("rl_loss", "rl_reward", "c1")] == pytest.approx(
        [loss, 0.8 * (2 * p - 1), loss - h]
    )
    assert content["sweep"] is None
    variants = content["fixed_points"]["variants"]
    assert variants["(i) beta as it is"]["effective beta"] == pytest.approx(BETA * 8 / 7)  # groups of eight
    ideal = variants["ideal RL; normalisation: none"]
    assert (ideal["p"], ideal["effective beta"]) == pytest.approx((p, BETA))
    assert (ideal["L"], ideal["rise of L"], ideal["J"]) == pytest.approx((loss, loss - h, 0.8 * (2 * p - 1)))


def test_theory_file_of_real_annotators_names_no_number_that_nobody_knows(unknown):
    content = landing.theory_file(constant(unknown, truth=[None] * 4), None)
    assert is_a(TheoryFile, content)
    names = ("q", "calibrated_loss", "calibrated_reward", "sharp_reward", "rl_loss", "rl_reward", "c1", "sweep")
    assert {content[name] for name in names} == {None}
    assert content["runs"][0]["tilted"] is None
    assert content["runs"][0]["self_tilted"] == point(sharper(0.75, 1.0 / BETA))
    assert content["fixed_points"]["q"] == landing.EXAMPLE_Q


def test_theory_file_of_rl_that_pays_nothing_for_kl():
    """beta = 0 has no closed form, though the labels' q is known."""
    content = landing.theory_file(constant(load_study("nano", overrides={"rl.beta": 0.0})), None)
    assert is_a(TheoryFile, content)
    assert {content[name] for name in ("rl_loss", "rl_reward", "c1")} == {None}
    assert content["calibrated_reward"] == pytest.approx(0.64)
    assert {record[name] for record in content["runs"] for name in ("tilted", "self_tilted")} == {None}
    assert content["fixed_points"]["beta"] == landing.EXAMPLE_BETA


def test_theory_file_of_certain_labels():
    results = constant(load_study("nano", overrides={"rl.beta": BETA, "data.labels": "truth"}))
    content = landing.theory_file(results, None)
    assert is_a(TheoryFile, content)
    assert (content["q"], content["calibrated_loss"], content["rl_loss"], content["c1"]) == (1, 0, 0, 0)
    assert content["runs"][0]["tilted"] == point(sharper(0.75, 2 / BETA))


def test_theory_file_has_the_sweep_where_there_is_one():
    results = constant()
    runs = [run.name for run in KNOWN.runs_of("sweep")]
    results = results_of(KNOWN, [results.answers, *(policy(run, odds_of(0.9, LABELS), LABELS) for run in runs)])
    content = landing.theory_file(results, sweep.confront_sweep(results))
    assert is_a(TheoryFile, content)
    assert is_a(list[SweepEntry], content["sweep"])
    assert {entry["run"] for entry in content["sweep"]} == set(runs) - {"sft-all"}


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
