"""What tests share that look at the Makefile from the outside: make in an environment of its own, and waiting."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
