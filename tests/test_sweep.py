"""The sweep of beta: which runs belong together, what each moved, and when training counts as settled."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from nondecoupling.analysis import sweep, theory
from nondecoupling.study.contracts import Crossing, SweepEntry
from nondecoupling.study.plan import has_two_answers
from nondecoupling.study.study import PROFILES, changed_settings, load_study, parse_overrides
from tables import SEEDS, is_a, metrics_of, policy, results_of

STUDY = load_study("nano")
LABELS = [1, 0, 1, 1]
START = np.array([2.0, -1.0, 0.5, -0.2])
RL = [run for run in STUDY.runs_of("sweep") if run.stage == "rl"]

# The plan

SETTINGS = [
    "",
    "rl.steps=100",
    "rl.beta=1 sweep.betas=[2.0,1.0,0.25]",
    "rl.normalisation=group",
    "rl.answers_per_prompt=4 rl.prompts_per_step=8 rl.learning_rate=1.0",
    "adaptation.method=full model.quantization=none",
]
CASES = [(path.stem, settings) for path in sorted(PROFILES.glob("*.yaml")) for settings in SETTINGS]


@pytest.mark.parametrize(("profile", "settings"), CASES)
def test_every_beta_is_run_for_some_steps_and_for_half_of_them(profile, settings):
    study = load_study(profile, overrides=parse_overrides(settings))
    plain = [run for run in study.runs_of("sweep") if run.stage == "rl" and not run.instead]
    whole = [run for run in plain if run.half]
    if not study.profile.pretrains or not has_two_answers(study.profile):
        assert not whole
        return
    assert [run.changes["rl.beta"] for run in whole] == study.profile.sweep.betas
    assert {run.half for run in whole} - {"sft-rl"} == {run.name for run in plain} - {run.name for run in whole}
    for run in whole:
        ours, half = study.settings_of(run), study.settings_of(study.run(run.half))
        assert ours.rl.steps == 2 * half.rl.steps == 2 * study.profile.rl.steps
        assert set(changed_settings(half, ours)) - {"evaluation.points"} == {"rl.steps"}
        assert run.parent == study.run(run.half).parent == "sft"


WORDS = {
    "rl.normalisation": "divided",
    "rl.algorithm": "{}",
}


@pytest.mark.parametrize(("profile", "settings"), [*CASES, ("nano", "rl.algorithm=rloo")])
def test_what_a_run_is_said_to_change_is_what_it_changes(profile, settings):
    study = load_study(profile, overrides=parse_overrides(settings))
    for run in [run for run in study.runs_of("sweep") if run.stage == "rl"]:
        changes = changed_settings(study.profile, study.settings_of(run))
        words = {WORDS[key].format(changes[key]) for key in set(changes) - {"rl.beta", "rl.steps", "evaluation.points"}}
        assert set(filter(None, run.instead.split(", "))) == words
        assert study.run(run.parent).changes.items() <= changes.items()  # it goes on as its start was trained


def test_each_beta_is_given_once():
    with pytest.raises(ValueError, match="betas must differ"):
        load_study("nano", overrides={"sweep.betas": [0.5, 1.0, 0.5]})


# One run


def swept(run, log_odds, agreement=0.9):
    """One seed of ``run``, which ends at ``log_odds``, and the SFT policy that it starts from."""
    ends = {"sft": START, run: log_odds}
    answers = [policy(name, odds, LABELS, [0], agreement=agreement) for name, odds in ends.items()]
    return results_of(STUDY, answers, seeds=[0])


def test_rl_that_is_ideal_by_its_own_belief_shows_no_gap():
    beta = 0.25
    results = swept("sft-rl-b0.25", theory.self_tilted_log_odds(START, beta))
    row = sweep.confront(results, STUDY.run("sft-rl-b0.25"), 0)
    by_hand = [math.log1p(math.exp(-x if label else x)) for x, label in zip(START, LABELS, strict=True)]
    ideal = START + 2 * np.tanh(START / 2) / beta
    after = [math.log1p(math.exp(-x if label else x)) for x, label in zip(ideal, LABELS, strict=True)]
    assert row["loss"] == pytest.approx(np.mean(after) - np.mean(by_hand))
    assert row["loss"] == pytest.approx(row["loss, own belief"])
    assert row["reward"] == pytest.approx(row["reward, own belief"])
    assert row["loss, perfect learner"] == pytest.approx(theory.rl_loss(0.9, beta) - theory.calibrated_loss(0.9))
    assert row["reward, perfect learner"] == pytest.approx(theory.rl_reward(0.9, beta) - theory.calibrated_reward(0.9))
    assert row["log-odds asked"] == pytest.approx(row["log-odds reached"]) == pytest.approx(np.abs(ideal).mean())
    assert row["objective"] == pytest.approx(1.0)
    assert row["slope"] == pytest.approx(1.0)


def test_half_of_the_ideal_shift_has_slope_one_half():
    ideal = 2 * np.tanh(START / 2)
    row = sweep.confront(swept("sft-rl-b1", START + ideal / 2), STUDY.run("sft-rl-b1"), 0)
    assert row["slope"] == pytest.approx(0.5)
    # a move at a right angle to what is asked for is no part of it
    across = START + ideal / 2 + np.array([ideal[1], -ideal[0], 0, 0])
    assert sweep.confront(swept("sft-rl-b1", across), STUDY.run("sft-rl-b1"), 0)["slope"] == pytest.approx(0.5)


def test_a_perfect_learners_changes_are_means_over_the_sentences():
    run = STUDY.run("sft-rl-b1")
    apart = [sweep.confront(swept(run.name, START, q), run, 0)["loss, perfect learner"] for q in (0.9, 0.6, 1.0)]
    together = sweep.confront(swept(run.name, START, [0.9, 0.9, 0.6, 1.0]), run, 0)
    assert apart[2] == 0  # a certain label has nothing to change
    assert together["loss, perfect learner"] == pytest.approx((2 * apart[0] + apart[1]) / 4)
    unknown = sweep.confront(swept(run.name, START, [0.9, 0.9, 0.9, np.nan]), run, 0)
    assert "loss, perfect learner" not in unknown


def test_rl_that_did_nothing_has_all_to_gain():
    row = sweep.confront(swept("sft-rl-b1", START), STUDY.run("sft-rl-b1"), 0)
    assert (row["loss"], row["reward"], row["objective"]) == (0, 0, 0)
    assert row["log-odds reached"] == pytest.approx(np.abs(START).mean())
    assert row["log-odds asked"] == pytest.approx(np.abs(START + 2 * np.tanh(START / 2)).mean())
    p = 1 / (1 + np.exp(-START))
    assert row["silent groups"] == pytest.approx(np.mean(p**8 + (1 - p) ** 8))


def test_groups_divided_by_their_deviation_have_their_own_resting_place():
    plain, divided = (STUDY.settings_of(STUDY.run(name)).rl for name in ("sft-rl-b1", "sft-rl-b1-group"))
    assert sweep.at_rest(START, 0.9, plain) == pytest.approx(START + 1.6)
    expected = theory.grpo_log_odds(START, 0.9, 1.0, 8, normalised=True)
    assert sweep.at_rest(START, 0.9, divided) == pytest.approx(expected)


# The sweep as a whole


def test_the_sweep_is_read_with_halves_from_elsewhere_and_without_sft():
    names = [run.name for run in STUDY.runs_of("sweep")]
    results = results_of(STUDY, [policy(name, START, LABELS, [3]) for name in ["sft", *names, "sft-rl"]], seeds=[3])
    table = sweep.confront_sweep(results)
    assert table["run"].tolist() == [*(run.name for run in RL), "sft-rl"]
    assert set(table["seed"]) == {3}


def test_where_the_sweep_is_missing_or_incomplete_there_is_none():
    some = [policy(name, START, LABELS) for name in ("sft", "sft-rl", "sft-rl-b1")]
    assert sweep.confront_sweep(results_of(STUDY, some)) is None
    without = load_study("nano", overrides={"sweep.betas": []})
    assert sweep.confront_sweep(results_of(without, some)) is None


def table_of(rise, half, predicted=0.2):
    """`confront_sweep` in which only sft-rl-b1 and its half matter; their rises of the loss per seed."""
    rows = []
    for run in [*RL, STUDY.run("sft-rl")]:
        settings = STUDY.settings_of(run).rl
        losses = {"sft-rl-b1": rise, "sft-rl-b1-half": half}.get(run.name, [0.1] * len(rise))
        for seed, loss in zip(SEEDS, losses, strict=False):
            row = {"run": run.name, "seed": seed, "beta": settings.beta, "steps": settings.steps}
            row |= {"instead": run.instead, "loss": loss, "loss, own belief": predicted}
            row |= {"reward": 0.1, "reward, own belief": 0.1, "log-odds asked": 4.0, "log-odds reached": 3.0}
            rows.append(row | {"silent groups": 0.5, "objective": 0.9, "slope": 0.8})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("rise", "half", "predicted", "settled"),
    [
        ([0.2, 0.2, 0.2], [0.19, 0.19, 0.19], 0.2, True),  # 0.01 of 0.05
        ([0.2, 0.2, 0.2], [0.14, 0.14, 0.14], 0.2, False),
        ([0.2, 0.2, 0.2], [0.26, 0.26, 0.26], 0.2, False),  # falling is no less a movement
        ([0.2, 0.2, 0.2], [0.3, 0.2, 0.1], 0.2, False),  # no movement on average, but the interval is too wide
        ([0.2, 0.2, 0.2], [0.14, 0.14, 0.14], 2.0, False),  # a far prediction does not excuse a movement
        ([0.2, 0.2, 0.2], [0.18, 0.18, 0.18], 0.02, False),  # nor does a far rise
        ([0.02, 0.02, 0.02], [0.011, 0.011, 0.011], 0.02, True),  # within 0.01
        ([0.2], [0.2], 0.2, None),
    ],
)
def test_a_run_has_settled_if_half_of_its_steps_end_at_the_same_place(rise, half, predicted, settled):
    summary = sweep.summarise_sweep(results_of(STUDY), table_of(rise, half, predicted))
    assert is_a(list[SweepEntry], summary)
    entries = {entry["run"]: entry for entry in summary}
    entry = entries["sft-rl-b1"]
    assert entry["settled"] is settled
    assert entry["doubling"]["mean"] == pytest.approx(np.mean(rise) - np.mean(half))
    assert (entry["half"], entries["sft-rl-b1-half"]["is_half"]) == ("sft-rl-b1-half", True)
    assert entry["change_of_loss"]["perfect_learner"] is None
    assert entry["change_of_loss"]["gap_to_own_belief"]["mean"] == pytest.approx(np.mean(rise) - predicted)
    # the half of sft-rl-b0.5 is a run of the paper's experiments, which has no entry of its own
    assert entries["sft-rl-b0.5"]["doubling"]["mean"] == 0
    assert "sft-rl" not in entries
    assert (entries["sft-rl-b1-group"]["doubling"], entries["sft-rl-b1-group"]["settled"]) == (None, None)


def test_the_division_is_judged_against_the_plain_run_of_its_beta_and_steps():
    table = table_of([0.2, 0.3, 0.4], [0.2] * 3).iloc[::-1]  # plain runs last, seeds from the last to the first
    divided = table["run"] == "sft-rl-b1-group"
    table.loc[divided, ["loss, own belief", "log-odds reached"]] = [0.25, 5.0]
    table.loc[divided, "loss"] = 0.1 + 0.2 * table["seed"]
    found = sweep.effect_of_division(table)
    assert found["loss"]["mean"] == pytest.approx(0)
    assert found["loss"]["ci95"] == pytest.approx(stats.ttest_1samp([-0.1, 0, 0.1], 0).confidence_interval())
    assert found["loss, own belief"]["mean"] == pytest.approx(0.05)
    assert found["log-odds reached"]["mean"] == pytest.approx(2)
    assert sweep.effect_of_division(table[table["instead"] == ""]) is None


# Where the base's loss is crossed


def test_a_crossing_is_linear_in_log_beta():
    betas = np.array([4.0, 1.0, 0.25])
    assert sweep.crossing_of(betas, np.array([-0.3, 0.1, 0.5])) == pytest.approx(4 * (1 / 4) ** 0.75)
    assert sweep.crossing_of(betas, np.array([-0.3, -0.1, 0.1])) == pytest.approx(0.5)
    assert sweep.crossing_of(betas, np.array([-0.3, -0.1, 0.0])) == pytest.approx(0.25)
    assert sweep.crossing_of(betas, np.array([-0.3, 0.2, -0.1])) == pytest.approx(4 * (1 / 4) ** 0.6)
    twice = sweep.crossing_of(np.array([8.0, 4.0, 2.0, 1.0]), np.array([-0.1, 0.1, -0.1, 0.3]))
    assert twice == pytest.approx(math.sqrt(32))
    for flat in ([-0.3, -0.2, -0.1], [0.1, 0.2, 0.3], [0.3, 0.1, -0.1]):
        assert sweep.crossing_of(betas, np.array(flat)) is None


def above_base(losses, p=0.8, base=0.6, study=STUDY, agreement=0.9):
    """Results of which only `sft_loss` matters, and the SFT policy, which gives nine of ten labels ``p``.

    ``losses`` maps whole runs of the sweep to three seeds' losses; the others have the base's.
    """
    labels = np.array([1] * 9 + [0])
    whole = [run.name for run in study.runs_of("sweep") if run.stage == "rl"]
    metrics = {run: {"sft_loss": losses.get(run, base)} for run in ["base", "sft-rl", *whole]}
    start = policy("sft", np.full(10, logit(p)), labels, agreement=agreement)
    return results_of(study, [start], metrics_of(metrics))


def test_the_crossing_by_hand():
    """Two seeds are above the base from beta = 1 on, the third at no beta."""
    below = {run: [0.5, 0.5, 0.5] for run in ("sft-rl-b5", "sft-rl-b2", "sft-rl-b1")}
    above = {f"sft-rl-b{beta}": [0.7, 0.9, 0.5] for beta in ("0.5", "0.25", "0.1", "0.05")}
    results = above_base(below | above | {"sft-rl": [0.65, 0.6, 0.55]})
    found = sweep.crossing(results)
    assert is_a(Crossing, found)
    assert sweep.crossing(replace(results, metrics=results.metrics.iloc[::-1])) == found  # rows in any order
    first, second = math.sqrt(0.5), 0.5**0.25  # half, and a quarter, of the way from 1 to 0.5
    assert found["by_seed"] == [pytest.approx(first), pytest.approx(second), None]
    assert found["measured"]["mean"] == pytest.approx(math.sqrt(first * second))
    logs = stats.ttest_1samp(np.log([first, second]), 0).confidence_interval()
    assert found["measured"]["ci95"] == pytest.approx(np.exp(logs).tolist())
    assert [point["beta"] for point in found["points"]] == [5, 2, 1, 0.5, 0.25, 0.1, 0.05, 0.5]
    last = found["points"][-1]
    assert (last["run"], last["measured"]["mean"]) == ("sft-rl", pytest.approx(0.0))

    def loss(p):  # nine labels of ten are the likelier one
        return -0.9 * math.log(p) - 0.1 * math.log(1 - p)

    own = expit(logit(0.8) + 2 * 0.6 / 0.5)
    assert last["own_belief"] == pytest.approx(loss(own) - 0.6)
    assert last["gap_to_own_belief"]["mean"] == pytest.approx(0.6 - loss(own))
    assert last["perfect_learner"] == pytest.approx(loss(expit(logit(0.9) + 1.6 / 0.5)) - 0.6)
    assert loss(expit(logit(0.8) + 1.2 / found["own_belief"])) == pytest.approx(0.6)
    assert loss(expit(logit(0.9) + 1.6 / found["perfect_learner"])) == pytest.approx(0.6)


def test_where_nothing_crosses_or_is_known_nothing_is_said():
    found = sweep.crossing(above_base({}, base=0.2, agreement=np.nan))  # the start is above the base already
    assert is_a(Crossing, found)
    assert (found["by_seed"], found["measured"], found["own_belief"]) == ([None] * 3, None, None)
    assert found["perfect_learner"] is None
    assert {point["perfect_learner"] for point in found["points"]} == {None}


def test_without_a_sweep_there_is_no_crossing_and_without_a_price_no_point_of_the_studys_own():
    assert sweep.crossing(results_of(STUDY, [policy("sft", START, LABELS)])) is None
    free = load_study("nano", overrides={"rl.beta": 0.0})
    assert "sft-rl" not in [point["run"] for point in sweep.crossing(above_base({}, study=free))["points"]]


def test_a_study_whose_beta_is_not_swept_has_its_own_point_on_the_curve():
    study = load_study("nano", overrides={"rl.beta": 0.7})
    losses = {f"sft-rl-b{beta:g}": 0.5 if beta > 0.7 else 0.8 for beta in study.profile.sweep.betas}
    found = sweep.crossing(above_base(losses | {"sft-rl": 0.6}, study=study))
    assert found["by_seed"] == [pytest.approx(0.7)] * 3
