"""Controls and joint training: verdicts on policies made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from nondecoupling.analysis import controls
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.study import load_study
from tables import SEEDS, is_a, metrics_of, odds_of, policy, results_of

LABELS = np.array([1, 1, 0, 1, 0, 1, 1, 0] * 5)
A1 = {"id": "A1", "predicted": 0.2, "predicted_from_policies": 0.21}
STUDY = load_study("nano")
P = {"sft": 0.8, "rl": 0.9, "sft-rl": 0.95, "rl-sft": 0.8, "sft-wordings": 0.8, "sft-clean": 0.9}
P |= {"joint-m0.2": 0.85, "joint-m0.5": 0.9, "joint-m0.8": 0.85, "interleaved": 0.85}


def results(study=STUDY, changes=None, p=P):
    """Policies that are right about every sentence, metrics of sound policies but for ``changes``.

    After a quarter of its steps RL has 80 % of its reward, a little more by seed, and 40 % of its loss.
    """
    planned = {run.name for run in study.runs}
    answers = [policy(run, odds_of(p[run], LABELS), LABELS) for run in P if run in planned]
    sides = np.where(LABELS == 1, 1.0, -1.0)
    answers += [policy("reward-model", 0.0, LABELS, score_acceptable=sides, score_unacceptable=-sides)]
    metrics = metrics_of({run: (changes or {}).get(run, {}) for run in planned - {"data", "reward-model"}})
    path = pd.DataFrame({"step": [0, 16, 64], "sft_loss": [0.4, 0.48, 0.6]})
    paths = [path.assign(run="sft-rl", seed=seed, reward_exact=[0.4, 0.56 + 0.001 * seed, 0.6]) for seed in SEEDS]
    paths += [path.assign(run="rl", seed=0, reward_exact=0.0)]  # of which nothing is asked
    return results_of(study, answers, metrics, pd.concat(paths))


def judged(found):
    return {row["id"]: row for row in controls.judge_controls(found, [A1])}


def test_every_control_answers_an_objection_and_speaks_of_planned_runs():
    assert [claim.id for claim in controls.controls_of(STUDY)] == list(controls.OBJECTIONS)


def test_verdicts_of_the_controls():
    found = results(
        changes={
            "sft-rl": {"sft_loss": [0.6, 0.61, 0.62]},  # above more SFT, and above RL paid by a coin
            "sft-sft": {"sft_loss": [0.4, 0.4, 0.41]},
            "sft-wordings": {"sft_loss": [0.4, 0.401, 0.402]},
            "sft-rl-format": {"sft_loss": [1.9, 1.903, 1.901]},
            "rl-weak": {"mcc": 0.0, "predicted_acceptable_rate": 0.999},
        }
    )
    rows = judged(found)
    assert is_a(list[ClaimRow], list(rows.values()))
    assert list(rows) == [f"K{number}" for number in range(1, 12)]
    assert rows["K1"]["estimate"] == pytest.approx(0.61 - 0.40333333)
    assert rows["K1"]["verdict"] == "reproduced"
    assert rows["K4"]["estimate"] == pytest.approx(1.5, abs=0.01)
    assert rows["K4"]["verdict"] == "reproduced"
    assert (rows["K6"]["predicted"], rows["K1"]["predicted_from_policies"]) == (0.0, 0.21)
    assert rows["K7"]["verdict"] == "reproduced"
    assert (rows["K7"]["estimate"], rows["K7"]["p_value"], rows["K7"]["ci95"]) == (1.0, None, None)
    assert rows["K8"]["note"] == "collapsed: rl-weak 3/3"
    assert (rows["K11"]["estimate"], rows["K11"]["verdict"]) == (pytest.approx(0.405), "reproduced")
    tested = [row["p_value"] for row in rows.values() if row["p_value"] is not None]
    assert len(tested) == 10
    corrected = [row["p_holm"] for row in rows.values() if row["p_holm"] is not None]
    assert min(corrected) == pytest.approx(10 * min(tested))


@pytest.mark.parametrize(("fallen", "verdict"), [(3, "reproduced"), (1, "inconclusive"), (0, "not reproduced")])
def test_a_collapse_is_counted_over_seeds(fallen, verdict):
    down = np.array(SEEDS) < fallen
    weak = {"mcc": np.where(down, 0, 0.6), "predicted_acceptable_rate": np.where(down, 1, 0.7)}
    row = judged(results(changes={"rl-weak": weak}))["K7"]
    assert (row["estimate"], row["verdict"]) == (fallen / 3, verdict)


def test_controls_that_a_study_cannot_have_are_left_out(tmp_path):
    given = {claim.id for claim in controls.controls_of(load_study("nano", data=str(tmp_path)))}
    assert set(controls.OBJECTIONS) - given == {"K6"}
    study = load_study("nano", data=str(tmp_path), model=str(tmp_path))
    rows = judged(results(study))
    assert set(controls.OBJECTIONS) - set(rows) == {"K6", "K7", "K8"}
    assert {row["predicted"] for row in rows.values()} == {None, 0.2}  # nothing is known of a perfect learner but A1's


@pytest.mark.parametrize("profile", ["nano", "laptop"])
def test_controls_that_were_not_run_have_the_rows_of_those_that_were_and_no_number(profile):
    study = load_study(profile)
    rows = controls.controls_not_run(study)
    assert is_a(list[ClaimRow], rows)
    families = {letter: {row["id"] for row in rows if row["id"][0] == letter} for letter in "KJ"}
    assert families["K"] == {claim.id for claim in controls.controls_of(study)}
    assert families["J"] == {f"J{n}-{run.name}" for n in (1, 2) for run in study.runs if run.stage == "joint"}
    for row in rows:
        assert (row["verdict"], row["note"], row["seeds"], row["test"]) == ("not run", "make controls", 0, "-")
        numbers = ("estimate", "ci95", "predicted", "predicted_from_policies", "p_value", "p_holm")
        assert {row[name] for name in numbers} == {None}


def test_rows_that_were_run_have_the_ids_of_those_that_were_not():
    found = results()
    rows = controls.judge_controls(found, [A1]) + controls.judge_joint(found)
    assert [row["id"] for row in rows] == [row["id"] for row in controls.controls_not_run(STUDY)]


def test_stopping_early_is_judged_at_the_measurement_nearest_to_a_quarter():
    path = pd.DataFrame({"run": "sft-rl", "seed": 5, "step": [0, 10, 26, 51, 100]})
    path = path.assign(reward_exact=[0.4, 0.4, 0.55, 0.6, 0.6], sft_loss=[0.4, 0.4, 0.44, 0.5, 0.8])
    shares = controls.early_shares(path).loc[5]
    assert shares.tolist() == pytest.approx([26, 0.75, 0.1])


def test_reward_per_nat_before_and_after_a_quarter():
    changes = {"sft-rl": {"reward_exact": 0.6, "sft_loss": 0.8}, "sft": {"reward_exact": 0.5, "sft_loss": 0.4}}
    table = controls.reward_per_nat(results(changes=changes))
    early, late = table[["reward per nat, early", "reward per nat, late"]].iloc[0]
    assert early == pytest.approx(0.8 * 0.1 / (0.4 * 0.4))
    assert late == pytest.approx(0.2 * 0.1 / (0.6 * 0.4))


# Joint training


def test_a_temperature_curve_passes_through_the_policy_and_its_extremes():
    curve = controls.temperature_curve(odds_of(0.8, LABELS), pd.Series(LABELS))
    near = curve.iloc[(curve["sft_loss"] + math.log(0.8)).abs().argmin()]
    assert near["reward"] == pytest.approx(2 * 0.8 - 1, abs=0.02)
    assert curve["reward"].is_monotonic_decreasing
    assert curve["reward"].iloc[0] > 0.99


def test_the_best_reward_at_a_loss_is_taken_over_all_curves():
    curves = [
        pd.DataFrame({"sft_loss": [0.5, 0.4, 0.6], "reward": [0.7, 0.5, 0.2]}),
        pd.DataFrame({"sft_loss": [0.45, 0.9], "reward": [0.55, 0.9]}),
    ]
    assert controls.best_reward_at(curves, 0.45) == 0.55
    assert controls.best_reward_at(curves, 0.55) == 0.7
    assert controls.best_reward_at(curves, 1.0) == 0.9
    assert controls.best_reward_at(curves, 0.1) == 0.5  # below the least loss: what is there


def test_joint_runs_are_judged_against_the_better_sequential_policy():
    wrong = np.where(np.arange(40) < 39, 0.8, 0.1)  # about the last sentence, so that sharpening costs loss some day
    p = P | {"sft-rl": wrong, "rl-sft": wrong, "joint-m0.2": expit(3 * logit(wrong)), "joint-m0.5": 0.97}
    greedy = {"rl-sft": {"reward_greedy": [0.61, 0.62, 0.63]}, "joint-m0.5": {"reward_greedy": [0.69, 0.70, 0.72]}}
    rows = {row["id"]: row for row in controls.judge_joint(results(changes=greedy, p=p))}
    assert is_a(list[ClaimRow], list(rows.values()))
    assert rows["J2-joint-m0.5"]["quantity"] == "reward_greedy: joint-m0.5 - rl-sft"
    assert rows["J2-joint-m0.5"]["estimate"] == pytest.approx(np.mean([0.08, 0.08, 0.09]))
    assert min(row["p_holm"] for row in rows.values()) == pytest.approx(
        8 * min(row["p_value"] for row in rows.values())
    )
    assert rows["J1-joint-m0.2"]["estimate"] == pytest.approx(0, abs=0.005)  # on the sequential policies' own curve
    assert rows["J1-joint-m0.5"]["estimate"] > 0.05  # right about the last sentence, too
    assert rows["J1-interleaved"]["estimate"] < -0.1  # as right, and much less sure than it could be


def test_the_answer_counts_verdicts_and_names_the_best_run():
    found = {"a": (0.1, "reproduced"), "b": (0.3, "inconclusive"), "c": (-0.2, "not reproduced")}
    rows = [
        {"id": f"J{n}-{run}", "estimate": sign * estimate, "ci95": None, "verdict": verdict, "seeds": 5}
        for n, sign in ((1, 1), (2, -1))
        for run, (estimate, verdict) in found.items()
    ]
    assert controls.joint_answer(rows) == (
        "In sampled reward at equal SFT loss, 1 of 3 joint runs are better and 1 worse; the best is b with +0.300. "
        "In greedy reward, 1 of 3 joint runs are better and 1 worse; the best is c with +0.200. "
        "(Means over 5 seeds with 95 % intervals; Holm's correction.)"
    )


def test_above_curves_is_the_rewards_difference_at_no_larger_loss():
    curve = pd.DataFrame({"sft_loss": [0.1, 0.2, 0.3], "reward": [0.3, 0.5, 0.7]})
    answers = policy("joint-m0.5", logit(0.8), [1, 1], [0])  # loss 0.223, reward 0.6
    assert controls.above_curves(answers, [curve]) == pytest.approx(0.6 - 0.5)
