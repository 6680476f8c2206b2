"""The generated parts of README and docs: tables in Markdown, and sentences made from a study's results."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from nondecoupling.analysis.claims import CLAIMS, found_by_each, values_of_claims
from nondecoupling.analysis.collapse import is_collapsed
from nondecoupling.analysis.geometry import alignment_sentence, duration_sentence, threshold_sentence
from nondecoupling.analysis.many_answers import cells_table
from nondecoupling.analysis.tables import (
    claims_table,
    findings_table,
    finished_controls,
    policies_table,
    seconds_of,
    sweep_table,
    theory_sentences,
)
from nondecoupling.analysis.verdicts import interval_text, rows_of
from nondecoupling.study.contracts import ClaimRow, Score, SweepEntry
from nondecoupling.study.plan import STATES
from nondecoupling.study.results import Results
from nondecoupling.study.study import parse_seeds


def document_parts(results: Results) -> dict[str, str]:
    """The generated parts of README and docs for the results of a study, by the name between their markers."""
    rows: list[ClaimRow] = results.read("claims.json")
    if labels := results.read("labels.json"):
        shown_tables = claims_table(rows_of(rows, "ABOM")), cells_table(labels).reset_index()
        return {results.study.name: "\n\n".join(map(markdown_table, shown_tables))}
    sweep: list[SweepEntry] | None = results.read("theory.json")["sweep"]
    tables = [claims_table(rows_of(rows, "ABO")), policies_table(results, *STATES)]
    tables += [claims_table(of_theory)] if (of_theory := judged_rows(rows, "T")) else []
    parts: dict[str, list[Any]] = {results.study.name: tables + ([sweep_table(sweep)] if sweep else [])}
    if others := finished_controls(results):
        tables = [claims_table(family) for letter in "KJ" if (family := judged_rows(rows, letter))]
        parts[f"{results.study.name}, controls"] = [*tables, policies_table(results, *others)]
    sentences = [*theory_sentences(results.read("theory.json")), *clean_sentence(rows)]
    theory = "\n".join(f"* {sentence}" for sentence in sentences)
    findings = markdown_table(findings_table(rows_of(rows, "ABO")))
    words = {
        "findings": f"{findings}\n\n{theory}".strip(),
        "cost": cost_sentence(results),
        "runs": runs_sentence(results),
    }
    if found := quick_look_sentence(results):
        words["quick look"] = found
    if scores := results.read("score.json"):
        words["score"] = score_sentence(scores)
    if geometry := results.read("geometry.json"):
        said = [duration_sentence(geometry), threshold_sentence(geometry), alignment_sentence(geometry)]
        words["geometry"] = "\n\n".join([markdown_table(claims_table(geometry["claims"])), *filter(None, said)])
    return {name: "\n\n".join(map(markdown_table, tables)) for name, tables in parts.items()} | {
        f"{results.study.name}, {part}": text for part, text in words.items()
    }


def judged_rows(rows: list[ClaimRow], families: str) -> list[ClaimRow]:
    """`rows_of` some families whose runs are there."""
    return [row for row in rows_of(rows, families) if row["verdict"] != "not run"]


def clean_sentence(rows: list[ClaimRow]) -> list[str]:
    """What RL costs where annotators never disagree (K6), if that was run."""
    found = []
    for row in [row for row in judged_rows(rows, "K") if row["id"] == "K6"]:
        measured, own = interval_text(row["estimate"], row["ci95"]), interval_text(row["predicted_from_policies"], None)
        so = ": disagreement is not all that RL sharpens" if row["verdict"] == "refuted" else ""
        found.append(
            f"With annotators who never disagree, RL after SFT changes the SFT loss by {measured} nats "
            f"(own belief {own}){so} (K6)."
        )
    return found


def score_sentence(scores: list[Score]) -> str:
    """What the outside judge of `make score` found of some policies, beside this project."""
    alike = [row for row in scores if (row["accuracy"], row["mcc"]) == (row["harness_accuracy"], row["harness_mcc"])]
    seeds = enumerated(sorted({str(row["seed"]) for row in scores}, key=int))
    return (
        f"lm-evaluation-harness (`make score`) judged {len(scores)} policies of seed {seeds} in float32 on the same "
        f"{scores[0]['n']} sentences: accuracy and MCC are ours to the last digit for {len(alike)} of them, and "
        f"log-likelihoods differ by {max(row['difference'] for row in scores):.1e} nats at most."
    )


def cost_sentence(results: Results) -> str:
    """How long a seed takes, by group of the plan, and on what: mean over seeds of one core's time.

    And the most memory that one of the runs took.
    """
    seconds, shared = seconds_of(results.costs), results.provenance["shared"]
    words = {
        "main": "both experiments",
        "controls": "controls and joint training",
        "sweep": "other betas",
        "geometry": "geometry",
    }
    parts = []
    for group, what in words.items():
        runs = [run.name for run in results.study.runs if run.group == group]
        finished = results.costs["run"].isin(runs)
        total, done = seconds[finished].sum(), results.costs.loc[finished, "run"].nunique()
        what = what if done == len(runs) else f"{done} of {len(runs)} runs of {what}"
        if total:
            mean = total / len(results.seeds)
            parts.append(f"{mean:.0f} s for {what}" if mean < 600 else f"{mean / 60:.0f} minutes for {what}")
    machine = shared["gpu"] or f"one core ({shared['cpu'].partition(',')[0]})"
    took = f"On {machine} a seed took {', '.join(parts)}, besides the start of each notebook"
    memory = results.costs["peak_memory_bytes"].max() / 2**30
    return f"{took} (mean of {len(results.seeds)}); a run took at most {memory:.1f} GiB."


def quick_look_sentence(results: Results) -> str:
    """How often as few seeds as `make reproduce` runs have the verdicts of all of ``results``, where these decide.

    Of the claims A, B and O. Empty where there are no more seeds than that.
    """
    few, many = len(parse_seeds(results.study.profile.seeds)), len(results.seeds)
    if many <= few:
        return ""
    values = pd.DataFrame(values_of_claims(results))
    each, whole = (found_by_each(values, CLAIMS, seeds) for seeds in (few, many))
    decided = whole.iloc[0][lambda side: side != 0]
    if decided.empty:
        return ""
    agree = each[decided.index] * decided  # 1 the same verdict, -1 the opposite, 0 none
    shares = (agree == 1).mean().sort_values(ascending=False, kind="stable")
    words = shares.map(lambda share: "all" if share == 1 else f"{min(share, 0.99):.0%}")
    parts = [f"in {share} for {enumerated(of)}" for share, of in words.index.to_series().groupby(words, sort=False)]
    opposite = int((agree == -1).sum().max())
    others = f" (in up to {opposite} ways the opposite)" if opposite else ""
    return (
        f"{few} seeds decide less than {many}: of all {len(each):,} ways to choose {few} of these {many}, the verdict "
        f"is the one above {enumerated(parts)}; else it is inconclusive{others}."
    )


def runs_sentence(results: Results) -> str:
    """How many of the plan's runs are finished, and how many policies collapsed."""
    planned = sum(1 if run.once else len(results.seeds) for run in results.study.runs)
    once = [run.name for run in results.study.runs if run.once]
    policies = results.final()
    policies = policies[~(policies["run"].isin(once) & policies.duplicated("run"))]
    return (
        f"{len(results.costs)} of {planned} runs of the plan finished, for {len(results.seeds)} seeds; "
        f"{int(is_collapsed(policies).sum())} of {len(policies)} policies collapsed."
    )


def verdicts_sentence(studies: dict[str, list[ClaimRow]]) -> str:
    """Which claims about the two experiments have one verdict in all of ``studies`` (rows by name), and which not.

    Empty for a single study.
    """
    if len(studies) < 2:
        return ""
    verdicts = pd.DataFrame({name: {row["id"]: row["verdict"] for row in rows} for name, rows in studies.items()})
    verdicts = verdicts[verdicts.index.str[0].isin(list("ABO"))].dropna()
    parts = []
    for found, of in verdicts.groupby(list(verdicts), sort=False).groups.items():
        ids = enumerated(of)
        names = pd.Series([f"`{name}`" for name in verdicts]).groupby(list(found), sort=False).agg(enumerated)
        everywhere = f"{found[0]} in {'both' if len(found) == 2 else f'all {len(found)}'}"
        apart = ", ".join(f"{verdict} in {where}" for verdict, where in names.items())
        parts.append(f"{ids} {everywhere if len(names) == 1 else apart}")
    return f"Side by side: {'; '.join(parts)}."


def enumerated(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def markdown_table(table: pd.DataFrame) -> str:
    """``table`` without its index as a Markdown table."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
