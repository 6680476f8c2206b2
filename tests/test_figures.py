"""What a figure says in words and bands, from entries made by hand."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from nondecoupling.analysis import figures, predictions, theory

PARTS = {"own_belief": 0.2, "perfect_learner": 0.3, "gap_to_own_belief": {"mean": 0.0, "ci95": None}}


def over(mean, half=0.05):
    return {"mean": mean, "ci95": [mean - half, mean + half]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_names_move_apart_and_keep_their_order():
    wanted, gaps = np.array([0.1, 0.11, 0.12, 0.9]), np.array([0.05, 0.1, 0.05])
    places = figures.moved_apart(wanted, gaps)
    assert (np.diff(places) >= gaps - 1e-12).all()
    assert places[-1] == pytest.approx(0.9)  # what is free stays where it is
    assert places[0] < 0.1 < places[2]  # the others move both ways
    assert figures.moved_apart([0.3], []).tolist() == [0.3]


def test_bands_are_the_tables_intervals():
    values = [0.1, 0.4, 0.2]
    path = pd.DataFrame({"run": "sft", "seed": range(3), "step": 1, "sft_loss": values})
    path = pd.concat([path, path.assign(step=9), path.assign(run="sft-rl"), path.assign(run="sft-rl", step=9)])
    _, axes = plt.subplots()
    figures.draw_stages(axes, path, "sft", "sft-rl", "sft_loss", "-")
    heights = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in axes.collections])
    bounds = stats.ttest_1samp(values, 0).confidence_interval()
    assert [heights.min(), heights.max()] == pytest.approx([bounds.low, bounds.high])


def test_one_seed_has_no_band():
    path = pd.DataFrame({"run": ["sft"] * 2 + ["sft-rl"] * 2, "seed": 0, "step": [0, 9] * 2, "sft_loss": [1, 2, 3, 4]})
    _, axes = plt.subplots()
    figures.draw_stages(axes, path, "sft", "sft-rl", "sft_loss", "-")
    assert all(np.isnan(band.get_paths()[0].vertices[:, 1]).all() for band in axes.collections if band.get_paths())


def claim(name, verdict, estimate=0.217, ci95=(0.1, 0.3), **more):
    return {"id": name, "verdict": verdict, "estimate": estimate, "ci95": list(ci95), **more}


def experiments(verdicts):
    """The picture of both experiments, of three seeds, whose claims have these verdicts."""
    stages = [("sft", 9), ("sft-rl", 4), ("rl", 4), ("rl-sft", 9)]
    paths = pd.DataFrame(
        {"run": run, "seed": seed, "step": step, "sft_loss": 0.5, "reward_exact": 0.4, "reward_greedy": 0.6}
        for run, steps in stages
        for seed in range(3)
        for step in (0, steps)
    )
    rows = [claim(name, verdict, predicted_from_policies=0.1) for name, verdict in verdicts.items()]
    return figures.draw_experiments(paths.assign(majority_reward=0.37), rows)


@pytest.mark.parametrize(
    ("verdicts", "titles"),
    [
        (("reproduced", "reproduced", "not reproduced"), ("raises", "sampled reward falls, greedy rises")),
        (("not reproduced", "inconclusive", "reproduced"), ("lowers", "sampled reward undecided, greedy falls")),
        (("inconclusive", "reproduced", "inconclusive"), ("may or may not", "sampled reward falls, greedy undecided")),
        (("not run", "inconclusive", "not run"), ("may or may not", "sampled reward undecided, greedy undecided")),
    ],
)
def test_the_picture_of_both_experiments_says_what_was_found(verdicts, titles):
    figure = experiments(dict(zip(("A1", "B2", "B3"), verdicts, strict=True)))
    for axes, title in zip(figure.axes, titles, strict=True):
        assert title in axes.get_title(loc="left")
    first, second = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert {"+0.217 nats\n[+0.100, +0.300]", "base model", "predicted,\nown belief"} <= set(first)
    levels = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert levels == pytest.approx([0.5, 0.6])  # the base's loss, and the loss after SFT with own belief's rise
    assert {"sampled answers\n+0.217\n[+0.100, +0.300]", "likelier answer\n+0.217\n[+0.100, +0.300]"} <= set(second)
    assert {"majority answer", "after SFT alone"} <= set(second)
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["base\nmodel", "after 9 steps\nof SFT", "after 4 steps\nof RL"]


def test_titles_follow_the_verdicts():
    rows = [claim(f"J1-{run}", verdict) for run, verdict in (("a", "confirmed"), ("b", "refuted"), ("c", "refuted"))]
    rows += [claim("J2-a", "confirmed")]
    expected = "Of 3 joint runs, 1 earn more than sequential ones at equal SFT loss, 2 less"
    assert figures.title_of_joint(rows) == expected
    assert figures.title_of_proxy(claim("K9", "confirmed", -0.1, (-0.2, -0.05))).startswith(
        "RL paid by a learnt reward earns less true reward: -0.100"
    )
    assert "is open" in figures.title_of_proxy(claim("K9", "inconclusive"))
    predicted = [claim("A1", "", predicted_from_policies=p) for p in (0.2, 0.4, None)]
    assert figures.title_of_claims(predicted).endswith("of 1 of 2 changes")
    entries = [
        {"beta": beta, "change_of_loss": {"gap_to_own_belief": over(gap)}} for beta, gap in ((1, 0.01), (0.1, -0.2))
    ]
    assert figures.title_of_sweep(entries).endswith("at β = 0.1")
    assert figures.title_of_sweep(entries[:1]).endswith("at any β")


def test_a_figure_says_in_words_what_is_in_it():
    figure, axes = plt.subplots()
    axes.plot([0, 1], label="measured")
    axes.set(xlabel="step", ylabel="SFT\nloss", title="It rises")
    axes.text(0, 0, "majority answer")
    assert figures.said_by(figure) == "It rises. SFT loss against step. measured, majority answer"


def test_who_pays_says_what_was_measured_at_both_ends():
    payers = [PARTS | {"measured": over(rise), "q": q, "share": 0.5} for q, rise in ((0.98, 0.04), (0.75, 0.31))]
    bins = [
        PARTS
        | {
            "low": 0.7,
            "high": 0.9,
            "share": 1.0,
            "ideal_shift": 2.0,
            "measured_shift": over(1.5),
            "measured": over(0.1),
        }
    ]
    tilt = {"run": "sft-rl", "slope": over(0.86), "cosine": over(0.8), "bins": bins}
    figure = figures.draw_who_pays(payers, tilt)
    title = figure.get_suptitle()
    assert "+0.04 nats where 2% of annotators disagree, by +0.31 where 25% do" in title
    assert "slope 0.86 [0.81, 0.91]" in figure.axes[1].get_title()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["2%\n(50%)", "25%\n(50%)"]


def test_the_crossing_says_how_many_seeds_cross():
    points = [PARTS | {"measured": over(y), "run": "x", "beta": b} for b, y in ((2.0, -0.1), (0.5, 0.1), (0.1, 0.4))]
    points.append(PARTS | {"measured": over(0.1), "run": "sft-rl", "beta": 0.5})
    found = {
        "points": points,
        "by_seed": [0.9, None, 0.7],
        "measured": over(0.8),
        "own_belief": 0.8,
        "perfect_learner": None,
    }
    assert "β* = 0.80 [0.75, 0.85] (2 of 3 seeds cross)" in figures.draw_crossing(found).axes[0].get_title()
    nowhere = found | {"measured": None, "by_seed": [None] * 3}
    assert "at no β" in figures.draw_crossing(nowhere).axes[0].get_title()


def test_levels_of_a_stage_are_means_over_the_sentences():
    path = pd.DataFrame({"step": [0, 9], "sft_loss": [0.6, 0.5], "reward_exact": 0.2, "reward_greedy": 0.3})
    path["majority_reward"] = 0.37
    known = pd.DataFrame({"truth": [1, 0], "agreement": [0.9, 0.6]})
    figures.draw_stage(path, ["sft_loss", "reward_exact"], predictions.best_possible(known))
    loss, reward = plt.gcf().axes
    dashed = [[line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] for axes in (loss, reward)]
    assert dashed[0] == pytest.approx([np.mean(theory.calibrated_loss([0.9, 0.6]))])
    assert dashed[1] == pytest.approx([0.37, (0.64 + 0.04) / 2, (0.8 + 0.2) / 2])


def test_text_in_a_policys_colour_can_be_read_on_white():
    def luminance(colour):
        channels = np.array(colour)
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for colour in figures.COLOURS.values():
        assert 1.05 / (luminance(figures.ink(colour)) + 0.05) > 4.5
    assert len({figures.ink(colour) for colour in figures.COLOURS.values()}) == len(figures.COLOURS)


def test_the_plane_names_every_policy_beside_it():
    ends = {"sft": (0.4, 0.5), "sft-rl": (0.6, 0.7), "rl": (0.6, 0.7), "rl-sft": (0.4, 0.5)}
    paths = pd.DataFrame(
        {"run": run, "seed": seed, "step": step, "sft_loss": loss, "reward_exact": reward}
        for run, (loss, reward) in ends.items()
        for seed in range(2)
        for step in (0, 9)
    )
    base = pd.Series({"sft_loss": 0.8, "reward_exact": 0.2, "majority_reward": 0.4})
    axes = figures.draw_plane(paths, base, {}).axes[0]
    assert {"base", "SFT", "SFT → RL", "RL", "RL → SFT", "majority answer"} <= {text.get_text() for text in axes.texts}
    assert "comes last decides" in axes.get_title(loc="left")
    assert axes.get_legend() is None


def test_a_portrait_has_its_panels_below_each_other_and_is_as_wide_as_a_phone():
    wide = experiments({"A1": "reproduced", "B2": "reproduced", "B3": "inconclusive"})
    rows = [
        {"id": name, "statement": "RL after SFT raises the loss more than as many further SFT steps", "margin": None,
         "quantity": quantity, "estimate": 0.2, "ci95": [0.1, 0.3], "predicted": 0.1, "predicted_from_policies": 0.15}
        for name, quantity in (("A1", "sft_loss: sft-rl - sft"), ("B1", "reward_exact: rl-sft - rl"))
    ]  # fmt: skip
    for figure in (wide, figures.draw_claims(rows)):
        before = figure.get_size_inches().tolist(), [axes.get_position().bounds for axes in figure.axes]
        tall = figures.portrait(figure)
        tall.canvas.draw()
        box = tall.get_tightbbox(tall.canvas.get_renderer())
        assert box.width < 1.05 * figures.PORTRAIT_WIDTH  # with every name and legend
        upper, lower = (axes.get_window_extent() for axes in tall.axes)
        assert lower.y1 < upper.y0
        assert (lower.x0, lower.x1) == pytest.approx((upper.x0, upper.x1))
        assert upper.width > 0.3 * tall.bbox.width  # names have not pushed the data out
        names = [label.get_window_extent() for label in tall.axes[0].get_yticklabels() if label.get_text()]
        assert not any(one.overlaps(other) for one, other in zip(names, names[1:], strict=False))
        assert before == (figure.get_size_inches().tolist(), [axes.get_position().bounds for axes in figure.axes])
