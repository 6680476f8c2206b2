"""What `make lab` copies, starts and says; test_browser.py opens it."""

import os
import socket

import pytest

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import NOTEBOOKS
from nondecoupling.workflow import lab


@pytest.fixture
def here(monkeypatch):
    """A person at this machine, who is not root."""
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("USER", "me")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_copies_are_opened_and_what_was_done_to_them_is_kept(tmp_path):
    folder = tmp_path / "lab"
    lab.copy_notebooks(folder)
    names = [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert set(lab.FIRST) <= set(names)
    (folder / "mine.ipynb").write_text("mine")
    (folder / "explore.ipynb").write_text("played")
    (folder / "01_data.ipynb").write_text("annotated")
    os.utime(folder / "01_data.ipynb", (1, 1))  # before the chapter was changed
    lab.copy_notebooks(folder)
    kept = {name: (folder / name).read_text() for name in ("mine.ipynb", "explore.ipynb", "01_data.old.ipynb")}
    assert kept == {"mine.ipynb": "mine", "explore.ipynb": "played", "01_data.old.ipynb": "annotated"}
    assert (folder / "01_data.ipynb").read_bytes() == (NOTEBOOKS / "01_data.ipynb").read_bytes()


def test_the_copies_are_ignored_by_git():
    assert "/lab/" in (folders.REPOSITORY / ".gitignore").read_text().splitlines()


def test_a_person_at_the_machine_is_told_one_address_and_gets_a_browser(here, tmp_path):
    ready = lab.prepare(tmp_path)
    assert not {"--allow-root", "--no-browser"} & set(ready.command)
    assert ready.environment["JUPYTER_TOKEN"] in ready.address
    assert ready.environment["JUPYTER_TOKEN"] not in " ".join(ready.command)  # which everybody on the machine can read
    assert "ssh" not in lab.words(ready)
    assert ready.address in lab.words(ready).splitlines()


@pytest.mark.parametrize(("name", "value"), [("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.2 22"), ("DISPLAY", "")])
def test_on_a_remote_machine_it_says_what_to_type(here, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(lab.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv(name, value)
    ready = lab.prepare(tmp_path)
    assert "--no-browser" in ready.command
    tunnel = f"ssh -N -L {ready.port}:127.0.0.1:{ready.port} me@{socket.gethostname()}"
    assert tunnel in lab.words(ready)


def test_root_is_allowed(here, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-root" in lab.prepare(tmp_path).command


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert lab.free_port(port) > port
