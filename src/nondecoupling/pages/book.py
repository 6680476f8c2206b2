"""The book: README, chapters, docs and the reports of the committed references as a static site, for ``make book``.

Nothing is executed, and what is built asks for nothing elsewhere when it is read. Sphinx with myst-nb builds it, an
optional dependency (``pip install -e '.[book]'``); mystmd would fetch its theme from a host of its own at every build.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nondecoupling.study import folders

REPORTS, EXTRA, STYLE = "reports", "extra", "book.css"
REPORT_PAGE = """# Report of {name}

<a href="{name}/report.html">The report on a page of its own</a>

<iframe src="{name}/report.html" title="Report of {name}" style="width: 100%; height: 90vh; border: 0"></iframe>
"""
SETTINGS = {
    "project": "nondecoupling",
    "html_title": "nondecoupling",
    "extensions": ["myst_nb", "sphinx-mathjax-offline"],
    "include_patterns": ["index.md", "CONTRIBUTING.md", "docs/*.md", "notebooks/*.ipynb", f"{REPORTS}/*.md"],
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # else each page with sliders asks a public host for their code
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "html_theme": "furo",
    "html_static_path": [STYLE],
    "html_css_files": [STYLE],
    "html_extra_path": [EXTRA],
    "html_copy_source": False,
    "html_show_copyright": False,
    "html_show_sphinx": False,
}
CHAPTER_LINK = r'href="(?:\.\./)+notebooks/(\w+)\.ipynb"'  # of a committed report
BESIDE = ("figures/*.png", "*.json")  # to which it links, too
# What pages link to besides each other: a reader gets a copy of such a file.
LINKED = ("results", "src", "tests", "CITATION.cff", "Dockerfile")
PICTURE = r'<picture>.*?<img alt="(.+?)" src="(.+?)">.*?</picture>'  # whose files Sphinx would not copy
# Where pages of the book stand for what the repository has in their places.
PLACES = {r"\.\./README\.md": "../index.md", r"results/reference/([\w-]+)/report\.html": rf"{REPORTS}/\1.md"}


def contents(caption: str, names: list[str]) -> str:
    """A table of contents, in MyST's Markdown."""
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])


def in_the_book(path: Path) -> str:
    """The text of a document or notebook, with links to pages of the book, and none to folders."""

    def unless_folder(link: re.Match[str]) -> str:
        return link[1] if (path.parent / link[2]).is_dir() else link[0]

    text = re.sub(PICTURE, r"![\1](\2)", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", unless_folder, text)
    for pattern, place in PLACES.items():
        text = re.sub(pattern, place, text)
    return text


def write(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_sources(folder: Path) -> None:
    """Lay the book out in ``folder``, with a table of contents of all that is there."""
    home = folders.REPOSITORY
    reports = sorted((home / "results" / "reference").glob("*/report.html"))
    chapters, docs = sorted((home / "notebooks").glob("*.ipynb")), sorted((home / "docs").glob("*.md"))
    for path in (home / name for name in LINKED):
        (folder / path.name).symlink_to(path)
    for path in (*chapters, *docs, home / "CONTRIBUTING.md"):
        write(folder / path.relative_to(home), in_the_book(path))
    for report in reports:
        name = report.parent.name
        write(folder / REPORTS / f"{name}.md", REPORT_PAGE.format(name=name))
        place, text = folder / EXTRA / REPORTS / name, report.read_text(encoding="utf-8")
        write(place / "report.html", re.sub(CHAPTER_LINK, r'href="../../notebooks/\1.html"', text))
        for path in (found for pattern in BESIDE for found in report.parent.glob(pattern)):
            (place / path.relative_to(report.parent)).parent.mkdir(exist_ok=True)
            shutil.copy(path, place / path.relative_to(report.parent))
    tables = {
        "Chapters": [f"notebooks/{path.stem}" for path in chapters],
        "Results": [f"{REPORTS}/{report.parent.name}" for report in reports],
        "Docs": [*(f"docs/{path.stem}" for path in docs), "CONTRIBUTING"],
    }
    index = in_the_book(home / "README.md") + "".join(contents(*table) for table in tables.items())
    write(folder / "index.md", index)
    write(folder / "conf.py", "\n".join(f"{name} = {value!r}" for name, value in SETTINGS.items()))
    shutil.copy(Path(__file__).parent / "templates" / STYLE, folder)


def build_book(target: Path) -> Path:
    """Build the site in the folder ``target``, which is replaced, and return its first page.

    Raises ImportError where the builder is not installed, and RuntimeError for anything that it complains of, such as a
    link to what is not there; what was built before is then kept.
    """
    if importlib.util.find_spec("myst_nb") is None:
        raise ImportError("make book needs Sphinx and more: .venv/bin/pip install -e '.[book]'")
    with tempfile.TemporaryDirectory() as name:
        sources, built = Path(name) / "sources", Path(name) / "built"
        sources.mkdir()
        write_sources(sources)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "sphinx", "-qWb", "html", "--no-color", str(sources), str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            complaints = done.stderr.replace(f"{sources}/", "").strip()
            raise RuntimeError(f"the book is not built, because of\n{complaints}")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(built, target)
    return target / "index.html"
