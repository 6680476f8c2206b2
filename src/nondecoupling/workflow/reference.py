"""The committed reference: how it is made from a finished study, and how fresh results compare with it."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from nondecoupling.analysis.statistics import interval_text
from nondecoupling.analysis.tables import claims_table, markdown_table, readme_parts, rows_of
from nondecoupling.study import folders, results
from nondecoupling.study.contracts import ClaimRow
from nondecoupling.study.plan import SUMMARIES
from nondecoupling.study.results import Results, read_results
from nondecoupling.study.study import Study, parse_seeds

README = folders.REPOSITORY / "README.md"


def reference_claims(study: Study, seeds: list[int]) -> Path:
    """The committed claims of ``study``: claims.json for the profile's own seeds, a file beside it for others."""
    own = seeds == parse_seeds(study.profile.seeds)
    return folders.reference_folder(study) / ("claims.json" if own else f"claims-{len(seeds)}-seeds.json")


def verify(study: Study, seeds: list[int]) -> None:
    """Compare a study's claims with the reference's; RuntimeError where one differs."""
    fresh, reference = folders.study_folder(study) / "claims.json", reference_claims(study, seeds)
    if not reference.exists():  # other seeds must give the same verdicts, too
        reference = reference.with_name("claims.json")
    for path in (fresh, reference):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; there is nothing to compare.")
    table = compare_claims(folders.read_json(fresh), folders.read_json(reference))
    print("A row passes if the verdicts agree and the 95 % intervals overlap.\n" + table.to_string(index=False))
    failed = int((table["result"] == "FAIL").sum())
    if failed:
        raise RuntimeError(f"{failed} of {len(table)} claims differ from the reference.")


def compare_claims(fresh: list[ClaimRow], reference: list[ClaimRow]) -> pd.DataFrame:
    """Fresh claims next to the reference, one row each, PASS or FAIL.

    A row passes if the verdicts agree and the two 95 % intervals overlap. Claims that only one side has run are "not
    compared". Raises ValueError if the paper's claims are not the same on both sides.
    """
    new_rows, old_rows = ({row["id"]: row for row in side} for side in (fresh, reference))
    if [row["id"] for row in rows_of(fresh, "ABO")] != [row["id"] for row in rows_of(reference, "ABO")]:
        raise ValueError("The two sets of claims differ; compare results of the same version of this artifact.")
    rows = []
    for name in dict.fromkeys([*old_rows, *new_rows]):
        sides = [side.get(name) for side in (new_rows, old_rows)]
        words, ends = [], []
        for row in sides:
            if row is None or row["estimate"] is None:
                words.append("not run")
                continue
            ends.append(row["ci95"] or [row["estimate"]] * 2)
            words.append(f"{interval_text(row['estimate'], row['ci95'])} {row['verdict']}")
        result = "not compared"
        if len(ends) == 2:
            (low, high), (known_low, known_high) = ends
            same = new_rows[name]["verdict"] == old_rows[name]["verdict"]
            result = "PASS" if same and low <= known_high and known_low <= high else "FAIL"
        rows.append({"claim": name, "fresh": words[0], "reference": words[1], "result": result})
    return pd.DataFrame(rows)


def make_reference(study: Study, seeds: list[int]) -> None:
    """Make the finished study the committed reference: small files only, and never a sentence of real data.

    Of seeds that are not the profile's own only the claims are kept, beside the reference that is there. Raises
    FileNotFoundError or RuntimeError where a run is missing or is beside another parent than its own.
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
    kept_claims = reference_claims(study, seeds)
    if kept_claims.name != "claims.json":
        shutil.copy(root / "claims.json", kept_claims)
    else:
        publish_reference(found, reference)
    update_readme(read_results(study, reference))


def publish_reference(found: Results, reference: Path) -> None:
    """Write the reference's files: the tables, what was made from them, and one replication of an embedded model."""
    of_other_seeds = {path: path.read_text(encoding="utf-8") for path in reference.glob("claims-*-seeds.json")}
    shutil.rmtree(reference, ignore_errors=True)
    (reference / "figures").mkdir(parents=True)
    answers = found.answers if found.study.profile.data.generated else found.answers.assign(sentence="")
    provenance: Any = without_paths(found.provenance)
    results.write_results(found._replace(folder=reference, answers=answers, provenance=provenance))
    for name in (*(f"{summary}.json" for summary in SUMMARIES), "report.html"):
        if (found.folder / name).exists():
            shutil.copy(found.folder / name, reference / name)
    for path in (found.folder / "figures").glob("*.png"):
        shutil.copy(path, reference / "figures" / path.name)
    for path, text in of_other_seeds.items():
        folders.write_text(path, text)
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


def reference_parts(found: Results) -> dict[str, str]:
    """The README's generated parts for a committed reference, by the name between their markers."""
    parts = readme_parts(found)
    for path in found.folder.glob("claims-*.json"):
        name = f"{found.study.name}, {path.stem.removeprefix('claims-').replace('-', ' ')}"
        parts[name] = markdown_table(claims_table(rows_of(folders.read_json(path), "ABO")))
    return parts


def update_readme(found: Results) -> None:
    """Write the tables of a committed reference between the README's markers, where it has them."""
    for name, tables in reference_parts(found).items():
        write_between(README, f"<!-- {name}: generated by make reference -->", f"<!-- {name}: end -->", tables)


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Replace what is between the markers ``begin`` and ``end`` in a text file; one without them is left alone."""
    before, marker, rest = path.read_text(encoding="utf-8").partition(begin)
    if marker:
        folders.write_text(path, f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}")
