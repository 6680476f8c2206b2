"""What the notebook ``explore`` shows: the studies there are, and one picture or table for every state of its controls.

Nothing is written and nothing is trained here.
"""

import re
from collections.abc import Callable
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from ipywidgets import HTML as Words
from ipywidgets import Box, Button, Dropdown, FloatLogSlider, FloatSlider, Layout, ValueWidget, Widget
from matplotlib.figure import Figure
from scipy.special import expit
from scipy.stats import binomtest

from nondecoupling.analysis import figures, geometry, theory
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.verdicts import SIGNIFICANT
from nondecoupling.study import folders
from nondecoupling.study.plan import NAMES, STATES, has_two_answers
from nondecoupling.study.results import PROVENANCE, Results, read_results
from nondecoupling.task import grammar

if TYPE_CHECKING:  # reading results needs no torch, whose import takes seconds
    from transformers import PreTrainedTokenizerBase

REFERENCE = " (reference)"
LISTED = 20  # changed sentences at most
METRICS = {
    "sft_loss": "SFT loss, nats per response",
    "reward_exact": "reward of sampled answers, expected",
    "reward_sampled": "reward of sampled answers, one each",
    "reward_greedy": "reward of greedy answers",
    "mcc": "Matthews correlation",
    "predicted_acceptable_rate": "share answered acceptable",
    "entropy": "entropy of the answer, nats",
    "kl_to_base": "KL to the base model, nats",
    "label_mass": "probability of the two answers together",
}


# Which results there are


def find_studies() -> dict[str, Results]:
    """All studies that have collected results: those run here by name, committed ones with "(reference)" after it.

    Those of another version are left out, with a line that says so; and those with more than two answers, whose
    probabilities are not one number (chapter 13 shows them).
    """
    own, committed = folders.results_root(), folders.REPOSITORY / "results" / "reference"
    found = {path.parent.name: path.parent for path in sorted(own.glob(f"*/{PROVENANCE}"))}
    found |= {path.parent.name + REFERENCE: path.parent for path in sorted(committed.glob(f"*/{PROVENANCE}"))}
    studies = {}
    for name, folder in found.items():
        try:
            studies[name] = read_results(None, folder)
        except (KeyError, RuntimeError, ValueError) as error:
            print(f"left out: {error}")
    return {name: found for name, found in studies.items() if has_two_answers(found.study.profile)}


def first_shown(studies: dict[str, Results]) -> str:
    """The first study that was run here; the embedded study's reference if there is none."""
    return next((name for name in studies if not name.endswith(REFERENCE)), f"nano{REFERENCE}")


def policies_in(results: Results) -> list[str]:
    """The policies that a study has: those of the two experiments, then the others in the plan's order."""
    names = results.final()["run"].unique().tolist()
    return [name for name in STATES if name in names] + [name for name in names if name not in STATES]


def trained_in(results: Results) -> list[str]:
    """The policies of a study that have a trajectory."""
    return [name for name in policies_in(results) if name in set(results.trajectories["run"])]


def replications_in(results: Results) -> list[tuple[str, int | None]]:
    """All replications together, and each of them, as a list to choose from."""
    return [("all", None), *((str(seed), seed) for seed in results.seeds)]


# Controls


class Bar(NamedTuple):
    """The controls that all parts of the notebook have in common."""

    study: Dropdown
    replication: Dropdown
    disagreement: FloatSlider
    beta: FloatLogSlider


# The cell that holds the bar stays in view while the others scroll below it.
STAYS = """<style>
.jp-Cell:has(.nondecoupling-bar) { position: sticky; top: 0; z-index: 9;
  background: var(--jp-layout-color0, white) !important;
  border-bottom: 1px solid var(--jp-border-color2, silver) }
</style>"""


def control_bar(studies: dict[str, Results], name: str = "") -> Bar:
    """The bar above everything: display it with `show_bar`. ``name`` is the study that comes first, if any."""
    study = Dropdown(options=list(studies), value=name or first_shown(studies), description="study")
    replication = Dropdown(description="replication")
    offer(study, replication, lambda name: replications_in(studies[name]))
    sliders = (
        FloatSlider(0.10, min=0.0, max=0.45, step=0.01, description="disagreement"),
        FloatLogSlider(0.5, min=-1.3, max=1.3, step=0.05, description="β", readout_format=".2f"),
    )
    return Bar(study, replication, *sliders)


def offer(study: Dropdown, control: Any, choices: Callable[[str], list]) -> None:
    """Let ``control`` offer what the chosen study has; what was chosen stays chosen where it is still there.

    ``choices`` are those of a study by its name, the first of them chosen where nothing else is.
    """

    def renew(_: Any = None) -> None:
        before, options = control.value, choices(study.value)
        if list(control.options) == options:
            return
        values = [option[1] if isinstance(option, tuple) else option for option in options]
        control.options = options
        if isinstance(before, tuple):  # several may be chosen
            control.index = tuple(values.index(value) for value in before if value in values) or (0,)
        else:
            control.index = values.index(before) if before in values else 0

    renew()
    study.observe(renew, "value")


def show_controls(words: str, *controls: Widget) -> None:
    """Display ``controls`` side by side; where nothing runs, ``words`` take their place."""
    for control in controls:
        control.style.description_width = "initial"  # whole words instead of "disagree..."
    box = Box(controls, layout=Layout(flex_flow="row wrap"))
    display(box._repr_mimebundle_() | {"text/plain": words}, raw=True)


def reset_button(bar: Bar) -> Button:
    """A button that puts the bar's controls back to where they are now."""
    button, first = Button(description="reset", layout=Layout(width="auto")), [control.value for control in bar]

    def reset(_: Any) -> None:
        for control, value in zip(bar, first, strict=True):
            control.value = value

    button.on_click(reset)
    return button


def show_bar(bar: Bar) -> None:
    """Display the bar, which stays in view."""
    words = Words(STAYS)
    words.add_class("nondecoupling-bar")
    show_controls("(controls: study, replication, disagreement, β, reset)", *bar, reset_button(bar), words)


def show_live(draw: Callable[..., Any], **controls: ValueWidget) -> None:
    """Display what ``draw`` returns for the controls' values, and again in the same place whenever one of them changes.

    The picture is an ordinary output, so a reader without a kernel sees it, too. Where nothing can be shown, the
    error's sentence takes its place.
    """

    def drawn() -> Any:
        try:
            content = draw(**{name: control.value for name, control in controls.items()})
        except (FileNotFoundError, ImportError, KeyError, RuntimeError, ValueError) as error:
            return HTML(f"<em>{escape(str(error))}</em>")
        if isinstance(content, Figure):
            plt.close(content)  # or it would be displayed a second time at the end of the cell
        return content

    handle = display(drawn(), display_id=True)
    for control in controls.values():
        control.observe(lambda _: handle.update(drawn()), "value")


# Trajectories


def draw_trajectories(results: Results, names: tuple[str, ...], seed: int | None, metric: str) -> Figure:
    """``metric`` along training: one colour per run, thin lines for seeds, a thick one for their mean.

    ``seed`` None means all seeds.
    """
    table = results.trajectories[results.trajectories["run"].isin(names)]
    table = table if seed is None else table[table["seed"] == seed]
    figure, axes = plt.subplots(figsize=(8, 4))
    for place, (run, part) in enumerate(table.groupby("run", sort=False)):
        colour = figures.COLOURS.get(str(run), f"C{place}")
        for _, one in part.groupby("seed"):
            axes.plot(one["step"], one[metric], color=colour, linewidth=0.7, alpha=0.6)
        mean = part.groupby("step")[metric].mean()
        axes.plot(mean.index, mean, color=colour, linewidth=2.4, marker="o", label=NAMES.get(str(run), run))
    axes.set(xlabel="steps of the stage (0: its start)", ylabel=METRICS[metric])
    if len(table):
        axes.legend(frameon=False)
    else:
        axes.set_title("no run is chosen")
    return figure


# Closed forms


def final_states(results: Results) -> pd.DataFrame:
    """``run, seed, beta, sft_loss, reward_exact`` of the study's policies on dev; beta is nan unless RL made them."""
    study = results.study
    rl = [run for run in study.runs if run.stage == "rl"]
    betas = {run.name: study.settings_of(run).rl.beta for run in rl}
    metrics = results.final()
    return metrics.assign(beta=metrics["run"].map(betas))[["run", "seed", "beta", "sft_loss", "reward_exact"]]


def draw_closed_forms(disagreement: float, beta: float, measured: pd.DataFrame) -> Figure:
    """What ideal SFT and RL would do if annotators disagreed so often, with ``measured`` final states as points.

    Left the plane of both goals, right the rise of the SFT loss by RL after SFT against beta.
    """
    q, betas = 1 - disagreement, np.geomspace(20, 0.05, 150)
    figure, (plane, rise) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    loss, reward = theory.rl_loss(q, betas), theory.rl_reward(q, betas)
    plane.plot(loss, reward, color="0.6", linewidth=5, alpha=0.5, label="ideal RL, all β")
    calibrated = theory.calibrated_loss(q), theory.calibrated_reward(q)
    tilted = theory.rl_loss(q, beta), theory.rl_reward(q, beta)
    for place, mark, size, words in (
        (calibrated, "ko", 9, "calibrated (ideal SFT)"),
        (tilted, "ks", 9, f"ideal RL, β = {beta:.2g}"),
        ((calibrated[0], theory.sharp_reward(q)), "k*", 14, "calibrated, greedy answers"),
    ):
        plane.plot(*place, mark, markersize=size, label=words, clip_on=False)  # whole also at the border
    for run, part in measured[measured["run"].isin(STATES)].groupby("run", sort=False):
        name = NAMES[str(run)]
        plane.scatter(
            part["sft_loss"], part["reward_exact"], color=figures.COLOURS[str(run)], s=28, label=f"measured {name}"
        )
    right = max(1.2, 1.1 * measured["sft_loss"].max())
    plane.set(xlim=(-0.03, right), ylim=(min(-0.05, measured["reward_exact"].min() - 0.1), 1.05))
    plane.set(xlabel="SFT loss, nats (left is better)", ylabel="reward of sampled answers (up is better)")
    c1 = loss - theory.calibrated_loss(q)
    rise.plot(betas, c1, color="0.6", linewidth=5, alpha=0.5, label="ideal RL: C1(β)")
    rise.plot(beta, tilted[0] - calibrated[0], "ks", markersize=9)
    changes = rises_after_sft(measured)
    rise.scatter(changes["beta"], changes["rise"], color=figures.COLOURS["sft-rl"], s=28, label="measured SFT → RL")
    rise.set(xscale="log", xlabel="β, reward per nat of KL", ylabel="rise of the SFT loss, nats", ylim=(-0.1, 3))
    for axes in (plane, rise):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8, frameon=False)
    return figure


def rises_after_sft(measured: pd.DataFrame) -> pd.DataFrame:
    """``beta, rise``: how much RL after SFT raised the SFT loss, for each such run and seed of ``measured``."""
    # The runs of the sweep differ in beta only; other names that begin with sft-rl are controls.
    after = measured[measured["run"].str.fullmatch(r"sft-rl(-b[0-9.]+)?")]
    before = measured[measured["run"] == "sft"].set_index("seed")["sft_loss"]
    return pd.DataFrame({"beta": after["beta"], "rise": after["sft_loss"] - after["seed"].map(before)}).dropna()


# How long


def draw_stopped(results: Results, seed: int | None, share: float) -> Figure:
    """Ascent on the exact reward from the SFT policy, stopped after ``share`` of its way: what it earned and cost.

    Mean over replications where ``seed`` is None. Dashed is what the SFT policy itself predicts to second order, as far
    as it predicts a gain.
    """
    seeds = sorted(set(results.paths["seed"])) if seed is None else [seed]
    paths = [geometry.ascent(results, "plain", one) for one in seeds if one in set(results.paths["seed"])]
    if not paths:
        raise ValueError("This study has not followed its gradients; make geometry does, and the reference has.")
    path = pd.concat(paths).groupby(level=0).mean()
    figure, axes = plt.subplots(figsize=(8, 4.2))
    axes.plot(path["reward"], path["loss"], color=figures.COLOURS["sft-rl"], linewidth=2.4, label="measured")
    rising = geometry.while_rising(path)
    axes.plot(rising["reward_second"], rising["loss_second"], "--", color="0.4", label="as the SFT policy predicts it")
    here = {name: float(np.interp(share * path.index.max(), path.index, path[name])) for name in ("reward", "loss")}
    axes.plot(here["reward"], here["loss"], "o", color="black", markersize=9, clip_on=False)
    high = path[["reward", "loss"]].max()
    axes.set(xlim=(-0.02 * high["reward"], 1.05 * high["reward"]), ylim=(-0.05 * high["loss"], 1.1 * high["loss"]))
    axes.set(xlabel="gain of the reward of sampled answers", ylabel="rise of the SFT loss, nats")
    gained, paid = here["reward"] / path["reward"].iloc[-1], here["loss"] / path["loss"].iloc[-1]
    axes.set_title(
        f"stopped here: {here['reward']:+.3f} reward for {here['loss']:+.3f} nats\n"
        f"({gained:.0%} of the way's gain for {paid:.0%} of its price)"
    )
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


# A sentence under every policy


@cache
def load_policies(name: str, seed: int | None) -> tuple[Results, "PreTrainedTokenizerBase", dict[str, Any], int]:
    """The results of the study ``name``, its tokenizer, the policies of `STATES` that are there, and whose they are.

    Those of replication ``seed``, or of the first that has any. Raises FileNotFoundError that says what to run where
    there is none, ImportError where nothing can run them.
    """
    if find_spec("torch") is None:
        raise ImportError("Policies need torch, which this environment has not: all else here works without.")
    results = find_studies()[name]
    study = results.study
    policies_of = {replication: policy_folders(results, replication) for replication in results.seeds}
    there = [replication for replication, found in policies_of.items() if len(found) > 1]
    if not there or seed not in (None, *there):
        whose = f"{name}, replication {seed}" if seed is not None else name
        kept = f"; those of replication {', '.join(map(str, there))} are there" if there else ""
        raise FileNotFoundError(
            f"There are no policies of {whose}{kept}. Weights are large, so that of committed results only "
            f"small ones of one replication are kept; make reproduce makes them."
        )
    seed = there[0] if seed is None else seed
    from transformers.utils import logging

    from nondecoupling.training import models
    from nondecoupling.training.base import base_folder

    models.prepare_libraries()
    logging.disable_progress_bar()  # five bars of a second each
    base = base_folder(study, study.run("base"), seed, results.folder)
    how, adaptation = study.profile.model, study.profile.adaptation
    policies = {
        run: models.start_policy(base, place, how, adaptation, seed).eval() for run, place in policies_of[seed].items()
    }
    return results, models.load_tokenizer(base), policies, seed


def policy_folders(results: Results, seed: int) -> dict[str, Path | None]:
    """Where the policies of `STATES` are that are there; the base model has no folder of changes."""
    folder_of = {run: folders.run_folder(results.folder, results.study.run(run), seed) for run in STATES}
    places = {run: None if run == "base" else folder / folders.POLICY for run, folder in folder_of.items()}
    return {run: place for run, place in places.items() if place is None or place.exists()}


@cache
def words_of_the_grammar() -> set[str]:
    """Every word that the embedded study's sentences are made of."""
    of_templates = re.findall(
        r"\w+", " ".join(template for family in grammar.TEMPLATES.values() for template in family)
    )
    words = {word for word in of_templates if word not in grammar.LEXICON}
    return words.union(*(phrase.split() for phrases in grammar.LEXICON.values() for phrase in phrases))


def marked(sentence: str) -> str:
    """``sentence`` as HTML, in which words that the embedded study's models have never seen are marked."""
    known, pieces = words_of_the_grammar(), re.split(r"(\w+)", sentence)
    first = next((place for place, piece in enumerate(pieces) if piece.strip()), 0)
    return "".join(
        f"<mark>{escape(piece)}</mark>"
        if place % 2 and piece not in known and not (place == first and piece[0].lower() + piece[1:] in known)
        else escape(piece)
        for place, piece in enumerate(pieces)
    )


def judgement(name: str, seed: int | None, sentence: str) -> HTML:
    """What every policy of a study makes of ``sentence``, as a table below it; strange words are marked."""
    sentence = " ".join(sentence.split())
    if not sentence:
        raise ValueError("Type a sentence, and press Enter.")
    results, tokenizer, policies, seed = load_policies(name, seed)
    table = judge_sentence(results, tokenizer, policies, sentence)
    shown = table.style.format(precision=3).bar(subset=["p(acceptable)"], vmin=0, vmax=1, color="#9ecae1")
    shown = shown.set_uuid("judged").set_caption(f"policies of '{name}', replication {seed}")
    text, note = escape(sentence), ""
    if results.study.profile.pretrains and results.study.profile.data.generated:
        text = marked(sentence)
        note = (
            " &ensp;<small>The models have never seen the words that are marked: what they answer is a habit.</small>"
        )
    return HTML(f"<p><strong>{text}</strong>{note if '<mark>' in text else ''}</p>{shown.to_html()}")


def judge_sentence(
    results: Results, tokenizer: "PreTrainedTokenizerBase", policies: dict[str, Any], sentence: str
) -> pd.DataFrame:
    """What each policy makes of ``sentence``: p(acceptable) among the two answers, log p of both, KL in nats.

    KL is that of the answer's distribution from the base model and from the stage before.
    """
    from nondecoupling.training.evaluation import mean_outcome_kl, predict

    one, settings = pd.DataFrame([{"sentence": sentence, "label": 1, "source": "typed"}]), results.study.profile
    answers = {
        run: predict(model, tokenizer, settings.prompt, one, settings.evaluation.batch_size, seed=0)
        for run, model in policies.items()
    }
    rows = {}
    for run, answer in answers.items():
        parent = "base" if run == "base" else str(results.study.run(run).parent)
        rows[NAMES[run]] = {
            "p(acceptable)": float(expit(label_log_odds(answer))[0]),
            "log p(acceptable)": answer["logp_acceptable"].iloc[0],
            "log p(unacceptable)": answer["logp_unacceptable"].iloc[0],
            "greedy answer": answer["greedy"].iloc[0],
            "KL to base": mean_outcome_kl(answer, answers["base"]),
            "KL to the stage before": mean_outcome_kl(answer, answers[parent]) if parent in answers else np.nan,
        }
    return pd.DataFrame(rows).T.rename_axis("policy")


# Answers that changed


def changed_answers(results: Results, before: str, after: str, seed: int | None) -> pd.DataFrame:
    """Dev sentences to which two runs give different likelier answers, in one replication or, for None, in all.

    Columns ``sentence, source, label, p_before, p_after`` (p(acceptable) among the two answers) and ``now``, "right" or
    "wrong" by the label as given.
    """
    seeds = results.seeds if seed is None else [seed]
    one, two = (
        pd.concat([results.answers_of(run, seed) for seed in seeds], ignore_index=True) for run in (before, after)
    )
    p = [expit(label_log_odds(table)) for table in (one, two)]
    table = one[["sentence", "source", "label"]].assign(p_before=p[0], p_after=p[1])
    changed = table[(table["p_before"] > 0.5) != (table["p_after"] > 0.5)]
    right = (changed["p_after"] > 0.5) == (changed["label"] == 1)
    return changed.assign(now=np.where(right, "right", "wrong"))


def outcome_of_changes(changed: pd.DataFrame) -> str:
    """How many answers became right and wrong, and whether sharpness alone would do that: a sign test over answers."""
    right, wrong = ((changed["now"] == which).sum() for which in ("right", "wrong"))
    said = f"{right} became right, {wrong} wrong"
    if not len(changed):
        return said
    p = binomtest(int(right), len(changed)).pvalue
    if p >= SIGNIFICANT:
        return f"{said}: as a coin would have it (p = {p:.2g})"
    return f"{said}: no coin's doing (p = {p:.1g}); the stages between did not change sharpness alone"


def count_changes(changed: pd.DataFrame) -> pd.DataFrame:
    """How many answers became right and wrong, by source, the most changed first."""
    counts = pd.crosstab(changed["source"], changed["now"]).reindex(columns=["right", "wrong"], fill_value=0)
    return counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]


def list_changes(changed: pd.DataFrame, about: str, only_wrong: bool) -> Any:
    """At most twenty of the changed sentences, all or those ``about`` one phenomenon, the surest last."""
    chosen = changed if about == "every phenomenon" else changed[changed["source"] == about]
    kept = chosen[chosen["now"] == "wrong"] if only_wrong else chosen
    words = f"{min(len(kept), LISTED)} of {len(kept)} sentences"
    if len(kept) and not kept["sentence"].any():
        words += "; of real data the reference holds none, their copyright is not ours"
    table = kept.sort_values("p_after", kind="stable").head(LISTED).style.hide().format(precision=3)
    return table.set_properties(["sentence"], **{"text-align": "left"}).set_caption(words).set_uuid("changed")
