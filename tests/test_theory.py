"""Every identity of the theory, against hand-made values, brute force over strings, and random policies."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, xlog1py, xlogy

from nondecoupling.analysis import theory

# Quantities reach 2/beta = 2000 nats, so sixteen digits leave about 1e-12; three more digits are the margin.
RELATIVE, ABSOLUTE = 1e-9, 1e-9

BETAS = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
LIKELIER = st.floats(0.5, 1)
UNHURRIED = settings(deadline=None)  # a busy machine is no failure


def close(expected):
    return pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


@st.composite
def problems(draw):
    """Three policies with one support, some of whose answers are impossible, rewards and beta."""
    shape = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    possible = draw(arrays(bool, shape))
    possible[:, 0] = True
    logits = [draw(arrays(float, shape, elements=st.floats(-15, 15))) for _ in range(3)]
    logp, logp0, logd = (log_softmax(np.where(possible, values, -np.inf), axis=1) for values in logits)
    return logp, logp0, logd, draw(arrays(float, shape, elements=st.floats(-1, 1))), draw(BETAS)


# Hand-made values: one prompt, two answers, r = +1 and -1, beta = 2/ln 3, so that odds are multiplied by three.

HALF = np.log([[0.5, 0.5]])
SIGNS = np.array([[1.0, -1.0]])
BETA = 2 / math.log(3)


def test_tilting_even_odds_by_three_gives_three_quarters():
    assert np.exp(theory.tilt(HALF, SIGNS, BETA)) == close(np.array([[0.75, 0.25]]))
    # Z = (sqrt 3 + 1/sqrt 3) / 2 = 2/sqrt 3
    assert theory.log_normaliser(HALF, SIGNS, BETA) == close(np.array([math.log(2 / math.sqrt(3))]))


def test_hand_made_losses_and_objective():
    tilted = theory.tilt(HALF, SIGNS, BETA)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert theory.sft_loss(tilted, HALF) == close(-0.5 * math.log(0.75 * 0.25))
    assert theory.expected_reward(tilted, SIGNS) == close(0.5)
    assert theory.mean_kl(tilted, HALF) == close(kl)
    assert theory.regularised_objective(tilted, HALF, SIGNS, BETA) == close(0.5 - BETA * kl)
    assert theory.c1(HALF, HALF, SIGNS, BETA) == close(math.log(2 / math.sqrt(3)))


def test_means_are_over_prompts_and_not_over_answers():
    logp = np.log([[0.5, 0.5], [0.9, 0.1]])
    logd = np.log([[0.5, 0.5], [0.2, 0.8]])
    r = np.array([[1.0, -1.0], [1.0, 0.0]])
    losses = [math.log(2), -0.2 * math.log(0.9) - 0.8 * math.log(0.1)]
    divergences = [0.0, 0.9 * math.log(4.5) + 0.1 * math.log(0.125)]
    assert theory.prompt_losses(logp, logd) == close(np.array(losses))
    assert theory.prompt_kl(logp, logd) == close(np.array(divergences))
    assert theory.prompt_rewards(logp, r) == close(np.array([0.0, 0.9]))
    assert theory.sft_loss(logp, logd) == close(sum(losses) / 2)
    assert theory.mean_kl(logp, logd) == close(sum(divergences) / 2)
    assert theory.expected_reward(logp, r) == close(0.45)


# Brute force: strings of two or three tokens over {a, b}, then the end, written out with loops over a token policy.

STRINGS = ["".join(tokens) + "." for length in (2, 3) for tokens in itertools.product("ab", repeat=length)]


def token_probability(prompt: int, prefix: str, token: str, sharpness: float) -> float:
    """A token policy that depends on the prompt and on everything said so far; strings end after 2 or 3 tokens."""
    allowed = {0: "ab", 1: "ab", 2: "ab.", 3: "."}[len(prefix)]
    phase = 1 + prompt + 3 * prefix.count("b")
    weights = {t: math.exp(sharpness * math.sin(phase + 2 * "ab.".index(t))) for t in allowed}
    return weights[token] / sum(weights.values())


def string_probability(prompt: int, string: str, sharpness: float) -> float:
    return math.prod(token_probability(prompt, string[:i], token, sharpness) for i, token in enumerate(string))


def string_reward(prompt: int, string: str) -> float:
    return 1.0 if string.count("a") % 2 == prompt % 2 else -1.0


def string_policy(sharpness: float) -> np.ndarray:
    return np.log([[string_probability(prompt, s, sharpness) for s in STRINGS] for prompt in range(3)])


@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
def test_arrays_agree_with_explicit_loops_over_strings(beta):
    start, demonstrator = 0.7, 2.0
    loss = reward = kl = change = tilted_loss = tilted_reward = 0.0
    for x in range(3):
        z = sum(string_probability(x, s, start) * math.exp(string_reward(x, s) / beta) for s in STRINGS)
        change += math.log(z) / 3
        for s in STRINGS:
            p, d, r = string_probability(x, s, start), string_probability(x, s, demonstrator), string_reward(x, s)
            tilted = p * math.exp(r / beta) / z
            token_losses = [-math.log(token_probability(x, s[:i], token, start)) for i, token in enumerate(s)]
            loss += d * sum(token_losses) / 3
            reward += p * r / 3
            kl += p * math.log(p / d) / 3
            change -= d * r / beta / 3
            tilted_loss -= d * math.log(tilted) / 3
            tilted_reward += tilted * r / 3

    logp0, logd = string_policy(start), string_policy(demonstrator)
    r = np.array([[string_reward(x, s) for s in STRINGS] for x in range(3)])
    logrl = theory.tilt(logp0, r, beta)
    assert theory.sft_loss(logp0, logd) == close(loss)
    assert theory.expected_reward(logp0, r) == close(reward)
    assert theory.mean_kl(logp0, logd) == close(kl)
    assert theory.c1(logd, logp0, r, beta) == close(change)
    assert theory.sft_loss(logrl, logd) == close(tilted_loss)
    assert theory.expected_reward(logrl, r) == close(tilted_reward)
    assert tilted_loss - loss == close(change)


# Identities over random policies


@UNHURRIED
@given(problems())
def test_theorem_3_1_for_a_start_that_equals_the_demonstrations(problem):
    _, _, logd, r, beta = problem
    change = theory.c1(logd, logd, r, beta)
    logrl = theory.tilt(logd, r, beta)
    assert change >= -ABSOLUTE
    assert change == close(theory.mean_kl(logd, logrl))
    assert change == close(theory.sft_loss(logrl, logd) - theory.sft_loss(logd, logd))


@UNHURRIED
@given(problems())
def test_sign_rule_for_any_start(problem):
    _, logp0, logd, r, beta = problem
    logrl = theory.tilt(logp0, r, beta)
    rise = theory.prompt_losses(logrl, logd) - theory.prompt_losses(logp0, logd)
    by_definition = theory.log_normaliser(logp0, r, beta) - theory.prompt_rewards(logd, r) / beta
    assert theory.prompt_c1(logd, logp0, r, beta) == close(rise)
    assert theory.prompt_c1(logd, logp0, r, beta) == close(by_definition)
    assert theory.c1(logd, logp0, r, beta) == close(rise.mean())


@UNHURRIED
@given(problems())
def test_regularised_objective_falls_by_beta_kl_away_from_the_optimum(problem):
    logp, logp0, _, r, beta = problem
    logrl = theory.tilt(logp0, r, beta)
    deficit = theory.regularised_objective(logrl, logp0, r, beta) - theory.regularised_objective(logp, logp0, r, beta)
    assert deficit == close(beta * theory.mean_kl(logp, logrl))
    assert deficit >= -ABSOLUTE
    # and the optimum is the soft value
    soft_value = beta * theory.log_normaliser(logp0, r, beta).mean()
    assert theory.regularised_objective(logrl, logp0, r, beta) == close(soft_value)


@UNHURRIED
@given(problems(), st.data())
def test_perfect_demonstrations_lower_the_loss(problem, data):
    _, logp0, logd, r, beta = problem
    gold = data.draw(arrays(bool, r.shape))
    gold[:, 0] = True  # one rewarded answer that the start can give
    logd = log_softmax(np.where(gold, logd, -np.inf), axis=1)
    r = np.where(gold, 1.0, -1.0)
    m = np.minimum(np.where(gold, np.exp(logp0), 0).sum(axis=1), 1)
    change = theory.sft_loss(theory.tilt(logp0, r, beta), logd) - theory.sft_loss(logp0, logd)
    assert change <= ABSOLUTE
    assert change == close(theory.perfect_demonstration_change(m, beta).mean())


def test_perfect_demonstrations_by_hand_and_at_the_ends():
    beta = 2 / math.log(4)  # exp(-2/beta) = 1/4
    assert theory.perfect_demonstration_change(1 / 3, beta) == close(math.log(0.5))
    assert theory.perfect_demonstration_change([0, 1], 1e-3) == close(np.array([-2000.0, 0.0]))
    assert theory.perfect_demonstration_change(0.25, 1e-3) == close(math.log(0.25))


@UNHURRIED
@given(problems())
def test_pinsker_bounds_the_change_of_reward_in_both_directions(problem):
    logp, logq, _, r, _ = problem
    change = abs(theory.expected_reward(logp, r) - theory.expected_reward(logq, r))
    for kl in (theory.mean_kl(logp, logq), theory.mean_kl(logq, logp)):
        assert change <= theory.pinsker_bound(kl, r.max(), r.min()) + ABSOLUTE


def test_pinsker_bound_by_hand_and_nearly_attained():
    assert theory.pinsker_bound(0.5, 1, -1) == close(1.0)
    small = np.log([[0.51, 0.49]])
    bound = theory.pinsker_bound(theory.mean_kl(small, HALF), 1, -1)
    assert 0.02 < bound < 0.02001


def test_counterexample_to_an_unconditional_theorem_4_1():
    sft, r = np.log([[0.75, 0.25]]), np.zeros((1, 2))
    assert theory.tilt(HALF, r, 1.0) == close(HALF)  # with no reward to gain, RL stays where it started
    assert theory.mean_kl(sft, HALF) == pytest.approx(0.1308, abs=5e-5)
    assert theory.expected_reward(sft, r) - theory.expected_reward(HALF, r) == 0


@UNHURRIED
@given(problems(), st.floats(-1, 1))
def test_where_all_answers_earn_the_same_no_move_away_from_rl_costs_reward(problem, constant):
    """The first counterexample to an unconditional Theorem 4.1, for any two policies: their KL says nothing about J."""
    logp, logp0, _, _, beta = problem
    r = np.full(logp.shape, constant)
    logrl = theory.tilt(logp0, r, beta)
    assert theory.mean_kl(logp, logrl) == close(theory.mean_kl(logp, logp0))  # whatever it is, RL did not move
    assert theory.expected_reward(logp, r) == close(theory.expected_reward(logrl, r))


@UNHURRIED
@given(st.floats(0.01, 0.99), st.integers(0, 4))
def test_moving_mass_between_tied_best_answers_costs_no_reward(share, extra):
    """The second: RL has driven all mass to answers that share the top reward, and SFT prefers one of them."""
    r = np.array([[1.0, 1.0] + [-1.0] * extra])
    start = log_softmax(np.hstack([np.zeros((1, 2)), np.full((1, extra), 5.0)]), axis=1)
    logrl = theory.tilt(start, r, 1e-3)
    logp = np.hstack([np.log([[share, 1 - share]]), np.full((1, extra), -np.inf)])
    assert theory.mean_kl(logp, logrl) == close(math.log(2) - stats.entropy([share, 1 - share]))
    assert theory.expected_reward(logp, r) == close(theory.expected_reward(logrl, r))


def test_no_change_where_the_reward_is_constant_on_the_support():
    logd = np.log([[0.5, 0.5, 1e-300]])
    logd[0, 2] = -np.inf
    assert theory.c1(logd, logd, [[0.3, 0.3, 1.0]], 1e-3) == close(0.0)
    assert theory.c1(logd, logd, [[0.3, 0.2, 1.0]], 1e-3) > 1


# Numerical edges


@UNHURRIED
@given(problems(), st.floats(-5, 5))
def test_adding_a_constant_to_the_reward_changes_nothing(problem, constant):
    _, logp0, logd, r, beta = problem
    assert theory.tilt(logp0, r + constant, beta) == close(theory.tilt(logp0, r, beta))
    assert theory.c1(logd, logp0, r + constant, beta) == close(theory.c1(logd, logp0, r, beta))


def test_losses_stay_exact_where_probabilities_underflow():
    logrl = theory.tilt(HALF, SIGNS, 1e-3)
    assert logrl == close(np.array([[0.0, -2000.0]]))
    assert theory.sft_loss(logrl, HALF) == close(1000.0)
    assert theory.mean_kl(HALF, logrl) == close(1000.0 - math.log(2))
    assert theory.c1(HALF, HALF, SIGNS, 1e-3) == close(1000.0 - math.log(2))


def test_large_beta_leaves_the_start_and_the_second_order_term():
    logp0 = np.log([[0.2, 0.3, 0.5]])
    r = np.array([[1.0, -1.0, 0.5]])
    assert theory.tilt(logp0, r, 1e3) == pytest.approx(logp0, abs=2e-3)
    variance = 0.2 + 0.3 + 0.25 * 0.5 - 0.15**2
    assert theory.c1(logp0, logp0, r, 1e3) == pytest.approx(variance / 2e6, rel=1e-3)


def test_impossible_answers():
    certain = np.array([[0.0, -np.inf]])
    assert theory.sft_loss(certain, certain) == 0
    assert theory.sft_loss(certain, HALF) == math.inf
    assert theory.mean_kl(certain, HALF) == close(math.log(2))
    assert theory.mean_kl(HALF, certain) == math.inf
    assert theory.tilt(certain, -SIGNS, 1e-3).tolist() == [[0.0, -math.inf]]


def test_kl_is_never_negative_not_even_by_rounding():
    logits = np.random.default_rng(0).normal(size=(200, 5))
    logp, logq = log_softmax(logits, axis=1), log_softmax(logits + 1e-9 * np.cos(np.arange(5)), axis=1)
    plain = (np.exp(logp) * (logp - logq)).sum(axis=1)
    assert plain.min() < 0  # the sum as written on paper
    assert theory.prompt_kl(logp, logq).min() >= 0


# Two labels in closed form


@UNHURRIED
@given(LIKELIER, BETAS)
def test_closed_forms_agree_with_finite_policies(q, beta):
    logd = theory.two_label_policy([logit(q)])
    r = theory.agreement_reward(logd)
    logrl = theory.tilt(logd, r, beta)
    assert theory.calibrated_loss(q) == close(theory.sft_loss(logd, logd))
    assert theory.calibrated_reward(q) == close(theory.expected_reward(logd, r))
    assert theory.sharp_reward(q) == close(r.max())
    assert theory.rl_probability(q, beta) == close(math.exp(logrl[0, 1]))
    assert theory.rl_reward(q, beta) == close(theory.expected_reward(logrl, r))
    assert theory.rl_loss(q, beta) == close(theory.sft_loss(logrl, logd))
    assert theory.rl_loss(q, beta) - theory.calibrated_loss(q) == close(theory.c1(logd, logd, r, beta))


@UNHURRIED
@given(LIKELIER, BETAS)
def test_rl_raises_both_the_loss_and_the_reward_of_a_calibrated_policy(q, beta):
    assert theory.rl_loss(q, beta) >= theory.calibrated_loss(q) - ABSOLUTE
    assert theory.calibrated_reward(q) - ABSOLUTE <= theory.rl_reward(q, beta) <= theory.sharp_reward(q) + ABSOLUTE


def test_two_labels_at_q_090_and_beta_1():
    p = 0.9 * math.exp(0.8) / (0.9 * math.exp(0.8) + 0.1 * math.exp(-0.8))
    assert theory.rl_probability(0.9, 1) == close(p)
    assert theory.rl_loss(0.9, 1) == close(-0.9 * math.log(p) - 0.1 * math.log(1 - p))
    assert round(theory.calibrated_loss(0.9), 3) == 0.325
    assert round(theory.rl_loss(0.9, 1) - theory.calibrated_loss(0.9), 3) == 0.077
    assert theory.calibrated_reward(0.9) == close(0.64)
    assert theory.rl_reward(0.9, 1) == close(0.8 * (2 * p - 1))
    assert theory.sharp_reward(0.9) == close(0.8)


@given(problems(), st.floats(10, 1000))
def test_for_large_beta_the_rise_is_half_the_variance_of_the_reward_over_beta_squared(problem, beta):
    """C1 is the logarithm of a moment-generating function at 1/beta; the next term is a third cumulant over 6 beta^3.

    Rewards span at most 2, and a third central moment then is at most 8 / (6 sqrt 3) = 0.77.
    """
    logp, _, _, r, _ = problem
    p = np.exp(logp)
    variance = (p * r**2).sum(1) - (p * r).sum(1) ** 2
    expected = variance.mean() / (2 * beta**2)
    assert abs(theory.c1(logp, logp, r, beta) - expected) <= 0.77 / (6 * beta**3) + 1e-12


def test_small_beta_limit():
    q = np.array([0.55, 0.75, 0.95])
    assert theory.rl_reward(q, 1e-3) == close(theory.sharp_reward(q))
    # the loss is that of the unlikelier label, at the tilted odds
    assert theory.rl_loss(q, 1e-3) == close((1 - q) * (logit(q) + 2 * (2 * q - 1) / 1e-3))
    assert (np.diff(theory.rl_loss(0.75, np.logspace(3, -3, 50))) > 0).all()


def test_large_beta_limit():
    q = np.array([0.55, 0.75, 0.95])
    assert theory.rl_reward(q, 1e3) == pytest.approx(theory.calibrated_reward(q), abs=1e-3)
    variance = 4 * q * (1 - q) * (2 * q - 1) ** 2
    assert theory.rl_loss(q, 1e3) - theory.calibrated_loss(q) == pytest.approx(variance / 2e6, rel=5e-3)


def test_tossed_and_certain_labels_do_not_move_at_any_beta():
    for beta in (1e-3, 1.0, 1e3):
        assert theory.rl_loss([0.5, 1.0], beta) == close(np.array([math.log(2), 0.0]))
        assert theory.rl_probability([0.5, 1.0], beta) == close(np.array([0.5, 1.0]))


def test_the_frontier_is_where_loss_and_reward_pull_alike():
    """p - q = 2 price (2q-1) p (1-p): at q = 3/4 and p = 9/10 this is the price 0.15 / 0.09."""
    assert theory.frontier_probability(0.75, 0.15 / 0.09) == close(0.9)
    assert theory.frontier_probability([0.5, 0.75, 1.0], 0.0) == close(np.array([0.5, 0.75, 1.0]))
    assert theory.frontier_probability([0.5, 0.75, 1.0], 1e9) == pytest.approx([0.5, 1.0, 1.0], abs=1e-6)
    with pytest.raises(ValueError, match="price"):
        theory.frontier_probability(0.75, -0.1)
    with pytest.raises(ValueError, match="likelier"):
        theory.frontier_probability(0.4, 1.0)


@UNHURRIED
@given(LIKELIER, st.floats(0, 50))
@example(1 - 2**-53, 0.3)
def test_no_other_probability_is_worth_more_at_its_price(q, price):
    def worth(p):
        return price * (2 * q - 1) * (2 * p - 1) + xlogy(q, p) + xlog1py(1 - q, -p)

    # where the best 1 - p is too small for p's digits, p is 1 and what it is worth -inf
    best = np.minimum(theory.frontier_probability(q, price), np.nextafter(1, 0))
    assert worth(best) >= worth(np.linspace(0, 1, 400)).max() - 1e-9


# Measured two-label policies

LOG_ODDS, TRUTH, DISAGREEMENT = np.array([2.0, -0.3, 0.4]), np.array([1, 1, 0]), 0.1


def test_measured_loss_and_reward_against_every_way_to_annotate():
    loss = reward = 0.0
    for labels in itertools.product([0, 1], repeat=3):
        weight = math.prod(0.9 if label == truth else 0.1 for label, truth in zip(labels, TRUTH, strict=True))
        for label, log_odds in zip(labels, LOG_ODDS, strict=True):
            acceptable = 1 / (1 + math.exp(-log_odds))
            agree = acceptable if label else 1 - acceptable
            loss -= weight * math.log(agree) / 3
            reward += weight * (agree - (1 - agree)) / 3
    assert theory.expected_loss(LOG_ODDS, TRUTH, DISAGREEMENT) == close(loss)
    assert theory.expected_reward_of_odds(LOG_ODDS, TRUTH, DISAGREEMENT) == close(reward)


def test_every_sentence_may_have_a_disagreement_of_its_own():
    rates = [0.1, 0.25, 0.0]
    for function in (theory.expected_loss, theory.expected_reward_of_odds):
        apart = [function([odds], [truth], rate) for odds, truth, rate in zip(LOG_ODDS, TRUTH, rates, strict=True)]
        assert function(LOG_ODDS, TRUTH, rates) == close(sum(apart) / 3)
    tilted = theory.tilted_log_odds(LOG_ODDS, TRUTH, rates, beta=0.5)
    assert tilted == close(LOG_ODDS + np.array([3.2, 2.0, -4.0]))
    with pytest.raises(ValueError, match="disagreement"):
        theory.expected_loss(LOG_ODDS, TRUTH, [0.1, 0.5, 0.0])
    with pytest.raises(ValueError, match="disagreement"):
        theory.expected_loss(LOG_ODDS, TRUTH, [0.1, math.nan, 0.0])


def test_measured_tilt_moves_odds_towards_the_truth():
    tilted = theory.tilted_log_odds(LOG_ODDS, TRUTH, DISAGREEMENT, beta=0.5)
    assert tilted == close(LOG_ODDS + np.array([3.2, 3.2, -3.2]))


def test_measured_tilt_is_the_numerical_optimum():
    def objective(log_odds: float) -> float:
        p, p0 = expit(log_odds), expit(-0.3)
        return 0.8 * (2 * p - 1) - 0.5 * stats.entropy([p, 1 - p], [p0, 1 - p0])

    best = minimize_scalar(lambda log_odds: -objective(log_odds), bounds=(-10, 10), method="bounded").x
    assert theory.tilted_log_odds([-0.3], [1], 0.1, 0.5)[0] == pytest.approx(best, abs=1e-3)


@UNHURRIED
@given(arrays(float, 4, elements=st.floats(-30, 30)), st.floats(0, 0.49), BETAS)
def test_measured_predictions_agree_with_finite_policies(log_odds, disagreement, beta):
    truth = np.array([0, 1, 1, 0])
    logp0, logd = theory.two_label_policy(log_odds), theory.annotator_policy(truth, disagreement)
    r = theory.agreement_reward(logd)
    tilted = theory.tilted_log_odds(log_odds, truth, disagreement, beta)
    assert theory.two_label_policy(tilted) == close(theory.tilt(logp0, r, beta))
    rise = theory.expected_loss(tilted, truth, disagreement) - theory.expected_loss(log_odds, truth, disagreement)
    assert rise == close(theory.c1(logd, logp0, r, beta))
    gain = theory.expected_reward_of_odds(tilted, truth, disagreement)
    assert gain >= theory.expected_reward_of_odds(log_odds, truth, disagreement) - ABSOLUTE


def test_measured_policy_that_is_calibrated_earns_the_closed_forms():
    q = 1 - DISAGREEMENT
    log_odds = np.where(TRUTH == 1, logit(q), -logit(q))
    tilted = theory.tilted_log_odds(log_odds, TRUTH, DISAGREEMENT, 0.7)
    assert theory.expected_loss(log_odds, TRUTH, DISAGREEMENT) == close(theory.calibrated_loss(q))
    assert theory.expected_reward_of_odds(log_odds, TRUTH, DISAGREEMENT) == close(theory.calibrated_reward(q))
    assert theory.expected_loss(tilted, TRUTH, DISAGREEMENT) == close(theory.rl_loss(q, 0.7))
    assert theory.expected_reward_of_odds(tilted, TRUTH, DISAGREEMENT) == close(theory.rl_reward(q, 0.7))
    assert theory.self_tilted_log_odds(log_odds, 0.7) == close(tilted)


@UNHURRIED
@given(LIKELIER, BETAS)
def test_self_consistent_tilt_is_the_closed_form_and_odd(q, beta):
    log_odds = np.array([logit(q), -logit(q)])
    tilted = theory.self_tilted_log_odds(log_odds, beta)
    assert expit(tilted[0]) == close(theory.rl_probability(q, beta))
    assert tilted[1] == -tilted[0]


def test_annotators_without_disagreement_give_the_truth():
    assert np.exp(theory.annotator_policy([0, 1], 0.0)).tolist() == [[1, 0], [0, 1]]
    assert np.exp(theory.annotator_policy([0, 1], 0.2)) == close(np.array([[0.8, 0.2], [0.2, 0.8]]))
    assert theory.expected_loss([-800.0], [1], 0.0) == close(800.0)


def test_loss_and_reward_on_labels_as_given_by_hand():
    log_odds = [math.log(3), math.log(3)]  # "acceptable" with probability 3/4
    assert theory.loss_on_labels(log_odds, [1, 0]) == close(-(math.log(0.75) + math.log(0.25)) / 2)
    assert theory.reward_on_labels(log_odds, [1, 0]) == close(0.0)
    assert theory.reward_on_labels(log_odds, [1, 1]) == close(0.5)


# Test time


def test_majorities_against_every_sequence_of_answers():
    for samples in (1, 3, 5, 7):
        for p in (0.03, 0.4, 0.5, 0.8):
            wins = sum(
                math.prod(p if answer else 1 - p for answer in answers)
                for answers in itertools.product([0, 1], repeat=samples)
                if 2 * sum(answers) > samples
            )
            assert expit(theory.majority_log_odds(logit([p]), samples)) == close(np.array([wins]))


def test_majority_of_three_by_hand():
    # 0.9^3 + 3 * 0.9^2 * 0.1 = 0.972
    assert theory.majority_log_odds([logit(0.9), logit(0.1)], 3) == close(logit([0.972, 0.028]))


@UNHURRIED
@given(st.floats(-40, 40), st.integers(0, 15).map(lambda half: 2 * half + 1))
def test_a_larger_majority_is_surer_and_odd(log_odds, samples):
    few, more = (theory.majority_log_odds(log_odds, k) for k in (samples, samples + 2))
    assert theory.majority_log_odds(log_odds, 1) == close(log_odds)
    assert abs(more) >= abs(few) - ABSOLUTE
    assert theory.majority_log_odds(-log_odds, samples) == close(-few)


def test_majorities_of_sure_policies():
    assert theory.majority_log_odds([-math.inf, -800.0, 0.0, math.inf], 9).tolist() == [
        -math.inf,
        -math.inf,
        0,
        math.inf,
    ]
    # three of five must be the answer of probability e^-100, which happens in ten ways
    assert theory.majority_log_odds(-100.0, 5) == close(-300 + math.log(10))


def test_temperature_raises_probabilities_to_a_power():
    p, temperature = np.array([0.2, 0.5, 0.9]), 0.4
    powers = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    tempered = theory.tempered_log_odds(logit(p), temperature)
    assert expit(tempered) == close(powers[0] / (powers[0] + powers[1]))
    assert theory.tempered_log_odds(LOG_ODDS, 1.0) == close(LOG_ODDS)


def test_greedy_decoding_is_the_limit_of_low_temperature_and_of_many_samples():
    assert theory.tempered_log_odds([-0.1, 0.0, 3.0], 0).tolist() == [-math.inf, 0, math.inf]
    assert math.isnan(theory.tempered_log_odds(math.nan, 0))
    greedy = theory.expected_reward_of_odds(theory.tempered_log_odds(LOG_ODDS, 0), TRUTH, DISAGREEMENT)
    assert greedy == close((0.8 - 0.8 - 0.8) / 3)  # right, wrong, wrong
    for nearly in (theory.tempered_log_odds(LOG_ODDS, 1e-3), theory.majority_log_odds(LOG_ODDS, 1001)):
        assert theory.expected_reward_of_odds(nearly, TRUTH, DISAGREEMENT) == pytest.approx(greedy, abs=1e-6)


# GRPO on one decision: everything that can happen in a group, written out with loops

ORACLES = [(normalised, corrected) for normalised in (False, True) for corrected in (True, False)]


def group_surrogate(log_odds, old, start, answers, label, beta, normalised, corrected):
    """What trl maximises for one sampled group, as it stands in its documentation; ``old`` drew the answers."""
    rewards = [1.0 if answer == label else -1.0 for answer in answers]
    deviation = np.std(rewards, ddof=1) + theory.DEVIATION_FLOOR if normalised else 1.0

    def logp(odds, answer):
        return -math.log1p(math.exp(-odds if answer else odds))

    total = 0.0
    for answer, r in zip(answers, rewards, strict=True):
        ratio = math.exp(logp(log_odds, answer) - logp(old, answer))
        gap = logp(start, answer) - logp(log_odds, answer)
        kl = math.exp(gap) - gap - 1
        total += ratio * (r - np.mean(rewards)) / deviation - beta * kl * (ratio if corrected else 1.0)
    return total / len(answers)


@pytest.mark.parametrize(("normalised", "corrected"), ORACLES)
@pytest.mark.parametrize(("answers", "log_odds", "start", "q"), [(2, 0.4, -0.3, 0.9), (3, 2, 1, 0.6), (5, -1, -2, 0.2)])
def test_grpo_gradient_against_every_group(answers, log_odds, start, q, normalised, corrected):
    beta, h, expected = 0.7, 1e-4, 0.0
    for group in itertools.product([0, 1], repeat=answers):
        for label in (0, 1):
            weight = (q if label else 1 - q) * math.prod(expit(log_odds if answer else -log_odds) for answer in group)
            up, down = (
                group_surrogate(log_odds + step, log_odds, start, group, label, beta, normalised, corrected)
                for step in (h, -h)
            )
            expected += weight * (up - down) / (2 * h)
    found = theory.grpo_gradient(log_odds, start, q, beta, answers, normalised, corrected)
    assert found == pytest.approx(expected, abs=1e-7)


def test_objective_gradient_is_the_derivative_of_the_objective():
    def objective(log_odds):
        p, p0 = expit(log_odds), expit(0.3)
        return (2 * 0.8 - 1) * (2 * p - 1) - 0.7 * stats.entropy([p, 1 - p], [p0, 1 - p0])

    for log_odds in (-2.0, 0.3, 4.0):
        slope = (objective(log_odds + 1e-5) - objective(log_odds - 1e-5)) / 2e-5
        assert theory.objective_gradient(log_odds, 0.3, 0.8, 0.7) == pytest.approx(slope, abs=1e-8)


GROUPS, STARTS, GIVEN = st.integers(2, 16), st.floats(-8, 8), st.floats(0, 1)
MODERATE = st.floats(-2, 1).map(lambda exponent: 10.0**exponent)


@UNHURRIED
@given(STARTS, STARTS, GIVEN, MODERATE, GROUPS)
def test_scaling_beta_makes_grpo_proportional_to_the_objective(log_odds, start, q, beta, answers):
    shrink = (answers - 1) / answers
    found = theory.grpo_gradient(log_odds, start, q, beta * shrink, answers)
    assert found == close(shrink * theory.objective_gradient(log_odds, start, q, beta))
    assert theory.grpo_log_odds(start, q, beta * shrink, answers) == close(start + 2 * (2 * q - 1) / beta)
    # and without scaling beta, the fixed point is that of a larger one
    assert theory.grpo_log_odds(start, q, beta, answers) == close(start + 2 * (2 * q - 1) / (beta / shrink))


@UNHURRIED
@given(STARTS, GIVEN, MODERATE, GROUPS)
@pytest.mark.parametrize(("normalised", "corrected"), ORACLES)
def test_grpo_rests_where_its_gradient_changes_sign(normalised, corrected, start, q, beta, answers):
    rest = theory.grpo_log_odds(start, q, beta, answers, normalised, corrected)
    step = 1e-6 * max(1, abs(rest))
    below, above = (
        theory.grpo_gradient(rest + side * step, start, q, beta, answers, normalised, corrected) for side in (-1, 1)
    )
    at_rest = theory.grpo_gradient(rest, start, q, beta, answers, normalised, corrected)
    assert abs(at_rest) <= max(abs(below), abs(above)) + 1e-12
    assert abs(at_rest) < 1e-9


def test_grpo_rests_at_the_closed_form_of_ideal_rl():
    q, beta = np.array([0.6, 0.9, 0.99]), 0.5
    assert expit(theory.grpo_log_odds(logit(q), q, beta * 7 / 8, 8)) == close(theory.rl_probability(q, beta))
    tilted = theory.tilted_log_odds(LOG_ODDS, TRUTH, DISAGREEMENT, beta)
    label = np.where(TRUTH == 1, 1 - DISAGREEMENT, DISAGREEMENT)
    assert theory.grpo_log_odds(LOG_ODDS, label, beta * 7 / 8, 8) == close(tilted)


@pytest.mark.parametrize("answers", [2, 3, 8, 64])
def test_from_a_calibrated_start_normalised_grpo_rests_at_one_place_only(answers):
    grid = np.linspace(0, 60, 6001)
    for q in (0.5, 0.6, 0.9, 0.999):
        for beta in (0.02, 0.5, 5.0):
            rest = theory.grpo_log_odds(logit(q), q, beta, answers, normalised=True)
            gradient = theory.grpo_gradient(grid, logit(q), q, beta, answers, normalised=True)
            assert (gradient[grid < rest - 1e-6] >= 0).all()
            assert (gradient[grid > rest + 1e-6] <= 0).all()


@UNHURRIED
@given(st.floats(-60, 60), st.integers(2, 64))
def test_dividing_by_the_deviation_multiplies_the_gradient_by_a_bounded_even_factor(log_odds, answers):
    factor = theory.deviation_factor(log_odds, answers)
    assert math.sqrt((answers - 1) / answers) * 0.9998 <= factor <= math.sqrt(answers) / 2
    assert theory.deviation_factor(-log_odds, answers) == factor


def test_deviation_factor_at_the_ends():
    assert theory.deviation_factor([0.0, 1.0, 30.0], 2) == close(np.full(3, 1 / (math.sqrt(2) + 1e-4)))
    assert theory.deviation_factor([-900.0, 900.0], 8) == close(np.full(2, 1 / (2 / math.sqrt(8) + 1e-4)))
    # of four answers, two of each with probability 1/2 given one of each, else three against one
    deviations = [math.sqrt(4 / 3), 1.0]
    assert theory.deviation_factor(0.0, 4) == close(np.mean([1 / (deviation + 1e-4) for deviation in deviations]))


def test_the_uncorrected_kl_term_has_the_gradient_of_the_other_divergence():
    def divergence(log_odds):
        return theory.mean_kl(theory.two_label_policy([0.3]), theory.two_label_policy([log_odds]))

    for log_odds in (-2.0, 0.3, 4.0):
        slope = (divergence(log_odds + 1e-5) - divergence(log_odds - 1e-5)) / 2e-5
        assert theory.grpo_gradient(log_odds, 0.3, 0.5, 1.0, 2, corrected=False) == pytest.approx(-slope, abs=1e-8)


def test_uncorrected_grpo_from_a_calibrated_policy_trades_reward_for_sft_loss():
    """KL(p0 || p) is then the SFT loss but for a constant, so its fixed point maximises J - beta L."""
    beta = 0.5
    best = minimize_scalar(
        lambda x: beta * theory.expected_loss([x], [1], 0.1) - theory.expected_reward_of_odds([x], [1], 0.1),
        bounds=(0, 20),
        method="bounded",
        options={"xatol": 1e-9},
    ).x
    found = theory.grpo_log_odds(logit(0.9), 0.9, beta * 7 / 8, 8, corrected=False)
    assert found == pytest.approx(best, abs=1e-5)


# Errors


@pytest.mark.parametrize("beta", [0, -1, math.nan, math.inf])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match="beta"):
        theory.log_normaliser(HALF, SIGNS, beta)
    with pytest.raises(ValueError, match="beta"):
        theory.regularised_objective(HALF, HALF, SIGNS, beta)
    with pytest.raises(ValueError, match="beta"):
        theory.rl_loss(0.9, beta)
    with pytest.raises(ValueError, match="beta"):
        theory.self_tilted_log_odds([0.1], beta)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        theory.tilt(HALF, [[1, 0, 1]], 1.0)
    with pytest.raises(ValueError, match="logp and logd"):
        theory.sft_loss(HALF, np.vstack([HALF, HALF]))
    with pytest.raises(ValueError, match="logp and logq"):
        theory.mean_kl(HALF, np.log([[0.2, 0.3, 0.5]]))
    with pytest.raises(ValueError, match="prompts, answers"):
        theory.sft_loss(HALF[0], HALF[0])
    with pytest.raises(ValueError, match="log_odds"):
        theory.tilted_log_odds([0.1, 0.2], [1], 0.1, 1.0)


def test_a_policy_must_be_normalised():
    with pytest.raises(ValueError, match="Row 1 of logp sums to 0.9 "):
        theory.expected_reward(np.log([[0.5, 0.5], [0.5, 0.4]]), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="nan"):
        theory.expected_loss([math.nan], [1], 0.1)


@pytest.mark.parametrize("disagreement", [-0.1, 0.5, math.nan])
def test_disagreement_must_be_below_one_half(disagreement):
    with pytest.raises(ValueError, match="disagreement"):
        theory.expected_loss([0.1], [1], disagreement)


def test_probabilities_and_truth_must_be_in_range():
    for function in (theory.calibrated_loss, theory.calibrated_reward, theory.sharp_reward):
        with pytest.raises(ValueError, match="likelier"):
            function([0.7, 0.4])
    with pytest.raises(ValueError, match="m must"):
        theory.perfect_demonstration_change(-0.1, 1.0)
    with pytest.raises(ValueError, match="truth"):
        theory.annotator_policy([-1, 1], 0.1)
    with pytest.raises(ValueError, match="negative"):
        theory.pinsker_bound(-0.1, 1, -1)
    with pytest.raises(ValueError, match="r_max"):
        theory.pinsker_bound(0.1, -1, 1)


def test_decoders_and_groups_must_make_sense():
    for temperature in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            theory.tempered_log_odds([0.1], temperature)
    for samples in (0, -1, 4):
        with pytest.raises(ValueError, match="odd"):
            theory.majority_log_odds([0.1], samples)
    with pytest.raises(ValueError, match="at least 2"):
        theory.deviation_factor(0.1, 1)
    for function in (theory.grpo_gradient, theory.grpo_log_odds):
        arguments = (0.1, 0.1) if function is theory.grpo_gradient else (0.1,)
        with pytest.raises(ValueError, match="at least 2"):
            function(*arguments, 0.9, 1.0, 1)
        with pytest.raises(ValueError, match="q must"):
            function(*arguments, 1.1, 1.0, 8)
        with pytest.raises(ValueError, match="beta"):
            function(*arguments, 0.9, 0.0, 8)
    with pytest.raises(ValueError, match="q must"):
        theory.objective_gradient(0.1, 0.1, -0.1, 1.0)
