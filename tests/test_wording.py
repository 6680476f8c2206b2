"""What tables say to readers."""

import re

import numpy as np
import pandas as pd

from nondecoupling.analysis import wording


def test_a_table_has_words_whole_counts_and_no_nan():
    table = pd.DataFrame({"n": [1000.0, 12000.0], "sft_loss": [0.50349, np.nan], "a": ["long sentence", None]})
    page = wording.for_reading(table, "shown").hide().to_html()
    for text in (">sentences<", ">SFT loss<", ">1,000<", ">12,000<", ">0.503<", ">–<"):
        assert text in page
    assert "nan" not in page.lower().replace("none", "")
    assert "sft_loss" not in page
    left = re.findall(r"#T_shown +(\S+) {\s+text-align: left", page)
    assert left == ["th.row_heading", ".col2"]  # numbers stay where digits are one below the other


def test_rows_are_in_words_too_and_pages_with_several_tables_keep_them_apart():
    policies = pd.DataFrame({"base": [0.5, "no"]}, index=["reward_exact", "collapsed"])
    one, two = (wording.for_reading(policies, name).to_html() for name in ("one", "two"))
    assert ">reward, sampled<" in one
    assert "#T_one" in one
    assert "#T_two" in two


def test_a_cost_is_told_in_units():
    training = {"steps": 1200, "wall_seconds": 13.55, "evaluation_seconds": 3.64, "samples_per_second": 1652.4}
    training |= {"peak_memory_bytes": 3 * 2**29, "trained_parameters": 40960, "parameters": 227456}
    told = wording.cost_of_training(training)["training"]
    assert told["peak memory"] == "1.50 GiB"
    assert told["trained parameters"] == "40,960 of 227,456"
    assert told["steps"] == "1,200"
    assert len(told) == 5
    silent = wording.cost_of_training(training | {"silent_group_share": 0.7988})["training"]
    assert silent["groups whose answers earned all the same"] == "80%"
