"""The sweep of beta: how far RL after SFT moved at each beta, next to where the theory says that it comes to rest.

As in notebook 6, losses (nats) and rewards are those of the two labels, renormalised, on the dev labels as given.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from safetensors.numpy import load_file
from scipy.special import expit, logit
from tokenizers import Tokenizer

from nondecoupling import runs, theory
from nondecoupling.claims import label_log_odds, verdict_of_amount
from nondecoupling.profile import Adaptation, Profile, Rl, Run, Study
from nondecoupling.statistics import mean_interval

MEASURES = {"loss": theory.expected_loss, "reward": theory.expected_reward_of_odds}


def over_seeds(values: ArrayLike) -> dict[str, Any]:
    """Mean over seeds and its 95 % t interval, as JSON can hold them: ``ci95`` is None for a single seed."""
    mean, low, high, n = mean_interval(values)
    return {"mean": mean, "ci95": None if n < 2 else [low, high]}


def half_of(study: Study, entry: Run) -> Run | None:
    """The run that trains as ``entry`` does but for half of its RL steps; None without one."""

    def training(settings: Profile, steps: int) -> tuple[Rl, Adaptation]:
        return settings.rl.model_copy(update={"steps": steps}), settings.adaptation

    ours = study.for_run(entry.name)
    for run in study.profile.runs:
        theirs, alike = study.for_run(run.name), (run.stage, run.parent) == (entry.stage, entry.parent)
        if alike and 2 * theirs.rl.steps == ours.rl.steps and training(theirs, 0) == training(ours, 0):
            return run
    return None


def varied(study: Study, entry: Run) -> str:
    """What else than beta and steps ``entry`` changes in RL, in words: "32 answers, divided"; empty if nothing."""
    ours, theirs = study.profile, study.for_run(entry.name)
    words = {
        f"{theirs.rl.prompts_per_step} prompts": ours.rl.prompts_per_step != theirs.rl.prompts_per_step,
        f"{theirs.rl.answers_per_prompt} answers": ours.rl.answers_per_prompt != theirs.rl.answers_per_prompt,
        "divided" if theirs.rl.normalisation == "group" else "not divided": (
            ours.rl.normalisation != theirs.rl.normalisation
        ),
        "all weights" if theirs.adaptation.method == "full" else "an adapter": ours.adaptation != theirs.adaptation,
        f"learning rate {theirs.rl.learning_rate:g}": ours.rl.learning_rate != theirs.rl.learning_rate,
    }
    return ", ".join(text for text, differs in words.items() if differs)


def log_odds_ceiling(policy: Path, first: str, second: str) -> float:
    """Largest |log p(first) - log p(second)| of two answers that the output layer of the model in ``policy`` allows.

    Its last normalisation gives every hidden state the same length, and then by Cauchy and Schwarz the difference of
    two logits is at most sqrt(d) ||g (e_1 - e_2)||, with d the width, g the norm's weights and e the rows of the output
    layer (ours). For models of that kind (Llama, Qwen3) with tied embeddings; nan where an answer has several tokens.
    """
    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    tokens = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in (first, second)]
    if any(len(ids) > 1 for ids in tokens):
        return float("nan")
    weights = load_file(policy / "model.safetensors")
    gain, rows = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
    return float(np.sqrt(gain.size) * np.linalg.norm(gain * (rows[tokens[0][0]] - rows[tokens[1][0]])))


def at_rest(start: ArrayLike, first: ArrayLike, rl: Rl) -> theory.FloatArray:
    """Log-odds where RL with these settings comes to rest, if the label is the first answer with probability ``first``.

    ``start`` are the log-odds before RL; the arguments broadcast. Raises ValueError as ``theory.grpo_log_odds`` does.
    """
    divided, answers = rl.normalisation == "group", rl.answers_per_prompt
    given = rl.beta if divided else rl.beta * (answers - 1) / answers  # as in training.py
    return theory.grpo_log_odds(start, first, given, answers, normalised=divided)


def confront(study: Study, root: Path, entry: Run, seed: int) -> dict[str, Any]:
    """One run of one seed: change of loss and reward from its parent, measured and predicted, and how far it got."""
    rl, data = study.for_run(entry.name).rl, study.profile.data
    before, answers = label_log_odds(runs.run_folder(root, entry.parent, seed))
    after, _ = label_log_odds(runs.run_folder(root, entry.name, seed))
    believed, p = at_rest(before, expit(before), rl), expit(after)
    row = {"run": entry.name, "seed": seed, "beta": rl.beta, "varied": varied(study, entry), "steps": rl.steps}
    for name, measure in MEASURES.items():
        start = measure(before, answers["label"], 0.0)
        row[name] = measure(after, answers["label"], 0.0) - start
        row[f"{name}, own belief"] = measure(believed, answers["label"], 0.0) - start
        if data.generated and data.disagreement:
            q = 1 - data.disagreement
            calibrated, ideal = np.array([logit(q)]), at_rest([logit(q)], q, rl)
            row[f"{name}, perfect learner"] = measure(ideal, [1], 1 - q) - measure(calibrated, [1], 1 - q)
    return row | {
        "log-odds asked": np.mean(np.abs(believed)),
        "log-odds reached": np.mean(np.abs(after)),
        "silent groups": np.mean(p**rl.answers_per_prompt + (1 - p) ** rl.answers_per_prompt),
        "objective": share_of_objective(before, after, rl.beta),
    }


def share_of_objective(before: ArrayLike, after: ArrayLike, beta: float) -> float:
    """How much of what there is to gain in J - beta KL the log-odds ``after`` have; 1 is ideal RL.

    With the rewards that the policy before RL expects, so that ideal RL is ``theory.self_tilted_log_odds``.
    """
    start, end, best = map(theory.two_label_policy, (before, after, theory.self_tilted_log_odds(before, beta)))
    r = theory.agreement_reward(start)
    low, found, high = (theory.regularised_objective(policy, start, r, beta) for policy in (start, end, best))
    return (found - low) / (high - low)


def read_sweep(study: Study, root: Path, seeds: list[int]) -> pd.DataFrame:
    """``confront`` of every RL run of the sweep, and of finished halves elsewhere in the plan, for every seed."""
    sweep = [run for run in study.runs_of("sweep") if run.stage == "rl"]
    halves = [half for half in (half_of(study, entry) for entry in sweep) if half and half not in sweep]
    finished = [run for run in halves if all(runs.is_complete(runs.run_folder(root, run.name, k)) for k in seeds)]
    return pd.DataFrame([confront(study, root, entry, seed) for entry in [*sweep, *finished] for seed in seeds])


def summarise_sweep(study: Study, per_seed: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per run of the sweep, for theory.json, from ``read_sweep``: means over seeds with 95 % intervals.

    **How convergence is judged.** ``doubling`` is what the second half of the steps was good for: the rise of the loss
    minus that of the run with half of the steps (whose learning rate falls to zero as well), seed by seed. A run has
    ``settled`` if the whole interval lies within a quarter of the rise, predicted or measured, whichever is smaller (a
    run that goes nowhere near its prediction must not pass for its sake), or 0.01 nats if that is more. None where
    there is no such run or only one seed.
    """
    by_run = {name: part.set_index("seed") for name, part in per_seed.groupby("run", sort=False)}
    halves = {entry.name: half_of(study, entry) for entry in study.runs_of("sweep") if entry.stage == "rl"}
    names = {name: half.name for name, half in halves.items() if half and half.name in by_run}
    entries = []
    for run in halves:
        part = by_run[run]
        entry: dict[str, Any] = {"run": run, "seeds": part.index.tolist()}
        entry |= {name: part[name].iloc[0].item() for name in ("beta", "steps")} | {"varied": part["varied"].iloc[0]}
        entry |= {"half": names.get(run), "is_half": run in names.values(), "doubling": None, "settled": None}
        reached = ("log-odds asked", "log-odds reached", "silent groups", "objective")
        entry |= {re.sub("[ -]", "_", name): float(part[name].mean()) for name in reached}
        for measure in MEASURES:
            own, perfect = f"{measure}, own belief", f"{measure}, perfect learner"
            entry[f"change_of_{measure}"] = {
                "measured": over_seeds(part[measure]),
                "own_belief": float(part[own].mean()),
                "perfect_learner": float(part[perfect].mean()) if perfect in part else None,
                "gap_to_own_belief": over_seeds(part[measure] - part[own]),
            }
        if run in names:
            entry["doubling"] = over_seeds(part["loss"] - by_run[names[run]]["loss"])
            rise = min(abs(part["loss, own belief"].mean()), abs(part["loss"].mean()))
            within = verdict_of_amount(entry["doubling"]["ci95"] or (np.nan, np.nan), rise)
            entry["settled"] = within == "reproduced" if len(part) > 1 else None
        entries.append(entry)
    return entries


def effects(per_seed: pd.DataFrame) -> pd.DataFrame:
    """What a run's other settings add, for each run of ``read_sweep`` that has a plain one of its beta and steps.

    Seed by seed, the run's value minus the plain run's: ``loss, reward, log-odds reached`` as text with 95 % intervals,
    and ``loss, predicted``, the mean difference of the own-belief predictions. Empty where there is no such pair.
    """
    by_run = {name: part.set_index("seed") for name, part in per_seed.groupby("run", sort=False)}
    rows = {}
    for part in by_run.values():
        beta, steps, what = (part[name].iloc[0] for name in ("beta", "steps", "varied"))
        plain = per_seed[(per_seed["beta"] == beta) & (per_seed["steps"] == steps) & (per_seed["varied"] == "")]
        if what and len(plain):
            other = by_run[plain["run"].iloc[0]]
            change = {
                name: shown(over_seeds(part[name] - other[name])) for name in ("loss", "reward", "log-odds reached")
            }
            change["loss, predicted"] = f"{(part['loss, own belief'] - other['loss, own belief']).mean():+.3f}"
            rows[f"{beta:g}", steps, what] = change
    return pd.DataFrame(rows).T.rename_axis(["beta", "steps", "instead"]) if rows else pd.DataFrame()


def shown(interval: dict[str, Any] | None, digits: str = "+.3f") -> str:
    """An interval of ``over_seeds`` as text, "+0.210 [+0.182, +0.238]"; "-" for None."""
    if interval is None:
        return "-"
    bounds = [format(bound, digits) for bound in interval["ci95"] or []]
    return format(interval["mean"], digits) + (f" [{bounds[0]}, {bounds[1]}]" if bounds else "")
