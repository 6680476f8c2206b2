"""The command line that the Makefile calls: one action, the study that it is about, and one sentence where it fails."""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nondecoupling.study import folders
from nondecoupling.study.plan import Group, require_groups, summaries
from nondecoupling.study.study import FOLDERS, Study, load_study, nearest, parse_overrides, parse_seeds
from nondecoupling.workflow import graph, notebooks
from nondecoupling.workflow.carry import is_remote
from nondecoupling.workflow.executor import alone, commands_of_runs, make_study, places

STUDIES: dict[str, list[Group]] = {
    "reproduce": ["main"],
    "controls": ["main", "controls"],
    "betas": ["main", "sweep"],
    "geometry": ["main", "geometry"],
    "everything": ["main", "sweep", "controls", "geometry"],
}


class Arguments(argparse.Namespace):
    """What was asked for, with seeds as numbers and folders as absolute paths."""

    study: Study
    seeds: Any  # list[int], once parsed

    @property
    def words(self) -> list[str]:
        """The command line's words for the same study, for processes that make its parts.

        A worker elsewhere has for its run all that it may use.
        """
        seeds = ",".join(map(str, self.seeds))
        known = {"profile": self.profile, "data": self.data, "model": self.model, "set": self.set, "seeds": seeds}
        jobs = 1 if is_remote(self.scheduler) else self.jobs
        begun = {"begun": self.study.name} if self.study.chosen & FOLDERS.keys() else {}
        return [f"--{name}={value}" for name, value in {**known, "jobs": jobs, **begun}.items()]


def run_study(args: Arguments) -> None:
    """Execute what is out of date, then print the claims and where everything is."""
    start, root = time.perf_counter(), folders.study_folder(args.study)
    if args.action != "everything":  # which is all that the plan has
        require_groups(args.study.profile, STUDIES[args.action])
    make_study(args.study, args.seeds, STUDIES[args.action], args.words, args.jobs, args.scheduler, args.target)
    if not args.target:
        from nondecoupling.analysis.verdicts import claims_text, rows_of

        groups = STUDIES[args.action]
        families = "ABOM" + "KJ" * ("controls" in groups) + "G" * ("geometry" in groups)
        print(claims_text(rows_of(folders.read_json(root / "claims.json"), families)))
        print(f"\n{places(root)}")
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    print(f"done in {took}" + ("" if args.target else "; next: make verify, make lab"))


def run_part(args: Arguments) -> None:
    """Execute one notebook; prints its line."""
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, but seeds are 0 or more.")
    if args.run in summaries(args.study.profile):
        part = next(part for part in graph.parts_of(args.study, args.seeds, args.study.runs) if part.name == args.run)
    else:
        part = graph.run_part(args.study, args.run, args.seed)
    notebooks.quiet_environment(args.study, args.jobs)
    options = {"profile": args.profile, "data": args.data, "model": args.model, "overrides": parse_overrides(args.set)}
    start = time.perf_counter()
    try:
        notebooks.execute(args.study, part, options)
    except (RuntimeError, OSError):
        load_begun(args)  # which has the true reason where files were changed after this process had looked
        raise
    seconds = int(time.perf_counter() - start)
    # In one write, end of line included, also with PYTHONUNBUFFERED: another run may end at the same moment.
    print(f"{part.words} · {seconds // 60}:{seconds % 60:02d}\n", end="", flush=True)


def make_tables(args: Arguments) -> None:
    """Collect both experiments, and what else is finished for all seeds, into the study's tables."""
    from nondecoupling.study.results import collect, write_results

    write_results(collect(args.study, args.seeds, graph.runs_in(args.study, args.seeds, ["main"])))


def make_report(args: Arguments) -> None:
    from nondecoupling.pages.report import write_report

    path = write_report(args.study)
    if args.shown:
        print(path)


def make_book(args: Arguments) -> None:
    from nondecoupling.pages.book import build_book

    print(build_book(folders.REPOSITORY / "book"))


def list_runs(args: Arguments) -> None:
    """The study as a grid, or as commands for the runs that are not finished."""
    if args.format == "commands":
        lines = commands_of_runs(args.study, args.seeds, args.words)
    else:
        lines = graph.status_lines(args.study, args.seeds)
    print("\n".join(lines))


def verify(args: Arguments) -> None:
    from nondecoupling.workflow import reference

    reference.verify(args.study)


def make_reference(args: Arguments) -> None:
    from nondecoupling.workflow import reference

    reference.make_reference(args.study, args.seeds)


def bench(args: Arguments) -> None:
    from nondecoupling.workflow.bench import run_bench

    run_bench(args.study, args.random_weights)


def score(args: Arguments) -> None:
    notebooks.quiet_environment(args.study, args.jobs)  # before the libraries that it is for are imported
    from nondecoupling.workflow.score import write_scores

    write_scores(args.study, args.seeds)


def open_lab(args: Arguments) -> None:
    from nondecoupling.workflow.lab import open_lab

    open_lab()


def make_smollm2(args: Arguments) -> None:
    from nondecoupling.task import smollm2

    smollm2.make(Path(args.target))


def clean(args: Arguments) -> None:
    root = folders.study_folder(args.study)
    with alone(root):
        shutil.rmtree(root, ignore_errors=True)
    print(f"removed {root}")


ACTIONS: dict[str, Callable[[Arguments], None]] = {
    **dict.fromkeys(STUDIES, run_study),
    "run": run_part,
    "tables": make_tables,
    "report": make_report,
    "book": make_book,
    "list": list_runs,
    "verify": verify,
    "reference": make_reference,
    "notebooks": lambda args: notebooks.renew_committed(args.study),
    "bench": bench,
    "score": score,
    "lab": open_lab,
    "smollm2": make_smollm2,
    "clean": clean,
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a word of the command line as everything else here does: in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].lower()}{message[1:]}.")


def jobs(text: str) -> int:
    """How many runs side by side."""
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999")
    return int(text)


def parse(arguments: Sequence[str] | None) -> Arguments:
    """The command line; ValueError with one sentence about its first fault."""
    parser = Parser(prog="python -m nondecoupling.workflow", description=__doc__)
    parser.add_argument("action", help=", ".join(ACTIONS))
    parser.add_argument("--profile", default="", help="nano if not given")
    parser.add_argument("--data", default="", help="folder of CoLA's TSV files")
    parser.add_argument("--model", default="", help="folder of a causal LM")
    parser.add_argument("--set", default="", help='overrides, e.g. "rl.beta=0.25 sft.steps=100"')
    parser.add_argument("--seeds", default="", help="0-4 or 0,3,7; default: the profile's")
    parser.add_argument("--jobs", type=jobs, default=1, help="runs side by side")
    parser.add_argument("--scheduler", default="", help="a Dask cluster: local, its address, or its scheduler file")
    parser.add_argument("--format", default="grid", choices=["grid", "commands"], help="of `list`")
    parser.add_argument("--target", default="", help="one result file instead of the whole study")
    parser.add_argument("--run", default="", help="the run, or the summary, that `run` executes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begun", default="", help="the name that the study had when it began")
    parser.add_argument("--random-weights", action="store_true", help="bench the model's shape without its weights")
    parser.add_argument("--shown", action="store_true", help="print the report's path")
    args = parser.parse_args(arguments, namespace=Arguments())
    if args.action not in ACTIONS:
        raise ValueError(f"There is no action '{args.action}'{nearest(args.action, list(ACTIONS))}.")
    if is_remote(args.scheduler) and not args.profile:
        raise ValueError("A cluster is asked for a study by its name: PROFILE=nano, laptop or paper with SCHEDULER=.")
    args.profile = args.profile or "nano"
    args.study = load_begun(args)
    args.seeds = parse_seeds(args.seeds or args.study.profile.seeds)
    args.data, args.model = (str(Path(folder).resolve()) if folder else "" for folder in (args.data, args.model))
    return args


def load_begun(args: Arguments) -> Study:
    """The study that the command line describes; ValueError where what it reads is not what it read when it began."""
    study = load_study(args.profile, args.data, args.model, parse_overrides(args.set))
    if args.begun in ("", study.name):
        return study
    changed = graph.changed_inputs(folders.results_root() / args.begun, study) or "Something that it reads has changed"
    raise ValueError(
        f"{changed} since the study '{args.begun}' began, all of whose runs must read the same. Put back what was "
        f"there, and the same command goes on; leave it, and the same command begins a study of its own."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the action; prints one sentence and returns 1 when something is wrong."""
    args = None
    try:
        args = parse(arguments)
        ACTIONS[args.action](args)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args and args.action in STUDIES:  # it has something to say, its runs have not
            print(
                "\nstopped; finished runs and checkpoints are kept, the same command goes on from there",
                file=sys.stderr,
            )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
