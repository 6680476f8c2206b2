"""The hub: pinned files, and one sentence within ten seconds where it cannot be reached."""

import os
import socket
import subprocess
import sys
import time

import pytest

from nondecoupling.study.study import load_study
from nondecoupling.task import hub
from nondecoupling.workflow import __main__ as cli
from nondecoupling.workflow import executor

FETCH = "from nondecoupling.task import hub; hub.fetch_model('Qwen/Qwen3-0.6B', '{}')".format("c" * 40)


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def python(code, tmp_path, **environment):
    """Run ``code`` without a model cache, with the hub at another address."""
    clean = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("kind", ["offline", "refused", "silent"])
def test_no_hub_is_said_in_one_sentence_within_seconds(kind, silent_server, tmp_path):
    environment = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "refused": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "silent": {"HF_ENDPOINT": silent_server},
    }[kind]
    done, seconds = python(FETCH, tmp_path, **environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: The model Qwen/Qwen3-0.6B (revision cccccccc) is not on this machine")
    assert "MODEL=path" in last
    assert "PROFILE=nano" in last
    assert seconds < 30  # six on a quiet machine


def test_the_study_asks_for_the_hub_before_any_kernel_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    monkeypatch.setattr(executor, "run_make", lambda *_, **__: pytest.fail("make was started"))

    def unreachable(*_):
        raise ConnectionError("The dataset nyu-mll/glue is not on this machine.")

    monkeypatch.setattr(hub, "fetch", unreachable)
    assert cli.main(["reproduce", "--profile", "paper"]) == 1
    assert capsys.readouterr().err == "error: The dataset nyu-mll/glue is not on this machine.\n"


def test_what_was_downloaded_once_is_used_offline(tmp_path, monkeypatch):
    """A cache as the hub client leaves it: blobs, and a snapshot that links to them."""
    revision = "c" * 40
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    done, _ = python(
        FETCH.replace("hub.fetch_model", "print(hub.fetch_model") + ")", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.stdout.strip() == str(snapshot)


def test_only_what_transformers_reads_is_downloaded():
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl")) for pattern in hub.MODEL_FILES)


@pytest.mark.parametrize("name", ["paper", "laptop"])
def test_the_hub_profiles_pin_revision_and_weights(name):
    model = load_study(name).profile.model
    assert len(model.revision) == 40
    assert len(model.sha256) == 64
    assert load_study(name).profile.data.expect == "cola"
