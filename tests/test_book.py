"""The sources of the book: what is in it, and what stops its being built."""

import re

import pytest

from nondecoupling.pages import book


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A small repository."""
    texts = {
        "README.md": "# Home\n\n[a](docs/a.md), the [report](results/reference/x/report.html)\n\n<picture>\n"
        '<source srcset="b.svg">\n<img alt="all" src="results/reference/x/figures/a.png">\n</picture>\n',
        "CONTRIBUTING.md": "# How\n",
        "docs/a.md": "# A\n\n[home](../README.md), [all](../results)\n",
        "notebooks/1.ipynb": '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
        "results/reference/x/report.html": '<a href="../../../notebooks/1.ipynb">1</a> <a href="claims.json">c</a>',
        "results/reference/x/claims.json": "[]",
        "results/reference/x/figures/a.png": "",
    }
    for name, text in texts.items():
        book.write(tmp_path / "home" / name, text)
    monkeypatch.setattr(book.folders, "REPOSITORY", tmp_path / "home")
    return tmp_path / "home"


def test_everything_is_in_the_contents_and_links_lead_to_pages(home, tmp_path):
    (home / "docs" / "new.md").write_text("# New\n")
    book.write_sources(tmp_path)
    index = (tmp_path / "index.md").read_text()
    listed = [line for line in index.splitlines() if "/" in line and "[" not in line]
    assert listed == ["notebooks/1", "reports/x", "docs/a", "docs/new"]
    assert "the [report](reports/x.md)" in index
    assert "\n\n![all](results/reference/x/figures/a.png)\n" in index
    assert (tmp_path / "docs" / "a.md").read_text() == "# A\n\n[home](../index.md), all\n"
    report = tmp_path / "extra" / "reports" / "x"
    assert '<a href="../../notebooks/1.html">' in (report / "report.html").read_text()
    assert (report / "claims.json").exists()
    assert (report / "figures" / "a.png").exists()


def test_committed_reports_are_beside_what_they_link_to(tmp_path):
    book.write_sources(tmp_path)
    pages = sorted(tmp_path.glob("extra/reports/*/report.html"))
    assert len(pages) >= 3
    for page in pages:
        linked = re.findall(r'href="(?!https?:|#|data:|\.\./\.\./notebooks/)([^"]+)"', page.read_text(encoding="utf-8"))
        assert [target for target in linked if not (page.parent / target.partition("#")[0]).exists()] == []


def test_a_link_to_nothing_is_named_and_what_was_built_is_kept(home, tmp_path):
    pytest.importorskip("myst_nb", reason="the book's builder is not installed: .[book]")
    book.write(tmp_path / "built" / "index.html", "old")
    (home / "docs" / "a.md").write_text("# A\n\n[it](gone.md)\n")
    with pytest.raises(RuntimeError, match=r"docs/a\.md:3: .*gone\.md"):
        book.build_book(tmp_path / "built")
    assert (tmp_path / "built" / "index.html").read_text() == "old"
