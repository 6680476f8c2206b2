"""The sweep of beta: how far RL after SFT moved at each beta, next to where the theory says that it comes to rest.

Losses (nats) and rewards are those of the two labels, renormalised, on the dev labels as given.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from safetensors.numpy import load_file
from scipy.special import expit, logit
from tokenizers import Tokenizer

from nondecoupling.analysis import theory
from nondecoupling.analysis.claims import interval_of, verdict_of_amount
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import over_seeds, shown
from nondecoupling.study.contracts import Change, SweepEntry
from nondecoupling.study.plan import Run
from nondecoupling.study.profile import Rl
from nondecoupling.study.results import Results

MEASURES = {"loss": theory.expected_loss, "reward": theory.expected_reward_of_odds}


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
    divided = rl.normalisation == "group"
    return theory.grpo_log_odds(start, first, rl.grpo_beta, rl.answers_per_prompt, normalised=divided)


def confront(results: Results, run: Run, seed: int) -> dict[str, Any]:
    """One run of one seed: change of loss and reward from its parent, measured and predicted, and how far it got."""
    rl, q = results.study.settings_of(run).rl, results.study.profile.data.agreement
    answers = results.answers_of(str(run.parent), seed)
    before, after = label_log_odds(answers), label_log_odds(results.answers_of(run.name, seed))
    believed, p = at_rest(before, expit(before), rl), expit(after)
    row = {"run": run.name, "seed": seed, "beta": rl.beta, "instead": run.instead, "steps": rl.steps}
    for name, measure in MEASURES.items():
        start = measure(before, answers["label"], 0.0)
        row[name] = measure(after, answers["label"], 0.0) - start
        row[f"{name}, own belief"] = measure(believed, answers["label"], 0.0) - start
        if q is not None and q < 1:
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


def confront_sweep(results: Results) -> pd.DataFrame | None:
    """``confront`` of every RL run of the sweep, and of the halves elsewhere in the plan, for every seed.

    None where the sweep is not among the results.
    """
    runs = [run for run in results.study.runs_of("sweep") if run.stage == "rl"]
    if not runs or not results.has(*(run.name for run in runs)):
        return None
    halves = [results.study.run(run.half) for run in runs if run.half]
    runs += [half for half in halves if half not in runs]
    return pd.DataFrame([confront(results, run, seed) for run in runs for seed in results.seeds])


def summarise_sweep(results: Results, per_seed: pd.DataFrame) -> list[SweepEntry]:
    """One entry per run of the sweep, for theory.json, from ``confront_sweep``: means over seeds, 95 % intervals.

    **How convergence is judged.** ``doubling`` is what the second half of the steps was good for: the rise of the loss
    minus that of the run with half of the steps (whose learning rate falls to zero as well), seed by seed. A run has
    ``settled`` if the whole interval lies within a quarter of the rise, predicted or measured, whichever is smaller (a
    run that goes nowhere near its prediction must not pass for its sake), or 0.01 nats if that is more. None where
    there is no such run or only one seed.
    """
    by_run = {str(name): part.set_index("seed") for name, part in per_seed.groupby("run", sort=False)}
    runs = [run for run in results.study.runs_of("sweep") if run.stage == "rl"]
    halves = {run.half for run in runs}
    entries = []
    for run in runs:
        part = by_run[run.name]
        doubling = over_seeds(part["loss"] - by_run[run.half]["loss"]) if run.half else None
        settled = None
        if doubling and len(part) > 1:
            rise = min(abs(part["loss, own belief"].mean()), abs(part["loss"].mean()))
            settled = verdict_of_amount(interval_of(doubling, len(part)), rise) == "reproduced"
        entry: SweepEntry = {
            "run": run.name,
            "seeds": part.index.tolist(),
            "beta": float(part["beta"].iloc[0]),
            "steps": int(part["steps"].iloc[0]),
            "varied": run.instead,
            "half": run.half,
            "is_half": run.name in halves,
            "doubling": doubling,
            "settled": settled,
            "log_odds_asked": float(part["log-odds asked"].mean()),
            "log_odds_reached": float(part["log-odds reached"].mean()),
            "silent_groups": float(part["silent groups"].mean()),
            "objective": float(part["objective"].mean()),
            "change_of_loss": change_of(part, "loss"),
            "change_of_reward": change_of(part, "reward"),
        }
        entries.append(entry)
    return entries


def change_of(part: pd.DataFrame, measure: str) -> Change:
    """The change of one measure over the seeds of a run, measured and predicted."""
    own, perfect = f"{measure}, own belief", f"{measure}, perfect learner"
    return {
        "measured": over_seeds(part[measure]),
        "own_belief": float(part[own].mean()),
        "perfect_learner": float(part[perfect].mean()) if perfect in part else None,
        "gap_to_own_belief": over_seeds(part[measure] - part[own]),
    }


def effects(per_seed: pd.DataFrame) -> pd.DataFrame:
    """What a run's other settings add, for each run of ``confront_sweep`` that has a plain one of its beta and steps.

    Seed by seed, the run's value minus the plain run's: ``loss, reward, log-odds reached`` as text with 95 % intervals,
    and ``loss, predicted``, the mean difference of the own-belief predictions. Empty where there is no such pair.
    """
    by_run = {name: part.set_index("seed") for name, part in per_seed.groupby("run", sort=False)}
    rows = {}
    for part in by_run.values():
        beta, steps, what = (part[name].iloc[0] for name in ("beta", "steps", "instead"))
        plain = per_seed[(per_seed["beta"] == beta) & (per_seed["steps"] == steps) & (per_seed["instead"] == "")]
        if what and len(plain):
            other = by_run[plain["run"].iloc[0]]
            change = {
                name: shown(over_seeds(part[name] - other[name])) for name in ("loss", "reward", "log-odds reached")
            }
            change["loss, predicted"] = f"{(part['loss, own belief'] - other['loss, own belief']).mean():+.3f}"
            rows[f"{beta:g}", steps, what] = change
    return pd.DataFrame(rows).T.rename_axis(["beta", "steps", "instead"]) if rows else pd.DataFrame()
