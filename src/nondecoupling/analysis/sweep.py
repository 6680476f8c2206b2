"""The sweep of beta: how far RL after SFT moved at each beta, next to where the theory says that it comes to rest, and
the beta at which it ends at the base's loss.

Losses (nats) and rewards are those of the two labels, renormalised, on the dev labels as given.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from nondecoupling.analysis import theory
from nondecoupling.analysis.claims import interval_of, verdict_of_amount
from nondecoupling.analysis.predictions import agreement_of, label_log_odds, policies_of, where_loss_is
from nondecoupling.analysis.statistics import over_seeds
from nondecoupling.study.contracts import Change, Crossing, CrossingPoint, OverSeeds, SweepEntry
from nondecoupling.study.plan import Run, one_per_beta
from nondecoupling.study.profile import Rl
from nondecoupling.study.results import Results

MEASURES = {"loss": theory.expected_loss, "reward": theory.expected_reward_of_odds}
DIVIDED, PLAIN = "sft-rl-b1-group", "sft-rl-b1"  # with and without GRPO's division by the group's deviation


def at_rest(start: ArrayLike, first: ArrayLike, rl: Rl) -> theory.FloatArray:
    """Log-odds where RL with these settings comes to rest, if the label is the first answer with probability ``first``.

    ``start`` are the log-odds before RL; the arguments broadcast. Raises ValueError as ``theory.grpo_log_odds`` does.
    """
    divided = rl.normalisation == "group"
    return theory.grpo_log_odds(start, first, rl.grpo_beta, rl.answers_per_prompt, normalised=divided)


def confront(results: Results, run: Run, seed: int) -> dict[str, Any]:
    """One run of one seed: change of loss and reward from its parent, measured and predicted, and how far it got."""
    rl, answers = results.study.settings_of(run).rl, results.answers_of(str(run.parent), seed)
    before, after = label_log_odds(answers), label_log_odds(results.answers_of(run.name, seed))
    believed, p, q = at_rest(before, expit(before), rl), expit(after), agreement_of(answers)
    row = {"run": run.name, "seed": seed, "beta": rl.beta, "instead": run.instead, "steps": rl.steps}
    for name, measure in MEASURES.items():
        start = measure(before, answers["label"], 0.0)
        row[name] = measure(after, answers["label"], 0.0) - start
        row[f"{name}, own belief"] = measure(believed, answers["label"], 0.0) - start
    return (
        row
        | ({} if q is None else perfect_changes(q, rl))
        | {
            "log-odds asked": np.mean(np.abs(believed)),
            "log-odds reached": np.mean(np.abs(after)),
            "silent groups": np.mean(p**rl.answers_per_prompt + (1 - p) ** rl.answers_per_prompt),
            "objective": share_of_objective(before, after, rl.beta),
            "slope": slope_of_shift(believed - before, after - before),
        }
    )


def perfect_changes(q: np.ndarray, rl: Rl) -> dict[str, float]:
    """A perfect learner's changes of loss and reward by RL from the calibrated policy, means over the sentences' q(x).

    Sentences whose label is certain have no finite log-odds, and nothing to change.
    """
    unsure = q[q < 1]
    if not unsure.size:
        return {f"{name}, perfect learner": 0.0 for name in MEASURES}
    calibrated, truth = logit(unsure), np.ones_like(unsure)
    ideal, share = at_rest(calibrated, unsure, rl), unsure.size / q.size
    return {
        f"{name}, perfect learner": share * (measure(ideal, truth, 1 - unsure) - measure(calibrated, truth, 1 - unsure))
        for name, measure in MEASURES.items()
    }


def slope_of_shift(ideal: np.ndarray, measured: np.ndarray) -> float:
    """Measured shift of log-odds per nat of ideal shift: least squares through zero, both arrays (sentences,).

    The same whichever of the two answers comes first.
    """
    return float(ideal @ measured / (ideal @ ideal))


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
            "slope": over_seeds(part["slope"]),
            "change_of_loss": change_over_seeds(part, "loss"),
            "change_of_reward": change_over_seeds(part, "reward"),
        }
        entries.append(entry)
    return entries


def change_over_seeds(part: pd.DataFrame, measure: str) -> Change:
    """The change of one measure over the seeds of a run, measured and predicted."""
    own, perfect = f"{measure}, own belief", f"{measure}, perfect learner"
    return {
        "measured": over_seeds(part[measure]),
        "own_belief": float(part[own].mean()),
        "perfect_learner": float(part[perfect].mean()) if perfect in part else None,
        "gap_to_own_belief": over_seeds(part[measure] - part[own]),
    }


def effect_of_division(per_seed: pd.DataFrame) -> dict[str, OverSeeds] | None:
    """What dividing by the group's deviation adds, seed by seed, from ``confront_sweep``; None where it was not run."""
    if not {DIVIDED, PLAIN} <= set(per_seed["run"]):
        return None
    by_run = {run: per_seed[per_seed["run"] == run].set_index("seed") for run in (DIVIDED, PLAIN)}
    names = ("loss", "loss, own belief", "reward", "reward, own belief", "log-odds reached")
    return {name: over_seeds(by_run[DIVIDED][name] - by_run[PLAIN][name]) for name in names}


# The base's loss as a function of beta: claim A2


def crossing(results: Results) -> Crossing | None:
    """L after RL minus the base's L along the sweep's whole runs, and the beta at which it changes its sign.

    Losses are claim A2's ``sft_loss``; predictions are closed forms. None where the sweep is not among the results.
    """
    study = results.study
    runs = sorted(one_per_beta(study.runs), key=lambda run: -study.settings_of(run).rl.beta)
    if not runs or not results.has(*(run.name for run in runs)):
        return None
    own = study.run("sft-rl")
    betas = {run.name: study.settings_of(run).rl.beta for run in (*runs, own)}
    if betas["sft-rl"] == 0:  # no closed form
        del betas["sft-rl"]
    base, predicted, points = loss_of(results, "base"), predicted_losses(results), []
    curve: dict[float, pd.Series] = {}
    for name, beta in betas.items():
        part = pd.DataFrame({"loss": loss_of(results, name) - base})
        for kind, losses in predicted.items():
            part[f"loss, {kind}"] = pd.Series({seed: loss(beta) for seed, loss in losses.items()}) - base
        points.append(CrossingPoint(**change_over_seeds(part, "loss"), run=name, beta=beta))
        curve.setdefault(beta, part["loss"])  # of the study's own beta the run with more steps
    table = pd.DataFrame(curve).sort_index(axis=1, ascending=False)
    by_seed = [crossing_of(table.columns.to_numpy(), row) for row in table.to_numpy()]
    found = {
        kind: geometric_mean([where_loss_is(base[seed], loss) for seed, loss in losses.items()])
        for kind, losses in predicted.items()
    }
    means = {kind: mean["mean"] if mean else None for kind, mean in found.items()}
    return {
        "points": points,
        "by_seed": by_seed,
        "measured": geometric_mean(by_seed),
        "own_belief": means["own belief"],
        "perfect_learner": means.get("perfect learner"),
    }


def predicted_losses(results: Results) -> dict[str, dict[int, Callable[[float], float]]]:
    """Where the SFT loss ends by ideal RL after SFT, a function of beta for each seed, by who predicts it.

    By own belief from the measured SFT policy; for a perfect learner, where q(x) is known, from the calibrated one.
    """

    def own_loss(log_odds: np.ndarray, labels: pd.Series, beta: float) -> float:
        return theory.loss_on_labels(theory.self_tilted_log_odds(log_odds, beta), labels)

    def perfect_loss(q: np.ndarray, beta: float) -> float:
        return float(np.mean(theory.rl_loss(q, beta)))

    found: dict[str, dict[int, Callable[[float], float]]] = {"own belief": {}, "perfect learner": {}}
    for seed, (log_odds, answers) in zip(results.seeds, policies_of(results, "sft"), strict=True):
        found["own belief"][seed] = partial(own_loss, log_odds, answers["label"])
        if (q := agreement_of(answers)) is not None:
            found["perfect learner"][seed] = partial(perfect_loss, q)
    return {kind: losses for kind, losses in found.items() if len(losses) == len(results.seeds)}


def loss_of(results: Results, run: str) -> pd.Series:
    """A run's ``sft_loss`` on dev by seed, in the order of the results' seeds."""
    return results.final(run).set_index("seed")["sft_loss"].loc[results.seeds]


def crossing_of(betas: np.ndarray, above: np.ndarray) -> float | None:
    """The largest beta at which ``above`` turns from negative to positive, linear in log beta between falling betas."""
    turns = np.flatnonzero((above[:-1] < 0) & (above[1:] >= 0))
    if not turns.size:
        return None
    low, high = turns[0], turns[0] + 1
    way = above[low] / (above[low] - above[high])
    return float(np.exp((1 - way) * np.log(betas[low]) + way * np.log(betas[high])))


def geometric_mean(values: list[float | None]) -> OverSeeds | None:
    """exp of the mean of logarithms and of its 95 % interval, over the seeds that have a value; None for none."""
    found = [np.log(value) for value in values if value is not None]
    if not found:
        return None
    logs = over_seeds(found)
    bounds = logs["ci95"] and [float(np.exp(bound)) for bound in logs["ci95"]]
    return {"mean": float(np.exp(logs["mean"])), "ci95": bounds}
