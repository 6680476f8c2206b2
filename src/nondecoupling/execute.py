"""What the Makefile calls: the plan as make rules, and validated papermill execution of one notebook.

Every parameter is checked before a kernel starts. A notebook that fails keeps its output, error included, in
``<run>.failed.ipynb`` and leaves no result.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nondecoupling import cluster, hub, runs
from nondecoupling.profile import Study, load_study, nearest, parse_overrides, parse_seeds

NOTEBOOKS = runs.REPOSITORY / "notebooks"
SOURCES = Path(__file__).parent
NOTEBOOK_OF = {
    "data": "01_data",
    "base": "02_base",
    "sft": "03_sft",
    "reward": "04_proxy",
    "rl": "04_rl",
    "joint": "05_joint",
    "theory": "06_theory",
    "controls": "06_controls",
    "claims": "07_claims",
}
MEMORY_ADVICE = "use JOBS=1, or lower sft.rows_per_pass, rl.rows_per_pass or evaluation.batch_size (SET=...)"
REPORT_FILES = [SOURCES / "report.py", *sorted((SOURCES / "templates").iterdir())]
RULES = "plan.mk"
TO_EXECUTE = "NONDECOUPLING_TO_EXECUTE"  # environment variable by which a study tells its runs how many they are
QUIET_KERNEL = ["--log-level=CRITICAL"]  # else every kernel prints a warning about TCP
GROUPS = ("main", "sweep", "controls")  # of the plan; make reproduce, make theory and make study add them up
# Notebooks that read the runs of some groups and write <name>.json beside them, in the order in which they run.
READS = {"theory": ("main", "sweep"), "controls": ("main", "controls"), "claims": ("main",)}
SUMMARIES = tuple(READS)
# Sections of the profile that decide a stage's result, besides its parent.
SETTINGS_OF = {
    "data": ["data"],
    "base": ["data", "prompt", "model", "pretrain", "evaluation"],
    "sft": ["data", "prompt", "model", "adaptation", "sft", "evaluation"],
    "reward": ["data", "prompt", "model", "adaptation", "reward", "evaluation"],
    "rl": ["data", "prompt", "model", "adaptation", "rl", "evaluation"],
    "joint": ["data", "prompt", "model", "adaptation", "rl", "joint", "evaluation"],
    "theory": ["data", "rl"],
    "controls": ["data", "sft", "rl"],
    "claims": ["data", "rl"],
}


def stage_of(study: Study, run: str) -> str:
    """The stage that makes ``run``; ValueError names the nearest run if the plan has none of that name."""
    return run if run in ("data", "base", *SUMMARIES) else study.run(run).stage


def label_of(run: str, seed: int) -> str:
    """What a run is called in printed lines; those that stand once per study have no seed."""
    return run if run in (*runs.SHARED_RUNS, *SUMMARIES) else f"seed {seed} · {run}"


def target_of(root: Path, run: str, seed: int) -> Path:
    """The file that exists when ``run`` is finished."""
    return root / f"{run}.json" if run in SUMMARIES else runs.run_folder(root, run, seed) / runs.METRICS


def imported_modules(code: str) -> set[str]:
    """Names of this package's modules that ``code`` imports."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "nondecoupling":
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nondecoupling."):
            modules.add(str(node.module).removeprefix("nondecoupling."))
    return modules


def code_of(notebook: Path) -> str:
    """The code of ``notebook``: what decides its results, unlike its prose and the outputs it is committed with."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@functools.cache
def used_modules(notebook: Path) -> list[Path]:
    """Source files of this package that ``notebook`` imports, directly or through others."""
    waiting, found = imported_modules(re.sub(r"^%.*$", "", code_of(notebook), flags=re.MULTILINE)), set()
    while waiting:
        path = SOURCES / f"{waiting.pop()}.py"
        if path not in found:
            found.add(path)
            waiting |= imported_modules(path.read_text(encoding="utf-8"))
    return sorted(found)


def notebook_of(study: Study, run: str) -> Path:
    """The notebook that makes ``run``."""
    return NOTEBOOKS / f"{NOTEBOOK_OF[stage_of(study, run)]}.ipynb"


@functools.cache
def code_hashes(notebook: Path) -> dict[str, str]:
    """sha256 of the code that makes a run, by file name: that of ``notebook`` and of the modules it uses.

    Contents, because times say too much: git gives every file that it checks out a new one.
    """
    texts = {notebook.name: code_of(notebook)}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in used_modules(notebook)}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def relevant_settings(study: Study, run: str) -> dict[str, Any]:
    """The part of the profile that decides the result of ``run``."""
    stage = stage_of(study, run)
    profile = study.profile if run in SUMMARIES else study.for_run(run)
    return {section: profile.model_dump()[section] for section in SETTINGS_OF[stage]}


def prerequisites(study: Study, root: Path, run: str, seed: int, plan: list[tuple[str, int]]) -> list[Path]:
    """Files that the result of ``run`` is made from: its settings and code, the user's data, and the runs before it."""
    files = [root / "settings" / f"{run}.json"]
    if run == "data" and study.profile.data.folder:
        return files + sorted(Path(study.profile.data.folder).glob("*.tsv"))
    if run == "data":
        return files
    if stage_of(study, run) == "base":
        return [*files, target_of(root, "data", 0)]
    if run in SUMMARIES:
        before = [entry.name for group in READS[run] for entry in study.runs_of(group)]
        before += ["theory", "controls"] if run == "claims" else []
        return files + [target_of(root, *entry) for entry in plan if entry[0] in before]
    before = [name for name in (study.run(run).parent, study.run(run).proxy) if name]
    return files + [target_of(root, name, seed) for name in before]


def planned_runs(study: Study, seeds: list[int], groups: Collection[str]) -> list[tuple[str, int]]:
    """All (run, seed) pairs of a study's ``groups`` in an order in which they can be executed."""
    entries = [entry for entry in study.profile.runs if entry.group in groups]
    shared = [(entry.name, 0) for entry in entries if entry.name in runs.SHARED_RUNS]
    stages = [(entry.name, seed) for seed in seeds for entry in entries if entry.name not in runs.SHARED_RUNS]
    controls = [("controls", 0)] if any(entry.group == "controls" for entry in entries) else []
    return [("data", 0), ("base", 0), *shared, *stages, ("theory", 0), *controls, ("claims", 0)]


def finished_groups(study: Study, seeds: list[int]) -> list[str]:
    """The groups of the plan of which all runs of ``seeds`` are finished."""
    root = runs.study_folder(study)
    return [group for group in GROUPS if study.runs_of(group) and not runs.missing_runs(root, study, seeds, group)]


def write_rules(study: Study, plan: list[tuple[str, int]], seeds_text: str, args: argparse.Namespace) -> Path:
    """Write make rules for ``plan``, and what they depend on, to the study's folder; returns their file.

    A run's settings file, which holds what its code is, too, is rewritten only where that changes what it says.
    """
    root, seeds = runs.study_folder(study), parse_seeds(seeds_text)
    (root / "settings").mkdir(parents=True, exist_ok=True)
    command = shlex.join(
        [sys.executable, "-m", "nondecoupling.execute", "{action}", "--profile", args.profile, "--data", args.data]
        + ["--model", args.model, "--set", args.set, "--seeds", seeds_text, "--jobs", str(args.jobs)]
    ).replace("$", "$$")
    report, claims = root / "report.html", target_of(root, "claims", 0)
    lines = [
        f"study: {report}",
        "",
        f"{report}: {claims} {' '.join(str(path) for path in REPORT_FILES)}",
        "\t@" + command.replace("{action}", "report") + " > /dev/null",
    ]
    for run, seed in plan:
        settings = root / "settings" / f"{run}.json"
        content = relevant_settings(study, run) | {"code": code_hashes(notebook_of(study, run))}
        content |= {"seeds": seeds} if run in SUMMARIES else {}
        if not settings.exists() or runs.read_json(settings) != content:
            runs.write_json(settings, content)
        files = " ".join(str(path) for path in prerequisites(study, root, run, seed, plan))
        recipe = f"\t@{command.replace('{action}', 'run')} --run {run} --seed {seed}"
        lines += ["", f"{target_of(root, run, seed)}: {files}", recipe]
    rules = root / RULES
    rules.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rules


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse parameters that ``notebook`` does not have or that are of another type than its default."""
    from papermill import inspect_notebook

    declared = inspect_notebook(str(notebook))
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(f"{notebook.name} has no parameter '{name}'{nearest(name, list(declared))}.")
        kind = declared[name]["inferred_type_name"].partition("[")[0]
        if kind not in ("None", type(value).__name__):
            raise ValueError(f"{notebook.name}: parameter '{name}' is {value!r}, but must be of type {kind}.")


def execute(study: Study, run: str, seed: int, seeds: str, options: dict[str, Any]) -> Path:
    """Execute the notebook of ``run`` and return the file that now exists.

    Raises ValueError before a kernel starts for bad parameters, RuntimeError naming the kept notebook if a cell fails.
    """
    root, notebook = runs.study_folder(study), notebook_of(study, run)
    parameters = dict(options)
    if run in SUMMARIES:
        parameters["seeds"] = seeds
    elif run not in runs.SHARED_RUNS:
        parameters |= {"run": run, "seed": seed}
    elif run != "data":
        parameters["run"] = run
    # Without it papermill's validator starts two seconds sooner, and no field of a notebook is an IRI to be checked.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    check_parameters(notebook, parameters)

    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    folder = root / run if run in SUMMARIES else runs.run_folder(root, run, seed)
    working, failed = (folder.with_name(f"{folder.name}.{end}.ipynb") for end in ("partial", "failed"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        execute_notebook(
            str(notebook),
            str(working),
            parameters,
            kernel_name="python3",
            progress_bar=False,
            cwd=str(NOTEBOOKS),
            extra_arguments=QUIET_KERNEL,
        )
    except (PapermillExecutionError, DeadKernelError) as error:
        os.replace(working, failed)
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
        reason = (
            f"{error.ename}: {error.evalue}"
            if isinstance(error, PapermillExecutionError)
            else f"its kernel died, most likely for want of memory; {MEMORY_ADVICE}"
        )
        raise RuntimeError(f"{notebook.name} failed: {reason}\n  see {failed}") from None
    failed.unlink(missing_ok=True)
    os.replace(working, root / f"{run}.ipynb" if run in SUMMARIES else folder / "notebook.ipynb")
    return target_of(root, run, seed)


def quiet_environment(study: Study, jobs: int) -> None:
    """Environment of the kernels: no progress bars in captured output, and a fixed number of threads each.

    The embedded model is too small for more than one; others share the cores among ``jobs`` runs. Two runs side by side
    that each start a thread per core slow each other down tenfold.
    """
    os.environ |= {
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1" if study.profile.pretrains else str(max(1, (os.cpu_count() or 1) // jobs)),
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled here, and importing the compiler takes a second
    }


def status_lines(study: Study, seeds: list[int]) -> list[str]:
    """One line per planned run: its state, and its folder or file."""
    root, lines = runs.study_folder(study), []
    for run, seed in planned_runs(study, seeds, GROUPS):
        target = target_of(root, run, seed)
        base = target.with_suffix("") if run in SUMMARIES else target.parent
        states = {
            "complete": target.exists(),
            "failed": base.with_name(f"{base.name}.failed.ipynb").exists(),
            "interrupted": base.with_name(f"{base.name}.partial").exists(),
        }
        state = next((name for name, holds in states.items() if holds), "missing")
        lines.append(f"{state:<12} {label_of(run, seed):<26} {base}")
    return lines


def command_reproduce(study: Study, args: argparse.Namespace) -> None:
    make_study(study, args, ["main"])


def command_theory(study: Study, args: argparse.Namespace) -> None:
    make_study(study, args, ["main", "sweep"])


def command_study(study: Study, args: argparse.Namespace) -> None:
    make_study(study, args, ["main", "controls"])


def fetch_inputs(study: Study) -> None:
    """Download what the study needs from the hub, before a kernel starts; ConnectionError where that is impossible."""
    profile, root = study.profile, runs.study_folder(study)
    if profile.data.source == "hub" and not profile.data.folder and not runs.is_complete(root / "data"):
        hub.fetch_glue()
    if profile.model.hub and not profile.model.folder:
        hub.fetch_model(profile.model.hub, str(profile.model.revision))


def make_study(study: Study, args: argparse.Namespace, groups: list[str]) -> None:
    """Let make, or Dask, execute what make finds missing of the study, then print its claims."""
    start, seeds_text, root = time.perf_counter(), args.seeds or study.profile.seeds, runs.study_folder(study)
    seeds = parse_seeds(seeds_text)
    # What is finished stays part of the study, so that make reproduce after make theory executes nothing.
    plan = planned_runs(study, seeds, [*groups, *finished_groups(study, seeds)])
    rules = write_rules(study, plan, seeds_text, args)
    fetch_inputs(study)
    goal = str(Path(args.target).resolve()) if args.target else "study"
    command = ["make", "--no-print-directory", f"-j{args.jobs}", "-f", str(rules), goal]
    recipes = subprocess.run([*command, "--dry-run"], check=False, capture_output=True, text=True).stdout
    to_execute = recipes.count(" --run ")
    how = f"by {args.scheduler}" if "://" in args.scheduler else f"{args.jobs} at a time"
    print(f"study '{study.name}': {to_execute} of {len(plan)} notebooks to execute, {how}", flush=True)
    environment = os.environ | {TO_EXECUTE: str(to_execute)}
    tasks = cluster.tasks_of(rules, recipes) if args.scheduler else []
    if tasks:
        cluster.execute_tasks(args.scheduler, args.jobs, rules, tasks, shared_code(), environment)
    elif subprocess.run(command, check=False, env=environment).returncode:
        raise RuntimeError(
            "the study is not complete; what is finished is kept, and make goes on from there next time."
        )
    if not args.target:
        print_claims(root)
    print(f"{time.perf_counter() - start:.0f} s")


def shared_code() -> list[Path]:
    """Files of this checkout that decide what a run does, on whatever machine."""
    sources = [*SOURCES.glob("*.py"), *SOURCES.glob("profiles/*.yaml"), *NOTEBOOKS.glob("*.ipynb")]
    return [runs.REPOSITORY / "requirements.lock", *sorted(sources)]


def print_claims(root: Path) -> None:
    """Print the claims table and where everything is."""
    from nondecoupling.claims import claims_table

    rows = [row for row in runs.read_json(root / "claims.json") if not row["id"].startswith("T")]
    print(claims_table(rows).drop(columns=["p, Holm"]).to_string(index=False))
    print(f"\nreport:  {root / 'report.html'}\nfigures: {root / 'figures'}\nclaims:  {root / 'claims.json'}")


def command_run(study: Study, args: argparse.Namespace) -> None:
    seeds = args.seeds or study.profile.seeds
    parse_seeds(seeds)
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, but seeds are 0 or more.")
    folders = {
        name: str(Path(value).resolve()) if value else ""
        for name, value in (("data", args.data), ("model", args.model))
    }
    quiet_environment(study, args.jobs)
    start = time.perf_counter()
    execute(
        study, args.run, args.seed, seeds, {"profile": args.profile, "overrides": parse_overrides(args.set), **folders}
    )
    print(progress(study, args.run, args.seed, time.perf_counter() - start), flush=True)


def progress(study: Study, run: str, seed: int, seconds: float) -> str:
    """The line of a finished run; inside a study with how many of its notebooks are done, e.g. [7/24] ... 29 % done."""
    line = f"{label_of(run, seed)} · {int(seconds) // 60}:{int(seconds) % 60:02d}"
    to_execute, rules = int(os.environ.get(TO_EXECUTE, 0)), runs.study_folder(study) / RULES
    if not to_execute:
        return line
    targets = [line.partition(": ")[0] for line in rules.read_text(encoding="utf-8").splitlines() if ".json: " in line]
    fresh = [path for path in map(Path, targets) if path.exists() and path.stat().st_mtime > rules.stat().st_mtime]
    return f"[{len(fresh)}/{to_execute}] {line} · {100 * len(fresh) // to_execute} % done"


def command_list(study: Study, args: argparse.Namespace) -> None:
    print("\n".join(status_lines(study, parse_seeds(args.seeds or study.profile.seeds))))


def command_report(study: Study, args: argparse.Namespace) -> None:
    from nondecoupling.report import write_report

    print(write_report(study))


def command_verify(study: Study, args: argparse.Namespace) -> None:
    from nondecoupling.claims import compare_claims

    seeds = parse_seeds(args.seeds or study.profile.seeds)
    fresh, reference = runs.study_folder(study) / "claims.json", reference_claims(study, seeds)
    if not reference.exists():  # other seeds must give the same verdicts, too
        reference = reference.with_name("claims.json")
    for path in (fresh, reference):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; there is nothing to compare.")
    table = compare_claims(runs.read_json(fresh), runs.read_json(reference))
    print("A row passes if the verdicts agree and the 95 % intervals overlap.\n" + table.to_string(index=False))
    failed = int((table["result"] == "FAIL").sum())
    if failed:
        raise RuntimeError(f"{failed} of {len(table)} claims differ from the reference.")


def reference_claims(study: Study, seeds: list[int]) -> Path:
    """The committed claims of ``study``: claims.json for the profile's own seeds, a file beside it for others."""
    own = seeds == parse_seeds(study.profile.seeds)
    return runs.reference_folder(study) / ("claims.json" if own else f"claims-{len(seeds)}-seeds.json")


def command_notebooks(study: Study, args: argparse.Namespace) -> None:
    """Re-execute the committed notebooks in place at their default parameters, in a results folder of their own."""
    import nbformat
    from nbclient import NotebookClient

    quiet_environment(study, jobs=1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NONDECOUPLING_RESULTS"] = folder
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            start = time.perf_counter()
            notebook = nbformat.read(path, as_version=4)
            notebook.metadata.pop("widgets", None)  # of the last execution; explore's come anew
            place = {"metadata": {"path": str(NOTEBOOKS)}}
            NotebookClient(notebook, kernel_name="python3", resources=place, extra_arguments=QUIET_KERNEL).execute()
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times of day, which would make every diff long
            nbformat.write(notebook, path)
            print(f"{path.name} · {time.perf_counter() - start:.0f} s", flush=True)


def command_reference(study: Study, args: argparse.Namespace) -> None:
    """Make the finished study the committed reference: small files only, and never a sentence of real data.

    Of seeds that are not the profile's own only the claims are kept, beside the reference that is there.
    """
    import pandas as pd

    seeds = parse_seeds(args.seeds or study.profile.seeds)
    root, reference = runs.study_folder(study), runs.reference_folder(study)
    if runs.missing_runs(root, study, seeds):
        raise RuntimeError(f"{root} is not complete; finish the study first (make reproduce).")
    found = runs.read_json(root / "claims.json")[0]["seeds"]
    if found != len(seeds):
        raise RuntimeError(
            f"{root / 'claims.json'} is of {found} seeds, not of {len(seeds)}; run make reproduce with those first."
        )
    kept_claims = reference_claims(study, seeds)
    if kept_claims.name != "claims.json":
        shutil.copy(root / "claims.json", kept_claims)
        update_readme(study, parse_seeds(study.profile.seeds))
        return
    shutil.rmtree(reference, ignore_errors=True)
    real = not study.profile.data.generated
    for run, seed in planned_runs(study, seeds, finished_groups(study, seeds)):
        if run in SUMMARIES:
            shutil.copy(root / f"{run}.json", reference)
            continue
        source, copy = (runs.run_folder(folder, run, seed) for folder in (root, reference))
        copy.mkdir(parents=True)
        runs.write_json(copy / runs.METRICS, without_paths(runs.read_json(source / runs.METRICS)))
        if (source / runs.TRAJECTORY).exists():
            shutil.copy(source / runs.TRAJECTORY, copy / runs.TRAJECTORY)
        if run != "data":  # the reward model's are scores
            predictions = runs.read_predictions(source)
            kept = predictions.assign(sentence="") if real else predictions
            pd.DataFrame(kept).to_parquet(copy / runs.predictions_file("dev"))
        elif not real:
            shutil.copy(source / "in_domain_dev.tsv", copy / "in_domain_dev.tsv")
    shutil.copytree(root / "figures", reference / "figures")
    update_readme(study, seeds)


def without_paths(content: Any) -> Any:
    """``content`` of a metrics.json with the user's folders by name only: where they stand is nobody's business."""
    if not isinstance(content, dict):
        return content
    kept = {key: without_paths(value) for key, value in content.items()}
    return kept | ({"folder": Path(kept["folder"]).name} if kept.get("folder") else {})


def update_readme(study: Study, seeds: list[int]) -> None:
    """Write the tables of the committed reference between the README's markers for ``study``, if it has them."""
    from nondecoupling.claims import readme_claims, readme_controls, readme_tables

    reference = runs.reference_folder(study)
    rows, sweep = runs.read_json(reference / "claims.json"), runs.read_json(reference / "theory.json")["sweep"]
    parts = {study.name: readme_tables(rows, runs.read_metrics(reference, study, seeds), sweep)}
    if not runs.missing_runs(reference, study, seeds, "controls"):
        controls = runs.read_metrics(reference, study, seeds, group="controls")
        parts[f"{study.name}, controls"] = readme_controls(rows, controls)
    for path in reference.glob("claims-*.json"):
        name = f"{study.name}, {path.stem.removeprefix('claims-').replace('-', ' ')}"
        parts[name] = readme_claims(runs.read_json(path))
    for name, tables in parts.items():
        begin, end = f"<!-- {name}: generated by make reference -->", f"<!-- {name}: end -->"
        runs.write_between(runs.REPOSITORY / "README.md", begin, end, tables)


def command_clean(study: Study, args: argparse.Namespace) -> None:
    shutil.rmtree(runs.study_folder(study), ignore_errors=True)
    print(f"removed {runs.study_folder(study)}")


def main(arguments: list[str] | None = None) -> int:
    """Command line of the Makefile; prints one sentence and returns 1 when something is wrong."""
    commands: dict[str, Callable[[Study, argparse.Namespace], None]] = {
        "reproduce": command_reproduce,
        "theory": command_theory,
        "study": command_study,
        "run": command_run,
        "list": command_list,
        "report": command_report,
        "verify": command_verify,
        "notebooks": command_notebooks,
        "reference": command_reference,
        "clean": command_clean,
    }
    parser = argparse.ArgumentParser(prog="python -m nondecoupling.execute", description=__doc__)
    parser.add_argument("action", choices=commands)
    parser.add_argument("--profile", default="nano")
    parser.add_argument("--data", default="", help="folder of CoLA's TSV files")
    parser.add_argument("--model", default="", help="folder of a causal LM")
    parser.add_argument("--set", default="", help='overrides, e.g. "rl.beta=0.25 sft.steps=100"')
    parser.add_argument("--seeds", default="", help="0-4 or 0,3,7; default: the profile's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--scheduler", default="", help="Dask instead of make: local, or a scheduler's address")
    parser.add_argument("--target", default="", help="one result file instead of the whole study")
    parser.add_argument("--run", default="")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        commands[args.action](load_study(args.profile, args.data, args.model, parse_overrides(args.set)), args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args.action != "run":  # the study speaks for its runs
            print(
                "\nstopped; finished runs and checkpoints are kept, the same command goes on from there",
                file=sys.stderr,
            )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
