"""When rules were written, by the history of a small repository."""

import json
import subprocess

import pytest

from nondecoupling.workflow.rules import rules_table


class History:
    """A git repository whose commits are a day apart, the first on 2 January 2024."""

    def __init__(self, folder):
        self.folder, self.day = folder, 1
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments):
        date = f"2024-01-{self.day:02d}T12:00:00+00:00"
        names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "HOME": str(self.folder), **names}
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, env=environment | {"PATH": "/usr/bin:/bin"}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    def commit(self, **files):
        """Commit these files, a path as ``src__claims_py``, None to remove one; returns the short hash."""
        self.day += 1
        for name, content in files.items():
            path = self.folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                path.write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=x")
        return self.git("rev-parse", "--short", "HEAD")

    def rules(self, *ids):
        return rules_table(ids, self.folder).set_index("claim")


def estimates(**by_id):
    return json.dumps([{"id": name.replace("_", "-"), "estimate": value} for name, value in by_id.items()])


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


A1, A1_REWORDED = 'Claim("A1", "RL raises the loss", +1)', 'Claim("A1", "RL raises the SFT loss", +1)'
A1_ON_TWO_LINES = "[\n    Claim(\n        'A1', 'RL raises the loss', +1\n    ),\n]"


def test_a_rule_is_dated_and_a_later_result_was_not_known(history):
    written = history.commit(src__claims_py=A1)
    history.commit(results__reference__nano__claims_json=estimates(A1=0.2))
    row = history.rules("A1").loc["A1"]
    assert row.to_dict() == {
        "written": "2024-01-02T12:00:00+00:00",
        "written_commit": written,
        "changed": "2024-01-02T12:00:00+00:00",
        "changed_commit": written,
        "results_known": "no",
    }


def test_a_rule_that_changes_after_its_result_knew_it(history):
    written = history.commit(src__claims_py=A1)
    history.commit(results__reference__nano__claims_json=estimates(A1=0.2))
    changed = history.commit(src__claims_py=A1_REWORDED)
    row = history.rules("A1").loc["A1"]
    assert (row["written_commit"], row["changed_commit"], row["results_known"]) == (written, changed, "yes")


def test_to_move_a_rule_or_to_break_its_lines_is_no_change(history):
    written = history.commit(src__claims_py=A1)
    history.commit(results__reference__nano__claims_json=estimates(A1=0.2))
    history.commit(src__claims_py=None, src__rooms__judged_py=f"import x\n\nCLAIMS = {A1_ON_TWO_LINES}\n")
    row = history.rules("A1").loc["A1"]
    assert (row["written_commit"], row["changed_commit"], row["results_known"]) == (written, written, "no")


def test_a_rule_that_comes_back_was_changed_when_it_did(history):
    written = history.commit(src__claims_py=A1)
    history.commit(src__claims_py=A1_REWORDED)
    changed = history.commit(src__claims_py=A1)
    row = history.rules("A1").loc["A1"]
    assert (row["written_commit"], row["changed_commit"]) == (written, changed)


def test_a_rule_written_with_its_result_knew_it_and_one_not_run_did_not(history):
    history.commit(
        src__claims_py=f'{A1}\nClaim("K1", "drift")',
        results__reference__nano__claims_json=estimates(A1=0.2, K1=None),
        results__reference__nano__theory_json=estimates(K1=0.1),
    )
    rows = history.rules("A1", "K1")
    assert rows["results_known"].to_dict() == {"A1": "yes", "K1": "no"}


def test_families_are_one_rule_and_uses_of_an_id_are_none(history):
    code = 'def claims(run):\n    return Claim(f"J1-{run}", "earns more"), (f"T4-b{run}", "closed form", 4)\n'
    code += 'row_of("J1", 2)\n'
    written = history.commit(src__claims_py=code)
    history.commit(results__reference__nano__controls_json=estimates(J1_joint=0.1))
    history.commit(src__report_py='summary("J1", 2)\nOBJECTIONS = {"J1": "why?"}\nboth = ("T4", 1)\n')
    rows = history.rules("J1-joint-m0.2", "J1-interleaved", "T4-b5")
    assert rows["changed_commit"].to_dict() == {"J1": written, "T4": written}
    assert rows["results_known"].to_dict() == {"J1": "no", "T4": "no"}
    history.commit(src__claims_py=code.replace("more", "less"))
    assert history.rules("J1-joint-m0.2")["results_known"].item() == "yes"


def test_a_rule_of_a_merged_branch_is_dated_by_its_own_commit(history):
    history.commit(src__claims_py=A1)
    history.git("checkout", "--quiet", "-b", "side")
    written = history.commit(src__controls_py='Claim("K1", "drift")')
    history.git("checkout", "--quiet", "main")
    history.commit(results__reference__nano__claims_json=estimates(K1=0.2))
    history.git("merge", "--quiet", "--no-ff", "-m", "x", "side")
    row = history.rules("K1").loc["K1"]
    assert (row["changed_commit"], row["results_known"]) == (written, "no")


def test_what_a_merge_does_not_take_was_no_change(history):
    written = history.commit(src__claims_py=A1)
    history.git("checkout", "--quiet", "-b", "side")
    history.commit(src__claims_py=A1_REWORDED)
    history.git("checkout", "--quiet", "main")
    history.commit(notes_md="x")
    history.git("merge", "--quiet", "--strategy=ours", "-m", "x", "side")
    assert history.rules("A1").loc["A1", "changed_commit"] == written


def test_a_rule_that_is_not_committed_is_refused(history):
    history.commit(src__claims_py=A1)
    (history.folder / "src" / "claims.py").write_text('Claim("K9", "new")')
    with pytest.raises(RuntimeError, match="no committed rule of 'K9'"):
        history.rules("A1", "K9")


def test_a_shallow_clone_and_no_clone_are_refused(history, tmp_path_factory):
    history.commit(src__claims_py=A1)
    history.commit(src__claims_py=A1_REWORDED)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    history.git("clone", "--quiet", "--depth=1", f"file://{history.folder}", str(elsewhere / "clone"))
    with pytest.raises(RuntimeError, match="This clone is shallow .* git fetch --unshallow"):
        rules_table(["A1"], elsewhere / "clone")
    with pytest.raises(RuntimeError, match="not a git repository"):
        rules_table(["A1"], elsewhere)
