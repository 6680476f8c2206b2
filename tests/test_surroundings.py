"""What a shell, a batch system or a user's configuration leave behind is kept away.

test_pipeline.py has a study in the midst of it.
"""

import os
from pathlib import Path

import pytest

from conftest import tiny
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
