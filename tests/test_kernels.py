"""Kernels that start warm are what ordinary ones are: clean, equal in what they compute and show, and easy to end."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from making import until
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from nondecoupling.workflow import executor, kernels
from nondecoupling.workflow.__main__ import main
from nondecoupling.workflow.notebooks import JUPYTER_PATH


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """As in a study: our kernels, and figures shown in notebooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(JUPYTER_PATH))
        patch.delenv("MPLBACKEND")
        yield


@pytest.fixture(scope="module")
def server():
    """The server's process, when it is ready."""
    with kernels.warm_kernels():
        until(Path(os.environ[kernels.ADDRESS]).exists, "the server is ready")
        yield next(
            child for child in psutil.Process().children() if os.environ[kernels.ADDRESS] in " ".join(child.cmdline())
        )


@contextmanager
def new_kernel(**how):
    """A kernel's client process, and Jupyter's client of it."""
    manager, client = start_new_kernel(kernel_name="python3", **how)
    try:
        yield psutil.Process(manager.provisioner.process.pid), client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def shown(client, code):
    """Texts that a cell shows, by stream, error or type of output."""
    texts = {}

    def keep(message):
        content = message["content"]
        kind = content.get("name") or content.get("ename") or " ".join(sorted(content.get("data", [])))
        text = content.get("text") or content.get("evalue") or content.get("data", {}).get("text/plain", "")
        texts[kind] = texts.get(kind, "") + text

    client.execute_interactive(code, output_hook=keep, timeout=60)
    return {kind: text for kind, text in texts.items() if kind}


def words(client, code):
    return shown(client, code)["stdout"].split()


def kernel_of(client):
    """The kernel's process."""
    return psutil.Process(int(*words(client, "import os; print(os.getpid())")))


def end(*processes):
    """Whether these processes end."""
    return not psutil.wait_procs(processes, timeout=30)[1]


def test_a_study_has_a_server_where_it_executes_something_here(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    monkeypatch.setattr(executor.carry, "wait_for_a_worker", lambda _: None)
    addresses = []
    monkeypatch.setattr(executor, "run_make", lambda *_: addresses.append(os.environ.get(kernels.ADDRESS)))

    def make_study(scheduler=""):
        executor.make_study(load_study("tiny"), [0], ["main"], [], jobs=1, scheduler=scheduler)
        return addresses.pop()

    address = make_study()
    assert address
    assert not Path(address).parent.exists()  # it is over
    assert make_study("tcp://elsewhere:8786") is None
    monkeypatch.setattr(executor, "stale_parts", lambda *_: [])
    assert make_study() is None


def test_nothing_is_forked_where_there_is_a_gpu(tmp_path):
    code = "import torch; torch.cuda.is_available = lambda: True; from nondecoupling.workflow import kernels; "
    code += f"kernels.serve_warm({str(tmp_path / 'socket')!r})"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.stderr, list(tmp_path.iterdir())) == ("", [])


def test_kernels_know_nothing_of_each_other(server):
    mark = "import os, wave, torch; mine = 1; os.environ['MINE'] = '1'; os.chdir('/'); torch.mine = 1"
    marks = "import os, sys, torch; print('mine' in globals(), 'MINE' in os.environ, os.getcwd() == '/', "
    marks += "'wave' in sys.modules, hasattr(torch, 'mine'))"
    numbers = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    with new_kernel() as (_, one), new_kernel() as (_, two):
        assert kernel_of(one).ppid() == kernel_of(two).ppid() == server.pid
        shown(one, mark)
        with new_kernel() as (_, later):
            assert words(one, marks) == ["True"] * 5
            assert words(two, marks) == words(later, marks) == ["False"] * 5
            assert len({*words(one, numbers), *words(two, numbers), *words(later, numbers)}) == 9


def test_libraries_are_imported_and_our_own_modules_are_not(server):
    """Else an edit would not be seen by the kernels of a study that is under way."""
    code = "import sys; print('trl.trainer.grpo_trainer' in sys.modules, "
    code += "*(name for name in sys.modules if name.startswith('nondecoupling.')))"
    with new_kernel() as (_, client):
        assert words(client, code) == ["True", "nondecoupling.workflow", "nondecoupling.workflow.kernels"]


def test_a_kernel_has_the_folder_and_the_environment_of_who_asks(server, tmp_path):
    environment = {**os.environ, "MINE": "é"}
    del environment["TQDM_DISABLE"]
    code = "import os; print(os.getcwd(), os.environ['MINE'], os.getenv('MINE'), 'TQDM_DISABLE' in os.environ)"
    with new_kernel(cwd=str(tmp_path), env=environment) as (_, client):
        assert words(client, code) == [str(tmp_path), "é", "é", "False"]


SHOWN = """
import gc, logging, sys, threading
import matplotlib.pyplot as plt, numpy as np, pandas as pd, transformers
print(sys.path, sys.argv[0], __name__, gc.get_threshold(), gc.isenabled(), threading.active_count())
logging.getLogger("transformers").error("logged")
print("complained", file=sys.stderr)
plt.plot([1, 2])
plt.show()
pd.DataFrame(np.eye(18))
"""


def test_a_kernel_shows_what_a_plain_one_does(server, monkeypatch):
    with new_kernel() as (_, client):
        warm = shown(client, SHOWN)
    monkeypatch.delenv(kernels.ADDRESS)
    with new_kernel() as (_, client):
        assert shown(client, SHOWN) == warm
    assert set(warm) == {"stdout", "stderr", "image/png text/plain", "text/html text/plain"}
    assert warm["stderr"] == "[transformers] logged\ncomplained\n"


def test_a_stage_has_the_same_numbers_to_the_bit(server, tiny_base, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    forbidden = tmp_path / "torch.py"
    forbidden.write_text("raise ImportError('of a plain kernel')")  # a warm one has it already
    warm = sft_results(tmp_path / "warm")
    monkeypatch.delenv(kernels.ADDRESS)
    forbidden.unlink()
    assert sft_results(tmp_path / "plain") == warm


def sft_results(copied):
    """What a recipe makes, in a copy of the tiny study."""
    shutil.copytree(folders.results_root(), copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NONDECOUPLING_RESULTS", str(copied))
        assert main(["run", "--run", "sft", "--seed", "1", "--profile", "tiny"]) == 0
    place = copied / "tiny" / "seed1" / "sft"
    hashes = [
        folders.file_hashes(place, pattern) for pattern in ("trajectory.csv", "*.parquet", "policy/*.safetensors")
    ]
    assert all(hashes)
    return folders.read_json(place / "metrics.json")["evaluation"], hashes


def test_an_interrupt_reaches_the_kernel(server):
    code = "import time\nprint('begun')\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('stopped')"
    with new_kernel() as (process, client):
        threading.Timer(1, process.send_signal, [signal.SIGINT]).start()
        assert words(client, code) == ["begun", "stopped"]
        assert words(client, "print('again')") == ["again"]


@pytest.mark.parametrize(("how", "status"), [("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_a_client_ends_as_its_kernel_does(server, how, status):
    with new_kernel() as (process, client):
        kernel = kernel_of(client)
        client.execute(f"import os, signal; {how}")
        assert process.wait(timeout=10) == status
        assert end(kernel)


def test_a_client_that_is_killed_before_its_kernel_has_begun_takes_nobody_along(server, tmp_path):
    # A kernel that gets as far as that replaces its connection file, whatever it is, and removes it at its end.
    request = {
        "arguments": ["-f", str(tmp_path / "kernel.json")],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(os.environ[kernels.ADDRESS])
            socket.send_fds(client, [json.dumps(request).encode()], [0, 1, 2])
            assert select.select([client], [], [], 30)[0]  # its answer is there, and it does not read it
    with new_kernel() as (_, client):
        assert kernel_of(client).ppid() == server.pid


def test_a_kernel_that_computes_ends_with_its_client(server):
    with new_kernel() as (process, client):
        kernel = kernel_of(client)
        client.execute("while True: pass")
        process.kill()
        assert end(kernel)


ASKS = """
import os, sys, time
from pathlib import Path
from jupyter_client.manager import start_new_kernel
from nondecoupling.workflow import kernels

def start():
    manager, client = start_new_kernel(kernel_name="python3")
    reply = client.execute("import os, torch", reply=True, user_expressions={{"pid": "os.getpid()", "threads":
        "torch.get_num_threads(), float(torch.ones(512, 512).mm(torch.ones(512, 512)).sum())"}})
    found = reply["content"]["user_expressions"]
    texts = [found[name]["data"]["text/plain"] for name in ("pid", "threads")]
    print(manager.provisioner.process.pid, *texts, flush=True)
    time.sleep(60)

{how}
"""
OWN_SERVER = """
with kernels.warm_kernels():
    while not Path(os.environ[kernels.ADDRESS]).exists(): time.sleep(0.1)
    start()
"""


@contextmanager
def who_asks(how, **environment):
    """A process that has asked for a kernel, its client, its kernel, and what that found."""
    command = [sys.executable, "-c", ASKS.format(how=how)]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as asking:
        try:
            client, kernel, found = asking.stdout.readline().rstrip().split(maxsplit=2)
            yield psutil.Process(asking.pid), psutil.Process(int(client)), psutil.Process(int(kernel)), found
        finally:
            asking.kill()


def test_a_kernel_ends_with_a_recipe_that_is_killed(server):
    with who_asks("start()") as (recipe, client, kernel, _):
        assert kernel.ppid() == server.pid
        recipe.kill()
        assert end(client, kernel)


def test_all_ends_with_a_study_that_is_killed_and_kernels_have_its_threads():
    alone = {kernels.ADDRESS: "", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    with who_asks(OWN_SERVER, **alone) as (study, client, kernel, found):
        assert found == f"(2, {512.0**3})"
        server = kernel.parent()
        assert server.ppid() == study.pid
        study.kill()
        assert end(server, client, kernel)


# The last test: without the server


def test_kernels_end_with_the_server_and_the_next_is_a_plain_one(server):
    with new_kernel() as (process, client):
        kernel = kernel_of(client)
        assert kernel.ppid() == server.pid
        server.kill()
        assert process.wait(timeout=10) == 1
        assert end(kernel)
        with new_kernel() as (process, client):
            assert kernel_of(client) == process
