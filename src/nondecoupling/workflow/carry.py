"""Carries one command to a worker of a Dask cluster: ``python -m nondecoupling.workflow.carry ADDRESS COMMAND...``

make's recipes are preceded by these words where SCHEDULER is given, so that make alone decides what is run, and in
which order. What the worker prints is printed here, and its exit status is this process's. With the word ``guard`` in
the place of the address it is what a worker starts: the command, which is killed when the worker dies.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import NOTEBOOKS, PACKAGE

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 5
# Dask sets these in its workers' processes; a command gets them from whoever asked for the study, as under make.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A terminal sends Ctrl-C to workers on this machine, too, but only the study has something to say then.
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

running: dict[int, list[str]] = {}  # in a worker: the process groups that it runs now, and their commands


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    printed: str
    complaints: str


@contextmanager
def local_scheduler(workers: int) -> Iterator[str]:
    """The address of a cluster on this machine, which lives as long as it is used."""
    from distributed import LocalCluster

    silence()
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        preload=IGNORE_CTRL_C,
    ) as cluster:
        yield cluster.scheduler_address


def silence() -> None:
    """Dask's own lines about what goes wrong; we report that in one sentence."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def connect(address: str) -> "Client":
    """A client of the scheduler at ``address``, which must have a worker; ConnectionError where that cannot be."""
    from distributed import Client

    silence()
    if "://" not in address:
        raise ValueError(f"SCHEDULER is '{address}', but must be local or an address such as tcp://host:8786.")
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except OSError:
        raise ConnectionError(
            f"no Dask scheduler answers at {address}; start one there (dask scheduler), or use SCHEDULER=local."
        ) from None
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        client.close()
        raise ConnectionError(
            f"the scheduler at {address} has no workers; start some: dask worker {address} --nthreads 1"
        ) from None
    return client


def deciding_files() -> list[Path]:
    """Files of this checkout that decide what a run does, on whatever machine."""
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("profiles/*.yaml"), *NOTEBOOKS.glob("*.ipynb")]
    return [folders.REPOSITORY / "requirements.lock", *sorted(sources)]


def carry(address: str, command: list[str], shared: Path) -> int:
    """Run ``command`` on a worker that has this code and the folder ``shared``; returns its exit status.

    Raises ConnectionError if the cluster cannot be used or is lost, RuntimeError if every worker that ran it died.
    """
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    passed_on = {
        name: value for name, value in os.environ.items() if name in THREADS or name.startswith("NONDECOUPLING_")
    }
    with connect(address) as client, tempfile.NamedTemporaryFile(dir=shared) as token:
        token.write(os.urandom(16))  # a copy of the folder, however new, does not have it
        token.flush()
        expected = {str(path): folders.sha256(path) for path in (Path(token.name).resolve(), *deciding_files())}
        client.run(stop, command)  # of a make that ended without a word while its command went on
        future = client.submit(run_command, command, expected, passed_on, str(Path.cwd()), pure=False)
        try:
            ended: Ended = future.result()
        except KeyboardInterrupt:
            client.run(stop, command)
            raise
        except KilledWorker:
            raise RuntimeError("every worker that ran it died, most likely for want of memory") from None
        except FutureCancelledError:
            raise ConnectionError(
                "the scheduler is gone, and with it what its workers were executing; what is finished is kept, and the "
                "same command goes on from there with another one."
            ) from None
    print(ended.printed, end="", flush=True)
    print(ended.complaints, end="", file=sys.stderr, flush=True)
    return ended.status


# What workers do


def run_command(command: list[str], expected: dict[str, str], environment: dict[str, str], folder: str) -> Ended:
    """Run a command in ``folder``, in a process group of its own that dies with this worker.

    The worker is refused, in one sentence, unless it has the ``expected`` files.
    """
    from distributed import get_worker

    for path, digest in expected.items():
        found = folders.sha256(Path(path)) if Path(path).exists() else None
        if found != digest:
            complaint = (
                f"error: worker {get_worker().address} has no {path}, or another; workers need this checkout and its "
                f"results folder at the same paths.\n"
            )
            return Ended(1, "", complaint)
    inherited = {name: value for name, value in os.environ.items() if name not in THREADS}
    end, open_while_alive = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "nondecoupling.workflow.carry", "guard", *command],
            cwd=folder,
            env=inherited | environment,
            stdin=end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running[process.pid] = command
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


def stop(command: list[str]) -> None:
    """Kill ``command`` where this worker runs it."""
    for group, owner in list(running.items()):
        if owner == command:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def guard(command: list[str]) -> int:
    """Run a command and return its exit status; kill it when the standard input ends.

    Two processes that write one run would spoil it: when a worker is killed, its run starts again elsewhere, and what
    the worker had started must not go on. The kernel under it notices within a second, before the next one is up.
    """

    def kill_all_when_the_worker_is_gone() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=kill_all_when_the_worker_is_gone, daemon=True).start()
    return process.wait()


def main(arguments: list[str]) -> int:
    """One sentence and 1 where the command cannot be carried, else the command's own exit status."""
    address, *command = arguments
    if address == "guard":
        return guard(command)
    try:
        return carry(address, command, Path.cwd())
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # By its name: of a program's own functions every worker would get copies, with a `running` of their own.
    from nondecoupling.workflow import carry as module

    sys.exit(module.main(sys.argv[1:]))
