"""Run folders: where results stand, what they hold, and how they come into being (all at once or not at all).

A run is written to ``<run>.partial`` and renamed to ``<run>`` when it is complete, so that a folder without that ending
is a result. ``data`` and the base models stand once per study, every other run once per seed.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from nondecoupling.profile import Study

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_RUNS = ("data", "base", "base-weak")
METRICS, TRAJECTORY, POLICY = "metrics.json", "trajectory.csv", "policy"
MEASURED = "measured.json"  # the last file of a checkpoint
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "papermill", "numpy")


def results_root() -> Path:
    """``results/`` of this checkout, or the folder that NONDECOUPLING_RESULTS names."""
    return Path(os.environ.get("NONDECOUPLING_RESULTS") or REPOSITORY / "results")


def study_folder(study: Study) -> Path:
    """Where the results of ``study`` are written."""
    return results_root() / study.name


def reference_folder(study: Study) -> Path:
    """Where the committed reference results of ``study`` stand, if there are any."""
    return REPOSITORY / "results" / "reference" / study.name


def run_folder(root: Path, run: str, seed: int) -> Path:
    """The folder of one run under a study's folder ``root``."""
    return root / run if run in SHARED_RUNS else root / f"seed{seed}" / run


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a finished run."""
    return (folder / METRICS).exists()


def require_complete(folder: Path, needed_by: str) -> Path:
    """``folder`` if it holds a finished run; FileNotFoundError that says what to run first otherwise."""
    if not is_complete(folder):
        raise FileNotFoundError(
            f"{needed_by} needs the finished run {folder}, which is not there; run its notebook first (make reproduce)."
        )
    return folder


def open_run(root: Path, run: str, seed: int) -> Path:
    """A new, empty ``<run>.partial`` folder; what an interrupted attempt left there is removed."""
    folder = run_folder(root, run, seed)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def checkpoints_folder(root: Path, run: str, seed: int) -> Path:
    """Where an unfinished run keeps its checkpoints."""
    folder = run_folder(root, run, seed)
    return folder.with_name(folder.name + ".checkpoints")


def last_checkpoint(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in ``folder`` of a run of the same ``identity``, None if there is none.

    Whatever else stands in the folder is removed, and ``identity`` is left there for the next attempt.
    """
    owner = folder / "identity.json"
    if not owner.exists() or read_json(owner) != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(owner, identity)
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{MEASURED}")]
    for path in folder.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def publish(partial: Path) -> Path:
    """Turn a partial run into a result by renaming it; it must hold readable metrics with status "complete".

    The checkpoints that led to it are removed.
    """
    metrics = read_json(partial / METRICS)
    if metrics.get("status") != "complete":
        raise ValueError(f"{partial / METRICS} has status {metrics.get('status')!r}; only complete runs are published.")
    folder = partial.with_name(partial.name.removesuffix(".partial"))
    if folder.exists():
        retired = folder.with_name(folder.name + ".old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        shutil.rmtree(retired)
    partial.rename(folder)
    shutil.rmtree(folder.with_name(folder.name + ".checkpoints"), ignore_errors=True)
    (folder / METRICS).touch()  # newer than everything it was made from, as make wants it
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that ``path`` is either the old file or the whole new one. NaN is refused."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between the markers ``begin`` and ``end`` in a text file; one without them is left alone."""
    before, marker, rest = path.read_text(encoding="utf-8").partition(begin)
    if marker:
        path.write_text(f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def predictions_file(split: str) -> str:
    """File name of a split's predictions: dev is ``predictions.parquet``."""
    return "predictions.parquet" if split == "dev" else f"predictions_{split}.parquet"


def read_predictions(folder: Path, split: str = "dev") -> pd.DataFrame:
    """The predictions that a run wrote for ``split``."""
    return pd.read_parquet(folder / predictions_file(split))


def write_metrics(
    partial: Path,
    study: Study,
    *,
    run: str,
    stage: str,
    parent: str | None,
    seed: int | None,
    evaluation: dict[str, dict[str, float]],
    training: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Write a run's metrics.json, the last file of every run."""
    write_json(
        partial / METRICS,
        {
            "run": run,
            "stage": stage,
            "parent": parent,
            "profile": study.profile.name,
            "study": study.name,
            "seed": seed,
            "status": "complete",
            "evaluation": evaluation,
            "training": training,
            "provenance": provenance,
        },
    )


def describe_provenance(study: Study, started: datetime, **extra: Any) -> dict[str, Any]:
    """What one needs to know to repeat a run: code, settings, versions, machine, times."""
    settings = study.profile.model_dump()
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "profile_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "parameters": settings,
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "gpu": gpu_name(),
        "started": started.isoformat(timespec="seconds"),
        "finished": now().isoformat(timespec="seconds"),
        **extra,
    }


def now() -> datetime:
    """The current time with its zone."""
    return datetime.now(UTC)


def file_hashes(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of each file in ``folder`` that matches ``pattern``, by name."""
    hashes = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as content:
            hashes[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None without git or outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's model name and core count."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def gpu_name() -> str | None:
    """The CUDA device's name, None without one. Asks torch only where it is loaded already, which takes seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def missing_runs(root: Path, study: Study, seeds: list[int], group: str = "main") -> list[tuple[str, int]]:
    """The (run, seed) pairs of one group of the plan that are not finished."""
    names = [run.name for run in study.runs_of(group)]
    return [(name, seed) for seed in seeds for name in names if not is_complete(run_folder(root, name, seed))]


def results_to_read(study: Study, seeds: list[int], group: str = "main") -> Path:
    """Where all main runs of ``seeds``, and those of ``group``, are finished: the study's folder or else its reference.

    Raises FileNotFoundError that says what to run where they are finished in neither.
    """
    folders = (study_folder(study), reference_folder(study))
    for folder in folders:
        if not any(missing_runs(folder, study, seeds, needed) for needed in ("main", group)):
            return folder
    raise FileNotFoundError(
        f"{folders[0]} is not complete and there are no reference results of '{study.name}' for these seeds; run the "
        f"study first (make {'study' if group == 'controls' else 'reproduce'})."
    )


def sweep_to_read(study: Study, seeds: list[int]) -> Path | None:
    """Where the sweep of ``seeds`` is finished: the study's folder or the committed reference; None if in neither."""
    if not study.runs_of("sweep"):
        return None
    folders = (study_folder(study), reference_folder(study))
    return next((folder for folder in folders if not missing_runs(folder, study, seeds, "sweep")), None)


def read_metrics(root: Path, study: Study, seeds: list[int], split: str = "dev", group: str = "main") -> pd.DataFrame:
    """Final metrics of the policies of one group of the plan, one row per (run, seed).

    Bases stand once per seed so that runs can be paired; "base" is part of the group "main".
    """
    names = [entry.name for entry in study.runs_of(group) if entry.stage != "reward"]
    rows = []
    for seed in seeds:
        for run in ["base", *names] if group == "main" else names:
            metrics = read_json(run_folder(root, run, seed) / METRICS)
            rows.append({"run": run, "seed": seed, **metrics["evaluation"][split]})
    return pd.DataFrame(rows)


def read_trajectories(root: Path, study: Study, seeds: list[int], group: str = "main") -> pd.DataFrame:
    """Trajectories on dev of all stages of one group of the plan, one row per (run, seed, step)."""
    tables = [
        pd.read_csv(run_folder(root, entry.name, seed) / TRAJECTORY).assign(run=entry.name, seed=seed)
        for seed in seeds
        for entry in study.runs_of(group)
        if entry.stage != "base"
    ]
    return pd.concat(tables, ignore_index=True)
