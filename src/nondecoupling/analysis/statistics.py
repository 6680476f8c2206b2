"""Intervals and tests: over the seeds of a study, and over the sentences of one run."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from nondecoupling.study.contracts import OverSeeds

CONFIDENCE = 0.95

# Differences between equal results are rounding: metrics are of order one and double precision.
ROUNDING = 1e-12


class Interval(NamedTuple):
    """An estimate, its confidence bounds in the same unit (nan where there is no bound), and the sample size."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def bounds(self) -> list[float] | None:
        """[low, high] as JSON can hold it: None where there is no bound."""
        return None if np.isnan(self.low) else [self.low, self.high]


class Significance(NamedTuple):
    """A test by name, its statistic and its p-value (both nan where the sample allows no test)."""

    name: str
    statistic: float
    p_value: float


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean over seeds with Student's t interval, from values of shape (n,). A single value has nan bounds.

    Raises ValueError if there is no value, one is not finite, or confidence is not between 0 and 1.
    """
    sample = _sample(values)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1.")
    mean, n = float(sample.mean()), len(sample)
    if n < 2:
        return Interval(mean, np.nan, np.nan, n)
    half = float(stats.sem(sample) * stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(mean, mean - half, mean + half, n)


def over_seeds(values: ArrayLike) -> OverSeeds:
    """Mean over seeds and its 95 % t interval, as JSON can hold them."""
    interval = mean_interval(values)
    return {"mean": interval.mean, "ci95": interval.bounds}


def paired_test(differences: ArrayLike) -> Significance:
    """Two-sided paired t-test that the mean difference over seeds is 0, from differences of shape (n,).

    One difference allows no test: nan. Differences all equal up to rounding show no spread, so that t would be
    infinite and p zero whatever n is; the exact sign test is reported instead, p = 2^(1-n), or 1 if all are 0, with
    the number of positive differences as its statistic. Raises ValueError if there is none or one is not finite.
    """
    sample = _sample(differences)
    if len(sample) < 2:
        return Significance("paired t", np.nan, np.nan)
    if _all_equal(sample):
        positive, negative = int((sample > ROUNDING).sum()), int((sample < -ROUNDING).sum())
        return Significance("exact sign", float(positive), _fair_coin_p(positive, negative))
    result = stats.ttest_1samp(sample, 0.0)
    return Significance("paired t", float(result.statistic), float(result.pvalue))


def equivalence_test(differences: ArrayLike, margin: float) -> Significance:
    """Two one-sided t-tests (TOST) that the mean difference over seeds lies within +-``margin``, differences (n,).

    The p-value is the larger of the two, with its t as the statistic: below 0.05 exactly where the 90 % interval of
    `mean_interval` lies within the margin. A mean beyond the margin has p above 0.5, and 1 - p is the p-value that it
    does lie beyond. One difference allows no test; differences all equal up to rounding are judged by two exact sign
    tests, as in `paired_test`. Raises ValueError if there is none, one is not finite or the margin is not positive.
    """
    sample = _sample(differences)
    if not margin > 0:
        raise ValueError(f"margin = {margin} must be positive.")
    if len(sample) < 2:
        return Significance("TOST", np.nan, np.nan)
    if _all_equal(sample):
        p = 0.5 ** len(sample)
        return Significance("exact sign", np.nan, p if abs(sample.mean()) < margin else 1 - p)
    p_value, *sides = DescrStatsW(sample).ttost_mean(-margin, margin)
    statistic, *_ = max(sides, key=lambda side: side[1])
    return Significance("TOST", float(statistic), float(p_value))


def further_draws_test(fresh: ArrayLike, known: ArrayLike, changes: ArrayLike | None = None) -> Significance:
    """Two-sided test that ``fresh``, of shape (k,), are further draws of what ``known`` are, of shape (n,) with n > 1.

    That is the pooled two-sample t-test of the means; for k = 1 the spread is that of ``known``. Several are also
    judged one by one, each against ``known`` alone: a single far one brings its own spread into the pool and can hide
    in it (t of one among five stays below 2.2 however far it is). Where each fresh draw has a partner among the known
    ones, with which it shares what it is drawn from, ``changes`` (k,) are fresh minus partner, and a paired t-test asks
    whether their mean is zero: what partners share does not hide a small change. p is the smallest of the tests' p
    (of the farthest draw after Bonferroni's correction for k) times their number. Raises ValueError if ``known`` has
    one value or no spread, or one is not finite.
    """
    new, old = _sample(fresh), _sample(known)
    if len(old) < 2 or _all_equal(old):
        raise ValueError(f"{len(old)} known draw{'s' * (len(old) > 1)} without spread say nothing about further ones.")
    of_known = old.mean(), old.std(ddof=1), len(old)
    own_spread = new.std(ddof=1) if len(new) > 1 else 0.0
    means = stats.ttest_ind_from_stats(new.mean(), own_spread, len(new), *of_known)
    found = [float(means.pvalue)]
    if len(new) > 1:
        farthest = stats.ttest_ind_from_stats(new, 0.0, 1, *of_known).pvalue.min()
        found.append(len(new) * float(farthest))
        if changes is not None:
            found.append(paired_test(changes).p_value)
    return Significance("pooled t", float(means.statistic), min(1.0, len(found) * min(found)))


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> Significance:
    """McNemar's exact two-sided test that a and b are right equally often, from 0/1 or bool arrays of shape (n,).

    The statistic is how many sentences more b gets right. Without any sentence that only one gets right, p is 1.
    Raises ValueError if the arrays are empty, differ in shape or hold anything but 0 and 1.
    """
    a, b = _sample(correct_a), _sample(correct_b)
    if a.shape != b.shape:
        raise ValueError(f"correct_a has {len(a)} sentences and correct_b {len(b)}; they must be the same sentences.")
    if not np.isin([a, b], [0, 1]).all():
        raise ValueError("correct_a and correct_b must hold only 0 (wrong) and 1 (right).")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return Significance("exact McNemar", float(only_b - only_a), _fair_coin_p(only_a, only_b))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's correction for testing all of ``p_values`` at once; None (no test was possible) stays None."""
    tested = [p for p in p_values if p is not None]
    corrected = iter(multipletests(tested, method="holm")[1].tolist() if tested else [])
    return [None if p is None else next(corrected) for p in p_values]


def mcc_interval(labels: ArrayLike, before: ArrayLike, after: ArrayLike, seed: int) -> Interval:
    """Difference of the Matthews correlations of ``after`` and ``before`` with the labels, by paired bootstrap.

    All three are arrays of labels, shape (n,), over the same sentences; the interval is the 95 % percentile interval.
    An answer that never varies has correlation 0. Raises ValueError if the shapes differ or a sample is empty.
    """
    truth, a, b = (_sample(values) for values in (labels, before, after))
    if not len(truth) == len(a) == len(b):
        raise ValueError(f"{len(truth)} labels, {len(a)} and {len(b)} answers: they must be of the same sentences.")

    kinds = np.unique([truth, a, b])

    def covariance(x, y, axis):  # of the labels' indicators, all labels together
        by_chance = sum((x == kind).mean(axis) * (y == kind).mean(axis) for kind in kinds)
        return (x == y).mean(axis) - by_chance

    def difference(truth, a, b, axis=-1):
        with np.errstate(invalid="ignore", divide="ignore"):  # constant answers: their correlation is defined as 0
            before, after = (
                np.nan_to_num(
                    covariance(truth, x, axis) / np.sqrt(covariance(truth, truth, axis) * covariance(x, x, axis))
                )
                for x in (a, b)
            )
        return after - before

    rng = np.random.default_rng(seed)
    result = stats.bootstrap(
        (truth, a, b), difference, n_resamples=999, paired=True, vectorized=True, batch=100, method="percentile",
        confidence_level=CONFIDENCE, rng=rng,
    )  # fmt: skip
    low, high = result.confidence_interval
    return Interval(float(difference(truth, a, b)), float(low), float(high), len(truth))


def bootstrap_interval(differences: ArrayLike, seed: int) -> Interval:
    """Mean paired difference over sentences with its 95% BCa bootstrap interval, from differences of shape (n,).

    A single difference has nan bounds; differences all equal up to rounding have the mean as both bounds. The same
    seed gives the same interval. Raises ValueError if there is no difference or one is not finite.
    """
    sample = _sample(differences)
    mean, n = float(sample.mean()), len(sample)
    if n < 2:
        return Interval(mean, np.nan, np.nan, n)
    if _all_equal(sample):  # BCa divides by the spread
        return Interval(mean, mean, mean, n)
    # In batches: all resamples of a thousand sentences at once would take hundreds of megabytes.
    rng = np.random.default_rng(seed)
    result = stats.bootstrap((sample,), np.mean, n_resamples=9999, batch=500, confidence_level=CONFIDENCE, rng=rng)
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), n)


def _sample(values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"A sample must be a non-empty list of numbers, not an array of shape {sample.shape}.")
    if not np.isfinite(sample).all():
        raise ValueError("A sample must not contain nan or infinity.")
    return sample


def _all_equal(sample: NDArray[np.float64]) -> bool:
    return bool(np.ptp(sample) <= ROUNDING)


def _fair_coin_p(heads: int, tails: int) -> float:
    """Exact two-sided p-value of a fair coin; no toss is no evidence."""
    if heads + tails == 0:
        return 1.0
    return float(stats.binomtest(heads, heads + tails, 0.5).pvalue)
