"""Four answers: the tilt and C1 by hand, and verdicts of policies that are, or are not, where they should be."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from nondecoupling.analysis import claims, many_answers, measures, predictions, theory
from nondecoupling.study.contracts import LabelsFile
from nondecoupling.study.study import load_study
from tables import MEASURED, SEEDS, is_a, metrics_of, results_of

STUDY = load_study("four", overrides={"rl.beta": 1 / math.log(2)})  # a unit of reward doubles an answer's odds
BETA = STUDY.profile.rl.beta
# Two cells of known shares; the truth is the likeliest.
CELLS = {("argument", 0): [0.5, 0.25, 0.125, 0.125], ("order", 3): [0.05, 0.1, 0.25, 0.6]}
RNG = np.random.default_rng(3)


def answers(run, logp, of_each=4):
    """A run's answers to sentences of both cells; ``logp`` gives the policy (2, 4) of a seed."""
    tables = []
    for seed in SEEDS:
        table = pd.DataFrame([key for key in CELLS for _ in range(of_each)], columns=["source", "truth"])
        shares = pd.DataFrame(np.repeat(list(CELLS.values()), of_each, axis=0)).add_prefix("share_")
        policy = pd.DataFrame(np.repeat(logp(seed), of_each, axis=0)).add_prefix("logp_")
        table = pd.concat([table.astype({"truth": "Int64"}), shares, policy], axis=1)
        tables.append(table.assign(run=run, seed=seed, label=table["truth"].astype(int), agreement=shares.max(axis=1)))
    return pd.concat(tables)


SHARES = np.log(list(CELLS.values()))
EARNED = theory.agreement_reward(SHARES)


def near(logp, of=0, size=0.01):
    """A policy of each seed that is ``logp`` up to what seeds do, otherwise for every number ``of``."""
    return lambda seed: log_softmax(logp + np.random.default_rng([seed, of]).normal(0, size, logp.shape), axis=1)


def results(sft=SHARES, rl=None):
    tilt = theory.tilt(SHARES, EARNED, BETA)
    policies = {"base": np.log(np.full((2, 4), 0.25)), "sft": sft, "sft-rl": tilt if rl is None else rl}
    policies |= {"rl": tilt, "rl-sft": SHARES}
    tables = [answers(run, near(logp, of)) for of, (run, logp) in enumerate(policies.items())]
    return results_of(STUDY, tables, metrics_of(MEASURED))


def test_the_tilt_of_four_answers_by_hand():
    """At beta = 1/ln 2 an answer with share p is multiplied by 2^(2p-1): 1, 2^-0.5, 2^-0.75 and 2^-0.75."""
    weights = np.array([0.5, 0.25 * 2**-0.5, 0.125 * 2**-0.75, 0.125 * 2**-0.75])
    ideal = weights / weights.sum()
    assert np.exp(theory.self_tilt(SHARES[:1], BETA))[0] == pytest.approx(ideal)
    c1 = sum(p * math.log(p / t) for p, t in zip(CELLS["argument", 0], ideal, strict=True))  # KL(p_D || tilt)
    [cell, _] = many_answers.cells(many_answers.by_sentence(results()))
    assert cell["c1"] == pytest.approx(c1)
    assert cell["lowest_loss"] == pytest.approx(1.75 * math.log(2))  # entropy of 1/2, 1/4, 1/8, 1/8
    assert [label["ideal"] for label in cell["labels"]] == pytest.approx(ideal.tolist())
    assert [label["share"] for label in cell["labels"]] == pytest.approx(CELLS["argument", 0])


def test_of_two_answers_the_core_is_the_special_case():
    log_odds = RNG.normal(0, 2, 50)
    logp = theory.two_label_policy(log_odds)
    tilted = theory.self_tilt(logp, 0.7)
    assert tilted[:, 1] - tilted[:, 0] == pytest.approx(theory.self_tilted_log_odds(log_odds, 0.7))
    labels = RNG.integers(2, size=50)
    assert theory.sft_loss(logp, theory.certain(labels, 2)) == pytest.approx(theory.loss_on_labels(log_odds, labels))
    for temperature in (0.5, 2.0):
        cold = theory.tempered(logp, temperature)
        assert cold[:, 1] - cold[:, 0] == pytest.approx(theory.tempered_log_odds(log_odds, temperature))


def test_greedy_answers_share_what_is_equally_likely():
    greedy = np.exp(theory.tempered(np.log([[0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]), 0))
    assert greedy == pytest.approx(np.array([[0.5, 0.5, 0, 0], [0, 0, 0, 1]]))
    for temperature in (-1.0, math.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            theory.tempered(SHARES, temperature)


def test_stages_that_end_at_their_optimum_are_confirmed():
    content = many_answers.labels_file(results())
    assert is_a(LabelsFile, content)
    assert [(row["id"], row["verdict"]) for row in content["claims"]] == [(f"M{n}", "confirmed") for n in range(1, 6)]
    by_id = {row["id"]: row for row in content["claims"]}
    ideal = theory.tilt(SHARES, EARNED, BETA)
    assert by_id["M1"]["predicted"] == pytest.approx(theory.mean_kl(SHARES, ideal))
    assert by_id["M2"]["predicted_from_policies"] == pytest.approx(by_id["M1"]["predicted"], abs=0.02)
    # of the wrong answers 1/4 against 1/8, and 1/4 against 1/20
    assert by_id["M5"]["predicted"] == pytest.approx(2 * (0.125 + 0.2) / 2 / BETA)
    assert by_id["M5"]["estimate"] == pytest.approx(by_id["M5"]["predicted"], abs=0.1)


@pytest.mark.parametrize(
    ("what", "rl", "verdicts"),
    [
        ("at another beta", theory.tilt(SHARES, EARNED, BETA / 3), {"M1": "refuted"}),
        ("of rewards turned round", theory.tilt(SHARES, -EARNED, BETA), {"M5": "refuted"}),
        ("none", SHARES, {"M1": "refuted", "M4": "refuted"}),
        # all wrong answers lose alike: the true one is as likely as it should be
        ("of the true answer alone", theory.tilt(SHARES, np.eye(4)[[0, 3]] * 2, BETA), {"M5": "inconclusive"}),
    ],
)  # fmt: skip
def test_a_wrong_tilt_is_not_confirmed(what, rl, verdicts):
    found = {row["id"]: row["verdict"] for row in many_answers.labels_file(results(rl=rl))["claims"]}
    assert {name: found[name] for name in verdicts} == verdicts
    assert found["M3"] == "confirmed"  # which asks about SFT alone


def test_an_sft_policy_that_is_sharp_is_not_called_calibrated():
    sharp = theory.tilt(SHARES, EARNED, BETA)
    found = {row["id"]: row["verdict"] for row in many_answers.labels_file(results(sft=sharp))["claims"]}
    assert found["M3"] == "refuted"


def test_the_table_has_a_block_for_each_cell_and_its_numbers():
    content = many_answers.labels_file(results())
    table = many_answers.cells_table(content)
    assert list(table) == ["argument", "order", "tense", "nothing", "SFT loss", "rise by RL"]
    assert list(table.loc[("argument", "argument")].index) == ["annotators", "SFT", "ideal RL", "SFT → RL"]
    assert table.loc[("order", "nothing", "annotators")].tolist()[:4] == ["0.050", "0.100", "0.250", "0.600"]
    [cell, _] = content["cells"]
    assert table.loc[("argument", "argument", "ideal RL"), "rise by RL"] == f"{cell['c1']:+.3f}"
    assert table.loc[("argument", "argument", "SFT → RL"), "rise by RL"].startswith(f"{cell['rise']['mean']:+.3f} [")


def test_the_figure_says_what_was_found():
    good, bad = (many_answers.labels_file(results(rl=rl)) for rl in (None, SHARES))
    titles = [many_answers.draw_sharpening(content).axes[0].get_title(loc="left") for content in (good, bad)]
    assert titles[0].startswith("SFT ends nearer annotators' shares")
    assert titles[1].startswith("Annotators, their tilt")
    left, right = many_answers.draw_sharpening(good).axes
    assert len(left.lines) == 3 * 8 + 1  # SFT, ideal and RL of each answer of each cell, and the diagonal
    assert {text.get_text() for text in right.texts} == {"argument", "order", "tense", "nothing"}


def test_the_papers_claims_are_predicted_for_four_answers():
    found = results()
    perfect, ideal = predictions.for_perfect_learner(found), theory.tilt(SHARES, EARNED, BETA)
    assert perfect["A1"] == pytest.approx(theory.mean_kl(SHARES, ideal))
    gained = theory.expected_reward(ideal, EARNED) - theory.expected_reward(SHARES, EARNED)
    assert perfect["O1"] == pytest.approx(gained)
    own = predictions.from_policies(found)
    assert set(own) == set(perfect)
    # on labels that nobody contradicts RL takes away loss
    assert own["A1"] < 0
    assert [row["id"] for row in claims.judge_claims(found)] == [claim.id for claim in claims.CLAIMS]
    ends = predictions.perfect_frontier(found, [BETA, 1e6]).iloc[0]
    assert ends["sft_loss"] == pytest.approx(theory.sft_loss(ideal, SHARES))


def test_ranks_of_four_answers_are_means_over_pairs_of_labels():
    table = answers("x", near(SHARES)).query("seed == 0")
    assert measures.auroc(table) == 1.0  # each truth has more probability where it is the truth
    turned = table.assign(logp_0=table["logp_3"], logp_3=table["logp_0"])
    assert measures.auroc(turned) == 0.0


def test_what_annotators_say_must_be_known():
    unknown = results()
    columns = [name for name in unknown.answers if name.startswith("share_")]
    unknown = replace(unknown, answers=unknown.answers.drop(columns=columns).assign(agreement=np.nan))
    with pytest.raises(ValueError, match="what annotators say is not known"):
        many_answers.labels_file(unknown)
