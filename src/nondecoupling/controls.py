"""Controls and joint training: what each answers, and the rules of its verdict, written before reported seeds were run.

Verdicts follow the rule of `claims`, with Holm's correction over all controls, and over all joint runs. All statements
here are ours; the paper runs no control, and concludes that the two stages should be one joint optimisation without
running it.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nondecoupling import runs, theory
from nondecoupling.claims import Claim, corrected_family, judged_row, judged_rows, label_log_odds
from nondecoupling.flags import is_collapsed
from nondecoupling.profile import Study
from nondecoupling.statistics import Interval, Significance, mean_interval, paired_test

CONTROLS = [
    Claim("K1", "RL raises the SFT loss more than as many further SFT steps", "sft_loss", "sft-rl", "sft-sft", +1, "-"),
    Claim("K2", "SFT after RL lowers the reward below that of more RL", "reward_exact", "rl-sft", "rl-rl", -1, "-"),
    Claim("K3", "RL raises the SFT loss more than RL paid by a coin", "sft_loss", "sft-rl", "sft-rl-random", +1, "-"),
    Claim("K4", "RL for another wording raises the loss", "sft_loss", "sft-rl-format", "sft-wordings", +1, "-"),
    Claim("K5", "A tenth of the SFT lowers the reward already", "reward_exact", "rl-sft-short", "rl", -1, "-"),
    Claim("K6", "Without disagreement RL lowers the SFT loss", "sft_loss", "sft-rl-clean", "sft-clean", -1, "-"),
    Claim("K8", "SFT after collapsed RL raises the reward", "reward_exact", "rl-weak-sft", "rl-weak", +1, "-"),
    Claim("K9", "RL paid by the proxy earns less true reward", "reward_exact", "sft-rl-proxy", "sft-rl", -1, "-"),
    Claim("K10", "RLOO raises the SFT loss, too", "sft_loss", "sft-rl-rloo", "sft", +1, "-"),
]
# These two are no difference of one metric between two policies.
COLLAPSE = Claim("K7", "RL from a base that knows little collapses to one answer", "collapsed", "rl-weak", "", +1, "-")
STOPPING = Claim("K11", "A quarter of RL has more of its reward than of its loss", "share", "sft-rl", "sft", +1, "-")

OBJECTIONS = {
    "K1": "Is the rise of the loss just drift, which any further training brings?",
    "K2": "Is the fall of the reward just what more training of any kind does?",
    "K3": "Is it the reward that raises the loss, or the noise of RL's updates?",
    "K4": "Does the sign rule hold where RL pays for what the demonstrations do not show?",
    "K5": "Does the fall of the reward need a whole stage of SFT?",
    "K6": "Is the rise a law, or does it come from disagreement, as the theory says?",
    "K7": "Is a reward like the paper's 0.385 a skill?",
    "K8": "Does SFT always lower the reward, or only where RL had learnt something?",
    "K9": "Does a learnt reward change the picture, and is it over-optimised?",
    "K10": "Is it GRPO, or any policy gradient?",
    "K11": "Must one pay the whole rise of the loss to get the reward?",
}
SEQUENTIAL = ("sft-rl", "rl-sft")
TEMPERATURES = np.geomspace(0.2, 5, 200)
EARLY = 0.25  # of RL's steps


def wording_rise(p: np.ndarray, share: np.ndarray, beta: float) -> float:
    """Rise of the SFT loss, nats, by ideal RL that pays only for the other wording (ours, from the sign rule).

    Before it a share ``share`` of the answers is in that wording, and the right label has probability ``p`` in either;
    the usual wording earns -1, so its loss rises by log Z + 1/beta, whatever the label. Both arrays (sentences,).
    """
    belief = 2 * p - 1  # expected reward of the label that has probability p
    paid = share * (p * np.exp(belief / beta) + (1 - p) * np.exp(-belief / beta))
    return float(np.mean(np.log(paid + (1 - share) * np.exp(-1 / beta)) + 1 / beta))


def predictions_for_controls(study: Study, root: Path, rows: list[dict[str, Any]], metrics: pd.DataFrame):
    """What a perfect learner would do, and what the measured policies predict, by the controls' ids.

    ``rows`` are the judged claims of the same study, of which A1's predictions hold for K1, K3 and K10, too;
    ``metrics`` are the final metrics of all its runs.
    """
    q, beta, known = 1 - (study.profile.data.disagreement or 0), study.profile.rl.beta, study.profile.data.generated
    rise = next(row for row in rows if row["id"] == "A1")
    reward = metrics.groupby("run")["reward_exact"].mean()
    policies = {name: rise["predicted_from_policies"] for name in ("K1", "K3", "K10")}
    perfect = dict.fromkeys(policies, rise["predicted"])

    def mean_over_seeds(run: str, quantity) -> float:
        """Mean over seeds of ``quantity(log-odds of the run's policy on dev, its predictions, seed)``."""
        odds = {seed: label_log_odds(runs.run_folder(root, run, seed)) for seed in metrics["seed"].unique()}
        return float(np.mean([quantity(*policy, seed) for seed, policy in odds.items()]))

    def reward_after_tilt(log_odds, answers, seed) -> float:
        return theory.expected_reward_of_odds(theory.self_tilted_log_odds(log_odds, beta), answers["label"], 0.0)

    def reward_after_proxy(log_odds, answers, seed) -> float:
        proxy = str(study.run("sft-rl-proxy").proxy)
        scored = runs.read_predictions(runs.run_folder(root, proxy, seed))
        added = (scored["score_acceptable"] - scored["score_unacceptable"]).to_numpy() / beta
        return theory.expected_reward_of_odds(log_odds + added, answers["label"], 0.0)

    def rise_by_wording(log_odds, answers, seed) -> float:
        usual = np.exp(answers[["logp_unacceptable", "logp_acceptable"]].to_numpy()).sum(1).clip(max=1)
        return wording_rise(np.exp(theory.two_label_policy(log_odds)[:, 1]), 1 - usual, beta)

    def rise_by_tilt(log_odds, answers, seed) -> float:
        tilted = theory.self_tilted_log_odds(log_odds, beta)
        return theory.expected_loss(tilted, answers["label"], 0.0) - theory.expected_loss(
            log_odds, answers["label"], 0.0
        )

    policies |= {
        "K2": float(reward["sft"]) - mean_over_seeds("rl", reward_after_tilt),
        "K4": mean_over_seeds("sft-wordings", rise_by_wording),
        "K9": mean_over_seeds("sft", reward_after_proxy) - mean_over_seeds("sft", reward_after_tilt),
    }
    if "sft-clean" in set(metrics["run"]):
        policies["K6"] = mean_over_seeds("sft-clean", rise_by_tilt)
    if "rl-weak" in set(metrics["run"]):
        policies["K8"] = float(reward["sft"] - reward["rl-weak"])
    if known:
        calibrated, by_truth = float(theory.calibrated_reward(q)), float(theory.rl_reward(q, beta))
        share = study.for_run("sft-wordings").sft.other_wording_share
        by_proxy = theory.expected_reward_of_odds([np.log(q / (1 - q)) * (1 + 1 / beta)], [1], 1 - q)
        perfect |= {
            "K2": calibrated - float(theory.rl_reward(q, beta / 2)),  # two tilts are one at half the price
            "K4": wording_rise(np.array([q]), np.array([share]), beta),
            "K6": 0.0,
            "K8": calibrated - metrics["majority_reward"].iloc[0],
            "K9": by_proxy - by_truth,
        }
    return perfect, policies


def judge_controls(
    study: Study, root: Path, rows: list[dict[str, Any]], metrics: pd.DataFrame, trajectories: pd.DataFrame
) -> list[dict[str, Any]]:
    """One row per control that the plan has, as of `claims.judge_claims`.

    ``metrics`` are the final metrics of all runs, ``trajectories`` those of the main runs. K7 is *reproduced* if the
    policy has collapsed in every seed, *not reproduced* if in none, else *inconclusive*. K11's quantity is, per seed,
    the share of RL's gain of reward minus the share of its rise of loss that stand after a quarter of its steps.
    """
    present = set(metrics["run"])
    perfect, policies = predictions_for_controls(study, root, rows, metrics)
    possible = [claim for claim in CONTROLS if {claim.before, claim.after} <= present]
    judged = judged_rows(metrics, perfect, policies, possible)
    if COLLAPSE.after in present:
        fallen = is_collapsed(metrics[metrics["run"] == COLLAPSE.after])
        share, n = float(fallen.mean()), len(fallen)
        counted = Interval(share, math.nan, math.nan, n), Significance("count of seeds", share, math.nan)
        row = judged_row(COLLAPSE, *counted, None, None, quantity="share of seeds that collapsed")
        verdict = {1.0: "reproduced", 0.0: "not reproduced"}.get(share, "inconclusive") if n > 1 else "inconclusive"
        judged.append(row | {"verdict": verdict})
    shares = early_shares(trajectories)
    ahead = (shares["reward"] - shares["loss"]).to_numpy()
    judged.append(
        judged_row(
            STOPPING, mean_interval(ahead), paired_test(ahead), None, None, quantity="share of reward - share of loss"
        )
    )
    return corrected_family(sorted(judged, key=lambda row: int(row["id"][1:])))


def early_shares(trajectories: pd.DataFrame) -> pd.DataFrame:
    """By seed, the shares of RL's whole change of ``reward`` and ``loss`` that stand after a quarter of its steps.

    Taken at the measurement that is nearest to a quarter; ``step`` says which.
    """
    found = []
    for seed, path in trajectories[trajectories["run"] == "sft-rl"].groupby("seed"):
        path = path.set_index("step")[["reward_exact", "sft_loss"]]
        step = min(path.index, key=lambda at: abs(at - EARLY * path.index[-1]))
        share = (path.loc[step] - path.iloc[0]) / (path.iloc[-1] - path.iloc[0])
        found.append({"seed": seed, "step": step, "reward": share["reward_exact"], "loss": share["sft_loss"]})
    return pd.DataFrame(found).set_index("seed")


def temperature_curve(log_odds: np.ndarray, labels: pd.Series) -> pd.DataFrame:
    """``sft_loss, reward`` on the given labels of a two-label policy at `TEMPERATURES`, from cold to hot."""
    tempered = [theory.tempered_log_odds(log_odds, temperature) for temperature in TEMPERATURES]
    return pd.DataFrame(
        {
            "sft_loss": [theory.expected_loss(odds, labels, 0.0) for odds in tempered],
            "reward": [theory.expected_reward_of_odds(odds, labels, 0.0) for odds in tempered],
        }
    )


def best_reward_at(curves: list[pd.DataFrame], loss: float) -> float:
    """Largest reward on ``curves`` among points with at most that SFT loss (or the least loss there is)."""
    points = pd.concat(curves)
    return float(points.loc[points["sft_loss"] <= max(loss, points["sft_loss"].min()), "reward"].max())


def judge_joint(root: Path, metrics: pd.DataFrame, joint_runs: list[str]) -> list[dict[str, Any]]:
    """Does joint training beat doing one stage after the other, at equal cost? Two rows per joint run.

    J1: its sampled reward minus the best that `SEQUENTIAL`'s policies of the same seed earn at no larger SFT loss, each
    at whatever temperature suits it best on these very sentences (which favours them). J2: its greedy reward minus that
    of the better of the two, by the mean over seeds.
    """
    by_seed = metrics.pivot(index="seed", columns="run", values="reward_greedy")
    rival = max(SEQUENTIAL, key=lambda run: by_seed[run].mean())
    above: dict[str, list[float]] = {run: [] for run in joint_runs}
    for seed in by_seed.index:
        odds = {run: label_log_odds(runs.run_folder(root, run, seed)) for run in (*SEQUENTIAL, *joint_runs)}
        curves = [temperature_curve(odds[run][0], odds[run][1]["label"]) for run in SEQUENTIAL]
        for run in joint_runs:
            log_odds, labels = odds[run][0], odds[run][1]["label"]
            loss = theory.expected_loss(log_odds, labels, 0.0)
            above[run].append(theory.expected_reward_of_odds(log_odds, labels, 0.0) - best_reward_at(curves, loss))
    judged = []
    for run in joint_runs:
        sampled, greedy = np.array(above[run]), (by_seed[run] - by_seed[rival]).to_numpy()
        words = f"'{run}' earns more than sequential training at its SFT loss"
        claim = Claim(f"J1-{run}", words, "reward", run, "sequential", +1, "-")
        quantity = f"reward: {run} - best sequential policy at any temperature"
        judged.append(judged_row(claim, mean_interval(sampled), paired_test(sampled), None, None, quantity))
        claim = Claim(f"J2-{run}", f"'{run}' earns more with greedy answers", "reward_greedy", run, rival, +1, "-")
        judged.append(judged_row(claim, mean_interval(greedy), paired_test(greedy), None, None))
    return corrected_family(judged)


def joint_answer(rows: list[dict[str, Any]]) -> str:
    """The answer to "does joint training beat sequential training at equal cost?" in one paragraph, with numbers."""

    def summary(letter: str, what: str) -> str:
        family = [row for row in rows if row["id"].startswith(letter)]
        best = max(family, key=lambda row: row["estimate"])
        better, worse = (
            sum(row["verdict"] == verdict for row in family) for verdict in ("reproduced", "not reproduced")
        )
        low, high = best["ci95"] or (math.nan, math.nan)
        name = best["id"].partition("-")[2]
        return (
            f"{what}, {better} of {len(family)} joint runs are better and {worse} worse; the best is {name} with "
            f"{best['estimate']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )

    seeds = rows[0]["seeds"]
    sampled = summary("J1", "In sampled reward at equal SFT loss")
    greedy = summary("J2", "In greedy reward")
    return f"{sampled}. {greedy}. (Means over {seeds} seeds with 95 % intervals; Holm's correction.)"
