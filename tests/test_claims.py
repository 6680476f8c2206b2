"""The rule of the verdicts, on intervals and metrics made by hand and against scipy's paired t-test."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import logit

from nondecoupling.analysis import claims
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import Interval, mcnemar
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.study import load_study
from tables import MEASURED, is_a, metrics_of, odds_of, policy, results_of

NAN = math.nan
STUDY = load_study("nano")
SEEDS = [0, 3, 7]
LABELS = [1, 0]
LOSS, REWARD, GREEDY = (
    {run: MEASURED[run][name] for run in MEASURED} for name in ("sft_loss", "reward_exact", "reward_greedy")
)


def measured(changes=None):
    """Final metrics of three seeds, sampled rewards a little above the expected ones, some of them changed."""
    runs = {run: given | {"reward_sampled": np.add(given["reward_exact"], 0.01)} for run, given in MEASURED.items()}
    return metrics_of({run: given | (changes or {}).get(run, {}) for run, given in runs.items()}, SEEDS)


def results(metrics, seeds=SEEDS):
    """The results that `judge_claims` reads: metrics, and the answers from which it predicts."""
    answers = [policy("base", 0.0, LABELS, seeds), policy("sft", odds_of(0.9, LABELS), LABELS, seeds)]
    return results_of(STUDY, answers, metrics, seeds=seeds)


def judge(metrics):
    return {row["id"]: row for row in claims.judge_claims(results(metrics))}


# The rule


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.1, 0.3, +1, "reproduced"),
        (0.1, 0.3, -1, "not reproduced"),
        (-0.3, -0.1, -1, "reproduced"),
        (-0.3, -0.1, +1, "not reproduced"),
        (-0.1, 0.3, +1, "inconclusive"),
        (-0.1, 0.3, -1, "inconclusive"),
        (0.0, 0.3, +1, "inconclusive"),
        (-0.3, 0.0, -1, "inconclusive"),
        (0.0, 0.0, +1, "inconclusive"),
        (NAN, NAN, +1, "inconclusive"),
        (NAN, NAN, -1, "inconclusive"),
        (1e-9, 2e-9, +1, "reproduced"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_claimed_side(low, high, sign, verdict):
    assert claims.verdict_of(low, high, sign) == verdict


def test_claims_are_named_once_and_speak_of_planned_runs():
    ids = [claim.id for claim in claims.CLAIMS]
    assert len(ids) == len(set(ids))
    planned = {run.name for run in STUDY.runs_of("main")}
    for claim in claims.CLAIMS:
        assert {claim.before, claim.after} <= planned
        assert claim.metric in measured()
        assert claim.sign in (-1, 1)
    signs = {claim.id: (claim.metric, claim.after, claim.before, claim.sign) for claim in claims.CLAIMS}
    assert signs["A1"] == ("sft_loss", "sft-rl", "sft", +1)  # RL after SFT raises the loss,
    assert signs["B1"] == ("reward_sampled", "rl-sft", "rl", -1)  # SFT after RL lowers the reward; not the reverse


# Three seeds


@pytest.mark.parametrize(
    ("claim", "after", "before", "verdict"),
    [
        ("A1", LOSS["sft-rl"], LOSS["sft"], "reproduced"),
        ("A2", LOSS["sft-rl"], LOSS["base"], "inconclusive"),
        ("B1", REWARD["rl-sft"], REWARD["rl"], "inconclusive"),  # its interval alone would do, Holm's p does not
        ("B2", REWARD["rl-sft"], REWARD["rl"], "inconclusive"),
        ("B3", GREEDY["rl-sft"], GREEDY["rl"], "not reproduced"),
        ("O1", REWARD["sft-rl"], REWARD["sft"], "inconclusive"),
    ],
)
def test_each_claim_agrees_with_scipys_paired_t_test(claim, after, before, verdict):
    row = judge(measured())[claim]
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert row["estimate"] == pytest.approx(np.mean(after) - np.mean(before))
    assert row["ci95"] == pytest.approx([interval.low, interval.high])
    assert row["p_value"] == pytest.approx(expected.pvalue)
    assert (row["seeds"], row["test"]) == (3, "paired t")
    assert row["verdict"] == verdict


def test_a_verdict_that_does_not_survive_holms_correction_is_withdrawn():
    rows = judge(measured())
    assert rows["B2"]["ci95"][1] < 0
    assert rows["B2"]["p_value"] < 0.05 <= rows["B2"]["p_holm"]
    p = [row["p_value"] for row in rows.values()]
    assert min(row["p_holm"] for row in rows.values()) == pytest.approx(len(p) * min(p))
    (alone,) = claims.judged_rows(measured(), [claim for claim in claims.CLAIMS if claim.id == "B2"], {}, {})
    assert alone["verdict"] == "reproduced"
    assert claims.corrected_family([alone])[0]["p_holm"] == rows["B2"]["p_value"]
    assert alone["verdict"] == "reproduced"  # one test needs no correction


def test_an_interval_by_hand():
    row = judge(measured())["A1"]
    half = 4.302652729911275 * 0.02 / math.sqrt(3)  # t at 97.5 % with two degrees of freedom; deviation 0.02
    assert np.std([0.15, 0.17, 0.13], ddof=1) == pytest.approx(0.02)
    assert row["estimate"] == pytest.approx(0.15)
    assert row["ci95"] == pytest.approx([0.15 - half, 0.15 + half])


def test_seeds_are_paired_whatever_the_order_of_the_rows():
    assert judge(measured().sample(frac=1, random_state=0)) == judge(measured())


def test_rows_say_what_the_contract_asks_for():
    rows = claims.judge_claims(results(measured()))
    assert is_a(list[ClaimRow], rows)
    assert [row["id"] for row in rows] == [claim.id for claim in claims.CLAIMS]
    assert {row["note"] for row in rows} == {""}
    assert rows[0]["quantity"] == "sft_loss: sft-rl - sft"
    # what a perfect learner does is known of the generated corpus, what the policies predict of any
    assert all(row["predicted"] is not None and row["predicted_from_policies"] is not None for row in rows)
    assert (rows[4]["predicted"], rows[4]["predicted_from_policies"]) == (0, pytest.approx(-0.01))


def test_one_seed_decides_nothing():
    metrics = measured()
    rows = claims.judge_claims(results(metrics[metrics["seed"] == 3], [3]))
    for row in rows:
        assert (row["ci95"], row["p_value"], row["seeds"], row["verdict"]) == (None, None, 1, "inconclusive")
    assert rows[0]["estimate"] == pytest.approx(0.17)
    assert is_a(list[ClaimRow], rows)


def test_a_collapse_is_noted_with_its_run_and_seeds():
    rows = judge(measured({"rl": {"predicted_acceptable_rate": [0.7, 1, 1], "mcc": [0.6, 0, 0]}}))
    for claim in ("B1", "B2", "B3"):
        assert rows[claim]["note"] == "collapsed: rl 2/3"
    assert rows["A1"]["note"] == ""


# The theory's own statements


@pytest.mark.parametrize(
    ("low", "high", "predicted", "verdict"),
    [
        (-0.01, 0.01, 0.2, "reproduced"),
        (-0.05, 0.05, 0.2, "reproduced"),  # exactly a quarter
        (-0.05, 0.05, -0.2, "reproduced"),
        (-0.06, 0.05, 0.2, "inconclusive"),
        (-0.2, -0.06, 0.2, "not reproduced"),
        (0.06, 0.2, 0.2, "not reproduced"),
        (0.04, 0.2, 0.2, "inconclusive"),
        (-0.01, 0.01, 0.0, "reproduced"),  # at least 0.01
        (-0.02, 0.01, 0.0, "inconclusive"),
        (NAN, NAN, 0.2, "inconclusive"),
    ],
)
def test_an_amount_is_judged_by_the_interval_of_its_gap(low, high, predicted, verdict):
    assert claims.verdict_of_amount(Interval(0.0, low, high, 3), predicted) == verdict


def over_seeds(mean, half, seeds=3):
    return {"mean": mean, "ci95": [mean - half, mean + half] if seeds > 1 else None}


def theory_content(rise=0.2, seeds=3, greedy_share=1.1, **changes):
    """What `judge_theory` reads of a theory.json in which RL raises loss and reward as predicted, by 0.2 and 0.1."""
    noise = [0.001 * (seed - 1) for seed in range(seeds)]
    records = [
        {
            "run": "sft-rl",
            "seed": seed,
            "start": {"loss": 0.4, "reward": 0.5},
            "self_tilted": {"loss": 0.6, "reward": 0.6},
            "measured": {"loss": 0.4 + rise + noise[seed], "reward": 0.6 + noise[seed]},
        }
        for seed in range(seeds)
    ]
    shares = {"greedy": over_seeds(greedy_share, 0.05, seeds)}
    decoded = {"shares": shares, "gain_of_greedy_reward": over_seeds(0.0, 0.001, seeds)}
    return {
        "identity_gaps": {"theorem": 1e-15},
        "runs": records,
        "beta": 0.5,
        "sweep": None,
        "test_time": decoded,
    } | changes


def theory_rows(content, kl=0.5, fall=0.1, seeds=3):
    rl = {"reward_exact": 0.6}
    metrics = metrics_of({"rl": rl, "rl-sft": {"reward_exact": 0.6 - fall, "kl_to_parent": kl}}, range(seeds))
    return claims.judge_theory(results_of(STUDY, metrics=metrics, seeds=range(seeds)), content)


def theory_verdicts(content, **more):
    return {row["id"]: row["verdict"] for row in theory_rows(content, **more) if row["verdict"] != "not run"}


def test_theory_that_holds_is_reproduced():
    rows = theory_rows(theory_content())
    assert is_a(list[ClaimRow], rows)
    assert theory_verdicts(theory_content()) == dict.fromkeys(("T1", "T2", "T3", "T5", "T6", "T7"), "reproduced")
    by_id = {row["id"]: row for row in rows}
    assert (by_id["T2"]["estimate"], by_id["T2"]["predicted_from_policies"]) == pytest.approx((0.2, 0.2))
    assert (by_id["T3"]["estimate"], by_id["T3"]["predicted_from_policies"]) == pytest.approx((0.1, 0.1))
    assert (by_id["T7"]["estimate"], by_id["T7"]["predicted"]) == (0, 0)
    assert by_id["T5"]["estimate"] == pytest.approx(0.1 / 1)  # 2 sqrt(0.5 / 2) = 1


def test_each_statement_can_fail():
    assert theory_verdicts(theory_content(identity_gaps={"theorem": 1e-3}))["T1"] == "not reproduced"
    assert theory_verdicts(theory_content(rise=0.3))["T2"] == "not reproduced"
    for record in (content := theory_content())["runs"]:
        record["measured"]["reward"] += 0.05
    assert theory_verdicts(content)["T3"] == "not reproduced"
    # KL = 0.005 allows a change of 2 sqrt(0.0025) = 0.1
    assert theory_verdicts(theory_content(), kl=0.005, fall=0.099)["T5"] == "reproduced"
    assert theory_verdicts(theory_content(), kl=0.005, fall=0.101)["T5"] == "not reproduced"
    assert theory_verdicts(theory_content(greedy_share=0.9))["T6"] == "not reproduced"
    assert theory_verdicts(theory_content(greedy_share=1.04))["T6"] == "inconclusive"
    content = theory_content()
    content["test_time"]["gain_of_greedy_reward"] = over_seeds(0.05, 0.01)
    assert theory_verdicts(content)["T7"] == "not reproduced"
    content["test_time"]["shares"] = {}
    assert "T6" not in theory_verdicts(content)  # nothing gained, nothing to share


def test_a_violation_that_is_no_number_is_a_violation():
    gaps = {"theorem": 1e-15, "sign rule": NAN}
    assert theory_rows(theory_content(identity_gaps=gaps))[0]["verdict"] == "not reproduced"


def test_rl_that_pays_nothing_for_kl_has_no_amount_to_reproduce():
    study = load_study("nano", overrides={"rl.beta": 0.0})
    found = results(measured())._replace(study=study)
    rows = claims.judge_claims(found)
    assert {row["id"]: row["predicted"] for row in rows} == dict.fromkeys(("A1", "A2", "B1", "B2", "B3", "O1"))
    assert [row["id"] for row in rows if row["predicted_from_policies"] is None] == ["A1", "A2", "O1"]
    content = theory_content(beta=0.0, runs=[record | {"self_tilted": None} for record in theory_content()["runs"]])
    assert not {"T2", "T3"} & set(theory_verdicts(content))


def test_one_seed_settles_no_amount():
    verdicts = theory_verdicts(theory_content(seeds=1), seeds=1)
    assert [verdicts[name] for name in ("T2", "T3", "T6", "T7")] == ["inconclusive"] * 4


def sweep_entry(run, **changes):
    change = {"measured": over_seeds(0.1, 0.01), "own_belief": 0.5, "gap_to_own_belief": over_seeds(-0.4, 0.01)}
    return {"run": run, "seeds": [0, 1, 2], "settled": False, "change_of_loss": change} | changes


def test_the_sweep_is_judged_beta_by_beta_and_says_what_had_not_settled():
    names = ["sft-rl-b0.1", "sft-rl-b0.1-half", "sft-rl-b1-group", "sft-rl-b0.25-32answers"]
    fits = sweep_entry("x")["change_of_loss"] | {"gap_to_own_belief": over_seeds(0.01, 0.01)}
    entries = [sweep_entry(name) for name in names]
    entries += [sweep_entry("sft-rl-b5", settled=True), sweep_entry("sft-rl-b1", settled=None, change_of_loss=fits)]
    rows = [row for row in theory_rows(theory_content(sweep=entries)) if row["id"].startswith("T4")]
    assert is_a(list[ClaimRow], rows)
    judged = {row["id"]: (row["verdict"], row["note"]) for row in rows if row["verdict"] != "not run"}
    assert judged == {
        "T4-b5": ("not reproduced", ""),
        "T4-b1": ("reproduced", "whether training had settled is unknown"),
        "T4-b0.1": ("not reproduced", "training had not settled"),
    }


@pytest.mark.parametrize("sweep", [None, []])
def test_a_sweep_that_was_not_run_has_a_row_for_each_beta_of_the_plan_and_no_number(sweep):
    study = load_study("nano", overrides={"sweep.betas": [0.25, 2.0, 1.0], "rl.steps": 100})
    rows = list(claims.sweep_rows(results_of(study), {"sweep": sweep}))
    assert is_a(list[ClaimRow], rows)
    assert [row["id"] for row in rows] == ["T4-b0.25", "T4-b2", "T4-b1"]
    assert rows[0]["statement"] == "T2 at beta = 0.25, in 200 steps"
    for row in rows:
        assert (row["verdict"], row["note"], row["seeds"], row["test"]) == ("not run", "make betas", 0, "-")
        assert {row[name] for name in ("estimate", "ci95", "predicted_from_policies", "p_value")} == {None}
    assert claims.corrected_family(rows)[0]["verdict"] == "not run"


# One seed, over sentences


def test_one_seed_is_judged_over_its_sentences():
    labels = np.array([1, 1, 0, 1, 0, 1, 1, 0] * 5)
    after = np.full(40, 0.9)
    after[:6] = 0.3  # six sentences turn wrong
    runs = [policy("rl", odds_of(0.8, labels), labels, [4]), policy("rl-sft", odds_of(after, labels), labels, [4])]
    found = results_of(STUDY, runs, seeds=[4])
    row = claims.compare_sentences(found, 4, "rl", "rl-sft")
    assert (row["seed"], row["change"], row["more right"]) == (4, "rl to rl-sft", "-6")
    assert float(row["McNemar p"]) == pytest.approx(mcnemar(np.ones(40), np.arange(40) >= 6).p_value, rel=0.01)
    change = (34 * (math.log(0.8) - math.log(0.9)) + 6 * (math.log(0.8) - math.log(0.3))) / 40
    assert row["SFT loss"].startswith(f"{change:+.3f} [")
    assert row["reward"].startswith(f"{2 * (34 * 0.1 - 6 * 0.5) / 40:+.3f} [")
    assert label_log_odds(found.answers_of("rl", 4))[0] == pytest.approx(logit(0.8))
