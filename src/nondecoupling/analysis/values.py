"""The values behind every row of claims.json, seed by seed: each estimate and interval can be recomputed from them."""

import pandas as pd

from nondecoupling.analysis.claims import GREEDY_UNCHANGED, by_seed, change_of, share_of_bound, values_of_claims
from nondecoupling.analysis.controls import values_of_controls, values_of_joint
from nondecoupling.analysis.geometry import changes_by_start, values_of_geometry
from nondecoupling.analysis.measures import greedy_share, label_loss, label_reward
from nondecoupling.study.plan import one_per_beta
from nondecoupling.study.results import Results


def claim_values(results: Results) -> pd.DataFrame:
    """``claim, seed, value`` of every claim whose runs are in the tables; nan where a seed lacks the quantity.

    T1 has none: it is about random problems.
    """
    found = values_of_claims(results) | values_of_theory(results)
    found |= values_of_controls(results) | values_of_joint(results)
    if results.has(*(run.name for run in results.study.runs_of("geometry") if run.stage == "gradients")):
        found |= values_of_geometry(results, changes_by_start(results))
    tables = [pd.DataFrame({"claim": name, "seed": by.index, "value": by.to_numpy()}) for name, by in found.items()]
    return pd.concat(tables, ignore_index=True)


def values_of_theory(results: Results) -> dict[str, pd.Series]:
    """The quantities of the theory's own statements by seed: T2 to T7, T4 where the sweep was run."""
    study = results.study

    def change(measure, run: str) -> pd.Series:
        parent = str(study.run(run).parent)
        return by_seed(results, lambda after, before: measure(after) - measure(before), run, parent)

    found = {}
    if study.profile.rl.beta > 0:
        found = {"T2": change(label_loss, "sft-rl"), "T3": change(label_reward, "sft-rl")}
    if results.has(*(run.name for run in study.runs_of("sweep"))):
        for run in one_per_beta(study.runs):
            found[f"T4-b{run.changes['rl.beta']:g}"] = change(label_loss, run.name)
    return found | {
        "T5": share_of_bound(results),
        "T6": by_seed(results, greedy_share, "sft", "sft-rl"),
        "T7": change_of(results, GREEDY_UNCHANGED),
    }
