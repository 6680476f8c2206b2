"""The rule of the verdicts, on intervals and metrics made by hand and against scipy's paired t-test."""

import math
from dataclasses import replace
from itertools import combinations
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from nondecoupling.analysis import claims
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import Interval, mcnemar
from nondecoupling.study.contracts import ClaimRow, Verdict
from nondecoupling.study.study import load_study
from tables import MEASURED, SOUND, is_a, metrics_of, odds_of, policy, results_of

NAN = math.nan
STUDY = load_study("nano")
SEEDS = [0, 3, 7]
LABELS = np.array([1, 0] * 10)
# Right about 16 of 20 sentences, four of each label on either half; sure by 0.9, and after RL by 0.98, 0.97, 0.99.
RIGHT = np.where(np.arange(20) % 10 < 8, 1, -1)
SURE = {"sft": [0.9, 0.9, 0.9], "sft-rl": [0.98, 0.97, 0.99]}
LOSS, REWARD, GREEDY = (
    {run: MEASURED[run][name] for run in MEASURED} for name in ("sft_loss", "reward_exact", "reward_greedy")
)


def measured(changes=None):
    """Final metrics of three seeds, sampled rewards a little above the expected ones, some of them changed."""
    runs = {run: given | {"reward_sampled": np.add(given["reward_exact"], 0.01)} for run, given in MEASURED.items()}
    return metrics_of({run: given | (changes or {}).get(run, {}) for run, given in runs.items()}, SEEDS)


def results(metrics, seeds=SEEDS):
    """The results that `judge_claims` reads: metrics, and the answers from which it predicts."""
    answers = [policy("base", 0.0, LABELS, seeds)]
    for run, sure in SURE.items():
        odds = np.outer(logit(sure[: len(seeds)]), odds_of(expit(1.0), LABELS) * RIGHT)
        answers.append(policy(run, odds, LABELS, seeds))
    return results_of(STUDY, answers, metrics, seeds=seeds)


def judge(metrics):
    return {row["id"]: row for row in claims.judge_claims(results(metrics))}


def alone(claim, values):
    """The verdict of a claim that is judged alone, from its values by seed."""
    return claims.corrected_family([claims.judged(claim, pd.Series(values))])[0]


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


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.00, 0.01, -0.01, 0.005], "confirmed"),
        ([0.00, 0.04, -0.04, 0.01], "inconclusive"),
        ([0.010, 0.011, 0.012, 0.013], "confirmed"),  # not zero, and yet no more than the margin
        ([0.05, 0.06, 0.055, 0.05], "refuted"),
        ([-0.05, -0.06, -0.055, -0.05], "refuted"),
        ([0.02, 0.03, 0.05, 0.01], "inconclusive"),
        ([0.0], "inconclusive"),
    ],
)
def test_no_difference_is_judged_by_the_90_percent_interval_and_the_margin(values, verdict):
    claim = claims.Claim("K0", "nothing changes", "sft_loss", "a", "b", 0, margin=0.02)
    row = alone(claim, values)
    assert row["verdict"] == verdict
    assert row["margin"] == 0.02
    if len(values) > 1:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
        assert (row["verdict"] == "confirmed") == (low >= -0.02 and high <= 0.02)
        assert (row["verdict"] == "refuted") == (low > 0.02 or high < -0.02)
        assert (row["p_value"] < 0.05) == (row["verdict"] != "inconclusive")
        assert row["ci95"] == pytest.approx(list(stats.ttest_1samp(values, 0).confidence_interval(0.95)))


def test_no_difference_at_95_percent_is_stricter_than_the_rule():
    """Half-width at 90 %, four seeds: 2.353 sem; at 95 %: 3.182 sem. A margin between the two separates them."""
    values = [-0.01, 0.01, -0.01, 0.01]
    margin = 2.7 * np.std(values, ddof=1) / 2
    claim = claims.Claim("K0", "nothing changes", "sft_loss", "a", "b", 0, margin=margin)
    row = alone(claim, values)
    assert row["verdict"] == "confirmed"
    assert row["ci95"][1] > margin


def test_holm_withdraws_a_finding_of_no_difference_too():
    claim = claims.Claim("K0", "nothing changes", "sft_loss", "a", "b", 0, margin=0.02)
    within, beyond = ([shift + noise for noise in (-0.01, 0.0, 0.01)] for shift in (0.0, 0.04))
    rows = [claims.judged(claim, pd.Series(values)) for values in (within, beyond)]
    assert [row["verdict"] for row in rows] == ["confirmed", "refuted"]
    p = [row["p_value"] for row in rows]
    assert p == pytest.approx([stats.t.sf(2 * math.sqrt(3), 2)] * 2)  # 0.037: alone it would do
    assert [row["verdict"] for row in claims.corrected_family(rows)] == ["inconclusive"] * 2


@pytest.mark.parametrize(
    ("values", "verdict"), [([0.9, 0.95, 0.92], "confirmed"), ([0.3, 0.35, 0.32], "refuted"), ([0.3, 0.9, 0.6], None)]
)
def test_a_share_is_judged_against_what_it_is_claimed_to_exceed(values, verdict):
    claim = next(claim for claim in claims.CLAIMS if claim.id == "O2")
    row = alone(claim, values)
    assert row["verdict"] == (verdict or "inconclusive")
    assert row["estimate"] == pytest.approx(np.mean(values))
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(values, 0.5).pvalue)


def test_a_seed_without_the_quantity_is_left_out_and_named():
    row = alone(claims.CLAIMS[0], {0: 0.1, 3: NAN, 7: 0.12, 9: 0.11})
    assert (row["seeds"], row["note"]) == (3, "no such quantity in seeds 3")
    assert row["estimate"] == pytest.approx(0.11)
    nothing = alone(claims.CLAIMS[0], {0: NAN, 3: NAN})
    assert (nothing["verdict"], nothing["estimate"], nothing["seeds"]) == ("not run", None, 0)
    assert is_a(list[ClaimRow], [row, nothing])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("A1", ["reproduced", "not reproduced"]),
        ("B3", ["reproduced", "not reproduced"]),
        *((name, ["confirmed", "refuted"]) for name in ("O1", "T2", "K1e", "J2-interleaved")),
    ],
)
def test_only_the_papers_claims_are_reproduced(name, words):
    verdicts = ["reproduced", "not reproduced", "inconclusive", "not run"]
    assert [claims.worded(name, verdict) for verdict in verdicts] == [*words, "inconclusive", "not run"]
    claim = claims.CLAIMS[0]._replace(id=name)
    assert [alone(claim, np.multiply([0.1, 0.11, 0.12], side))["verdict"] for side in (1, -1)] == words


def test_every_verdict_is_one_of_the_contracts():
    assert {word for name in ("A1", "K1") for word in map(lambda v: claims.worded(name, v), get_args(Verdict))} == set(
        get_args(Verdict)
    )


def test_claims_are_named_once_and_speak_of_planned_runs():
    ids = [claim.id for claim in claims.CLAIMS]
    assert len(ids) == len(set(ids))
    planned = {run.name for run in STUDY.runs_of("main")}
    for claim in claims.CLAIMS:
        assert {claim.before or "sft", claim.after} <= planned
        assert claim.metric in measured() or claim.id in ("O2", "O3")
        assert claim.sign in (-1, 1)
    signs = {claim.id: (claim.metric, claim.after, claim.before, claim.sign) for claim in claims.CLAIMS}
    assert signs["A1"] == ("sft_loss", "sft-rl", "sft", +1)  # RL after SFT raises the loss,
    assert signs["B1"] == ("reward_sampled", "rl-sft", "rl", -1)  # SFT after RL lowers the reward; not the reverse


@pytest.mark.parametrize("few", [2, 5, 6])
def test_every_choice_of_seeds_is_judged_by_the_same_rule(few):
    rng = np.random.default_rng(few)
    family = [claim for claim in claims.CLAIMS if claim.id in ("A1", "A2", "B3", "O2")]
    means = [0.2, 0.06, 0.02, 0.6]
    values = pd.DataFrame({claim.id: rng.normal(mean, 0.05, 7) for claim, mean in zip(family, means, strict=True)})
    values["A1"] = 0.2  # the same in all seeds
    found = claims.found_by_each(values, family, few)
    sides = {"reproduced": 1, "confirmed": 1, "not reproduced": -1, "refuted": -1, "inconclusive": 0}
    for chosen, row in zip(combinations(range(7), few), found.to_dict("records"), strict=True):
        judged = claims.corrected_family([claims.judged(c, values[c.id].iloc[list(chosen)]) for c in family])
        assert row == {one["id"]: sides[one["verdict"]] for one in judged}
    assert few == 2 or (found.nunique() > 1).any()  # some choices decide what others do not


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
    claim = next(claim for claim in claims.CLAIMS if claim.id == "B2")
    by_itself = alone(claim, claims.change_of(results(measured()), claim))
    assert (by_itself["verdict"], by_itself["p_holm"]) == ("reproduced", rows["B2"]["p_value"])  # needs no correction


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
    assert {row["note"] for row in rows if row["id"] != "A2"} == {""}
    assert "β, here 0.5" in rows[1]["note"]  # a verdict about β, and where the curve over it is
    assert rows[0]["quantity"] == "sft_loss: sft-rl - sft"
    # what a perfect learner does is known of the generated corpus, what the policies predict of any
    predicted = {row["id"] for row in rows if row["predicted"] is not None}
    assert predicted == {row["id"] for row in rows if row["predicted_from_policies"] is not None}
    assert predicted == {"A1", "A2", "B1", "B2", "B3", "O1"}
    # greedy answers of a base that is tossed up: a perfect learner tilts it to the truth, its own belief leaves it be
    assert (rows[4]["predicted"], rows[4]["predicted_from_policies"]) == pytest.approx((0, 0.6))  # SFT: 16 of 20


def test_one_seed_decides_nothing():
    metrics = measured()
    rows = claims.judge_claims(results(metrics[metrics["seed"] == 3], [3]))
    for row in rows:
        assert (row["ci95"], row["p_value"], row["seeds"], row["verdict"]) == (None, None, 1, "inconclusive")
    assert rows[0]["estimate"] == pytest.approx(0.17)
    assert is_a(list[ClaimRow], rows)


def test_one_temperature_and_ranking_by_hand():
    rows = judge(measured())

    def loss(p):  # right about 16 of 20
        return -0.8 * math.log(p) - 0.2 * math.log(1 - p)

    shares = [(loss(p) - loss(0.8)) / (loss(p) - loss(0.9)) for p in SURE["sft-rl"]]  # the best is 0.8 on either half
    assert rows["O2"]["estimate"] == pytest.approx(np.mean(shares), abs=1e-4)
    assert rows["O2"]["quantity"] == "share of the rise from sft to sft-rl"
    assert (rows["O3"]["estimate"], rows["O3"]["verdict"]) == (0, "inconclusive")  # a temperature changes no rank


def test_a_policy_that_ranks_worse_in_every_seed_is_found():
    found = results(measured())
    answers = found.answers.copy()
    spoilt = (answers["run"] == "sft-rl") & answers["sentence"].isin(["s1", "s3", "s4"])
    answers.loc[spoilt, ["logp_acceptable", "logp_unacceptable"]] = answers.loc[
        spoilt, ["logp_unacceptable", "logp_acceptable"]
    ].to_numpy()
    claim = next(claim for claim in claims.CLAIMS if claim.id == "O3")
    fall = claims.change_of(replace(found, answers=answers), claim)
    # 100 pairs: of 8 + 2 acceptable and 8 + 2 unacceptable ones, ties count half; three sentences change sides
    assert fall.tolist() == pytest.approx([0.8 - 0.65] * 3 * np.array(-1))
    assert claim.sign == -1


def test_a_collapse_is_noted_with_its_run_and_seeds():
    rows = judge(measured({"rl": {"predicted_acceptable_rate": [0.7, 1, 1], "mcc": [0.6, 0, 0]}}))
    for claim in ("B1", "B2", "B3"):
        assert rows[claim]["note"] == "RL collapsed to one answer in 2 of 3 seeds, which leaves no skill to lower"
    depends = "depends on the base and on β, here 0.5, see the curve over β in chapter 7"
    assert judge(measured({"base": {"predicted_acceptable_rate": 1, "mcc": 0}}))["A2"]["note"] == (
        f"base collapsed to one answer in 3 of 3 seeds; {depends}"
    )
    assert (rows["A1"]["note"], rows["A2"]["note"]) == ("", depends)


def test_a_base_that_words_its_answers_freely_is_noted_with_what_that_costs():
    note = judge(measured({"base": {"sft_loss": 1.5, "label_mass": math.exp(-1)}}))["A2"]["note"]
    assert note.endswith(
        "the base words 63% of its answers otherwise, which alone costs it 1.00 of its 1.50 nats or more"
    )


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


def theory_content(rise=0.2, seeds=3, **changes):
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
    return {"identity_gaps": {"theorem": 1e-15}, "runs": records, "beta": 0.5, "sweep": None} | changes


def theory_rows(content, kl=0.5, fall=0.1, seeds=3, after=(0.94, 0.95, 0.96), taught=(0.0, 0.001, -0.001)):
    """Greedy answers of the SFT policy earn 1, sampled ones 0.8; RL's sampled answers are right with p ``after``."""
    greedy = {"sft": {}, "sft-rl": {"reward_greedy": np.add(SOUND["reward_greedy"], taught[:seeds])}}
    runs = {"rl": {"reward_exact": 0.6}, "rl-sft": {"reward_exact": np.subtract(0.6, fall), "kl_to_parent": kl}}
    answers = [policy("sft", odds_of(0.9, LABELS), LABELS, range(seeds))]
    answers += [policy("sft-rl", [odds_of(p, LABELS) for p in after[:seeds]], LABELS, range(seeds))]
    metrics = metrics_of(runs | greedy, range(seeds))
    return claims.judge_theory(results_of(STUDY, answers, metrics, seeds=range(seeds)), content)


def theory_verdicts(content, **more):
    return {row["id"]: row["verdict"] for row in theory_rows(content, **more) if row["verdict"] != "not run"}


def test_theory_that_holds_is_confirmed():
    rows = theory_rows(theory_content())
    assert is_a(list[ClaimRow], rows)
    assert theory_verdicts(theory_content()) == dict.fromkeys(("T1", "T2", "T3", "T5", "T6", "T7"), "confirmed")
    by_id = {row["id"]: row for row in rows}
    assert (by_id["T2"]["estimate"], by_id["T2"]["predicted_from_policies"]) == pytest.approx((0.2, 0.2))
    assert (by_id["T3"]["estimate"], by_id["T3"]["predicted_from_policies"]) == pytest.approx((0.1, 0.1))
    assert by_id["T5"]["estimate"] == pytest.approx(0.1 / 1)  # 2 sqrt(0.5 / 2) = 1
    assert by_id["T6"]["estimate"] == pytest.approx(np.mean([0.2 / 0.08, 0.2 / 0.1, 0.2 / 0.12]))
    assert (by_id["T7"]["estimate"], by_id["T7"]["margin"]) == (pytest.approx(0), claims.REWARD_MARGIN)
    assert {row["id"] for row in rows if row["test"] == "exact"} == {"T1", "T5"}
    assert [row["id"] for row in rows if row["p_holm"] is not None] == ["T6", "T7"]


def test_each_statement_can_fail():
    assert theory_verdicts(theory_content(identity_gaps={"theorem": 1e-3}))["T1"] == "refuted"
    assert theory_verdicts(theory_content(rise=0.3))["T2"] == "refuted"
    for record in (content := theory_content())["runs"]:
        record["measured"]["reward"] += 0.05
    assert theory_verdicts(content)["T3"] == "refuted"
    # KL = 0.005 allows a change of 2 sqrt(0.0025) = 0.1, in every seed
    assert theory_verdicts(theory_content(), kl=0.005, fall=[0.01, 0.02, 0.099])["T5"] == "confirmed"
    assert theory_verdicts(theory_content(), kl=0.005, fall=[0.01, 0.02, 0.101])["T5"] == "refuted"
    assert theory_verdicts(theory_content(), taught=(0.05, 0.051, 0.052))["T7"] == "refuted"
    assert theory_verdicts(theory_content(), taught=(0.0, 0.03, -0.03))["T7"] == "inconclusive"


def test_a_share_of_rls_gain_below_one_is_refuted_and_of_no_gain_is_none():
    """RL cannot earn more than greedy answers of a policy that is always right; a wrong one's can."""
    wrong = policy("sft", odds_of(np.where(np.arange(20) < 4, 0.1, 0.9), LABELS), LABELS, range(3))  # greedy: 0.6
    better = policy("sft-rl", [odds_of(p, LABELS) for p in (0.97, 0.98, 0.99)], LABELS, range(3))
    runs = dict.fromkeys(("sft", "sft-rl", "rl"), {}) | {"rl-sft": {"kl_to_parent": 0.5}}
    found = results_of(STUDY, [wrong, better], metrics_of(runs))
    row = next(row for row in claims.judge_theory(found, theory_content()) if row["id"] == "T6")
    assert row["estimate"] == pytest.approx(np.mean([(0.6 - 0.48) / (2 * p - 1 - 0.48) for p in (0.97, 0.98, 0.99)]))
    assert row["verdict"] == "refuted"
    assert "T6" not in theory_verdicts(theory_content(), after=(0.9, 0.8, 0.85))


def test_a_violation_that_is_no_number_is_a_violation():
    gaps = {"theorem": 1e-15, "sign rule": NAN}
    assert theory_rows(theory_content(identity_gaps=gaps))[0]["verdict"] == "refuted"


def test_rl_that_pays_nothing_for_kl_has_no_amount_to_reproduce():
    study = load_study("nano", overrides={"rl.beta": 0.0})
    found = replace(results(measured()), study=study)
    rows = claims.judge_claims(found)
    # where RL takes the base has no closed form either, so that B is not predicted
    assert {(row["predicted"], row["predicted_from_policies"]) for row in rows} == {(None, None)}
    content = theory_content(beta=0.0, runs=[record | {"self_tilted": None} for record in theory_content()["runs"]])
    assert not {"T2", "T3"} & set(theory_verdicts(content))


def test_one_seed_settles_no_amount():
    verdicts = theory_verdicts(theory_content(seeds=1), seeds=1)
    assert [verdicts[name] for name in ("T2", "T3", "T6", "T7")] == ["inconclusive"] * 4


def sweep_entry(run, **changes):
    change = {"measured": over_seeds(0.1, 0.01), "own_belief": 0.5, "gap_to_own_belief": over_seeds(-0.4, 0.01)}
    slope = over_seeds(0.52, 0.01)
    return {"run": run, "seeds": [0, 1, 2], "settled": False, "slope": slope, "change_of_loss": change} | changes


def test_the_sweep_is_judged_beta_by_beta_and_says_what_had_not_settled():
    names = ["sft-rl-b0.1", "sft-rl-b0.1-half", "sft-rl-b1-group", "sft-rl-b0.25-32answers"]
    fits = sweep_entry("x")["change_of_loss"] | {"gap_to_own_belief": over_seeds(0.01, 0.01)}
    entries = [sweep_entry(name) for name in names]
    entries += [sweep_entry("sft-rl-b5", settled=True), sweep_entry("sft-rl-b1", settled=None, change_of_loss=fits)]
    rows = [row for row in theory_rows(theory_content(sweep=entries)) if row["id"].startswith("T4")]
    assert is_a(list[ClaimRow], rows)
    judged = {row["id"]: (row["verdict"], row["note"]) for row in rows if row["verdict"] != "not run"}
    moved = "log-odds moved 0.52 of what was asked"
    assert judged == {
        "T4-b5": ("refuted", moved),
        "T4-b1": ("confirmed", f"whether training had settled is unknown; {moved}"),
        "T4-b0.1": ("refuted", f"training had not settled; {moved}"),
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
