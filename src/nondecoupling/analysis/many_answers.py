"""More than two answers: calibration against sharpening label by label, where annotators' shares are known and unequal.

Of two answers the rarer one has what the likelier leaves, and sharpening is one number. Of more, RL's closed form says
how each wins or loses against every other: log p(y) - log p(y') moves by 2 (p_D(y) - p_D(y')) / beta, also between two
answers that are both wrong. Losses are in expectation over annotators, nats over the answers.

**Rules** (written before any reported replication was run). M1 and M2 are amounts, judged as T2 is: confirmed if the
whole 95 % interval of measured minus predicted is within a quarter of the prediction (at least 0.01 nats), refuted if
it is wholly beyond. M3, M4 and M5 are claims about a sign, with Holm's correction over these three, which have a p.
"""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nondecoupling.analysis import theory
from nondecoupling.analysis.claims import Claim, claim_row, corrected_family, judged, verdict_of_amount
from nondecoupling.analysis.figures import draw_mean, ink
from nondecoupling.analysis.predictions import known_annotators, label_policy
from nondecoupling.analysis.statistics import mean_interval, over_seeds
from nondecoupling.analysis.verdicts import shown
from nondecoupling.study.contracts import Cell, ClaimRow, LabelsFile, OfLabel
from nondecoupling.study.results import Results

LOSS, TILTED = "SFT loss over p_D", "|p - tilt of p_D| - |p - p_D|, mean"
CLAIMS = [
    Claim("M1", "RL after SFT raises the SFT loss by C1", LOSS, "sft-rl", "sft", +1),
    Claim("M2", "RL after SFT raises the SFT loss by own belief's amount", LOSS, "sft-rl", "sft", +1),
    Claim("M3", "After SFT answers are nearer to the annotators' shares than to their tilt", TILTED, "sft", "", +1),
    Claim("M4", "After RL answers are nearer to the tilt of the annotators' shares", TILTED, "sft-rl", "", -1),
    Claim(
        "M5",
        "RL takes more from the rarest wrong answer than from the commonest",
        "log p(commonest wrong) - log p(rarest)",
        "sft-rl",
        "sft",
        +1,
    ),
]
WHO = {"share": "annotators", "sft": "SFT", "ideal": "ideal RL", "rl": "SFT → RL"}


def shares_of(results: Results, seed: int) -> theory.FloatArray:
    """log p_D of the dev sentences of a replication, (sentences, K); ValueError where nobody knows it."""
    logd = known_annotators(results.answers_of("sft", seed))
    if logd is None:
        raise ValueError(f"{results.study.name}: what annotators say is not known, and nothing to compare with.")
    return logd


def by_sentence(results: Results) -> pd.DataFrame:
    """A row per replication, dev sentence and answer: log-probabilities (nats) of who may give it.

    Columns ``seed, source, truth, sentence`` (its number), ``label``; ``share`` (log p_D), ``sft, rl`` (measured),
    ``ideal`` (the tilt of p_D), and ``own`` (the tilt of the SFT policy, taken to be calibrated).
    """
    beta, tables = results.study.profile.rl.beta, []
    for seed in results.seeds:
        answers, logd = results.answers_of("sft", seed), shares_of(results, seed)
        sft, rl = (label_policy(results.answers_of(run, seed)) for run in ("sft", "sft-rl"))
        ideal, own = theory.tilt(logd, theory.agreement_reward(logd), beta), theory.self_tilt(sft, beta)
        policies = {"share": logd, "sft": sft, "ideal": ideal, "rl": rl, "own": own}
        sentences, labels = logd.shape
        known = answers[["seed", "source", "truth"]].assign(sentence=np.arange(sentences))
        known = known.loc[known.index.repeat(labels)].assign(label=np.tile(np.arange(labels), sentences))
        tables.append(known.assign(**{name: logp.ravel() for name, logp in policies.items()}))
    return pd.concat(tables, ignore_index=True).astype({"truth": int})


def losses(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean SFT loss of each of `by_sentence`'s policies, and C1, (groups by ``keys``, policies), nats."""
    weight = np.exp(rows["share"])
    each = pd.DataFrame({name: -weight * rows[name] for name in ("share", "sft", "ideal", "rl", "own")})
    return each.assign(**rows[[*keys, "sentence"]]).groupby([*keys, "sentence"]).sum().groupby(keys).mean()


def cells(rows: pd.DataFrame) -> Iterator[Cell]:
    """What annotators and policies say about the sentences of each phenomenon and truth, and what RL costs there."""
    probabilities = rows.assign(**np.exp(rows[list(WHO)]))
    whose = ["source", "truth", "seed"]
    means = probabilities.groupby([*whose, "label"])[list(WHO)].mean()
    shifts = pd.DataFrame({"measured": rows["rl"] - rows["sft"], "own": rows["own"] - rows["sft"]})
    shifts = shifts.groupby([rows[key] for key in (*whose, "label")]).mean()
    loss, counts = losses(rows, whose), rows.groupby(["source", "truth"]).size() / len(rows)
    for source, truth in counts.index:
        here, by_seed = loss.loc[source, truth], means.loc[source, truth]
        yield {
            "source": str(source),
            "truth": int(truth),
            "share_of_sentences": float(counts[source, truth]),
            "lowest_loss": float(here["share"].mean()),
            "c1": float((here["ideal"] - here["share"]).mean()),
            "own_belief": float((here["own"] - here["sft"]).mean()),
            "loss": {name: over_seeds(here[name]) for name in ("sft", "rl")},
            "rise": over_seeds(here["rl"] - here["sft"]),
            "labels": [
                of_label(values.droplevel("label"), shifts.loc[source, truth].xs(label, level="label"))
                for label, values in by_seed.groupby(level="label")
            ],
        }


def of_label(means: pd.DataFrame, shifts: pd.DataFrame) -> OfLabel:
    """One answer in one cell, from its mean probabilities and its shifts of log p by replication."""
    return {
        "share": float(means["share"].mean()),
        "ideal": float(means["ideal"].mean()),
        "sft": over_seeds(means["sft"]),
        "rl": over_seeds(means["rl"]),
        "shift": over_seeds(shifts["measured"]),
        "shift_own_belief": float(shifts["own"].mean()),
    }


def distances(rows: pd.DataFrame, who: str) -> pd.DataFrame:
    """Distance of a policy's mean probabilities from ``share`` and ``ideal``: mean over answers and cells, by seed."""
    keys = ["seed", "source", "truth", "label"]
    means = np.exp(rows[list(WHO)]).groupby([rows[key] for key in keys]).mean()
    return pd.DataFrame({name: (means[who] - means[name]).abs() for name in ("share", "ideal")}).groupby("seed").mean()


def wrong_gap(rows: pd.DataFrame, who: str) -> pd.Series:
    """Mean over sentences of log p of the commonest wrong answer minus that of the rarest, by seed, nats."""
    wrong = rows[rows["label"] != rows["truth"]].sort_values("share", kind="stable").groupby(["seed", "sentence"])[who]
    return (wrong.last() - wrong.first()).groupby("seed").mean()


def judge(rows: pd.DataFrame) -> list[ClaimRow]:
    """The verdicts of this chapter, by the module's rules."""
    loss = losses(rows, ["seed"])
    rise, c1, own = loss["rl"] - loss["sft"], loss["ideal"] - loss["share"], loss["own"] - loss["sft"]
    verdicts = [verdict_of_amount(mean_interval(rise - predicted), float(predicted.mean())) for predicted in (c1, own)]
    found = [
        claim_row(CLAIMS[0], mean_interval(rise), verdicts[0], predicted=float(c1.mean())),
        claim_row(CLAIMS[1], mean_interval(rise), verdicts[1], predicted_from_policies=float(own.mean())),
    ]
    sft, rl = (distances(rows, who) for who in ("sft", "rl"))
    gap = {who: wrong_gap(rows, who) for who in (*WHO, "own")}
    found += [judged(claim, of["ideal"] - of["share"]) for claim, of in zip(CLAIMS[2:4], (sft, rl), strict=True)]
    perfect, believed = ((gap[end] - gap[start]).mean() for end, start in (("ideal", "share"), ("own", "sft")))
    known = {"predicted": float(perfect), "predicted_from_policies": float(believed)}
    found.append(judged(CLAIMS[4], gap["rl"] - gap["sft"], (), **known))
    return corrected_family(found)


def labels_file(results: Results) -> LabelsFile:
    """What `labels.json` holds."""
    rows, profile = by_sentence(results), results.study.profile
    return {
        "answers": list(profile.prompt.answers),
        "beta": profile.rl.beta,
        "cells": list(cells(rows)),
        "claims": judge(rows),
    }


def cells_table(content: LabelsFile) -> pd.DataFrame:
    """Probabilities of each answer by phenomenon, truth and who gives it, with the SFT loss, as text."""
    table = {}
    for cell in content["cells"]:
        losses_of = {
            "share": f"{cell['lowest_loss']:.3f}",
            "sft": shown(cell["loss"]["sft"], ".3f"),
            "ideal": f"{cell['lowest_loss'] + cell['c1']:.3f}",
            "rl": shown(cell["loss"]["rl"], ".3f"),
        }
        rises = {"ideal": f"{cell['c1']:+.3f}", "rl": shown(cell["rise"])}
        for who, name in WHO.items():
            values = zip(content["answers"], probabilities_of(cell, who), strict=True)
            row = cell["source"], content["answers"][cell["truth"]], name
            table[row] = {answer: f"{p:.3f}" for answer, p in values}
            table[row] |= {"SFT loss": losses_of[who], "rise by RL": rises.get(who, "")}
    return pd.DataFrame(table).T.rename_axis(["phenomenon", "truth", "who"])


def probabilities_of(cell: Cell, who: str) -> list[float]:
    """The mean probability of each answer in a cell, by who gives it."""
    found = [label[who] for label in cell["labels"]]  # type: ignore[literal-required]
    return [value["mean"] if isinstance(value, dict) else value for value in found]


def points_of(content: LabelsFile) -> list[tuple[str, OfLabel]]:
    """Every answer of every cell, with the answer's name."""
    return [pair for cell in content["cells"] for pair in zip(content["answers"], cell["labels"], strict=True)]


def title_of(rows: list[ClaimRow]) -> str:
    """What the figure shows, by the verdicts of M3 and M4."""
    held = [row["verdict"] == "confirmed" for row in rows if row["id"] in ("M3", "M4")]
    if all(held):
        return "SFT ends nearer annotators' shares, RL nearer their tilt"
    return "Annotators, their tilt, and where SFT and RL end"


def draw_sharpening(content: LabelsFile) -> Figure:
    """Left: each answer's mean probability against its known share; right: its shift by RL against own belief's.

    A point is an answer to the sentences of one phenomenon and truth; means over replications with 95 % intervals.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
    colours = dict(zip(content["answers"], sns.color_palette("colorblind", len(content["answers"])), strict=True))
    for answer, of in points_of(content):
        line = {"color": colours[answer], "markersize": 6, "linewidth": 0}
        left.plot(of["share"], of["sft"]["mean"], marker="o", **line)
        left.plot(of["share"], of["ideal"], marker="D", fillstyle="none", **line)
        left.plot(of["share"], of["rl"]["mean"], marker="*", **line | {"markersize": 9})
        draw_mean(right, of["shift_own_belief"], of["shift"], fmt="o", color=colours[answer])
    for axes, ends in ((left, (0.001, 0.999)), (right, right.get_xlim())):
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
    left.set_xscale("logit")
    left.set_yscale("logit")
    ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(plt.NullLocator())
    left.set(xlabel="share of annotators who give the answer", ylabel="probability of the answer")
    right.set(xlabel="shift of log p by own belief's tilt, nats", ylabel="measured shift by RL, nats")
    left.set_title(title_of(content["claims"]), loc="left", weight="bold", fontsize=10)
    right.set_title("How far RL moves each answer", loc="left", weight="bold", fontsize=10)
    name_marks(left, right, colours)
    return figure


def name_marks(left: Axes, right: Axes, colours: dict) -> None:
    """What marks and colours mean, in the corners that points leave free."""
    marks = {"SFT": ("o", "full"), "ideal RL from p_D": ("D", "none"), "SFT → RL": ("*", "full")}
    handles = [
        Line2D([], [], color="0.3", marker=mark, fillstyle=style, linewidth=0, label=words)  # type: ignore[arg-type]
        for words, (mark, style) in marks.items()
    ]
    left.legend(handles=handles, loc="upper left", fontsize=9, frameon=False)
    for place, (answer, colour) in enumerate(colours.items()):
        right.text(0.03, 0.95 - 0.06 * place, answer, color=ink(colour), transform=right.transAxes, fontsize=9)
