"""The claims, the quantity that decides each, and the rule of the verdict: all fixed before any run.

**The rule.** For every seed the quantity is the difference of one metric between two policies of that seed, on the same
dev sentences. With the 95 % t interval of its mean over seeds, a claim is

* *reproduced* if the whole interval lies on the claimed side of zero,
* *not reproduced* if the whole interval lies on the other side,
* *inconclusive* if the interval includes zero, if there is only one seed, or if the paired t-test's p is 0.05 or more
  after Holm's correction over the family of claims that are judged together (the paper's with O1; the controls; joint
  training). Holm's correction was added with the controls, before they were run; it can only withdraw a verdict.

A claim whose runs are not there is *not run*. A policy is *collapsed* (`collapse.is_collapsed`) if it has learnt the
majority label and nothing else; the verdict's note says where that happened.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nondecoupling.analysis import predictions
from nondecoupling.analysis.collapse import is_collapsed
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import (
    Interval,
    Significance,
    bootstrap_interval,
    holm,
    interval_text,
    mcc_interval,
    mcnemar,
    mean_interval,
    paired_test,
)
from nondecoupling.study.contracts import ClaimRow, OverSeeds, TheoryFile, Verdict
from nondecoupling.study.results import Results

SIGNIFICANT = 0.05  # largest p, after Holm's correction, of a verdict other than inconclusive
LEAST_TOLERANCE = 0.01  # nats of loss, or reward


class Claim(NamedTuple):
    """A statement about ``metric(after) - metric(before)`` and the sign it claims. ``paper`` is the paper's number."""

    id: str
    statement: str
    metric: str
    after: str
    before: str
    sign: int
    paper: str = "-"

    @property
    def quantity(self) -> str:
        """What is measured, in the words of claims.json."""
        return f"{self.metric}: {self.after} - {self.before}"


# mean@1 in the paper: 0.385 after RL and 0.343 after SFT, that is 365 and 354 of CoLA's 527 sentences.
CLAIMS = [
    Claim("A1", "RL after SFT raises the SFT loss", "sft_loss", "sft-rl", "sft", +1, "rises sharply"),
    Claim("A2", "After RL the SFT loss ends above the base model's", "sft_loss", "sft-rl", "base", +1, "above base"),
    Claim("B1", "SFT after RL lowers the reward of sampled answers", "reward_sampled", "rl-sft", "rl", -1, "-0.042"),
    Claim("B2", "the same, without sampling noise", "reward_exact", "rl-sft", "rl", -1, "-0.042"),
    Claim("B3", "SFT after RL lowers the reward of greedy answers", "reward_greedy", "rl-sft", "rl", -1, "-0.042"),
    Claim("O1", "(ours) RL after SFT raises the reward of sampled answers", "reward_exact", "sft-rl", "sft", +1),
]


def verdict_of(low: float, high: float, sign: int) -> Verdict:
    """The verdict for a 95 % interval and the claimed sign; nan bounds (one seed) are inconclusive."""
    if math.isnan(low) or low <= 0 <= high:
        return "inconclusive"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def verdict_of_amount(gap: Interval, predicted: float) -> Verdict:
    """The verdict for "it is the predicted amount" from the 95 % interval of measured minus predicted."""
    tolerance = max(LEAST_TOLERANCE, abs(predicted) / 4)
    if math.isnan(gap.low):
        return "inconclusive"
    if -tolerance <= gap.low and gap.high <= tolerance:
        return "reproduced"
    return "not reproduced" if gap.low > tolerance or gap.high < -tolerance else "inconclusive"


def interval_of(entry: OverSeeds, seeds: int) -> Interval:
    """A mean over seeds, as result files hold it, with nan where one seed allows no bounds."""
    low, high = entry["ci95"] or (math.nan, math.nan)
    return Interval(entry["mean"], low, high, seeds)


def claim_row(
    claim: Claim, interval: Interval, verdict: Verdict, test: Significance | str = "interval", **more: Any
) -> ClaimRow:
    """The row of a claim; p and verdict are not yet corrected for the other claims of its family."""
    p = test.p_value if isinstance(test, Significance) else math.nan
    row: ClaimRow = {
        "id": claim.id,
        "statement": claim.statement,
        "quantity": claim.quantity,
        "paper": claim.paper,
        "predicted": None,
        "predicted_from_policies": None,
        "estimate": interval.mean,
        "ci95": interval.bounds,
        "seeds": interval.n,
        "test": test.name if isinstance(test, Significance) else test,
        "p_value": None if math.isnan(p) else p,
        "p_holm": None,
        "verdict": verdict,
        "note": "",
    }
    return row | more  # type: ignore[return-value]


def not_run(claim: Claim, what: str) -> ClaimRow:
    """The row of a claim whose runs are not there; ``what`` makes them."""
    nothing = {"estimate": None, "seeds": 0, "note": what}
    return claim_row(claim, Interval(math.nan, math.nan, math.nan, 0), "not run", "-", **nothing)


def corrected_family(rows: list[ClaimRow]) -> list[ClaimRow]:
    """``rows`` with ``p_holm``, Holm's correction over all of them; a verdict that does not survive it is withdrawn."""
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = p
        if p is not None and p >= SIGNIFICANT:
            row["verdict"] = "inconclusive"
    return rows


def judge_claims(results: Results) -> list[ClaimRow]:
    """The rows of the paper's claims and O1."""
    predicted = predictions.for_perfect_learner(results), predictions.from_policies(results)
    return corrected_family(judged_rows(results.final(), CLAIMS, *predicted))


def judged_rows(
    metrics: pd.DataFrame, claims: list[Claim], perfect: predictions.Predictions, policies: predictions.Predictions
) -> list[ClaimRow]:
    """The rows of ``claims`` before the correction for their family, from final metrics on dev and two predictions."""
    rows, collapsed = [], metrics.assign(collapsed=is_collapsed(metrics)).groupby("run")["collapsed"].sum()
    for claim in claims:
        by_seed = metrics.pivot(index="seed", columns="run", values=claim.metric)
        differences = (by_seed[claim.after] - by_seed[claim.before]).to_numpy()
        interval = mean_interval(differences)
        fallen = [f"{run} {collapsed[run]}/{interval.n}" for run in (claim.before, claim.after) if collapsed[run]]
        rows.append(
            claim_row(
                claim,
                interval,
                verdict_of(interval.low, interval.high, claim.sign),
                paired_test(differences),
                predicted=perfect.get(claim.id),
                predicted_from_policies=policies.get(claim.id),
                note=f"collapsed: {', '.join(fallen)}" if fallen else "",
            )
        )
    return rows


def compare_sentences(results: Results, seed: int, before: str, after: str) -> dict[str, Any]:
    """One seed's change from ``before`` to ``after``, judged over dev sentences: what a single run can say.

    Loss and sampled reward with a paired bootstrap over sentences, MCC likewise, greedy accuracy with McNemar's exact
    test. The interval is over sentences, for these two policies; it says nothing about other seeds.
    """
    answers, later = (results.answers_of(run, seed) for run in (before, after))
    labels = answers["label"].to_numpy()

    def of_label(table: pd.DataFrame) -> np.ndarray:
        return np.where(labels == 1, table["logp_acceptable"], table["logp_unacceptable"])

    loss, reward = of_label(answers) - of_label(later), 2 * (np.exp(of_label(later)) - np.exp(of_label(answers)))
    said = [(label_log_odds(table) > 0).astype(int) for table in (answers, later)]
    test = mcnemar(said[0] == labels, said[1] == labels)

    def shown(interval: Interval) -> str:
        return interval_text(interval.mean, interval.bounds)

    return {
        "seed": seed,
        "change": f"{before} to {after}",
        "SFT loss": shown(bootstrap_interval(loss, seed=seed)),
        "reward": shown(bootstrap_interval(reward, seed=seed)),
        "MCC": shown(mcc_interval(labels, said[0], said[1], seed=seed)),
        "more right": f"{test.statistic:+.0f}",
        "McNemar p": f"{test.p_value:.2g}",
    }


# The theory's own statements


def judge_theory(results: Results, content: TheoryFile) -> list[ClaimRow]:
    """Verdicts for the theory's own statements, from theory.json and the tables that it was made from.

    Amounts (T2 to T4, T7) are judged by the 95 % interval of measured minus predicted: *reproduced* if all of it is
    within a quarter of the prediction (at least 0.01 nats, or 0.01 of reward), *not reproduced* if all of it is beyond,
    else *inconclusive*. Unlike the claims' rules, these were written when first results were known.
    """
    seeds, worst = len(results.seeds), float(np.max(list(content["identity_gaps"].values())))
    statement = "Theorem 3.1, the sign rule and the identities, on random finite policies"
    exact = statement_row("T1", statement, "largest violation", Interval(worst, 0.0, worst, seeds), worst < 1e-9)
    rows: list[ClaimRow] = [exact | {"test": "exact"}]  # type: ignore[list-item]
    after = [record for record in content["runs"] if record["run"] == "sft-rl"]
    amounts = (("T2", "loss", "SFT loss"), ("T3", "reward", "sampled reward"))
    for name, measure, words in amounts if content["beta"] > 0 else ():  # beta = 0 has no closed form
        start, ideal, end = (
            [record[part][measure] for record in after]  # type: ignore[literal-required, index]
            for part in ("start", "self_tilted", "measured")
        )
        rows.append(
            statement_row(
                name,
                f"RL after SFT changes the {words} by the closed form's amount",
                "change",
                mean_interval(np.subtract(end, start)),
                verdict_of_amount(mean_interval(np.subtract(end, ideal)), float(np.mean(np.subtract(ideal, start)))),
                predicted_from_policies=float(np.mean(np.subtract(ideal, start))),
            )
        )
    rows += sweep_rows(results, content)
    before, last = (results.final(run).set_index("seed") for run in ("rl", "rl-sft"))
    bound = 2 * np.sqrt(last["kl_to_parent"] / 2)  # Pinsker's, of rewards between -1 and 1
    used = mean_interval((last["reward_exact"] - before["reward_exact"]).abs() / bound)
    statement = "SFT after RL changes the reward by at most 2 sqrt(KL/2): share of that bound"
    holds = (used.high if used.n > 1 else used.mean) <= 1
    rows.append(statement_row("T5", statement, "|change| / bound", used, holds))
    shares = content["test_time"]["shares"]
    if "greedy" in shares:  # else RL gained nothing of which there could be a share
        share = interval_of(shares["greedy"], seeds)
        whole: Verdict = "reproduced" if share.low >= 1 else "not reproduced" if share.high < 1 else "inconclusive"
        statement = "(ours) Greedy decoding of the SFT policy has RL's whole gain of reward: share of it"
        rows.append(statement_row("T6", statement, "share", share, whole))
    taught = interval_of(content["test_time"]["gain_of_greedy_reward"], seeds)
    statement, quantity = (
        "(ours) RL after SFT teaches nothing that greedy decoding shows",
        "reward_greedy: sft-rl - sft",
    )
    rows.append(statement_row("T7", statement, quantity, taught, verdict_of_amount(taught, 0.0), predicted=0.0))
    return rows


def statement_row(
    name: str, statement: str, quantity: str, interval: Interval, verdict: Verdict | bool, **more: Any
) -> ClaimRow:
    """The row of a statement of the theory; a verdict may be given as whether it holds."""
    if isinstance(verdict, bool | np.bool_):
        verdict = "reproduced" if verdict else "not reproduced"
    return claim_row(Claim(name, statement, "", "", "", +1), interval, verdict, quantity=quantity, **more)


def sweep_rows(results: Results, content: TheoryFile) -> Iterable[ClaimRow]:
    """T4: T2 at other betas, a row per beta of the plan; runs that are there to explain others have none."""
    notes = {True: "", False: "training had not settled", None: "whether training had settled is unknown"}
    entries = {entry["run"]: entry for entry in content["sweep"] or []}
    for run in results.study.runs_of("sweep"):
        if not run.half:
            continue
        beta, steps = run.changes["rl.beta"], run.changes["rl.steps"]
        name, statement = f"T4-b{beta:g}", f"T2 at beta = {beta:g}, in {steps} steps"
        if run.name not in entries:
            yield not_run(Claim(name, statement, "", "", "", +1), "make betas") | {"quantity": "change"}  # type: ignore
            continue
        entry = entries[run.name]
        change, n = entry["change_of_loss"], len(entry["seeds"])
        gap, own = interval_of(change["gap_to_own_belief"], n), change["own_belief"]
        yield statement_row(
            name,
            statement,
            "change",
            interval_of(change["measured"], n),
            verdict_of_amount(gap, own),
            predicted_from_policies=own,
            note=notes[entry["settled"]],
        )
