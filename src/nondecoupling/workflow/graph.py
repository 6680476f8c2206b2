"""What make has to know of a study: its parts, what each is made from, and which are out of date.

Every target is a file in the study's folder, named relative to it, so that no path of a user is ever part of a rule.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nondecoupling.study import folders
from nondecoupling.study.fingerprint import PACKAGE, code_hashes, fingerprint, kind_of, notebook_of
from nondecoupling.study.plan import MAKES, SUMMARIES, Run, summaries
from nondecoupling.study.study import Study, inputs_of

TABLES, REPORT = "tables", "report"  # parts that no notebook makes
INPUTS = "settings/inputs.json"  # what a study reads from folders of the user's: a digest of each file
# Code that makes them; paths of the package.
CODE_OF = {
    TABLES: ["study/results.py", "study/contracts.py"],
    REPORT: [
        "pages/report.py",
        "pages/templates",
        "analysis/tables.py",
        "analysis/figures.py",
        "analysis/statistics.py",
        "analysis/wording.py",
    ],
}


class Part(NamedTuple):
    """A run of one seed, or what is made of all: its target, the targets it needs, and those it only comes after."""

    name: str
    seed: int | None
    target: str
    needs: list[str]
    after: list[str]

    @property
    def settings(self) -> str:
        """The file that changes when the part's settings or code do."""
        return f"settings/{self.name}.json"

    @property
    def notebook(self) -> str | None:
        """The executed notebook that make leaves beside the target; None of what no notebook makes."""
        if self.name in (TABLES, REPORT):
            return None
        return f"{self.name}.ipynb" if self.name in SUMMARIES else f"{self.place}/{folders.NOTEBOOK}"

    @property
    def words(self) -> str:
        """What the part is called in printed lines."""
        return self.name if self.seed is None else f"seed {self.seed} · {self.name}"

    @property
    def place(self) -> str:
        """The path that names its notebook, its partial and its failed attempt."""
        return self.target.removesuffix(f"/{folders.METRICS}").removesuffix(".json")


def run_part(study: Study, name: str, seed: int) -> Part:
    """The part that is one run."""
    run = study.run(name)
    targets = [
        (folders.run_folder(Path(), study.run(which), seed) / folders.METRICS).as_posix()
        for which in (name, *run.parents)
    ]
    return Part(name, None if run.once else seed, targets[0], targets[1:], [])


def parts_of(study: Study, seeds: list[int], runs: Sequence[Run]) -> list[Part]:
    """The parts that are ``runs``, parents before children, and what is made of all of them, each after what it needs.

    Controls are judged as far as they were run, geometry when all of its runs are there.
    """
    by_run = {
        run.name: [run_part(study, run.name, seed) for seed in (seeds[:1] if run.once else seeds)] for run in runs
    }
    readable = {"controls": any(run.group == "controls" for run in runs)}
    readable["geometry"] = {run.name for run in study.runs_of("geometry")} <= by_run.keys()
    once = [part for of_run in by_run.values() for part in of_run if part.seed is None]
    each = [part for seed in seeds for of_run in by_run.values() for part in of_run if part.seed == seed]
    executed = [*once, *each]
    tables = Part(TABLES, None, folders.PROVENANCE, [part.target for part in executed], [])
    parts = [*executed, tables]
    for name, read in summaries(study.profile).items():
        if readable.get(name, True):
            read_runs = {run.name for run in study.runs_of(*read)}
            needs = [part.target for part in executed if part.name in read_runs]  # a seed after the other, as make goes
            if name == "claims":
                needs += [part.target for part in parts if part.name in SUMMARIES]
            parts.append(Part(name, None, f"{name}.json", needs, [tables.target]))
    return [*parts, Part(REPORT, None, "report.html", ["claims.json"], [])]


def settings_of_parts(study: Study, parts: list[Part], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """What decides each part besides what it needs: settings and code, and for what is made of all runs which they are.

    By the part's name. Each notebook is read once.
    """
    names = dict.fromkeys(part.name for part in parts)
    kinds = {name: kind_of(study, name) for name in names if name not in CODE_OF}
    code = {kind: code_hashes(notebook_of(kind)) for kind in set(kinds.values())}
    of_tables = {path: hashed(PACKAGE / path) for path in CODE_OF[TABLES]}
    runs = [name for name in names if name not in CODE_OF and name not in SUMMARIES]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in CODE_OF:
            own = {path: hashed(PACKAGE / path) for path in CODE_OF[name]}
            found[name] = {"code": own, "seeds": seeds, "runs": runs}
        elif name in SUMMARIES:
            found[name] = fingerprint(study, name, code[kinds[name]] | of_tables) | {"seeds": seeds}
        else:
            found[name] = fingerprint(study, name, code[kinds[name]])
    return found


def hashed(path: Path) -> str:
    """The sha256 of a file, or of all files in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256("".join(map(folders.sha256, files)).encode()).hexdigest()


def renewed_settings(root: Path, parts: list[Part], settings: dict[str, dict[str, Any]]) -> set[str]:
    """Names of the parts whose settings file says something else than ``settings``, or is damaged or not there."""

    def said(path: Path) -> Any:
        try:
            return folders.read_json(path)
        except (FileNotFoundError, ValueError):
            return None

    return {part.name for part in parts if said(root / part.settings) != settings[part.name]}


def run_by_hand(root: Path, parts: list[Part]) -> list[Part]:
    """The parts whose result make did not execute: nobody knows which cells, or which code, it is of.

    What make executes has its notebook beside it, which of a summary is written last.
    """

    def by_hand(part: Part) -> bool:
        if part.notebook is None or not (root / part.target).exists():
            return False
        made, notebook = root / part.target, root / part.notebook
        older = part.name in SUMMARIES and notebook.exists() and notebook.stat().st_mtime_ns < made.stat().st_mtime_ns
        return older or not notebook.exists()

    return list(filter(by_hand, parts))


def beside_other_parents(study: Study, root: Path, parts: list[Part]) -> list[Part]:
    """The finished runs that were made from another parent than the one that is there now."""
    finished = [
        part for part in parts if (root / part.target).name == folders.METRICS and (root / part.target).exists()
    ]
    return [
        part
        for part in finished
        if folders.read_json(root / part.target).get("parents")
        != folders.parent_hashes(study, root, study.run(part.name), part.seed or 0)
    ]


def made_otherwise(study: Study, root: Path, parts: list[Part]) -> list[Part]:
    """What make would make otherwise than it is: runs beside another parent than theirs, and what was run by hand."""
    return [*beside_other_parents(study, root, parts), *run_by_hand(root, parts)]


def write_settings(study: Study, parts: list[Part], seeds: list[int]) -> None:
    """Write each part's settings file where that changes what it says; age what is `made_otherwise`.

    What the study reads from folders of the user's is written down, too.
    """
    root, settings = folders.study_folder(study), settings_of_parts(study, parts, seeds)
    (root / "settings").mkdir(parents=True, exist_ok=True)
    if inputs := inputs_of(study.profile):
        folders.write_json(root / INPUTS, inputs)
    renewed = renewed_settings(root, parts, settings)
    for part in parts:
        if part.name in renewed:
            folders.write_json(root / part.settings, settings[part.name])
            renewed.remove(part.name)  # one file serves all seeds
    for part in made_otherwise(study, root, parts):
        os.utime(root / part.target, (0, 0))  # older than anything, so that make makes it again


def changed_inputs(root: Path, study: Study) -> str:
    """The files that the study in ``root`` read and ``study`` would read otherwise, as a sentence's subject and verb.

    Empty if there are none.
    """
    try:
        before = dict(folders.read_json(root / INPUTS))
    except (FileNotFoundError, TypeError, ValueError):
        return ""
    after = inputs_of(study.profile)
    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    if not changed:
        return ""
    what = "is gone" if changed[0] not in after else "is new" if changed[0] not in before else "has changed"
    return f"{changed[0]} {what}" if len(changed) == 1 else f"{' and '.join(changed)} have changed"


def earlier_studies(study: Study) -> dict[str, str]:
    """Studies of the same settings whose input files were others: what has changed since, by the study's name."""
    root = folders.study_folder(study)
    named = [path for path in sorted(root.parent.glob(f"{root.name.rpartition('-')[0]}-??????")) if path != root]
    return {path.name: changed for path in named if (changed := changed_inputs(path, study))}


def stale_parts(root: Path, parts: list[Part], renewed: Collection[str] = ()) -> list[Part]:
    """The parts that make would make, by its own rule: missing, or older than something that they need.

    So are those whose names are ``renewed``, and what needs them.
    """
    stale: dict[str, Part] = {}
    for part in parts:
        needed, made = [part.settings, *part.needs], root / part.target
        if (
            part.name in renewed
            or not made.exists()
            or any(name in stale for name in needed)
            or any((root / name).stat().st_mtime_ns > made.stat().st_mtime_ns for name in needed)
        ):
            stale[part.target] = part
    return list(stale.values())


def runs_in(study: Study, seeds: list[int], groups: Collection[str]) -> list[Run]:
    """The runs of some groups of the plan, and of the others those that make has finished for all ``seeds``."""
    root, found = folders.study_folder(study), {run.name for run in study.runs_of(*groups)}
    for run in study.runs:
        parts = [run_part(study, run.name, seed) for seed in seeds]
        finished = all(folders.is_complete(root / part.place) for part in parts) and not run_by_hand(root, parts)
        if run.name not in found and found.issuperset(run.parents) and finished:
            found.add(run.name)
    return [run for run in study.runs if run.name in found]


def state_of(root: Path, part: Part, stale: Collection[str]) -> str:
    """How far a part is, as a mark: ✓ finished, ~ out of date, ✗ failed, … interrupted, · not begun."""
    place = root / part.place
    if (root / part.target).exists():
        return "~" if part.target in stale else "✓"
    if place.with_name(f"{place.name}.failed.ipynb").exists():
        return "✗"
    begun = [place.with_name(f"{place.name}.{ending}") for ending in ("partial", "checkpoints")]
    return "…" if any(path.exists() for path in begun) else "·"


def status_lines(study: Study, seeds: list[int]) -> list[str]:
    """The study's runs and seeds as a grid, and for each group what is missing and what makes it."""
    root = folders.study_folder(study)
    parts = [run_part(study, run.name, seed) for run in study.runs for seed in (seeds[:1] if run.once else seeds)]
    renewed = renewed_settings(root, parts, settings_of_parts(study, parts, seeds))
    others = made_otherwise(study, root, parts)
    stale = {part.target for part in [*others, *stale_parts(root, parts, renewed)]}
    width = max(len(run.name) for run in study.runs)
    heads = [str(seed).rjust(len(str(seeds[-1]))) for seed in seeds]  # a digit a line, so that many seeds fit
    lines = [f"{'':{width}} " + "".join(f" {head[place]}" for head in heads) for place in range(len(heads[0]))]
    for run in study.runs:
        marks = [state_of(root, part, stale) for part in parts if part.name == run.name]
        lines.append(f"{run.name:{width}} " + "".join(f" {mark}" for mark in marks))
    lines += ["", "✓ finished   ~ out of date   … interrupted   ✗ failed   · not run", ""]
    for group, command in MAKES.items():
        targets = [part.target for part in parts if part.name in {run.name for run in study.runs_of(group)}]
        missing = sum(target in stale for target in targets)
        if targets:
            done, makes = f"{len(targets) - missing:>4} of {len(targets):<4}", command if missing else "complete"
            lines.append(f"{group:9} {done} {makes}")
    return [*lines, "", str(root)]
