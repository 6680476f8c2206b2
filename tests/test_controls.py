"""Controls and joint training: verdicts on policies made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from nondecoupling.analysis import controls, measures
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.plan import SEQUENTIAL
from nondecoupling.study.study import load_study
from tables import is_a, metrics_of, odds_of, policy, results_of

STUDY = load_study("nano")
LABELS = np.array([1, 1, 0, 1, 0, 1, 1, 0] * 5)
A1 = {"id": "A1", "predicted": 0.2, "predicted_from_policies": 0.21}
P = {"base": 0.6, "sft": 0.8, "rl": 0.9, "sft-rl": 0.95, "rl-sft": 0.8}
P |= {"sft-wordings": 0.8, "sft-clean": 0.9, "sft-rl-random": 0.6}
P |= {"joint-m0.2": 0.85, "joint-m0.5": 0.9, "joint-m0.8": 0.85, "interleaved": 0.85}


def results(study=STUDY, changes=None, p=P, judge_accuracy=0.85):
    """Policies that are right about every sentence, metrics of sound policies but for ``changes``."""
    planned = {run.name for run in study.runs}
    known = {"agreement": np.nan if study.profile.data.folder else 0.9}
    answers = [policy(run, odds_of(p[run], LABELS), LABELS, **known) for run in P if run in planned]
    sides = np.where(LABELS == 1, 1.0, -1.0)
    answers += [policy("reward-model", 0.0, LABELS, score_acceptable=sides, score_unacceptable=-sides)]
    runs = {run: (changes or {}).get(run, {}) for run in planned - {"data"}}
    return results_of(study, answers, metrics_of(runs | {"reward-model": {"accuracy": judge_accuracy}}))


def judged(found):
    return {row["id"]: row for row in controls.judge_controls(found, [A1])}


def test_every_control_answers_an_objection_and_speaks_of_planned_runs():
    assert [claim.id for claim in controls.controls_of(STUDY)] == list(controls.OBJECTIONS)


def test_verdicts_of_the_controls():
    found = results(
        changes={
            "sft-rl": {"sft_loss": [0.6, 0.61, 0.62], "reward_exact": [0.7, 0.71, 0.7]},
            "sft-sft": {"sft_loss": [0.4, 0.4, 0.41]},
            "sft-wordings": {"sft_loss": [0.4, 0.401, 0.402]},
            "sft-rl-format": {"sft_loss": [1.9, 1.903, 1.901]},
            "sft-rl-sft": {"sft_loss": [0.45, 0.451, 0.452], "reward_greedy": [0.6, 0.601, 0.599]},
        }
    )
    rows = judged(found)
    assert is_a(list[ClaimRow], list(rows.values()))
    assert list(rows) == list(controls.OBJECTIONS)
    assert rows["K1"]["estimate"] == pytest.approx(0.61 - 0.40333333)
    assert rows["K4"]["estimate"] == pytest.approx(1.5, abs=0.01)
    assert rows["K12"]["estimate"] == pytest.approx(0.051)  # beyond its margin; sft-again ends at 0.4
    assert {name: rows[name]["verdict"] for name in ("K1", "K1e", "K3r", "K4", "K12", "K12g")} == {
        "K1": "confirmed",
        "K1e": "inconclusive",  # within its margin if it were judged alone
        "K3r": "confirmed",
        "K4": "confirmed",
        "K12": "refuted",
        "K12g": "confirmed",
    }
    assert stats.ttest_1samp([0, 0, 0.01], 0.02, alternative="less").pvalue < 0.05 < rows["K1e"]["p_holm"]
    assert (rows["K6"]["predicted"], rows["K1"]["predicted_from_policies"]) == (0.0, 0.21)
    tested = [row["p_value"] for row in rows.values() if row["p_value"] is not None]
    assert min(row["p_holm"] for row in rows.values() if row["p_holm"]) == pytest.approx(len(tested) * min(tested))


def test_no_control_of_no_difference_shows_a_predicted_change():
    rows = judged(results())
    equal = [row for row in rows.values() if row["margin"] is not None]
    assert [row["id"] for row in equal] == ["K1e", "K3", "K12", "K12g"]
    assert {(row["predicted"], row["predicted_from_policies"]) for row in equal} == {(None, None)}


def test_rl_is_compared_with_random_labels_per_nat_by_hand():
    """Of every ten sentences nine carry the policy's likelier label, so that the start, at 0.9, is calibrated."""
    found = results()
    labels = np.tile([1] * 9 + [0], 4)
    runs = {"sft": 0.9, "sft-rl": 0.99, "sft-rl-random": 0.6}
    answers = [policy(run, np.full(40, logit(p)), labels) for run, p in runs.items()]
    calibrated = replace(found, answers=pd.concat(answers))
    assert controls.slope_difference(calibrated).tolist() == pytest.approx([0, 0, 0])
    note = controls.distances_note(calibrated)
    kl = {p: 0.9 * np.log(0.9 / p) + 0.1 * np.log(0.1 / (1 - p)) for p in (0.99, 0.6)}
    assert note == f"KL(p_SFT || p): sft-rl {kl[0.99]:.3f}, sft-rl-random {kl[0.6]:.3f} nats"
    # RL that learns the last label of ten as well lowers the loss where random labels raise it
    learnt = policy("sft-rl", odds_of(0.99, labels), labels)
    slopes = controls.slope_difference(replace(found, answers=pd.concat([*answers[::2], learnt])))
    loss = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    moved = 0.9 * kl[0.99] + 0.1 * (0.9 * np.log(0.9 / 0.01) + 0.1 * np.log(0.1 / 0.99))
    assert slopes.tolist() == pytest.approx([(-np.log(0.99) - loss) / moved - 1] * 3)


def test_k3_says_how_far_both_have_gone():
    assert judged(results())["K3"]["note"].startswith("KL(p_SFT || p): sft-rl 0.")


@pytest.mark.parametrize(
    ("accuracy", "note"),
    [([0.9, 0.689, 0.8], "the reward model had failed in seeds 1"), ([0.5, 0.6, 0.9], None), (0.85, "")],
)
def test_a_failed_reward_model_is_named_and_judged_all_the_same(accuracy, note):
    changes = {"sft-rl-proxy": {"reward_exact": [0.2, 0.3, 0.45]}}
    row = judged(results(changes=changes, judge_accuracy=accuracy))["K9"]
    assert row["note"] == ("the reward model had failed in seeds 0, 1" if note is None else note)
    assert (row["seeds"], row["estimate"]) == (3, pytest.approx(np.mean([0.2, 0.3, 0.45]) - 0.5))


def test_controls_that_a_study_cannot_have_are_left_out(tmp_path):
    study = load_study("nano", data=str(tmp_path))
    assert set(controls.OBJECTIONS) - {claim.id for claim in controls.controls_of(study)} == {"K6"}
    rows = judged(results(study))
    assert set(controls.OBJECTIONS) - set(rows) == {"K6"}
    assert {row["predicted"] for row in rows.values()} == {None}  # nobody knows what a perfect learner would
    assert rows["K1"]["predicted_from_policies"] == 0.21


@pytest.mark.parametrize("profile", ["nano", "laptop"])
def test_controls_that_were_not_run_have_the_rows_of_those_that_were_and_no_number(profile):
    study = load_study(profile)
    rows = controls.controls_not_run(study)
    assert is_a(list[ClaimRow], rows)
    families = {letter: {row["id"] for row in rows if row["id"][0] == letter} for letter in "KJ"}
    assert families["K"] == {claim.id for claim in controls.controls_of(study)}
    assert families["J"] == {f"J{n}-{run.name}" for n in ("1", "1e", "2") for run in study.runs if run.stage == "joint"}
    for row in rows:
        assert (row["verdict"], row["note"], row["seeds"], row["test"]) == ("not run", "make controls", 0, "-")
        numbers = ("estimate", "ci95", "predicted", "predicted_from_policies", "p_value", "p_holm")
        assert {row[name] for name in numbers} == {None}


def test_rows_that_were_run_have_the_ids_of_those_that_were_not():
    found = results()
    rows = controls.judge_controls(found, [A1]) + controls.judge_joint(found)
    assert [row["id"] for row in rows] == [row["id"] for row in controls.controls_not_run(STUDY)]


def test_controls_are_judged_as_far_as_they_were_run():
    whole = results(changes={"sft-rl": {"sft_loss": [0.6, 0.61, 0.62]}, "sft-sft": {"sft_loss": [0.4, 0.4, 0.41]}})
    kept = {"base", "sft", "sft-rl", "rl", "rl-sft", "sft-sft", "joint-m0.5"}
    metrics, answers = (table[table["run"].isin(kept)] for table in (whole.metrics, whole.answers))
    found = replace(whole, metrics=metrics, answers=answers)
    rows = controls.judge_controls(found, [A1])
    assert [row["id"] for row in rows] == list(controls.OBJECTIONS)
    run = {row["id"]: row for row in rows if row["verdict"] != "not run"}
    assert set(run) == {"K1", "K1e"}
    assert run["K1"]["p_holm"] == pytest.approx(2 * run["K1"]["p_value"])  # a family of those that were run
    assert {row["note"] for row in rows if row["id"] not in run} == {"make controls"}
    joint = controls.judge_joint(found)
    assert {row["id"] for row in joint if row["verdict"] != "not run"} == {
        f"{n}-joint-m0.5" for n in ("J1", "J1e", "J2")
    }
    assert "0 of 1 joint runs" in controls.joint_answer(joint)
    nothing = controls.judge_joint(replace(found, metrics=found.metrics[found.metrics["run"] != "joint-m0.5"]))
    assert controls.joint_answer(nothing) == "Joint training was not run (make controls)."


SHORT = {
    "sft": {"reward_exact": 0.4, "sft_loss": 0.4},
    "sft-rl-short": {"reward_exact": [0.55, 0.56, 0.57], "sft_loss": 0.46},
    "sft-rl": {"reward_exact": 0.6, "sft_loss": [0.7, 0.7, 0.8]},
}


def test_a_quarter_of_rl_is_judged_by_its_shares_of_gain_and_rise():
    found = results(changes=SHORT)
    shares = controls.early_shares(found)
    assert shares["reward"].tolist() == pytest.approx([0.75, 0.8, 0.85])
    assert shares["loss"].tolist() == pytest.approx([0.2, 0.2, 0.15])
    row = judged(found)["K11"]
    assert row["estimate"] == pytest.approx(np.mean([0.55, 0.6, 0.7]))
    assert row["quantity"] == "share of reward - share of loss"


def test_where_rl_raised_nothing_there_is_no_share():
    fell = SHORT | {"sft-rl": {"reward_exact": [0.6, 0.6, 0.3], "sft_loss": [0.3, 0.7, 0.7]}}
    row = judged(results(changes=fell))["K11"]
    assert (row["seeds"], row["note"]) == (1, "no such quantity in seeds 0, 2")


def test_reward_per_nat_of_a_quarter_and_of_the_rest():
    table = controls.reward_per_nat(results(changes=SHORT))
    early, late = table[["reward per nat, a quarter", "reward per nat, the rest"]].iloc[0]
    assert early == pytest.approx(0.15 / 0.06)
    assert late == pytest.approx(0.05 / 0.24)


# Joint training


def test_joint_runs_are_judged_against_the_better_sequential_policy():
    wrong = np.where(np.arange(40) % 20 < 18, 0.8, 0.1)  # about one sentence in ten, so that sharpness costs loss
    p = P | {"sft-rl": wrong, "rl-sft": 0.7, "joint-m0.2": expit(3 * logit(wrong))}
    p |= {"rl-sft": np.where(np.arange(40) % 20 < 15, 0.9, 0.2), "joint-m0.5": np.linspace(0.94, 0.99, 40)}
    found = results(p=p)
    noise = {run: found.answers["run"] == run for run in ("joint-m0.5", "joint-m0.2")}
    for run, rows in noise.items():  # seeds differ a little, or there is nothing to test
        shift = 1 + 0.01 * found.answers.loc[rows, "seed"] * (1 if run == "joint-m0.5" else -1)
        found.answers.loc[rows, "logp_acceptable"] *= shift
    rows = {row["id"]: row for row in controls.judge_joint(found)}
    assert is_a(list[ClaimRow], list(rows.values()))
    assert list(rows) == [f"{letter}-{run}" for run in controls.joint_runs(STUDY) for letter in ("J1", "J1e", "J2")]
    words = f"joint-m0.5 - better of {', '.join(SEQUENTIAL)}"
    assert rows["J1-joint-m0.5"]["quantity"] == f"reward at equal SFT loss: {words}"
    assert rows["J2-joint-m0.5"]["quantity"] == f"reward of greedy answers: {words}"
    assert rows["J2-joint-m0.5"]["estimate"] == pytest.approx(0.2)  # sft-rl is wrong about one in ten, rl-sft five
    assert rows["J1-joint-m0.2"]["estimate"] == pytest.approx(0, abs=0.01)  # one of the policies at a temperature
    assert abs(rows["J1-joint-m0.2"]["estimate"]) < rows["J1e-joint-m0.2"]["margin"] == controls.REWARD_MARGIN
    assert rows["J1-joint-m0.5"]["estimate"] > 0.05  # right about the tenth sentence, too
    tested = [row["p_value"] for row in rows.values()]
    assert min(row["p_holm"] for row in rows.values()) == pytest.approx(len(tested) * min(tested))


def test_values_of_joint_runs_are_the_measures_of_each_seed():
    found = results()
    values = controls.values_of_joint(found)
    rivals = [found.answers_of(run, 1) for run in SEQUENTIAL]
    sampled, greedy = measures.advantage(found.answers_of("joint-m0.8", 1), rivals)
    assert (values["J1-joint-m0.8"][1], values["J2-joint-m0.8"][1]) == (sampled, greedy)
    assert values["J1e-joint-m0.8"].equals(values["J1-joint-m0.8"])


def test_the_answer_counts_verdicts_and_names_the_highest_run():
    found = {"a": (0.1, "confirmed"), "b": (0.3, "inconclusive"), "c": (-0.2, "refuted")}
    rows = [
        {"id": f"J{n}-{run}", "estimate": sign * estimate, "ci95": None, "verdict": verdict, "seeds": 5, "margin": None}
        for n, sign in ((1, 1), (2, -1))
        for run, (estimate, verdict) in found.items()
    ]
    rows += [rows[0] | {"id": "J1e-c", "margin": 0.02}, rows[1] | {"id": "J1e-b", "margin": 0.02}]
    assert controls.joint_answer(rows) == (
        "In sampled reward at equal SFT loss, 1 of 3 joint runs are shown to be better and 1 worse; the highest mean "
        "is b's, +0.300. No more than 0.02 of reward apart, either way: 1 of 2. In greedy reward, 1 of 3 joint runs "
        "are shown to be better and 1 worse; the highest mean is c's, +0.200. (Means over 5 seeds with 95 % intervals; "
        "Holm's correction.)"
    )
    below = [row | {"estimate": (row["estimate"] - 0.3) if row["id"] < "J2" else -0.1} for row in rows]
    assert "the highest mean is b's, +0.000" in controls.joint_answer(below)  # not one of less than nothing
