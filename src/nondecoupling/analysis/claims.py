"""The claims, the quantity that decides each, and the rule of the verdict: all fixed before any run of this plan.

(Results of an earlier plan were known.)

**The rule.** A claim is about the mean over seeds of one quantity, mostly the difference of one metric between two
policies of the same seed, on the same dev sentences. A claim about a sign, or about which side of a value the mean
lies on, *holds* if the whole 95 % t interval is on the claimed side and *fails* if it is on the other side. A claim of
no difference has a margin, what still counts as none: it holds if the whole 90 % interval is within the margin (two
one-sided tests at 5 %), and fails if it is wholly outside. All else is *inconclusive*: an interval across the bound,
a single seed, or a p of 0.05 or more after Holm's correction over the claims that are judged together (the paper's
with O; the theory's; the controls; joint training; geometry; more answers), which can only withdraw a verdict.

**The words** (`worded`). The paper's claims (A, B) are *reproduced* or *not reproduced*; ours (O, T, K, J, G, M) are
*confirmed* or *refuted*. A claim whose runs are not there is *not run*. A seed in which a quantity does not exist (a
share of a rise where nothing rose) is left out, and the note says which. A policy is *collapsed*
(`collapse.is_collapsed`) if it has learnt the majority label and nothing else; the note says where that happened.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nondecoupling.analysis import predictions
from nondecoupling.analysis.collapse import is_collapsed
from nondecoupling.analysis.measures import auroc, greedy_share, share_taken_back
from nondecoupling.analysis.statistics import (
    ROUNDING,
    Interval,
    bootstrap_interval,
    equivalence_test,
    holm,
    mcc_interval,
    mcnemar,
    mean_interval,
    paired_test,
)
from nondecoupling.analysis.verdicts import SIGNIFICANT, interval_text
from nondecoupling.study.contracts import ClaimRow, OverSeeds, TheoryFile, Verdict
from nondecoupling.study.plan import MAKES, NAMES, one_per_beta
from nondecoupling.study.results import Results, label_log_probabilities, likelier_labels

LEAST_TOLERANCE = 0.01  # nats of loss, or reward
# Margins of claims of no difference. Loss: a tenth of the rise by RL that theory expects in the default study (0.2 nats
# at 10 % disagreement and beta = 0.5); what is less would not change how experiment A is read. Reward: ten more right
# answers to a thousand sentences, and half of the fall that the paper calls a loss (0.042).
LOSS_MARGIN, REWARD_MARGIN = 0.02, 0.02


class Claim(NamedTuple):
    """A statement about the mean over seeds of a quantity, mostly ``metric(after) - metric(before)``.

    It claims that the mean lies above (``sign`` +1) or below (-1) ``than``, or, with a ``margin``, that it lies within
    +-margin; the sign is 0 then. ``paper`` is the paper's number.
    """

    id: str
    statement: str
    metric: str
    after: str
    before: str
    sign: int
    paper: str = "-"
    than: float = 0.0
    margin: float | None = None

    @property
    def quantity(self) -> str:
        """What is measured, in the words of claims.json."""
        return f"{self.metric}: {self.after} - {self.before}" if self.before else self.metric


# mean@1 in the paper: 0.385 after RL and 0.343 after SFT, that is 365 and 354 of CoLA's 527 sentences. How its answers
# are decoded is not disclosed, so that B has two readings, sampled (B1, B2) and greedy (B3), and neither is the paper's
# own.
CLAIMS = [
    Claim("A1", "RL after SFT raises the SFT loss", "sft_loss", "sft-rl", "sft", +1, "rises sharply"),
    Claim("A2", "After RL the SFT loss ends above the base model's", "sft_loss", "sft-rl", "base", +1, "above base"),
    Claim("B1", "SFT after RL lowers mean@1, read as sampled answers", "reward_sampled", "rl-sft", "rl", -1, "-0.042"),
    Claim("B2", "SFT after RL lowers sampled mean@1, in expectation", "reward_exact", "rl-sft", "rl", -1, "-0.042"),
    Claim("B3", "SFT after RL lowers mean@1, read as greedy answers", "reward_greedy", "rl-sft", "rl", -1, "-0.042"),
    Claim("O1", "(ours) RL after SFT raises the reward of sampled answers", "reward_exact", "sft-rl", "sft", +1),
    Claim(
        "O2",
        "(ours) One temperature after RL takes back most of the rise of the SFT loss",
        "share of the rise from sft to sft-rl",
        "sft-rl",
        "",
        +1,
        than=0.5,
    ),
    Claim("O3", "(ours) RL after SFT ranks sentences worse", "auroc", "sft-rl", "sft", -1),
]
IN_FORMAT = 0.9  # share of a base's answers that are worded as asked for, below which A2 says what that costs
GREEDY_SUFFICES = Claim(
    "T6",
    "(ours) Greedy decoding of the SFT policy has RL's whole gain of reward: share of it",
    "share",
    "sft",
    "",
    +1,
    than=1.0,
)
GREEDY_UNCHANGED = Claim(
    "T7",
    "(ours) RL after SFT teaches nothing that greedy decoding shows",
    "reward_greedy",
    "sft-rl",
    "sft",
    0,
    margin=REWARD_MARGIN,
)


# The rule


def worded(name: str, verdict: Verdict) -> Verdict:
    """The verdict of the claim ``name`` in its words: nothing of the paper is reproduced by a claim of ours."""
    ours: dict[Verdict, Verdict] = {"reproduced": "confirmed", "not reproduced": "refuted"}
    return verdict if name[0] in "AB" else ours.get(verdict, verdict)


def verdict_of(low: float, high: float, sign: int) -> Verdict:
    """The verdict, in the paper's words, for a 95 % interval and the claimed sign; nan bounds are inconclusive."""
    if math.isnan(low) or low <= 0 <= high:
        return "inconclusive"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def verdict_of_amount(gap: Interval, predicted: float) -> Verdict:
    """`verdict_of_size` for "it is the predicted amount", from the 95 % interval of measured minus predicted."""
    return verdict_of_size(gap, max(LEAST_TOLERANCE, abs(predicted) / 4))


def verdict_of_size(interval: Interval, margin: float) -> Verdict:
    """The verdict, in the paper's words, for "it is no more than ``margin``, up or down"."""
    if math.isnan(interval.low):
        return "inconclusive"
    if -margin <= interval.low and interval.high <= margin:
        return "reproduced"
    return "not reproduced" if interval.low > margin or interval.high < -margin else "inconclusive"


def interval_of(entry: OverSeeds, seeds: int) -> Interval:
    """A mean over seeds, as result files hold it, with nan where one seed allows no bounds."""
    low, high = entry["ci95"] or (math.nan, math.nan)
    return Interval(entry["mean"], low, high, seeds)


def claim_row(claim: Claim, interval: Interval, verdict: Verdict, test: str = "interval", **more: Any) -> ClaimRow:
    """The row of a claim; p and verdict are not yet corrected for the other claims of its family."""
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
        "margin": claim.margin,
        "test": test,
        "p_value": None,
        "p_holm": None,
        "verdict": worded(claim.id, verdict),
        "note": "",
    }
    return row | more  # type: ignore[return-value]


def not_run(claim: Claim, what: str) -> ClaimRow:
    """The row of a claim that has no value in any seed; ``what`` says why, or makes them."""
    nothing = {"estimate": None, "seeds": 0, "note": what}
    return claim_row(claim, Interval(math.nan, math.nan, math.nan, 0), "not run", "-", **nothing)


def judged(claim: Claim, values: pd.Series, notes: Iterable[str] = (), **more: Any) -> ClaimRow:
    """The row of ``claim`` by its rule, from its quantity in every seed, before the correction for its family."""
    found = values.dropna()
    if found.empty:
        return not_run(claim, "its quantity exists in no seed")
    interval = mean_interval(found)
    if claim.margin is None:
        test = paired_test(found - claim.than)
        p, verdict = test.p_value, verdict_of(interval.low - claim.than, interval.high - claim.than, claim.sign)
    else:
        test = equivalence_test(found, claim.margin)
        p = min(test.p_value, 1 - test.p_value)  # of lying within, or else of lying beyond
        verdict = verdict_of_size(mean_interval(found, 0.9), claim.margin)
    lacking = [str(seed) for seed in values.index[values.isna()]]
    said = [*notes, f"no such quantity in seeds {', '.join(lacking)}" if lacking else ""]
    described = {"p_value": None if math.isnan(p) else p, "note": "; ".join(filter(None, said))}
    return claim_row(claim, interval, verdict, test.name, **described, **more)


def corrected_family(rows: list[ClaimRow]) -> list[ClaimRow]:
    """``rows`` with ``p_holm``, Holm's correction over all of them; a verdict that does not survive it is withdrawn."""
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = p
        if p is not None and p >= SIGNIFICANT:
            row["verdict"] = "inconclusive"
    return rows


# The claims of the paper, and ours beside them


def by_seed(results: Results, measure: Callable[..., float], *runs: str) -> pd.Series:
    """``measure`` of the answers of ``runs``, for each seed."""
    return pd.Series({seed: measure(*(results.answers_of(run, seed) for run in runs)) for seed in results.seeds})


def change_of(results: Results, claim: Claim) -> pd.Series:
    """``metric(after) - metric(before)`` for each seed."""
    if claim.metric == "auroc":
        return by_seed(results, lambda after, before: auroc(after) - auroc(before), claim.after, claim.before)
    table = results.final(claim.after, claim.before).pivot(index="seed", columns="run", values=claim.metric)
    return table[claim.after] - table[claim.before]


def values_of_claims(results: Results) -> dict[str, pd.Series]:
    """The quantity of each of `CLAIMS` by seed."""
    special = {"O2": partial(by_seed, results, share_taken_back, "sft", "sft-rl")}
    return {claim.id: special.get(claim.id, partial(change_of, results, claim))() for claim in CLAIMS}


def judge_claims(results: Results) -> list[ClaimRow]:
    """The rows of the paper's claims, and of ours beside them."""
    predicted = predictions.for_perfect_learner(results), predictions.from_policies(results)
    return judged_family(results, CLAIMS, values_of_claims(results), predicted, {"A2": base_note(results)})


def base_note(results: Results) -> str:
    """What A2 depends on: the price of the KL, where the curve over it is, and a base that words its answers freely."""
    swept = ", see the curve over β in chapter 7" if one_per_beta(results.study.runs) else ""
    depends = f"depends on the base and on β, here {results.study.profile.rl.beta:g}{swept}"
    loss, mass = results.final("base")[["sft_loss", "label_mass"]].mean()
    if mass >= IN_FORMAT:
        return depends
    # By Jensen's inequality the mean of -log mass is at least this.
    least = f"which alone costs it {-math.log(mass):.2f} of its {loss:.2f} nats or more"
    return f"{depends}; the base words {1 - mass:.0%} of its answers otherwise, {least}"


def judged_family(
    results: Results,
    claims: list[Claim],
    values: dict[str, pd.Series],
    predicted: tuple[predictions.Predictions, predictions.Predictions],
    notes: dict[str, str],
) -> list[ClaimRow]:
    """The rows of ``claims`` that are judged together, from their ``values`` by seed.

    ``predicted`` is for a perfect learner and by own belief, ``notes`` what there is to say besides collapses; all by
    the claims' ids. Predictions are of changes, so that a claim of no difference has none.
    """
    fallen, rows = collapses(results), []
    for claim in claims:
        perfect, own = (known.get(claim.id) if claim.margin is None else None for known in predicted)
        said = [collapse_note(claim, fallen), notes.get(claim.id, "")]
        rows.append(judged(claim, values[claim.id], said, predicted=perfect, predicted_from_policies=own))
    return corrected_family(rows)


def found_by_each(values: pd.DataFrame, claims: list[Claim], few: int) -> pd.DataFrame:
    """What every choice of ``few`` seeds says of ``claims`` about a sign: +1 as claimed, -1 the opposite, 0 undecided.

    ``values`` are the quantities (seeds, claims), in the order of ``claims``, which are one family. A row per choice,
    by the rule of `judged` and `corrected_family`, for all choices at once; what does not exist in a chosen seed is
    undecided. (`statistics.holm` is for one family; here are thousands.)
    """
    chosen = np.array(list(combinations(range(len(values)), few)))
    beyond = (values - [claim.than for claim in claims]).to_numpy()[chosen]  # (choices, few, claims)
    mean, spread = beyond.mean(axis=1), beyond.std(axis=1, ddof=1)
    alike = np.ptp(beyond, axis=1) <= ROUNDING  # no t, but `paired_test`'s exact sign test
    p = 2 * stats.t.sf(np.abs(mean) / np.where(alike, 1.0, spread) * np.sqrt(few), few - 1)
    p = np.where(alike, np.where(np.abs(mean) > ROUNDING, 2.0 ** (1 - few), 1.0), p)
    order, tested = p.argsort(axis=1), (~np.isnan(p)).sum(axis=1, keepdims=True)
    stepped = np.take_along_axis(p, order, 1) * (tested - np.arange(len(claims)))  # Holm's
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.maximum.accumulate(stepped, axis=1), 1)
    side = np.sign(mean) * [claim.sign for claim in claims]
    return pd.DataFrame(np.where(corrected < SIGNIFICANT, side, 0), columns=values.columns).astype(int)


def collapses(results: Results) -> dict[str, str]:
    """By run, in how many of its seeds its policy has collapsed ("2 of 5 seeds"); runs without one are left out."""
    metrics = results.final()
    counts = metrics.assign(fallen=is_collapsed(metrics)).groupby("run")["fallen"].agg(["sum", "size"])
    return {str(run): f"{down} of {n} seeds" for run, down, n in counts.itertuples() if down}


def collapse_note(claim: Claim, fallen: dict[str, str]) -> str:
    """Where the policies of ``claim`` have collapsed, and whether that leaves a fall to show; empty if nowhere."""
    runs = [run for run in (claim.before, claim.after) if run in fallen]
    said = [f"{NAMES.get(run, run)} collapsed to one answer in {fallen[run]}" for run in runs]
    nothing_to_lower = ["which leaves no skill to lower"] if claim.sign < 0 and claim.before in fallen else []
    return ", ".join(said + nothing_to_lower)


def compare_sentences(results: Results, seed: int, before: str, after: str) -> dict[str, Any]:
    """One seed's change from ``before`` to ``after``, judged over dev sentences: what a single run can say.

    Loss and sampled reward with a paired bootstrap over sentences, MCC likewise, greedy accuracy with McNemar's exact
    test. The interval is over sentences, for these two policies; it says nothing about other seeds.
    """
    answers, later = (results.answers_of(run, seed) for run in (before, after))
    labels = answers["label"].to_numpy()

    def of_label(table: pd.DataFrame) -> np.ndarray:
        return label_log_probabilities(table)[np.arange(len(labels)), labels]

    loss, reward = of_label(answers) - of_label(later), 2 * (np.exp(of_label(later)) - np.exp(of_label(answers)))
    said = [likelier_labels(table) for table in (answers, later)]
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


def judge_theory(results: Results, content: TheoryFile | None) -> list[ClaimRow]:
    """Verdicts for the theory's own statements, from theory.json and the tables that it was made from.

    Empty where there is none, as of more than two answers.
    T1 and T5 are theorems: "exact" checks, confirmed where no seed breaks them. Amounts (T2 to T4) are judged by the
    95 % interval of measured minus predicted: *confirmed* if all of it is within a quarter of the prediction (at least
    0.01 nats, or 0.01 of reward), *refuted* if all of it is beyond, else *inconclusive*; that tolerance was set when
    first results of an earlier plan were known. T6 and T7 follow the rules of claims.
    """
    if content is None:
        return []
    seeds, worst = len(results.seeds), float(np.max(list(content["identity_gaps"].values())))
    statement = "Theorem 3.1, the sign rule and the identities, on random finite policies: largest violation"
    rows = [exact_row("T1", statement, "largest violation", Interval(worst, math.nan, math.nan, seeds), worst < 1e-9)]
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
    used = share_of_bound(results)
    statement = "SFT after RL changes the reward by at most 2 sqrt(KL/2): share of that bound"
    rows.append(exact_row("T5", statement, "|change| / bound", mean_interval(used), bool(used.max() <= 1)))
    rows.append(judged(GREEDY_SUFFICES, by_seed(results, greedy_share, "sft", "sft-rl")))
    rows.append(judged(GREEDY_UNCHANGED, change_of(results, GREEDY_UNCHANGED)))
    return corrected_family(rows)


def share_of_bound(results: Results) -> pd.Series:
    """How much of Pinsker's bound, 2 sqrt(KL/2) for rewards between -1 and 1, SFT after RL uses, by seed."""
    before, last = (results.final(run).set_index("seed") for run in ("rl", "rl-sft"))
    return (last["reward_exact"] - before["reward_exact"]).abs() / (2 * np.sqrt(last["kl_to_parent"] / 2))


def exact_row(name: str, statement: str, quantity: str, interval: Interval, holds: bool) -> ClaimRow:
    """The row of a theorem: it must hold in every seed, and no interval decides whether it does."""
    verdict: Verdict = "reproduced" if holds else "not reproduced"
    return statement_row(name, statement, quantity, interval, verdict) | {"test": "exact"}  # type: ignore[return-value]


def statement_row(
    name: str, statement: str, quantity: str, interval: Interval, verdict: Verdict, **more: Any
) -> ClaimRow:
    """The row of a statement of the theory."""
    return claim_row(Claim(name, statement, quantity, "", "", +1), interval, verdict, **more)


def sweep_rows(results: Results, content: TheoryFile) -> Iterable[ClaimRow]:
    """T4: T2 at other betas, a row per beta of the plan; runs that are there to explain others have none."""
    notes = {True: [], False: ["training had not settled"], None: ["whether training had settled is unknown"]}
    entries = {entry["run"]: entry for entry in content["sweep"] or []}
    for run in one_per_beta(results.study.runs):
        beta, steps = run.changes["rl.beta"], run.changes["rl.steps"]
        name, statement = f"T4-b{beta:g}", f"T2 at beta = {beta:g}, in {steps} steps"
        if run.name not in entries:
            yield not_run(Claim(name, statement, "change", "", "", +1), MAKES["sweep"])
            continue
        entry = entries[run.name]
        change, n = entry["change_of_loss"], len(entry["seeds"])
        gap, own = interval_of(change["gap_to_own_belief"], n), change["own_belief"]
        moved = f"log-odds moved {entry['slope']['mean']:.2f} of what was asked"
        yield statement_row(
            name,
            statement,
            "change",
            interval_of(change["measured"], n),
            verdict_of_amount(gap, own),
            predicted_from_policies=own,
            note="; ".join([*notes[entry["settled"]], moved]),
        )
