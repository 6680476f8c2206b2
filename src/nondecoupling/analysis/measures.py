"""One number for a policy, or for a change of policies, from its answers to every dev sentence.

Losses (nats) and rewards are those of the labels, renormalised, on the labels as given. What is fitted is fitted on
half of the sentences and used on the other half, so that no policy profits from sentences that it is measured on.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_expit
from sklearn.metrics import roc_auc_score

from nondecoupling.analysis import theory
from nondecoupling.analysis.predictions import goals_of, label_log_odds, label_policy, labels_given, policies_of
from nondecoupling.study.results import Results

TEMPERATURES = np.geomspace(0.2, 5, 200)  # of a curve, from cold to hot


def label_loss(answers: pd.DataFrame) -> float:
    """L of a policy, nats over the labels."""
    return theory.sft_loss(label_policy(answers), labels_given(answers))


def label_reward(answers: pd.DataFrame) -> float:
    """J of a policy over the labels, its answers sampled."""
    return theory.expected_reward(label_policy(answers), theory.agreement_reward(labels_given(answers)))


def greedy_share(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Share of the gain of J from ``before`` to ``after`` that greedy decoding of ``before`` has.

    nan where nothing was gained.
    """
    greedy = goals_of(label_policy(before), labels_given(before))["greedy"]
    gain = label_reward(after) - label_reward(before)
    return (greedy - label_reward(before)) / gain if gain > 0 else np.nan


def auroc(answers: pd.DataFrame) -> float:
    """How well log-odds rank sentences: the area under the ROC curve, against the truth, or the labels if unknown.

    With more than two labels, the mean of that over all pairs of labels.
    """
    truth = answers["label"] if answers["truth"].isna().any() else answers["truth"].astype(int)
    logp = label_policy(answers)
    if logp.shape[1] == 2:
        return float(roc_auc_score(truth, label_log_odds(answers)))
    return float(roc_auc_score(truth, np.exp(logp), multi_class="ovo", labels=range(logp.shape[1])))


def kl_between(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Mean over sentences of KL(before || after) over the two labels, nats."""
    return theory.mean_kl(*(theory.two_label_policy(label_log_odds(answers)) for answers in (before, after)))


def loss_per_nat(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Rise of L for each nat of `kl_between`; 1 whatever moved the policy if ``before`` is calibrated (ours).

    L(p) - L(p_D) = E KL(p_D || p). nan where the policy has not moved.
    """
    distance = kl_between(before, after)
    return (label_loss(after) - label_loss(before)) / distance if distance > 0 else np.nan


# Temperatures


def halves(sentences: int) -> Iterator[tuple[NDArray[np.int_], NDArray[np.int_]]]:
    """Sentences to fit on and sentences to use the fit on, twice: even rows and odd rows, and the other way round."""
    even, odd = np.arange(0, sentences, 2), np.arange(1, sentences, 2)
    yield even, odd
    yield odd, even


def best_temperature(logp: theory.FloatArray, labels: theory.FloatArray) -> float:
    """The temperature, between e^-3 and e^3, at which a policy (sentences, K) has the least loss on ``labels``."""

    def loss(log_temperature: float) -> float:
        return theory.sft_loss(theory.tempered(logp, float(np.exp(log_temperature))), labels)

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def temperature_of_least_loss(answers: pd.DataFrame) -> float:
    """`best_temperature` of a policy on all its sentences: 1 is calibrated, more is overconfident."""
    return best_temperature(label_policy(answers), labels_given(answers))


def recalibrated(answers: pd.DataFrame) -> NDArray[np.float64]:
    """A policy, each half of its sentences at the `best_temperature` of the other half, (sentences, K)."""
    logp, labels = label_policy(answers), labels_given(answers)
    found = np.empty_like(logp)
    for fit, use in halves(len(labels)):
        found[use] = theory.tempered(logp[use], best_temperature(logp[fit], labels[fit]))
    return found


def share_taken_back(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Share of the rise of L from ``before`` to ``after`` that one temperature takes back (`recalibrated`).

    nan where the loss has not risen.
    """
    rise = label_loss(after) - label_loss(before)
    back = label_loss(after) - theory.sft_loss(recalibrated(after), labels_given(after))
    return back / rise if rise > 0 else np.nan


def temperature_curve(log_odds: ArrayLike, labels: ArrayLike) -> pd.DataFrame:
    """``temperature, sft_loss, reward`` of a two-label policy at `TEMPERATURES`, from cold to hot."""
    for_label = np.asarray(log_odds) * np.where(np.asarray(labels) == 1, 1, -1) / TEMPERATURES[:, None]
    loss, reward = -log_expit(for_label).mean(axis=1), np.tanh(for_label / 2).mean(axis=1)
    return pd.DataFrame({"temperature": TEMPERATURES, "sft_loss": loss, "reward": reward})


def temperature_curves(results: Results, run: str) -> list[pd.DataFrame]:
    """`temperature_curve` of a run's policy on dev, for each seed."""
    return [temperature_curve(odds, answers["label"]) for odds, answers in policies_of(results, run)]


def advantage(answers: pd.DataFrame, rivals: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """How much more a policy earns than the best of ``rivals``: sampled at equal SFT loss, and with greedy answers.

    Equal loss is the policy's own, or the least that all of them can have if that is more. On half of the sentences
    each policy, this one too, is given the lowest temperature at which it has no more than that, and the best rival is
    chosen, for sampled and for greedy answers; the other half says what they earn. Mean of both halves.
    """
    labels, policies = answers["label"].to_numpy(), [label_log_odds(table) for table in (answers, *rivals)]
    found = []
    for fit, use in halves(len(labels)):
        curves = [temperature_curve(log_odds[fit], labels[fit]) for log_odds in policies]
        loss = max(label_loss(answers.iloc[fit]), *(curve["sft_loss"].min() for curve in curves))
        sampled = [curve.loc[curve["sft_loss"] <= loss, "temperature"].iloc[0] for curve in curves]
        for temperatures in (sampled, [0.0] * len(policies)):

            def rewards(part: NDArray[np.int_], at: Sequence[float] = temperatures) -> list[float]:
                tempered = [
                    theory.tempered_log_odds(log_odds[part], t) for log_odds, t in zip(policies, at, strict=True)
                ]
                return [theory.reward_on_labels(odds, labels[part]) for odds in tempered]

            (_, *seen), (own, *others) = rewards(fit), rewards(use)
            found.append(own - others[int(np.argmax(seen))])
    return float(np.mean(found[0::2])), float(np.mean(found[1::2]))
