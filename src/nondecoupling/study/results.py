"""A study's results as tables: collected from the run folders once, and all that analysis and pages ever read.

``metrics.csv``: run, seed, split, and every metric of the finished policy. ``trajectories.csv``: run, seed, step, and
the metrics on dev along the stage. ``answers.parquet``: run, seed, sentence, label, source, truth (the grammar's
verdict), agreement (probability of the likelier label; both missing where unknown), log p of both answers (nats),
sampled and greedy answer, and a reward model's two scores, on dev; of more than two answers, the log p of each
(``logp_<label>``) and the known share of annotators who give it (``share_<label>``). ``costs.csv``: run, seed, stage,
steps, seconds, memory, commit. ``gradients.csv``: run, seed, policy and its geometry (`training.gradients.summary`);
``paths.csv``: run, seed and the ascents from its policy; both where `make geometry` was run. ``provenance.json``:
`contracts.ProvenanceFile`.
A run that serves all seeds has rows for each of them, so that runs can be paired.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nondecoupling.study import folders
from nondecoupling.study.contracts import ProvenanceFile, RunFile
from nondecoupling.study.plan import FOLLOWED, MAKES, Run
from nondecoupling.study.study import Study, study_of, validated

METRICS, TRAJECTORIES, ANSWERS, COSTS = "metrics.csv", "trajectories.csv", "answers.parquet", "costs.csv"
GRADIENTS, PATHS = "gradients.csv", "paths.csv"
PROVENANCE = folders.PROVENANCE
OPTIONAL = (GRADIENTS, PATHS)  # there where runs of that group are
TRAINED = ("sft", "rl", "joint", "reward_model")  # stages that have a trajectory
MEASURED = ("base", *TRAINED)
OF_THE_STUDY = ("parameters", "chosen")  # entries of a run's provenance
OF_A_RUN = ("sha256", "parents", "changes", "started", "finished")
DEV_ANSWERS = folders.answers_file("dev")

Records = dict[tuple[str, int], RunFile]  # by run and seed


def logp_columns(answers: int) -> list[str]:
    """The columns of answers.parquet with the log p of each of so many answers, by label."""
    return ["logp_unacceptable", "logp_acceptable"] if answers == 2 else [f"logp_{label}" for label in range(answers)]


def label_log_probabilities(answers: pd.DataFrame) -> np.ndarray:
    """(sentences, K) log p of the K responses, indexed by label: the last is "acceptable"."""
    return answers[logp_columns(sum(name.startswith("logp_") for name in answers))].to_numpy(dtype=float)


def likelier_labels(answers: pd.DataFrame) -> np.ndarray:
    """(sentences,) the label of the likeliest of the responses."""
    return label_log_probabilities(answers).argmax(axis=1)


@dataclass(frozen=True)
class Results:
    """The tables of a study, and the folder that they were read from."""

    study: Study
    folder: Path
    metrics: pd.DataFrame
    trajectories: pd.DataFrame
    answers: pd.DataFrame
    costs: pd.DataFrame
    gradients: pd.DataFrame
    paths: pd.DataFrame
    provenance: ProvenanceFile

    @property
    def own(self) -> bool:
        """Whether they are the study's own and not the committed reference."""
        return self.folder == folders.study_folder(self.study)

    @property
    def source(self) -> str:
        """Whose results these are, in words."""
        return "this study's own runs" if self.own else "the committed reference"

    @property
    def seeds(self) -> list[int]:
        """The seeds whose runs are in the tables."""
        return self.provenance["seeds"]

    def has(self, *runs: str) -> bool:
        """Whether all of ``runs`` are in the tables."""
        return set(runs) <= {*self.metrics["run"], *self.gradients["run"]}

    def final(self, *runs: str, split: str = "dev") -> pd.DataFrame:
        """Metrics of finished policies on ``split``, a row per run and seed, in the plan's order: all, or ``runs``."""
        table = self.metrics[self.metrics["split"] == split]
        names = [run.name for run in self.study.runs if run.stage not in ("data", "reward_model", "gradients")]
        wanted = [name for name in names if name in (runs or names)]
        return pd.concat([table[table["run"] == name] for name in wanted], ignore_index=True)

    def answers_of(self, run: str, seed: int) -> pd.DataFrame:
        """A policy's answers on dev, a row per sentence; KeyError if the tables do not have them."""
        if (run, seed) not in self._answers_by_policy:
            raise KeyError(f"the results in {self.folder} have no answers of '{run}', seed {seed}")
        return self._answers_by_policy[run, seed].copy()

    @cached_property
    def _answers_by_policy(self) -> dict[tuple[str, int], pd.DataFrame]:
        """Of hundreds of thousands of rows no one wants to look for a policy's each time."""
        parts = self.answers.groupby(["run", "seed"], sort=False)
        return {(run, seed): table.reset_index(drop=True) for (run, seed), table in parts}

    def read(self, name: str) -> Any:
        """A JSON file that was made from these tables and is beside them; None where it was not made."""
        return folders.read_json(self.folder / name) if (self.folder / name).exists() else None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file beside the study's own tables; the reference is left alone, and a line says so."""
        if self.own:
            folders.write_json(self.folder / name, content)
        else:
            print(f"{name} is not written: these are the committed reference's results")


def read_results(study: Study | None, folder: Path) -> Results:
    """The tables in ``folder``, of ``study`` or else of the study that their provenance describes.

    Raises FileNotFoundError where there are none, RuntimeError where one is not as it was written, ValueError where
    another version of this artifact wrote them.
    """
    if not (folder / PROVENANCE).exists():
        raise FileNotFoundError(f"{folder} holds no tables of results; run the study first (make reproduce).")
    try:
        provenance: ProvenanceFile = folders.read_json(folder / PROVENANCE)
        changed = folders.changed_file(folder, provenance.get("tables", {}))
    except (ValueError, AttributeError):
        changed = folder / PROVENANCE
    if changed:
        raise RuntimeError(
            f"{changed} is not the file that was written: it was damaged, changed or exchanged; make reproduce collects"
            f" a study's tables anew, git restores a reference's."
        )
    if study is None:
        where = f"'{folder.name}' was made by another version of this artifact, make reproduce renews it"
        study = study_of(folder.name, validated(provenance["parameters"], where), provenance["chosen"])
    metrics, trajectories, costs = (pd.read_csv(folder / name) for name in (METRICS, TRAJECTORIES, COSTS))
    costs = costs.astype({"seed": "Int64"})  # runs that serve all seeds have none
    gradients, paths = (
        pd.read_csv(folder / name) if name in provenance["tables"] else pd.DataFrame(columns=["run", "seed"])
        for name in OPTIONAL
    )
    answers = pd.read_parquet(folder / ANSWERS)
    answers = answers.astype(dict.fromkeys(answers.select_dtypes("float32"), "float64"))
    return Results(study, folder, metrics, trajectories, answers, costs, gradients, paths, provenance)


def results_to_read(study: Study, *runs: str, any_of: Collection[str] = ()) -> Results:
    """The study's tables if they have ``runs`` and one of ``any_of``, if given, else those of its committed reference.

    Raises FileNotFoundError that says what to run where neither has them.
    """
    for folder in (folders.study_folder(study), folders.reference_folder(study)):
        if (folder / PROVENANCE).exists():
            results = read_results(study, folder)
            if results.has(*runs) and (not any_of or any(map(results.has, any_of))):
                return results
    groups = [*({study.run(run).group for run in (*runs, *any_of)} - {"main"}), "main"]
    raise FileNotFoundError(
        f"{folders.study_folder(study)} has no collected results and there is no reference of '{study.name}'; run the "
        f"study first ({MAKES[groups[0]]})."
    )


def write_results(results: Results) -> None:
    """Write the tables to their folder, each all at once, the provenance last."""
    results.folder.mkdir(parents=True, exist_ok=True)
    tables = {METRICS: results.metrics, TRAJECTORIES: results.trajectories, COSTS: results.costs}
    optional = {GRADIENTS: results.gradients, PATHS: results.paths}
    tables |= {name: table for name, table in optional.items() if len(table)}
    for name in OPTIONAL:
        (results.folder / name).unlink(missing_ok=True)
    for name, table in tables.items():
        folders.write_text(results.folder / name, table.to_csv(index=False))
    temporary = results.folder / f"{ANSWERS}.tmp"
    measured = [column for column in results.answers if column.startswith(("logp_", "score_"))]
    # Models measure in float32, so that nothing is lost, and a table of twenty replications is small enough for git.
    results.answers.astype(dict.fromkeys(measured, "float32")).to_parquet(
        temporary,
        index=False,
        compression="zstd",
        compression_level=19,
        use_dictionary=[column for column in results.answers if column not in measured],
        column_encoding=dict.fromkeys(measured, "BYTE_STREAM_SPLIT"),
    )
    temporary.replace(results.folder / ANSWERS)
    hashes = {name: folders.sha256(results.folder / name) for name in (*tables, ANSWERS)}
    folders.write_json(results.folder / PROVENANCE, {**results.provenance, "tables": hashes})


def collect(study: Study, seeds: list[int], runs: Sequence[Run]) -> Results:
    """The tables of some finished runs of the plan.

    Raises FileNotFoundError for a run that is missing, RuntimeError for one that is beside another parent than its own.
    """
    root = folders.study_folder(study)
    records: Records = {}
    for run in runs:
        for seed in seeds:
            folder = folders.require_complete(folders.run_folder(root, run, seed), "Collecting results")
            records[run.name, seed] = folders.read_json(folder / folders.METRICS)
            require_own_parents(study, root, run, seed, records[run.name, seed])
    return Results(
        study,
        root,
        metrics=metrics_table(records),
        trajectories=stacked(study, root, records, TRAINED, lambda folder: pd.read_csv(folder / folders.TRAJECTORY)),
        answers=stacked(study, root, records, MEASURED, lambda folder: pd.read_parquet(folder / DEV_ANSWERS)),
        costs=costs_table(records),
        gradients=gradients_table(records),
        paths=stacked(
            study,
            root,
            {key: record for key, record in records.items() if key[0] == FOLLOWED},
            ["gradients"],
            lambda folder: pd.read_csv(folder / folders.PATHS),
        ),
        provenance=collected_provenance(study, root, seeds, records),
    )


def require_own_parents(study: Study, root: Path, run: Run, seed: int, record: RunFile) -> None:
    """RuntimeError where a finished run was made from another parent than the one that is there now."""
    if record.get("parents") != folders.parent_hashes(study, root, run, seed):
        folder = folders.run_folder(root, run, seed)
        raise RuntimeError(
            f"{folder} was made from another {' or '.join(run.parents)} than the one beside it; make reproduce makes "
            f"it again."
        )


def metrics_table(records: Records) -> pd.DataFrame:
    """metrics.csv, from the contents of metrics.json by run and seed."""
    return pd.DataFrame(
        {"run": run, "seed": seed, "split": split, **values}
        for (run, seed), record in records.items()
        if record["stage"] not in ("data", "gradients")
        for split, values in record["evaluation"].items()
    )


def gradients_table(records: Records) -> pd.DataFrame:
    """gradients.csv, from the contents of metrics.json by run and seed; ``policy`` is the run that was measured."""
    rows = [
        {"run": run, "seed": seed, "policy": record["parent"], **record["evaluation"]["dev"]}
        for (run, seed), record in records.items()
        if record["stage"] == "gradients"
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "seed"])


def stacked(
    study: Study,
    root: Path,
    records: Records,
    stages: Collection[str],
    read: Callable[[Path], pd.DataFrame],
) -> pd.DataFrame:
    """What ``read`` finds in the folder of each run of ``stages``, one on top of the other, run and seed in front."""
    tables = [
        read(folders.run_folder(root, study.run(run), seed)).assign(run=run, seed=seed)
        for (run, seed), record in records.items()
        if record["stage"] in stages
    ]
    table = pd.concat(tables or [pd.DataFrame(columns=["run", "seed"])], ignore_index=True)
    return table[["run", "seed", *[column for column in table if column not in ("run", "seed")]]]


def costs_table(records: Records) -> pd.DataFrame:
    """costs.csv: a row per run that was executed; runs that serve all seeds once, with no seed."""
    rows = {}
    for (run, _), record in records.items():
        provenance = record["provenance"]
        commit = str(provenance["git_commit"] or "unknown")[:10] + "+" * bool(provenance["git_dirty"])
        rows[run, record["seed"]] = {
            "run": run,
            "seed": record["seed"],
            "stage": record["stage"],
            **record["training"],
            "started": provenance["started"],
            "finished": provenance["finished"],
            "commit": commit,
        }
    return pd.DataFrame(rows.values()).astype({"seed": "Int64"})


def collected_provenance(study: Study, root: Path, seeds: list[int], records: Records) -> ProvenanceFile:
    """provenance.json: parameters once, what most runs share once, and by run only what differs."""
    by_run: dict[str, dict[str, Any]] = {}
    for (name, seed), record in records.items():
        folder = folders.run_folder(root, study.run(name), seed)
        own = {"sha256": folders.sha256(folder / folders.METRICS), "parents": record["parents"]}
        kept = {key: value for key, value in record["provenance"].items() if key not in OF_THE_STUDY}
        by_run[folder.relative_to(root).as_posix()] = own | kept
    shared: dict[str, Any] = {}
    for key in dict.fromkeys(key for entry in by_run.values() for key in entry if key not in OF_A_RUN):
        values = [entry[key] for entry in by_run.values() if key in entry]
        counts = Counter(map(repr, values))
        shared[key] = max(values, key=lambda value: counts[repr(value)])
    return {
        "study": study.name,
        "profile": study.profile.name,
        "seeds": seeds,
        "chosen": sorted(study.chosen),
        "parameters": study.profile.model_dump(),
        "shared": shared,
        "data": records["data", seeds[0]]["evaluation"],
        "runs": {
            name: {key: value for key, value in entry.items() if key not in shared or value != shared[key]}
            for name, entry in by_run.items()
        },
        "tables": {},
    }
