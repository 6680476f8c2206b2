"""Results made by hand, in memory: policies of a few sentences, metrics, and a study around them."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pydantic import TypeAdapter
from scipy.special import logit

from nondecoupling.analysis.theory import two_label_policy
from nondecoupling.study.results import Results
from nondecoupling.study.study import Study

SEEDS = (0, 1, 2)
SOUND = {
    "n": 1000,
    "majority_reward": 0.37,
    "sft_loss": 0.4,
    "label_mass": 1.0,
    "reward_exact": 0.5,
    "reward_sampled": 0.5,
    "reward_sampled_strict": 0.5,
    "reward_greedy": 0.6,
    "accuracy": 0.85,
    "balanced_accuracy": 0.8,
    "mcc": 0.6,
    "predicted_acceptable_rate": 0.7,
}
# What three seeds of each policy measured; the base is the same for all.
MEASURED = {
    "base": {"sft_loss": [0.60] * 3, "reward_exact": [0.2] * 3, "reward_greedy": [0.3] * 3},
    "sft": {"sft_loss": [0.40, 0.42, 0.41], "reward_exact": [0.50, 0.52, 0.48], "reward_greedy": [0.7] * 3},
    "sft-rl": {"sft_loss": [0.55, 0.59, 0.54], "reward_exact": [0.49, 0.54, 0.47], "reward_greedy": [0.7] * 3},
    "rl": {"sft_loss": [0.70, 0.80, 0.75], "reward_exact": [0.60, 0.58, 0.66], "reward_greedy": [0.70, 0.72, 0.71]},
    "rl-sft": {"sft_loss": [0.40, 0.41, 0.42], "reward_exact": [0.50, 0.47, 0.51], "reward_greedy": [0.80, 0.83, 0.82]},
}


def metrics_of(runs: dict[str, dict[str, ArrayLike]], seeds: Iterable[int] = SEEDS, split: str = "dev") -> pd.DataFrame:
    """Final metrics of some runs: those of a sound policy, but for what is given, as a number or one for each seed."""
    seeds = list(seeds)
    columns = {run: {name: np.broadcast_to(values, len(seeds)) for name, values in runs[run].items()} for run in runs}
    return pd.DataFrame(
        {"run": run, "seed": seed, "split": split} | SOUND | {name: values[place] for name, values in given.items()}
        for run, given in columns.items()
        for place, seed in enumerate(seeds)
    )


def odds_of(p_right: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Log-odds of a policy that gives the right label the probability ``p_right``, of one sentence or of each."""
    return logit(p_right) * np.where(np.asarray(labels) == 1, 1, -1)


def policy(
    run: str,
    log_odds: ArrayLike,
    labels: ArrayLike,
    seeds: Iterable[int] = SEEDS,
    mass: float = 1.0,
    truth: ArrayLike | None = None,
    agreement: ArrayLike = 0.9,
    **columns: ArrayLike,
) -> pd.DataFrame:
    """A run's answers on dev; ``log_odds`` broadcast to (seeds, sentences). The truth is the label where none is given.

    ``mass`` is what both answers have together, ``agreement`` q(x), nan where nobody knows it.
    """
    labels, seeds = np.asarray(labels), list(seeds)
    tables = []
    for seed, of_seed in zip(seeds, np.broadcast_to(log_odds, (len(seeds), len(labels))), strict=True):
        unacceptable, acceptable = two_label_policy(of_seed).T + np.log(mass)
        table = pd.DataFrame({"sentence": [f"s{n}" for n in range(len(labels))], "label": labels, "source": "x"})
        table["truth"] = pd.Series(labels if truth is None else truth, index=table.index, dtype="Int64")
        table["agreement"] = np.broadcast_to(agreement, len(labels))
        table = table.assign(logp_acceptable=acceptable, logp_unacceptable=unacceptable, **columns)
        tables.append(table.assign(run=run, seed=seed))
    return pd.concat(tables)


def costs_of(seconds: dict[str, ArrayLike], seeds: Iterable[int] = SEEDS) -> pd.DataFrame:
    """A row of costs.csv for each run and seed; ``seconds`` are a number or one for each seed."""
    seeds, began = list(seeds), pd.Timestamp("2026-01-07T23:59:00+00:00")
    rows = [
        {
            "run": run,
            "seed": seed,
            "started": began.isoformat(),
            "finished": (began + pd.Timedelta(seconds=took)).isoformat(),
            "peak_memory_bytes": 2**29,
        }
        for run, times in seconds.items()
        for seed, took in zip(seeds, np.broadcast_to(times, len(seeds)).tolist(), strict=True)
    ]
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def results_of(
    study: Study,
    answers: Iterable[pd.DataFrame] = (),
    metrics: pd.DataFrame | None = None,
    trajectories: pd.DataFrame | None = None,
    seeds: Iterable[int] = SEEDS,
    folder: Path = Path("nowhere"),
) -> Results:
    """Results of ``study``; a policy whose metrics nobody gives has those of a sound one."""
    none, seeds, answers = pd.DataFrame({"run": [], "seed": [], "step": []}), list(seeds), list(answers)
    table = pd.concat(answers, ignore_index=True) if answers else none
    metrics = metrics_of({run: {} for run in table["run"].unique()}, seeds) if metrics is None else metrics
    provenance = {"seeds": seeds, "chosen": sorted(study.chosen), "parameters": study.profile.model_dump()}
    return Results(
        study, folder, metrics, none if trajectories is None else trajectories, table, none, none, none, provenance
    )


def is_a(kind: type, content: object) -> bool:
    """Whether ``content`` is what a result file of this kind of `contracts` holds: all of its keys and no other.

    Raises ValidationError where a key is missing or a value is of another type, ValueError where JSON cannot hold it.
    """
    json.dumps(content, allow_nan=False)
    return TypeAdapter(kind).validate_python(content, strict=True) == content  # pydantic drops keys it does not know
