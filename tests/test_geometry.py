"""The geometry chapter: how long, when and along which directions, from tables made by hand."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.special import logit

from nondecoupling.analysis import figures, geometry, geometry_figures, theory
from nondecoupling.study.contracts import GeometryFile
from nondecoupling.study.plan import STATES, starts
from nondecoupling.study.study import load_study
from tables import SEEDS, is_a, odds_of, policy, results_of

STUDY = load_study("nano")
LABELS = np.array([1, 0, 1, 1, 0, 1] * 5)
Q = np.array([0.98, 0.9, 0.75, 0.98, 0.75, 0.9] * 5)
# How sure the policy is of the right label where RL begins: less and less wrong, until it is calibrated.
SURE = {"base": 0.35, "sft-10": 0.65, "sft-25": 0.75, "sft-50": 0.85, "sft": 0.88}


def answers(changed=0.0):
    """Starts, and RL from each at its closed form; ``changed`` adds to RL's log-odds of the right label."""
    tables = []
    for start, runs in starts(STUDY.profile).items():
        before = np.array([[1 + 0.02 * seed] for seed in SEEDS]) * odds_of(SURE[start], LABELS)
        tables.append(policy(start, before, LABELS, agreement=Q))
        for beta, run in runs.items():
            after = [theory.tilted_log_odds(odds, LABELS, 1 - Q, beta) + changed * (2 * LABELS - 1) for odds in before]
            tables.append(policy(run, after, LABELS, agreement=Q))
    return [*tables, policy("rl-sft", odds_of(SURE["sft"], LABELS), LABELS, agreement=Q)]


def gradients_table(**changes):
    """gradients.csv of all policies; the cosine turns between the starts, at 0.1 above the least loss."""
    loss = {
        "base": 0.5,
        "sft-10": 0.45,
        "sft-25": 0.4,
        "sft-50": 0.37,
        "sft": 0.33,
        "sft-rl": 0.6,
        "rl": 0.7,
        "rl-sft": 0.33,
    }
    rows = [
        {
            "run": f"gradients-{name}",
            "seed": seed,
            "policy": name,
            "n": 400,
            "loss": value,
            "best_loss": 0.28,
            "reward": {"sft": 0.5, "sft-rl": 0.6}.get(name, 0.4),
            "loss_gradient": 0.2,
            "reward_gradient": 0.3,
            "cosine": (value - 0.38) * 4 + 0.01 * seed,
            "cosine_split": (value - 0.38) * 5 + 0.01 * seed,
            "cosine_shuffled": 0.05,
            "slope": 0.1 + 0.001 * seed,
            "curvature": 0.5,
            "loss_top_10": 0.97,
            "reward_top_10": 0.99 + 0.001 * seed,
            "bound": 1.0,
            "bound_k": 400.0,
            "directions": 10.0,
        }
        | changes
        for name, value in loss.items()
        for seed in SEEDS
    ]
    return pd.DataFrame(rows)


def paths_table(cost=1.0):
    """paths.csv of ascents that gain 0.01 a step and lose ``cost`` times what the second order predicts."""
    rows = []
    for seed in SEEDS:
        for path in geometry.PATHS:
            for paid in (0, 1):
                for step in range(9):
                    tau, gain = 0.3 * step, 0.01 * step
                    rise = 0.2 * (step / 8) ** 2
                    known = {"run": "gradients-sft", "seed": seed, "path": path, "paid": paid, "step": step, "tau": tau}
                    rows.append(
                        known
                        | {"loss": 0.33 + (cost + 0.01 * seed) * rise, "reward": 0.5 + gain}
                        | {f"loss_{kind}": 0.33 + rise for kind in ("second", "linear")}
                        | {f"reward_{kind}": 0.5 + gain for kind in ("second", "linear")}
                    )
    return pd.DataFrame(rows)


def chapter(gradients=None, paths=None, changed=0.0):
    found = results_of(STUDY, answers(changed))
    return replace(
        found,
        gradients=gradients_table() if gradients is None else gradients,
        paths=paths_table() if paths is None else paths,
    )


@pytest.fixture(scope="module")
def content():
    return geometry.geometry_file(chapter())


def judged(found):
    return geometry.judge_geometry(found, geometry.changes_by_start(found))


def verdicts(found):
    return {row["id"]: row["verdict"] for row in judged(found)}


def test_the_file_is_what_the_contract_says(content):
    assert is_a(GeometryFile, content)
    assert [entry["policy"] for entry in content["policies"]][:2] == ["base", "sft-10"]


def test_values_on_a_path_are_interpolated():
    path = pd.DataFrame({"loss": [0, 0.01, 0.04], "reward": [0, 0.1, 0.2]})
    assert geometry.value_at(path, "reward", "loss", 0.02) == pytest.approx(0.1 + 0.1 / 3)
    assert geometry.value_at(path, "reward", "loss", 1.0) == 0.2
    assert geometry.value_at(path, "reward", "loss", 0.0) == 0.0
    rising = path.assign(loss=[0, -0.01, 0.01])
    assert geometry.value_at(rising, "reward", "loss", 0.005) == pytest.approx(0.175)


def test_the_free_share_is_where_the_loss_has_risen_by_a_hundredth(content):
    # 0.2 (s/8)^2 = 0.01 at s = 1.79, by interpolation between steps 1 and 2: a gain of 0.0173 of the 0.1 that RL gained
    assert content["duration"]["free_share"]["mean"] == pytest.approx(0.173, abs=0.005)
    assert content["duration"]["gain_of_rl"]["mean"] == pytest.approx(0.1)


def test_the_best_stop_comes_earlier_the_dearer_a_nat_is(content):
    gains = [stop["measured"]["mean"] for stop in content["duration"]["stops"]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[-1]


@pytest.mark.parametrize(("cost", "verdict"), [(1.0, "confirmed"), (2.0, "refuted"), (1.24, "inconclusive")])
def test_the_second_order_is_judged_by_what_the_loss_did(cost, verdict):
    assert verdicts(chapter(paths=paths_table(cost)))["G1"] == verdict


def test_the_zero_is_where_harm_begins_on_the_way_to_the_optimum():
    distance = np.array([0.3, 0.2, 0.1, 0.0])
    assert geometry.zero_of(distance, np.array([-0.2, -0.1, 0.1, 0.2])) == pytest.approx(0.15)
    assert geometry.zero_of(distance[::-1], np.array([0.2, 0.1, -0.1, -0.2])) == pytest.approx(0.15)
    assert np.isnan(geometry.zero_of(distance, np.array([0.1, 0.1, 0.1, 0.2])))
    assert np.isnan(geometry.zero_of(distance, -np.ones(4)))


def test_the_sign_rule_finds_the_zero_of_ideal_rl(content):
    for zero in content["threshold"]["zeros"]:
        assert zero["measured"]["mean"] == pytest.approx(zero["truth"]["mean"], abs=1e-6)
    by_start = {point["start"]: point for point in content["threshold"]["points"] if point["beta"] == 0.5}
    assert by_start["base"]["measured"]["mean"] < 0 < by_start["sft"]["measured"]["mean"]
    assert content["threshold"]["zero_of_cosine"]["mean"] == pytest.approx(0.1, abs=0.01)


def test_a_policy_that_is_too_unsure_is_told_so_by_refitting():
    """One temperature and one bias, of the other half, undo a policy's halved log-odds."""
    rng = np.random.default_rng(0)
    truth, q = rng.integers(2, size=3000), 0.9
    labels = np.where(rng.uniform(size=3000) < q, truth, 1 - truth)
    table = policy("sft", (2 * truth - 1) * logit(q) / 2, labels, seeds=[0], truth=truth, agreement=q)
    assert np.abs(geometry.refitted(table)) == pytest.approx(logit(q), rel=0.2)
    believed = geometry.ideal_rl(table)["refitted_belief"](0.5)
    assert believed == pytest.approx(geometry.ideal_rl(table)["truth"](0.5), abs=0.4)


def test_verdicts_follow_the_numbers():
    confirmed = dict.fromkeys(["G1", "G3", "G5", "G6"], "confirmed")
    found = verdicts(chapter(changed=0.02))
    assert found.pop("G4") == "inconclusive"  # the same share in three seeds
    assert found == confirmed | {"G2": "refuted", "G7": "refuted"}
    off = gradients_table()
    off["slope"] = -0.2 + 0.001 * off["seed"]
    assert verdicts(chapter(gradients=off))["G6"] == "refuted"
    off["reward_top_10"] = 0.2 + 0.001 * off["seed"]
    assert verdicts(chapter(gradients=off))["G7"] == "confirmed"


def test_a_sign_is_right_where_measured_and_predicted_agree():
    wrong = chapter(changed=-50.0)  # RL ends sure of the wrong label: every loss rises
    hurt = geometry.values_of_geometry(wrong, geometry.changes_by_start(wrong))["G4"]
    changes = geometry.changes_by_start(chapter())
    assert hurt.to_numpy() == pytest.approx((changes["refitted_belief"] > 0).groupby(changes["seed"]).mean())


def test_signs_are_beside_what_one_finds_who_always_says_the_same(content):
    hurt = [point["measured"]["mean"] > 0 for point in content["threshold"]["points"]]
    share = max(np.mean(hurt), 1 - np.mean(hurt))
    notes = {row["id"]: row["note"] for row in content["claims"]}
    assert notes["G4"] == f"who always says that it hurts is right about {share:.3f}"
    assert notes["G5"] == "+0.05 with labels shuffled among sentences"
    assert {notes[name] for name in notes if name not in ("G4", "G5")} == {""}


def test_without_a_cosine_of_halves_the_others_are_judged():
    noisy = gradients_table().drop(columns="cosine_split")
    rows = {row["id"]: row for row in judged(chapter(gradients=noisy))}
    assert (rows["G5"]["verdict"], rows["G6"]["seeds"]) == ("not run", len(SEEDS))
    assert geometry.geometry_file(chapter(gradients=noisy))["threshold"]["zero_of_cosine"]


def test_what_was_not_run_is_not_run():
    rows = geometry.geometry_not_run(STUDY)
    assert [row["id"] for row in rows] == [f"G{number}" for number in range(1, 8)]
    assert {row["verdict"] for row in rows} == {"not run"}
    assert {row["note"] for row in rows} == {"make geometry"}


def test_a_published_model_has_no_starts_between():
    study = load_study("laptop")
    found = replace(chapter(), study=study)
    rows = {row["id"]: row for row in judged(found)}
    assert rows["G3"]["verdict"] == rows["G4"]["verdict"] == "not run"
    assert geometry.geometry_file(found)["threshold"] is None


def test_mu_is_the_largest_for_which_the_inequality_holds():
    mu = geometry.lojasiewicz(chapter())
    assert mu.to_numpy() == pytest.approx(0.2**2 / (2 * 0.22))


def test_sentences_have_the_words_of_their_verdicts(content):
    said = geometry.duration_sentence(content)
    assert "+0.100" in said
    assert "The SFT policy alone knew what such a start costs" in said
    dear = content | {"claims": judged(chapter(paths=paths_table(2.0)))}
    assert "did not know" in geometry.duration_sentence(dear)
    assert geometry.threshold_sentence(content).count("turns, by a straight line between starts, at") == 3
    assert "vacuous for all" in geometry.alignment_sentence(content)
    assert "for 24 of" not in geometry.alignment_sentence(content)
    says = geometry.policy_geometry(chapter(gradients=gradients_table(bound=0.7)))
    assert "says something" in geometry.alignment_sentence(content | {"policies": says})
    assert "at the base (" in geometry.alignment_sentence(content)
    noisy = gradients_table()
    noisy.loc[(noisy["policy"] == "sft") & (noisy["seed"] > 0), "cosine_split"] = np.nan
    hidden = {"policies": geometry.policy_geometry(chapter(gradients=noisy))}
    assert "hidden by noise at SFT's end (known in 1 of" in geometry.alignment_sentence(content | hidden)
    assert "hidden" not in geometry.alignment_sentence(content)
    poor = content["duration"] | {"free_share": None}
    assert "gained no reward" in geometry.duration_sentence(content | {"duration": poor})


def test_figures_are_drawn_and_titled_by_the_numbers(content):
    for figure, words in (
        (geometry_figures.draw_duration(content["duration"]), "17% of GRPO's gain"),
        (geometry_figures.draw_threshold(content["threshold"]), "At β = 1 RL lowers the SFT loss only beyond"),
        (geometry_figures.draw_alignment(content["policies"]), "same way"),
    ):
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert any(words in title for title in titles), titles
        plt.close(figure)


def test_the_story_says_that_the_last_stage_decides_where_it_does():
    alike = pd.Series({"sft": 0.38, "rl-sft": 0.39, "sft-rl": 0.6, "rl": 0.55})
    assert "comes last decides" in figures.title_of_story(alike)
    assert "comes last" not in figures.title_of_story(alike.replace(0.39, 0.5))


def test_the_story_needs_no_runs_beyond_the_main_ones():
    found = chapter()
    assert set(STATES) <= set(found.metrics["run"])
    figure = geometry_figures.draw_story(found)
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"base", "SFT", "SFT → RL", "RL"} <= said
    plt.close(figure)
