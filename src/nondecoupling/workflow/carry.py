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
    from distributed import Client, Future

CONNECT_SECONDS = 5
LOOK_SECONDS = 30  # how often it is looked whether any worker is left
# Dask sets these in its workers' processes; a command gets them from whoever asked for the study, as under make.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A terminal sends Ctrl-C to workers on this machine, too, but only the study has something to say then.
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

running: dict[int, list[str]] = {}  # in a worker: the process groups that it runs now, and their commands


class Ended(NamedTuple):
    """How a command ended, and what it printed; ``refused`` is the worker that has other files and did not begin it."""

    status: int
    printed: str
    complaints: str
    refused: str = ""


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


def is_remote(scheduler: str) -> bool:
    """Whether a study goes to a cluster that runs already: by its address, or by the file that its scheduler wrote."""
    return "://" in scheduler or Path(scheduler).is_file()


def address_of(scheduler: str) -> str:
    """The address that SCHEDULER is, or that the file of that name holds (``dask scheduler --scheduler-file``)."""
    if "://" in scheduler:
        return scheduler
    if not Path(scheduler).is_file():
        raise ValueError(
            f"SCHEDULER is '{scheduler}', but must be local, an address such as tcp://host:8786, or a scheduler file."
        )
    try:
        return str(folders.read_json(Path(scheduler))["address"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"SCHEDULER is {scheduler}, which is no scheduler file: it names no address.") from None


def connect(address: str) -> "Client":
    """A client of the scheduler at ``address``; ConnectionError where none answers."""
    from distributed import Client

    silence()
    try:
        return Client(address, timeout=CONNECT_SECONDS)
    except OSError:
        raise ConnectionError(
            f"no Dask scheduler answers at {address}; start one there (dask scheduler), or use SCHEDULER=local."
        ) from None


def wait_for_a_worker(address: str) -> None:
    """Return when the scheduler at ``address`` has a worker; prints a line if that is not at once."""
    with connect(address) as client:
        if not client.nthreads():
            print(
                f"the scheduler at {address} has no workers; waiting for the first, which may be in a batch system's "
                f"queue (to start one: dask worker {address} --nthreads 1)",
                flush=True,
            )
            client.wait_for_workers(1)


def deciding_files() -> list[Path]:
    """Files of this checkout that decide what a run does, on whatever machine."""
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("profiles/*.yaml"), *NOTEBOOKS.glob("*.ipynb")]
    return [folders.REPOSITORY / "requirements.lock", *sorted(sources)]


def carry(address: str, command: list[str], shared: Path) -> int:
    """Run ``command`` on a worker that has this code and the folder ``shared``; returns its exit status.

    A worker that has not is sent away where there are others, or it would soon have refused every run of a study.
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
        try:
            while True:
                future = client.submit(run_command, command, expected, passed_on, str(Path.cwd()), pure=False)
                ended = outcome(client, future)
                if not ended.refused or not set(client.nthreads()) - {ended.refused}:
                    break
                print(f"{ended.complaints.strip()} It is sent away, and the run goes to another.", file=sys.stderr)
                client.retire_workers([ended.refused], close_workers=True)
        except KeyboardInterrupt:
            client.run(stop, command)
            raise
        except KilledWorker:
            raise RuntimeError(
                "every worker that ran it died, for want of memory or at the end of its time; the same command goes on "
                "from the run's last checkpoint, on workers that have more."
            ) from None
        except (FutureCancelledError, OSError):
            raise ConnectionError(
                "the scheduler is gone, and with it what its workers were executing; what is finished is kept, and the "
                "same command goes on from there with another one."
            ) from None
    print(ended.printed, end="", flush=True)
    print(ended.complaints, end="", file=sys.stderr, flush=True)
    return ended.status


def outcome(client: "Client", future: "Future") -> Ended:
    """How the command ended on its worker; prints a line where all workers are gone and new ones are waited for."""
    said = False
    while True:
        try:
            return future.result(timeout=LOOK_SECONDS)
        except TimeoutError:
            if not said and not client.nthreads():
                print("no worker is left; waiting for another", file=sys.stderr, flush=True)
                said = True


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
            return Ended(1, "", complaint, get_worker().address)
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
