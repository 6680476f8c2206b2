"""What tests share: make in an environment of its own, waiting, addresses that nobody has, and damage."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from nondecoupling.study.folders import REPOSITORY

OF_AN_OUTER_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")


def environment(**more: str) -> dict[str, str]:
    """This environment and ``more``; the make in it takes this Python for its own, and knows of no make around it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name not in OF_AN_OUTER_MAKE}
    return inherited | {"PATH": path, "CONDA_DEFAULT_ENV": "nondecoupling"} | more


def make(*words: str, folder: Path = REPOSITORY, **more: str) -> subprocess.CompletedProcess[str]:
    """Run make with these words, and wait for it."""
    command = ["make", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False, timeout=900
    )


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait for ``condition`` to return something true, and return that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return found


def unused_address() -> str:
    """An address at which no Dask scheduler is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def script_of_docs(name: str) -> str:
    """The script that docs/cluster.md tells its readers to save as ``name``."""
    text = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->\n\n```sh\n")[2].partition("```")[0]


def is_over(process: int) -> bool:
    """Whether a process has ended, also one that nobody has waited for."""
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


SBATCH = """#!/bin/sh
# In place of Slurm's: each task of the array in a session of its own, which its end ends whole, with one CPU.
range=$(sed -n 's/^#SBATCH --array=\\([0-9-]*\\).*/\\1/p' "$1")
for task in $(seq "${range%-*}" "${range#*-}"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1 setsid taskset -c 0 sh -c "$(sed -n 1p "$1" | cut -c3-) $1" \\
        >"${0%sbatch}task$task.log" 2>&1 </dev/null &
    echo $!
done
"""


def place_sbatch(folder: Path) -> Path:
    """A folder for the PATH, whose ``sbatch`` starts a script's tasks at once and prints their processes.

    What a task prints is in the file ``task<number>.log`` beside it.
    """
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    return program.parent
