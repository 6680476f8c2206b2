"""A study from beginning to end: its graph as make rules, and make, which runs what is out of date.

With SCHEDULER= the same recipes are carried to a Dask cluster one by one (`carry`); make keeps order and number.
"""

import difflib
import fcntl
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nondecoupling.study import folders
from nondecoupling.study.plan import SUMMARIES, Group
from nondecoupling.study.study import Study, load_profile, parse_seeds
from nondecoupling.workflow import carry, kernels
from nondecoupling.workflow.graph import (
    REPORT,
    TABLES,
    Part,
    earlier_studies,
    parts_of,
    run_by_hand,
    runs_in,
    stale_parts,
    write_settings,
)
from nondecoupling.workflow.notebooks import forget, quiet_environment

RULES = "plan.mk"
FINISHED = re.compile(r" · \d+:\d\d$")  # the line of a finished notebook


def write_rules(root: Path, parts: list[Part], words: Sequence[str]) -> Path:
    """Write make rules for ``parts`` to the study's folder ``root``; ``words`` are the command line's for the study."""
    targets = " ".join(part.target for part in parts)  # each appears whole, and is not to be removed by make
    lines = ["CARRY =", f".PRECIOUS: {targets}", f"study: {parts[-1].target}"]
    for part in parts:
        command = command_of(part, words)
        needs = " ".join([part.settings, *part.needs, *(["|", *part.after] if part.after else [])])
        lines += ["", f"{part.target}: {needs}", f"\t@$(CARRY) {command.replace('$', '$$')}"]
    folders.write_text(root / RULES, "\n".join(lines) + "\n")
    return root / RULES


def command_of(part: Part, words: Sequence[str]) -> str:
    """The shell command that makes ``part``; ``words`` are the command line's for the study."""
    action = [part.name] if part.name in (TABLES, REPORT) else ["run", "--run", part.name]
    seed = [] if part.seed is None else ["--seed", str(part.seed)]
    return shlex.join([sys.executable, "-m", "nondecoupling.workflow", *action, *seed, *words])


def commands_of_runs(study: Study, seeds: list[int], words: Sequence[str]) -> list[str]:
    """A shell command for each run that make would execute, after those that it needs; its group is a comment.

    For a batch system that calls no make. Settings files are written as make's, so that make finds the runs finished.
    """
    parts = [part for part in parts_of(study, seeds, study.runs) if part.target.endswith(folders.METRICS)]
    write_settings(study, parts, seeds)
    stale = stale_parts(folders.study_folder(study), parts)
    return [f"{command_of(part, words)}  # {study.run(part.name).group}" for part in stale]


def make_study(
    study: Study,
    seeds: list[int],
    groups: Sequence[Group],
    words: Sequence[str],
    jobs: int,
    scheduler: str = "",
    target: str = "",
) -> None:
    """Let make execute what is out of date in some groups of the plan, here or on a cluster.

    What is finished stays part of the study, so that make reproduce after make betas executes nothing. Raises
    RuntimeError if something failed, after all that does not need it is done.
    """
    root = folders.study_folder(study)
    parts = parts_of(study, seeds, runs_in(study, seeds, groups))
    goal = goal_of(root, parts, target) if target else "study"
    with alone(root):
        wanted = [part for part in needed_by(goal, parts) if part.name not in (TABLES, REPORT)]
        by_hand = run_by_hand(root, wanted)
        write_settings(study, parts, seeds)
        for summary in SUMMARIES.keys() - {part.name for part in parts}:
            forget(root, summary)
        rules = write_rules(root, parts, words)
        notebooks = [part for part in stale_parts(root, parts) if part in wanted]
        if by_hand:
            print(f"made again, because somebody ran it by hand: {', '.join(part.words for part in by_hand)}")
        if notebooks:
            fetch_inputs(study)
        for name, changed in earlier_studies(study).items():
            print(f"{changed} since the study '{name}', whose runs stay where they are; this is a study of its own")
        how = f"by {scheduler}" if carry.is_remote(scheduler) else f"{jobs} at a time"
        print(opening_line(study.name, len(notebooks), len(wanted), how), flush=True)
        mention_gpu(study)
        if scheduler in ("", "local"):
            quiet_environment(study, jobs)  # as in the recipes; those on other machines see to it themselves
        with (
            carry.local_scheduler(jobs)
            if scheduler == "local"
            else nullcontext(scheduler and carry.address_of(scheduler)) as address,
            kernels.warm_kernels() if notebooks and not scheduler else nullcontext(),
        ):
            command = ["make", "--no-print-directory", "-C", str(root), f"-j{jobs}", "-f", rules.name, goal]
            if address:
                carry.wait_for_a_worker(address)  # or one sentence, before anything is begun
                launcher = shlex.join([sys.executable, "-m", "nondecoupling.workflow.carry", address])
                command += [
                    "--keep-going",
                    f"CARRY={launcher.replace('$', '$$')}",
                ]  # a failure stops only what needs it
            failed = run_make(command, len(notebooks))
    if failed:
        raise RuntimeError(
            "the study is not complete; what is finished is kept, and the same command goes on from there."
        )


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Be the only one who makes the study in ``root``; RuntimeError that names who does, if somebody does already."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / folders.LOCK).open("a+", encoding="utf-8") as lock:
        try:
            folders.take(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{root} cannot be locked ({error.strerror}): see to it that nobody else makes this study")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def goal_of(root: Path, parts: list[Part], target: str) -> str:
    """The part's target that a user means by the path ``target``; ValueError with the nearest where there is none."""
    name, known = os.path.relpath(Path(target).resolve(), root.resolve()), [part.target for part in parts]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {root / close[0]}?)" if close else ""
        raise ValueError(f"{target} is no result of the study '{root.name}'{hint}.")
    return name


def needed_by(goal: str, parts: list[Part]) -> list[Part]:
    """The parts without which make cannot make ``goal``, itself included; all for the whole study."""
    wanted = {goal, parts[-1].target} if goal == "study" else {goal}
    for part in reversed(parts):
        if part.target in wanted:
            wanted |= {*part.needs, *part.after}
    return [part for part in parts if part.target in wanted]


def opening_line(study: str, notebooks: int, planned: int, how: str) -> str:
    """What is about to be done."""
    return f"study '{study}': {notebooks} of {planned} notebooks to execute, {how}"


def progress_line(line: str, done: int, notebooks: int, seconds: float) -> str:
    """The ``line`` of a finished notebook, numbered; the ``done`` so far have taken ``seconds``.

    What is left is told in whole minutes, as if the others took as long as these.
    """
    minutes = seconds * (notebooks - done) / done / 60
    left = f", about {minutes:.0f} min left" if minutes >= 1 else ""
    return f"[{done}/{notebooks}] {line} · {100 * done // max(notebooks, done)} % done{left}"


def places(root: Path) -> str:
    """Where the results of the study in ``root`` are to be looked at."""
    return f"report:  {root / 'report.html'}\nfigures: {root / 'figures'}\nclaims:  {root / 'claims.json'}"


def run_make(command: list[str], notebooks: int) -> int:
    """Run make, number the lines of finished notebooks, and return its exit status."""
    start = time.perf_counter()
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=inherited) as making:
        for line in making.stdout or []:
            if FINISHED.search(line.rstrip()):
                done += 1
                line = progress_line(line.rstrip(), done, notebooks, time.perf_counter() - start) + "\n"
            print(line, end="", flush=True)
    return making.returncode


def mention_gpu(study: Study) -> None:
    """One line where a GPU is seen and not used: what the paper's setting would run on it."""
    if study.profile.name == "paper":
        return
    try:
        subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return
    paper = load_profile("paper")
    rl, sft, seeds = paper.rl, paper.sft, len(parse_seeds(paper.seeds))
    answers = 2 * seeds * rl.steps * rl.prompts_per_step * rl.answers_per_prompt
    sentences = 2 * seeds * sft.steps * sft.batch_size
    print(
        f"a GPU is here: PROFILE=paper would run {paper.model.hub} on it, {sentences:,} demonstrations and "
        f"{answers:,} sampled answers (make bench PROFILE=paper measures how many per second)"
    )


def fetch_inputs(study: Study) -> None:
    """Download what the study needs from the hub, before a kernel starts; ConnectionError where that is impossible.

    ValueError where the generated corpus is not described, or a folder of the user's holds no corpus or model.
    """
    from nondecoupling.task import annotators, corpus, grammar, hub  # with pandas, which no recipe needs

    profile, root = study.profile, folders.study_folder(study)
    if profile.data.generated:
        annotators.disagreement_by_source(profile.data)
    if profile.pretrains and profile.pretrain:
        drawn = annotators.phenomena(profile.data)
        grammar.require_each_phenomenon(profile.pretrain.taught, "pretrain.taught", drawn)
    if profile.data.source == "hub" and not profile.data.folder and not folders.is_complete(root / "data"):
        hub.fetch_glue()
    if profile.data.folder and not folders.is_complete(root / "data"):
        corpus.load_corpus(Path(profile.data.folder), profile.data)
        print(*corpus.remarks(Path(profile.data.folder), profile.data), sep="\n", flush=True)
    if profile.model.folder and not folders.is_complete(root / "base"):
        hub.check_model(Path(profile.model.folder))
    if profile.model.hub and not profile.model.folder:
        hub.fetch_model(profile.model.hub, str(profile.model.revision))
