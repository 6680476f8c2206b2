"""Every estimate and interval of claims.json can be recomputed from a value for each seed."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nondecoupling.analysis import claims, controls, landing
from nondecoupling.analysis.measures import greedy_share
from nondecoupling.study.study import load_study
from tables import metrics_of, policy, results_of

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 60)
SEEDS = (0, 2, 5)
STUDY = load_study("nano")


def study_results(runs):
    """Noisy policies of some runs, each surer than the one before, with metrics of their own in every seed."""
    answers, noise = [], RNG.normal(0, 1, 60)
    for place, run in enumerate(runs):
        odds = (2 * LABELS - 1 + noise) * (2 + place) * RNG.uniform(0.9, 1.1, (3, 1))
        answers.append(policy(run, odds, LABELS, SEEDS, score_acceptable=noise, score_unacceptable=-noise))
    names = ("sft_loss", "reward_exact", "reward_sampled", "reward_greedy", "kl_to_parent")
    metrics = {run: {name: RNG.uniform(0.3, 0.6, 3) for name in names} for run in runs}
    return results_of(STUDY, answers, metrics_of(metrics, SEEDS), seeds=SEEDS)


def check(values, rows):
    """Shares of a rise exist only in seeds in which something rose."""
    for row in rows:
        found = values[row["id"]].dropna()
        assert row["seeds"] == len(found) > 0
        assert row["estimate"] == pytest.approx(found.mean())
        interval = list(stats.ttest_1samp(found, 0).confidence_interval(0.95)) if len(found) > 1 else None
        assert row["ci95"] == (interval and pytest.approx(interval))


def test_every_estimate_and_interval_comes_from_the_values():
    found = study_results([run.name for run in STUDY.runs if run.group in ("main", "controls") and run.stage != "data"])
    values = claims.values_of_claims(found) | controls.values_of_controls(found) | controls.values_of_joint(found)
    values["T2"] = landing.losses(found, "sft-rl") - landing.losses(found, "sft")
    values["T3"] = landing.decoded_rewards(found, "sft-rl") - landing.decoded_rewards(found, "sft")
    values["T5"] = claims.share_of_bound(found)
    values["T6"] = claims.by_seed(found, greedy_share, "sft", "sft-rl")
    values["T7"] = claims.change_of(found, claims.GREEDY_UNCHANGED)
    values = {name: pd.Series(by_seed, index=SEEDS) for name, by_seed in values.items()}
    rows = claims.judge_claims(found)
    theory = {"identity_gaps": {"x": 0.0}, "beta": 0.5, "sweep": None, "runs": landing.landings(found)}
    of_theory = [row for row in claims.judge_theory(found, theory) if row["id"] != "T1" and row["verdict"] != "not run"]
    of_controls = controls.judge_controls(found, rows) + controls.judge_joint(found)
    check(values, rows + of_theory + of_controls)
    assert set(values) == {row["id"] for row in rows + of_theory + of_controls}
