"""Rows and metrics as a reader sees them, on pages and in documents."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from nondecoupling.analysis import claims, tables, verdicts
from nondecoupling.analysis.controls import controls_not_run
from nondecoupling.analysis.statistics import Interval
from nondecoupling.analysis.verdicts import interval_text
from nondecoupling.pages import documents
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from tables import MEASURED, SEEDS, costs_of, metrics_of, odds_of, policy, results_of


@pytest.fixture
def rows():
    """The paper's claims and O1, of three seeds, with a prediction for A1 alone."""
    return claims.corrected_family(judged_rows(metrics_of(MEASURED)))


def judged_rows(metrics, seeds=SEEDS):
    """The rows of the claims that are differences of metrics, with own belief's prediction, and a learner's of A1."""
    found, rows = results_of(load_study("nano"), metrics=metrics, seeds=seeds), []
    for claim in claims.CLAIMS[:6]:
        predicted = {"predicted": 0.2 if claim.id == "A1" else None, "predicted_from_policies": 0.1}
        rows.append(claims.judged(claim, claims.change_of(found, claim), **predicted))
    return rows


def test_claims_are_shown_with_signed_numbers_and_their_interval(rows):
    table = tables.claims_table(rows).set_index("claim")
    first = table.loc["A1: RL after SFT raises the SFT loss"]
    assert (first["perfect learner"], first["own belief"]) == ("+0.200", "+0.100")
    assert first["measured [95 %]"] == "+0.150 [+0.100, +0.200]"
    assert (first["paper"], first["verdict"]) == ("rises sharply", "reproduced")
    assert set(table["perfect learner"].iloc[1:]) == {"-"}


def test_one_seed_has_an_estimate_and_no_interval():
    one = judged_rows(metrics_of({run: {} for run in MEASURED}, [4]), [4])
    table = tables.claims_table(claims.corrected_family(one))
    assert table["measured [95 %]"].tolist() == ["+0.000"] * len(one)
    assert "p, Holm" not in set(table)  # nothing to say in any row


def test_what_was_not_run_is_shown_with_no_number(rows):
    missing = controls_not_run(load_study("nano"))
    table = tables.claims_table(rows + missing).iloc[len(rows) :]
    assert set(table["verdict"]) == {"not run (make controls)"}
    assert set(table.drop(columns=["claim", "verdict"]).to_numpy().ravel()) == {"-"}
    assert list(tables.claims_table(missing)) == ["claim", "verdict"]


def test_controls_are_finished_where_all_seeds_have_them():
    found = metrics_of({"sft-sft": {}, "rl-rl": {}})
    found = found[(found["run"] == "sft-sft") | (found["seed"] > 0)]
    assert tables.finished_controls(results_of(load_study("nano"), metrics=found)) == ["sft-sft"]


def test_rows_are_chosen_by_the_letter_of_their_id(rows):
    assert [row["id"] for row in verdicts.rows_of(rows, "AO")] == ["A1", "A2", "O1"]


def test_a_margin_is_shown_with_the_statement():
    row = claims.judged(claims.GREEDY_UNCHANGED, pd.Series([0.001, 0.002, 0.0]))
    table = tables.claims_table([row])
    assert table["claim"].item() == f"T7: {row['statement']} (±{claims.REWARD_MARGIN:g})"


def test_theorems_are_told_from_what_an_interval_decides(rows):
    exact = claims.exact_row("T1", "holds", "violation", Interval(0.0, math.nan, math.nan, 3), holds=True)
    amount = claims.statement_row("T2", "moves", "change", Interval(0.2, 0.1, 0.3, 3), "reproduced")
    assert tables.theorems_and_tests([*rows, exact, amount]) == ([exact], [amount])


def test_one_axis_holds_losses_and_rewards_and_no_share(rows):
    others = [
        rows[0] | {"quantity": words} for words in ("share of the rise", "auroc: sft-rl - sft", "rise / KL: a - b")
    ]
    assert tables.changes([*others, *rows]) == rows


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0.1, 0.11, 0.12], "O1: more: confirmed (+0.110 [+0.085, +0.135], 3 seeds; but see)."),
        ([-0.1, -0.11, -0.12], "O1: more: refuted (-0.110 [-0.135, -0.085], 3 seeds; but see)."),
        ([-0.1, 0.1, 0.0], "O1: more: these seeds do not decide it (+0.000 [-0.248, +0.248], 3 seeds; but see)."),
        ([0.1], "O1: more: these seeds do not decide it (+0.100, 1 seed; but see)."),
    ],
)
def test_an_outcome_in_words_follows_from_the_verdict(values, sentence):
    claim = claims.Claim("O1", "(ours) more", "reward", "b", "a", +1)
    row = claims.judged(claim, pd.Series(values), ["but see"])
    assert verdicts.outcome_sentence(row) == sentence


def test_outcomes_of_margins_of_the_paper_and_of_what_was_not_run(rows):
    equal = claims.judged(claims.GREEDY_UNCHANGED, pd.Series([0.001, 0.002, 0.0]))
    missing = claims.not_run(claims.CLAIMS[0], "make reproduce")
    text = verdicts.outcomes([equal, rows[0], missing]).splitlines()
    assert text == [
        "* T7: RL after SFT teaches nothing that greedy decoding shows (±0.02): confirmed "
        "(+0.001 [-0.001, +0.003], 3 seeds).",
        "* A1: RL after SFT raises the SFT loss: reproduced (+0.150 [+0.100, +0.200], 3 seeds).",
        "* A1: RL after SFT raises the SFT loss: not run (make reproduce).",
    ]


def test_states_are_means_over_seeds_and_count_collapses():
    fallen = {"rl": {"mcc": [0.6, 0, 0], "predicted_acceptable_rate": [0.7, 1, 1]}}
    table = tables.states_table(metrics_of({run: MEASURED[run] | fallen.get(run, {}) for run in MEASURED}))
    assert table.index.tolist() == list(MEASURED)
    assert table.loc["rl", "sft_loss"] == pytest.approx(0.75)
    assert table.loc["sft", "reward_exact"] == pytest.approx(0.5)
    assert table["collapsed"].to_dict() == dict.fromkeys(MEASURED, "no") | {"rl": "2 of 3"}


def test_policies_are_named_for_readers():
    labels = [1, 1, 1, 0]
    known = [policy("sft-rl", odds_of(0.9, labels), labels), policy("joint-m0.5", [2.0, 1.0, -1.0, 1.5], labels)]
    metrics = metrics_of({"sft-rl": {}, "joint-m0.5": {"mcc": 0.1234, "predicted_acceptable_rate": [0.8, 0.8, 0.5]}})
    table = tables.policies_table(results_of(load_study("nano"), known, metrics), "sft-rl", "joint-m0.5").set_index(
        "policy"
    )
    assert table.index.tolist() == ["SFT → RL", "joint-m0.5"]
    assert table["MCC"].tolist() == ["0.600", "0.123"]
    assert table["says it to"].tolist() == ["70%", "70%"]
    assert table["AUROC"].tolist() == ["1.000", "0.333"]  # one of three acceptable sentences is above the other one
    assert float(table.loc["SFT → RL", "best temperature"]) < 0.1  # it is right about all, and could be surer
    assert set(table["collapsed"]) == {"no"}


def test_the_majority_answer_may_be_unacceptable():
    labels = [1, 0, 0, 0]
    results = results_of(
        load_study("nano"), [policy("sft", 0.0, labels)], metrics_of({"sft": {"predicted_acceptable_rate": 0.1}})
    )
    assert tables.policies_table(results, "sft")["says it to"].tolist() == ["90%"]


def sweep_entry(**changes):
    change = {"measured": {"mean": 0.1, "ci95": [0.09, 0.11]}, "own_belief": 0.5, "perfect_learner": None}
    entry = {"run": "x", "beta": 0.1, "varied": "", "steps": 128, "is_half": False, "change_of_loss": change}
    return entry | {"doubling": {"mean": 0.05, "ci95": [0.04, 0.06]}} | changes


def test_the_table_of_the_sweep_names_what_a_run_varies_and_leaves_out_halves():
    entries = [sweep_entry(), sweep_entry(is_half=True), sweep_entry(varied="32 answers", steps=64, doubling=None)]
    plain, varied = tables.sweep_table(entries).astype(str).to_numpy().tolist()
    assert plain == ["0.1", "128", "-", "+0.500", "+0.100 [+0.090, +0.110]", "+0.050 [+0.040, +0.060]"]
    assert varied == ["0.1, 32 answers", "64", "-", "+0.500", "+0.100 [+0.090, +0.110]", "-"]


def test_the_papers_difference_is_significant_only_if_few_answers_changed():
    table = tables.paper_numbers_table().set_index("changed sentences")["p"]
    assert table[11] == pytest.approx(2 * 0.5**11)  # all one way
    assert table[25] < 0.05 < table[27]
    # 51 changes, 31 one way: both tails of the binomial, summed by hand
    assert table[51] == pytest.approx(2 * sum(math.comb(51, k) for k in range(31, 52)) / 2**51)


def change(measured, own):
    return {"measured": {"mean": measured, "ci95": [measured - 0.1, measured + 0.1]}, "own_belief": own}


def test_who_pays_and_the_crossing_are_said_with_their_numbers():
    payers = [{"q": 0.98, **change(-0.01, 0.04)}, {"q": 0.9, **change(0.2, 0.2)}, {"q": 0.75, **change(0.33, 0.39)}]
    crossing = {"measured": {"mean": 0.6, "ci95": [0.4, 0.9]}, "by_seed": [0.5, None, 0.7]}
    who, where = tables.theory_sentences({"who_pays": payers, "uninformed": None, "crossing": crossing})
    assert "by +0.330 [+0.230, +0.430] nats where 25% of the annotators disagree (own belief +0.390)" in who
    assert "and by -0.010 [-0.110, +0.090] nats where 2% of the annotators disagree (own belief +0.040)." in who
    assert where == (
        "As β falls, RL after SFT comes to end above the base's SFT loss at β* = 0.60 [0.40, 0.90], in 2 of 3 seeds."
    )
    assert tables.theory_sentences({"who_pays": [], "uninformed": None, "crossing": None}) == []
    nowhere = {"measured": None, "by_seed": [None, None]}
    swept = [sweep_entry(), sweep_entry(varied="32 answers"), sweep_entry(is_half=True), sweep_entry(beta=2.0)]
    assert tables.theory_sentences({"who_pays": [], "uninformed": None, "crossing": nowhere, "sweep": swept}) == [
        "RL after SFT ends at the base's SFT loss at no β of the sweep; it changes the loss by +0.100 [+0.090, +0.110] "
        "nats at β = 0.1 (own belief +0.500), +0.100 [+0.090, +0.110] nats at β = 2 (own belief +0.500)."
    ]


def test_what_rl_found_out_from_the_base_is_a_sentence():
    ends = {name: {"mean": mean, "ci95": None} for name, mean in (("loss", 0.6), ("reward", 0.66))}
    ends |= {f"{name}_uninformed": {"mean": mean, "ci95": None} for name, mean in (("loss", 0.99), ("reward", 0.03))}
    assert tables.theory_sentences({"who_pays": [], "uninformed": ends, "crossing": None}) == [
        "RL from the base ends at an SFT loss of 0.600 and a reward of +0.660; ideal RL that cannot tell sentences "
        "apart would end at 0.990 and +0.030."
    ]


def test_claims_fit_a_terminal_with_all_that_is_said_of_them(rows):
    text = verdicts.claims_text(rows)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for row in rows:
        assert row["verdict"] in words
        assert verdicts.remarks(row) in words
    of_first = next(line for line in text.splitlines() if line.startswith("A1"))
    first = next(row for row in rows if row["id"] == "A1")
    assert interval_text(first["estimate"], first["ci95"]).split() == of_first.split()[-4:-1]


def timed(found, seconds, gpu=None):
    """``found``, made on one machine in so many seconds by run."""
    shared = {"shared": {"cpu": "a CPU", "gpu": gpu}}
    return replace(found, costs=costs_of(seconds, found.seeds), provenance=found.provenance | shared)


def test_the_cost_of_a_replication_is_a_mean_by_group_of_what_was_run():
    found, main = results_of(load_study("nano")), {"base": [30, 60, 90], "rl-sft": 2.4}
    assert documents.cost_sentence(timed(found, main)) == (
        "On one core (a CPU) a seed took 62 s for 2 of 6 runs of both experiments, besides the start of each notebook "
        "(mean of 3); a run took at most 0.5 GiB."
    )
    assert "a seed took 20 minutes for 1 of 6 runs of both" in documents.cost_sentence(timed(found, {"base": 1200}))
    whole = {run.name: 3 for run in found.study.runs_of("main", "sweep")}
    everything = whole | {"sft-sft": 5, "joint-m0.2": 6, "base": [30, 60, 90]}
    assert documents.cost_sentence(timed(found, everything, gpu="a GPU")).startswith(
        f"On a GPU a seed took 75 s for both experiments, 11 s for 2 of {len(found.study.runs_of('controls'))} runs of "
        f"controls and joint training, {3 * len(found.study.runs_of('sweep'))} s for other betas, besides"
    )


def test_a_run_that_serves_all_replications_costs_each_its_part():
    found = timed(results_of(load_study("nano")), {"base": 60, "sft": 10})
    once = found.costs.drop(index=[1, 2])  # one row of the base
    assert " took 30 s for 2 of 6 runs of both" in documents.cost_sentence(replace(found, costs=once))


def test_verdicts_of_two_studies_stand_side_by_side():
    found = {"A1": ("reproduced", "reproduced"), "A2": ("reproduced", "not reproduced"), "B1": ("reproduced",) * 2}
    found |= {"O3": ("inconclusive", "inconclusive"), "K1": ("confirmed", "refuted")}
    studies = {
        name: [{"id": claim, "verdict": of_claim[place]} for claim, of_claim in found.items()]
        for place, name in enumerate(("nano", "laptop"))
    }
    assert documents.verdicts_sentence(studies) == (
        "Side by side: A1 and B1 reproduced in both; A2 reproduced in `nano`, not reproduced in `laptop`; "
        "O3 inconclusive in both."
    )
    of_three = documents.verdicts_sentence(studies | {"four": studies["nano"]})
    assert "A1 and B1 reproduced in all 3; A2 reproduced in `nano` and `four`, not reproduced in `laptop`;" in of_three


def test_what_fewer_seeds_find_is_said_where_there_are_more():
    losses = {"sft": [0.3] * 6, "base": [0.5] * 6, "sft-rl": [0.6, 0.61, 0.62, 0.61, 0.6, 0.4]}  # the last is another
    alike = {run: {"sft_loss": values, "reward_sampled": 0.3} for run, values in losses.items()}
    runs = alike | {"rl": {"reward_sampled": 0.5}, "rl-sft": {"reward_sampled": 0.3}}
    answers = [policy(run, 0.5, [1, 1, 0], range(6)) for run in ("sft", "sft-rl")]
    found, study = metrics_of(runs, range(6)), load_study("nano")
    said = documents.quick_look_sentence(results_of(study, answers, found, seeds=list(range(6))))
    assert said.startswith("5 seeds decide less than 6: of all 6 ways to choose 5 of these 6, the verdict is the one")
    assert said.endswith("the one above in all for A1; else it is inconclusive.")  # all six decide no other
    of_five = results_of(study, answers, found[found["seed"] < 5], seeds=list(range(5)))
    assert documents.quick_look_sentence(of_five) == ""
    nothing = found.assign(sft_loss=0.4, reward_sampled=0.3)
    undecided = [policy(run, 0.5, [1, 1, 0], range(6)) for run in ("sft", "sft-rl")]
    assert documents.quick_look_sentence(results_of(study, undecided, nothing, seeds=list(range(6)))) == ""


def test_runs_that_did_not_finish_and_policies_that_collapsed_are_counted():
    one_collapsed = {"predicted_acceptable_rate": [1.0, 0.7, 0.7], "mcc": [0.0, 0.5, 0.5]}
    found = results_of(load_study("nano"), metrics=metrics_of({"base": {}, "sft": one_collapsed}))
    found = timed(found, {"base": [30, 60, 90], "sft": [9, 9, 9]})
    assert documents.runs_sentence(replace(found, costs=found.costs.iloc[1:])) == (
        f"5 of {3 * len(found.study.runs)} runs of the plan finished, for 3 seeds; 1 of 6 policies collapsed."
    )
    one_base = replace(found, study=load_study("laptop"))  # the same for all seeds, and counted once
    assert documents.runs_sentence(one_base).endswith("1 of 4 policies collapsed.")


def test_what_the_outside_judge_found_is_a_sentence():
    row = {"run": "sft", "seed": 0, "n": 527, "accuracy": 0.8, "harness_accuracy": 0.8, "mcc": 0.5, "harness_mcc": 0.5}
    scores = [row | {"difference": 3e-5}, row | {"run": "rl", "harness_mcc": 0.49, "difference": 1e-5}]
    said = documents.score_sentence(scores)
    assert "judged 2 policies of seed 0 in float32 on the same 527 sentences" in said
    assert said.endswith("for 1 of them, and log-likelihoods differ by 3.0e-05 nats at most.")


def test_document_parts_are_those_of_what_was_run(rows, tmp_path):
    study = load_study("nano")

    def parts(runs):
        answers = [policy(run, 0.5, [1, 1, 0]) for run in runs]
        found = results_of(study, answers, metrics_of(runs), folder=tmp_path)
        return documents.document_parts(timed(found, {"sft": 10}))

    folders.write_json(tmp_path / "claims.json", rows + controls_not_run(study))
    folders.write_json(tmp_path / "theory.json", {"sweep": None, "who_pays": [], "uninformed": None, "crossing": None})
    without = parts(MEASURED)
    assert list(without) == ["nano", "nano, findings", "nano, cost", "nano, runs"]
    found = documents.markdown_table(tables.findings_table(rows))  # of the paper's claims and ours beside them alone
    assert without["nano, findings"] == found
    assert "| RL after SFT raises the SFT loss (A1) | rises sharply | +0.150 [+0.100, +0.200] | reproduced |" in found
    assert "| claim | the paper | here, 3 seeds | verdict |" in found
    assert "took 10 s" in without["nano, cost"]
    assert "| A1: RL after SFT raises the SFT loss | rises sharply | +0.200 |" in without["nano"]
    assert "| SFT → RL | 0.560 |" in without["nano"]
    assert not any(words in without["nano"] for words in ("| K1:", "| β |", "not run"))
    folders.write_json(
        tmp_path / "theory.json", {"sweep": [sweep_entry()], "who_pays": [], "uninformed": None, "crossing": None}
    )
    judged = [row | {"verdict": "refuted"} if row["id"] == "K2" else row for row in controls_not_run(study)]
    folders.write_json(tmp_path / "claims.json", rows + judged)
    some = parts(MEASURED | {"rl-rl": {}})["nano, controls"]
    assert "| rl-rl | 0.400 |" in some
    assert "| K2: " in some
    assert "(K6)" not in parts(MEASURED)["nano, findings"]
    clean = {"verdict": "refuted", "estimate": 0.1, "ci95": [0.08, 0.12], "predicted_from_policies": 0.065}
    with_k6 = [row | clean if row["id"] == "K6" else row for row in controls_not_run(study)]
    folders.write_json(tmp_path / "claims.json", rows + with_k6)
    said = parts(MEASURED)["nano, findings"].splitlines()[-1]
    assert said == (
        "* With annotators who never disagree, RL after SFT changes the SFT loss by +0.100 [+0.080, +0.120] nats (own "
        "belief +0.065): disagreement is not all that RL sharpens (K6)."
    )
    assert not any(words in some for words in ("| K1: ", "| J1-"))  # controls are judged as far as they were run
    folders.write_json(tmp_path / "claims.json", [row | {"verdict": "refuted"} for row in rows + judged])
    runs = MEASURED | {run.name: {} for run in study.runs_of("controls") if run.stage != "reward_model"}
    everything = parts(runs | {"reward-model": {}})
    assert list(everything) == ["nano", "nano, controls", "nano, findings", "nano, cost", "nano, runs"]
    assert "| β | steps |" in everything["nano"]
    for words in ("| K1: ", "| J2-interleaved: ", "| rl-rl | 0.400 |"):
        assert words in everything["nano, controls"]
    assert "reward-model" not in everything["nano, controls"]  # it is no policy


REPRODUCED, NOT, OPEN, MISSING = "reproduced", "not reproduced", "inconclusive", "not run"
SIZE, CHANGE = "[0.100, 0.200]", "+0.020 [-0.100, +0.140]"  # of what is decided, and of what is not
LOSS = CHANGE.replace(" ", " nats ", 1)


@pytest.mark.parametrize(
    ("found", "first", "second"),
    [
        (
            (REPRODUCED, REPRODUCED, REPRODUCED, REPRODUCED),
            f"RL after SFT raised the SFT loss by 0.150 nats {SIZE}; it ends 0.150 nats {SIZE} above the base model's.",
            f"SFT after RL lowered the reward of sampled answers by 0.150 {SIZE}; it lowered that of the likelier "
            f"answer by 0.150 {SIZE}.",
        ),
        (
            (NOT, NOT, NOT, NOT),
            f"RL after SFT lowered the SFT loss by 0.150 nats {SIZE}; it ends 0.150 nats {SIZE} below the base "
            "model's.",
            f"SFT after RL raised the reward of sampled answers by 0.150 {SIZE}; it raised that of the likelier "
            f"answer by 0.150 {SIZE}.",
        ),
        (
            (OPEN, OPEN, OPEN, OPEN),
            f"Whether RL after SFT raises the SFT loss is not decided ({LOSS}); whether it ends above the base "
            f"model's is not decided ({LOSS}).",
            f"Whether SFT after RL lowers the reward of sampled answers is not decided ({CHANGE}); whether it lowers "
            f"that of the likelier answer is not decided ({CHANGE}).",
        ),
        (
            (REPRODUCED, OPEN, NOT, MISSING),
            f"RL after SFT raised the SFT loss by 0.150 nats {SIZE}; whether it ends above the base model's is not "
            f"decided ({LOSS}).",
            f"SFT after RL raised the reward of sampled answers by 0.150 {SIZE}; whether it lowers that of the "
            "likelier answer was not measured.",
        ),
    ],
)
def test_the_answer_says_what_the_verdicts_say(rows, found, first, second):
    """Of a rise or a fall how large it is, of what is open the change with its sign, of what was not run no number."""
    told = {row["id"]: row for row in rows}
    for name, verdict in zip(("A1", "A2", "B2", "B3"), found, strict=True):
        sign = 1 if (verdict == REPRODUCED) == (name[0] == "A") else -1
        numbers = {"estimate": sign * 0.15, "ci95": sorted((sign * 0.1, sign * 0.2))}
        if verdict == OPEN:
            numbers = {"estimate": 0.02, "ci95": [-0.1, 0.14], "p_value": 0.7}
        if verdict == MISSING:
            numbers = {"estimate": None, "ci95": None}
        told[name] = told[name] | numbers | {"verdict": verdict}
    assert verdicts.answer_sentences(list(told.values())) == [first, second]


def test_the_answer_of_one_replication_has_no_interval():
    one = judged_rows(metrics_of({run: {} for run in MEASURED}, [4]), [4])
    first, _ = verdicts.answer_sentences(claims.corrected_family(one))
    assert first.startswith("Whether RL after SFT raises the SFT loss is not decided (+0.000 nats);")


def test_what_the_correction_withdraws_is_said(rows):
    """Or an interval beside zero would look like a mistake in the verdict."""
    lost = rows[0] | {"verdict": OPEN, "p_value": 0.02, "p_holm": 0.08, "note": "but see"}
    words = "p 0.02, but 0.08 after Holm's correction"
    assert tables.claims_table([lost])["verdict"].tolist() == [f"inconclusive ({words}; but see)"]
    assert f"; {words}; but see)." in verdicts.outcome_sentence(lost)
    told = [lost, *rows[1:]]
    assert f"is not decided (+0.150 nats [+0.100, +0.200]; {words}); whether it" in verdicts.answer_sentences(told)[0]
    for changed in ({"verdict": REPRODUCED}, {"p_value": 0.06}, {"p_value": None, "p_holm": None}):
        assert verdicts.withdrawn(lost | changed) == ""
