"""Commands on a Dask cluster, with small shell scripts in place of notebooks; test_pipeline.py has the study itself."""

import re
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from making import environment, until, unused_address
from nondecoupling.study.study import load_study
from nondecoupling.workflow import carry, executor

# Kills the Dask worker above a command; between the two is the guard.
KILL_WORKER = "kill -9 $(ps -o ppid= -p $PPID)"
SENTENCE = "workers need this checkout and its results folder at the same paths"


def shell(script: str) -> list[str]:
    """The command that runs a shell script."""
    return ["sh", "-c", script]


@pytest.fixture(scope="module")
def address():
    """A cluster on this machine with one worker of one thread."""
    with carry.local_scheduler(1) as address:
        yield address


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def carried(*command: str):
    """A process of its own that carries ``command``, as make starts it; it is killed where a test forgets it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nondecoupling.workflow.carry", *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # parallel tests have it ignored
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def written(file: Path) -> str:
    """What a command has written to ``file``, as soon as it has."""
    return until(lambda: file.exists() and file.read_text(), f"{file.name} is written")


# What comes back


def test_what_a_command_prints_and_how_it_ends_comes_back(address, here, monkeypatch, capfd):
    monkeypatch.setenv("NONDECOUPLING_WORD", "it's")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)  # Dask sets it in its workers
    script = 'pwd; echo $NONDECOUPLING_WORD $OMP_NUM_THREADS $MKL_NUM_THREADS "$0"; echo careful >&2; exit 3'
    assert carry.main([address, *shell(script), "a b"]) == 3
    assert tuple(capfd.readouterr()) == (f"{here}\nit's 5 a b\n", "careful\n")
    assert list(here.iterdir()) == []  # the token is gone


def test_a_failing_part_stops_only_what_needs_it(here, monkeypatch, capfd):
    """On a cluster, where a study goes on for hours; make keeps the order."""
    rules = {
        "study: child late": "touch study",
        "first:": "touch first",
        "bad: first": "echo 'error: it is broken' >&2; exit 1",
        "child: bad": "touch child",
        "other: first": "sleep 2; echo 'other · 0:02'; touch other",
        "late: other": "touch late",
    }
    recipes = [f"{rule}\n\t@$(CARRY) {shlex.join(shell(script))}\n" for rule, script in rules.items()]

    def write_rules(root, *_):
        (root / "plan.mk").write_text("".join(["CARRY =\n", *recipes]))
        return root / "plan.mk"

    monkeypatch.setattr(executor, "write_rules", write_rules)
    monkeypatch.setattr(executor, "stale_parts", lambda root, parts: parts[:1])
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(here))
    monkeypatch.setenv("MAKEFLAGS", "n")  # of an outer make
    with pytest.raises(RuntimeError, match=r"the study is not complete; .* goes on from there"):
        executor.make_study(load_study("tiny"), [0], ["main"], [], jobs=2, scheduler="local")
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == "[1/1] other · 0:02 · 100 % done"
    assert "error: it is broken" in printed.err.splitlines()
    assert {file.name for file in (here / "tiny").iterdir()} == {
        ".lock",
        "plan.mk",
        "settings",
        "first",
        "other",
        "late",
    }


# Workers that die


def test_what_a_killed_worker_was_doing_is_done_again_and_its_orphan_dies(address, here):
    script = f"if test -e tried; then touch done; else touch tried; {KILL_WORKER}; sleep 2; touch orphan; fi"
    assert carry.main([address, *shell(script)]) == 0
    assert (here / "done").exists()
    assert carry.main([address, "sleep", "2"]) == 0
    assert not (here / "orphan").exists()


def test_a_command_that_kills_every_worker_is_given_up(address, capfd, recwarn):
    """On a second cluster on this machine, which says nothing of the first."""
    import dask.config

    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), carry.local_scheduler(1) as another:
        assert another != address
        assert [str(warning.message) for warning in recwarn] == []
        assert carry.main([another, *shell(KILL_WORKER)]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: every worker that ran it died, for want of memory or at the end of its time; ")


def test_a_worker_that_has_lost_its_scheduler_stops_its_command(here, monkeypatch):
    """Dask would let it run for half a minute, while the next worker begins the same run."""
    import distributed

    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(status=distributed.Status.closing))
    ended = carry.run_command(shell("echo begun; sleep 60"), {}, {}, str(here))
    assert ended == (-signal.SIGKILL, "begun\n", "", "")
    assert carry.running == {}


# Workers elsewhere


@pytest.mark.parametrize("theirs", ["# theirs", None])
def test_a_worker_with_other_files_is_refused_in_a_sentence(address, here, monkeypatch, capfd, theirs):
    other, sha256 = here / "code.py", carry.folders.sha256
    if theirs:
        other.write_text(theirs)
    monkeypatch.setattr(carry, "deciding_files", lambda: [other])
    monkeypatch.setattr(carry.folders, "sha256", lambda path: "ours" if path == other else sha256(path))
    assert carry.main([address, "touch", "done"]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: worker tcp://\S+ has no {other}, or another; {SENTENCE}\.", line)
    assert not (here / "done").exists()


def test_a_worker_that_does_not_share_the_results_folder_is_refused(here, monkeypatch):
    import distributed

    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(address="tcp://node:1"))
    ended = carry.run_command(["touch", "done"], {str(here / "token"): "0"}, {}, str(here))
    assert (ended.status, ended.refused) == (1, "tcp://node:1")
    assert ended.complaints == f"error: worker tcp://node:1 has no {here / 'token'}, or another; {SENTENCE}.\n"
    assert list(here.iterdir()) == []


def test_files_that_decide_are_the_code_the_notebooks_and_the_lock():
    names = {path.name for path in carry.deciding_files()}
    assert {"requirements.lock", "carry.py", "nano.yaml", "04_rl.ipynb"} < names
    assert all(path.is_file() for path in carry.deciding_files())


# Schedulers


def test_a_scheduler_that_does_not_answer_is_said_in_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr(carry, "CONNECT_SECONDS", 1)
    assert carry.main([address := unused_address(), "true"]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: no Dask scheduler answers at {address}; start one there")


def test_workers_are_waited_for_with_a_line(here, monkeypatch, capfd):
    """The first one, and the next when all are gone."""
    from distributed import LocalCluster

    monkeypatch.setattr(carry, "LOOK_SECONDS", 0.5)
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as running:
        address = running.scheduler_address
        waiting = [
            threading.Thread(target=carry.wait_for_a_worker, args=[address]),
            threading.Thread(target=carry.main, args=[[address, "touch", "done"]]),
        ]
        for thread in waiting:
            thread.start()
        said = ["", ""]

        def both() -> bool:
            said[:] = [before + now for before, now in zip(said, capfd.readouterr(), strict=True)]
            return all(said)

        until(both, "they say so", 20)
        printed, complaints = said
        assert printed.startswith(
            f"the scheduler at {address} has no workers; waiting for the first, which may be in a "
        )
        assert complaints == "no worker is left; waiting for another\n"
        assert all(thread.is_alive() for thread in waiting)
        running.scale(1)
        for thread in waiting:
            thread.join(timeout=60)
            assert not thread.is_alive()
        carry.wait_for_a_worker(address)
    assert capfd.readouterr().out == ""
    assert (here / "done").exists()


def test_a_scheduler_is_named_by_its_file(address, here):
    file = here / "scheduler.json"
    file.write_text(f'{{"type": "Scheduler", "address": "{address}"}}')
    assert carry.address_of(str(file)) == carry.address_of(address) == address
    assert carry.is_remote(str(file))
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"SCHEDULER is .*scheduler.json, which is no scheduler file"):
        carry.address_of(str(file))


def test_a_scheduler_that_dies_is_said_in_one_sentence(here, capfd):
    start = "from distributed import LocalCluster; cluster = LocalCluster(1, dashboard_address=None)"
    words = [sys.executable, "-c", f"{start}; print(cluster.scheduler_address, flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, text=True, **pipes) as running:

        def die() -> None:
            try:
                written(here / "begun")
            finally:
                running.kill()

        dying = threading.Thread(target=die)
        dying.start()
        assert carry.main([running.stdout.readline().strip(), *shell("echo begun > begun; sleep 60")]) == 1
        dying.join()
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the scheduler is gone, and with it what its workers were executing")


# Commands that are stopped

ONCE = "echo $$ >> begun; test $(wc -l < begun) = 2 || exec sleep 60"


def ended(pid: str) -> None:
    until(lambda: not psutil.pid_exists(int(pid)), "the command on the worker ends", 20)


def test_ctrl_c_stops_the_command_on_its_worker(address, here):
    with carried(address, *shell(ONCE)) as process:
        pid = written(here / "begun")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == ""
    ended(pid)


def test_a_command_of_a_make_that_ended_without_a_word_is_stopped_first(address, here):
    """The worker has one thread: the second waits until the first is gone."""
    with carried(address, *shell(ONCE)) as process:
        pid = written(here / "begun")
        process.kill()
    with carried(address, *shell(ONCE)) as process:
        assert process.wait(timeout=30) == 0
    ended(pid)
    assert len((here / "begun").read_text().split()) == 2
