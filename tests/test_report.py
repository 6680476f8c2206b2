"""The report says what the results say, shows what they hold, and loads nothing."""

import re
import shutil

import pytest

from conftest import finished_reference
from nondecoupling import claims, figures, report, runs
from nondecoupling.profile import Study, load_study

REFERENCES = runs.REPOSITORY / "results" / "reference"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A copy of a committed reference as a finished study, and its folder; by the reference's name."""

    def copy(name: str):
        monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
        return finished_reference(name, tmp_path), tmp_path / name

    return copy


def page_of(study: Study) -> str:
    return report.write_report(study).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCES.iterdir()))
def test_report_shows_every_claim_with_its_numbers(finished, name):
    study, root = finished(name)
    page = page_of(study)
    for row in claims.claims_table(runs.read_json(root / "claims.json")).to_dict("records"):
        shown = page.partition(f'<tr id="{row["claim"].partition(":")[0]}">')[2].partition("</tr>")[0]
        assert row["measured"] in shown
        assert row["95 % interval"] in shown
        assert row["verdict"].partition(" (")[0] in shown
    collapsed = claims.states_table(runs.read_metrics(root, study, [0, 1, 2]))["collapsed"].ne("no").any()
    assert ("Read with care" in page) == collapsed


def test_report_loads_nothing_and_every_figure_has_words(finished):
    study, root = finished("nano")
    page = page_of(study)
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(|@import|<script', page)
    assert all(target.startswith(("data:", "#")) for target in loaded)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == len(list((root / "figures").glob("*.svg"))) >= 5
    assert all(re.search(r'alt="[^"]{60,}"', image) for image in images)
    assert "0.536 for the base model, 0.425 after SFT, 0.642 after SFT then RL" in page  # as in the README's table


def test_links_within_the_report_lead_somewhere(finished):
    page = page_of(finished("nano")[0])
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))


def test_controls_and_joint_runs_are_shown_where_there_are_any(finished):
    study, root = finished("nano")
    for figure in ("controls", "proxy", "joint"):
        (root / "figures" / f"{figure}.svg").unlink(missing_ok=True)
    rows = [row for row in runs.read_json(root / "claims.json") if row["id"][0] not in "KJ"]
    runs.write_json(root / "claims.json", rows)
    assert not {"Controls</h2>", "Both goals at once</h2>"} & set(re.findall(r"[\w ]+</h2>", page_of(study)))
    more = [rows[0] | {"id": "K1", "statement": "more SFT"}, rows[0] | {"id": "J1", "statement": "both in one update"}]
    runs.write_json(root / "claims.json", rows + more)
    shutil.copy(root / "figures" / "plane.svg", root / "figures" / "joint.svg")
    page = page_of(study)
    assert "K1: more SFT" in page.partition('id="controls"')[2].partition("</section>")[0]
    assert "Is the rise of the loss just drift" in page  # the objection that K1 answers
    joint = page.partition('<section id="joint"')[2].partition("</section>")[0]
    assert "J1: both in one update" in joint
    assert "<img" in joint


def test_unfinished_study_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="finish the study first"):
        report.write_report(load_study("nano"))


def test_same_figure_gives_the_same_files(tmp_path):
    rows = runs.read_json(REFERENCES / "nano" / "claims.json")
    for folder in ("one", "two"):
        figures.set_style()
        figures.save_figure(figures.draw_predictions(rows), tmp_path / folder, "predictions")
    for ending in ("png", "svg", "pdf"):
        one, two = (tmp_path / folder / f"predictions.{ending}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), ending


def test_changed_settings_are_those_that_differ_from_the_profile():
    assert report.changed_settings(load_study("nano")) == {}
    assert report.changed_settings(load_study("nano", overrides={"rl.beta": 2.0})) == {"rl.beta": 2.0}
