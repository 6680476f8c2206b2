"""A finished study as one HTML file for a reader with a browser: ``templates/report.html.j2``, filled from results.

The words are in the template, every number comes from the study's tables and from what was made of them. The page loads
nothing: figures are inside.
"""

import base64
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from nondecoupling.analysis import agreement, figures
from nondecoupling.analysis.controls import OBJECTIONS
from nondecoupling.analysis.tables import (
    changes,
    claims_table,
    finished_controls,
    policies_table,
    seconds_of,
    states_table,
    sweep_table,
    theorems_and_tests,
)
from nondecoupling.analysis.verdicts import answer_sentences, remarks, rows_of
from nondecoupling.study import folders
from nondecoupling.study.contracts import ClaimRow, ProvenanceFile, TheoryFile
from nondecoupling.study.fingerprint import NOTEBOOK_OF, NOTEBOOKS
from nondecoupling.study.plan import MAKES, NAMES, STATES, SUMMARIES
from nondecoupling.study.profile import Data
from nondecoupling.study.results import PROVENANCE, Results, read_results
from nondecoupling.study.study import Study, changed_settings, load_profile

REPORT = "report.html"
NUMBER = re.compile(r"-|[+−-]?\d[\d.,]*(e[+−-]?\d+)?%?( \[.*\])?")  # a cell that says a number, or that there is none


def minus(text: str) -> str:
    """``text`` with real minus signs, as wide as a plus sign, before its numbers."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", text)


def numeric_columns(rows: list[dict[str, str]]) -> list[str]:
    """The columns of a table whose cells are all numbers, or missing ones: they are set one below the other."""
    return [name for name in rows[0] if all(NUMBER.fullmatch(row[name]) for row in rows)]


def claim_group(chosen: list[ClaimRow]) -> list[dict[str, Any]]:
    """Claims ready to show: verdict, note and the other cells as text. Empty if none of them was run."""
    if all(row["verdict"] == "not run" for row in chosen):
        return []
    cells = claims_table(chosen).drop(columns="verdict").to_dict("records")
    return [
        {"id": row["id"], "verdict": row["verdict"], "note": remarks(row), "cells": record}
        for row, record in zip(chosen, cells, strict=True)
    ]


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Steps, seconds and peak memory of each run, as text."""
    memory = costs["peak_memory_bytes"] / 2**30
    return pd.DataFrame(
        {
            "run": costs["run"],
            "seed": costs["seed"].astype("string").fillna("all"),
            "steps": costs["steps"].map("{:.0f}".format).replace("nan", "-"),
            "seconds": seconds_of(costs).map("{:.0f}".format),
            "peak memory, GiB": memory.map("{:.2f}".format).replace("nan", "-"),
            "commit": costs["commit"],
        }
    )


def what_is_repeated(study: Study) -> str:
    """What every replication draws for itself, and what is there once, in words."""
    if study.run("base").once:
        return "each draws every stage; the sentences and the base model are the same for all"
    if study.run("data").once:
        return "each draws base model and every stage; the sentences are the same for all"
    return "each draws sentences, annotators, base model and every stage"


def made_by(results: Results) -> list[str]:
    """The commands that made the study, with "folder" for the user's own; of some runs of a group it says how many."""
    study, seeds = results.study, results.seeds
    span = f"{seeds[0]}-{seeds[-1]}" if seeds == list(range(seeds[0], seeds[-1] + 1)) else ",".join(map(str, seeds))
    changed = changed_settings(load_profile(study.profile.name), study.profile)
    set_to = {key: json.dumps(value, separators=(",", ":")) for key, value in changed.items()}
    words = " ".join(f"{key}={value}" for key, value in set_to.items() if not key.endswith("folder"))
    given = "".join(f" {name.upper()}=folder" for name in ("data", "model") if f"{name}.folder" in changed)
    options = f" PROFILE={study.profile.name} SEEDS={span}{given}"
    options += f" SET={shlex.quote(words)}" if words else ""
    commands = []
    for group, command in MAKES.items():
        runs = [run.name for run in study.runs_of(group) if run.stage != "data"]
        if done := sum(map(results.has, runs)):
            commands.append(command + options + (f"  # {done} of its {len(runs)} runs" if done < len(runs) else ""))
    return commands


def notebooks_beside(results: Results) -> dict[str, str]:
    """Links from the report to the notebooks that made its numbers, by title: the study's own, else the chapters."""
    links = {}
    for summary in SUMMARIES:
        own, chapter = results.folder / f"{summary}.ipynb", NOTEBOOKS / f"{NOTEBOOK_OF[summary]}.ipynb"
        links[summary] = own.name if own.exists() else os.path.relpath(chapter, results.folder)
    return links


def disagreement_text(data: Data) -> str:
    """The known disagreement of a generated corpus, in words: one rate, or the range of those of its phenomena."""
    rates = data.disagreement
    if not isinstance(rates, dict):
        return f"{100 * (rates or 0):g} %"
    return f"{100 * min(rates.values()):g} to {100 * max(rates.values()):g} %, by phenomenon,"


def images_in(folder: Path) -> dict[str, str]:
    """The SVG files of ``folder`` as data URIs, by name."""
    return {
        path.stem: f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
        for path in sorted(folder.glob("*.svg"))
    }


def agreement_sentence(results: Results) -> str | None:
    """How a study of one's own agrees with its committed reference (make verify); None where there is none."""
    folder = folders.reference_folder(results.study)
    if not results.own or not (folder / PROVENANCE).exists():
        return None
    reference = read_results(results.study, folder)
    if len(reference.seeds) < 2:  # no spread to judge by
        return None
    table = agreement.compare(agreement.quantities(results), agreement.quantities(reference))
    return agreement.verdict_sentence(table, len(results.seeds), len(reference.seeds))


def software_of(provenance: ProvenanceFile) -> list[str]:
    """The versions that runs were made with, those of most runs first."""
    shared = provenance["shared"]
    made_with = [shared, *(shared | entry for entry in provenance["runs"].values())]
    versions = ({"Python": entry["python"]} | entry["packages"] for entry in made_with)
    return list(dict.fromkeys(", ".join(f"{name} {version}" for name, version in of.items()) for of in versions))


def content_of(results: Results) -> dict[str, Any]:
    """What the template shows of the results of a study, whose claims and theory are finished."""
    rows: list[ClaimRow] = results.read("claims.json")
    theory: TheoryFile | None = results.read("theory.json")  # of studies with two answers
    study, shared = results.study, results.provenance["shared"]
    states, (theorems, of_theory) = states_table(results.final(*STATES)), theorems_and_tests(rows)
    others = finished_controls(results)
    machines = {(shared["cpu"], shared["gpu"])} | {
        (entry.get("cpu", shared["cpu"]), entry.get("gpu", shared["gpu"]))
        for entry in results.provenance["runs"].values()
    }
    return {
        "study": study,
        "profile": study.profile,
        "changed": changed_settings(load_profile(study.profile.name), study.profile),
        "seeds": results.seeds,
        "repeated": what_is_repeated(study),
        "disagreement": disagreement_text(study.profile.data),
        "answers": answer_sentences(rows),
        "headline": [row | {"note": remarks(row)} for row in rows if row["id"] in ("A1", "A2", "B1", "B2", "B3", "O1")],
        "experiments": claim_group(rows_of(rows, "AB")),
        "own": claim_group(rows_of(rows, "O")),
        "theorems": claim_group(theorems),
        "amounts": claim_group(of_theory),
        "controls": claim_group(rows_of(rows, "K")),
        "joint": claim_group(rows_of(rows, "J")),
        "geometry": claim_group(rows_of(rows, "G")),
        "labels": claim_group(rows_of(rows, "M")),
        "states": states.to_dict("index"),
        "policies": policies_table(results, *STATES),
        "objections": OBJECTIONS,
        "only_in_table": [row["id"] for row in rows_of(rows, "K") if row not in changes(rows)],
        "drawn": int(results.trajectories["n"].max()),
        "made_by": made_by(results),
        "notebooks": notebooks_beside(results),
        "other_policies": policies_table(results, *others) if others else None,
        "collapsed": [NAMES[run] for run in states.index[states["collapsed"] != "no"]],
        "sweep": sweep_table(theory["sweep"]) if theory and theory["sweep"] else None,
        "figures": images_in(results.folder / "figures"),
        "portraits": images_in(results.folder / "figures" / figures.PORTRAIT),
        "data": results.provenance["data"],
        "machines": [", ".join(filter(None, machine)) for machine in sorted(machines, key=str)],
        "minutes": seconds_of(results.costs).sum() / 60,
        "parameters": int((results.costs["parameters"] - results.costs["trained_parameters"]).min()),
        "trained": int(results.costs["trained_parameters"].min()),
        "agreement": agreement_sentence(results),
        "costs": cost_table(results.costs),
        "finished": results.costs["finished"].max(),
        "shared": shared,
        "software": software_of(results.provenance),
        "settings": yaml.safe_dump(results.provenance["parameters"], sort_keys=False, allow_unicode=True),
    }


def render_report(content: dict[str, Any]) -> str:
    """The page for what `content_of` has found."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nondecoupling.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = minus
    environment.filters["numeric_columns"] = numeric_columns
    return environment.get_template("report.html.j2").render(content)


def write_report(study: Study) -> Path:
    """Write the report of the finished ``study`` to its folder, with the figure that only it has; returns its path.

    Raises FileNotFoundError that says what to run where the study is not finished.
    """
    root = folders.study_folder(study)
    if not (root / "claims.json").exists():
        raise FileNotFoundError(f"{root / 'claims.json'} is not there; finish the study first (make reproduce).")
    results = read_results(study, root)
    figures.set_style()
    rows = changes(rows_of(results.read("claims.json"), "ABO"))
    figures.save_figure(results, figures.draw_claims(rows), "predictions")
    folders.write_text(root / REPORT, render_report(content_of(results)))
    return root / REPORT
