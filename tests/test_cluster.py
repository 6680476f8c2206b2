"""The Slurm scripts of docs/cluster.md, run by a stand-in for sbatch: workers that die, and one that has other code.

test_pipeline.py has the script that needs no Dask.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from making import is_over, place_sbatch, script_of_docs, until
from nondecoupling.workflow import carry

pytestmark = pytest.mark.skipif(
    not (shutil.which("setsid") and shutil.which("taskset")), reason="needs setsid and taskset, as on Linux"
)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder in which a scheduler runs, and the function that submits workers in it or in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "workers.sh").write_text(script_of_docs("workers.sh").replace("--array=0-19", "--array=0-0"))
    monkeypatch.setenv("PATH", f"{place_sbatch(tmp_path)}:{os.environ['PATH']}")
    started: list[int] = []

    def submit(folder: Path = tmp_path) -> int:
        done = subprocess.run(
            ["sbatch", str(tmp_path / "workers.sh")], cwd=folder, capture_output=True, text=True, check=True
        )
        started.append(int(done.stdout))
        return started[-1]

    scheduler = subprocess.Popen(
        [*[".venv/bin/dask", "scheduler", "--scheduler-file", "scheduler.json", "--port", "0", "--no-dashboard"]],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield tmp_path, submit
    finally:
        for group in started:
            end(group)
        scheduler.kill()
        scheduler.wait()


def end(group: int) -> None:
    """What a batch system does to a job at its wall time."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_runs_outlive_their_workers_and_are_not_given_to_one_with_other_code(cluster, monkeypatch, capfd):
    here, submit = cluster
    address = carry.address_of(until(lambda: (here / "scheduler.json").exists() and "scheduler.json", "the scheduler"))
    code, other = Path("/proc/self/cwd/code.py"), here / "other"  # each process has its own
    other.mkdir()
    (other / ".venv").symlink_to(sys.prefix)
    shutil.copy("scheduler.json", other)
    (here / "code.py").write_text("ours")
    (other / "code.py").write_text("theirs")
    monkeypatch.setattr(carry, "deciding_files", lambda: [code])

    def begin(script: str) -> threading.Thread:
        thread = threading.Thread(target=carry.main, args=[[address, "sh", "-c", script]])
        thread.start()
        return thread

    first = submit()
    carry.wait_for_a_worker(address)
    run = begin("nproc >> cores; test $(wc -l < cores) = 2 && touch done && exit; sleep 600")
    until(lambda: (here / "cores").exists(), "the run has begun")
    end(first)  # it has the run, and no other worker is there
    submit()
    run.join(timeout=120)
    assert (here / "done").exists()
    assert (here / "cores").read_text() == "1\n1\n"  # what each worker's job may use

    busy = begin("touch begun; until test -e go; do sleep 0.1; done")
    until(lambda: (here / "begun").exists(), "the one worker is busy")
    capfd.readouterr()
    late = submit(other)
    with carry.connect(address) as client:
        client.wait_for_workers(2, timeout=120)
    run = begin("pwd > folder")
    complaint = until(lambda: capfd.readouterr().err, "it is refused")
    assert re.fullmatch(
        rf"error: worker tcp://\S+ has no {code}, or another; workers need .* at the same paths\. "
        r"It is sent away, and the run goes to another\.\n",
        complaint,
    )
    until(lambda: is_over(late), "it ends")
    (here / "go").touch()
    busy.join(timeout=60)
    run.join(timeout=60)
    assert (here / "folder").read_text() == f"{here}\n"
