"""Run folders: where results are, what they hold, and how they come into being (all at once or not at all).

A run is written to ``<run>.partial`` and renamed to ``<run>`` when it is complete, so that a folder without that ending
is a result.
"""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from nondecoupling.study.plan import Run
from nondecoupling.study.study import Study

REPOSITORY = Path(__file__).resolve().parents[3]
METRICS, TRAJECTORY, LOG, POLICY, PATHS = "metrics.json", "trajectory.csv", "log.csv", "policy", "paths.csv"
NOTEBOOK = "notebook.ipynb"  # as it was executed
EXECUTED = "NONDECOUPLING_EXECUTED"  # environment variable of a kernel whose notebook make executes
LOCK = ".lock"  # of a study, which whoever makes it holds
MEASURED = "measured.json"  # what a stage had measured at a checkpoint
PROVENANCE = "provenance.json"  # of a whole study, beside its tables; the last of them that is written
HASHES = "sha256.json"  # of every file of a published run, or of a checkpoint; the last that is written


def results_root() -> Path:
    """``results/`` of this checkout, or the folder that NONDECOUPLING_RESULTS names."""
    return Path(os.environ.get("NONDECOUPLING_RESULTS") or REPOSITORY / "results")


def study_folder(study: Study) -> Path:
    """Where the results of ``study`` are written."""
    return results_root() / study.name


def reference_folder(study: Study) -> Path:
    """Where the committed reference results of ``study`` are, if there are any."""
    return REPOSITORY / "results" / "reference" / study.name


def run_folder(root: Path, run: Run, seed: int) -> Path:
    """The folder of one run under a study's folder ``root``."""
    return root / run.name if run.once else root / f"seed{seed}" / run.name


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a finished run."""
    return (folder / METRICS).exists() and (folder / HASHES).exists()


def require_complete(folder: Path, needed_by: str) -> Path:
    """``folder`` if it holds a finished run as it was published.

    Raises FileNotFoundError that says what to run first where there is none, RuntimeError where a file was damaged,
    exchanged or lost since.
    """
    if not is_complete(folder):
        raise FileNotFoundError(
            f"{needed_by} needs the finished run {folder}, which is not there; run its notebook first (make reproduce)."
        )
    if changed := damaged_file(folder):
        raise RuntimeError(
            f"{changed} is not the file that the run wrote: it was damaged, changed or exchanged; remove {folder}, and "
            f"make reproduce makes it again."
        )
    return folder


def damaged_file(folder: Path) -> Path | None:
    """The first file that is not what ``folder``'s own list says, the list itself if it cannot be read; or None."""
    try:
        return changed_file(folder, read_json(folder / HASHES))
    except (ValueError, AttributeError):
        return folder / HASHES


def changed_file(folder: Path, hashes: dict[str, str]) -> Path | None:
    """The first of the files under ``folder`` that is gone or has another sha256 than ``hashes`` says; None if none is.

    Files that are not on the list do not count.
    """
    for name, digest in hashes.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return folder / name
    return None


def parent_hashes(study: Study, root: Path, run: Run, seed: int) -> dict[str, str | None]:
    """sha256 of the metrics.json of each parent of ``run``, by name; None where the parent is not finished."""
    files = {name: run_folder(root, study.run(name), seed) / METRICS for name in run.parents}
    return {name: sha256(path) if path.exists() else None for name, path in files.items()}


def take(lock: TextIO, how: int) -> None:
    """Take a study's lock, shared or for oneself (``how``, fcntl's); RuntimeError names who makes the study already.

    It is the operating system's, and ends with the process that holds it, however that ends. Raises OSError where the
    file system has no locks.
    """
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        root = Path(lock.name).parent
        raise RuntimeError(f"{root} is being made by {lock.read()}; wait for it, or stop it.") from None


def refuse_beside_make(root: Path) -> None:
    """RuntimeError where a notebook is run by hand while make makes the study in ``root``: both would write a run."""
    if not os.environ.get(EXECUTED):
        with suppress(OSError), (root / LOCK).open(encoding="utf-8") as lock:
            take(lock, fcntl.LOCK_SH)


def open_run(root: Path, run: Run, seed: int) -> Path:
    """A new, empty ``<run>.partial`` folder; what an interrupted attempt left there is removed.

    Raises RuntimeError as `refuse_beside_make` does.
    """
    refuse_beside_make(root)
    folder = run_folder(root, run, seed)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def checkpoints_folder(root: Path, run: Run, seed: int) -> Path:
    """Where an unfinished run keeps its checkpoints."""
    folder = run_folder(root, run, seed)
    return folder.with_name(folder.name + ".checkpoints")


def last_checkpoint(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in ``folder`` of a run of the same ``identity``, None if there is none.

    Whatever else is in the folder is removed, a damaged checkpoint with a line that says so, and ``identity`` is left
    there for the next attempt.
    """
    owner = folder / "identity.json"
    try:
        known = read_json(owner)
    except (OSError, ValueError):
        known = None
    if known != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(owner, identity)
    whole = []
    for path in folder.glob("checkpoint-*"):
        written = (path / HASHES).exists()
        if written and not damaged_file(path):
            whole.append(path)
            continue
        if written:
            print(f"{path.name} was damaged, and is not used")
        shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def publish(partial: Path, notebook: Path | None = None) -> Path:
    """Turn a partial run into a result: list what its files hash to, and rename it; returns where its files are.

    It must hold readable metrics with status "complete". The checkpoints that led to it are removed. A stage whose
    notebook make executes leaves that to make, which publishes the run with its executed ``notebook`` when that has
    ended well; whoever runs a notebook by hand has a result at once, without one, and make makes it again.
    """
    metrics = read_json(partial / METRICS)
    if metrics.get("status") != "complete":
        raise ValueError(f"{partial / METRICS} has status {metrics.get('status')!r}; only complete runs are published.")
    if os.environ.get(EXECUTED):
        return partial
    if notebook:
        os.replace(notebook, partial / NOTEBOOK)
    write_hashes(partial)
    os.utime(partial / METRICS)  # newer than everything it was made from, as make wants it
    folder = partial.with_name(partial.name.removesuffix(".partial"))
    if folder.exists():
        retired = folder.with_name(folder.name + ".old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        shutil.rmtree(retired)
    partial.rename(folder)
    shutil.rmtree(folder.with_name(folder.name + ".checkpoints"), ignore_errors=True)
    return folder


def write_hashes(folder: Path) -> None:
    """Write down what every file under ``folder`` hashes to."""
    (folder / HASHES).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / HASHES, {path.relative_to(folder).as_posix(): sha256(path) for path in files})


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that ``path`` is either the old file or the whole new one. NaN is refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file so that ``path`` is either the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with its path where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent}, and make makes it again.") from None


def answers_file(split: str) -> str:
    """File name of a run's answers to the sentences of ``split``: those of dev are ``predictions.parquet``."""
    return "predictions.parquet" if split == "dev" else f"predictions_{split}.parquet"


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_hashes(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of each file in ``folder`` that matches ``pattern``, by name."""
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern))}
