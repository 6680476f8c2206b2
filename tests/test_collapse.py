"""What a reader must be told about a policy."""

import pandas as pd
import pytest

from nondecoupling.analysis.collapse import is_collapsed, is_failed_judge, warnings_about

SOUND = {
    "n": 1000,
    "predicted_acceptable_rate": 0.7,
    "mcc": 0.4,
    "reward_greedy": 0.5,
    "majority_reward": 0.385,
    "label_mass": 0.99,
}


def test_of_a_sound_policy_nothing_is_remarkable():
    assert warnings_about(SOUND) == ["nothing remarkable: the policy has not collapsed and keeps to the format"]


@pytest.mark.parametrize(("rate", "answer"), [(1.0, "'acceptable'"), (0.0, "'unacceptable'")])
def test_a_collapse_is_named_with_the_answer_and_the_majority_line(rate, answer):
    (warning,) = warnings_about(SOUND | {"predicted_acceptable_rate": rate, "mcc": 0.0, "reward_greedy": 0.385})
    assert warning.startswith("COLLAPSED")
    for word in (answer, "MCC 0.000", "0.385"):
        assert word in warning


def test_a_policy_that_leaves_the_format_is_named():
    (warning,) = warnings_about(SOUND | {"label_mass": 0.31})
    assert warning.startswith("FORMAT: only 31.0%")


def test_a_policy_may_have_both_faults():
    fallen = SOUND | {"predicted_acceptable_rate": 1.0, "mcc": 0.0, "label_mass": 0.89}
    assert [warning.partition(":")[0] for warning in warnings_about(fallen)] == ["COLLAPSED", "FORMAT"]


@pytest.mark.parametrize(
    ("rate", "mcc", "collapsed"),
    [
        (1.0, 0.0, True),
        (0.0, 0.0, True),
        (0.98, 0.063, True),  # two standard errors of 1,000 sentences are 0.0632
        (0.02, -0.063, True),
        (0.979, 0.0, False),
        (0.021, 0.0, False),
        (0.99, 0.064, False),
        (0.99, -0.064, False),
        (0.5, 0.0, False),
    ],
)
def test_collapse_is_one_answer_without_correlation(rate, mcc, collapsed):
    table = pd.DataFrame({"n": [1000], "predicted_acceptable_rate": [rate], "mcc": [mcc]})
    assert is_collapsed(table).tolist() == [collapsed]


@pytest.mark.parametrize(("accuracy", "failed"), [(0.4, True), (0.685, True), (0.714, True), (0.715, False)])
def test_a_judge_no_better_than_the_majority_label_has_failed(accuracy, failed):
    # majority label: 0.685 of 1,000 pairs, and two standard errors are 2 sqrt(0.685 * 0.315 / 1000) = 0.0294
    table = pd.DataFrame({"n": [1000], "majority_reward": [0.37], "accuracy": [accuracy]})
    assert is_failed_judge(table).tolist() == [failed]
