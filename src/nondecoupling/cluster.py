"""A study on a Dask cluster: the recipes that make would run, handed to workers in make's order.

What is up to date is make's business alone; this module gets the recipes that make says it would run, and reads from
the plan which of them wait for which. A worker runs each recipe as make does, as a shell command.

Run as a program (``python -m nondecoupling.cluster COMMAND``) it is the guard of one such command, see ``guard``.
"""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_SECONDS = 5
# Dask sets these in its workers' processes; a recipe gets them from whoever asked for the study, as under make.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A terminal sends Ctrl-C to workers on this machine, too, but only the study has something to say then.
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

# In a worker: process groups of the commands that it runs now, and the plan that each belongs to.
running: dict[int, Path] = {}


class Task(NamedTuple):
    """A recipe to execute: the file that it makes, the files that it needs, and its shell command."""

    target: str
    needs: list[str]
    command: str


class Ended(NamedTuple):
    """How a task's command ended, and what it printed."""

    status: int
    printed: str
    complaints: str


def tasks_of(plan: Path, recipes: str) -> list[Task]:
    """The rules of ``plan`` whose commands stand in ``recipes`` (what make prints when asked), in that order."""
    rules = {
        recipe.removeprefix("\t@").replace("$$", "$"): rule.split(": ")
        for rule, recipe in pairwise(plan.read_text(encoding="utf-8").splitlines())
        if recipe.startswith("\t")
    }
    chosen = [(*rules[line], line) for line in recipes.splitlines() if line in rules]
    return [Task(target, needs.split(), command) for target, needs, command in chosen]


def execute_tasks(
    scheduler: str, workers: int, plan: Path, tasks: list[Task], code: list[Path], environment: Mapping[str, str]
) -> None:
    """Execute ``tasks`` of ``plan`` on the cluster ``scheduler``, a local one of ``workers`` processes for "local".

    Raises ConnectionError if the cluster cannot be used, before any task is sent, or is lost; RuntimeError if a task
    failed, after all that do not need it are done.
    """
    with connected(scheduler, workers) as client:
        require_same_files(client, plan.parent, code)
        client.run(stop_commands, plan)  # of a make that ended without a word while its runs went on
        try:
            failed, waiting = distribute(client, plan, tasks, environment)
        except KeyboardInterrupt:
            client.run(stop_commands, plan)
            raise
    if failed:
        raise RuntimeError(
            f"the study is not complete: {failed} of its {len(tasks)} tasks failed and {waiting} that need them were "
            f"not run; what is finished is kept, and the same command goes on from there."
        )


@contextmanager
def connected(scheduler: str, workers: int) -> Iterator["Client"]:
    """A client of ``scheduler``; a local cluster lives as long as it is used."""
    if scheduler != "local" and "://" not in scheduler:
        raise ValueError(f"SCHEDULER is '{scheduler}', but must be local or an address such as tcp://host:8786.")
    from distributed import Client, LocalCluster

    for name in ("distributed", "distributed.client"):  # what goes wrong is said here, in one sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler == "local":
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
                preload=IGNORE_CTRL_C,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS)
    except OSError:
        raise ConnectionError(
            f"no Dask scheduler answers at {scheduler}; start one there (dask scheduler), or use SCHEDULER=local."
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ConnectionError(
                f"the scheduler at {scheduler} has no workers; start some: dask worker {scheduler} --nthreads 1"
            ) from None
        yield client


def require_same_files(client: "Client", folder: Path, code: list[Path]) -> None:
    """ConnectionError unless every worker has this ``code``, and ``folder`` in common with this machine."""
    with tempfile.NamedTemporaryFile(dir=folder) as token:  # a copy of the folder, however new, does not have it
        token.write(os.urandom(16))
        token.flush()
        files = [Path(token.name).resolve(), *code]
        own = file_digests(files)
        for worker, seen in client.run(file_digests, files, on_error="return").items():
            if isinstance(seen, Exception):
                problem = f"cannot check its files ({seen})"
            elif seen == own:
                continue
            elif seen[0] is None:
                problem = f"does not see the results folder {folder}"
            else:
                different = next(path for path, mine, its in zip(files, own, seen, strict=True) if mine != its)
                problem = f"has another {different}, or none"
            raise ConnectionError(
                f"worker {worker} {problem}; workers need this checkout and its results folder at the same paths."
            )


def file_digests(files: list[Path]) -> list[str | None]:
    """sha256 of each file, None for those that are not there."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None for path in files]


def distribute(client: "Client", plan: Path, tasks: list[Task], environment: Mapping[str, str]) -> tuple[int, int]:
    """Send each task when all that it needs is made, and print what it says; returns how many failed and never started.

    Dependencies are kept here and not by Dask, which would execute a finished run again if the worker that remembers
    its return value dies. What a dead worker was executing does start again elsewhere.
    """
    from distributed import as_completed

    passed_on = {
        name: value for name, value in environment.items() if name in THREADS or name.startswith("NONDECOUPLING_")
    }
    numbers = {task.target: number for number, task in enumerate(tasks)}
    order = TopologicalSorter({task.target: [file for file in task.needs if file in numbers] for task in tasks})
    order.prepare()
    sent: dict[object, Task] = {}
    futures, failed = as_completed(), 0

    def send_ready() -> None:
        for number in sorted(numbers[target] for target in order.get_ready()):
            future = client.submit(
                run_command, plan, tasks[number].command, passed_on, Path.cwd(), pure=False, priority=-number
            )
            sent[future.key] = tasks[number]
            futures.add(future)

    send_ready()
    for future in futures:
        task = sent[future.key]
        problem = report_end(task, future)
        future.release()
        if problem:
            failed += 1
            print(problem, file=sys.stderr, flush=True)
        else:
            order.done(task.target)
            send_ready()
    return failed, len(tasks) - len(sent)


def report_end(task: Task, future: "Future") -> str:
    """Print what a finished task printed; returns what went wrong with it, "" if nothing did.

    Raises ConnectionError if the scheduler is gone.
    """
    if future.status == "finished":
        ended: Ended = future.result()
        print(ended.printed, end="", flush=True)
        if ended.status:
            return ended.complaints.strip() or f"error: {task.target}: its command ended with status {ended.status}"
        print(ended.complaints, end="", file=sys.stderr, flush=True)
        return ""
    if future.status == "error":
        from distributed import KilledWorker

        error = future.exception()
        if isinstance(error, KilledWorker):
            return f"error: {task.target}: every worker that ran it died, most likely for want of memory"
        return f"error: {task.target}: {error}"
    raise ConnectionError(
        "the scheduler is gone, and with it what its workers were executing; what is finished is kept, and the same "
        "command goes on from there with another one."
    )


# What workers do


def run_command(plan: Path, command: str, environment: dict[str, str], folder: Path) -> Ended:
    """Run a shell command in ``folder``, in a process group of its own that dies with this worker."""
    inherited = {name: value for name, value in os.environ.items() if name not in THREADS}
    end, open_while_alive = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "nondecoupling.cluster", command],
            cwd=folder,
            env=inherited | environment,
            stdin=end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running[process.pid] = plan
        printed, complaints = output_while_in_service(process)
        del running[process.pid]
    finally:
        os.close(end)
        os.close(open_while_alive)
    return Ended(process.returncode, printed, complaints)


def output_while_in_service(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What ``process`` prints until it ends; it is killed when this worker has lost its scheduler and closes.

    The scheduler then takes the task for lost and sends it to another worker, while Dask would let it run for half a
    minute here.
    """
    from distributed import Status, get_worker

    while True:
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            if get_worker().status in (Status.closing, Status.closed, Status.failed):
                os.killpg(process.pid, signal.SIGKILL)


def stop_commands(plan: Path) -> None:
    """Kill the commands of ``plan`` that this worker runs."""
    for group, owner in list(running.items()):
        if owner == plan:
            os.killpg(group, signal.SIGKILL)


def guard(command: str) -> int:
    """Run a shell command and return its exit status; kill it when the standard input ends.

    Two processes that write one run would spoil it: when a worker is killed, its run starts again elsewhere, and what
    the worker had started must not go on. The kernel under it notices within a second, before the next one is up.
    """

    def kill_all_when_the_worker_is_gone() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL)
    threading.Thread(target=kill_all_when_the_worker_is_gone, daemon=True).start()
    return process.wait()


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1]))
