"""Exact quantities of finite policies, and what the theory predicts for them.

A policy over K answers to each of N prompts is an array ``logp`` of shape (N, K): natural logarithms, every row
summing to one in probability, -inf where an answer is impossible. Rewards ``r`` and demonstrations ``logd`` have the
same shape. Losses, divergences and log-normalisers are in nats, rewards in units of the reward. Everything stays in
log space: at beta = 0.001 a tilted probability is exp(-2000), which underflows, while its logarithm is an ordinary
number.

"PAPER" marks results of arXiv 2601.07389; "ours" marks what this artifact derives.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize.elementwise import find_root
from scipy.special import entr, expit, log_expit, log_softmax, logit, logsumexp, xlog1py, xlogy
from scipy.stats import binom

FloatArray = NDArray[np.float64]

# Rows of log-probabilities that come out of float32 arithmetic sum to one only this closely.
NORMALISATION_TOLERANCE = 1e-4

# What trl adds to a group's deviation before it divides by it.
DEVIATION_FLOOR = 1e-4


# Finite policies over K answers


def log_normaliser(logp: ArrayLike, r: ArrayLike, beta: float) -> FloatArray:
    """log Z_beta(x) = log E_{y~p}[exp(r/beta)] of each prompt, shape (N,), nats (PAPER: closed-form RL optimum).

    Raises ValueError if ``logp`` is no policy, the shapes differ or beta is not positive.
    """
    logp = _policy("logp", logp)
    return logsumexp(logp + _rewards(r, logp) / _positive(beta), axis=1)


def tilt(logp: ArrayLike, r: ArrayLike, beta: float) -> FloatArray:
    """Ideal RL policy log(p exp(r/beta) / Z_beta) from the start p, shape (N, K) (PAPER: closed-form RL optimum).

    It maximises ``regularised_objective`` with p as the reference. Raises ValueError as ``log_normaliser`` does.
    """
    logp = _policy("logp", logp)
    return log_softmax(logp + _rewards(r, logp) / _positive(beta), axis=1)


def prompt_losses(logp: ArrayLike, logd: ArrayLike) -> FloatArray:
    """SFT loss E_{y~p_D}[-log p(y|x)] of each prompt, shape (N,), nats; inf where p excludes a demonstration.

    Raises ValueError if either array is no policy or the shapes differ.
    """
    logp, logd = _policies(logp=logp, logd=logd)
    return _weighted(np.exp(logd), -logp).sum(axis=1)


def sft_loss(logp: ArrayLike, logd: ArrayLike) -> float:
    """L_SFT(p): the mean of ``prompt_losses``, nats per response (PAPER: SFT loss)."""
    return float(prompt_losses(logp, logd).mean())


def prompt_rewards(logp: ArrayLike, r: ArrayLike) -> FloatArray:
    """E_{y~p}[r(x, y)] of each prompt, shape (N,). Raises ValueError if ``logp`` is no policy or the shapes differ."""
    logp = _policy("logp", logp)
    return (np.exp(logp) * _rewards(r, logp)).sum(axis=1)


def expected_reward(logp: ArrayLike, r: ArrayLike) -> float:
    """J(p): the mean of ``prompt_rewards`` (PAPER: expected reward)."""
    return float(prompt_rewards(logp, r).mean())


def prompt_kl(logp: ArrayLike, logq: ArrayLike) -> FloatArray:
    """KL(p || q) of each prompt, shape (N,), nats; inf where q excludes an answer of p.

    Raises ValueError if either array is no policy or the shapes differ.
    """
    logp, logq = _policies(logp=logp, logq=logq)
    with np.errstate(invalid="ignore"):  # -inf - -inf where neither policy gives the answer: weight 0
        ratio = logp - logq
    # Rounding can leave -1e-17 for nearly equal rows, which a later square root would turn into nan.
    return np.maximum(_weighted(np.exp(logp), ratio).sum(axis=1), 0.0)


def mean_kl(logp: ArrayLike, logq: ArrayLike) -> float:
    """E_x KL(p || q): the mean of ``prompt_kl``, nats."""
    return float(prompt_kl(logp, logq).mean())


def regularised_objective(logp: ArrayLike, logref: ArrayLike, r: ArrayLike, beta: float) -> float:
    """F(p) = J(p) - beta E_x KL(p || p_ref), in units of the reward (PAPER: regularised RL objective).

    Raises ValueError if an array is no policy, the shapes differ or beta is not positive.
    """
    return expected_reward(logp, r) - float(_positive(beta)) * mean_kl(logp, logref)


def prompt_c1(logd: ArrayLike, logp0: ArrayLike, r: ArrayLike, beta: float) -> FloatArray:
    """log Z_beta - E_{p_D} r/beta of each prompt, shape (N,), nats: what ideal RL from p0 adds to its SFT loss.

    With p0 = p_D this is KL(p_D || p_RL) >= 0 (PAPER: Theorem 3.1); for any other p0 it may have either sign (ours).
    Raises ValueError if an array is no policy, the shapes differ or beta is not positive.
    """
    logd, logp0 = _policies(logd=logd, logp0=logp0)
    # Centred rewards give the same number; apart, log Z and E r/beta are both near 1/beta and would cancel.
    advantage = np.asarray(r, dtype=np.float64) - prompt_rewards(logd, r)[:, None]
    return log_normaliser(logp0, advantage, beta)


def c1(logd: ArrayLike, logp0: ArrayLike, r: ArrayLike, beta: float) -> float:
    """C1(beta): the mean of ``prompt_c1``, nats per response (PAPER: Theorem 3.1)."""
    return float(prompt_c1(logd, logp0, r, beta).mean())


def pinsker_bound(kl: ArrayLike, r_max: float, r_min: float) -> FloatArray:
    """Largest |change of J| between policies at E_x KL = ``kl`` nats, shape of ``kl`` (PAPER: RL-then-SFT proposition).

    It holds for either direction of the divergence. Raises ValueError if a divergence is negative or r_max < r_min.
    """
    kl = np.asarray(kl, dtype=np.float64)
    if not np.all(kl >= 0):
        raise ValueError("A KL divergence cannot be negative or nan.")
    if r_max < r_min:
        raise ValueError(f"r_max = {r_max} is below r_min = {r_min}.")
    return (r_max - r_min) * np.sqrt(kl / 2)


# Any number of labels, reward +1 for the label that the annotator gave and -1 otherwise


def agreement_reward(logd: ArrayLike) -> FloatArray:
    """Expected reward 2 p_D(y|x) - 1 of each answer, shape (N, K): +1 if a drawn label agrees with it, else -1 (ours).

    Raises ValueError if ``logd`` is no policy.
    """
    return 2 * np.exp(_policy("logd", logd)) - 1


def certain(labels: ArrayLike, answers: int) -> FloatArray:
    """Log-probabilities of annotators who give the ``labels`` (N,) and no others, shape (N, ``answers``)."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(labels)[:, None] == np.arange(answers))


def self_tilt(logp: ArrayLike, beta: float) -> FloatArray:
    """Ideal RL from a measured policy taken to be calibrated, for data of unknown truth, shape (N, K) (ours).

    Each answer then earns 2p - 1 at the policy's own p. Raises ValueError as ``tilt`` does.
    """
    return tilt(logp, agreement_reward(logp), beta)


def tempered(logp: ArrayLike, temperature: float) -> FloatArray:
    """A policy whose answers are drawn at ``temperature``, shape (N, K) (ours).

    0 is greedy decoding, between answers that are equally likely a fair draw. Raises ValueError if ``logp`` is no
    policy, and unless the temperature is finite and >= 0.
    """
    logp = _policy("logp", logp)
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature = {temperature} must be finite and not negative.")
    if temperature == 0:
        return log_softmax(np.where(logp == logp.max(axis=1, keepdims=True), 0.0, -np.inf), axis=1)
    return log_softmax(logp / temperature, axis=1)


# Two labels, reward +1 for the label that the annotator gave and -1 otherwise


def calibrated_loss(q: ArrayLike) -> FloatArray:
    """SFT loss H(q) of the policy that reports q, the probability of the likelier label; shape of ``q``, nats (ours).

    Raises ValueError unless 0.5 <= q <= 1, as every function of q here does.
    """
    q = _likelier(q)
    return entr(q) + entr(1 - q)


def calibrated_reward(q: ArrayLike) -> FloatArray:
    """Expected reward (2q-1)^2 of sampling from the policy that reports q; shape of ``q`` (ours)."""
    return (2 * _likelier(q) - 1) ** 2


def sharp_reward(q: ArrayLike) -> FloatArray:
    """Expected reward 2q-1 of always giving the likelier label, the largest there is; shape of ``q`` (ours)."""
    return 2 * _likelier(q) - 1


def rl_probability(q: ArrayLike, beta: ArrayLike) -> FloatArray:
    """Probability that ideal RL from the calibrated policy gives the likelier label.

    The odds q/(1-q) grow by exp(2(2q-1)/beta) (ours, from PAPER: closed-form RL optimum). The arguments broadcast.
    Raises ValueError unless 0.5 <= q <= 1 and beta > 0.
    """
    q = _likelier(q)
    return expit(logit(q) + _gain(q, beta))


def rl_loss(q: ArrayLike, beta: ArrayLike) -> FloatArray:
    """SFT loss of ideal RL from the calibrated policy, nats: H(q) + C1(beta) (ours). The arguments broadcast.

    As beta -> 0 it grows without bound for 1/2 < q < 1 and stays at H(q) for q = 1/2 and q = 1.
    """
    q = _likelier(q)
    log_odds = logit(q) + _gain(q, beta)
    return _weighted(q, -log_expit(log_odds)) + _weighted(1 - q, -log_expit(-log_odds))


def rl_reward(q: ArrayLike, beta: ArrayLike) -> FloatArray:
    """Expected reward of sampling from ideal RL from the calibrated policy (ours). The arguments broadcast.

    It lies between ``calibrated_reward`` (beta -> infinity) and ``sharp_reward`` (beta -> 0).
    """
    q = _likelier(q)
    return (2 * rl_probability(q, beta) - 1) * (2 * q - 1)


def frontier_probability(q: ArrayLike, price: ArrayLike) -> FloatArray:
    """Probability of the likelier label in the policy that maximises ``price`` J - L (ours).

    Sentences with any mixture of q, each at its own optimum p - q = 2 price (2q-1) p (1-p): no policy has less loss at
    that mean reward. ``price`` is in nats of loss per unit of reward: 0 is the calibrated policy, infinity the sharp
    one. The arguments broadcast. Raises ValueError unless 0.5 <= q <= 1 and price >= 0.
    """
    q, price = _likelier(q), np.asarray(price, dtype=np.float64)
    if not np.all(price >= 0):
        raise ValueError(f"price = {price} cannot be negative.")
    slope = 1 - 2 * price * (2 * q - 1)
    return np.minimum(2 * q / (slope + np.sqrt(slope**2 + 4 * (1 - slope) * q)), 1.0)


def perfect_demonstration_change(m: ArrayLike, beta: ArrayLike) -> FloatArray:
    """Change of SFT loss log(m + (1-m) exp(-2/beta)) <= 0, nats, when every demonstration earns +1 (ours).

    ``m`` is the mass that the start of RL puts on answers rewarded +1, all others earning -1. Averaged over prompts
    the result is the change of L_SFT. The arguments broadcast. Raises ValueError unless 0 <= m <= 1 and beta > 0.
    """
    m = _probability("m", m)
    return np.logaddexp(xlogy(1, m), xlog1py(1, -m) - 2 / _positive(beta))


# Measured two-label policies: log_odds = log p(acceptable) - log p(unacceptable), shape (N,)


def two_label_policy(log_odds: ArrayLike) -> FloatArray:
    """Log-probabilities (unacceptable, acceptable) at the given log-odds, shape (N, 2)."""
    log_odds = np.asarray(log_odds, dtype=np.float64)
    return np.stack([log_expit(-log_odds), log_expit(log_odds)], axis=-1)


def annotator_policy(truth: ArrayLike, disagreement: ArrayLike) -> FloatArray:
    """Log-probabilities (unacceptable, acceptable) of the label that an annotator gives, shape (N, 2).

    Annotators contradict the ``truth`` of each sentence (1 acceptable, 0 not) with probability ``disagreement``, one
    for all sentences or one for each. Raises ValueError unless truth is 0 or 1 and 0 <= disagreement < 0.5.
    """
    sign, disagreement = _sign(truth), np.asarray(disagreement, dtype=np.float64)
    if not np.all((disagreement >= 0) & (disagreement < 0.5)):
        raise ValueError(f"disagreement = {disagreement} is outside [0, 0.5).")
    wrong, right = xlogy(1, disagreement), np.log1p(-disagreement)
    return np.stack([np.where(sign > 0, wrong, right), np.where(sign > 0, right, wrong)], axis=-1)


def tilted_log_odds(log_odds: ArrayLike, truth: ArrayLike, disagreement: ArrayLike, beta: float) -> FloatArray:
    """Log-odds of ideal RL from a measured policy whose sentences have a known truth, shape (N,) (ours).

    Paid by annotators who disagree, "acceptable" earns (1 - 2 disagreement) on an acceptable sentence and its negative
    on an unacceptable one. Raises ValueError as ``annotator_policy`` does, if the shapes differ or if beta is not
    positive.
    """
    log_odds, logd = _measured(log_odds, truth, disagreement)
    unacceptable, acceptable = agreement_reward(logd).T
    return log_odds + (acceptable - unacceptable) / _positive(beta)


def expected_loss(log_odds: ArrayLike, truth: ArrayLike, disagreement: ArrayLike) -> float:
    """SFT loss of a measured policy in expectation over annotators, nats over the two labels (ours).

    Raises ValueError as ``annotator_policy`` does or if the shapes differ.
    """
    log_odds, logd = _measured(log_odds, truth, disagreement)
    return sft_loss(two_label_policy(log_odds), logd)


def expected_reward_of_odds(log_odds: ArrayLike, truth: ArrayLike, disagreement: ArrayLike) -> float:
    """Reward of sampling from a measured policy in expectation over annotators (ours).

    Raises ValueError as ``annotator_policy`` does or if the shapes differ.
    """
    log_odds, logd = _measured(log_odds, truth, disagreement)
    return expected_reward(two_label_policy(log_odds), agreement_reward(logd))


def loss_on_labels(log_odds: ArrayLike, labels: ArrayLike) -> float:
    """SFT loss of a measured policy on the labels as given, nats over the two labels: nobody contradicts them."""
    return expected_loss(log_odds, labels, 0.0)


def reward_on_labels(log_odds: ArrayLike, labels: ArrayLike) -> float:
    """Reward of sampling from a measured policy, paid by the labels as given."""
    return expected_reward_of_odds(log_odds, labels, 0.0)


def self_tilted_log_odds(log_odds: ArrayLike, beta: float) -> FloatArray:
    """Log-odds of ideal RL from a measured policy taken to be calibrated, for data of unknown truth, shape (N,) (ours).

    "Acceptable" then earns 2p - 1 at the policy's own p. Raises ValueError if beta is not positive.
    """
    log_odds = np.asarray(log_odds, dtype=np.float64)
    # tanh(log_odds / 2) is 2p - 1, without the loss of digits near p = 1/2.
    return log_odds + 2 * np.tanh(log_odds / 2) / _positive(beta)


# Test time: decoders of a measured two-label policy. They change its answers, and nothing else about it


def tempered_log_odds(log_odds: ArrayLike, temperature: float) -> FloatArray:
    """Log-odds of answers drawn at ``temperature``, shape of ``log_odds`` (ours).

    0 is greedy decoding: +-inf, and a tie stays a tie. Raises ValueError unless the temperature is finite and >= 0.
    """
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature = {temperature} must be finite and not negative.")
    log_odds = np.asarray(log_odds, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(log_odds == 0, 0.0, log_odds / np.float64(temperature))


def majority_log_odds(log_odds: ArrayLike, samples: int) -> FloatArray:
    """Log-odds that most of ``samples`` independent answers are "acceptable", shape of ``log_odds`` (ours).

    Raises ValueError unless ``samples`` is odd and positive.
    """
    if samples < 1 or samples % 2 == 0:
        raise ValueError(f"samples = {samples} must be odd and positive, or there could be ties.")
    log_odds = np.asarray(log_odds, dtype=np.float64)
    return _log_majority(log_odds, samples) - _log_majority(-log_odds, samples)


# GRPO on one decision: a group of G answers is judged by one label, which is the first answer with probability q.
# log_odds, start (the reference's) and the result are log p(first) - log p(second); the arguments broadcast.


def objective_gradient(log_odds: ArrayLike, start: ArrayLike, q: ArrayLike, beta: ArrayLike) -> FloatArray:
    """Gradient of E[r] - beta KL(p || p0) with respect to the log-odds of p (ours).

    p(1-p) (2(2q-1) - beta (log_odds - start)), which is zero at ideal RL. Raises ValueError unless 0 <= q <= 1 and
    beta > 0.
    """
    log_odds, start = np.asarray(log_odds, dtype=np.float64), np.asarray(start, dtype=np.float64)
    q = _probability("q", q)
    return expit(log_odds) * expit(-log_odds) * (2 * (2 * q - 1) - _positive(beta) * (log_odds - start))


def deviation_factor(log_odds: ArrayLike, answers: int) -> FloatArray:
    """What dividing by the group's deviation multiplies the expected policy gradient by, for G = ``answers`` (ours).

    Only groups that hold both answers teach anything. Given one of each, the other G - 2 decide the deviation, so that
    the factor is E[1 / deviation] with 1 + Binomial(G - 2, p) of one kind. Up to trl's floor it lies between
    sqrt((G-1)/G) and sqrt(G)/2, the limit for p -> 0 and p -> 1. Raises ValueError if ``answers`` is below 2.
    """
    # The factor is even in the log-odds, and small probabilities have more digits than those near one.
    p = expit(-np.abs(np.asarray(log_odds, dtype=np.float64)))
    kinds = np.arange(1, _group(answers))
    share = kinds / answers
    deviation = 2 * np.sqrt(share * (1 - share) * answers / (answers - 1))
    return (binom.pmf(kinds - 1, answers - 2, p[..., None]) / (deviation + DEVIATION_FLOOR)).sum(-1)


def grpo_gradient(
    log_odds: ArrayLike,
    start: ArrayLike,
    q: ArrayLike,
    beta: ArrayLike,
    answers: int,
    normalised: bool = False,
    corrected: bool = True,
) -> FloatArray:
    """Expected gradient of what trl's GRPO maximises, per answer, with respect to the log-odds (ours).

    ``beta`` is the number given to trl. ``normalised``: advantages are divided by the group's deviation (scale_rewards
    "group"). ``corrected``: trl's use_bias_correction_kl; without it the KL term has the gradient p - p0 of
    KL(p0 || p). Raises ValueError as ``objective_gradient`` does or if ``answers`` is below 2.
    """
    log_odds, start = np.asarray(log_odds, dtype=np.float64), np.asarray(start, dtype=np.float64)
    p_times_rest = expit(log_odds) * expit(-log_odds)
    reward = p_times_rest * _group_gain(q, answers)
    if normalised:
        reward = reward * deviation_factor(log_odds, answers)
    kl = p_times_rest * (log_odds - start) if corrected else expit(log_odds) - expit(start)
    return reward - _positive(beta) * kl


def grpo_log_odds(
    start: ArrayLike,
    q: ArrayLike,
    beta: ArrayLike,
    answers: int,
    normalised: bool = False,
    corrected: bool = True,
) -> FloatArray:
    """Log-odds at which ``grpo_gradient`` is zero: where trl's GRPO comes to rest, if it gets there (ours).

    With ``normalised`` there may be more than one such place, in large groups (G = 64 has one, 256 may have three) or
    from a start on the wrong side; one is returned. Raises ValueError as ``grpo_gradient`` does.
    """
    gain = _group_gain(q, answers) / _positive(beta)
    start, gain = np.broadcast_arrays(np.asarray(start, dtype=np.float64), gain)
    if not normalised:
        return _rest(start, gain, corrected)

    def beyond_rest(log_odds: FloatArray, start: FloatArray, gain: FloatArray) -> FloatArray:
        return log_odds - _rest(start, gain * deviation_factor(log_odds, answers), corrected)

    # The factor has bounds, and so has the place; one nat more on either side makes the difference change its sign.
    factors = 1 / (np.sqrt([answers / (answers - 1), 4 / answers]) + DEVIATION_FLOOR)
    ends = np.stack([_rest(start, gain * factor, corrected) for factor in factors])
    return find_root(beyond_rest, (ends.min(0) - 1, ends.max(0) + 1), args=(start, gain)).x


# Both goals at once: SFT loss and RL objective, weighed against each other


def joint_gradient(
    log_odds: ArrayLike, start: ArrayLike, q: ArrayLike, beta: ArrayLike, weight: ArrayLike
) -> FloatArray:
    """Gradient of (1 - weight) (E[r] - beta KL(p || p0)) - weight L with respect to the log-odds of p (ours).

    L is the SFT loss on labels that are the first answer with probability q. The arguments broadcast. Raises ValueError
    as ``objective_gradient`` does and unless 0 <= weight <= 1.
    """
    weight = _probability("weight", weight)
    imitation = _probability("q", q) - expit(np.asarray(log_odds, dtype=np.float64))
    return (1 - weight) * objective_gradient(log_odds, start, q, beta) + weight * imitation


def joint_log_odds(start: ArrayLike, q: ArrayLike, beta: ArrayLike, weight: ArrayLike) -> FloatArray:
    """Log-odds at which ``joint_gradient`` is zero: between calibrated (weight 1) and ideal RL (weight 0) (ours).

    Raises ValueError as ``joint_gradient`` does, and unless 0 < q < 1, where the calibrated log-odds are finite.
    """
    q = _probability("q", q)
    if not np.all((q > 0) & (q < 1)):
        raise ValueError("q must lie between 0 and 1, both excluded: a certain label has no finite log-odds.")
    start, q, beta, weight = np.broadcast_arrays(np.asarray(start, dtype=np.float64), q, _positive(beta), weight)
    ideal = start + 2 * (2 * q - 1) / beta
    ends = np.minimum(ideal, logit(q)) - 1, np.maximum(ideal, logit(q)) + 1
    return find_root(joint_gradient, ends, args=(start, q, beta, np.asarray(weight, dtype=np.float64))).x


# Checks and small helpers


def _policy(name: str, logp: ArrayLike) -> FloatArray:
    logp = np.asarray(logp, dtype=np.float64)
    if logp.ndim != 2 or logp.size == 0:
        raise ValueError(f"{name} has shape {logp.shape}; it must be (prompts, answers), neither of them 0.")
    mass = np.exp(logp).sum(axis=1)
    bad = np.flatnonzero(~(np.abs(mass - 1) <= NORMALISATION_TOLERANCE))
    if bad.size:
        raise ValueError(f"Row {bad[0]} of {name} sums to {mass[bad[0]]:.6g} in probability; normalise it to 1.")
    return logp


def _policies(**named: ArrayLike) -> list[FloatArray]:
    policies = [_policy(name, logp) for name, logp in named.items()]
    if len({logp.shape for logp in policies}) > 1:
        raise ValueError(f"{' and '.join(named)} have different shapes: {', '.join(str(p.shape) for p in policies)}.")
    return policies


def _rewards(r: ArrayLike, logp: FloatArray) -> FloatArray:
    r = np.asarray(r, dtype=np.float64)
    if r.shape != logp.shape:
        raise ValueError(f"The rewards have shape {r.shape} and the policy {logp.shape}; they must agree.")
    return r


def _positive(beta: ArrayLike) -> FloatArray:
    beta = np.asarray(beta, dtype=np.float64)
    if not np.all((beta > 0) & np.isfinite(beta)):
        raise ValueError(f"beta = {beta} must be positive and finite.")
    return beta


def _probability(name: str, p: ArrayLike, least: float = 0.0) -> FloatArray:
    p = np.asarray(p, dtype=np.float64)
    if not np.all((least <= p) & (p <= 1)):
        raise ValueError(f"{name} must lie in [{least:g}, 1].")
    return p


def _likelier(q: ArrayLike) -> FloatArray:
    return _probability("q, the probability of the likelier label,", q, least=0.5)


def _gain(q: FloatArray, beta: ArrayLike) -> FloatArray:
    """What ideal RL adds to the log-odds of the likelier label: the gap in expected reward over beta."""
    return 2 * (2 * q - 1) / _positive(beta)


def _group(answers: int) -> int:
    if answers < 2:
        raise ValueError(f"answers = {answers}: a group needs at least 2.")
    return answers


def _group_gain(q: ArrayLike, answers: int) -> FloatArray:
    """2(2q-1) (G-1)/G: the reward between the answers, shrunk because the group's mean contains the answer itself."""
    return 2 * (2 * _probability("q", q) - 1) * (_group(answers) - 1) / answers


def _rest(start: FloatArray, gain: FloatArray, corrected: bool) -> FloatArray:
    """Where p(1-p) gain equals the gradient of KL(p || p0), or of KL(p0 || p) if it is not corrected."""
    if corrected:
        return start + gain
    return start / 2 + np.arcsinh(gain * np.cosh(start / 2) + np.sinh(start / 2))


def _log_majority(log_odds: FloatArray, samples: int) -> FloatArray:
    """Log-probability that most of ``samples`` answers are the one with these log-odds."""
    counts = np.arange(samples // 2 + 1, samples + 1)
    return logsumexp(binom.logpmf(counts, samples, expit(log_odds)[..., None]), axis=-1)


def _sign(truth: ArrayLike) -> FloatArray:
    truth = np.asarray(truth, dtype=np.float64)
    if not np.all((truth == 0) | (truth == 1)):
        raise ValueError("truth must be 1 (acceptable) or 0 (unacceptable).")
    return 2 * truth - 1


def _measured(log_odds: ArrayLike, truth: ArrayLike, disagreement: ArrayLike) -> tuple[FloatArray, FloatArray]:
    log_odds = np.asarray(log_odds, dtype=np.float64)
    logd = annotator_policy(truth, disagreement)
    if log_odds.shape != logd.shape[:-1]:
        raise ValueError(f"log_odds has shape {log_odds.shape} and truth {logd.shape[:-1]}; they must agree.")
    return log_odds, logd


def _weighted(weight: FloatArray, value: FloatArray) -> FloatArray:
    """weight * value, with 0 * inf = 0: an answer that is never given costs nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(weight > 0, weight * value, 0.0)
