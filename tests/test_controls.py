"""Controls and joint training: predictions and verdicts on policies made by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from nondecoupling import claims, controls, runs, theory
from nondecoupling.profile import load_study
from nondecoupling.statistics import mcnemar

SEEDS = (0, 1, 2)
LABELS = np.array([1, 1, 0, 1, 0, 1, 1, 0] * 5)


def predictions_at(p_label, mass=1.0, labels=LABELS):
    """Predictions of a policy that gives the right label the probability ``p_label`` of what the two share."""
    p_label = np.broadcast_to(p_label, labels.shape)
    acceptable = np.where(labels == 1, p_label, 1 - p_label)
    return pd.DataFrame(
        {
            "sentence": [f"s{place}" for place in range(len(labels))],
            "label": labels,
            "logp_acceptable": np.log(mass * acceptable),
            "logp_unacceptable": np.log(mass * (1 - acceptable)),
        }
    )


@pytest.fixture
def study():
    return load_study("nano")


@pytest.fixture
def root(tmp_path, study):
    """A folder with predictions of every policy that the controls read."""
    p = {"sft": 0.8, "rl": 0.9, "sft-rl": 0.95, "rl-sft": 0.8, "sft-wordings": 0.8, "sft-clean": 0.9}
    p |= {"joint-m0.5": 0.9, "interleaved": 0.85}
    for seed in SEEDS:
        for run, value in p.items():
            folder = runs.run_folder(tmp_path, run, seed)
            folder.mkdir(parents=True)
            mass = 0.9 if run == "sft-wordings" else 1.0
            predictions_at(value + 0.001 * seed, mass).to_parquet(folder / runs.predictions_file("dev"))
        folder = runs.run_folder(tmp_path, "reward-model", seed)
        folder.mkdir(parents=True)
        scored = np.where(LABELS == 1, 1.0, -1.0)
        table = predictions_at(0.8).assign(score_acceptable=scored, score_unacceptable=-scored)
        table.to_parquet(folder / runs.predictions_file("dev"))
    return tmp_path


def final_metrics(changes=None):
    names = {run for claim in controls.CONTROLS for run in (claim.before, claim.after)}
    names |= {"sft", "sft-rl", "rl", "rl-sft", "rl-weak", "joint-m0.5", "interleaved"}
    rows = []
    for run in sorted(names):
        for seed in SEEDS:
            row = {"run": run, "seed": seed, "sft_loss": 0.4, "reward_exact": 0.5, "reward_greedy": 0.6, "n": 1000}
            row |= {"mcc": 0.6, "predicted_acceptable_rate": 0.7, "majority_reward": 0.37}
            rows.append(row | {k: v + 0.001 * seed for k, v in (changes or {}).get(run, {}).items()})
    return pd.DataFrame(rows)


@pytest.fixture
def trajectories():
    """After a quarter of the steps RL has 80 % of its reward and 50 % of its loss."""
    table = pd.DataFrame({"step": [0, 16, 64], "reward_exact": [0.4, 0.56, 0.6], "sft_loss": [0.4, 0.5, 0.6]})
    return pd.concat([table.assign(run="sft-rl", seed=seed) for seed in SEEDS])


A1 = {"id": "A1", "predicted": 0.2, "predicted_from_policies": 0.21}


def judged(study, root, metrics, trajectories):
    return {row["id"]: row for row in controls.judge_controls(study, root, [A1], metrics, trajectories)}


def test_every_control_answers_an_objection_and_speaks_of_planned_runs(study):
    all_claims = [*controls.CONTROLS, controls.COLLAPSE, controls.STOPPING]
    assert {claim.id for claim in all_claims} == set(controls.OBJECTIONS)
    planned = {"", "sequential", *(run.name for run in study.profile.runs)}
    for claim in all_claims:
        assert {claim.before, claim.after} <= planned, claim.id


def test_the_rise_by_another_wording_is_the_closed_form_of_the_tilt():
    """Four answers: either label in either wording, of which only the right label in the other wording earns +1."""
    q, share, beta = 0.9, 0.1, 0.5
    p0 = np.array([(1 - share) * q, (1 - share) * (1 - q), share * q, share * (1 - q)])
    reward = np.array([-1, -1, 2 * q - 1, 1 - 2 * q])  # expected over annotators
    tilted = np.exp(theory.tilt(np.log(p0)[None], reward[None], beta))[0]
    rise = np.log(p0[:2] / tilted[:2])
    assert rise[0] == pytest.approx(rise[1])  # whatever the label
    assert controls.wording_rise(np.array([q]), np.array([share]), beta) == pytest.approx(rise[0])


def test_predictions_from_the_policies_by_hand(study, root):
    metrics = final_metrics({"sft": {"reward_exact": 0.3}, "rl-weak": {"reward_exact": 0.1}})
    perfect, policies = controls.predictions_for_controls(study, root, [A1], metrics)
    assert (perfect["K1"], policies["K3"], policies["K10"]) == (0.2, 0.21, 0.21)
    beta = study.profile.rl.beta
    p = 0.8 + 0.001 * np.arange(3)
    # a proxy that prefers every right label by 2 nats, of which RL adds 2 / beta
    by_proxy = 2 * expit(logit(p) + 2 / beta) - 1
    by_truth = 2 * expit(logit(p) + 2 * (2 * p - 1) / beta) - 1
    assert policies["K9"] == pytest.approx((by_proxy - by_truth).mean(), abs=1e-6)
    assert policies["K8"] == pytest.approx(0.2)
    share = np.full(1, 0.1)
    expected = [controls.wording_rise(np.array([value]), share, beta) for value in p]
    right, wrong = p, 1 - p
    assert len(right) == len(wrong)
    assert policies["K4"] == pytest.approx(np.mean(expected), rel=0.05)  # p of "acceptable" is p or 1 - p
    tilted = expit(logit(p + 0.1) + 2 * (2 * (p + 0.1) - 1) / beta)
    assert policies["K6"] == pytest.approx(np.mean(np.log((p + 0.1) / tilted)), abs=1e-6)
    assert perfect["K6"] == 0.0


def test_verdicts_of_the_controls(study, root, trajectories):
    metrics = final_metrics(
        {
            "sft-rl": {"sft_loss": 0.6},  # above more SFT, and above RL paid by a coin
            "rl-rl": {"reward_exact": 0.5},
            "sft-rl-format": {"sft_loss": 1.9},
            "rl-weak": {"mcc": 0.0, "predicted_acceptable_rate": 0.999},
        }
    )
    metrics["sft_loss"] += np.tile([0.0, 0.002, -0.001], len(metrics) // 3) * (metrics["run"] == "sft-rl-format")
    rows = judged(study, root, metrics, trajectories)
    assert list(rows) == [f"K{number}" for number in range(1, 12)]
    assert rows["K4"]["estimate"] == pytest.approx(1.5, abs=0.01)
    assert rows["K4"]["verdict"] == "reproduced"
    assert rows["K7"]["verdict"] == "reproduced"
    assert (rows["K7"]["estimate"], rows["K7"]["p_value"]) == (1.0, None)
    assert rows["K11"]["estimate"] == pytest.approx(0.3)
    assert json.loads(json.dumps(list(rows.values()), allow_nan=False)) == list(rows.values())
    tested = [row["p_value"] for row in rows.values() if row["p_value"] is not None]
    assert len(tested) == 10
    smallest = min(tested)
    assert min(row["p_holm"] for row in rows.values() if row["p_holm"] is not None) == pytest.approx(
        min(1.0, 10 * smallest)
    )


@pytest.mark.parametrize(("fallen", "verdict"), [(3, "reproduced"), (1, "inconclusive"), (0, "not reproduced")])
def test_a_collapse_is_counted_over_seeds(study, root, trajectories, fallen, verdict):
    metrics = final_metrics()
    down = (metrics["run"] == "rl-weak") & (metrics["seed"] < fallen)
    metrics.loc[down, ["mcc", "predicted_acceptable_rate"]] = [0.0, 1.0]
    assert judged(study, root, metrics, trajectories)["K7"]["verdict"] == verdict


def test_controls_that_a_study_cannot_have_are_left_out(root, trajectories):
    study = load_study("nano", data=str(root), model=str(root))
    assert not {"sft-clean", "rl-weak", "rl-weak-sft"} & {run.name for run in study.profile.runs}
    given = {run.name for run in load_study("nano", data=str(root)).profile.runs}
    assert "sft-clean" not in given
    assert "rl-weak" in given
    metrics = final_metrics()
    gone = ["sft-clean", "sft-rl-clean", "rl-weak", "rl-weak-sft"]
    rows = judged(study, root, metrics[~metrics["run"].isin(gone)], trajectories)
    assert set(rows) == {f"K{number}" for number in range(1, 12)} - {"K6", "K7", "K8"}
    assert {row["predicted"] for row in rows.values()} == {None, 0.2}  # nothing is known of a perfect learner but A1's


# Joint training


def test_a_temperature_curve_passes_through_the_policy_and_its_extremes():
    log_odds = logit(np.full(40, 0.8)) * np.where(LABELS == 1, 1, -1)
    curve = controls.temperature_curve(log_odds, pd.Series(LABELS))
    reward, loss = 2 * 0.8 - 1, -math.log(0.8)
    near = curve.iloc[(curve["sft_loss"] - loss).abs().argmin()]
    assert near["reward"] == pytest.approx(reward, abs=0.02)
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


def test_joint_runs_are_judged_against_the_better_sequential_policy(root):
    metrics = final_metrics({"rl-sft": {"reward_greedy": 0.62}, "joint-m0.5": {"reward_greedy": 0.70}})
    rows = {row["id"]: row for row in controls.judge_joint(root, metrics, ["joint-m0.5", "interleaved"])}
    assert list(rows) == ["J1-joint-m0.5", "J2-joint-m0.5", "J1-interleaved", "J2-interleaved"]
    assert rows["J2-joint-m0.5"]["quantity"] == "reward_greedy: joint-m0.5 - rl-sft"
    assert rows["J2-joint-m0.5"]["estimate"] == pytest.approx(0.08)
    # every policy here is right about every sentence, so that sharpening costs nothing: the sequential ones do it best
    assert rows["J1-joint-m0.5"]["estimate"] < 0
    assert "joint runs are better" in controls.joint_answer(list(rows.values()))


# One seed, over sentences


def test_one_seed_is_judged_over_its_sentences(tmp_path):
    before, after = np.full(40, 0.8), np.full(40, 0.9)
    after[:6] = 0.3  # six sentences turn wrong
    for run, p in (("rl", before), ("rl-sft", after)):
        folder = runs.run_folder(tmp_path, run, 4)
        folder.mkdir(parents=True)
        predictions_at(p).to_parquet(folder / runs.predictions_file("dev"))
    row = claims.compare_sentences(tmp_path, 4, "rl", "rl-sft")
    assert row["more right"] == "-6"
    assert float(row["McNemar p"]) == pytest.approx(mcnemar(np.ones(40), np.arange(40) >= 6).p_value, rel=0.01)
    change = (34 * (math.log(0.8) - math.log(0.9)) + 6 * (math.log(0.8) - math.log(0.3))) / 40
    assert row["SFT loss"].startswith(f"{change:+.3f} [")
    assert claims.label_log_odds(runs.run_folder(tmp_path, "rl", 4))[0][0] == pytest.approx(logit(0.8))
