"""Kernels that start warm, in half a second instead of five: forks of a process that has imported torch and trl.

    Jupyter ── kernel.json ──▶ client ── socket ──▶ server ── fork ──▶ kernel

``kernel.json`` starts this module as a client. It asks the server of `warm_kernels` for a kernel, passes on signals and
ends as its kernel does; where no server answers it becomes an ordinary kernel itself. So papermill, nbval and
JupyterLab see an ordinary process, and whoever kills that kills the kernel. The server ends with whoever started it,
and takes its kernels along.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

ADDRESS = "NONDECOUPLING_KERNELS"  # environment variable: the server's socket
# What stages spend seconds to import. None of our own modules, so that an edit is seen by the next kernel.
PRELOADED = [
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "seaborn",
    "sklearn.metrics",
    "statsmodels.stats.multitest",
    "pydantic.main",
    "datasets",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.rloo_trainer",
    "trl.trainer.reward_trainer",
]
INLINE = "module://matplotlib_inline.backend_inline"  # what ipykernel sets for a matplotlib that is yet to be imported
MESSAGE_BYTES = 1 << 20  # above the largest that a socket takes
PATH_BYTES = 100  # below the longest name that every system allows a socket


@contextmanager
def own_sockets() -> Iterator[Any]:
    """Jupyter's configuration for one kernel that is spoken to through files in a folder of its own.

    Jupyter's default is five free TCP ports, which it chooses some time before the kernel opens them: where many
    kernels start side by side, another may have one by then. It stays the default where the folder's name is too long.
    """
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "kernel")
        fits = len(os.fsencode(name)) < PATH_BYTES
        yield Config({"KernelManager": {"transport": "ipc", "ip": name}} if fits else {})


@contextmanager
def warm_kernels() -> Iterator[None]:
    """Kernels of this process and its children start warm inside, as soon as all is imported.

    Libraries read the environment when they are imported, so it must be that of the kernels already. Where somebody
    around has such a server ready, it is theirs.
    """
    if Path(os.environ.get(ADDRESS, "")).is_socket():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        serving = f"from nondecoupling.workflow.kernels import serve_warm; serve_warm({address!r})"
        # Its input ends with this process, however that ends. It is in a session of its own, as kernels are: Ctrl-C in
        # a terminal is for those who asked for kernels. What it prints are warnings of libraries.
        with subprocess.Popen(
            [sys.executable, "-c", serving],
            env=os.environ | {"MPLBACKEND": os.environ.get("MPLBACKEND") or INLINE},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as server:
            os.environ[ADDRESS] = address
            try:
                yield
            finally:
                os.environ.pop(ADDRESS, None)
                server.kill()


# The server


def serve(address: str) -> dict[str, Any] | None:
    """Fork a kernel for each client until the standard input ends. In a kernel, returns what its client asked for."""
    server, kernels = os.getpid(), dict[Any, int]()  # process, and process group, of each client's kernel
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    while True:
        ready, _, _ = select.select([0, listener, *kernels], [], [], 0.05)
        if 0 in ready:
            return None  # its kernels see that within a second
        if listener in ready:
            client, _ = listener.accept()
            request, streams, _, _ = socket.recv_fds(client, MESSAGE_BYTES, 3)
            kernel = os.fork()
            if not kernel:
                for connection in (listener, client, *kernels):
                    connection.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return json.loads(request) | {"server": server}
            os.setpgid(kernel, kernel)
            for stream in streams:
                os.close(stream)
            kernels[client] = kernel
            with suppress(OSError):  # the client is gone, which is seen below
                client.send(b"started")
        for client, kernel in list(kernels.items()):
            if client in ready:
                try:
                    signals = client.recv(MESSAGE_BYTES)
                except ConnectionResetError:  # it was killed before it had read its answer
                    signals = b""
                for number in signals or [signal.SIGKILL]:
                    os.killpg(kernel, number)
            ended, status = os.waitpid(kernel, os.WNOHANG)
            if ended:
                with suppress(OSError):
                    client.send(str(os.waitstatus_to_exitcode(status)).encode())
                client.close()
                del kernels[client]


class StandardError:
    """What is ``sys.stderr`` when it is written to. A kernel has its own, and loggers keep what they find on import."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.__stderr__ if sys.stderr is self else sys.stderr, name)


def serve_warm(address: str) -> None:
    """Import what stages need, then serve; nothing is computed before, because threads do not survive a fork."""
    atexit.register(os._exit, 0)  # the last: more would be to take apart what all share, and so to copy it
    gc.disable()
    with redirect_stderr(StandardError()):  # type: ignore[type-var]
        import torch

        if torch.cuda.is_available():  # an import may have opened the GPU, which then is closed to all forks
            return
        for name in PRELOADED:
            importlib.import_module(name)
    gc.freeze()  # a collection in a kernel would write to, and so copy, memory that all share
    request = serve(address)
    if request:
        run_kernel(**request)


def run_kernel(arguments: list[str], folder: str, environment: dict[str, str], server: int) -> None:
    """Be the kernel that ``python -m ipykernel_launcher`` is with these arguments, in a fork of ``server``."""
    import numpy as np
    import pandas as pd
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # the standard library's seeds itself after a fork
    torch.seed()
    pd.set_option("display.max_columns", 20)  # its default in notebooks; it asks on import whether it is in one
    gc.enable()
    sys.argv[1:] = [*arguments, f"--IPKernelApp.parent_handle={server}"]  # it ends when the server does
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


# The client


def be_kernel(arguments: list[str]) -> int:
    """Stand in for a kernel of the server, and return its exit status; without a server, become a kernel."""
    parent = os.getppid()
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(os.environ[ADDRESS])
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        started = connection.recv(MESSAGE_BYTES)
    except (KeyError, OSError):
        started = b""
    if not started:
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *arguments])
    for passed_on in (signal.SIGINT, signal.SIGTERM):
        signal.signal(passed_on, lambda number, _: connection.send(bytes([number])))
    while not select.select([connection], [], [], 1)[0]:
        if os.getppid() != parent:  # whoever asked is gone; so is the kernel, then
            return 1
    status = int(connection.recv(MESSAGE_BYTES) or 1)  # 1: the server is gone
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if sys.argv[1] == "while":  # kernels of a command start warm, and their results go when it ends
        with warm_kernels(), tempfile.TemporaryDirectory() as results:
            sys.exit(subprocess.call(sys.argv[2:], env=os.environ | {"NONDECOUPLING_RESULTS": results}))
    else:
        sys.exit(be_kernel(sys.argv[1:]))
