"""The theory's identities, both sides evaluated on random finite policies: six prompts, five answers."""

from collections.abc import Callable
from itertools import product

import numpy as np
from scipy.special import log_softmax, logit

from nondecoupling.analysis import theory

PROBLEMS = 500
PROMPTS, ANSWERS = 6, 5


def random_policy(rng: np.random.Generator) -> theory.FloatArray:
    """Log-probabilities of a policy drawn at random, (prompts, answers)."""
    return log_softmax(rng.normal(scale=2, size=(PROMPTS, ANSWERS)), axis=1)


def random_beta(rng: np.random.Generator) -> float:
    """A beta between 0.03 and 10, all orders of magnitude alike."""
    return float(10 ** rng.uniform(-1.5, 1))


def gap_of_theorem(rng: np.random.Generator) -> float:
    """Theorem 3.1: from p_SFT = p_D ideal RL raises the loss by C1, which is KL(p_SFT || p_RL)."""
    logd, r, beta = random_policy(rng), rng.uniform(-1, 1, (PROMPTS, ANSWERS)), random_beta(rng)
    logrl = theory.tilt(logd, r, beta)
    rise = theory.sft_loss(logrl, logd) - theory.sft_loss(logd, logd)
    c1 = np.mean(theory.log_normaliser(logd, r, beta) - theory.prompt_rewards(logd, r) / beta)
    return float(np.max([abs(rise - c1), abs(c1 - theory.mean_kl(logd, logrl)), -rise]))


def gap_of_sign_rule(rng: np.random.Generator) -> float:
    """From any start the change of loss is E[log Z - r/beta], with either sign."""
    logp0, logd, r = random_policy(rng), random_policy(rng), rng.uniform(-1, 1, (PROMPTS, ANSWERS))
    beta = random_beta(rng)
    change = theory.sft_loss(theory.tilt(logp0, r, beta), logd) - theory.sft_loss(logp0, logd)
    return abs(change - theory.c1(logd, logp0, r, beta))


def gap_of_perfect_demonstrations(rng: np.random.Generator) -> float:
    """If every demonstration earns +1 the loss changes by log(m + (1-m) exp(-2/beta)), and never rises."""
    logp0, gold, beta = (
        random_policy(rng),
        np.arange(ANSWERS) < rng.integers(1, ANSWERS, (PROMPTS, 1)),
        random_beta(rng),
    )
    logd, r = log_softmax(np.where(gold, random_policy(rng), -np.inf), axis=1), np.where(gold, 1.0, -1.0)
    change = theory.sft_loss(theory.tilt(logp0, r, beta), logd) - theory.sft_loss(logp0, logd)
    formula = theory.perfect_demonstration_change((np.exp(logp0) * gold).sum(axis=1), beta).mean()
    return float(np.max([abs(change - formula), change]))


def gap_of_objective(rng: np.random.Generator) -> float:
    """F(p_RL) - F(p) = beta KL(p || p_RL) for every p, and Pinsker's bound on the change of J."""
    logref, logp, r = random_policy(rng), random_policy(rng), rng.uniform(-1, 1, (PROMPTS, ANSWERS))
    beta = random_beta(rng)
    logrl = theory.tilt(logref, r, beta)
    best, found = (theory.regularised_objective(p, logref, r, beta) for p in (logrl, logp))
    kl = theory.mean_kl(logp, logrl)
    beyond = abs(theory.expected_reward(logp, r) - theory.expected_reward(logrl, r)) - theory.pinsker_bound(
        kl, r.max(), r.min()
    )
    return float(np.max([abs(best - found - beta * kl), beyond]))


def gap_of_frontier(rng: np.random.Generator, q: float) -> float:
    """No policy on 50 sentences of agreement ``q``, or of many, lies beyond the frontier of loss and reward."""
    odds, truth = rng.uniform(1, 12) + rng.uniform(0, 4) * rng.normal(size=50), np.ones(50)
    mean_p = np.exp(theory.two_label_policy(odds)[:, 1]).mean()
    bound = theory.expected_loss(logit([mean_p]), [1], 1 - q)
    many, price = rng.uniform(0.51, 0.99, 50), 10 ** rng.uniform(-2, 1)
    best, logd = logit(theory.frontier_probability(many, price)), theory.annotator_policy(truth, 1 - many)

    def values(odds: theory.FloatArray) -> theory.FloatArray:
        logp = theory.two_label_policy(odds)
        reward = theory.prompt_rewards(logp, theory.agreement_reward(logd))
        return price * reward - theory.prompt_losses(logp, logd)

    beyond = values(best + 10 ** rng.uniform(-3, 1) * rng.normal(size=50)) - values(best)
    return float(np.max([0.0, bound - theory.expected_loss(odds, truth, 1 - q), beyond.max()]))


def gap_of_closed_forms(q: float) -> float:
    """C1 of two labels against the general formula, over betas."""
    logd = theory.two_label_policy([logit(q)])
    reward = theory.agreement_reward(logd)
    betas = np.array([8, 4, 2, 1, 0.5, 0.25, 0.1, 0.05])
    closed = theory.rl_loss(q, betas) - theory.calibrated_loss(q)
    return float(np.abs(closed - [theory.c1(logd, logd, reward, beta) for beta in betas]).max())


def group_gradient(p: float, q: float, answers: int, divided: bool) -> float:
    """Mean of advantage times score over every group of ``answers`` that can occur, label included, by probability.

    ``divided``: advantages are divided by the group's deviation, as trl does by default.
    """
    total = 0.0
    for group, label in product(product((0, 1), repeat=answers), (0, 1)):
        r = np.where(np.array(group) == label, 1.0, -1.0)
        deviation = r.std(ddof=1) + theory.DEVIATION_FLOOR if divided else 1.0
        weight = (q if label else 1 - q) * p ** sum(group) * (1 - p) ** (answers - sum(group))
        total += weight * float(np.mean((r - r.mean()) / deviation * np.where(group, 1 - p, -p)))
    return total


def gap_of_groups(q: float, answers: int) -> float:
    """The formulas of GRPO's gradient against every group that can occur, divided by the deviation and not."""
    gaps = []
    for p, divided in product((0.5, 0.7, 0.9, 0.99), (False, True)):
        formula = float(theory.grpo_gradient(logit(p), logit(p), q, 1, answers, divided))
        gaps.append(abs(formula - group_gradient(p, q, answers, divided)))
    return float(np.max(gaps))


def identity_gaps(q: float, answers: int) -> dict[str, float]:
    """The largest violation of each identity: rounding, if the theory and its code are right; nan stays nan.

    ``q`` is the agreement and ``answers`` the group size of the study; groups of more than eight would take long.
    """
    rng = np.random.default_rng(2601)
    q = min(q, 0.99)  # a certain label has no finite log-odds

    def largest(gap: Callable[[], float]) -> float:
        return float(np.max([gap() for _ in range(PROBLEMS)]))  # max() would pass over nan

    return {
        "theorem_3_1": largest(lambda: gap_of_theorem(rng)),
        "sign_rule": largest(lambda: gap_of_sign_rule(rng)),
        "perfect_demonstrations": largest(lambda: gap_of_perfect_demonstrations(rng)),
        "regularised_objective": largest(lambda: gap_of_objective(rng)),
        "frontier": largest(lambda: gap_of_frontier(rng, q)),
        "closed_forms": gap_of_closed_forms(q),
        "groups": gap_of_groups(q, min(answers, 8)),
    }
