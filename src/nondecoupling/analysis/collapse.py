"""What a reader must be told about a policy before believing its numbers."""

import numpy as np
import pandas as pd

COLLAPSED_SHARE = 0.98
LEAST_MASS = 0.9


def is_collapsed(metrics: pd.DataFrame) -> pd.Series:
    """For each row of metrics, whether the policy gives (nearly) one answer to everything.

    That is: one answer to at least 98 % of the sentences, and a Matthews correlation within two standard errors of 0,
    2 / sqrt(n) for n sentences. (A fixed bound of 0.05 missed a real model that said "No." to 4 of 527 sentences, all
    of them acceptable.)
    """
    rate = metrics["predicted_acceptable_rate"]
    return (rate.clip(lower=1 - rate) >= COLLAPSED_SHARE) & (metrics["mcc"].abs() < 2 / np.sqrt(metrics["n"]))


def is_failed_judge(metrics: pd.DataFrame) -> pd.Series:
    """For each row of a reward model's metrics, whether it judges no better than always preferring the majority label.

    That is: it prefers the right answer in no larger a share of the pairs than the majority label's, (1 + majority
    reward) / 2, plus two standard errors of that share.
    """
    share = (1 + metrics["majority_reward"]) / 2
    return metrics["accuracy"] <= share + 2 * np.sqrt(share * (1 - share) / metrics["n"])


def warnings_about(metrics: dict[str, float]) -> list[str]:
    """Sentences about one policy's metrics on one set of sentences; one that says so if nothing is remarkable."""
    found = []
    if is_collapsed(pd.DataFrame([metrics])).item():
        answer = "acceptable" if metrics["predicted_acceptable_rate"] > 0.5 else "unacceptable"
        found.append(
            f"COLLAPSED: it answers '{answer}' to (nearly) every sentence (MCC {metrics['mcc']:.3f}); its greedy "
            f"reward {metrics['reward_greedy']:.3f} is no skill: always giving the commoner label earns "
            f"{metrics['majority_reward']:.3f}."
        )
    if metrics["label_mass"] < LEAST_MASS:
        found.append(
            f"FORMAT: only {metrics['label_mass']:.1%} of the probability is on the two answers; the rest earns -1 "
            f"when it is read strictly."
        )
    return found or ["nothing remarkable: the policy has not collapsed and keeps to the format"]
