"""The rule of the verdicts, on intervals and metrics made by hand and against scipy's paired t-test."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nondecoupling import claims, corpus, runs
from nondecoupling.profile import load_study

NAN = math.nan

# Three seeds of each policy; the base is the same for all.
LOSS = {
    "base": [0.60] * 3,
    "sft": [0.40, 0.42, 0.41],
    "sft-rl": [0.55, 0.59, 0.54],
    "rl": [0.70, 0.80, 0.75],
    "rl-sft": [0.40, 0.41, 0.42],
}
REWARD = {
    "base": [0.2] * 3,
    "sft": [0.50, 0.52, 0.48],
    "sft-rl": [0.49, 0.54, 0.47],
    "rl": [0.60, 0.58, 0.66],
    "rl-sft": [0.50, 0.47, 0.51],
}
GREEDY = {
    "base": [0.3] * 3,
    "sft": [0.7] * 3,
    "sft-rl": [0.7] * 3,
    "rl": [0.70, 0.72, 0.71],
    "rl-sft": [0.80, 0.83, 0.82],
}


@pytest.fixture
def metrics():
    """Final metrics as ``runs.read_metrics`` gives them."""
    return pd.DataFrame(
        {
            "run": run,
            "seed": seed,
            "sft_loss": LOSS[run][place],
            "reward_exact": REWARD[run][place],
            "reward_sampled": REWARD[run][place] + 0.01,
            "reward_sampled_strict": REWARD[run][place],
            "reward_greedy": GREEDY[run][place],
            "n": 1000,
            "label_mass": 1.0,
            "majority_reward": 0.4,
            "accuracy": 0.85,
            "balanced_accuracy": 0.8,
            "mcc": 0.6,
            "predicted_acceptable_rate": 0.7,
        }
        for place, seed in enumerate([0, 3, 7])
        for run in LOSS
    )


FROM_POLICIES = {claim.id: 0.1 for claim in claims.CLAIMS}


def judge(metrics, predicted=None):
    return {row["id"]: row for row in claims.judge_claims(metrics, predicted or {}, FROM_POLICIES)}


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


def test_claims_are_named_once_and_speak_of_planned_runs(metrics):
    ids = [claim.id for claim in claims.CLAIMS]
    assert len(ids) == len(set(ids))
    planned = {"base", *(run.name for run in load_study("nano").profile.runs)}
    for claim in claims.CLAIMS:
        assert {claim.before, claim.after} <= planned
        assert claim.metric in metrics
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
def test_each_claim_agrees_with_scipys_paired_t_test(metrics, claim, after, before, verdict):
    row = judge(metrics)[claim]
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert row["estimate"] == pytest.approx(np.mean(after) - np.mean(before))
    assert row["ci95"] == pytest.approx([interval.low, interval.high])
    assert row["p_value"] == pytest.approx(expected.pvalue)
    assert (row["seeds"], row["test"]) == (3, "paired t")
    assert row["verdict"] == verdict


def test_a_verdict_that_does_not_survive_holms_correction_is_withdrawn(metrics):
    rows = judge(metrics)
    assert rows["B2"]["ci95"][1] < 0
    assert rows["B2"]["p_value"] < 0.05 <= rows["B2"]["p_holm"]
    p = sorted(row["p_value"] for row in rows.values())
    assert min(row["p_holm"] for row in rows.values()) == pytest.approx(len(p) * p[0])
    alone = claims.judge_claims(metrics, {}, {}, [claim for claim in claims.CLAIMS if claim.id == "B2"])
    assert (alone[0]["verdict"], alone[0]["p_holm"]) == ("reproduced", rows["B2"]["p_value"])


def test_an_interval_by_hand(metrics):
    row = judge(metrics)["A1"]
    differences = [0.15, 0.17, 0.13]
    half = 4.302652729911275 * 0.02 / math.sqrt(3)  # t at 97.5 % with two degrees of freedom; deviation 0.02
    assert np.std(differences, ddof=1) == pytest.approx(0.02)
    assert row["estimate"] == pytest.approx(0.15)
    assert row["ci95"] == pytest.approx([0.15 - half, 0.15 + half])


def test_seeds_are_paired_whatever_the_order_of_the_rows(metrics):
    shuffled = metrics.sample(frac=1, random_state=0)
    assert judge(shuffled) == judge(metrics)


def test_rows_say_what_the_contract_asks_for(metrics):
    predicted = {"A1": 0.2, "B3": 0.0}
    rows = claims.judge_claims(metrics, predicted, FROM_POLICIES)
    assert [row["id"] for row in rows] == [claim.id for claim in claims.CLAIMS]
    contract = {"id", "statement", "quantity", "paper", "predicted", "estimate", "ci95", "seeds", "test", "p_value"}
    contract |= {"p_holm"}
    for row in rows:
        assert contract | {"verdict"} <= set(row)
        assert row["predicted"] == predicted.get(row["id"])
        assert row["note"] == ""
    assert rows[0]["quantity"] == "sft_loss: sft-rl - sft"
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_one_seed_decides_nothing(metrics):
    rows = claims.judge_claims(metrics[metrics["seed"] == 3], {}, FROM_POLICIES)
    for row in rows:
        assert (row["ci95"], row["p_value"], row["seeds"], row["verdict"]) == (None, None, 1, "inconclusive")
    assert rows[0]["estimate"] == pytest.approx(0.17)
    json.dumps(rows, allow_nan=False)
    assert claims.claims_table(rows)["95 % interval"].tolist() == ["-"] * len(rows)


def test_a_collapse_is_noted_with_its_run_and_seeds(metrics):
    metrics.loc[(metrics["run"] == "rl") & (metrics["seed"] != 0), ["predicted_acceptable_rate", "mcc"]] = [1.0, 0.0]
    rows = judge(metrics)
    for claim in ("B1", "B2", "B3"):
        assert rows[claim]["note"] == "collapsed: rl 2/3"
    assert rows["A1"]["note"] == ""
    assert claims.states_table(metrics)["collapsed"].to_dict() == {
        "base": "no",
        "sft": "no",
        "sft-rl": "no",
        "rl": "2 of 3",
        "rl-sft": "no",
    }


def test_states_are_means_over_seeds(metrics):
    table = claims.states_table(metrics)
    assert table.index.tolist() == list(LOSS)
    assert table.loc["rl", "sft_loss"] == pytest.approx(0.75)
    assert table.loc["sft", "reward_exact"] == pytest.approx(0.5)


def test_the_table_for_reading_shows_signed_numbers(metrics):
    rows = claims.judge_claims(metrics, {"A1": 0.2}, FROM_POLICIES)
    table = claims.claims_table(rows).set_index("claim")
    first = table.loc["A1: RL after SFT raises the SFT loss"]
    assert (first["predicted"], first["from the policy"], first["measured"]) == ("+0.200", "+0.100", "+0.150")
    assert first["95 % interval"] == "[+0.100, +0.200]"
    assert first["verdict"] == "reproduced"
    assert set(table["predicted"].iloc[1:]) == {"-"}


# What is predicted


@pytest.fixture
def finished(tmp_path, metrics):
    """Predictions of base and ``sft`` on two sentences, and the dev file that knows their truth."""
    p = {"base": [0.5, 0.5], "seed0/sft": [0.9, 0.1], "seed3/sft": [0.8, 0.2], "seed7/sft": [0.7, 0.3]}
    for folder, acceptable in p.items():
        (tmp_path / folder).mkdir(parents=True)
        table = pd.DataFrame({"sentence": ["Good.", "Bad good."], "label": [1, 0], "source": "x"})
        table["logp_acceptable"] = np.log(acceptable)
        table["logp_unacceptable"] = np.log1p(-np.array(acceptable))
        table.to_parquet(tmp_path / folder / runs.predictions_file("dev"))
    (tmp_path / "data").mkdir()
    dev = pd.DataFrame([("x", 1, "", "Good."), ("x", 0, "*", "Bad good.")], columns=corpus.COLUMNS)
    corpus.write_tsv(dev, tmp_path / "data" / corpus.FILES["dev"])
    return tmp_path


def test_closed_forms_by_hand(finished, metrics):
    """q = 3/4 and beta = 1/ln 3: RL multiplies the odds by exp(2(2q-1)/beta) = 3, from 3 to 9 or from 1 to 3."""
    study = load_study("nano", overrides={"data.disagreement": 0.25, "rl.beta": 1 / math.log(3)})
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    after = -0.75 * math.log(0.9) - 0.25 * math.log(0.1)
    deficit = 0.5**2 - 0.5 * (2 * 0.75 - 1)  # calibrated reward, minus the base's own tilt to 3/4
    expected = {
        "A1": after - entropy,
        "A2": after - 0.60,
        "B1": deficit,
        "B2": deficit,
        "B3": 0.0,
        "O1": 0.8 * 0.5 - 0.25,
    }
    assert claims.predictions_of_theory(study, finished, metrics) == pytest.approx(expected)


def test_closed_forms_need_a_known_disagreement(finished, metrics):
    assert claims.predictions_of_theory(load_study("nano", data=str(finished)), finished, metrics) == {}


def test_predictions_from_measured_policies_by_hand(finished, metrics):
    """A calibrated policy at p has expected reward 2p-1 for "acceptable": its log-odds grow by 2(2p-1)/beta."""
    beta = 2.0
    p = np.array([0.9, 0.8, 0.7])  # of the right label, both sentences alike
    odds = p / (1 - p) * np.exp(2 * (2 * p - 1) / beta)
    tilted = odds / (1 + odds)
    rise = (np.log(p) - np.log(tilted)).mean()
    gain = (2 * tilted - 2 * p).mean()
    study = load_study("nano", overrides={"rl.beta": beta})
    predicted = claims.predictions_from_policies(study, finished, metrics)
    mean = {name: {run: np.mean(values[run]) for run in values} for name, values in (("loss", LOSS), ("J", REWARD))}
    expected = {
        "A1": rise,
        "A2": mean["loss"]["sft"] + rise - mean["loss"]["base"],
        "B1": mean["J"]["sft"] - mean["J"]["rl"],
        "B2": mean["J"]["sft"] - mean["J"]["rl"],
        "B3": 0.7 - 0.71,
        "O1": gain,
    }
    assert predicted == pytest.approx(expected, abs=1e-5)


# Against the reference


def row(name="A1", estimate=0.15, ci95=(0.10, 0.20), verdict="reproduced"):
    return {"id": name, "estimate": estimate, "ci95": list(ci95) if ci95 else None, "verdict": verdict}


@pytest.mark.parametrize(
    ("fresh", "reference", "result"),
    [
        (row(), row(), "PASS"),
        (row(estimate=0.22, ci95=(0.18, 0.26)), row(), "PASS"),
        (row(estimate=0.22, ci95=(0.20, 0.24)), row(), "PASS"),  # they touch
        (row(estimate=0.24, ci95=(0.21, 0.27)), row(), "FAIL"),
        (row(estimate=0.05, ci95=(0.01, 0.09)), row(), "FAIL"),
        (row(verdict="inconclusive", ci95=(-0.1, 0.4)), row(), "FAIL"),
        (row(estimate=0.12, ci95=None), row(), "PASS"),  # one seed inside the reference's interval
        (row(estimate=0.22, ci95=None), row(), "FAIL"),
    ],
)
def test_a_claim_passes_if_verdicts_agree_and_intervals_overlap(fresh, reference, result):
    table = claims.compare_claims([fresh, row("B1")], [reference, row("B1")])
    assert table["result"].tolist() == [result, "PASS"]
    swapped = claims.compare_claims([reference], [fresh])
    assert swapped["result"].tolist() == [result]


def test_parts_that_only_one_side_has_run_are_not_compared():
    table = claims.compare_claims([row(), row("K1")], [row(), row("T1")])
    assert table.set_index("claim")["result"].to_dict() == {"A1": "PASS", "T1": "not compared", "K1": "not compared"}
    assert claims.compare_claims([row("K1")], [row("K1", verdict="inconclusive")])["result"].tolist() == ["FAIL"]


@pytest.mark.parametrize("reference", [[row("A2")], [row(), row("A2")], []])
def test_different_claims_cannot_be_compared(reference):
    with pytest.raises(ValueError, match="same version"):
        claims.compare_claims([row()], reference)


# The theory's own statements


@pytest.mark.parametrize(
    ("gap", "predicted", "verdict"),
    [
        ((-0.01, 0.01), 0.2, "reproduced"),
        ((-0.05, 0.05), 0.2, "reproduced"),  # exactly a quarter
        ((-0.06, 0.05), 0.2, "inconclusive"),
        ((-0.2, -0.06), 0.2, "not reproduced"),
        ((0.06, 0.2), 0.2, "not reproduced"),
        ((0.04, 0.2), 0.2, "inconclusive"),
        ((-0.01, 0.01), 0.0, "reproduced"),  # at least 0.01
        ((-0.02, 0.01), 0.0, "inconclusive"),
        ((math.nan, math.nan), 0.2, "inconclusive"),
    ],
)
def test_an_amount_is_judged_by_the_interval_of_its_gap(gap, predicted, verdict):
    assert claims.verdict_of_amount(gap, predicted) == verdict


def theory_content(rise=0.2, seeds=3, **changes):
    """A theory.json in which RL does what is predicted, but for small differences between seeds."""
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
    interval = {"mean": 1.1, "ci95": [1.05, 1.15]}
    content = {
        "identity_gaps": {"theorem": 1e-15},
        "runs": records,
        "sweep": None,
        "test_time": {"shares": {"greedy": interval}, "gain_of_greedy_reward": {"mean": 0.0, "ci95": [-0.001, 0.001]}},
    }
    return content | changes


def two_policies(kl=0.5, fall=0.1, seeds=3):
    rows = []
    for seed in range(seeds):
        rows.append({"run": "rl", "seed": seed, "reward_exact": 0.6, "kl_to_parent": 0.3})
        rows.append({"run": "rl-sft", "seed": seed, "reward_exact": 0.6 - fall, "kl_to_parent": kl})
    return pd.DataFrame(rows)


def theory_verdicts(content, metrics):
    return {row["id"]: row["verdict"] for row in claims.judge_theory(content, metrics)}


def test_theory_that_holds_is_reproduced():
    assert set(theory_verdicts(theory_content(), two_policies()).values()) == {"reproduced"}


def test_each_statement_can_fail():
    assert theory_verdicts(theory_content(identity_gaps={"theorem": 1e-3}), two_policies())["T1"] == "not reproduced"
    assert theory_verdicts(theory_content(rise=0.3), two_policies())["T2"] == "not reproduced"
    # KL = 0.005 allows a change of 2 sqrt(0.0025) = 0.1
    assert theory_verdicts(theory_content(), two_policies(kl=0.005, fall=0.099))["T5"] == "reproduced"
    assert theory_verdicts(theory_content(), two_policies(kl=0.005, fall=0.101))["T5"] == "not reproduced"
    low = {"mean": 0.8, "ci95": [0.7, 0.9]}
    worse = theory_content()["test_time"] | {"shares": {"greedy": low}}
    assert theory_verdicts(theory_content(test_time=worse), two_policies())["T6"] == "not reproduced"
    nothing_gained = {"test_time": theory_content()["test_time"] | {"shares": {}}}
    assert "T6" not in theory_verdicts(theory_content(**nothing_gained), two_policies())


def sweep_entry(**changes):
    change = {
        "measured": {"mean": 0.1, "ci95": [0.09, 0.11]},
        "own_belief": 0.5,
        "perfect_learner": None,
        "gap_to_own_belief": {"mean": -0.4, "ci95": [-0.41, -0.39]},
    }
    entry = {"run": "x", "beta": 0.1, "varied": "", "steps": 128, "is_half": False, "settled": False}
    return entry | {"doubling": {"mean": 0.05, "ci95": [0.04, 0.06]}, "change_of_loss": change} | changes


def test_the_sweep_is_judged_beta_by_beta_and_says_what_had_not_settled():
    sweep = [sweep_entry(), sweep_entry(varied="divided"), sweep_entry(is_half=True), sweep_entry(beta=5, settled=True)]
    judged = claims.judge_theory(theory_content(sweep=sweep), two_policies())
    rows = [(row["id"], row["verdict"], row["note"]) for row in judged if row["id"].startswith("T4")]
    assert rows == [("T4-b0.1", "not reproduced", "training had not settled"), ("T4-b5", "not reproduced", "")]


def test_the_table_of_the_sweep_names_what_a_run_varies_and_leaves_out_halves():
    entries = [sweep_entry(), sweep_entry(is_half=True), sweep_entry(varied="32 answers", steps=64, doubling=None)]
    plain, varied = claims.sweep_table(entries).astype(str).to_numpy().tolist()
    assert plain == ["0.1", "128", "-", "+0.500", "+0.100 [+0.090, +0.110]", "+0.050 [+0.040, +0.060]"]
    assert varied == ["0.1, 32 answers", "64", "-", "+0.500", "+0.100 [+0.090, +0.110]", "-"]


def test_one_seed_settles_no_amount():
    content = theory_content(seeds=1)
    content["test_time"] = {
        "shares": {"greedy": {"mean": 1.1, "ci95": None}},
        "gain_of_greedy_reward": {"mean": 0.0, "ci95": None},
    }
    verdicts = theory_verdicts(content, two_policies(seeds=1))
    assert [verdicts[name] for name in ("T2", "T3", "T6", "T7")] == ["inconclusive"] * 4


def test_the_papers_difference_is_significant_only_if_few_answers_changed():
    table = claims.paper_numbers_table().set_index("changed sentences")["p"]
    assert table[11] == pytest.approx(2 * 0.5**11)  # all one way
    assert table[25] < 0.05 < table[27]
    # 51 changes, 31 one way: both tails of the binomial, summed by hand
    assert table[51] == pytest.approx(2 * sum(math.comb(51, k) for k in range(31, 52)) / 2**51)
