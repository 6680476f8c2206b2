"""What theory predicts for each claim: for a *perfect learner*, who knows the truth, and by a policy's *own belief*.

A perfect learner's stages reach their optimum: SFT ends calibrated (of two answers: loss H(q), reward (2q-1)^2), RL at
its closed form. Own belief starts from the measured policy, takes it to be calibrated, and needs no known truth.
Neither reads a policy that the stage which it predicts has made. Levels, claims and the frontiers that RL traces are
for any number of answers; controls are for two.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_softmax, logit, xlog1py, xlogy

from nondecoupling.analysis import theory
from nondecoupling.analysis.statistics import over_seeds
from nondecoupling.study.contracts import ClaimRow, Level
from nondecoupling.study.results import Results, label_log_probabilities
from nondecoupling.study.study import Study
from nondecoupling.task.annotators import share_columns

FRONTIER_BETAS = np.geomspace(0.3, 30, 60)  # at which frontiers are drawn
SAME_PREDICTION = {"K1": "A1", "K3r": "O1", "K10": "A1"}  # other training, or a reward like a coin, changes nothing
AFTER_BASE = ("sft", "sft-rl", "rl", "rl-sft")  # the policies whose levels theory predicts

Predictions = dict[str, float]  # by the claims' ids


def label_log_odds(answers: pd.DataFrame) -> np.ndarray:
    """log p(acceptable) - log p(unacceptable) of a policy's answers, (sentences,)."""
    return (answers["logp_acceptable"] - answers["logp_unacceptable"]).to_numpy()


def label_policy(answers: pd.DataFrame) -> theory.FloatArray:
    """A policy's log-probabilities of the answers, renormalised to them alone, (sentences, K)."""
    return log_softmax(label_log_probabilities(answers), axis=1)


def labels_given(answers: pd.DataFrame) -> theory.FloatArray:
    """The labels as given, as log-probabilities of annotators who give no others, (sentences, K)."""
    return theory.certain(answers["label"], label_log_probabilities(answers).shape[1])


def known_annotators(table: pd.DataFrame) -> theory.FloatArray | None:
    """Log-probabilities of the label that an annotator gives to each sentence of ``table``, (sentences, K).

    None where nobody knows them.
    """
    if shares := share_columns(table):
        with np.errstate(divide="ignore"):
            return np.log(table[shares].to_numpy(dtype=float))
    q = agreement_of(table)
    return None if q is None else theory.annotator_policy(table["truth"].astype(int), 1 - q)


def best_possible(table: pd.DataFrame) -> dict[str, float]:
    """`goals_of` of a calibrated policy on the sentences of ``table``; empty where nobody knows what annotators say.

    Its loss is the lowest there is, and its greedy reward the highest.
    """
    logd = known_annotators(table)
    return {} if logd is None else goals_of(logd, logd)


def agreement_of(answers: pd.DataFrame) -> np.ndarray | None:
    """q(x), the probability of each sentence's likelier label, (sentences,); None where nobody knows it."""
    q = answers["agreement"].to_numpy(dtype=float)
    return None if np.isnan(q).any() else q


def known_agreement(results: Results) -> np.ndarray | None:
    """q(x) of the dev sentences of all seeds, one after the other; None where nobody knows it."""
    found = [agreement_of(results.answers_of("sft", seed)) for seed in results.seeds]
    return None if any(q is None for q in found) else np.concatenate(found)  # type: ignore[arg-type]


def answers_by_seed(results: Results, run: str) -> list[pd.DataFrame]:
    """Answers on dev of a run's policy, for each seed."""
    return [results.answers_of(run, seed) for seed in results.seeds]


def policies_of(results: Results, run: str) -> list[tuple[np.ndarray, pd.DataFrame]]:
    """Log-odds on dev and answers of a run's policy, for each seed."""
    return [(label_log_odds(answers), answers) for answers in answers_by_seed(results, run)]


def where_loss_is(
    level: float, loss_at: Callable[[float], float], low: float = 1e-3, high: float = 1e3
) -> float | None:
    """The beta, or temperature, between ``low`` and ``high`` at which a loss that falls with it is ``level``.

    None where the loss is not above ``level`` at ``low`` and below it at ``high``.
    """

    def excess(log_x: float) -> float:
        return loss_at(float(np.exp(log_x))) - level

    least, most = np.log(low), np.log(high)
    return float(np.exp(brentq(excess, least, most))) if excess(most) < 0 < excess(least) else None


# Levels: where each policy of the two experiments should end, and where it did


def goals_of(logp: theory.FloatArray, logd: theory.FloatArray) -> dict[str, float]:
    """A policy's loss and reward, and the reward of its greedy answers, where annotators answer as ``logd`` says."""
    r = theory.agreement_reward(logd)
    return {
        "loss": theory.sft_loss(logp, logd),
        "reward": theory.expected_reward(logp, r),
        "greedy": theory.expected_reward(theory.tempered(logp, 0), r),
    }


def after_rl(beta: float) -> Callable[[pd.DataFrame], theory.FloatArray]:
    """How `mean_goals` has a policy after ideal RL by its own belief."""
    return lambda answers: theory.self_tilt(label_policy(answers), beta)


def mean_goals(
    results: Results, run: str, policy: Callable[[pd.DataFrame], theory.FloatArray] = label_policy
) -> pd.Series:
    """`goals_of` of a run's policy, or of what ``policy`` makes of its answers, on the dev labels: means over seeds."""
    tables = answers_by_seed(results, run)
    return pd.DataFrame(goals_of(policy(answers), labels_given(answers)) for answers in tables).mean()


def measured_levels(results: Results, *runs: str) -> pd.DataFrame:
    """`goals_of` of each of ``runs``, on the dev labels as given: a row per run and seed."""
    policies = ((run, answers) for run in runs for answers in answers_by_seed(results, run))
    return pd.DataFrame(
        {"run": run, "seed": answers["seed"].iloc[0], **goals_of(label_policy(answers), labels_given(answers))}
        for run, answers in policies
    )


def own_levels(results: Results) -> pd.DataFrame | None:
    """`goals_of` by own belief, means over seeds, indexed by run; None where beta is 0, which has no closed form.

    `sft` is measured, and `sft-rl` its closed form. `rl` is the closed form of the measured base, and from there SFT
    ends where it ends from the base, because its optimum does not depend on where it starts.
    """
    beta = results.study.profile.rl.beta
    if beta == 0:
        return None
    calibrated, rl = mean_goals(results, "sft"), after_rl(beta)
    ends = {"sft": calibrated, "sft-rl": mean_goals(results, "sft", rl), "rl": mean_goals(results, "base", rl)}
    return pd.DataFrame(ends | {"rl-sft": calibrated}).T


def perfect_levels(results: Results) -> pd.DataFrame | None:
    """`goals_of` of a perfect learner in expectation over annotators, indexed by run; None where own belief has none,
    and where the truth is unknown.

    SFT ends at what annotators say, and `sft-rl` at its tilt. `rl` is the measured base, tilted by what each answer
    earns.
    """
    beta, rows = results.study.profile.rl.beta, []
    for answers in answers_by_seed(results, "base"):
        logd = known_annotators(answers)
        if logd is None or beta == 0:
            return None
        r = theory.agreement_reward(logd)
        ends = {"sft": logd, "sft-rl": theory.tilt(logd, r, beta), "rl": theory.tilt(label_policy(answers), r, beta)}
        ends["rl-sft"] = logd
        rows.append(pd.DataFrame({run: goals_of(logp, logd) for run, logp in ends.items()}).T)
    return sum(rows) / len(rows)


def levels(results: Results) -> list[Level]:
    """Loss and rewards of each policy that the experiments train: measured, and where it was predicted to end.

    Own belief predicts none for `sft`, from which it starts.
    """
    measured, own, perfect = measured_levels(results, *AFTER_BASE), own_levels(results), perfect_levels(results)
    return [
        {
            "quantity": quantity,
            "run": run,
            "measured": over_seeds(measured.loc[measured["run"] == run, quantity]),
            "own_belief": None if own is None or run == "sft" else float(own.loc[run, quantity]),
            "perfect_learner": None if perfect is None else float(perfect.loc[run, quantity]),
        }
        for quantity in ("loss", "reward", "greedy")
        for run in AFTER_BASE
    ]


def differences_of(predicted: pd.DataFrame | None, results: Results) -> Predictions:
    """The paper's claims and O1 as differences of predicted levels, and of the measured base's loss; empty for None."""
    if predicted is None:
        return {}
    loss, reward, greedy = (predicted[quantity] for quantity in ("loss", "reward", "greedy"))
    deficit = reward["rl-sft"] - reward["rl"]
    found = {
        "A1": loss["sft-rl"] - loss["sft"],
        "A2": loss["sft-rl"] - results.final("base")["sft_loss"].mean(),
        "B1": deficit,  # a sampled answer earns what is expected of it
        "B2": deficit,
        "B3": greedy["rl-sft"] - greedy["rl"],
        "O1": reward["sft-rl"] - reward["sft"],
    }
    return {name: float(difference) for name, difference in found.items()}


def for_perfect_learner(results: Results) -> Predictions:
    """What the closed forms predict for the paper's claims and O1; empty where q(x) is unknown or beta is 0."""
    return differences_of(perfect_levels(results), results)


def from_policies(results: Results) -> Predictions:
    """What own belief predicts for the paper's claims and O1, means over seeds; empty where beta is 0.

    It is as good as the calibration of the policy that RL starts from; a base that is surer, or less sure, than its
    record can turn its sign.
    """
    return differences_of(own_levels(results), results)


# Frontiers: what RL's closed form traces in the plane of loss and reward as beta falls


def own_frontier(results: Results, betas: Iterable[float]) -> pd.DataFrame:
    """``sft_loss, reward`` per beta, means over seeds: the measured SFT policies at RL's closed form, by own belief."""
    policies = [(label_policy(answers), labels_given(answers)) for answers in answers_by_seed(results, "sft")]

    def ends(beta: float) -> pd.Series:
        tilted = [goals_of(theory.self_tilt(logp, beta), labels) for logp, labels in policies]
        return pd.DataFrame(tilted).mean()[["loss", "reward"]]

    return pd.DataFrame([ends(beta) for beta in betas]).rename(columns={"loss": "sft_loss"})


def perfect_frontier(results: Results, betas: Iterable[float]) -> pd.DataFrame | None:
    """``sft_loss, reward`` per beta of a perfect learner at RL's closed form, means over sentences; None if unknown."""
    answers = answers_by_seed(results, "sft")
    known = [logd for table in answers if (logd := known_annotators(table)) is not None]
    if len(known) < len(answers):
        return None
    kinds, counts = np.unique(np.concatenate(known), axis=0, return_counts=True)
    r, points = theory.agreement_reward(kinds), []
    for beta in betas:
        tilted = theory.tilt(kinds, r, beta)
        ends = theory.prompt_losses(tilted, kinds), theory.prompt_rewards(tilted, r)
        points.append([float(np.average(each, weights=counts)) for each in ends])
    return pd.DataFrame(points, columns=["sft_loss", "reward"])


def ideal_path(q: ArrayLike, betas: ArrayLike) -> pd.DataFrame:
    """``sft_loss, reward`` per beta of ideal RL from the calibrated policy, means over ``q``, one or one per sentence.

    With a single q this is the `frontier`; with several it runs below it, because RL sharpens by 2(2q-1)/beta.
    """
    return means_over(q, lambda each: (theory.rl_loss(each, betas), theory.rl_reward(each, betas)))


def frontier(q: ArrayLike, prices: ArrayLike) -> pd.DataFrame:
    """``sft_loss, reward`` per price of the policies that no other beats in both, means over ``q``.

    See `theory.frontier_probability`.
    """

    def ends(each: theory.FloatArray) -> tuple[theory.FloatArray, theory.FloatArray]:
        p = theory.frontier_probability(each, prices)
        return -xlogy(each, p) - xlog1py(1 - each, -p), (2 * each - 1) * (2 * p - 1)

    return means_over(q, ends)


def means_over(
    q: ArrayLike, ends: Callable[[theory.FloatArray], tuple[theory.FloatArray, theory.FloatArray]]
) -> pd.DataFrame:
    """``sft_loss, reward``: means over ``q`` of what ``ends`` says of its distinct values, (values, 1)."""
    values, counts = np.unique(q, return_counts=True)
    loss, reward = (np.average(each, axis=0, weights=counts) for each in ends(values[:, None]))
    return pd.DataFrame({"sft_loss": loss, "reward": reward})


# Controls


def wording_rise(p: np.ndarray, share: np.ndarray, beta: float) -> float:
    """Rise of the SFT loss, nats, by ideal RL that pays only for the other wording (ours, from the sign rule).

    Before it a share ``share`` of the answers is in that wording, and the right label has probability ``p`` in either;
    the usual wording earns -1, so its loss rises by log Z + 1/beta, whatever the label. Both arrays (sentences,).
    """
    belief = 2 * p - 1  # expected reward of the label that has probability p
    paid = share * (p * np.exp(belief / beta) + (1 - p) * np.exp(-belief / beta))
    return float(np.mean(np.log(paid + (1 - share) * np.exp(-1 / beta)) + 1 / beta))


def own_wording_rise(answers: pd.DataFrame, beta: float) -> float:
    """`wording_rise` of a measured policy by own belief: what both usual answers leave is the other wording's."""
    usual = np.exp(label_log_probabilities(answers)).sum(1).clip(max=1)
    return wording_rise(np.exp(label_policy(answers)[:, 1]), 1 - usual, beta)


def of_controls(results: Results, claims: list[ClaimRow]) -> tuple[Predictions, Predictions]:
    """For the controls, what a perfect learner would do (empty where the truth is unknown), and own belief.

    Nothing where beta is 0, which has no closed form. ``claims`` are the judged claims of the same study: what they
    predict holds for the controls of `SAME_PREDICTION`, too.
    """
    if results.study.profile.rl.beta == 0:
        return {}, {}
    q, judged = known_agreement(results), {row["id"]: row for row in claims}

    def same(prediction: Literal["predicted", "predicted_from_policies"]) -> Predictions:
        found = {name: judged[claim][prediction] for name, claim in SAME_PREDICTION.items() if claim in judged}
        return {name: value for name, value in found.items() if value is not None}

    perfect = {} if q is None else same("predicted") | perfect_controls(q, results.study)
    return perfect, same("predicted_from_policies") | own_controls(results)


def perfect_controls(q: np.ndarray, study: Study) -> Predictions:
    """What a perfect learner would do in the controls that have a closed form of their own; ``q`` of each sentence."""
    beta, share = study.profile.rl.beta, study.settings_of(study.run("sft-wordings")).sft.other_wording_share
    # A proxy's scores are calibrated log-odds.
    by_proxy = theory.expected_reward_of_odds(logit(q) * (1 + 1 / beta), np.ones_like(q), 1 - q)
    return {
        "K2": float(np.mean(theory.calibrated_reward(q) - theory.rl_reward(q, beta / 2))),
        "K4": wording_rise(q, np.full_like(q, share), beta),
        "K6": 0.0,
        "K9": by_proxy - float(np.mean(theory.rl_reward(q, beta))),
    }


def own_controls(results: Results) -> Predictions:
    """What own belief predicts for the same controls, as far as they were run."""
    beta, study = results.study.profile.rl.beta, results.study

    def after_proxy(answers: pd.DataFrame) -> theory.FloatArray:
        scored = results.answers_of(str(study.run("sft-rl-proxy").proxy), answers["seed"].iloc[0])
        return theory.tilt(label_policy(answers), scored[["score_unacceptable", "score_acceptable"]], beta)

    goals, rl = partial(mean_goals, results), after_rl(beta)
    two_rl = after_rl(beta / 2)  # two tilts are one at half the price
    found = {"K2": goals("sft")["reward"] - goals("base", two_rl)["reward"]}
    if results.has("sft-wordings"):
        found["K4"] = np.mean([own_wording_rise(table, beta) for table in answers_by_seed(results, "sft-wordings")])
    if results.has("reward-model"):
        found["K9"] = goals("sft", after_proxy)["reward"] - goals("sft", rl)["reward"]
    if results.has("sft-clean"):
        found["K6"] = goals("sft-clean", rl)["loss"] - goals("sft-clean")["loss"]
    return {name: float(value) for name, value in found.items()}
