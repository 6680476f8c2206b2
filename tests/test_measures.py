"""Temperatures, ranks and distances of policies whose distortion is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from nondecoupling.analysis import measures, theory
from tables import odds_of, policy

RNG = np.random.default_rng(0)
CALIBRATED = RNG.normal(0, 2, 4000)  # log-odds that mean what they say
LABELS = (RNG.random(4000) < expit(CALIBRATED)).astype(int)


def answers(log_odds, labels=LABELS, **more):
    return policy("x", log_odds, labels, [0], **more)


def log_odds(logp):
    return logp[:, 1] - logp[:, 0]


# Temperatures


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_best_temperature_undoes_a_known_one(temperature):
    # two standard errors of a slope fitted to 4,000 labels are about 6 %
    logp = theory.two_label_policy(CALIBRATED * temperature)
    assert measures.best_temperature(logp, theory.certain(LABELS, 2)) == pytest.approx(temperature, rel=0.06)


def test_halves_share_no_sentence_and_miss_none():
    for fit, use in (both := list(measures.halves(7))):
        assert sorted([*fit, *use]) == list(range(7))
    assert [use.tolist() for _, use in both] == [[1, 3, 5], [0, 2, 4, 6]]


def test_a_temperature_comes_from_the_other_half():
    """Even sentences are three times too sure and odd ones as sure as they should be: each half gets the other's."""
    sure = np.where(np.arange(4000) % 2 == 0, 3.0, 1.0)
    found = log_odds(measures.recalibrated(answers(CALIBRATED * sure))) / (CALIBRATED * sure)
    assert found[0::2] == pytest.approx(1, rel=0.1)  # in-sample it would be a third
    assert found[1::2] == pytest.approx(1 / 3, rel=0.1)  # in-sample it would be one


def test_labels_of_a_half_do_not_touch_its_own_temperature():
    changed = LABELS.copy()
    changed[0::2] = 1 - changed[0::2]
    before, after = (log_odds(measures.recalibrated(answers(CALIBRATED, labels))) for labels in (LABELS, changed))
    assert np.array_equal(before[0::2], after[0::2])
    assert not np.isclose(before[1::2], after[1::2]).any()


def test_one_temperature_takes_back_a_rise_that_one_temperature_made():
    calibrated, sharp = answers(CALIBRATED), answers(3 * CALIBRATED)
    assert measures.label_loss(sharp) > measures.label_loss(calibrated) + 0.1
    assert measures.share_taken_back(calibrated, sharp) == pytest.approx(1, abs=0.02)
    # what is wrong about signs is no matter of temperature: a tenth of the sentences are turned round
    turned = np.where(np.arange(4000) % 20 < 2, -1, 1)
    assert measures.share_taken_back(calibrated, answers(CALIBRATED * turned)) < 0.5
    assert math.isnan(measures.share_taken_back(sharp, calibrated))  # nothing rose


def test_a_share_by_hand():
    """Right on nine sentences of ten at p = 0.99: the best temperature makes that 0.9 on either half."""
    labels = np.ones(40)
    right = np.where(np.arange(40) % 20 < 18, 1, -1)  # two wrong in twenty, one even and one odd
    start, end = answers(right * logit(0.8), labels), answers(right * logit(0.99), labels)

    def loss(p):
        return -0.9 * math.log(p) - 0.1 * math.log(1 - p)

    share = (loss(0.99) - loss(0.9)) / (loss(0.99) - loss(0.8))
    assert measures.share_taken_back(start, end) == pytest.approx(share, rel=1e-4)


# Ranks and distances


def test_auroc_is_against_the_truth_where_it_is_known():
    truth = 1 - LABELS
    known = answers(CALIBRATED, truth=truth)
    ranked = stats.mannwhitneyu(CALIBRATED[truth == 1], CALIBRATED[truth == 0]).statistic
    assert measures.auroc(known) == pytest.approx(ranked / (truth.sum() * (1 - truth).sum()))
    unknown = known.assign(truth=pd.NA)
    assert measures.auroc(unknown) == pytest.approx(roc_auc_score(LABELS, CALIBRATED))
    assert measures.auroc(unknown) == pytest.approx(1 - measures.auroc(known))


def test_no_temperature_changes_a_rank():
    assert measures.auroc(answers(CALIBRATED)) == measures.auroc(answers(5 * CALIBRATED))


def test_kl_by_hand_and_not_the_other_way_round():
    before, after = (answers(odds_of(p, [1, 0]), [1, 0]) for p in (0.75, 0.5))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert measures.kl_between(before, after) == pytest.approx(expected)
    assert measures.kl_between(after, before) != pytest.approx(expected, rel=0.05)


def test_whatever_moves_a_calibrated_policy_costs_a_nat_per_nat():
    labels = np.repeat([1, 0], [300, 100])  # of which 0.75 is calibrated
    before = answers(np.full(400, logit(0.75)), labels)
    for p in (0.5, 0.9, 0.99):
        assert measures.loss_per_nat(before, answers(np.full(400, logit(p)), labels)) == pytest.approx(1)
    sure = answers(np.full(400, logit(0.9)), labels)
    assert measures.loss_per_nat(sure, answers(np.full(400, logit(0.99)), labels)) > 1.5  # not calibrated
    assert math.isnan(measures.loss_per_nat(before, before))


def test_greedy_share_by_hand():
    before, after = answers(odds_of(0.75, [1, 0]), [1, 0]), answers(odds_of(0.875, [1, 0]), [1, 0])
    assert measures.greedy_share(before, after) == pytest.approx((1 - 0.5) / (0.75 - 0.5))
    assert math.isnan(measures.greedy_share(after, before))


# Equal loss


def test_a_temperature_curve_is_the_theorys():
    curve = measures.temperature_curve(CALIBRATED, LABELS)
    for row in curve.iloc[[0, 77, 199]].itertuples():
        tempered = theory.tempered_log_odds(CALIBRATED, row.temperature)
        assert row.sft_loss == pytest.approx(theory.loss_on_labels(tempered, LABELS))
        assert row.reward == pytest.approx(theory.reward_on_labels(tempered, LABELS))
    assert curve["reward"].is_monotonic_decreasing
    assert curve["temperature"].iloc[[0, -1]].tolist() == pytest.approx([0.2, 5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_policies_that_differ_in_temperature_alone_earn_the_same(temperature):
    sampled, greedy = measures.advantage(answers(CALIBRATED), [answers(CALIBRATED / temperature)])
    assert sampled == pytest.approx(0, abs=0.005)  # the grid's step
    assert greedy == 0


def test_an_advantage_is_one_at_equal_loss_and_over_the_better_rival():
    """A rival that does not know a fifth of the sentences, one that knows nothing, and one that knows as much."""
    guessing, nothing = (np.where(np.arange(4000) % 10 < known, CALIBRATED, 0.0) for known in (8, 0))
    behind = measures.advantage(answers(CALIBRATED), [answers(guessing), answers(nothing)])
    assert behind[0] > 0.05
    assert behind[1] > 0.05
    equal = measures.advantage(answers(CALIBRATED), [answers(guessing), answers(3 * CALIBRATED)])
    assert equal == pytest.approx((0, 0), abs=0.005)
    # the other way round, the loss that both can have is the worse one's least: the better policy is sharper there
    ahead = measures.advantage(answers(guessing), [answers(CALIBRATED)])
    assert ahead[0] < -0.05


def test_a_rival_and_its_temperature_are_chosen_on_other_sentences():
    """A policy that is right about even sentences only, and its mirror image, are both chosen where they are useless.

    On the half on which each is chosen it is always right; on the other half it is always wrong.
    """
    labels, even = np.tile([1, 1, 0, 0], 50), np.arange(200) % 2 == 0
    own = answers(odds_of(0.8, labels), labels)
    rivals = [answers(odds_of(np.where(here, 0.8, 0.2), labels), labels) for here in (even, ~even)]
    sampled, greedy = measures.advantage(own, rivals)
    assert greedy == 2  # in-sample it would be 0
    assert sampled > 1


def test_temperatures_for_equal_loss_come_from_the_other_half():
    """On even sentences the policy is three times surer than its calibrated rival, on odd ones it is that rival.

    So the rival is sharpened by three for odd sentences, on which the policy is not, and not at all for even ones.
    """
    sure = np.where(np.arange(4000) % 2 == 0, 3.0, 1.0)
    sampled, _ = measures.advantage(answers(CALIBRATED * sure), [answers(CALIBRATED)])

    def reward(log_odds, part):
        return theory.reward_on_labels(log_odds[part], LABELS[part])

    even, odd = slice(0, None, 2), slice(1, None, 2)
    gains = (
        reward(CALIBRATED, odd) - reward(3 * CALIBRATED, odd),
        reward(3 * CALIBRATED, even) - reward(CALIBRATED, even),
    )
    assert sampled == pytest.approx(np.mean(gains), abs=0.01)
