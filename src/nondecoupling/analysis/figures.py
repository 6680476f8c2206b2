"""One function per figure, in seaborn's colour-blind palette; reference lines are labelled in place."""

import colorsys
import pickle
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike
from statsmodels.stats.proportion import proportion_confint

from nondecoupling.analysis import theory
from nondecoupling.analysis.predictions import frontier, ideal_path, label_policy, labels_given
from nondecoupling.analysis.statistics import mean_interval
from nondecoupling.analysis.verdicts import interval_text, shown
from nondecoupling.analysis.wording import in_words
from nondecoupling.study.contracts import Change, ClaimRow, Crossing, OverSeeds, Payer, SweepEntry, Tilt
from nondecoupling.study.plan import NAMES, WEIGHTS
from nondecoupling.study.results import Results

COLOURS = dict(zip(NAMES, sns.color_palette("colorblind", len(NAMES)), strict=True))
CHANGES: dict[Literal["change_of_loss", "change_of_reward"], str] = {
    "change_of_loss": "rise of the SFT loss by RL, nats",
    "change_of_reward": "gain of reward by RL",
}
PORTRAIT = "portrait"  # the folder, beside a figure, of its copy for a phone
PORTRAIT_WIDTH, LINE = (
    4.6,
    40,
)  # inches and letters: text of 9 points is some ten pixels high on a screen 358 pixels wide
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}  # legends under axes
LABEL_GAP = 0.05  # of the height of the axes
MIXED = {"interleaved": "by turns"} | {f"joint-m{weight}": f"joint, μ = {weight}" for weight in WEIGHTS}
MEASURED, _, OWN, OTHER = sns.color_palette("colorblind")[:4]  # OTHER is measured, too, in a second way
PERFECT = "0.55"
PREDICTED: dict[Literal["perfect_learner", "own_belief"], tuple[str, Any]] = {
    "perfect_learner": ("perfect learner", PERFECT),
    "own_belief": ("own belief", OWN),
}


def set_style() -> None:
    """Readable text, light grid, vector text kept as text (in PDF as TrueType, which journals want).

    In a notebook each figure also says in words what is in it, to those who do not see it.
    """
    vector = {"svg.fonttype": "none", "svg.hashsalt": "nondecoupling", "pdf.fonttype": 42}
    sns.set_theme(style="whitegrid", context="notebook", rc={**vector, "figure.dpi": 100})
    if shell := get_ipython():
        bundles = shell.display_formatter.mimebundle_formatter
        bundles.for_type(Figure, lambda figure, **_: ({}, {"image/png": {"alt": said_by(figure)}}))


def said_by(figure: Figure) -> str:
    """The words of ``figure``: its title, and of each panel the title, the axes, the legend and what stands in it."""
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        said += [axes.get_title(loc=side) for side in ("left", "center", "right")]
        said += [" against ".join(filter(None, [axes.get_ylabel(), axes.get_xlabel()]))]
        inside = [*axes.get_legend_handles_labels()[1], *(text.get_text() for text in axes.texts)]
        said += [", ".join(dict.fromkeys(filter(None, inside)))]
    return ". ".join(dict.fromkeys(" ".join(words.split()) for words in said if words))


def portrait(figure: Figure) -> Figure:
    """A copy of ``figure`` for a phone: panels side by side come below each other, and long words go on in a new line.

    Close it when it is saved: pyplot would show it.
    """
    tall: Figure = pickle.loads(pickle.dumps(figure))
    panels, (_, height) = tall.axes, figure.get_size_inches()
    rows, columns = panels[0].get_gridspec().get_geometry()  # type: ignore[union-attr]
    if columns > rows:
        grid = tall.add_gridspec(columns, rows)
        for place, axes in enumerate(panels):
            axes.set_subplotspec(grid[place % columns, place // columns])
            axes.tick_params(labelleft=True, labelbottom=True)
        height *= columns / rows
    tall.set_layout_engine("constrained")
    legends = [(tall, legend) for legend in tall.legends] + [(axes, axes.get_legend()) for axes in panels]
    for owner, legend in legends:
        if legend:
            below: dict[str, Any] = {"loc": "outside lower center"} if owner is tall else BELOW
            marks: list[Any] = legend.legend_handles
            legend.remove()
            owner.legend(marks, [text.get_text() for text in legend.get_texts()], fontsize=9, frameon=False, **below)
    for text in tall.findobj(Text):
        if len(words := text.get_text()) > LINE and "\n" not in words:  # type: ignore[attr-defined]
            text.set_text(textwrap.fill(words, LINE))  # type: ignore[attr-defined]
    for axes in panels:
        axes.tick_params(labelsize=9)
        names = [textwrap.fill(label.get_text(), LINE // 2 + 4) for label in axes.get_yticklabels()]
        if any("\n" in name for name in names):
            axes.set_yticks(axes.get_yticks(), names)
            height += 0.3 * len(names)
    tall.set_size_inches(PORTRAIT_WIDTH, height)
    return tall


def save_figure(results: Results, figure: Figure, name: str) -> None:
    """Write ``figure`` beside the study's own tables as PNG, SVG and PDF, and for a phone; the reference is left alone.

    The same numbers give the same files, so there are no times in them.
    """
    if not results.own:
        return
    folder = results.folder / "figures"
    (folder / PORTRAIT).mkdir(parents=True, exist_ok=True)
    for ending, undated in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        figure.savefig(folder / f"{name}.{ending}", bbox_inches="tight", dpi=150, metadata=undated)
    tall = portrait(figure)
    tall.savefig(folder / PORTRAIT / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(tall)


def ink(colour: Any) -> Any:
    """``colour`` as dark as text of that colour must be to be read on white (4.5 to 1)."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return colorsys.hls_to_rgb(hue, min(lightness, 0.25), saturation)


def t_bounds(values: pd.Series) -> tuple[float, float]:
    """The ends of a band: the 95 % t interval over seeds, as in the tables."""
    interval = mean_interval(values)
    return interval.low, interval.high


def draw_mean(axes: Axes, x: float, y: OverSeeds, **style) -> None:
    """One mean over seeds with its 95 % interval."""
    low, high = y["ci95"] or [y["mean"]] * 2
    axes.errorbar(x, y["mean"], [[y["mean"] - low], [high - y["mean"]]], capsize=3, **{"color": MEASURED, **style})


def draw_predicted(
    axes: Axes, changes: Sequence[tuple[float, Change]], legend: bool = False, **style
) -> dict[str, tuple[float, Any]]:
    """What was predicted of ``changes``, each at its x, a curve for each kind that is known; ends for `label_ends`."""
    ends: dict[str, tuple[float, Any]] = {}
    for kind, (words, colour) in PREDICTED.items():
        known = [(x, change[kind]) for x, change in changes if change[kind] is not None]
        if known:
            label = f"predicted: {words}" if legend else None
            axes.plot(*zip(*known, strict=True), color=colour, label=label, **style)
            ends[words] = known[-1][1], colour  # type: ignore[assignment]
    return ends


def moved_apart(wanted: ArrayLike, gaps: ArrayLike) -> np.ndarray:
    """Places (n,) in the order of the ascending ``wanted``, neighbours no closer than ``gaps`` (n - 1,)."""
    steps = np.concatenate([[0], np.cumsum(gaps)])
    free = np.asarray(wanted) - steps
    upwards, downwards = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return (upwards + downwards) / 2 + steps  # the mean of both keeps the gaps


def label_ends(axes: Axes, ends: dict[str, tuple[float, Any]]) -> None:
    """Names of curves at their right ends, from the value and the colour of each; moved apart. Call it last."""
    names = sorted(ends, key=lambda name: ends[name][0])
    to_axes, right = axes.transAxes.inverted().transform, axes.get_xlim()[1]
    wanted = [to_axes(axes.transData.transform((right, ends[name][0])))[1] for name in names]
    halves = np.array([0.034 + 0.024 * name.count("\n") for name in names])
    for name, place in zip(names, moved_apart(wanted, halves[1:] + halves[:-1]), strict=True):
        axes.text(1.02, place, name, color=ink(ends[name][1]), transform=axes.transAxes, va="center", fontsize=9)


def label_points(axes: Axes, points: dict[str, tuple[float, float, Any]]) -> None:
    """Names of points (x, y, colour) in a column at the right, each with a thin line to its point. Call it last."""
    names = sorted(points, key=lambda name: points[name][1])
    to_axes = axes.transAxes.inverted().transform
    wanted = [to_axes(axes.transData.transform(points[name][:2]))[1] for name in names]
    for name, place in zip(names, moved_apart(wanted, [LABEL_GAP] * (len(names) - 1)), strict=True):
        x, y, colour = points[name]
        line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
        axes.annotate(
            name,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            color=ink(colour),
            va="center",
            fontsize=9,
            arrowprops=line,
        )


def title_of_story(loss: pd.Series) -> str:
    """Whether the last stage decides where a policy ends, by the mean losses of the policies of both experiments."""
    ends_alike = max(abs(loss["rl-sft"] - loss["sft"]), abs(loss["sft-rl"] - loss["rl"]))
    apart = abs(min(loss["rl"], loss["sft-rl"]) - max(loss["sft"], loss["rl-sft"]))
    if ends_alike < apart:
        return "Whatever comes last decides where on the way from calibrated to sharp"
    return "Where each order of stages ends, between calibrated and sharp"


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the axes, where it covers nothing whatever the numbers are."""
    axes.legend(ncols=columns, fontsize=9, frameon=False, **BELOW)


def draw_stage(trajectory: pd.DataFrame, quantities: list[str], best: dict[str, float]) -> None:
    """One stage's ``quantities`` along its steps, in panels; ``best`` is `predictions.best_possible` of the sentences.

    Dashed are, for the loss, the best possible; for rewards the majority answer, the calibrated policy (sampled answers
    only) and the sharp one. Where nobody knows what annotators say there is the majority answer alone.
    """
    majority = trajectory["majority_reward"].iloc[0]
    levels = {name: {"majority answer": majority} for name in ("reward_exact", "reward_greedy")}
    if best:
        levels["sft_loss"] = {"best possible": best["loss"]}
        levels["reward_exact"] |= {"calibrated": best["reward"], "sharp": best["greedy"]}
        levels["reward_greedy"] |= {"sharp": best["greedy"]}
    figure, panels = plt.subplots(1, len(quantities), figsize=(2.7 * len(quantities), 2.8), layout="constrained")
    for axes, name in zip(np.atleast_1d(panels), quantities, strict=True):
        axes.plot(trajectory["step"], trajectory[name], marker="o", markersize=4, color=MEASURED)
        axes.set(title=in_words(name), xlabel="step")
        for words, level in levels.get(name, {}).items():
            axes.axhline(level, color="0.4", linestyle="--", linewidth=1)
            place = trajectory["step"].max(), level
            axes.annotate(words, place, (0, 2), textcoords="offset points", ha="right", fontsize=8, color="0.3")


def title_of_loss(row: ClaimRow) -> str:
    """What RL after SFT does to the SFT loss, by the verdict of A1."""
    does = {"reproduced": "raises", "not reproduced": "lowers"}.get(row["verdict"], "may or may not raise")
    return f"RL after SFT {does} the SFT loss"


def title_of_reward(sampled: ClaimRow, greedy: ClaimRow) -> str:
    """What SFT after RL does to the reward, by the verdicts of B2 and B3."""
    moves = {"reproduced": "falls", "not reproduced": "rises"}
    of_sampled, of_greedy = (moves.get(row["verdict"], "undecided") for row in (sampled, greedy))
    return f"SFT after RL: sampled reward {of_sampled}, greedy {of_greedy}"


def effect_of(row: ClaimRow, unit: str = "") -> str:
    """The change of a claim and, on a line below it, its interval."""
    mean, _, interval = interval_text(row["estimate"], row["ci95"]).partition(" ")
    return f"{mean}{unit}\n{interval}".rstrip()


def draw_stages(axes: Axes, trajectories: pd.DataFrame, first: str, second: str, metric: str, linestyle: str) -> None:
    """Mean and 95 % interval of ``metric`` along two stages, each drawn as wide as the other."""
    for place, run in enumerate((first, second)):
        part = trajectories[trajectories["run"] == run]
        part = part.assign(at=place + part["step"] / part["step"].max())
        sns.lineplot(
            part, x="at", y=metric, color=COLOURS[run], errorbar=t_bounds, ax=axes, marker="o", markersize=5,
            markeredgewidth=0, linewidth=2.2, linestyle=linestyle, err_kws={"alpha": 0.18, "linewidth": 0},
        )  # fmt: skip


def draw_experiments(trajectories: pd.DataFrame, rows: list[ClaimRow]) -> Figure:
    """Both experiments side by side, labelled in place; titles and numbers are those of the claims' ``rows``.

    Dotted are what each end is to be compared with: the base's loss and what own belief predicts, the reward of the
    majority answer and of the end of SFT alone.
    """
    row = {claim["id"]: claim for claim in rows}
    last = trajectories[trajectories["step"] == trajectories.groupby("run")["step"].transform("max")]
    end = last.groupby("run")[["sft_loss", "reward_exact", "reward_greedy"]].mean()
    base = trajectories[(trajectories["run"] == "sft") & (trajectories["step"] == 0)]
    start = base[["sft_loss", "majority_reward"]].mean()
    levels = {"sft": {"base model": (start["sft_loss"], "0.35")}}
    levels["rl"] = {"majority answer": (start["majority_reward"], "0.35")}
    levels["rl"]["after SFT alone"] = end.loc["sft", "reward_exact"], COLOURS["sft"]
    if (predicted := row["A1"]["predicted_from_policies"]) is not None:
        levels["sft"]["predicted,\nown belief"] = end.loc["sft", "sft_loss"] + predicted, "0.35"
    panels = {
        f"A   {title_of_loss(row['A1'])}": ("sft", "sft-rl", {"sft_loss": ("-", "", "A1", " nats")}),
        f"B   {title_of_reward(row['B2'], row['B3'])}": (
            "rl",
            "rl-sft",
            {
                "reward_greedy": ("--", "likelier answer\n", "B3", ""),
                "reward_exact": ("-", "sampled answers\n", "B2", ""),
            },
        ),
    }
    figure, both = plt.subplots(1, 2, figsize=(13, 4.2), gridspec_kw={"wspace": 0.48})
    for axes, (title, (first, second, curves)) in zip(both, panels.items(), strict=True):
        ends = {}
        for metric, (linestyle, words, claim, unit) in curves.items():
            draw_stages(axes, trajectories, first, second, metric, linestyle)
            ends[f"{words}{effect_of(row[claim], unit)}"] = end.loc[second, metric], COLOURS[second]
        steps = [int(trajectories.loc[trajectories["run"] == run, "step"].max()) for run in (first, second)]
        names = [NAMES[first], NAMES[second].rpartition(" ")[2]]
        after = [f"after {count} steps\nof {name}" for count, name in zip(steps, names, strict=True)]
        axes.set_xticks([0, 1, 2], ["base\nmodel", *after])
        axes.set(xlabel="", xlim=(-0.03, 2.03), ylabel="SFT loss on dev, nats" if first == "sft" else "reward on dev")
        axes.axvline(1, color="0.6", linewidth=1)
        axes.grid(visible=False, axis="x")
        axes.set_title(title, loc="left", weight="bold", pad=26, fontsize=12)
        for place, (run, name) in enumerate(zip((first, second), (names[0], f"then {names[1]}"), strict=True)):
            axes.text(
                place + 0.5,
                1.03,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                weight="bold",
                color=ink(COLOURS[run]),
            )
        for level, colour in levels[first].values():
            axes.axhline(level, color=colour, linestyle=":", linewidth=1.4)
        label_ends(axes, ends | levels[first])
    return figure


def draw_plane(trajectories: pd.DataFrame, base: pd.Series, frontiers: dict[str, pd.DataFrame]) -> Figure:
    """Both pipelines as paths in the (SFT loss, sampled reward) plane; each mark is a mean over seeds.

    ``base`` has the means of the trajectories' columns at the start; ``frontiers`` maps a label to columns ``sft_loss,
    reward``: what RL's closed form traces as beta falls.
    """
    figure, axes = plt.subplots(figsize=(8, 5.4))
    names: dict[str, tuple[float, float, Any]] = {}
    for (label, curve), shade in zip(frontiers.items(), ("0.35", "0.7"), strict=False):
        axes.plot(curve["sft_loss"], curve["reward"], color=shade, linewidth=6, alpha=0.35, zorder=0)
        sharpest = curve.loc[curve["sft_loss"].idxmax()]
        names[label] = sharpest["sft_loss"], sharpest["reward"], shade
    mean = trajectories.groupby(["run", "step"], as_index=False)[["sft_loss", "reward_exact"]].mean()
    axes.plot(base["sft_loss"], base["reward_exact"], "s", color=COLOURS["base"], markersize=9)
    names[NAMES["base"]] = base["sft_loss"], base["reward_exact"], COLOURS["base"]
    arrow = {"arrowstyle": "-|>", "linewidth": 2.4, "shrinkA": 4, "shrinkB": 2}
    for run in ("sft", "sft-rl", "rl", "rl-sft"):
        path = mean.loc[mean["run"] == run, ["sft_loss", "reward_exact"]]
        start, end = path.iloc[0], path.iloc[-1]
        axes.plot(*path.T.to_numpy(), color=COLOURS[run], marker="o", markersize=3, linewidth=1, alpha=0.6)
        axes.annotate("", tuple(end), tuple(start), arrowprops=arrow | {"color": COLOURS[run]})
        axes.plot(*end, "o", color=COLOURS[run], markersize=9, markeredgecolor="white")
        names[NAMES[run]] = *end, COLOURS[run]
    axes.axhline(base["majority_reward"], color="0.45", linestyle=":", linewidth=1.2, zorder=0)
    names["majority answer"] = axes.get_xlim()[1], base["majority_reward"], "0.35"
    axes.set(xlabel="SFT loss on dev, nats per response (left is better)")
    axes.set(ylabel="reward of sampled answers on dev (up is better)")
    last = mean.groupby("run")["sft_loss"].last()
    axes.set_title(title_of_story(last), loc="left", weight="bold", fontsize=11)
    label_points(axes, names)
    return figure


def draw_calibration(answers: dict[str, pd.DataFrame], levels: list[float]) -> Figure:
    """How sure each policy is, and how right that is.

    Above: histograms of p(acceptable), with ``levels`` (what calibrated answers would be) as dotted lines. Below: the
    share of sentences labelled acceptable against p(acceptable), in ten bins with their 95 % intervals over sentences;
    the diagonal is calibration.
    ``answers`` maps runs to the pooled answers of all seeds.
    """
    figure, axes = plt.subplots(2, len(answers), figsize=(2.1 * len(answers), 4.6), sharex=True, sharey="row")
    bins = np.linspace(0, 1, 11)
    for (run, table), (above, below) in zip(answers.items(), axes.T, strict=True):
        p = pd.Series(np.exp(label_policy(table)[:, -1]))
        sns.histplot(x=p, bins=np.linspace(0, 1, 21), stat="probability", color=COLOURS[run], ax=above)
        above.set(xlabel="", ylabel="")
        above.set_title(NAMES[run], color=ink(COLOURS[run]), weight="bold")
        for level in levels:
            above.axvline(level, color="0.25", linestyle=":")
        if levels and above is axes[0, 0]:
            text = above.text(0.5, 0.95, "dotted:\na perfect\nlearner", fontsize=8, color="0.25", ha="center", va="top")
            text.set(transform=above.transAxes, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        groups = pd.DataFrame({"p": p, "label": labels_given(table)[:, -1] == 0}).groupby(
            pd.cut(p, bins, include_lowest=True), observed=True
        )
        points = groups.agg(p=("p", "mean"), share=("label", "mean"), n=("label", "size"))
        below.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        low, high = proportion_confint((points["share"] * points["n"]).round(), points["n"], method="wilson")
        below.vlines(points["p"], low, high, color=COLOURS[run], linewidth=1.4)
        below.scatter(
            points["p"], points["share"], s=8 + 400 * points["n"] / len(p), color=COLOURS[run], alpha=0.8, clip_on=False
        )
        below.set(xlabel="p(acceptable)", xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
    axes[0, 0].set_ylabel("share of sentences")
    axes[1, 0].set_ylabel("labelled acceptable")
    figure.tight_layout()
    return figure


def title_of_claims(rows: list[ClaimRow]) -> str:
    """How often a measured interval holds what own belief predicted, of those ``rows`` that have both."""
    both = [(row["predicted_from_policies"], row["ci95"]) for row in rows]
    held = [low <= predicted <= high for predicted, (low, high) in ((p, ci) for p, ci in both if p is not None and ci)]
    if not held:
        return "What was measured; nothing was predicted from the policies"
    return f"Own belief is within the measured interval of {sum(held)} of {len(held)} changes"


def draw_claims(rows: list[ClaimRow]) -> Figure:
    """Each claim's change as measured, with its 95 % interval over seeds, beside what was predicted, a line each.

    ``rows`` are those whose quantity is a difference of losses (nats) or of rewards, which have axes of their own; what
    was not run is left out.
    """
    rows = [row for row in rows if row["estimate"] is not None]
    losses = [row for row in rows if row["quantity"].startswith("sft_loss")]
    of_unit = {
        "change of the SFT loss, nats per response": losses,
        "change of the reward": [row for row in rows if row not in losses],
    }
    units = {unit: part for unit, part in of_unit.items() if part}
    heights = [len(part) + 1 for part in units.values()]
    size = 8, 0.5 * sum(heights) + 1.5
    figure, panels = plt.subplots(len(units), figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    for axes, (unit, part) in zip(panels[:, 0], units.items(), strict=True):
        draw_changes(axes, part)
        axes.set_xlabel(unit)
    figure.suptitle(title_of_claims(rows), weight="bold", fontsize=12)
    known = {words: mark for axes in figure.axes for mark, words in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def draw_changes(axes: Axes, rows: list[ClaimRow]) -> None:
    """The lines of `draw_claims` for rows of one unit."""
    marks = (
        ("predicted", "d", PERFECT, "predicted, perfect learner"),
        ("predicted_from_policies", "D", OWN, "predicted, own belief"),
        ("estimate", "o", MEASURED, "measured, 95 % interval"),
    )
    for key, mark, colour, words in marks:
        points = [(row[key], place) for place, row in enumerate(rows) if row[key] is not None]  # type: ignore[literal-required]
        if points:
            x, y = zip(*points, strict=True)
            face = colour if key == "estimate" else "none"
            style: dict[str, Any] = {"marker": mark, "facecolor": face, "edgecolor": colour, "linewidth": 1.6}
            axes.scatter(x, y, s=80, label=words, zorder=3, **style)
    for place, row in enumerate(rows):
        if row["ci95"]:
            axes.plot(row["ci95"], [place, place], color=MEASURED, linewidth=2.4)
    axes.axvline(0, color="0.35", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [f"{row['id']}: {row['statement']}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def title_of_proxy(row: ClaimRow) -> str:
    """What the learnt reward cost, by the verdict of K9, with its number."""
    says = {"confirmed": "RL paid by a learnt reward earns less true reward"}
    says["refuted"] = "RL paid by a learnt reward earns more true reward"
    words = says.get(row["verdict"], "Whether RL paid by a learnt reward earns less true reward is open")
    return f"{words}: {interval_text(row['estimate'], row['ci95'])}"


def draw_proxy(trajectories: pd.DataFrame, majority: float, row: ClaimRow) -> Figure:
    """True reward, and rise of the proxy's score, along RL paid by either; means and 95 % intervals over seeds.

    The zero of a proxy's scores is arbitrary and differs between seeds, so that only their rise can be compared.
    ``row`` is K9's, the claim about both.
    """
    figure, (true, proxy) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    table = trajectories.sort_values("step")
    table = table.assign(rise=table["reward_proxy"] - table.groupby(["run", "seed"])["reward_proxy"].transform("first"))
    rises: dict[str, tuple[float, Any]] = {}
    for run in ("rl", "sft-rl"):
        for name, line in ((run, "-"), (f"{run}-proxy", "--")):
            part = table[table["run"] == name]
            style = {"x": "step", "color": COLOURS[run], "linestyle": line, "errorbar": t_bounds}
            payer = "the truth" if line == "-" else "the proxy"
            sns.lineplot(part, y="reward_exact", ax=true, label=f"{NAMES[run]}, paid by {payer}", **style)
            if line == "--":
                sns.lineplot(part.dropna(subset="rise"), y="rise", ax=proxy, **style)
                rises[NAMES[run]] = part.loc[part["step"] == part["step"].max(), "rise"].mean(), COLOURS[run]
    true.set(xlabel="RL steps", ylabel="true reward of sampled answers", title="What is meant")
    proxy.set(xlabel="RL steps", ylabel="rise of the proxy's mean score", title="What is paid")
    true.axhline(majority, color="0.35", linestyle=":", linewidth=1.4)
    place = table.loc[table["run"] == "rl", "step"].max(), majority
    true.annotate("majority answer", place, (0, 4), textcoords="offset points", ha="right", fontsize=9, color="0.25")
    legend_below(true, 2)
    label_ends(proxy, rises)
    figure.suptitle(title_of_proxy(row), weight="bold", fontsize=12)
    return figure


def title_of_joint(rows: list[ClaimRow]) -> str:
    """How many joint runs were shown to earn more, and less, than sequential ones at equal loss: verdicts of J1."""
    verdicts = [row["verdict"] for row in rows if row["id"].startswith("J1-")]
    more, less = (verdicts.count(verdict) for verdict in ("confirmed", "refuted"))
    return f"Of {len(verdicts)} joint runs, {more} earn more than sequential ones at equal SFT loss, {less} less"


def draw_joint(
    metrics: pd.DataFrame, joint: list[str], frontiers: dict[str, pd.DataFrame], rows: list[ClaimRow]
) -> Figure:
    """Where joint, interleaved and sequential training end in the (SFT loss, sampled reward) plane.

    Small marks are seeds, large ones means. ``frontiers`` maps a label to columns ``sft_loss, reward``; ``rows`` are
    those of joint training.
    """
    figure, axes = plt.subplots(figsize=(8, 5.4))
    names: dict[str, tuple[float, float, Any]] = {}
    mixed = sns.color_palette("flare", len(joint))
    marks = {run: (COLOURS[run], "*", NAMES[run]) for run in ("sft", "sft-rl", "rl", "rl-sft")}
    marks |= {
        run: (colour, "X" if run == "interleaved" else "o", MIXED[run])
        for run, colour in zip(joint, mixed, strict=True)
    }
    for run, (colour, mark, name) in marks.items():
        ends = metrics[metrics["run"] == run]
        axes.plot(ends["sft_loss"], ends["reward_exact"], mark, color=colour, markersize=4, alpha=0.5)
        middle = ends[["sft_loss", "reward_exact"]].mean()
        axes.plot(*middle, mark, color=colour, markersize=12, markeredgecolor="white")
        names[name] = *middle, colour
    lowest = metrics.loc[metrics["run"].isin(marks), "reward_exact"].min() - 0.05
    for (label, curve), style in zip(frontiers.items(), ("-", "--"), strict=True):
        axes.plot(curve["sft_loss"], curve["reward"], color="0.55", linestyle=style, linewidth=2, label=label, zorder=0)
        start = curve[curve["reward"] > lowest].iloc[-1]  # from sharp to soft
        names[label] = start["sft_loss"], start["reward"], "0.35"
    axes.set(
        xlabel="SFT loss on dev, nats per response (left is better)",
        ylabel="reward of sampled answers on dev (up is better)",
        ylim=(lowest, None),  # temperature curves go on below
    )
    axes.set_title(title_of_joint(rows), loc="left", weight="bold", fontsize=11)
    label_points(axes, names)
    return figure


def draw_frontier(axes: Axes, q: ArrayLike, beta: float) -> None:
    """The plane of the two stages' goals for two labels, the likelier with probability ``q``, one or one per sentence.

    No policy crosses the frontier. On it SFT's optimum; on it, or with several q close to it, ideal RL at ``beta`` from
    there. Off it, because it is no single policy: the loss of SFT's optimum with the reward of its greedy answers.
    """
    functions = (theory.calibrated_loss, theory.calibrated_reward, theory.sharp_reward)
    level, low, high = (float(np.mean(f(q))) for f in functions)
    loss, reward = ideal_path(q, [beta]).iloc[0]
    width, height = max(2.6 * (loss - level), 0.1), max(high - low, 0.02)
    left, bottom, top = level - 0.3 * width, low - 0.4 * height, high + 0.2 * height
    best = frontier(q, np.logspace(-3, 4, 600))
    border = [level, *best["sft_loss"], 1e3], [bottom, *best["reward"], high]
    axes.fill_between(*border, top, color="0.93", zorder=0)
    axes.axvspan(left, level, color="0.93", zorder=0)
    axes.text(left + 0.03 * width, low + 0.2 * height, "no policy\nis here", color="0.45", style="italic", fontsize=10)
    axes.plot(best["sft_loss"], best["reward"], color="0.25", linewidth=1.5)
    path = ideal_path(q, np.geomspace(1e3, beta, 300))
    axes.plot(path["sft_loss"], path["reward"], color=COLOURS["sft-rl"], linewidth=5, alpha=0.6)
    for b in (2, 1, 0.5, 0.25, 0.1):
        x, y = ideal_path(q, [b]).iloc[0]
        if abs(np.log(b / beta)) > 0.1 and x < level + 0.9 * width:
            axes.plot(x, y, "o", color="0.25", markersize=4)
            axes.annotate(f"β = {b:g}", (x, y), (6, -13), textcoords="offset points", fontsize=9)
    style = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 8, "shrinkB": 8, "connectionstyle": "arc3,rad=-0.3"}
    axes.annotate("", (level, low), (loss, reward), arrowprops=style | {"color": COLOURS["sft"]})
    axes.plot([level] * 2, [low, high], ":", color="0.3", linewidth=1.5)
    axes.plot(level, low, "o", color=COLOURS["sft"], markersize=11, label="SFT's optimum: calibrated")
    axes.plot(level, high, "*", color="0.3", markersize=16, label="its greedy answers")
    name = f"ideal RL from there, β = {beta:g}:\nJ {reward - low:+.3f} at L {loss - level:+.3f} nats"
    axes.plot(loss, reward, "s", color=COLOURS["sft-rl"], markersize=10, label=name)
    for text, (x, y), colour in (
        ("RL", (level + 0.35 * (loss - level), low + 0.55 * height), COLOURS["sft-rl"]),
        ("SFT", (loss, low + 0.5 * height), COLOURS["sft"]),
        ("decoding ", (level, low + 0.75 * height), "0.3"),
    ):
        side = "right" if text.endswith(" ") else "left"
        axes.text(x, y, text, color=ink(colour), weight="bold", ha=side, fontsize=10)
    axes.set(xlim=(left, level + width), ylim=(bottom, top))
    axes.set(xlabel="SFT loss L, nats per response", ylabel="reward J of sampled answers")


def draw_theory(q: ArrayLike, beta: float, policies: pd.DataFrame, curves: list[pd.DataFrame]) -> Figure:
    """The paper in one figure: what ideal stages do to the two goals, and where trained ones land.

    ``q`` is as in `draw_frontier`. ``policies`` is `predictions.measured_levels` of the experiments' runs; ``curves``
    are each seed's SFT policy made sharper and less sharp by one number, ``sft_loss, reward``.
    """
    figure, (ideal, trained) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    draw_frontier(ideal, q, beta)
    ideal.set_title("Ideal stages, two labels")
    for curve in curves:
        trained.plot(curve["sft_loss"], curve["reward"], color="0.65", linewidth=1, zorder=0)
    trained.plot([], [], color="0.65", label="SFT, made sharper by one number")
    mean = policies.groupby("run")[["loss", "reward", "greedy"]].mean()
    style = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 8, "shrinkB": 8}
    for start, end, bend in (("sft", "sft-rl", -0.3), ("base", "rl", 0), ("rl", "rl-sft", -0.3)):
        if {start, end} <= set(mean.index):
            ends = [mean.loc[run, ["loss", "reward"]].tolist() for run in (end, start)]
            arrow = style | {"color": COLOURS[end], "connectionstyle": f"arc3,rad={bend}"}
            trained.annotate("", *ends, arrowprops=arrow)
    for run, mark in zip(NAMES, "soso^", strict=True):
        part = policies[policies["run"] == run]
        if len(part):
            trained.plot(part["loss"], part["reward"], mark, color=COLOURS[run], markersize=4, alpha=0.5)
            trained.plot(*mean.loc[run, ["loss", "reward"]], mark, color=COLOURS[run], markersize=11, label=NAMES[run])
    place = mean.loc["sft", "loss"], mean.loc["sft", "greedy"]
    trained.plot([place[0]] * 2, [mean.loc["sft", "reward"], place[1]], ":", color="0.3", linewidth=1.5)
    trained.plot(*place, "*", color="0.3", markersize=16, label="SFT, greedy answers")
    seeds = policies["seed"].nunique()
    trained.set(xlabel="SFT loss L on dev, nats per label", ylabel="reward J of sampled answers")
    trained.set_title(f"Trained policies, {seeds} seed{'s' if seeds > 1 else ''} and mean")
    for axes, columns in ((ideal, 2), (trained, 3)):
        legend_below(axes, columns)
    return figure


def title_of_sweep(plain: list[SweepEntry]) -> str:
    """At which β the rise of the SFT loss is told apart from own belief's: those whose gap's interval excludes zero."""
    apart = [entry["beta"] for entry in plain if (ci := entry["change_of_loss"]["gap_to_own_belief"]["ci95"])
             and not ci[0] <= 0 <= ci[1]]  # fmt: skip
    if not apart:
        return "The rise of the SFT loss is not told apart from own belief's at any β"
    return f"The rise of the SFT loss differs from own belief's at β = {', '.join(f'{beta:g}' for beta in apart)}"


def draw_sweep(entries: list[SweepEntry]) -> Figure:
    """Predicted and measured changes of loss and reward by RL against beta, from the sweep's entries in theory.json.

    Runs that change more than beta and steps are open marks, a little to the right of their beta.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    plain = sorted((e for e in entries if not e["varied"] and not e["is_half"]), key=lambda e: e["beta"])
    kinds = list(dict.fromkeys(e["varied"] for e in entries if e["varied"]))
    for panel, (name, words) in zip(panels, CHANGES.items(), strict=True):
        draw_predicted(panel, [(e["beta"], e[name]) for e in plain], legend=True)
        for shift, entry in [(0, e) for e in plain] + [
            (1 + kinds.index(e["varied"]), e) for e in entries if e["varied"]
        ]:
            draw_mean(
                panel,
                entry["beta"] * 1.08**shift,
                entry[name]["measured"],
                fmt="os^Dv"[shift % 5],
                color=MEASURED if shift == 0 else OTHER,
                fillstyle="full" if shift == 0 else "none",
                label=f"measured{', ' * bool(entry['varied'])}{entry['varied']}",
            )
        panel.set(xscale="log", xlabel="β, reward per nat of KL", ylabel=words)
    lowest = min((entry["change_of_loss"]["measured"]["ci95"] or [0.0])[0] for entry in entries)
    panels[0].set_yscale("symlog", linthresh=0.1)
    panels[0].set_ylim(bottom=min(0.0, 1.2 * lowest))
    figure.suptitle(title_of_sweep(plain), weight="bold", fontsize=12)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def draw_who_pays(payers: list[Payer], tilt: Tilt) -> Figure:
    """The rise of the SFT loss by RL after SFT for each q(x), and the shift of the label's log-odds against the ideal.

    On the right a mark per bin of the probability that the label had before RL, its size the share of sentences.
    """
    figure, (rises, shifts) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    ends = draw_predicted(rises, list(enumerate(payers)), marker="D", fillstyle="none")
    for place, payer in enumerate(payers):
        draw_mean(rises, place, payer["measured"], fmt="o")
    ends["measured"] = (payers[-1]["measured"]["mean"], MEASURED)
    rises.axhline(0, color="0.35", linewidth=1)
    rises.set_xticks(range(len(payers)), [f"{1 - payer['q']:.0%}\n({payer['share']:.0%})" for payer in payers])
    rises.set(xlabel="annotators who disagree (share of sentences)", ylabel="rise of the SFT loss by RL, nats")
    for one in tilt["bins"]:
        x, y = one["ideal_shift"], one["measured_shift"]
        draw_mean(shifts, x, y, fmt="o", markersize=4 + 14 * np.sqrt(one["share"]))
        offset, side = ((-9, 9), "right") if y["mean"] > x else ((9, -13), "left")  # away from the diagonal
        words = f"{one['low']:g} to {one['high']:g}"
        shifts.annotate(words, (x, y["mean"]), offset, textcoords="offset points", ha=side, fontsize=9)
    low, high = min(one["ideal_shift"] for one in tilt["bins"]), max(one["ideal_shift"] for one in tilt["bins"])
    shifts.plot([low, high], [low, high], color=OWN)
    shifts.set(xlabel="ideal shift of the label's log-odds, own belief", ylabel="measured shift")
    shifts.margins(x=0.25)
    shifts.set_title(f"by p(label) before RL; slope {shown(tilt['slope'], '.2f')}", fontsize=10)
    figure.canvas.draw()
    label_ends(rises, ends)
    label_ends(shifts, {"as far as asked": (high, OWN)})
    figure.suptitle(
        f"RL changes the SFT loss by {payers[0]['measured']['mean']:+.2f} nats where {1 - payers[0]['q']:.0%} of "
        f"annotators disagree, by {payers[-1]['measured']['mean']:+.2f} where {1 - payers[-1]['q']:.0%} do"
    )
    return figure


def draw_crossing(crossing: Crossing) -> Figure:
    """L after RL minus the base's L against beta, measured and predicted, and the beta at which it crosses zero."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    sweep = [point for point in crossing["points"] if point["run"] != "sft-rl"]
    by_beta = {point["beta"]: point for point in reversed(crossing["points"])}  # the sweep's where there are two
    ends = draw_predicted(axes, sorted(by_beta.items(), reverse=True), marker="D", fillstyle="none")
    for point in sweep:
        draw_mean(axes, point["beta"], point["measured"], fmt="o")
    ends["measured"] = (sweep[-1]["measured"]["mean"], MEASURED)
    for own in (point for point in crossing["points"] if point["run"] == "sft-rl"):
        place = own["beta"] / 1.06, own["measured"]["mean"]
        draw_mean(axes, place[0], own["measured"], fmt="s", fillstyle="none")
        axes.annotate("sft-rl", place, (8, -14), textcoords="offset points", fontsize=9)
    axes.axhline(0, color="0.35", linewidth=1.2)
    found, seeds = crossing["measured"], crossing["by_seed"]
    title = "RL after SFT crosses the base's SFT loss at no β of the sweep"
    if found:
        axes.plot(found["ci95"] or [found["mean"]] * 2, [0, 0], color=MEASURED, linewidth=7, alpha=0.4)
        count = sum(beta is not None for beta in seeds)
        where = f"{shown(found, '.2f')} ({count} of {len(seeds)} seeds cross)"
        title = f"RL after SFT ends at the base's SFT loss at β* = {where}"
        axes.set_yscale("symlog", linthresh=0.2)
    axes.set(xscale="log", xlabel="β, reward per nat of KL (falling)", ylabel="SFT loss after RL - base's, nats")
    axes.set_xticks(list(by_beta), [f"{beta:g}" for beta in by_beta])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_title(title, fontsize=11)
    figure.canvas.draw()
    label_ends(axes, ends | {"base": (0.0, "0.35")})
    return figure
