"""Figures of the geometry chapter: how long, when, along which directions, and the whole story in one plane."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nondecoupling.analysis.figures import (
    COLOURS,
    MEASURED,
    MIXED,
    OTHER,
    OWN,
    PERFECT,
    draw_mean,
    ink,
    label_ends,
    label_points,
    legend_below,
    title_of_story,
)
from nondecoupling.analysis.geometry import FREE, PATHS, ascent, while_rising
from nondecoupling.analysis.measures import temperature_curves
from nondecoupling.analysis.predictions import (
    FRONTIER_BETAS,
    frontier,
    known_agreement,
    measured_levels,
    own_frontier,
)
from nondecoupling.analysis.statistics import mean_interval
from nondecoupling.study.contracts import Duration, OverSeeds, PolicyGeometry, Threshold
from nondecoupling.study.plan import NAMES, SHARES
from nondecoupling.study.results import Results

SFT, RL = MEASURED, OTHER  # the two gradients
STORY = {"sft-rl-sft": "SFT → RL → SFT"} | MIXED


def draw_duration(duration: Duration) -> Figure:
    """What each unit of reward costs: rise of L against gain of J along both ascents, and as the start predicts it."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    columns = ("loss", "reward", "loss_second", "reward_second")
    points = pd.DataFrame(
        {"path": point["path"]} | {name: point[name]["mean"] for name in columns}  # type: ignore[literal-required]
        for point in duration["points"]
    )
    beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    styles = {"plain": (COLOURS["sft-rl"], "o"), "adam": (COLOURS["rl"], "s")}
    for path, (colour, mark) in styles.items():
        rows = points[points["path"] == path]
        axes.plot(rows["reward"], rows["loss"], color=colour, marker=mark, markersize=4, linewidth=2)
        axes.annotate(PATHS[path], rows[["reward", "loss"]].iloc[-1], (10, -4), color=ink(colour), **beside)
    rising = while_rising(points[points["path"] == "plain"])
    axes.plot(rising["reward_second"], rising["loss_second"], "--", color="0.35")
    axes.annotate(
        "second order", rising[["reward_second", "loss_second"]].iloc[-1], (-6, 2), color="0.35", ha="right", **beside
    )
    gain, rise = duration["gain_of_rl"], duration["rise_by_rl"]
    draw_mean(axes, gain["mean"], rise, color=COLOURS["sft-rl"], marker="*", markersize=14)
    axes.annotate("where GRPO ends", (gain["mean"], rise["mean"]), (10, -4), **beside)
    axes.axhline(FREE, color="0.6", linewidth=1, linestyle=":")
    share = duration["free_share"]
    said = f"Plain ascent has {share['mean']:.0%} of GRPO's gain for {FREE:g} nats" if share else "GRPO gained nothing"
    axes.set_title(said, loc="left", weight="bold")
    axes.set(xlabel="gain of reward since SFT", ylabel="rise of the SFT loss, nats")
    axes.set_xlim(right=1.5 * max(points["reward"].max(), gain["mean"]))
    return figure


def draw_threshold(threshold: Threshold) -> Figure:
    """Change of L by RL against how far SFT had come, measured and by refitted belief, a colour for each beta."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    points = threshold["points"]
    betas = sorted({point["beta"] for point in points})
    ends: dict[str, tuple[float, Any]] = {}
    for beta, colour in zip(betas, sns.color_palette("flare", len(betas))[::-1], strict=True):
        of_beta = [point for point in points if point["beta"] == beta]
        x = [point["distance"]["mean"] for point in of_beta]
        axes.plot(x, [point["refitted_belief"]["mean"] for point in of_beta], "--", color=colour, linewidth=1.2)
        axes.plot(x, [point["measured"]["mean"] for point in of_beta], color=colour, linewidth=2)
        for point in of_beta:
            draw_mean(axes, point["distance"]["mean"], point["measured"], color=colour, marker="o")
        ends[f"β = {beta:g}"] = of_beta[-1]["measured"]["mean"], colour
    axes.axhline(0, color="0.35", linewidth=1)
    axes.invert_xaxis()
    for start in dict.fromkeys(point["start"] for point in points):
        place = next(point["distance"]["mean"] for point in points if point["start"] == start)
        words = NAMES.get(start, f"{start.removeprefix('sft-')} %")
        axes.annotate(
            words,
            (place, 0),
            (0, -6),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            rotation=90,
            fontsize=8,
            color="0.35",
        )
    axes.tick_params(axis="x", pad=30)
    axes.set_title(title_of_threshold(threshold), loc="left", weight="bold", fontsize=11, pad=20)
    axes.text(0, 1.01, "dashed: predicted by refitted belief", fontsize=9, color="0.35", transform=axes.transAxes)
    axes.set(xlabel="L - L* where RL begins, nats (SFT goes to the right)", ylabel="change of the SFT loss by RL, nats")
    label_ends(axes, ends)
    return figure


def title_of_threshold(threshold: Threshold) -> str:
    """Where RL helps SFT, in words that follow from the numbers."""
    turning = [zero for zero in threshold["zeros"] if zero["measured"]]
    if turning:
        highest = max(turning, key=lambda zero: zero["beta"])
        least = highest["measured"]["mean"]  # type: ignore[index]
        return f"At β = {highest['beta']:g} RL lowers the SFT loss only beyond about {least:.1g} nats above the least"
    raised = [point["measured"]["mean"] > 0 for point in threshold["points"]]
    if all(raised):
        return "RL raises the SFT loss from every start"
    return "Where RL helps SFT depends on β" if any(raised) else "RL lowers the SFT loss from every start"


def draw_alignment(policies: list[PolicyGeometry]) -> Figure:
    """For each policy: how far both gradients agree, and how much of each is in the first directions of H."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.42 * len(policies) + 1.7), sharey=True)

    def dots(axes: Axes, name: str, colour: Any, mark: str, words: str) -> None:
        for place, policy in enumerate(policies):
            value: OverSeeds | None = policy["quantities"].get(name)
            if value:
                low, high = value["ci95"] or [value["mean"]] * 2
                axes.plot([low, high], [place, place], color=colour, linewidth=2)
                axes.plot(value["mean"], place, mark, color=colour, label=words if not place else None)

    dots(left, "cosine_split", MEASURED, "o", "measured")
    dots(left, "cosine_shuffled", "0.6", "d", "labels shuffled")
    left.axvline(0, color="0.35", linewidth=1)
    left.set(xlim=(-1.05, 1.05), xlabel="cosine of -∇L and ∇J")
    left.set_title("Do SFT and RL pull the same way?", loc="left", weight="bold", fontsize=11)
    dots(right, "loss_top_10", SFT, "o", "SFT's gradient")
    dots(right, "reward_top_10", RL, "s", "RL's gradient")
    right.set(xlim=(0, 1.05), xlabel="share in the first 10 eigenvectors of H")
    right.set_title("On or off the principal directions?", loc="left", weight="bold", fontsize=11)
    words = {f"sft-{share}": f"SFT, {share} % of its steps" for share in SHARES} | NAMES
    left.set_yticks(range(len(policies)), [words.get(policy["policy"], policy["policy"]) for policy in policies])
    left.set_ylim(len(policies) - 0.5, -0.5)
    for axes in (left, right):
        legend_below(axes, 2)
    return figure


def draw_story(results: Results) -> Figure:
    """The whole story in one plane: every policy by its SFT loss and its reward, with the edges that bound them.

    All on the two labels of dev as given, means over seeds; lines are 95 % intervals in both directions.
    """
    figure, axes = plt.subplots(figsize=(8.5, 5.6))
    runs = [run for run in (*NAMES, *STORY) if results.has(run)]
    levels = measured_levels(results, *runs)
    q, labels = known_agreement(results), {}
    if q is not None:
        edge = frontier(q, np.geomspace(1e-3, 1e3, 400))
        axes.plot(edge["sft_loss"], edge["reward"], color=PERFECT, linewidth=5, alpha=0.4, zorder=0)
    own = own_frontier(results, FRONTIER_BETAS)
    axes.plot(own["sft_loss"], own["reward"], color=OWN, linewidth=5, alpha=0.35, zorder=0)
    tempered = sum(temperature_curves(results, "sft")) / len(results.seeds)
    sharper = tempered[tempered["temperature"] <= 1]
    axes.plot(sharper["sft_loss"], sharper["reward"], ":", color="0.3", zorder=1)
    for run in runs:
        rows = levels[levels["run"] == run]
        loss, reward = (mean_interval(rows[column]) for column in ("loss", "reward"))
        colour = COLOURS.get(run, "0.4")
        spread = {"capsize": 0, "color": colour, "linewidth": 1.2}
        axes.errorbar(
            loss.mean,
            reward.mean,
            yerr=reward.high - reward.mean,
            xerr=loss.high - loss.mean,
            marker="o" if run in NAMES else "D",
            markersize=9 if run in NAMES else 5,
            zorder=3,
            **spread,
        )
        labels[NAMES.get(run, STORY.get(run, run))] = loss.mean, reward.mean, colour
    if len(results.paths):
        paths = [ascent(results, "plain", seed) for seed in results.seeds]
        start = levels[levels["run"] == "sft"][["loss", "reward"]].mean()
        way = sum(path[["loss", "reward"]] for path in paths) / len(paths) + start
        axes.plot(way["loss"], way["reward"], color=COLOURS["sft-rl"], linewidth=1.5, zorder=2)
    highest = levels.groupby("run")["loss"].mean().max()
    axes.set(xlim=(levels["loss"].min() - 0.03, highest + 0.08), ylim=(levels["reward"].min() - 0.05, None))
    axes.set(xlabel="SFT loss on dev, nats (left is better)", ylabel="reward of sampled answers (up is better)")
    axes.set_title(title_of_story(levels.groupby("run")["loss"].mean()), loc="left", weight="bold", fontsize=11)
    known = edge.iloc[(edge["sft_loss"] - axes.get_xlim()[1]).abs().argmin()] if q is not None else None
    if known is not None:
        labels["knows the truth"] = known["sft_loss"], known["reward"], "0.45"
    label_points(axes, labels)
    return figure
