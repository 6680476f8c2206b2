"""What theory predicts for each claim: for a *perfect learner*, who knows the truth, and by a policy's *own belief*.

A perfect learner's stages reach their optimum: SFT ends calibrated (loss H(q), reward (2q-1)^2), RL at its closed form.
Own belief starts from the measured policies, takes them to be calibrated, and needs no known truth.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from nondecoupling.analysis import theory
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.results import Results

FRONTIER_BETAS = np.geomspace(0.3, 30, 60)  # at which frontiers are drawn
NO_RL = 1e6  # a beta at which ideal RL stays where it starts

Predictions = dict[str, float]  # by the claims' ids


def label_log_odds(answers: pd.DataFrame) -> np.ndarray:
    """log p(acceptable) - log p(unacceptable) of a policy's answers, (sentences,)."""
    return (answers["logp_acceptable"] - answers["logp_unacceptable"]).to_numpy()


def mean_over_seeds(results: Results, run: str, quantity: Callable[[np.ndarray, pd.DataFrame], float]) -> float:
    """Mean over seeds of ``quantity(log-odds of the run's policy on dev, its answers)``."""
    policies = (results.answers_of(run, seed) for seed in results.seeds)
    return float(np.mean([quantity(label_log_odds(answers), answers) for answers in policies]))


def for_perfect_learner(results: Results) -> Predictions:
    """What the closed forms predict for the paper's claims and O1; empty where q is unknown or beta is 0.

    RL from the base is the measured base policy, tilted by the expected reward of each dev sentence.
    """
    q, beta = results.study.profile.data.agreement, results.study.profile.rl.beta
    if q is None or beta == 0:
        return {}
    answers = results.answers_of("base", results.seeds[0])
    truth, disagreement = answers["truth"].to_numpy(dtype=int), 1 - q
    tilted = theory.tilted_log_odds(label_log_odds(answers), truth, disagreement, beta)
    deficit = float(theory.calibrated_reward(q)) - theory.expected_reward_of_odds(tilted, truth, disagreement)
    return {
        "A1": float(theory.rl_loss(q, beta) - theory.calibrated_loss(q)),
        "A2": float(theory.rl_loss(q, beta)) - results.final("base")["sft_loss"].mean(),
        "B1": deficit,
        "B2": deficit,
        "B3": 0.0,
        "O1": float(theory.rl_reward(q, beta) - theory.calibrated_reward(q)),
    }


def own_frontier(results: Results, betas: Iterable[float]) -> pd.DataFrame:
    """``sft_loss, reward`` per beta, means over seeds: the measured SFT policies at RL's closed form, by own belief."""
    points = []
    for beta in betas:

        def tilted(log_odds: np.ndarray, beta: float = beta) -> np.ndarray:
            return theory.self_tilted_log_odds(log_odds, beta)

        loss = mean_over_seeds(results, "sft", lambda x, answers: theory.loss_on_labels(tilted(x), answers["label"]))
        reward = mean_over_seeds(
            results, "sft", lambda x, answers: theory.reward_on_labels(tilted(x), answers["label"])
        )
        points.append({"sft_loss": loss, "reward": reward})
    return pd.DataFrame(points)


def perfect_frontier(q: float, betas: np.ndarray) -> pd.DataFrame:
    """``sft_loss, reward`` per beta of a perfect learner, calibrated to agreement ``q``, at RL's closed form."""
    return pd.DataFrame({"sft_loss": theory.rl_loss(q, betas), "reward": theory.rl_reward(q, betas)})


def from_policies(results: Results) -> Predictions:
    """What the measured policies predict for the paper's claims and O1, means over seeds.

    RL after SFT: the measured SFT policy at the closed form, by own belief. SFT after RL: SFT ends where it ends from
    the base, because its optimum does not depend on where it starts.
    """
    beta, metrics = results.study.profile.rl.beta, results.final("base", "sft", "rl")
    mean = metrics.groupby("run")[["sft_loss", "reward_exact", "reward_sampled", "reward_greedy"]].mean()
    fall = mean.loc["sft"] - mean.loc["rl"]
    found = {
        name: float(fall[f"reward_{kind}"]) for name, kind in (("B1", "sampled"), ("B2", "exact"), ("B3", "greedy"))
    }
    if beta == 0:  # no closed form
        return found
    start, end = own_frontier(results, [NO_RL, beta]).itertuples(index=False)
    rise = end.sft_loss - start.sft_loss
    above_base = float(mean.loc["sft", "sft_loss"] + rise - mean.loc["base", "sft_loss"])
    return found | {"A1": rise, "A2": above_base, "O1": end.reward - start.reward}


# Controls


def wording_rise(p: np.ndarray, share: np.ndarray, beta: float) -> float:
    """Rise of the SFT loss, nats, by ideal RL that pays only for the other wording (ours, from the sign rule).

    Before it a share ``share`` of the answers is in that wording, and the right label has probability ``p`` in either;
    the usual wording earns -1, so its loss rises by log Z + 1/beta, whatever the label. Both arrays (sentences,).
    """
    belief = 2 * p - 1  # expected reward of the label that has probability p
    paid = share * (p * np.exp(belief / beta) + (1 - p) * np.exp(-belief / beta))
    return float(np.mean(np.log(paid + (1 - share) * np.exp(-1 / beta)) + 1 / beta))


def of_controls(results: Results, claims: list[ClaimRow]) -> tuple[Predictions, Predictions]:
    """For the controls, what a perfect learner would do (empty where the truth is unknown), and own belief.

    Nothing where beta is 0, which has no closed form.
    ``claims`` are the judged claims of the same study; A1's predictions hold for K1, K3 and K10, too.
    """
    q, beta, study = results.study.profile.data.agreement, results.study.profile.rl.beta, results.study
    if beta == 0:
        return {}, {}
    rise = next(row for row in claims if row["id"] == "A1")
    metrics = results.final()
    reward = metrics.groupby("run")["reward_exact"].mean()

    def tilted(log_odds: np.ndarray) -> np.ndarray:
        return theory.self_tilted_log_odds(log_odds, beta)

    def reward_after_tilt(log_odds: np.ndarray, answers: pd.DataFrame) -> float:
        return theory.reward_on_labels(tilted(log_odds), answers["label"])

    def reward_after_proxy(log_odds: np.ndarray, answers: pd.DataFrame) -> float:
        scored = results.answers_of(str(study.run("sft-rl-proxy").proxy), answers["seed"].iloc[0])
        added = (scored["score_acceptable"] - scored["score_unacceptable"]).to_numpy() / beta
        return theory.reward_on_labels(log_odds + added, answers["label"])

    def rise_by_wording(log_odds: np.ndarray, answers: pd.DataFrame) -> float:
        usual = np.exp(answers[["logp_unacceptable", "logp_acceptable"]].to_numpy()).sum(1).clip(max=1)
        return wording_rise(np.exp(theory.two_label_policy(log_odds)[:, 1]), 1 - usual, beta)

    def rise_by_tilt(log_odds: np.ndarray, answers: pd.DataFrame) -> float:
        labels = answers["label"]
        return theory.loss_on_labels(tilted(log_odds), labels) - theory.loss_on_labels(log_odds, labels)

    policies: dict[str, Any] = dict.fromkeys(("K1", "K3", "K10"), rise["predicted_from_policies"]) | {
        "K2": float(reward["sft"]) - mean_over_seeds(results, "rl", reward_after_tilt),
        "K4": mean_over_seeds(results, "sft-wordings", rise_by_wording),
        "K9": mean_over_seeds(results, "sft", reward_after_proxy) - mean_over_seeds(results, "sft", reward_after_tilt),
    }
    if results.has("sft-clean"):
        policies["K6"] = mean_over_seeds(results, "sft-clean", rise_by_tilt)
    if results.has("rl-weak"):
        policies["K8"] = float(reward["sft"] - reward["rl-weak"])
    perfect: dict[str, Any] = dict.fromkeys(("K1", "K3", "K10"), rise["predicted"])
    if q is not None:
        calibrated, by_truth = float(theory.calibrated_reward(q)), float(theory.rl_reward(q, beta))
        share = study.settings_of(study.run("sft-wordings")).sft.other_wording_share
        certain = np.log(q / (1 - q)) if q < 1 else np.inf
        by_proxy = theory.expected_reward_of_odds([certain * (1 + 1 / beta)], [1], 1 - q)
        perfect |= {
            "K2": calibrated - float(theory.rl_reward(q, beta / 2)),  # two tilts are one at half the price
            "K4": wording_rise(np.array([q]), np.array([share]), beta),
            "K6": 0.0,
            "K8": calibrated - metrics["majority_reward"].iloc[0],
            "K9": by_proxy - by_truth,
        }
    return perfect, policies
