"""Faults, drawn by a seed: runs that are killed at any moment, and finished ones of which a file is damaged.

A study is made run by run, as make does it, in processes that are killed; only what this test started is.
"""

import importlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest

from conftest import tiny
from nondecoupling.study import folders
from nondecoupling.study.results import collect
from nondecoupling.workflow import graph, notebooks
from nondecoupling.workflow.__main__ import main

SEED, KILLS, DAMAGED = 7, 20, 25
LONGEST = 8.0  # seconds until a kill, on a machine that is slow
RUNS = ("data", "base", "sft", "sft-rl")
STUDY = tiny()


def place_of(root, name):
    return folders.run_folder(root, STUDY.run(name), 0)


def begin(name):
    """Start what make's recipe for a run does, in a process that prints nothing and has imported all it needs."""

    def recipe():
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(main(["run", "--run", name, "--seed", "0", "--profile=tiny"]))

    process = multiprocessing.get_context("fork").Process(target=recipe)
    process.start()
    return process


def kill(process):
    """Kill a recipe, and what it started, at once; its kernel goes with it."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        child.kill()
    psutil.wait_procs(started, timeout=10)
    process.join()
    time.sleep(0.2)  # the server of kernels looks twenty times a second


@pytest.fixture(scope="module")
def made(tmp_path_factory, warm_server):
    """Results folders of one study, made without a fault and with kills at random moments; what was counted."""
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("whole", "killed"))
    chance, seconds, counts, finished = random.Random(SEED), {}, Counter(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ)
        patch.setenv("NONDECOUPLING_RESULTS", str(whole))
        before = dict(os.environ)
        sys.modules.setdefault("rfc3987_syntax", None)  # as in `notebooks.execute`
        importlib.import_module("papermill")
        notebooks.quiet_environment(STUDY, jobs=1)
        os.environ |= warm_server
        for name in RUNS:
            start = time.perf_counter()
            process = begin(name)
            process.join()
            assert process.exitcode == 0, name
            seconds[name] = time.perf_counter() - start
        os.environ["NONDECOUPLING_RESULTS"] = str(killed)
        for number, name in enumerate(RUNS):
            for _ in range(KILLS * (number + 1) // len(RUNS) - KILLS * number // len(RUNS)):
                process = begin(name)
                process.join(chance.uniform(0, min(seconds[name], LONGEST)))
                ended = process.exitcode is not None
                if not ended:
                    kill(process)
                counts["too late" if ended else "killed"] += 1
                now = {other for other in RUNS if folders.is_complete(place_of(killed / "tiny", other))}
                counts["published"] += len(now - finished)
                assert finished <= now, "a finished run was lost"
                assert all(folders.damaged_file(place_of(killed / "tiny", other)) is None for other in now)
                finished = now
            process = begin(name)  # it may have been published between two kills, of which the last left its part
            process.join()
            assert process.exitcode == 0, name
        os.environ.clear()
        os.environ.update(before)
    return whole / "tiny", killed / "tiny", counts


def content_of(folder):
    """Bytes of a run's files, by name, without those that say when it was made and how long a step took."""
    timed = {folders.METRICS, folders.HASHES, folders.NOTEBOOK, folders.LOG}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    if (folder / folders.LOG).exists():
        log = pd.read_csv(folder / folders.LOG).drop(columns="step_time", errors="ignore")
        content[folders.LOG] = log.to_csv().encode()
    return content


def test_kills_at_random_moments_change_nothing(made, capsys):
    whole, killed, counts = made
    with capsys.disabled():
        print(f"\nfaults: {counts['killed']} recipes killed, {counts['too late']} had ended; all runs are whole")
    assert counts["killed"] + counts["too late"] == KILLS
    assert counts["killed"] >= KILLS // 2
    for name in RUNS:
        expected, found = place_of(whole, name), place_of(killed, name)
        assert content_of(found) == content_of(expected)
        metrics = [folders.read_json(folder / folders.METRICS)["evaluation"] for folder in (expected, found)]
        assert metrics[0] == metrics[1]
        assert (found / folders.NOTEBOOK).exists()
    left = {path.name for path in (killed / "seed0").iterdir()}
    assert left == set(RUNS)


def flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def empty(path, chance):
    path.write_bytes(b"")


def remove(path, chance):
    path.unlink()


def add(path, chance):
    path.write_bytes(path.read_bytes() + b" ")


def exchange(path, chance):
    path.write_bytes(chance.choice([other for other in path.parent.iterdir() if other.is_file()]).read_bytes()[::-1])


KINDS = [flip, cut, empty, remove, add, exchange]


def test_a_damaged_file_of_any_kind_is_named_and_used_by_nobody(made, tmp_path, monkeypatch, capsys):
    """By those who read tables and by make, whichever looks first."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    chance, counts = random.Random(SEED), Counter()
    files = sorted(path.relative_to(made[0]) for path in made[0].rglob("*") if path.is_file())
    of_runs = [path for path in files if path.parts[0] == "seed0"]
    by_name = list({path.name: path for path in chance.sample(of_runs, len(of_runs))}.values())  # each kind of file
    drawn = [*by_name, *chance.choices(of_runs, k=DAMAGED)][:DAMAGED]
    for number, path in enumerate(drawn):
        root = shutil.copytree(made[0], tmp_path / "tiny", dirs_exist_ok=True)
        damage = KINDS[number % len(KINDS)]
        damage(root / path, chance)
        run = next(name for name in RUNS if (root / path).is_relative_to(place_of(root, name)))
        with pytest.raises((RuntimeError, FileNotFoundError)) as caught:
            [folders.require_complete(place_of(root, name), "Reading") for name in RUNS]
        said = str(caught.value)
        assert "\n" not in said
        assert str(place_of(root, run)) in said
        assert "make reproduce" in said
        with pytest.raises((RuntimeError, FileNotFoundError)):
            collect(STUDY, [0], STUDY.runs_of("main"))
        counts[damage.__name__] += 1
        shutil.rmtree(root)
    with capsys.disabled():
        print(f"\nfaults: {len(drawn)} files damaged ({dict(counts)}), {len(by_name)} kinds of file; all named")
    assert sum(counts.values()) == DAMAGED


def test_damaged_settings_are_renewed(made, tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    root = Path(shutil.copytree(made[0], tmp_path / "tiny"))
    parts = [graph.run_part(STUDY, name, 0) for name in RUNS]
    graph.write_settings(STUDY, parts, [0])
    for content in (b"", b"{", b"\xff\x00"):
        (root / parts[2].settings).write_bytes(content)
        settings = graph.settings_of_parts(STUDY, parts, [0])
        assert graph.renewed_settings(root, parts, settings) == {"sft"}
