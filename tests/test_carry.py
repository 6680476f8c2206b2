"""Recipes on a Dask cluster, with small shell commands in place of notebooks; test_pipeline.py has the study itself."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nondecoupling import cluster, execute

# Shell words that kill the Dask worker above a command; between the two is the guard.
KILL_WORKER = "kill -9 $(ps -o ppid= -p $PPID)"


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Writes a plan in a folder of its own, from "target: needed files" and commands; returns its file and tasks."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.mk"

    def write(rules: dict[str, str]) -> tuple[Path, list[cluster.Task]]:
        recipes = {rule: command.replace("$", "$$") for rule, command in rules.items()}
        path.write_text("\n".join(f"{rule}\n\t@{command}\n" for rule, command in recipes.items()))
        asked = subprocess.run(
            ["make", "--dry-run", "-f", str(path)], capture_output=True, text=True, check=True, env=without_make()
        )
        return path, cluster.tasks_of(path, asked.stdout)

    return write


def without_make() -> dict[str, str]:
    """The environment, free of what an outer make tells an inner one."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)


def execute_locally(workers: int, plan: Path, tasks: list[cluster.Task], **environment: str) -> None:
    cluster.execute_tasks("local", workers, plan, tasks, [Path(__file__)], os.environ | environment)


def test_tasks_are_what_make_would_run_in_its_order(plan, tmp_path):
    rules = {
        "all: b c": "echo all",
        "a: ": "touch a",
        "b: a": "echo $HOME > b",
        "c: a": "touch c",
    }
    for name in ("a", "c"):
        (tmp_path / name).touch()
    _, tasks = plan(rules)
    assert tasks == [cluster.Task("b", ["a"], "echo $HOME > b"), cluster.Task("all", ["b", "c"], "echo all")]


def test_what_comes_first_in_the_plan_is_done_first(plan, tmp_path):
    """Up to what is on its way to the worker: an interrupted study has whole seeds and not a part of each."""
    rules = {f"{name}: ": f"sleep 0.3; echo {name} >> order" for name in ("a1", "a2", "a3", "a4", "a5")}
    execute_locally(1, *plan({"all: a1 b1 a2 a3 a4 a5": "true", "b1: a1": "echo b1 >> order"} | rules))
    order = (tmp_path / "order").read_text().split()
    assert order[0] == "a1"
    assert order.index("b1") < order.index("a5")


def test_a_failing_task_stops_only_what_needs_it(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    path, tasks = plan(
        {
            "all: child last other": "touch all",
            "first: ": "touch first; echo $NONDECOUPLING_WORD $OMP_NUM_THREADS $MKL_NUM_THREADS",
            "bad: first": "echo 'error: it is broken' >&2; exit 1",
            "child: bad": "touch child",
            "mute: first": "exit 3",
            "next: first": "sleep 2; echo careful >&2; touch next",
            "last: next mute": "touch last",
            "other: next": "touch other",
        }
    )
    with pytest.raises(RuntimeError, match="2 of its 8 tasks failed and 3 that need them were not run; .* goes on"):
        execute_locally(2, path, tasks, NONDECOUPLING_WORD="passed", OMP_NUM_THREADS="5")
    printed = capsys.readouterr()
    assert printed.out == "passed 5\n"
    failures = ["error: it is broken", "error: mute: its command ended with status 3"]
    assert sorted(printed.err.splitlines()) == ["careful", *failures]
    assert {file.name for file in tmp_path.iterdir()} == {"plan.mk", "first", "next", "other"}


def test_what_a_killed_worker_was_doing_is_done_again_and_nothing_else(plan, tmp_path):
    """One worker: it is also the one that remembers the first task's return value."""
    go_on = "sleep 1; touch orphan"
    path, tasks = plan(
        {
            "second: first": f"if test -e tried; then touch second; else touch tried; {KILL_WORKER}; {go_on}; fi",
            "first: ": "echo made >> first",
        }
    )
    execute_locally(1, path, tasks)
    assert (tmp_path / "first").read_text() == "made\n"
    assert (tmp_path / "second").exists()
    time.sleep(1)
    assert not (tmp_path / "orphan").exists()


def test_a_task_that_kills_every_worker_is_given_up(plan, capsys):
    import dask.config

    path, tasks = plan({"greedy: ": KILL_WORKER})
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(RuntimeError, match="1 of its 1 tasks failed"),
    ):
        execute_locally(1, path, tasks)
    assert capsys.readouterr().err == "error: greedy: every worker that ran it died, most likely for want of memory\n"


def test_a_running_scheduler_is_used_by_its_address_once_it_has_workers(plan, tmp_path, monkeypatch):
    from distributed import LocalCluster

    path, tasks = plan({"first: ": "touch first"})
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as running:
        address = running.scheduler_address
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "CONNECT_SECONDS", 1)
            with pytest.raises(ConnectionError, match=f"{address} has no workers; start some: dask worker {address}"):
                cluster.execute_tasks(address, 1, path, tasks, [], os.environ)
        running.scale(1)
        running.wait_for_workers(1)
        with cluster.connected(address, 1) as client:  # of a make that ends without a word
            client.submit(cluster.run_command, path, "touch begun; sleep 60", {}, tmp_path)
            wait_for(tmp_path / "begun")
        started = time.perf_counter()
        cluster.execute_tasks(address, 1, path, tasks, [], os.environ)
        assert time.perf_counter() - started < 30  # one worker, one thread: what it slept on had to go first
    assert (tmp_path / "first").exists()


def test_a_scheduler_that_dies_is_said_in_one_sentence(plan, tmp_path):
    path, tasks = plan({"last: ": "touch begun; sleep 60"})
    start = "from distributed import LocalCluster; cluster = LocalCluster(1, dashboard_address=None)"
    words = [sys.executable, "-c", f"{start}; print(cluster.scheduler_address, flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:

        def die() -> None:
            wait_for(tmp_path / "begun")
            running.kill()

        dying = threading.Thread(target=die)
        dying.start()
        with pytest.raises(ConnectionError, match="the scheduler is gone, .* the same command goes on"):
            cluster.execute_tasks(running.stdout.readline().strip(), 1, path, tasks, [], os.environ)
        dying.join()


def test_a_worker_that_has_lost_its_scheduler_stops_its_commands(tmp_path, monkeypatch):
    """Dask would wait for them, while the next worker begins the same run."""
    import distributed

    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(status=distributed.Status.closing))
    started = time.perf_counter()
    ended = cluster.run_command(tmp_path / "plan.mk", "echo begun; sleep 60", {}, tmp_path)
    assert ended == (-signal.SIGKILL, "begun\n", "")
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (lambda own: [None, *own[1:]], "tcp://node:1 does not see the results folder {folder}"),
        (lambda own: ["copied", *own[1:]], "has another {folder}/tmp"),
        (lambda own: [*own[:-1], "edited"], "tcp://node:1 has another {folder}/two.py, or none"),
        (lambda own: [*own[:-1], None], "has another {folder}/two.py, or none"),
        (lambda own: ModuleNotFoundError("No module named 'x'"), "cannot check its files (No module named 'x')"),
    ],
)
def test_a_worker_with_other_files_is_refused(tmp_path, seen, words):
    code = [tmp_path / "one.py", tmp_path / "two.py"]
    for path in code:
        path.write_text(f"# {path.name}")

    class Elsewhere:
        def run(self, function, files, on_error):
            return {"tcp://good:1": function(files), "tcp://node:1": seen(function(files))}

    with pytest.raises(
        ConnectionError, match="workers need this checkout and its results folder at the same paths"
    ) as e:
        cluster.require_same_files(Elsewhere(), tmp_path, code)
    assert words.format(folder=tmp_path) in str(e.value)
    assert set(tmp_path.iterdir()) == set(code)


def unused_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (unused_address, ["no Dask scheduler answers at tcp://127.0.0.1:", "SCHEDULER=local"]),
        ("locl", ["'locl'", "tcp://host:8786"]),
        ("foo://host:8786", ["'foo'", "tcp"]),
        ("tcp://host", ["port", "'host'"]),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_said_in_one_line(tmp_path, monkeypatch, capfd, scheduler, words):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    started, scheduler = time.perf_counter(), scheduler() if callable(scheduler) else scheduler
    assert execute.main(["reproduce", "--seeds", "0", "--scheduler", scheduler]) == 1
    assert time.perf_counter() - started < 15
    printed = capfd.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert printed.out.startswith("study 'nano': 8 of 8 notebooks to execute")
    assert {path.name for path in (tmp_path / "nano").iterdir()} == {"plan.mk", "settings"}
