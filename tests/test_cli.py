"""What is refused at once and in one sentence, and what the Makefile says when asked."""

import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from making import REPOSITORY, environment, make, unused_address
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from nondecoupling.task import grammar
from nondecoupling.workflow import executor
from nondecoupling.workflow.__main__ import main
from nondecoupling.workflow.executor import alone, progress_line


@pytest.fixture
def no_kernel(monkeypatch):
    """Any attempt to execute a notebook fails the test."""
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def test_progress_says_what_is_left_in_whole_minutes():
    assert progress_line("sft · 0:15", 6, 24, 60) == "[6/24] sft · 0:15 · 25 % done, about 3 min left"
    assert progress_line("sft · 0:15", 23, 24, 200) == "[23/24] sft · 0:15 · 95 % done"
    assert progress_line("sft · 0:15", 24, 24, 2000) == "[24/24] sft · 0:15 · 100 % done"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--run", "sft", "--profile", "nanno"], ["'nanno'", "'nano'"]),
        (["controls", "--profile", "four"], ["4 answers", "make controls needs a study with two", "make reproduce"]),
        (["geometry", "--profile", "four"], ["make geometry needs a study with two"]),
        (["run", "--run", "theory", "--profile", "four"], ["no run 'theory'"]),
        (["run", "--run", "sft", "--seeds", "4-0"], ["'4-0'", "0,3,7"]),
        (["run", "--run", "sft", "--set", "rl.betta=1"], ["'rl.betta'", "'rl.beta'"]),
        (["run", "--run", "sft", "--set", "rl.beta"], ["'rl.beta'", "rl.beta=0.25"]),
        (["run", "--run", "sft", "--set", "rl.beta=-1"], ["'rl.beta'", "-1"]),
        (["run", "--run", "sft-lr"], ["'sft-lr'", "'sft-rl'"]),
        (["run"], ["''", "sft-rl"]),
        (["run", "--run", "data", "--data", "/no/such/folder"], ["data.folder", "/no/such/folder"]),
        (["run", "--run", "sft", "--seed", "-1"], ["-1"]),
        (["run", "--run", "sft", "--seed", "one"], ["--seed", "'one'"]),
        (["reproduce", "--seeds", "five"], ["'five'"]),
        (["reproduce", "--set", "sft.steps=0"], ["'sft.steps'"]),
        (["reproduce", "--set", "data.disagreement=0.5"], ["'data.disagreement'", "0.5", "less than 0.5"]),
        (["reproduce", "--jobs", "0"], ["--jobs", "'0'"]),
        (["reproduce", "--sed", "0"], ["--sed"]),
        (["reprodce"], ["'reprodce'", "'reproduce'"]),
        ([], ["action"]),
        (["list", "--seeds", "0-"], ["'0-'"]),
        (["report"], ["claims.json", "make reproduce"]),
        (["verify"], ["tables of results", "make reproduce"]),
    ],
)
def test_a_bad_argument_is_answered_in_one_line_before_a_kernel_starts(results, no_kernel, capsys, arguments, words):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert printed.out == ""
    assert not results.exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["reproduce", "SEED=0"], "'SEED' (did you mean SEEDS?)"),
        (["reproduce", "profile=tiny"], "'profile' (did you mean PROFILE?)"),
        (["reproduce", "JOBS=two"], "'two' is not a number from 1 to 999"),
        (["reproduce", "PROFILE=tini"], "'tini' (did you mean 'tiny'?)"),
        (["reprodce"], "(did you mean 'reproduce'?)"),
    ],
)
def test_make_refuses_what_it_does_not_know_and_names_the_nearest(results, words, found):
    done = make(*words, "SCHEDULER=nowhere")  # where nothing would be begun
    assert done.returncode != 0
    assert found in done.stderr
    assert done.stdout == ""
    assert not results.exists()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("tiny/seed0/stf/metrics.json", "tiny/seed0/sft/metrics.json?)"),
        ("nano/base/metrics.json", "of the study 'tiny'"),
    ],
)
def test_a_target_that_is_no_result_of_the_study_is_refused(results, capfd, target, found):
    assert main(["reproduce", "--profile=tiny", f"--target={results / target}"]) == 1
    printed = capfd.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"error: {results / target} is no result of the study 'tiny'")
    assert found in line
    assert printed.out == ""
    assert not results.exists()


@pytest.mark.parametrize(
    ("change", "found"), [({"aspect": 0.1}, "'aspect' is no phenomenon"), ({"case": None}, "'case' is missing")]
)
def test_disagreement_about_other_phenomena_is_refused_before_make(results, monkeypatch, capsys, change, found):
    rates = dict.fromkeys(grammar.PHENOMENA, 0.1) | change
    text = json.dumps({source: rate for source, rate in rates.items() if rate}, separators=(",", ":"))
    monkeypatch.setattr("nondecoupling.workflow.executor.run_make", lambda *_: pytest.fail("make was called"))
    assert main(["reproduce", "--profile=tiny", f"--set=data.disagreement={text}"]) == 1
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: data.disagreement: ")
    assert found in line
    assert printed.out == ""


def test_only_what_a_target_needs_is_counted(results, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("nondecoupling.workflow.executor.run_make", lambda *words: calls.append(words))
    target = "seed0/sft/metrics.json"
    assert main(["reproduce", "--profile=tiny", f"--target={results / 'tiny' / target}"]) == 0
    [(command, notebooks)] = calls
    assert (command[-1], notebooks) == (target, 3)  # data, base, sft
    assert capsys.readouterr().out.startswith("study 'tiny': 3 of 3 notebooks to execute")


def test_ctrl_c_before_anything_is_known_is_quiet(results, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nondecoupling.workflow.__main__.load_study", interrupted)
    assert main(["reproduce"]) == 130
    assert tuple(capsys.readouterr()) == ("", "")


def test_the_line_of_a_finished_run_is_one_write(monkeypatch, results):
    """Runs that end at the same moment share a pipe, and make's count goes by lines."""
    written = []
    monkeypatch.setattr("nondecoupling.workflow.notebooks.execute", lambda *_: None)
    monkeypatch.setattr("nondecoupling.workflow.notebooks.quiet_environment", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    assert main(["run", "--profile=tiny", "--run=sft", "--seed=0"]) == 0
    assert [text for text in written if text] == ["seed 0 · sft · 0:00\n"]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (unused_address, ["no Dask scheduler answers at tcp://127.0.0.1:", "SCHEDULER=local"]),
        ("locl", ["'locl'", "tcp://host:8786"]),
        ("foo://host:8786", ["'foo'", "tcp"]),
        ("tcp://host", ["port", "'host'"]),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_said_in_one_line(results, no_kernel, monkeypatch, capfd, scheduler, words):
    monkeypatch.setattr("nondecoupling.workflow.carry.CONNECT_SECONDS", 1)
    address = scheduler() if callable(scheduler) else scheduler
    assert main(["reproduce", "--profile=nano", "--seeds", "0", "--scheduler", address]) == 1
    printed = capfd.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert printed.out.startswith("study 'nano': 8 of 8 notebooks to execute")
    assert {path.name for path in (results / "nano").iterdir()} == {".lock", "plan.mk", "settings"}


# What make says


def test_help_is_the_default_names_every_target_and_fits_a_terminal():
    printed = make().stdout
    assert printed == make("help").stdout
    phony = re.search(r"^TARGETS :=((?:.*\\\n)*.*)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    *others, older = printed.splitlines()
    named = {match[1] for line in others if (match := re.match(r"  make (\w+) +\S", line))}
    assert {"reproduce", "controls", "betas", "everything", "verify"} < named
    assert set(phony[1].replace("\\", "").split()) == {"FORCE"} | named | set(re.findall(r"(\w+) \(", older))
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("profile", ["tiny", "nano"])
def test_the_list_of_twenty_seeds_fits_a_terminal(results, capsys, profile):
    assert main(["list", "--profile", profile, "--seeds", "0-19"]) == 0
    *lines, folder = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert folder == str(results / profile)


@pytest.mark.parametrize(
    ("older", "newer"),
    [("study", "controls"), ("theory", "betas"), ("sweep", "seeds"), ("sweep SEEDS=3", "seeds SEEDS=3")],
)
def test_older_names_of_targets_mean_the_newer_ones(older, newer):
    printed = make("--dry-run", *older.split()).stdout
    assert printed == make("--dry-run", *newer.split()).stdout
    assert printed.count("nondecoupling.workflow") == 1


@pytest.mark.parametrize(("words", "seeds"), [([], "0-19"), (["SEEDS=3"], "3")])
def test_seeds_is_reproduce_with_more_seeds(words, seeds):
    printed = make("--dry-run", "seeds", *words).stdout
    assert "nondecoupling.workflow reproduce " in printed
    assert f" --seeds='{seeds}' " in printed


def test_a_limit_of_threads_is_no_limit_of_runs_side_by_side(results):
    free, limited = (make("reproduce", "--dry-run", **threads).stdout for threads in ({}, {"OMP_NUM_THREADS": "1"}))
    assert "--jobs='1'" not in limited or len(os.sched_getaffinity(0)) == 1
    assert limited == free


@pytest.mark.parametrize(("status", "mentions"), [(0, 1), (9, 0)])
def test_nano_is_the_default_also_where_a_gpu_is_and_a_line_says_what_would_use_it(results, tmp_path, status, mentions):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    printed = make("reproduce", "SCHEDULER=nowhere", PATH=f"{tmp_path}:{environment()['PATH']}").stdout
    first, *others = printed.splitlines()
    assert first.startswith("study 'nano': ")
    assert len(others) == printed.count("PROFILE=paper would run Qwen") == mentions


def test_clean_removes_this_study_only(results, capsys):
    for name in ("nano", load_study("nano", overrides={"rl.beta": 0.25}).name):
        (results / name / "data").mkdir(parents=True)
    assert main(["clean", "--set", "rl.beta=0.25"]) == 0
    assert [path.name for path in results.iterdir()] == ["nano"]


@pytest.mark.parametrize(
    "option", ["PROFILE", "SEEDS", "JOBS", "DATA", "MODEL", "SET", "SCHEDULER", "RANDOM_WEIGHTS", "FORMAT"]
)
def test_no_option_is_a_command(results, tmp_path, option):
    """Neither make nor the shell does what is in it, on the command line or in the environment."""
    made = [tmp_path / name for name in ("make", "shell", "quote")]
    odd = "$(shell touch {})`touch {}`'; touch {}; '".format(*made)
    for words, surroundings in (([f"{option}={odd}"], {}), ([], {option: odd})):
        make("list", *words, **surroundings)
        assert not [path for path in made if path.exists()]


def test_a_dollar_is_a_dollar(results):
    done = make("list", "PROFILE=tiny", 'SET=prompt.template="Worth $5 or $HOME? {sentence}"', "SEEDS=0")
    assert done.returncode == 0, done.stderr
    done = make("reproduce", "--dry-run", 'SET=prompt.acceptable="$5 or $HOME"')
    assert "$5 or $HOME" in done.stdout


@pytest.mark.parametrize("action", ["reproduce", "clean"])
def test_a_study_that_is_being_made_is_left_alone(results, capsys, no_kernel, action):
    root = results / "tiny"
    with alone(root):
        assert main([action, "--profile=tiny"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {root} is being made by process {os.getpid()} on {platform.node()}; wait for it, or stop it."
    )
    assert {path.name for path in root.iterdir()} == {".lock"}
    assert main(["clean", "--profile=tiny"]) == 0  # whoever made it is done
    assert not root.exists()


def test_where_nothing_can_be_locked_a_line_says_so(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_what_was_judged_of_other_seeds_is_removed(results, no_kernel, monkeypatch):
    monkeypatch.setattr(executor, "run_make", lambda *_: 0)
    root = results / "tiny"
    removed = [root / name for name in ("controls.json", "controls.ipynb", "figures/joint.png", "geometry.json")]
    kept = [root / name for name in ("claims.json", "figures/experiments.png", "figures/portrait/plane.svg")]
    (root / "figures" / "portrait").mkdir(parents=True)
    for path in (*removed, *kept):
        folders.write_text(path, "{}")
    executor.make_study(load_study("tiny"), [0, 1, 2], ["main"], [], jobs=1)
    assert [path for path in (*removed, *kept) if path.exists()] == kept


def test_the_lock_ends_with_the_process_that_holds_it(results):
    root = results / "tiny"
    imports = "from pathlib import Path; from nondecoupling.workflow.executor import alone"
    holding = f"{imports}\nwith alone(Path({str(root)!r})): print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holding], **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match=f"is being made by process {holder.pid} on"), alone(root):
            pass
        holder.kill()
    with alone(root):
        pass
