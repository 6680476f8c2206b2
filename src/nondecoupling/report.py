"""A finished study as one HTML file for a reader with a browser: ``templates/report.html.j2``, filled from results.

The words stand in the template, every number comes from the study's files. The page loads nothing: figures are inside.
"""

import base64
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from nondecoupling import figures, runs
from nondecoupling.claims import claims_table, states_table, sweep_table
from nondecoupling.controls import OBJECTIONS
from nondecoupling.profile import Study, load_study

REPORT = "report.html"


def claim_group(rows: list[dict[str, Any]], letters: str) -> list[dict[str, Any]]:
    """The claims whose ids begin with one of ``letters``, ready to show: verdict, note and the other cells as text.

    Columns in which no row has anything to say are left out.
    """
    chosen = [row for row in rows if row["id"][0] in letters]
    cells = claims_table(chosen).drop(columns="verdict") if chosen else pd.DataFrame()
    cells = cells.loc[:, (cells != "-").any()]
    return [
        {"id": row["id"], "verdict": row["verdict"], "note": row["note"], "cells": record}
        for row, record in zip(chosen, cells.to_dict("records"), strict=True)
    ]


def policy_table(states: pd.DataFrame) -> pd.DataFrame:
    """What the policies of ``states`` (as `states_table` gives them) can do, as text for reading."""
    shown = {
        "sft_loss": "SFT loss",
        "reward_exact": "reward, sampled",
        "reward_greedy": "reward, greedy",
        "majority_reward": "majority answer",
        "balanced_accuracy": "balanced accuracy",
        "mcc": "MCC",
        "collapsed": "collapsed",
    }
    text = states[list(shown)].map(lambda value: value if isinstance(value, str) else f"{value:.3f}")
    return text.rename(columns=shown, index=figures.NAMES).rename_axis("policy").reset_index()


def seconds_between(provenance: dict[str, Any]) -> float:
    """How long a run took, its measurements included."""
    started, finished = (datetime.fromisoformat(provenance[end]) for end in ("started", "finished"))
    return (finished - started).total_seconds()


def cost_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Steps, seconds and peak memory of each run in ``records`` (contents of metrics.json)."""
    return pd.DataFrame(
        {
            "run": record["run"],
            "seed": "all" if record["seed"] is None else str(record["seed"]),
            "steps": str(record["training"].get("steps", "-")),
            "seconds": f"{seconds_between(record['provenance']):.0f}",
            "peak memory, GiB": f"{memory / 2**30:.2f}"
            if (memory := record["training"].get("peak_memory_bytes"))
            else "-",
            "commit": str(record["provenance"]["git_commit"])[:10] + "+" * record["provenance"]["git_dirty"],
        }
        for record in records
    )


def changed_settings(study: Study) -> dict[str, Any]:
    """The settings in which ``study`` differs from its profile, by dotted key."""
    written, used = (s.profile.model_dump() for s in (load_study(study.profile.name), study))
    return {
        f"{section}.{key}": value
        for section, settings in used.items()
        if isinstance(settings, dict)
        for key, value in settings.items()
        if value != (written[section] or {}).get(key)
    }


def as_image(path: Path) -> str:
    """An SVG file as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def read_study(study: Study, root: Path) -> dict[str, Any]:
    """What the template shows of the study in folder ``root``, whose claims and theory are finished."""
    rows, theory = runs.read_json(root / "claims.json"), runs.read_json(root / "theory.json")
    seeds = sorted({record["seed"] for record in theory["runs"]})
    metrics = runs.read_metrics(root, study, seeds)
    states = states_table(metrics)
    has_controls = bool(study.runs_of("controls")) and not runs.missing_runs(root, study, seeds, "controls")
    others = states_table(runs.read_metrics(root, study, seeds, group="controls")) if has_controls else None
    names = [(run, 0) for run in runs.SHARED_RUNS] + [(run.name, seed) for seed in seeds for run in study.profile.runs]
    files = dict.fromkeys(runs.run_folder(root, *name) / runs.METRICS for name in names)
    records = [runs.read_json(path) for path in files if path.exists()]
    machines = {(record["provenance"]["cpu"], record["provenance"]["gpu"]) for record in records}
    return {
        "study": study,
        "profile": study.profile,
        "changed": changed_settings(study),
        "seeds": seeds,
        "headline": [row for row in rows if row["id"] in ("A1", "B1", "B3", "O1")],
        "experiments": claim_group(rows, "AB"),
        "own": claim_group(rows, "O"),
        "theorems": claim_group(rows, "T"),
        "controls": claim_group(rows, "K"),
        "joint": claim_group(rows, "J"),
        "states": states.to_dict("index"),
        "policies": policy_table(states),
        "objections": OBJECTIONS,
        "other_policies": None if others is None else policy_table(others),
        "collapsed": [figures.NAMES.get(run, run) for run in states.index[states["collapsed"] != "no"]],
        "sweep": sweep_table(theory["sweep"]) if theory["sweep"] else None,
        "sweep_from_reference": bool(runs.missing_runs(root, study, seeds, "sweep")),
        "figures": {path.stem: as_image(path) for path in sorted((root / "figures").glob("*.svg"))},
        "data": runs.read_json(root / "data" / runs.METRICS),
        "machines": [", ".join(filter(None, machine)) for machine in sorted(machines, key=str)],
        "minutes": sum(seconds_between(record["provenance"]) for record in records) / 60,
        "parameters": max(record["training"].get("parameters", 0) for record in records),
        "costs": cost_table(records),
        "provenance": records[-1]["provenance"],
        "settings": yaml.safe_dump(records[-1]["provenance"]["parameters"], sort_keys=False, allow_unicode=True),
    }


def render_report(content: dict[str, Any]) -> str:
    """The page for what `read_study` has read."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nondecoupling"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(content)


def write_report(study: Study) -> Path:
    """Write the report of the finished ``study`` to its folder, with the figure that only it has; returns its path.

    Raises FileNotFoundError that says what to run where the study is not finished.
    """
    root = runs.study_folder(study)
    if not (root / "claims.json").exists():
        raise FileNotFoundError(f"{root / 'claims.json'} is not there; finish the study first (make reproduce).")
    figures.set_style()
    figures.save_figure(figures.draw_predictions(runs.read_json(root / "claims.json")), root / "figures", "predictions")
    temporary = root / f"{REPORT}.tmp"
    temporary.write_text(render_report(read_study(study, root)), encoding="utf-8")
    os.replace(temporary, root / REPORT)
    return root / REPORT
