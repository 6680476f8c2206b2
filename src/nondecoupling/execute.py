"""What the Makefile calls: the plan as make rules, and validated papermill execution of one notebook.

Every parameter is checked before a kernel starts. A notebook that fails keeps its output, error included, in
``<run>.failed.ipynb`` and leaves no result.
"""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nondecoupling import runs
from nondecoupling.profile import Study, load_study, nearest, parse_overrides, parse_seeds

NOTEBOOKS = runs.REPOSITORY / "notebooks"
SOURCES = Path(__file__).parent
NOTEBOOK_OF = {
    "data": "01_data",
    "base": "02_base",
    "sft": "03_sft",
    "rl": "04_rl",
    "theory": "06_theory",
    "claims": "07_claims",
}
SUMMARIES = ("theory", "claims")  # notebooks that read runs and write <name>.json beside them
# Sections of the profile that decide a stage's result, besides its parent.
SETTINGS_OF = {
    "data": ["data"],
    "base": ["data", "prompt", "model", "pretrain", "evaluation"],
    "sft": ["prompt", "adaptation", "sft", "evaluation"],
    "rl": ["prompt", "adaptation", "rl", "evaluation"],
    "theory": ["data"],
    "claims": ["data", "rl"],
}


def stage_of(study: Study, run: str) -> str:
    """The stage that makes ``run``; ValueError names the nearest run if the plan has none of that name."""
    return run if run in (*runs.SHARED_RUNS, *SUMMARIES) else study.run(run).stage


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


def used_modules(notebook: Path) -> list[Path]:
    """Source files of this package that ``notebook`` imports, directly or through others."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    waiting, found = imported_modules(re.sub(r"^%.*$", "", code, flags=re.MULTILINE)), set()
    while waiting:
        path = SOURCES / f"{waiting.pop()}.py"
        if path not in found:
            found.add(path)
            waiting |= imported_modules(path.read_text(encoding="utf-8"))
    return sorted(found)


def relevant_settings(study: Study, run: str) -> dict[str, Any]:
    """The part of the profile that decides the result of ``run``."""
    stage = stage_of(study, run)
    profile = study.profile if run == stage and stage not in ("sft", "rl") else study.for_run(run)
    return {section: profile.model_dump()[section] for section in SETTINGS_OF[stage]}


def prerequisites(study: Study, root: Path, run: str, seed: int, seeds: list[int]) -> list[Path]:
    """Files that the result of ``run`` is made from: notebook, modules, settings, and the runs before it."""
    notebook = NOTEBOOKS / f"{NOTEBOOK_OF[stage_of(study, run)]}.ipynb"
    files = [notebook, *used_modules(notebook), root / "settings" / f"{run}.json"]
    if run == "data" and study.profile.data.folder:
        return files + sorted(Path(study.profile.data.folder).glob("*.tsv"))
    if run == "data":
        return files
    if run == "base":
        return [*files, target_of(root, "data", 0)]
    if run == "claims":
        files.append(target_of(root, "theory", 0))
    if run in SUMMARIES:
        return files + [target_of(root, entry.name, s) for s in seeds for entry in study.profile.runs]
    return [*files, target_of(root, study.run(run).parent, seed)]


def planned_runs(study: Study, seeds: list[int]) -> list[tuple[str, int]]:
    """All (run, seed) pairs of a study in an order in which they can be executed."""
    stages = [(entry.name, seed) for seed in seeds for entry in study.profile.runs]
    return [("data", 0), ("base", 0), *stages, ("theory", 0), ("claims", 0)]


def write_rules(study: Study, seeds: list[int], command: str) -> Path:
    """Write the study's make rules (and the settings they depend on) to its folder; returns the rules' file."""
    root = runs.study_folder(study)
    (root / "settings").mkdir(parents=True, exist_ok=True)
    lines = [f"study: {target_of(root, 'claims', 0)}"]
    for run, seed in planned_runs(study, seeds):
        settings = root / "settings" / f"{run}.json"
        content = relevant_settings(study, run) | ({"seeds": seeds} if run in SUMMARIES else {})
        if not settings.exists() or runs.read_json(settings) != content:
            runs.write_json(settings, content)
        files = " ".join(str(path) for path in prerequisites(study, root, run, seed, seeds))
        lines += ["", f"{target_of(root, run, seed)}: {files}", f"\t@{command} --run {run} --seed {seed}"]
    rules = root / "plan.mk"
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
    root = runs.study_folder(study)
    notebook = NOTEBOOKS / f"{NOTEBOOK_OF[stage_of(study, run)]}.ipynb"
    parameters = dict(options)
    if run in SUMMARIES:
        parameters["seeds"] = seeds
    elif run not in runs.SHARED_RUNS:
        parameters |= {"run": run, "seed": seed}
    check_parameters(notebook, parameters)

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
            extra_arguments=["--log-level=ERROR"],  # the kernel warns about TCP on every start
        )
    except PapermillExecutionError as error:
        os.replace(working, failed)
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
        raise RuntimeError(f"{notebook.name} failed: {error.ename}: {error.evalue}\n  see {failed}") from None
    failed.unlink(missing_ok=True)
    os.replace(working, root / f"{run}.ipynb" if run in SUMMARIES else folder / "notebook.ipynb")
    return target_of(root, run, seed)


def quiet_environment(threads: int) -> None:
    """Environment of the kernels: no progress bars in captured output, a fixed number of threads."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }


def status_lines(study: Study, seeds: list[int]) -> list[str]:
    """One line per planned run: its state, and its folder or file."""
    root, lines = runs.study_folder(study), []
    for run, seed in planned_runs(study, seeds):
        target = target_of(root, run, seed)
        base = target if run in SUMMARIES else target.parent
        states = {
            "complete": target.exists(),
            "failed": base.with_name(f"{base.stem}.failed.ipynb").exists(),
            "interrupted": base.with_name(f"{base.stem}.partial").exists(),
        }
        state = next((name for name, holds in states.items() if holds), "missing")
        who = run if run in (*runs.SHARED_RUNS, *SUMMARIES) else f"seed {seed} · {run}"
        lines.append(f"{state:<12}{who:<18}{base}")
    return lines


def command_rules(study: Study, args: argparse.Namespace) -> None:
    print(write_rules(study, parse_seeds(args.seeds or study.profile.seeds), args.command))


def command_run(study: Study, args: argparse.Namespace) -> None:
    seeds = args.seeds or study.profile.seeds
    parse_seeds(seeds)
    who = args.run if args.run in (*runs.SHARED_RUNS, *SUMMARIES) else f"seed {args.seed} · {args.run}"
    options = {"profile": args.profile, "data": args.data, "model": args.model, "overrides": parse_overrides(args.set)}
    quiet_environment(args.threads)
    start = time.perf_counter()
    execute(study, args.run, args.seed, seeds, options)
    print(f"{study.name} · {who} · {time.perf_counter() - start:.0f} s", flush=True)


def command_list(study: Study, args: argparse.Namespace) -> None:
    print("\n".join(status_lines(study, parse_seeds(args.seeds or study.profile.seeds))))


def main(arguments: list[str] | None = None) -> int:
    """Command line of the Makefile; prints one sentence and returns 1 when something is wrong."""
    commands: dict[str, Callable[[Study, argparse.Namespace], None]] = {
        "rules": command_rules,
        "run": command_run,
        "list": command_list,
    }
    parser = argparse.ArgumentParser(prog="python -m nondecoupling.execute", description=__doc__)
    parser.add_argument("action", choices=commands)
    parser.add_argument("--profile", default="nano")
    parser.add_argument("--data", default="", help="folder of CoLA's TSV files")
    parser.add_argument("--model", default="", help="folder of a causal LM")
    parser.add_argument("--set", default="", help='overrides, e.g. "rl.beta=0.25 sft.steps=100"')
    parser.add_argument("--seeds", default="", help="0-4 or 0,3,7; default: the profile's")
    parser.add_argument("--run", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--command", default="", help="what the rules call for each run")
    args = parser.parse_args(arguments)
    try:
        commands[args.action](load_study(args.profile, args.data, args.model, parse_overrides(args.set)), args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
