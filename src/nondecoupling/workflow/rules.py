"""When each rule of a verdict was written and last changed, and whether its result was known by then: from git alone.

The definition of a rule is the call or tuple of ``src`` that begins with its id (``Claim("A1", ...)``), the longest of
those that do. Ids like ``J1-<run>`` are one rule, J1. Definitions are compared as code: to move one or to break its
lines is no change, to say its statement in other words is. A result is known from the first commit on in which the
claims or controls of a reference have an estimate for it.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from nondecoupling.study.provenance import git

RESULTS = [f":(glob)results/reference/*/{name}.json" for name in ("claims", "controls")]

Definitions = dict[str, str]  # by rule, as code


class Commit(NamedTuple):
    """A commit by its time (seconds since 1970), that time as ISO 8601, its hashes, and its parents' hashes."""

    time: int
    date: str
    short: str
    hash: str
    parents: tuple[str, ...]


def rules_table(ids: Iterable[str], repository: Path) -> pd.DataFrame:
    """rules.csv: ``claim, written, written_commit, changed, changed_commit, results_known`` (yes or no), by rule.

    ``changed`` is when the rule became what it is now; ``results_known`` whether a result of it was committed by then.
    Raises RuntimeError outside a git repository, in a shallow clone, and for a rule that is not committed.
    """
    if git(repository, "rev-parse", "--is-shallow-repository") == "true":
        raise RuntimeError("This clone is shallow and cannot say when rules were written; git fetch --unshallow it.")
    rules = list(dict.fromkeys(name.partition("-")[0] for name in ids))
    history, results = commits(repository), first_results(repository)
    defined = definitions_by_commit(repository, [commit.hash for commit in history], rules)
    now, rows = defined[git(repository, "rev-parse", "HEAD")], []
    for rule in rules:
        if rule not in now:
            raise RuntimeError(f"src has no committed rule of '{rule}'; a rule is committed before its results.")
        of_rule = {name: found.get(rule) for name, found in defined.items()}
        new = [commit for commit in history if of_rule[commit.hash] not in (None, *map(of_rule.get, commit.parents))]
        written, changed = min(new), max(commit for commit in new if of_rule[commit.hash] == now[rule])
        rows.append(
            {
                "claim": rule,
                "written": written.date,
                "written_commit": written.short,
                "changed": changed.date,
                "changed_commit": changed.short,
                "results_known": "yes" if rule in results and results[rule].time <= changed.time else "no",
            }
        )
    return pd.DataFrame(rows)


def commits(repository: Path, *paths: str) -> list[Commit]:
    """All commits up to HEAD, or those that touch ``paths``, oldest first."""
    found = git(repository, "log", "--reverse", "--format=%ct %cI %h %H %P", "--", *paths)
    entries = [line.split() for line in found.splitlines()]
    return [Commit(int(time), date, short, full, tuple(parents)) for time, date, short, full, *parents in entries]


def definitions_by_commit(repository: Path, names: list[str], rules: list[str]) -> dict[str, Definitions]:
    """What each commit has as the definition of each rule."""
    by_file: dict[str, Definitions] = {}  # by the file's hash: most commits leave most files alone
    by_commit = {}
    for name in names:
        found: Definitions = {}
        for line in git(repository, "ls-tree", "-r", name, "--", "src").splitlines():
            entry, path = line.split("\t")
            if not path.endswith(".py"):
                continue
            blob = entry.split()[2]
            if blob not in by_file:
                by_file[blob] = definitions(git(repository, "cat-file", "blob", blob), rules)
            for rule, text in by_file[blob].items():
                found[rule] = max(found.get(rule, ""), text, key=len)
        by_commit[name] = found
    return by_commit


def definitions(code: str, rules: list[str]) -> Definitions:
    """The longest call or tuple of ``code`` that begins with the id of each rule."""
    found: Definitions = {}
    if not re.search(rf"[\"']({'|'.join(rules)})[\"'-]", code):
        return found
    for node in ast.walk(ast.parse(code)):
        parts = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        first = parts[0] if parts else None
        if isinstance(first, ast.JoinedStr) and first.values:
            first = first.values[0]
        rule = str(first.value).partition("-")[0] if isinstance(first, ast.Constant) else ""
        if rule in rules:
            found[rule] = max(found.get(rule, ""), ast.unparse(node), key=len)
    return found


def first_results(repository: Path) -> dict[str, Commit]:
    """The first commit in which the claims or controls of a reference have an estimate, by rule."""
    found: dict[str, Commit] = {}
    for commit in commits(repository, *RESULTS):
        for path in git(
            repository, "ls-tree", "-r", "--name-only", commit.hash, "--", "results/reference"
        ).splitlines():
            if Path(path).name in ("claims.json", "controls.json"):
                for row in json.loads(git(repository, "show", f"{commit.hash}:{path}")):
                    if row.get("estimate") is not None:
                        found.setdefault(row["id"].partition("-")[0], commit)
    return found
