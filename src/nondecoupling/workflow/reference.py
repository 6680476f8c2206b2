"""The committed reference: how it is made from a finished study, and how fresh results compare with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from nondecoupling.analysis import agreement
from nondecoupling.analysis.figures import PORTRAIT
from nondecoupling.analysis.tables import seconds_of
from nondecoupling.analysis.verdicts import claims_text, rows_of
from nondecoupling.pages.documents import document_parts, verdicts_sentence
from nondecoupling.pages.report import REPORT, content_of, notebooks_beside, render_report
from nondecoupling.study import folders, results
from nondecoupling.study.plan import SUMMARIES
from nondecoupling.study.results import Results, read_results
from nondecoupling.study.study import Study, changed_settings, load_study, parse_seeds, validated
from nondecoupling.workflow.executor import opening_line, places, progress_line
from nondecoupling.workflow.graph import REPORT as REPORT_PART
from nondecoupling.workflow.graph import TABLES, parts_of
from nondecoupling.workflow.rules import rules_table

ON_PHONES = ("experiments", "story")  # figures of the README, which shows phones another copy
DOCUMENTS = [folders.REPOSITORY / "README.md", *sorted((folders.REPOSITORY / "docs").glob("*.md"))]


def verify(study: Study) -> None:
    """Say how a study's replications compare with the reference's (`agreement`).

    RuntimeError where one could not come from there, or where a file of a run is not as it was written.
    """
    reference = reference_of(study)
    fresh = read_results(study, folders.study_folder(study))
    for found in (fresh, reference):
        require_current(found)
    if len(reference.seeds) < 2:
        raise RuntimeError(
            f"The reference of '{reference.study.name}' has one replication, hence no spread to judge by."
        )
    if reference.study.name != study.name:
        changed = ", ".join(changed_settings(reference.study.profile, study.profile))
        words = f"'{study.name}' has no reference of its own. It is compared with '{reference.study.name}', from which"
        print(*agreement.wrapped(f"{words} it differs in {changed}."), sep="\n", end="\n\n")
    for run in study.runs:
        for folder in [folders.run_folder(folders.study_folder(study), run, seed) for seed in fresh.seeds]:
            if folder.exists():
                folders.require_complete(folder, "make verify")
    table = agreement.compare(agreement.quantities(fresh), agreement.quantities(reference))
    print(agreement.comparison_text(table, len(fresh.seeds), len(reference.seeds)))
    if missing := agreement.not_compared(fresh, reference):
        print(f"\n{missing}")
    failed = int((table["result"] == agreement.FAIL).sum())
    if failed:
        raise RuntimeError(f"{failed} of {len(table)} quantities could not come from the reference's replications.")


def reference_of(study: Study) -> Results:
    """The reference that ``study`` is compared with: its own, else that of its profile without the user's changes."""
    if not (folders.reference_folder(study) / results.PROVENANCE).exists():
        study = load_study(study.profile.name)
    if not (folders.reference_folder(study) / results.PROVENANCE).exists():
        raise FileNotFoundError(f"There is no reference of '{study.name}', hence nothing to compare with.")
    return read_results(study, folders.reference_folder(study))


def require_current(found: Results) -> None:
    """RuntimeError where results were made with other settings, or by another plan, than the study has now."""
    planned = {run.name: run.changes for run in found.study.runs}
    made = {Path(path).name: entry["changes"] for path, entry in found.provenance["runs"].items()}
    now = [without_paths(found.study.profile.model_dump()), {name: planned[name] for name in made if name in planned}]
    settings = completed(found.provenance["parameters"])
    then = [without_paths(settings), {name: made[name] for name in made if name in planned}]
    if json.loads(json.dumps(now)) != then:
        renews = "make reproduce" if found.own else "make reference"
        raise RuntimeError(
            f"{found.folder} was made with other settings or by another plan than '{found.study.name}' has now; "
            f"{renews} renews it."
        )


def completed(parameters: dict[str, Any]) -> dict[str, Any]:
    """``parameters`` with settings that came later at their defaults, which is how the study was made then."""
    try:
        return json.loads(json.dumps(validated(parameters, "parameters").model_dump()))
    except ValueError:
        return parameters


def make_reference(study: Study, seeds: list[int]) -> None:
    """Make the finished study the committed reference: small files only, and never a sentence of real data.

    Raises FileNotFoundError or RuntimeError where a run is missing or is beside another parent than its own, and where
    git does not know the rules of the claims.
    """
    root, reference = folders.study_folder(study), folders.reference_folder(study)
    found = read_results(study, root)
    if found.seeds != seeds:
        raise RuntimeError(
            f"{root} has the tables of seeds {found.seeds}, not of {seeds}; run make reproduce with those."
        )
    for run in study.runs:
        for seed in seeds if found.has(run.name) else []:
            record = folders.read_json(folders.run_folder(root, run, seed) / folders.METRICS)
            results.require_own_parents(study, root, run, seed, record)
    rules = rules_table([row["id"] for row in found.read("claims.json")], folders.REPOSITORY)
    publish_reference(found, rules, reference)
    update_documents(read_results(study, reference))


def publish_reference(found: Results, rules: pd.DataFrame, reference: Path) -> None:
    """Write the reference's files: the tables, what was made from them, and one replication of an embedded model."""
    # A reference's report does not compare it with the one before it, and links to the chapters.
    provenance: Any = without_paths(found.provenance)
    content = content_of(replace(found, provenance=provenance))
    beside = {"agreement": None, "notebooks": notebooks_beside(replace(found, folder=reference))}
    report = render_report(content | beside)  # before anything is removed
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir(parents=True)
    answers = found.answers if found.study.profile.data.generated else found.answers.assign(sentence="")
    results.write_results(replace(found, folder=reference, answers=answers, provenance=provenance))
    for name in (*(f"{summary}.json" for summary in SUMMARIES), "score.json"):
        if (found.folder / name).exists():
            shutil.copy(found.folder / name, reference / name)
    folders.write_text(reference / REPORT, report)
    drawn, shown = found.folder / "figures", reference / "figures"
    (shown / PORTRAIT).mkdir(parents=True)
    for path in (*drawn.glob("*.png"), *(drawn / PORTRAIT / f"{name}.svg" for name in ON_PHONES)):
        if path.exists():
            shutil.copy(path, shown / path.relative_to(drawn))
    rules.to_csv(reference / "rules.csv", index=False)
    if found.study.profile.pretrains:
        for run in found.study.runs_of("main")[1:]:  # not the data
            source, copy = (folders.run_folder(root, run, found.seeds[0]) for root in (found.folder, reference))
            shutil.copytree(source / folders.POLICY, copy / folders.POLICY, ignore=shutil.ignore_patterns("README.md"))
            if (source / folders.LOG).exists():
                shutil.copy(source / folders.LOG, copy / folders.LOG)


def without_paths(content: Any) -> Any:
    """``content`` with a user's folders by name only: which say nothing of the results."""
    if not isinstance(content, dict):
        return content
    kept = {key: without_paths(value) for key, value in content.items()}
    return kept | ({"folder": Path(kept["folder"]).name} if kept.get("folder") else {})


def committed_verdicts() -> str:
    """The verdicts of all committed references side by side."""
    claims = sorted(
        folders.REPOSITORY.glob("results/reference/*/claims.json"), key=lambda path: path.parent.name != "nano"
    )
    return verdicts_sentence({path.parent.name: folders.read_json(path) for path in claims})


def printed_sample(found: Results) -> str:
    """What make reproduce prints on two cores, in short: a line of its progress, the paper's claims, where all is.

    Numbers are those of ``found``; of the replications that make reproduce runs, the last but one has just had its RL.
    """
    study = found.study
    parts = parts_of(study, parse_seeds(study.profile.seeds), study.runs_of("main"))
    notebooks = [part for part in parts if part.name not in (TABLES, REPORT_PART)]
    done = 1 + max(place for place, part in enumerate(notebooks[: -len(study.runs_of("main"))]) if part.name == "rl")
    seconds = pd.Series(
        seconds_of(found.costs).to_numpy(), index=pd.MultiIndex.from_frame(found.costs[["run", "seed"]])
    )
    took = [seconds[part.name, found.seeds[0] if part.seed is None else part.seed] for part in notebooks[:done]]
    clock = f"{int(took[-1]) // 60}:{int(took[-1]) % 60:02d}"
    lines = [
        opening_line(study.name, len(notebooks), len(notebooks), "2 at a time"),
        "...",
        progress_line(f"{notebooks[done - 1].words} · {clock}", done, len(notebooks), sum(took) / 2),
        "...",
        claims_text(rows_of(found.read("claims.json"), "AB")),
        "...",
        places(Path("results") / study.name),
    ]
    return "\n".join(["```text", *lines, "```"])


def update_documents(found: Results) -> None:
    """Write the tables of a committed reference between the markers of README and docs, where these have them."""
    parts = document_parts(found) | {"verdicts": committed_verdicts()}
    if found.study.profile.pretrains:  # what the README's first command makes
        parts[f"{found.study.name}, printed"] = printed_sample(found)
    for name, tables in parts.items():
        write_between(f"<!-- {name}: generated by make reference -->", f"<!-- {name}: end -->", tables)


def write_between(begin: str, end: str, content: str) -> None:
    """Replace what is between the markers ``begin`` and ``end`` in README and docs, in those that have them."""
    for path in DOCUMENTS:
        before, marker, rest = path.read_text(encoding="utf-8").partition(begin)
        if marker:
            _, found, after = rest.partition(end)
            if not found:
                raise ValueError(f"{path} has '{begin}' and not '{end}' after it.")
            folders.write_text(path, f"{before}{begin}\n\n{content}\n\n{end}{after}")
