"""The claims, the quantity that decides each, and the rule of the verdict: all fixed before any run.

**The rule.** For every seed the quantity is the difference of one metric between two policies of that seed, on the same
dev sentences. With the 95 % t interval of its mean over seeds, a claim is

* *reproduced* if the whole interval lies on the claimed side of zero,
* *not reproduced* if the whole interval lies on the other side,
* *inconclusive* if the interval includes zero, if there is only one seed, or if the paired t-test's p is 0.05 or more
  after Holm's correction over the family of claims that are judged together (the paper's with O1; the controls; joint
  training). Holm's correction was added with the controls, before they were run; it can only withdraw a verdict.

A policy is *collapsed* (`flags.is_collapsed`) if it has learnt the majority label and nothing else. The verdict's note
says where that happened.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nondecoupling import corpus, runs, theory
from nondecoupling.flags import is_collapsed
from nondecoupling.profile import Study
from nondecoupling.statistics import (
    Interval,
    Significance,
    bootstrap_interval,
    holm,
    mcc_interval,
    mcnemar,
    mean_interval,
    paired_test,
)

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]

SIGNIFICANT = 0.05  # largest p, after Holm's correction, of a verdict other than inconclusive
LEAST_TOLERANCE = 0.01  # nats of loss, or reward
PAPER_RIGHT = 365, 354  # sentences of CoLA's 527 that are right after RL, and after SFT on top of it
STATES = ["base", "sft", "sft-rl", "rl", "rl-sft"]
FRONTIER_BETAS = np.geomspace(0.3, 30, 60)  # at which frontiers are drawn


class Claim(NamedTuple):
    """A statement about ``metric(after) - metric(before)`` and the sign it claims. ``paper`` is the paper's number."""

    id: str
    statement: str
    metric: str
    after: str
    before: str
    sign: int
    paper: str


# mean@1 in the paper: 0.385 after RL and 0.343 after SFT, that is 365 and 354 of CoLA's 527 sentences.
CLAIMS = [
    Claim("A1", "RL after SFT raises the SFT loss", "sft_loss", "sft-rl", "sft", +1, "rises sharply"),
    Claim("A2", "After RL the SFT loss ends above the base model's", "sft_loss", "sft-rl", "base", +1, "above base"),
    Claim("B1", "SFT after RL lowers the reward of sampled answers", "reward_sampled", "rl-sft", "rl", -1, "-0.042"),
    Claim("B2", "the same, without sampling noise", "reward_exact", "rl-sft", "rl", -1, "-0.042"),
    Claim("B3", "SFT after RL lowers the reward of greedy answers", "reward_greedy", "rl-sft", "rl", -1, "-0.042"),
    Claim("O1", "(ours) RL after SFT raises the reward of sampled answers", "reward_exact", "sft-rl", "sft", +1, "-"),
]


def verdict_of(low: float, high: float, sign: int) -> Verdict:
    """The verdict for a 95 % interval and the claimed sign; nan bounds (one seed) are inconclusive."""
    if math.isnan(low) or low <= 0 <= high:
        return "inconclusive"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def label_log_odds(folder: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """log p(acceptable) - log p(unacceptable) of a run on dev, (sentences,), and its predictions."""
    answers = runs.read_predictions(folder)
    return (answers["logp_acceptable"] - answers["logp_unacceptable"]).to_numpy(), answers


def predictions_of_theory(study: Study, root: Path, metrics: pd.DataFrame) -> dict[str, float]:
    """What the closed forms predict for each claim where the disagreement is known; empty for real data.

    They assume a learner that knows the grammar and stages at their optimum: SFT ends calibrated (loss H(q), reward
    (2q-1)^2), RL ends at its closed form. For RL from the base that is the measured base policy, tilted by the expected
    reward of each dev sentence.
    """
    disagreement, beta = study.profile.data.disagreement, study.profile.rl.beta
    if disagreement is None or not study.profile.data.generated:
        return {}
    q = 1 - disagreement
    log_odds, answers = label_log_odds(root / "base")
    marks = corpus.read_tsv(root / "data" / corpus.FILES["dev"]).set_index("sentence")["mark"]
    truth = (marks.loc[answers["sentence"]] == "").to_numpy(dtype=int)
    tilted = theory.tilted_log_odds(log_odds, truth, disagreement, beta)
    deficit = float(theory.calibrated_reward(q)) - theory.expected_reward_of_odds(tilted, truth, disagreement)
    base_loss = metrics.loc[metrics["run"] == "base", "sft_loss"].mean()
    return {
        "A1": float(theory.rl_loss(q, beta) - theory.calibrated_loss(q)),
        "A2": float(theory.rl_loss(q, beta)) - base_loss,
        "B1": deficit,
        "B2": deficit,
        "B3": 0.0,
        "O1": float(theory.rl_reward(q, beta) - theory.calibrated_reward(q)),
    }


def frontier_from_policies(root: Path, metrics: pd.DataFrame, betas: Iterable[float]) -> pd.DataFrame:
    """``sft_loss, reward`` per beta, means over seeds: the measured SFT policies at RL's closed form.

    The policies are taken to be calibrated (`theory.self_tilted_log_odds`); both are measured against the dev labels.
    """
    odds = [label_log_odds(runs.run_folder(root, "sft", seed)) for seed in metrics["seed"].unique()]
    points = []
    for beta in betas:
        tilted = [(theory.self_tilted_log_odds(log_odds, beta), answers["label"]) for log_odds, answers in odds]
        points.append(
            {
                "sft_loss": float(np.mean([theory.expected_loss(*pair, 0.0) for pair in tilted])),
                "reward": float(np.mean([theory.expected_reward_of_odds(*pair, 0.0) for pair in tilted])),
            }
        )
    return pd.DataFrame(points)


def perfect_frontier(q: float, betas: np.ndarray) -> pd.DataFrame:
    """``sft_loss, reward`` per beta of a perfect learner, calibrated to agreement ``q``, at RL's closed form."""
    return pd.DataFrame({"sft_loss": theory.rl_loss(q, betas), "reward": theory.rl_reward(q, betas)})


def predictions_from_policies(study: Study, root: Path, metrics: pd.DataFrame) -> dict[str, float]:
    """What the measured policies predict for each claim, means over seeds; needs no known disagreement.

    RL after SFT: the measured SFT policy, taken to be calibrated, at the closed form (`theory.self_tilted_log_odds`);
    RL learns nothing else. SFT after RL: SFT ends where it ends from the base, because its optimum does not depend on
    where it starts.
    """
    start, end = frontier_from_policies(root, metrics, [1e6, study.profile.rl.beta]).itertuples(index=False)
    mean = metrics.groupby("run")[["sft_loss", "reward_exact", "reward_sampled", "reward_greedy"]].mean()
    fall = mean.loc["sft"] - mean.loc["rl"]
    rise = end.sft_loss - start.sft_loss
    return {
        "A1": rise,
        "A2": float(mean.loc["sft", "sft_loss"] + rise - mean.loc["base", "sft_loss"]),
        "B1": float(fall["reward_sampled"]),
        "B2": float(fall["reward_exact"]),
        "B3": float(fall["reward_greedy"]),
        "O1": end.reward - start.reward,
    }


def judged_row(
    claim: Claim,
    interval: Interval,
    test: Significance,
    predicted: float | None,
    from_policies: float | None,
    quantity: str = "",
    note: str = "",
) -> dict[str, Any]:
    """The row of claims.json for one claim; p and verdict are not yet corrected for the other claims of its family."""
    return {
        "id": claim.id,
        "statement": claim.statement,
        "quantity": quantity or f"{claim.metric}: {claim.after} - {claim.before}",
        "paper": claim.paper,
        "predicted": predicted,
        "predicted_from_policies": from_policies,
        "estimate": interval.mean,
        "ci95": None if math.isnan(interval.low) else [interval.low, interval.high],
        "seeds": interval.n,
        "test": test.name,
        "p_value": None if math.isnan(test.p_value) else test.p_value,
        "verdict": verdict_of(interval.low, interval.high, claim.sign),
        "note": note,
    }


def corrected_family(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with ``p_holm``, Holm's correction over all of them; a verdict that does not survive it is withdrawn."""
    corrected = holm([row["p_value"] for row in rows])
    return [
        row | {"p_holm": p} | ({"verdict": "inconclusive"} if p is not None and p >= SIGNIFICANT else {})
        for row, p in zip(rows, corrected, strict=True)
    ]


def judge_claims(
    metrics: pd.DataFrame,
    predicted: dict[str, float],
    from_policies: dict[str, float],
    claims: list[Claim] = CLAIMS,
) -> list[dict[str, Any]]:
    """One row per claim, ready for claims.json, from final metrics as `runs.read_metrics` gives them."""
    return corrected_family(judged_rows(metrics, predicted, from_policies, claims))


def judged_rows(
    metrics: pd.DataFrame, predicted: dict[str, float], from_policies: dict[str, float], claims: list[Claim]
) -> list[dict[str, Any]]:
    """The rows of `judge_claims` before the correction for all claims of their family."""
    rows, collapsed = [], metrics.assign(collapsed=is_collapsed(metrics)).groupby("run")["collapsed"].sum()
    for claim in claims:
        by_seed = metrics.pivot(index="seed", columns="run", values=claim.metric)
        differences = (by_seed[claim.after] - by_seed[claim.before]).to_numpy()
        interval = mean_interval(differences)
        fallen = [f"{run} {collapsed[run]}/{interval.n}" for run in (claim.before, claim.after) if collapsed[run]]
        note = f"collapsed: {', '.join(fallen)}" if fallen else ""
        given = predicted.get(claim.id), from_policies.get(claim.id)
        rows.append(judged_row(claim, interval, paired_test(differences), *given, note=note))
    return rows


def compare_sentences(root: Path, seed: int, before: str, after: str) -> dict[str, Any]:
    """One seed's change from ``before`` to ``after``, judged over dev sentences: what a single run can say.

    Loss and sampled reward with a paired bootstrap over sentences, MCC likewise, greedy accuracy with McNemar's exact
    test. The interval is over sentences, for these two policies; it says nothing about other seeds.
    """
    (odds_before, answers), (odds_after, later) = (
        label_log_odds(runs.run_folder(root, run, seed)) for run in (before, after)
    )
    labels = answers["label"].to_numpy()

    def of_label(table: pd.DataFrame) -> np.ndarray:
        return np.where(labels == 1, table["logp_acceptable"], table["logp_unacceptable"])

    loss, reward = of_label(answers) - of_label(later), 2 * (np.exp(of_label(later)) - np.exp(of_label(answers)))
    said = [(odds > 0).astype(int) for odds in (odds_before, odds_after)]
    test = mcnemar(said[0] == labels, said[1] == labels)

    def shown(interval: Interval) -> str:
        return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"

    return {
        "seed": seed,
        "change": f"{before} to {after}",
        "SFT loss": shown(bootstrap_interval(loss, seed=seed)),
        "reward": shown(bootstrap_interval(reward, seed=seed)),
        "MCC": shown(mcc_interval(labels, said[0], said[1], seed=seed)),
        "more right": f"{test.statistic:+.0f}",
        "McNemar p": f"{test.p_value:.2g}",
    }


def verdict_of_amount(gap: tuple[float, float], predicted: float) -> Verdict:
    """The verdict for "it is the predicted amount" from the 95 % interval of measured minus predicted."""
    (low, high), tolerance = gap, max(LEAST_TOLERANCE, abs(predicted) / 4)
    if math.isnan(low):
        return "inconclusive"
    if -tolerance <= low and high <= tolerance:
        return "reproduced"
    return "not reproduced" if low > tolerance or high < -tolerance else "inconclusive"


def bounds(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Mean and 95 % interval of an entry of theory.json; nan bounds where one seed allows none."""
    low, high = entry["ci95"] or (math.nan, math.nan)
    return entry["mean"], low, high


def judge_theory(content: dict[str, Any], metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """Verdicts for the theory's own statements, from theory.json and the final metrics; rows as of `judge_claims`.

    Amounts (T2 to T4, T7) are judged by the 95 % interval of measured minus predicted: *reproduced* if all of it is
    within a quarter of the prediction (at least 0.01 nats, or 0.01 of reward), *not reproduced* if all of it is beyond,
    else *inconclusive*. Unlike the claims' rules, these were written when first results were known.
    """
    seeds = metrics["seed"].nunique()

    def row(name: str, statement: str, quantity: str, interval: tuple[float, float, float], verdict: Verdict, **more):
        mean, low, high = interval
        ci95 = None if math.isnan(low) else [low, high]
        known = {"id": name, "statement": statement, "quantity": quantity, "paper": "-", "predicted": None}
        found = {"predicted_from_policies": None, "estimate": mean, "ci95": ci95, "seeds": seeds}
        decided = {"test": "interval", "p_value": None, "p_holm": None, "verdict": verdict, "note": ""}
        return known | found | decided | more

    def amount(name: str, statement: str, gaps: Iterable[float], predicted: float, measured: Iterable[float]):
        gap, change = mean_interval(list(gaps)), mean_interval(list(measured))
        verdict = verdict_of_amount((gap.low, gap.high), predicted)
        return row(name, statement, "change", change[:3], verdict, predicted_from_policies=predicted)

    worst = max(content["identity_gaps"].values())
    exact: Verdict = "reproduced" if worst < 1e-9 else "not reproduced"
    statement = "Theorem 3.1, the sign rule and the identities, on random finite policies"
    rows = [row("T1", statement, "largest violation", (worst, 0.0, worst), exact, test="exact")]
    after = [record for record in content["runs"] if record["run"] == "sft-rl"]
    for name, measure, words in (("T2", "loss", "SFT loss"), ("T3", "reward", "sampled reward")):
        start, ideal, end = (
            [record[part][measure] for record in after] for part in ("start", "self_tilted", "measured")
        )
        gaps, changes = np.subtract(end, ideal), np.subtract(end, start)
        predicted = float(np.mean(np.subtract(ideal, start)))
        rows.append(
            amount(name, f"RL after SFT changes the {words} by the closed form's amount", gaps, predicted, changes)
        )
    for entry in content["sweep"] or []:
        if entry["is_half"] or entry["varied"]:  # these runs are there to explain others
            continue
        change = entry["change_of_loss"]
        notes = {True: "", False: "training had not settled", None: "whether training had settled is unknown"}
        rows.append(
            row(
                f"T4-b{entry['beta']:g}",
                f"T2 at beta = {entry['beta']:g}, in {entry['steps']} steps",
                "change",
                bounds(change["measured"]),
                verdict_of_amount(bounds(change["gap_to_own_belief"])[1:], change["own_belief"]),
                predicted_from_policies=change["own_belief"],
                note=notes[entry["settled"]],
            )
        )
    before, last = (metrics[metrics["run"] == run].set_index("seed") for run in ("rl", "rl-sft"))
    bound = 2 * np.sqrt(last["kl_to_parent"] / 2)  # rewards lie between -1 and 1
    used = mean_interval((last["reward_exact"] - before["reward_exact"]).abs() / bound)
    statement = "SFT after RL changes the reward by at most 2 sqrt(KL/2): share of that bound"
    holds: Verdict = "reproduced" if (used.high if used.n > 1 else used.mean) <= 1 else "not reproduced"
    rows.append(row("T5", statement, "|change| / bound", used[:3], holds))
    if "greedy" in content["test_time"]["shares"]:  # else RL gained nothing of which there could be a share
        share = bounds(content["test_time"]["shares"]["greedy"])
        whole: Verdict = "reproduced" if share[1] >= 1 else "not reproduced" if share[2] < 1 else "inconclusive"
        statement = "(ours) Greedy decoding of the SFT policy has RL's whole gain of reward: share of it"
        rows.append(row("T6", statement, "share", share, whole))
    taught = bounds(content["test_time"]["gain_of_greedy_reward"])
    statement, verdict = (
        "(ours) RL after SFT teaches nothing that greedy decoding shows",
        verdict_of_amount(taught[1:], 0.0),
    )
    rows.append(row("T7", statement, "reward_greedy: sft-rl - sft", taught, verdict, predicted=0.0))
    return rows


def claims_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The claims for reading: numbers as signed text with their interval."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:+.3f}"

    return pd.DataFrame(
        {
            "claim": f"{row['id']}: {row['statement']}",
            "paper": row["paper"],
            "predicted": number(row["predicted"]),
            "from the policy": number(row["predicted_from_policies"]),
            "measured": number(row["estimate"]),
            "95 % interval": "-" if row["ci95"] is None else f"[{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}]",
            "p, Holm": "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "verdict": row["verdict"] + (f" ({row['note']})" if row["note"] else ""),
        }
        for row in rows
    )


def states_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of the metrics that tell a skill from a collapse, one row per policy."""
    columns = [
        "sft_loss",
        "label_mass",
        "reward_exact",
        "reward_sampled",
        "reward_sampled_strict",
        "reward_greedy",
        "majority_reward",
        "accuracy",
        "balanced_accuracy",
        "mcc",
        "predicted_acceptable_rate",
    ]
    means = metrics.groupby("run", sort=False)[columns].mean()
    counts = (
        metrics.assign(collapsed=is_collapsed(metrics)).groupby("run", sort=False)["collapsed"].agg(["sum", "size"])
    )
    means["collapsed"] = [f"{done} of {n}" if done else "no" for done, n in counts.itertuples(index=False)]
    return means


def markdown_table(table: pd.DataFrame) -> str:
    """``table`` without its index as a Markdown table."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def sweep_table(entries: list[dict[str, Any]]) -> pd.DataFrame:
    """Rise of the SFT loss by RL for each run of the sweep, from theory.json: measured next to the two predictions.

    What a run changes besides beta stands beside its beta. Runs that only serve as the half of another are left out:
    the last column says what doubling their steps added.
    """
    table = []
    for entry in [entry for entry in entries if not entry["is_half"]]:
        change, doubling = entry["change_of_loss"], entry["doubling"]
        predicted, (mean, low, high) = change["perfect_learner"], bounds(change["measured"])
        added = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bounds(doubling)) if doubling else "-"
        table.append(
            {
                "β": ", ".join([f"{entry['beta']:g}", *([entry["varied"]] if entry["varied"] else [])]),
                "steps": entry["steps"],
                "closed form, perfect learner": "-" if predicted is None else f"{predicted:+.3f}",
                "closed form, from the SFT policies": f"{change['own_belief']:+.3f}",
                "measured rise of the SFT loss": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                "added by doubling the steps": added,
            }
        )
    return pd.DataFrame(table)


def policies_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """What tells a skill from a collapse for each policy of ``metrics``, as text for the README."""
    shown = ["sft_loss", "reward_exact", "reward_greedy", "majority_reward", "mcc", "collapsed"]
    states = states_table(metrics)[shown].map(lambda value: value if isinstance(value, str) else f"{value:.3f}")
    names = {"sft_loss": "SFT loss", "reward_exact": "reward, sampled", "reward_greedy": "reward, greedy"}
    states = states.rename(columns=names | {"majority_reward": "majority answer", "mcc": "MCC"}).reset_index()
    return states.rename(columns={"run": "policy"})


def rows_of(rows: list[dict[str, Any]], families: str) -> list[dict[str, Any]]:
    """The rows of claims.json whose id begins with one of the letters ``families``.

    A, B: the paper's claims; O: ours beside them; T: the theory's statements; K: controls; J: joint training.
    """
    return [row for row in rows if row["id"][0] in families]


def readme_claims(rows: list[dict[str, Any]]) -> str:
    """The paper's claims and ours beside them as a Markdown table."""
    return markdown_table(claims_table(rows_of(rows, "ABO")))


def readme_tables(rows: list[dict[str, Any]], metrics: pd.DataFrame, sweep: list[dict[str, Any]] | None) -> str:
    """The claims, the policies and, where it was run, the sweep of a study as the README's Markdown tables.

    ``metrics`` are the final metrics of the group "main". T is left out: the sweep's table shows the same.
    """
    tables = [policies_table(metrics), *([sweep_table(sweep)] if sweep else [])]
    return "\n\n".join([readme_claims(rows), *(markdown_table(table) for table in tables)])


def readme_controls(rows: list[dict[str, Any]], metrics: pd.DataFrame) -> str:
    """Controls, joint training and their policies as the README's Markdown tables.

    ``metrics`` are the final metrics of the group "controls".
    """
    predicted = ["predicted", "from the policy"]
    tables = [
        claims_table(rows_of(rows, "K")).drop(columns="paper"),
        claims_table(rows_of(rows, "J")).drop(columns=["paper", *predicted]),
        policies_table(metrics),
    ]
    return "\n\n".join(markdown_table(table) for table in tables)


def paper_numbers_table() -> pd.DataFrame:
    """Exact McNemar p of the paper's difference in experiment B, by how many sentences changed between right and wrong.

    365 and 354 of 527 sentences are right; 11 more turned wrong than right. How many turned in all is not reported.
    """
    changed = np.array([11, 15, 19, 23, 25, 27, 31, 51, 101, 151])
    p = [stats.binomtest((n + PAPER_RIGHT[0] - PAPER_RIGHT[1]) // 2, n).pvalue for n in changed]
    return pd.DataFrame({"changed sentences": changed, "share of 527": changed / 527, "p": p})


def compare_claims(fresh: list[dict[str, Any]], reference: list[dict[str, Any]]) -> pd.DataFrame:
    """Fresh claims next to the reference, one row each, PASS or FAIL.

    A row passes if the verdicts agree and the two 95 % intervals overlap: arithmetic differs between machines, and a
    trained policy with it, but not by more than seeds do. Claims of a part that only one side has run (the sweep, the
    controls) are "not compared". Raises ValueError if the paper's claims are not the same on both sides.
    """
    new_rows, old_rows = ({row["id"]: row for row in side} for side in (fresh, reference))
    if [row["id"] for row in rows_of(fresh, "ABO")] != [row["id"] for row in rows_of(reference, "ABO")]:
        raise ValueError("The two sets of claims differ; compare results of the same version of this artifact.")
    rows = []
    for name in dict.fromkeys([*old_rows, *new_rows]):
        if name not in new_rows or name not in old_rows:
            missing = "not run" if name in old_rows else "no reference"
            rows.append({"claim": name, "fresh": missing, "reference": missing, "result": "not compared"})
            continue
        new, old = new_rows[name], old_rows[name]
        (low, high), (known_low, known_high) = (row["ci95"] or [row["estimate"]] * 2 for row in (new, old))
        agrees = new["verdict"] == old["verdict"] and low <= known_high and known_low <= high
        rows.append(
            {
                "claim": new["id"],
                "fresh": f"{new['estimate']:+.3f} [{low:+.3f}, {high:+.3f}] {new['verdict']}",
                "reference": f"{old['estimate']:+.3f} [{known_low:+.3f}, {known_high:+.3f}] {old['verdict']}",
                "result": "PASS" if agrees else "FAIL",
            }
        )
    return pd.DataFrame(rows)
