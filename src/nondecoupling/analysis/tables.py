"""Rows and metrics as tables for reading: in notebooks, on the report and in the README."""

from datetime import datetime

import numpy as np
import pandas as pd
from scipy import stats

from nondecoupling.analysis.collapse import is_collapsed
from nondecoupling.analysis.measures import auroc, temperature_of_least_loss
from nondecoupling.analysis.verdicts import interval_text, remarks, rows_of, shown
from nondecoupling.analysis.wording import in_words
from nondecoupling.study.contracts import ClaimRow, SweepEntry, TheoryFile
from nondecoupling.study.plan import NAMES
from nondecoupling.study.results import Results

PAPER_RIGHT = 365, 354  # sentences of CoLA's 527 that are right after RL, and after SFT on top of it
STATE_COLUMNS = ["sft_loss", "label_mass", "reward_exact", "reward_sampled", "reward_sampled_strict", "reward_greedy"]
STATE_COLUMNS += ["majority_reward", "accuracy", "balanced_accuracy", "mcc", "predicted_acceptable_rate"]
AS_CLAIMED = ("reproduced", "confirmed")
POLICY_COLUMNS = ["sft_loss", "reward_exact", "reward_greedy", "majority_reward", "majority_share", "mcc", "auroc"]
POLICY_COLUMNS += ["temperature", "collapsed"]


def changes(rows: list[ClaimRow]) -> list[ClaimRow]:
    """The rows whose quantity is a difference of SFT losses or of rewards: what one axis can show together."""
    return [row for row in rows if row["quantity"].startswith(("sft_loss: ", "reward_"))]


def theorems_and_tests(rows: list[ClaimRow]) -> tuple[list[ClaimRow], list[ClaimRow]]:
    """The theory's rows: theorems, which must hold in every seed, and statements that an interval decides."""
    theory = rows_of(rows, "T")
    return [row for row in theory if row["test"] == "exact"], [row for row in theory if row["test"] != "exact"]


def findings_table(rows: list[ClaimRow]) -> pd.DataFrame:
    """What the paper says and what was found, in few words; what is not as claimed with what there is to say of it."""
    found = f"here, {max(row['seeds'] for row in rows)} seeds"
    return pd.DataFrame(
        {
            "claim": f"{row['statement'].removeprefix('(ours) ')} ({row['id']})",
            "the paper": "ours" if row["statement"].startswith("(ours)") else row["paper"],
            found: interval_text(row["estimate"], row["ci95"]),
            "verdict": row["verdict"]
            + (f" ({remarks(row)})" if row["verdict"] not in AS_CLAIMED and remarks(row) else ""),
        }
        for row in rows
    )


def claims_table(rows: list[ClaimRow]) -> pd.DataFrame:
    """The claims for reading, as text; columns in which no row has anything to say are left out."""
    table = pd.DataFrame(
        {
            "claim": f"{row['id']}: {row['statement']}" + ("" if row["margin"] is None else f" (±{row['margin']:g})"),
            "paper": row["paper"],
            "perfect learner": interval_text(row["predicted"], None),
            "own belief": interval_text(row["predicted_from_policies"], None),
            "measured [95 %]": interval_text(row["estimate"], row["ci95"]),
            "p, Holm": "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "verdict": row["verdict"] + (f" ({remarks(row)})" if remarks(row) else ""),
        }
        for row in rows
    )
    return table.loc[:, (table != "-").any()]


def states_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of the metrics that tell a skill from a collapse, one row per policy."""
    means = metrics.groupby("run", sort=False)[STATE_COLUMNS].mean()
    fallen = metrics.assign(collapsed=is_collapsed(metrics)).groupby("run", sort=False)["collapsed"]
    counts = fallen.agg(["sum", "size"])
    means["collapsed"] = [f"{done} of {n}" if done else "no" for done, n in counts.itertuples(index=False)]
    return means


def policies_table(results: Results, *runs: str) -> pd.DataFrame:
    """What tells a skill from a collapse, and a calibrated policy from a sharp one, for each of ``runs``, as text.

    How often the likelier answer is the majority label's, how well log-odds rank sentences, and the temperature at
    which the policy's loss is least: 1 is calibrated, more is overconfident. Means over seeds.
    """
    metrics = results.final(*runs)
    states = states_table(metrics)
    last = len(results.study.profile.prompt.answers) - 1
    majority = ((results.answers["label"] == last).groupby(results.answers["seed"]).mean() > 0.5).loc[metrics["seed"]]
    majority = majority.to_numpy()
    rate = metrics["predicted_acceptable_rate"]
    states["majority_share"] = rate.where(majority, 1 - rate).groupby(metrics["run"]).mean().map("{:.0%}".format)
    answers = {(run, seed): results.answers_of(run, seed) for run in states.index for seed in results.seeds}
    for name, measure in (("auroc", auroc), ("temperature", temperature_of_least_loss)):
        states[name] = pd.Series({key: measure(table) for key, table in answers.items()}).groupby(level=0).mean()
    text = states[POLICY_COLUMNS].map(lambda value: value if isinstance(value, str) else f"{value:.3f}")
    return text.rename(columns=in_words, index=NAMES).rename_axis("policy").reset_index()


def finished_controls(results: Results) -> list[str]:
    """The runs of controls and joint training that all seeds have."""
    seeds = results.metrics.groupby("run")["seed"].agg(set)
    return [run.name for run in results.study.runs_of("controls") if seeds.get(run.name) == set(results.seeds)]


def sweep_table(entries: list[SweepEntry]) -> pd.DataFrame:
    """Rise of the SFT loss by RL for each run of the sweep, from theory.json: measured next to the two predictions.

    What a run changes besides beta is named with its beta. Runs that only serve as the half of another are left out:
    the last column says what doubling their steps added.
    """
    return pd.DataFrame(
        {
            "β": ", ".join(filter(None, [f"{entry['beta']:g}", entry["varied"]])),
            "steps": entry["steps"],
            "perfect learner": interval_text(entry["change_of_loss"]["perfect_learner"], None),
            "own belief": interval_text(entry["change_of_loss"]["own_belief"], None),
            "measured rise of the SFT loss": shown(entry["change_of_loss"]["measured"]),
            "added by doubling the steps": shown(entry["doubling"]),
        }
        for entry in entries
        if not entry["is_half"]
    )


def paper_numbers_table() -> pd.DataFrame:
    """Exact McNemar p of the paper's difference in experiment B, by how many sentences changed between right and wrong.

    365 and 354 of 527 sentences are right; 11 more turned wrong than right. How many turned in all is not reported.
    """
    changed = np.array([11, 15, 19, 23, 25, 27, 31, 51, 101, 151])
    p = [stats.binomtest((n + PAPER_RIGHT[0] - PAPER_RIGHT[1]) // 2, n).pvalue for n in changed]
    return pd.DataFrame({"changed sentences": changed, "share of 527": changed / 527, "p": p})


def theory_sentences(content: TheoryFile) -> list[str]:
    """Who pays for RL's reward, what RL found out from the base, and at which beta it ends at the base's loss."""
    found = []
    if payers := content["who_pays"]:
        parts = [
            f"{shown(payer['measured'])} nats where {1 - payer['q']:.0%} of the annotators disagree"
            f" (own belief {payer['own_belief']:+.3f})"
            for payer in (payers[-1], payers[0])
        ]
        found.append(f"Who pays: RL after SFT changes the SFT loss by {' and by '.join(parts)}.")
    if blind := content["uninformed"]:
        found.append(
            f"RL from the base ends at an SFT loss of {shown(blind['loss'], '.3f')} and a reward of "
            f"{shown(blind['reward'])}; ideal RL that cannot tell sentences apart would end at "
            f"{shown(blind['loss_uninformed'], '.3f')} and {shown(blind['reward_uninformed'])}."
        )
    crossing = content["crossing"]
    if crossing and not crossing["measured"]:
        rises = [
            f"{shown(entry['change_of_loss']['measured'])} nats at β = {entry['beta']:g} (own belief "
            f"{entry['change_of_loss']['own_belief']:+.3f})"
            for entry in content["sweep"] or []
            if not (entry["varied"] or entry["is_half"])
        ]
        found.append(
            f"RL after SFT ends at the base's SFT loss at no β of the sweep; it changes the loss by {', '.join(rises)}."
        )
    elif crossing:
        crossed = sum(beta is not None for beta in crossing["by_seed"])
        found.append(
            f"As β falls, RL after SFT comes to end above the base's SFT loss at β* = "
            f"{shown(crossing['measured'], '.2f')}, in {crossed} of {len(crossing['by_seed'])} seeds."
        )
    return found


def seconds_of(costs: pd.DataFrame) -> pd.Series:
    """How long each run took, its measurements included."""
    started, finished = (costs[end].map(datetime.fromisoformat) for end in ("started", "finished"))
    return (finished - started).dt.total_seconds()
