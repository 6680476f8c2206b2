"""`make verify`'s rule: what it lets pass, what it finds, and how often it is wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nondecoupling.analysis import agreement
from nondecoupling.analysis.claims import CLAIMS
from nondecoupling.analysis.statistics import holm
from nondecoupling.study import folders
from nondecoupling.study.plan import STATES
from nondecoupling.study.results import read_results
from nondecoupling.study.study import load_study
from tables import MEASURED, metrics_of, results_of

NANO = load_study("nano")
MANY, FEW = 20, 5  # replications of a reference and of make reproduce
# Studies that were run on purpose: beta doubled (five replications), half of the SFT steps (ten, because five do not
# tell a change of two standard deviations apart from chance), and the unchanged study with torch's kernels for
# processors without AVX2, and for those without AVX-512 (five each).
POWER = Path(__file__).parent / "power"
EXPECTED = {"beta": "FAIL", "steps": "FAIL", "default": "PASS", "avx2": "PASS"}


def replications(rng, seeds, quantities=21, shift=0.0, wild=0.0):
    """A table of normal draws, each quantity with a spread of its own; q0 is shifted, and wild in the last seed."""
    spread = 0.005 * 1.2 ** (np.arange(quantities) % 21)
    values = rng.normal(size=(len(seeds), quantities))
    values[:, 0] += shift
    values[-1, 0] += wild
    table = pd.DataFrame(0.5 + spread * values, index=list(seeds), columns=[f"q{n}" for n in range(quantities)])
    return table.rename_axis("seed").reset_index().melt("seed", var_name="quantity")


def results_by(changes=None, seeds=(0, 1, 2)):
    """`tables.MEASURED` and a control, the metrics of some runs replaced."""
    runs = MEASURED | {"sft-sft": {"sft_loss": [0.43, 0.44, 0.42], "reward_exact": [0.5, 0.51, 0.52]}}
    runs = {run: metrics | (changes or {}).get(run, {}) for run, metrics in runs.items()}
    return results_of(NANO, metrics=metrics_of(runs, seeds), seeds=seeds)


def compared(changes=None, seeds=(0, 1, 2)):
    """`agreement.compare` of such results with the unchanged ones of seeds 0, 1, 2, by quantity."""
    sides = results_by(changes, seeds), results_by()
    return agreement.compare(*map(agreement.quantities, sides)).set_index("quantity")


# The quantities


def test_quantities_are_the_policies_metrics_and_the_claims_differences():
    table = agreement.quantities(results_by())
    assert list(table) == ["quantity", "seed", "value"]
    by_name = table.pivot(index="seed", columns="quantity", values="value")
    expected = [f"{run}: {metric}" for run in STATES for metric in ("sft_loss", "reward_exact", "reward_greedy")]
    expected += [
        "sft-sft: sft_loss",
        "sft-sft: reward_exact",
        *[f"{claim.id} {claim.quantity}" for claim in CLAIMS[:6]],
    ]  # O2 and O3 need more
    assert list(table["quantity"].unique()) == expected
    assert len(table) == 3 * len(expected)
    assert by_name["rl: sft_loss"].tolist() == MEASURED["rl"]["sft_loss"]
    assert by_name["A1 sft_loss: sft-rl - sft"].tolist() == pytest.approx([0.15, 0.17, 0.13])


# One row


def test_the_same_seeds_are_told_apart_by_how_alike_they_are():
    losses = np.array(MEASURED["rl"]["sft_loss"])
    rows = compared({"rl": {"sft_loss": losses + [0, 0, 9e-4]}, "sft": {"sft_loss": [0.40, 0.42, 0.412]}})
    assert rows.loc["rl: sft_loss", "result"] == "to 1e-3"
    assert rows.loc["sft: sft_loss", "result"] == "statistically"
    assert rows.loc["rl-sft: sft_loss", "result"] == "bit-identical"
    assert rows["p"].notna().sum() == 2  # of SFT's loss, and of A1, which is a difference to it


def test_other_seeds_are_compared_statistically_only():
    rows = compared(seeds=(0, 1, 7))
    varying = rows["deviation"].notna()
    assert set(rows.loc[varying, "result"]) == {"statistically"}
    assert set(rows.loc[~varying, "result"]) == {"bit-identical"}  # what never varies is the same for any seed


@pytest.mark.parametrize(
    ("values", "result"),
    [([0.60] * 3, "bit-identical"), ([0.6009] * 3, "to 1e-3"), ([0.6011] * 3, "FAIL"), ([0.6, 0.6, 0.61], "FAIL")],
)
@pytest.mark.parametrize("seeds", [(0, 1, 2), (5, 6, 7)])
def test_what_never_varies_must_be_the_same(values, result, seeds):
    row = compared({"base": {"sft_loss": values}}, seeds).loc["base: sft_loss"]
    assert row["result"] == result
    assert np.isnan(row["deviation"])


def test_deviations_are_in_standard_deviations_of_one_replication():
    losses = np.array(MEASURED["rl"]["sft_loss"])  # of standard deviation 0.05
    row = compared({"rl": {"sft_loss": losses + [0.1, 0.1, 0.4]}}).loc["rl: sft_loss"]
    assert row["deviation"] == pytest.approx(0.2 / 0.05)
    assert row["farthest"] == pytest.approx(0.4 / 0.05)
    assert (row["fresh"], row["reference"]) == (pytest.approx(0.95), pytest.approx(0.75))


def test_a_value_that_is_no_number_never_passes():
    with pytest.raises(ValueError, match="nan or infinity"):
        compared({"rl": {"sft_loss": [np.nan, 0.8, 0.75]}})


def test_a_reference_of_one_replication_has_nothing_to_say():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="1 known draw without spread"):
        agreement.compare(replications(rng, [1, 2]), replications(rng, [0]))


# How often it is wrong, and what it finds


@pytest.mark.parametrize("seeds", [1, FEW])
def test_of_studies_that_are_alike_one_in_a_hundred_fails(seeds, monkeypatch):
    """500 studies of five quantities; Holm's correction lets one fail where five times the least p is below 1 %.

    14 or more studies would have a probability of 0.1 %. Of single quantities 5 % have a p below 0.05.
    """
    monkeypatch.setattr(agreement, "holm", lambda p_values: p_values)
    rng = np.random.default_rng(7)
    fresh, known = (replications(rng, of, 2500) for of in (range(MANY, MANY + seeds), range(MANY)))
    p = agreement.compare(fresh, known)["p"].to_numpy().reshape(500, 5)
    assert 1 <= (5 * p.min(axis=1) < agreement.FAMILYWISE).sum() <= 13
    assert agreement.FAMILYWISE == 0.01
    assert 0.03 <= (p < 0.05).mean() <= 0.06


def failures_of(seeds, **changes):
    """In how many of ten studies, of which q0 was changed, that and nothing else fails."""
    rng, found = np.random.default_rng(7), 0
    for _ in range(10):
        fresh = replications(rng, range(MANY, MANY + seeds), **changes)
        table = agreement.compare(fresh, replications(rng, range(MANY)))
        found += table.loc[table["result"] == "FAIL", "quantity"].tolist() == ["q0"]
    return found


@pytest.mark.parametrize(("seeds", "shift"), [(FEW, 4.0), (1, 8.0)])
def test_a_shift_of_one_quantity_fails(seeds, shift):
    assert failures_of(seeds) == 0
    assert failures_of(seeds, shift=shift) >= 9


def test_one_replication_that_went_astray_fails():
    """The t-test of the means alone cannot see it, however far it is."""
    assert failures_of(FEW, wild=15.0) >= 9


@pytest.mark.parametrize("name", EXPECTED)
def test_real_studies_are_told_apart(name):
    metrics = pd.read_csv(POWER / name / "metrics.csv")
    fresh = results_of(NANO, metrics=metrics, seeds=sorted(metrics["seed"].unique()))
    sides = fresh, read_results(NANO, folders.reference_folder(NANO))
    table = agreement.compare(*map(agreement.quantities, sides))
    assert ("FAIL" if (table["result"] == "FAIL").any() else "PASS") == EXPECTED[name], table.to_string()


# What is printed


def printed(table, replications=3):
    text = agreement.comparison_text(table.reset_index(), replications, 3)
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_it_passes_in_words():
    text = printed(compared({"rl": {"sft_loss": [0.7, 0.8, 0.7501]}}))
    assert " ".join(text.partition("\n\n")[0].split()) == (
        "PASS: 23 quantities of 3 replications could come from the reference's 3: 22 bit-identical, 1 the same to 1e-3 "
        "(at 1% over all of them)."
    )
    assert len(text.partition("\n\n")[2].splitlines()) == 1 + 23


def test_failures_come_first_and_in_words():
    text = printed(compared({"rl": {"sft_loss": [3.7, 3.8, 3.75]}, "base": {"reward_greedy": [0.4] * 3}}))
    said = [" ".join(part.split()) for part in text.partition("\n\n")[0].split("\n* ")]
    assert said[0].startswith("FAIL: 2 of 23 quantities of 3 replications could not come from the reference's 3; of ")
    assert said[1] == (
        "base: reward_greedy is +0.400 here and +0.300 in the reference, where it is the same in all replications."
    )
    assert said[2].startswith(
        "rl: sft_loss is +3.750 here and +0.750 in the reference, 60.0 standard deviations of one replication above "
        "it, the farthest one 61.0 (p = "
    )


def test_every_planned_run_fits_into_the_table():
    planned = [run.name for run in NANO.runs if run.stage not in ("data", "reward_model", "gradients")]
    found = results_of(NANO, metrics=metrics_of(dict.fromkeys(planned, {"sft_loss": [10.123, 10.2, 10.3]})))
    text = printed(agreement.compare(agreement.quantities(found), agreement.quantities(found)))
    assert all(f"\n{run}: sft_loss " in text for run in planned)


def test_runs_that_one_side_lacks_are_counted():
    more = results_of(NANO, metrics=metrics_of(dict.fromkeys([*STATES, "sft-sft", "sft-rl-b1", "sft-rl-b2"], {})))
    assert agreement.not_compared(results_by(), more) == "Runs of the reference that are not here: 2 (make betas)."
    assert agreement.not_compared(more, results_by()) == "Not in the reference: 2."
    assert agreement.not_compared(more, more) == ""


def test_holms_correction_is_over_what_is_tested():
    rows = compared({"rl": {"sft_loss": [0.71, 0.84, 0.75]}, "sft-sft": {"sft_loss": [0.47, 0.46, 0.48]}})
    tested = rows["p"].dropna()
    assert sorted(tested.index) == ["rl: sft_loss", "sft-sft: sft_loss"]
    alone = compared({"sft-sft": {"sft_loss": [0.47, 0.46, 0.48]}})["p"].dropna()
    assert tested["sft-sft: sft_loss"] == holm([alone.item(), 1.0])[0]
