"""Intervals and tests against textbook values, scipy's own routines and coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from nondecoupling.analysis.statistics import (
    Interval,
    Significance,
    bootstrap_interval,
    equivalence_test,
    further_draws_test,
    holm,
    mcc_interval,
    mcnemar,
    mean_interval,
    over_seeds,
    paired_test,
)
from nondecoupling.analysis.verdicts import interval_text, shown

SEEDS = [0.31, 0.35, 0.28, 0.40, 0.33]


# Over seeds


def test_mean_interval_by_hand():
    interval = mean_interval([1, 2, 3, 4, 5])
    half = 2.7764451052 * math.sqrt(2.5 / 5)  # t at 97.5% with four degrees of freedom
    assert interval == pytest.approx((3, 3 - half, 3 + half, 5))


def test_mean_interval_agrees_with_the_t_test_of_scipy():
    expected = stats.ttest_1samp(SEEDS, 0).confidence_interval(0.9)
    interval = mean_interval(SEEDS, confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    studies = np.random.default_rng(0).normal(0.3, 2, size=(2000, 3))
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in map(mean_interval, studies)])
    assert covered == pytest.approx(0.95, abs=0.02)  # four standard errors


def test_one_seed_has_no_interval_and_no_test():
    mean, low, high, n = mean_interval([0.4])
    assert (mean, n) == (0.4, 1)
    assert math.isnan(low)
    assert math.isnan(high)
    assert paired_test([0.4]) == pytest.approx(("paired t", math.nan, math.nan), nan_ok=True)


def test_equal_seeds_have_an_interval_of_no_width():
    assert mean_interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.1, 0.1, 3), abs=1e-15)


def test_paired_test_by_hand():
    result = paired_test([1, 2, 3, 4, 5])
    t = 3 / math.sqrt(2.5 / 5)
    assert result == Significance("paired t", pytest.approx(t), pytest.approx(2 * stats.t.sf(t, 4)))


def test_paired_test_is_two_sided_and_agrees_with_scipy():
    before, after = np.array(SEEDS), np.array([0.30, 0.29, 0.31, 0.33, 0.30])
    expected = stats.ttest_rel(before, after)
    result, mirrored = paired_test(before - after), paired_test(after - before)
    assert result[1:] == pytest.approx((expected.statistic, expected.pvalue))
    assert mirrored[1:] == pytest.approx((-expected.statistic, expected.pvalue))


def test_equal_differences_fall_back_to_the_sign_test():
    # Three coins that fall alike: p = 2/8. The first two lists are equal but for rounding.
    assert paired_test([0.3 - 0.2, 0.4 - 0.3, 0.1]) == Significance("exact sign", 3, pytest.approx(0.25))
    assert paired_test([0.2 - 0.3, 0.3 - 0.4, -0.1]) == Significance("exact sign", 0, pytest.approx(0.25))
    assert paired_test([0.5] * 6) == Significance("exact sign", 6, pytest.approx(2 / 64))
    assert paired_test([0, 0, 0]) == Significance("exact sign", 0, 1)
    assert paired_test([1e-16, 0, -1e-16]) == Significance("exact sign", 0, 1)


def test_equivalence_by_hand():
    # mean 0.01, deviation 0.01 sqrt(2.5), five seeds: the mean is 0.02 / (0.01 sqrt(0.5)) from the nearer bound, 0.03
    result = equivalence_test([-0.01, 0.0, 0.01, 0.02, 0.03], 0.03)
    t = 2 * math.sqrt(2)
    assert result == ("TOST", pytest.approx(-t), pytest.approx(stats.t.sf(t, 4)))
    mirrored = equivalence_test([0.01, 0.0, -0.01, -0.02, -0.03], 0.03)
    assert mirrored == ("TOST", pytest.approx(t), pytest.approx(stats.t.sf(t, 4)))


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.05, 0.3, 0.5])
def test_equivalence_is_the_larger_of_scipys_one_sided_tests(margin):
    differences = np.array(SEEDS) - 0.32
    above = stats.ttest_1samp(differences, -margin, alternative="greater")
    below = stats.ttest_1samp(differences, margin, alternative="less")
    result = equivalence_test(differences, margin)
    assert result.p_value == pytest.approx(max(above.pvalue, below.pvalue))
    interval = mean_interval(differences, 0.9)
    assert (result.p_value < 0.05) == (-margin < interval.low and interval.high < margin)


def test_one_minus_p_is_the_test_that_the_difference_lies_beyond_the_margin():
    beyond = stats.ttest_1samp(SEEDS, 0.2, alternative="greater")
    assert 1 - equivalence_test(SEEDS, 0.2).p_value == pytest.approx(beyond.pvalue)


def test_equivalence_of_one_seed_and_of_equal_seeds():
    assert equivalence_test([0.0], 0.1) == pytest.approx(("TOST", math.nan, math.nan), nan_ok=True)
    assert equivalence_test([0.0] * 5, 0.1)[::2] == ("exact sign", 1 / 32)  # five coins on the same side
    assert equivalence_test([0.2] * 5, 0.1)[::2] == ("exact sign", 1 - 1 / 32)
    with pytest.raises(ValueError, match="margin"):
        equivalence_test(SEEDS, 0.0)


def test_further_draws_are_judged_by_the_pooled_test_of_scipy():
    known, fresh = np.array(SEEDS), np.array([0.36, 0.39])
    test = further_draws_test(fresh, known)
    pooled = stats.ttest_ind(fresh, known)
    assert test == pytest.approx(("pooled t", pooled.statistic, 2 * pooled.pvalue))


def test_one_further_draw_is_judged_by_the_prediction_interval():
    spread = np.std(SEEDS, ddof=1) * math.sqrt(1 + 1 / 5)
    edge = np.mean(SEEDS) + 2.7764451052 * spread  # t at 97.5 % with four degrees of freedom
    assert further_draws_test([edge], SEEDS) == pytest.approx(("pooled t", 2.7764451052, 0.05))


def test_one_far_draw_among_several_cannot_hide_in_its_own_spread():
    known = np.random.default_rng(0).normal(size=20)
    fresh = [0.1, -0.2, 0.3, 0.0, 50.0]
    assert stats.ttest_ind(fresh, known).pvalue > 0.01
    assert further_draws_test(fresh, known).p_value < 1e-12


def test_what_partners_share_does_not_hide_a_small_change():
    shared = np.random.default_rng(0).normal(size=10)
    changes = np.array([0.11, 0.09, 0.1, 0.105, 0.095])
    fresh = shared[:5] + changes
    assert further_draws_test(fresh, shared).p_value > 0.1
    test = further_draws_test(fresh, shared, changes)
    assert test.p_value == pytest.approx(3 * stats.ttest_1samp(changes, 0).pvalue)
    assert test.p_value < 1e-4


def test_partners_that_are_alike_pass_as_often_as_they_should():
    rng, found = np.random.default_rng(0), 0
    for _ in range(1000):
        shared = rng.normal(size=10)
        known, fresh = shared + 0.3 * rng.normal(size=10), shared[:5] + 0.3 * rng.normal(size=5)
        found += further_draws_test(fresh, known, fresh - known[:5]).p_value < 0.05
    assert 5 <= found <= 71  # at least the paired test's third of 5 %, at most all of it, each with three deviations


@pytest.mark.parametrize("known", [[0.3], [0.3, 0.3, 0.3]])
def test_draws_without_spread_say_nothing_about_further_ones(known):
    with pytest.raises(ValueError, match="without spread"):
        further_draws_test([0.3, 0.4], known)


# Over sentences


def test_mcnemar_by_hand():
    # a alone is right on 1 sentence, b alone on 6: p = 2 (1 + 7) / 2^7
    a = np.array([1] * 10 + [1] + [0] * 6 + [0] * 3, dtype=bool)
    b = np.array([1] * 10 + [0] + [1] * 6 + [0] * 3, dtype=bool)
    assert mcnemar(a, b) == Significance("exact McNemar", 5, pytest.approx(0.125))
    assert mcnemar(b, a) == Significance("exact McNemar", -5, pytest.approx(0.125))


def test_mcnemar_ignores_sentences_on_which_both_agree():
    assert mcnemar([1, 0, 0, 0], [0, 1, 1, 1]) == mcnemar([1, 0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0])


def test_mcnemar_without_discordant_sentences():
    assert mcnemar([1, 0, 1], [1, 0, 1]) == Significance("exact McNemar", 0, 1)


def test_eleven_sentences_fewer_of_527_need_not_be_significant():
    # The paper's 0.385 and 0.343 are 365 and 354 right. Their overlap is unknown, and the verdict hangs on it.
    a = np.arange(527) < 365
    nested = np.arange(527) < 354
    assert mcnemar(a, nested) == Significance("exact McNemar", -11, pytest.approx(2 / 2**11))
    scattered = (np.arange(527) >= 60) & (np.arange(527) < 414)  # 60 lost, 49 gained
    p = 2 * sum(math.comb(109, k) for k in range(50)) / 2**109
    assert p > 0.3
    assert mcnemar(a, scattered) == Significance("exact McNemar", -11, pytest.approx(p))


def test_bootstrap_interval_is_near_the_t_interval_for_plain_data():
    values = np.random.default_rng(1).normal(0.1, 1, 400)
    interval, expected = bootstrap_interval(values, seed=0), mean_interval(values)
    assert (interval.mean, interval.n) == (pytest.approx(values.mean()), 400)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_interval_of_samples_without_spread():
    assert bootstrap_interval([0.5] * 4, seed=0) == (0.5, 0.5, 0.5, 4)
    assert bootstrap_interval([0.5], seed=0) == pytest.approx((0.5, math.nan, math.nan, 1), nan_ok=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([-2, 0, 2]), min_size=2, max_size=8))
def test_bootstrap_interval_is_finite_and_holds_the_mean(values):
    interval = bootstrap_interval(values, seed=0)
    assert interval.low <= interval.mean <= interval.high


# Errors


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0, [1.0, math.nan], [1.0, math.inf]])
def test_a_sample_must_be_a_list_of_finite_numbers(values):
    for function in (mean_interval, paired_test, lambda sample: bootstrap_interval(sample, seed=0)):
        with pytest.raises(ValueError, match="sample"):
            function(values)


def test_confidence_must_be_a_probability():
    with pytest.raises(ValueError, match="confidence"):
        mean_interval(SEEDS, confidence=95)


def test_mcnemar_needs_the_same_sentences_judged_right_or_wrong():
    with pytest.raises(ValueError, match="same sentences"):
        mcnemar([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="only 0"):
        mcnemar([1, 0], [1, -1])


# Many claims at once, and the correlation of answers with labels


def test_holm_by_hand_and_without_a_test():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([None]) == [None]
    assert holm([]) == []


def test_the_difference_of_mccs_is_scikit_learns_and_its_interval_is_honest():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    weak, strong = (np.where(rng.random(400) < right, labels, 1 - labels) for right in (0.7, 0.9))
    interval = mcc_interval(labels, weak, strong, seed=0)
    assert interval.mean == pytest.approx(matthews_corrcoef(labels, strong) - matthews_corrcoef(labels, weak))
    assert 0 < interval.low < interval.mean < interval.high
    assert mcc_interval(labels, weak, strong, seed=0) == interval
    swapped = mcc_interval(labels, strong, weak, seed=0)
    assert swapped[:3] == pytest.approx((-interval.mean, -interval.high, -interval.low))
    same = mcc_interval(labels, weak, weak, seed=0)
    assert same == (0, 0, 0, 400)


def test_a_constant_answer_has_no_correlation():
    labels = np.array([0, 1] * 50)
    assert mcc_interval(labels, np.ones(100), labels, seed=0)[:3] == pytest.approx((1, 1, 1))


def test_answers_to_other_sentences_are_refused():
    with pytest.raises(ValueError, match="same sentences"):
        mcc_interval([0, 1], [0, 1, 1], [0, 1], seed=0)


# As result files and tables hold them


def test_one_seed_has_no_bounds_in_json_either():
    assert Interval(0.4, math.nan, math.nan, 1).bounds is None
    assert Interval(0.4, 0.3, 0.5, 3).bounds == [0.3, 0.5]
    assert over_seeds([0.5]) == {"mean": 0.5, "ci95": None}
    mean, low, high, _ = mean_interval(SEEDS)
    assert over_seeds(SEEDS) == {"mean": mean, "ci95": [low, high]}


def test_intervals_as_text():
    assert interval_text(None, None) == shown(None) == "-"
    assert interval_text(0.5, None) == shown(over_seeds([0.5])) == "+0.500"
    assert shown({"mean": 0.21, "ci95": [-0.1, 0.52]}, ".0%") == "21% [-10%, 52%]"
    assert interval_text(-0.0171, [-0.02, 0.0]) == "-0.017 [-0.020, +0.000]"
