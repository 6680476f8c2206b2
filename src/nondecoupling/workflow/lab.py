"""JupyterLab on copies of the notebooks, the tour and the notebook to play with first; tracked files stay clean."""

import json
import os
import secrets
import shutil
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import NOTEBOOKS
from nondecoupling.workflow.notebooks import JUPYTER_PATH

FIRST = ["00_tour.ipynb", "explore.ipynb"]  # what is open, in this order
PORT = 8888
# Defaults, which a user's own settings precede. With all cells in the page explore's bar stays in view.
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


class Lab(NamedTuple):
    """How the server is started, and where it then answers."""

    command: list[str]
    environment: dict[str, str]
    port: int
    address: str


def copy_notebooks(folder: Path) -> None:
    """Copies of all notebooks in ``folder``; one that is older than its chapter is kept beside the new one."""
    folder.mkdir(exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy = folder / notebook.name
        if copy.exists() and copy.stat().st_mtime < notebook.stat().st_mtime:
            copy.replace(copy.with_suffix(".old.ipynb"))
        if not copy.exists():
            shutil.copyfile(notebook, copy)


def free_port(first: int = PORT) -> int:
    """The first port from ``first`` on at which nobody listens here; OSError where a hundred are taken."""
    for port in range(first, first + 100):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"Ports {first} to {first + 99} are all in use here.")


def has_screen() -> bool:
    """Whether a browser that opens here is seen by whoever typed the command."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def prepare(root: Path = folders.REPOSITORY) -> Lab:
    """Make the copies in ``root``/lab, and the command that opens them."""
    from jupyterlab_server.workspaces_handler import WorkspacesManager

    folder = root / "lab"
    copy_notebooks(folder)
    own = folder / ".jupyter"
    (own / "settings").mkdir(parents=True, exist_ok=True)
    folders.write_json(own / "settings" / "overrides.json", SETTINGS)
    tabs = [f"notebook:lab/{name}" for name in FIRST]
    open_tabs = {tab: {"data": {"path": tab.partition(":")[2], "factory": "Notebook"}} for tab in tabs}
    dock = {"type": "tab-area", "currentIndex": 0, "widgets": tabs}
    layout = {"layout-restorer:data": {"main": {"dock": dock, "current": tabs[0]}}}
    workspace = {"data": layout | open_tabs, "metadata": {"id": "nondecoupling"}}
    WorkspacesManager(str(own / "workspaces")).save("nondecoupling", json.dumps(workspace))

    port, token = free_port(), secrets.token_hex(16)
    options = {
        "ServerApp.root_dir": root,
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.default_url": "/lab/workspaces/nondecoupling",
        "LabApp.app_settings_dir": own / "settings",
        "LabApp.workspaces_dir": own / "workspaces",
        "Application.log_level": "ERROR",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    command += ["--allow-root"] * (hasattr(os, "geteuid") and os.geteuid() == 0) + ["--no-browser"] * (not has_screen())
    environment = {**os.environ, "JUPYTER_PATH": str(JUPYTER_PATH), "JUPYTER_TOKEN": token}
    return Lab(command, environment, port, f"http://127.0.0.1:{port}/lab/workspaces/nondecoupling?token={token}")


def words(lab: Lab) -> str:
    """What whoever typed `make lab` has to know, and to type where the browser is on another machine."""
    said = ["JupyterLab opens copies of the notebooks, in lab/; the chapters themselves stay as they are.", lab.address]
    if "--no-browser" in lab.command:
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or "you"
        said[1:1] = [
            "Is your browser on another machine? Type there, and leave it running:",
            f"  ssh -N -L {lab.port}:127.0.0.1:{lab.port} {user}@{socket.gethostname()}",
            "Then open there:",
        ]
    return "\n".join([*said, "Ctrl-C, twice, ends it."])


def open_lab() -> None:
    """Become the server; never returns."""
    lab = prepare()
    print(words(lab), flush=True)
    os.chdir(folders.REPOSITORY)
    os.execve(lab.command[0], lab.command, lab.environment)
