"""The report says what the results say, shows what they hold, and loads nothing."""

import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from typing import get_args

import pandas as pd
import pytest
from markupsafe import escape
from matplotlib import pyplot as plt

from nondecoupling.analysis import claims, controls, figures, tables, verdicts
from nondecoupling.pages import report
from nondecoupling.study import folders
from nondecoupling.study.contracts import Verdict
from nondecoupling.study.plan import STATES
from nondecoupling.study.results import read_results
from nondecoupling.study.study import load_study, parse_overrides
from tables import costs_of, results_of

REFERENCES = folders.REPOSITORY / "results" / "reference"
IMAGE = '<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A copy of a committed reference as a study that was run here, its results; by the reference's name.

    Figures are committed as PNG, the report takes SVG.
    """

    def copy(name: str):
        monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
        root = shutil.copytree(REFERENCES / name, tmp_path / name, ignore=shutil.ignore_patterns("seed*", "base"))
        (root / "figures" / figures.PORTRAIT).mkdir(exist_ok=True)
        for path in (root / "figures").glob("*.png"):
            for folder in (path.parent, path.parent / figures.PORTRAIT):
                (folder / path.with_suffix(".svg").name).write_text(IMAGE)
        return read_results(None, root)

    return copy


POLICIES: dict[tuple, pd.DataFrame] = {}


@pytest.fixture(autouse=True)
def policies_are_measured_once(monkeypatch):
    """The tables of policies of equal metrics: some seconds for each, and no test here changes answers."""

    def once(results, *runs):
        key = results.study.name, runs, pd.util.hash_pandas_object(results.metrics).sum()
        if key not in POLICIES:
            POLICIES[key] = tables.policies_table(results, *runs)
        return POLICIES[key]

    monkeypatch.setattr(report, "policies_table", once)


def page_of(results) -> str:
    return report.write_report(results.study).read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    return page.partition(f'<section id="{name}"')[2].partition("</section>")[0]


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCES.iterdir()))
def test_report_shows_every_claim_with_its_numbers(finished, name):
    results = finished(name)
    page = page_of(results)
    rows = results.read("claims.json")
    run = {row["id"][0] for row in rows if row["verdict"] != "not run"}  # families of which anything was run
    rows = verdicts.rows_of(rows, "".join(run))
    assert sorted(re.findall(r'<tr id="([^"]+)">', page)) == sorted(row["id"] for row in rows)
    for row in rows:
        shown = page.partition(f'<tr id="{row["id"]}">')[2].partition("</tr>")[0]
        for text in tables.claims_table([row]).drop(columns="verdict").iloc[0]:
            assert escape(report.minus(text)) in shown
        assert row["verdict"] in shown
        assert escape(report.minus(row["note"])) in shown
    collapsed = tables.states_table(results.final(*STATES))["collapsed"].ne("no").any()
    assert ("Read with care" in page) == collapsed


def test_report_loads_nothing_and_every_figure_has_words(finished):
    results = finished("nano")
    page = page_of(results)
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(|@import|<script', page)
    links = re.findall(r'<a href="(https?:[^"]*)"', page)
    assert set(links) == {"https://arxiv.org/abs/2601.07389"}  # which is followed by those who click
    files = [target for target in loaded if target not in links and not target.startswith(("data:", "#"))]
    assert len(files) > 10
    assert all((results.folder / target).exists() for target in files)  # beside the page, for those who click
    images = re.findall(r"<img [^>]*>", page)
    assert "Curves are measured on" not in page
    assert len(images) == len(list((results.folder / "figures").glob("*.svg"))) >= 9
    assert all(re.search(r'alt="[^"]{60,}"', image) for image in images)
    losses = results.final(*STATES).groupby("run")["sft_loss"].mean().map("{:.3f}".format)
    words = "{base} for the base model, {sft} after SFT, {sft-rl} after SFT then RL".format(**losses)
    assert words in page  # as in the README's table


def test_links_within_the_report_lead_somewhere(finished):
    page = page_of(finished("nano"))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))


def test_controls_and_joint_runs_are_shown_where_there_are_any(finished):
    results = finished("nano")
    for figure in ("controls", "proxy", "joint"):
        (results.folder / "figures" / f"{figure}.svg").unlink()
    rows = verdicts.rows_of(results.read("claims.json"), "ABOT")
    for others in ([], controls.controls_not_run(results.study)):
        folders.write_json(results.folder / "claims.json", rows + others)
        page = page_of(results)
        assert "decide no control" in section(page, "controls")  # whose runs are in the tables
        assert "Both goals at once</h2>" not in page
        assert "not run" not in page
    more = [
        rows[0] | {"id": "K1", "statement": "more SFT", "verdict": "confirmed"},
        rows[0] | {"id": "K1e", "statement": "nothing changes", "margin": 0.02, "verdict": "refuted"},
        rows[0] | {"id": "J1", "statement": "both in one update", "verdict": "inconclusive"},
    ]
    folders.write_json(results.folder / "claims.json", rows + more)
    (results.folder / "figures" / "joint.svg").write_text(IMAGE)
    page = page_of(results)
    assert "K1: more SFT" in section(page, "controls")
    assert controls.OBJECTIONS["K1"] in page
    assert "K1e: nothing changes (±0.02)" in section(page, "controls")
    for mark, verdict in (("✓", "confirmed"), ("✗", "refuted")):
        assert f'<span class="verdict {verdict}">{mark} {verdict}</span>' in section(page, "controls")
    assert "J1: both in one update" in section(page, "joint")
    assert "<img" in section(page, "joint")


def test_theorems_are_shown_apart_from_what_an_interval_decides(finished):
    theorems, amounts = (
        part.partition("</table>")[0]
        for part in section(page_of(finished("nano")), "predicted")
        .partition('<table class="claims')[2]
        .split('<table class="claims')
    )
    assert re.findall(r'<tr id="([^"]+)">', theorems) == ["T1", "T5"]
    assert {"T2", "T6", "T7"} <= set(re.findall(r'<tr id="([^"]+)">', amounts))


def test_verdicts_have_colours():
    style = (folders.REPOSITORY / "src/nondecoupling/pages/templates/report.css").read_text(encoding="utf-8")
    words = [verdict.replace(" ", "-") for verdict in get_args(Verdict) if verdict != "not run"]
    assert all(re.search(rf"\.{word}[ ,]", style) for word in words)


def test_a_sweep_that_was_not_run_has_no_table_and_no_number(finished):
    results = finished("nano")
    folders.write_json(results.folder / "theory.json", results.read("theory.json") | {"sweep": None})
    missing = list(claims.sweep_rows(results, {"sweep": None}))
    rows = [row for row in results.read("claims.json") if not row["id"].startswith("T4")]
    folders.write_json(results.folder / "claims.json", rows + missing)
    shown = section(page_of(results), "predicted")
    assert "RL after SFT at other prices" not in shown
    row = shown.partition('<tr id="T4-b5">')[2].partition("</tr>")[0]
    assert "– not run" in row
    assert "make betas" in row
    assert set(re.findall(r"<td[^>]*>([^<\s]+)</td>", row)) == {"-"}


def test_numbers_are_set_one_below_the_other_with_real_minus_signs():
    text = "-0.042 [-0.1, +0.2] at T4-b0.5, 1e-09, rl-sft"
    assert report.minus(text) == "−0.042 [−0.1, +0.2] at T4-b0.5, 1e-09, rl-sft"
    rows = [
        {"claim": "A1", "measured": "+0.2 [-0.1, +0.3]", "p": "1.3e-06"},
        {"claim": "1", "measured": "-", "p": "9%"},
    ]
    assert report.numeric_columns(rows) == ["measured", "p"]


def test_a_page_says_what_holds_for_its_own_numbers(finished):
    """Where a correction has withdrawn a verdict, and where curves are of fewer sentences than tables."""
    results = finished("nano")
    rows = results.read("claims.json")
    changed = {"verdict": "inconclusive", "p_value": 0.02, "p_holm": 0.08, "note": ""}
    folders.write_json(results.folder / "claims.json", [row | changed if row["id"] == "A1" else row for row in rows])
    fewer = replace(results, trajectories=results.trajectories.assign(n=64))
    page = report.render_report(report.content_of(fewer))
    for place in (section(page, "short"), section(page, "claims")):
        assert "p 0.02, but 0.08 after Holm&#39;s correction" in place
    assert page.count("Curves are measured on 64 dev sentences, tables and claims on all 1,000.") == 2
    row = page.partition('<tr id="B2">')[2].partition("</tr>")[0]
    assert '<td data-label="measured [95 %]" class="numbers">−0.' in row
    assert not re.search(r">[^<]*\s-\d", page.partition("<body>")[2].partition("Every setting")[0])


def test_the_report_says_which_commands_made_it(finished, tmp_path):
    results = finished("nano")
    assert report.made_by(results)[0] == f"make reproduce PROFILE=nano SEEDS=0-{results.seeds[-1]}"
    own = load_study("nano", overrides={"rl.beta": 0.25})
    few = replace(results, study=own, provenance=results.provenance | {"seeds": [0, 3]})
    assert report.made_by(few)[0] == "make reproduce PROFILE=nano SEEDS=0,3 SET=rl.beta=0.25"
    changes = {"prompt.acceptable": "it is", "data.disagreement": {"case": 0.1, "wh": 0.2}, "evaluation.along_size": 64}
    told = replace(results, study=replace(own, profile=load_study("nano", overrides=changes).profile))
    name, _, words = shlex.split(report.made_by(told)[0])[-1].partition("=")
    assert (name, parse_overrides(words)) == ("SET", changes)
    (tmp_path / "real").mkdir()
    real = replace(results, study=replace(own, profile=load_study("nano", str(tmp_path / "real")).profile))
    assert report.made_by(real)[0].endswith(f"SEEDS=0-{results.seeds[-1]} DATA=folder")


def test_a_study_of_several_versions_says_so(finished):
    """Of a library that was renewed between two makes."""
    provenance = finished("four").provenance
    [alike] = report.software_of(provenance)
    assert alike.startswith("Python 3.")
    renewed = provenance["shared"]["packages"] | {"trl": "99.0"}
    runs = provenance["runs"] | {"seed0/rl": provenance["runs"]["seed0/rl"] | {"packages": renewed}}
    first, second = report.software_of(provenance | {"runs": runs})
    assert first == alike
    assert second == alike.replace(f"trl {provenance['shared']['packages']['trl']}", "trl 99.0")


def test_costs_say_how_long_each_run_took_and_whose_it_is():
    costs = costs_of({"data": 9, "base": 90, "sft": 86400}, [3]).assign(
        steps=[float("nan"), 400, 250], peak_memory_bytes=[float("nan"), 2**29, 2**30], commit="0123456789+"
    )
    costs.loc[0, "seed"] = pd.NA  # serves all
    table = report.cost_table(costs)
    assert table["run"].tolist() == ["data", "base", "sft"]
    assert table["seed"].tolist() == ["all", "3", "3"]
    assert table["steps"].tolist() == ["-", "400", "250"]
    assert table["seconds"].tolist() == ["9", "90", "86400"]
    assert table["peak memory, GiB"].tolist() == ["-", "0.50", "1.00"]


def test_unfinished_study_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="finish the study first"):
        report.write_report(load_study("nano"))


def test_same_numbers_give_the_same_figures_and_the_reference_none(tmp_path, monkeypatch):
    rows = verdicts.rows_of(folders.read_json(REFERENCES / "nano" / "claims.json"), "ABO")
    figures.set_style()
    files = []
    for name in ("one", "two"):
        monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path / name))
        folder = folders.study_folder(load_study("nano"))
        folder.mkdir(parents=True)
        figures.save_figure(results_of(load_study("nano"), folder=folder), figures.draw_claims(rows), "claims")
        files.append({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("figures/**/*.*")})
    names = {"claims.png", "claims.svg", "claims.pdf", f"{figures.PORTRAIT}/claims.svg"}
    assert set(files[0]) == {f"figures/{name}" for name in names}
    assert files[0] == files[1]
    committed = results_of(load_study("nano"), folder=tmp_path)
    figures.save_figure(committed, figures.draw_claims(rows), "claims")
    assert not (tmp_path / "figures").exists()


def test_settings_that_differ_from_the_profile_are_named(finished):
    results, changed = finished("nano"), load_study("nano", overrides={"rl.steps": 24, "sft.steps": 30})
    assert "Changed settings" not in page_of(results)
    page = report.render_report(report.content_of(replace(results, study=changed)))
    shown = page.partition("<dt>Changed settings</dt>")[2].partition("</dd>")[0]
    assert changed.chosen <= set(re.findall(r"<code>([^=<]+)=", shown))
    assert "<code>rl.steps=24</code>" in shown


def test_a_study_of_ones_own_says_how_it_agrees_with_the_reference(finished):
    results = finished("nano")
    reference = f"{len(results.seeds)} replications could come from the reference's {len(results.seeds)}"
    assert re.search(rf"<dt>Reference</dt>\s*<dd>PASS: \d+ quantities of {reference}", unescape(page_of(results)))
    worse = results.metrics.assign(sft_loss=results.metrics["sft_loss"] + 0.1 * results.metrics["seed"])
    assert report.content_of(replace(results, metrics=worse))["agreement"].startswith("FAIL: ")
    assert report.content_of(replace(results, folder=REFERENCES / "nano"))["agreement"] is None
