"""What one needs to know to repeat a run: code, settings, versions, machine, times; and the file that says it."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nondecoupling.study import folders
from nondecoupling.study.plan import Run
from nondecoupling.study.study import Study

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "papermill", "numpy")


def write_metrics(
    root: Path,
    partial: Path,
    study: Study,
    run: Run,
    seed: int,
    started: datetime,
    evaluation: dict[str, dict[str, float]],
    training: dict[str, Any],
    **provenance: Any,
) -> None:
    """Write a run's metrics.json (`contracts.RunFile`), its last file; the study's results are under ``root``."""
    content = {
        "run": run.name,
        "stage": run.stage,
        "parent": run.parent,
        "parents": folders.parent_hashes(study, root, run, seed),
        "profile": study.profile.name,
        "study": study.name,
        "seed": None if run.once else seed,
        "status": "complete",
        "evaluation": evaluation,
        "training": training,
        "provenance": describe_provenance(study, run, started) | provenance,
    }
    folders.write_json(partial / folders.METRICS, content)


def describe_provenance(study: Study, run: Run, started: datetime) -> dict[str, Any]:
    """Code, settings, versions, machine and times of a run; ``changes`` are the plan's to the study's parameters."""
    settings = study.profile.model_dump()
    return {
        **code_version(),
        "profile_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "parameters": settings,
        "chosen": sorted(study.chosen),
        "changes": run.changes,
        "packages": package_versions(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "gpu": gpu_name(),
        "started": started.isoformat(timespec="seconds"),
        "finished": now().isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that decide numbers."""
    return {name: version(name) for name in PACKAGES}


def now() -> datetime:
    """The current time with its zone."""
    return datetime.now(UTC)


def code_version() -> dict[str, str | bool | None]:
    """The commit of this checkout and whether it was changed since; null where git does not know.

    An archive that is unpacked inside another repository is not of that repository's commit.
    """
    here = folders.REPOSITORY
    try:
        if Path(git(here, "rev-parse", "--show-toplevel")).resolve() == here.resolve():
            return {"git_commit": git(here, "rev-parse", "HEAD"), "git_dirty": bool(git(here, "status", "--porcelain"))}
    except RuntimeError:
        pass
    return {"git_commit": None, "git_dirty": None}


def git(repository: Path, *arguments: str) -> str:
    """Output of a git command, stripped; RuntimeError in git's own words where it fails, and where there is no git."""
    # It looks, and writes nothing: a run killed while git renews its index would leave a lock in the user's way.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise RuntimeError(f"git {arguments[0]}: {error}") from None
    if done.returncode:
        raise RuntimeError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name, which model of it where Linux says so, and core count.

    Virtual machines may give different processors one name.
    """
    info, known = Path("/proc/cpuinfo"), {}
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
        known = {key.strip(): value.strip() for key, _, value in lines}
    name = known.get("model name") or platform.processor() or platform.machine()
    model = f" family {known['cpu family']} model {known['model']}" if {"cpu family", "model"} <= set(known) else ""
    return f"{name}{model}, {os.cpu_count()} cores"


def gpu_name() -> str | None:
    """The CUDA device's name, None without one. Asks torch only where it is loaded already, which takes seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
