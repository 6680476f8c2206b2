"""What a shell, a batch system or a user's configuration leave behind changes no number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny
from nondecoupling.study import folders
from nondecoupling.workflow import notebooks

# Each changed numbers, hung, or failed when nothing kept it away.
FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "MASTER_ADDR": "nowhere",
    "MKL_NUM_THREADS": "2",
    "OMP_NUM_THREADS": "2",
    "LC_ALL": "C",
}
CONFIGURATION = (
    "c = get_config()\nc.IPKernelApp.exec_lines = ['raise SystemExit(9)', 'import torch', 'torch.tensor = None']\n"
)


# Files that say when a run was made, or hold hashes of others that do.
TIMED = {folders.METRICS, folders.HASHES, folders.NOTEBOOK}


def finished_sft(results, environment, tmp_path, jobs=1):
    """All that the tiny study's SFT and what it was made from leave, but times, made as make does in this environment.

    Metrics by run, and the bytes of every other file by its path.
    """
    words = ["reproduce", "--profile=tiny", "--seeds=0", f"--jobs={jobs}"]
    command, root = [sys.executable, "-m", "nondecoupling.workflow", *words], results / "tiny" / "seed0"
    folder = root / "sft"
    done = subprocess.run(
        [*command, f"--target={folder / folders.METRICS}"],
        env={**os.environ, **environment, "NONDECOUPLING_RESULTS": str(results)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in TIMED]
    metrics = {path.parent.name: folders.read_json(path)["evaluation"] for path in root.glob(f"*/{folders.METRICS}")}
    return metrics, {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_study_leaves_the_same_files_in_other_surroundings(tmp_path):
    """Also with another hash seed, in other processes, in a folder of another name and depth, with other JOBS."""
    home = tmp_path / "home" / ".ipython" / "profile_default"
    home.mkdir(parents=True)
    for name in ("ipython_config.py", "ipython_kernel_config.py"):
        (home / name).write_text(CONFIGURATION)
    (tmp_path / "startup.py").write_text("raise SystemExit(9)")
    user = {"IPYTHONDIR": str(home.parent), "PYTHONSTARTUP": str(tmp_path / "startup.py")}
    metrics, files = finished_sft(tmp_path / "plain", {"PYTHONHASHSEED": "1"}, tmp_path)
    foreign = FOREIGN | user | {"PYTHONHASHSEED": "2"}
    other_metrics, other_files = finished_sft(tmp_path / "a deeper" / "föreign", foreign, tmp_path, jobs=2)
    assert metrics == other_metrics
    assert set(metrics) == {"data", "base", "sft"}
    assert set(files) == set(other_files)
    assert [name for name in files if files[name] != other_files[name]] == []
    assert {"sft/policy/adapter_config.json", "sft/trajectory.csv", "sft/log.csv"} < set(files)


def test_what_is_not_the_studys_own_is_kept_away(monkeypatch):
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "1"})
    notebooks.quiet_environment(tiny(), jobs=1)
    left = set(FOREIGN) & set(os.environ)
    assert left == {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "LC_ALL"}
    assert os.environ["MKL_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"] == "1"
    assert (os.environ["HOME"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("/home/me", "1")  # which are the user's choice
    assert not list(Path(os.environ["IPYTHONDIR"]).rglob("*config.py"))


@pytest.mark.parametrize(("jobs", "threads"), [(1, "4"), (2, "2"), (9, "1")])
def test_real_models_share_the_cores_that_the_process_may_use(monkeypatch, jobs, threads):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    notebooks.quiet_environment(tiny({"model.folder": "."}), jobs)
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, "3"),
        ({"SLURM_CPUS_PER_TASK": "2"}, "2"),
        ({"SLURM_CPUS_PER_TASK": "8"}, "4"),
        ({"SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "3"}, "3"),
    ],
)
def test_real_models_have_the_threads_that_the_user_or_the_batch_system_says(monkeypatch, given, threads):
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    monkeypatch.setattr(os, "environ", inherited | given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    notebooks.quiet_environment(tiny({"model.folder": "."}), jobs=1)
    assert os.environ["MKL_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"] == threads
    notebooks.quiet_environment(tiny(), jobs=1)
    assert os.environ["OMP_NUM_THREADS"] == "1"  # the embedded model is the same study whatever is set
