"""What a person with a browser sees: the report, the book, and the notebook ``explore`` in JupyterLab.

Screenshots are kept in ``screenshots/``, which git ignores, to be looked at.
"""

import base64
import json
import shutil
import struct
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nondecoupling.analysis import figures
from nondecoupling.pages import book, report
from nondecoupling.study import folders
from nondecoupling.study.study import load_study
from nondecoupling.workflow import lab

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
SCREENSHOTS = folders.REPOSITORY / "screenshots"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,900",
]

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs Chromium with its driver (apt-get install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    # JupyterLab waits for animation frames, which a page gets only while it is seen.
    driver.execute_cdp_cmd("Page.bringToFront", {})
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    yield driver
    driver.quit()


def look_like(browser: Any, width: int, scheme: str) -> None:
    """Give the window a ``width`` in pixels and the user a preference for ``scheme``, light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})


def keep_screenshot(browser: Any, name: str) -> None:
    """Save the whole page, however long, as ``name``.png."""
    SCREENSHOTS.mkdir(exist_ok=True)
    width, height = browser.execute_script(
        "const page = document.documentElement; return [page.clientWidth, page.scrollHeight]"
    )
    area = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": area})
    (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def requested(browser: Any) -> list[str]:
    """Addresses of everything that the browser has asked for since it was last asked this."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for ``condition`` to return something true, and return that; elements may come and go meanwhile.

    It is asked twice a second: a page that is asked much more often has no time for anything else.
    """
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(None, seconds, poll_frequency=0.5, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition(), f"{what}: not within {seconds:g} s")


# The report


@pytest.fixture
def report_file(tmp_path, monkeypatch):
    """The report of the committed reference, as if it were a study's own; its figures are committed as PNG alone."""
    monkeypatch.setenv("NONDECOUPLING_RESULTS", str(tmp_path))
    study = load_study("nano")
    root = shutil.copytree(folders.reference_folder(study), tmp_path / study.name)
    (root / "figures" / figures.PORTRAIT).mkdir(exist_ok=True)
    for path in (root / "figures").glob("*.png"):
        picture = base64.b64encode(path.read_bytes()).decode()
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        path.with_suffix(".svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
            f'<image width="{width}" height="{height}" href="data:image/png;base64,{picture}"/></svg>'
        )
        tall = '<svg xmlns="http://www.w3.org/2000/svg" width="331" height="700"/>'
        (path.parent / figures.PORTRAIT / path.with_suffix(".svg").name).write_text(tall)
    return report.write_report(study)


def test_report_opens_without_network_or_complaint(browser, report_file):
    browser.get(report_file.as_uri())
    assert "nano" in browser.title
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    schemes = {address.partition(":")[0] for address in requested(browser)}
    assert {scheme for scheme in schemes if not scheme.startswith("chrome")} <= {"file", "data"}  # its own empty tab
    images = browser.execute_script(
        "return [...document.images].map(image => [image.naturalWidth, image.width, image.height, image.alt])"
    )
    assert len(images) >= 5
    assert all(natural > 0 and width > 400 and height > 150 and alt for natural, width, height, alt in images)


@pytest.mark.parametrize(("name", "width"), [("desktop", 1200), ("phone", 390)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_fits_window_and_scheme(browser, report_file, name, width, scheme):
    look_like(browser, width, scheme)
    browser.get(report_file.as_uri())
    keep_screenshot(browser, f"report-{name}-{scheme}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colours = browser.execute_script(
        "return [document.body, document.querySelector('.card')].map(e => getComputedStyle(e).backgroundColor)"
    )
    page, card = (sum(int(part) for part in colour[4:-1].split(",")) for colour in colours)
    assert (page > 3 * 200) == (scheme == "light")
    assert card == 3 * 255  # figures stay on white


def test_a_phone_gets_figures_that_are_higher_than_wide(browser, report_file):
    look_like(browser, 390, "light")
    browser.get(report_file.as_uri())
    shapes = browser.execute_script("return [...document.images].map(image => [image.width, image.height])")
    assert len(shapes) == len(list((report_file.parent / "figures").glob("*.svg")))
    assert all(300 < width < min(height, 390) for width, height in shapes)  # and nothing to swipe


def test_report_prints_whole(browser, report_file):
    look_like(browser, 1200, "light")
    browser.get(report_file.as_uri())
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    SCREENSHOTS.mkdir(exist_ok=True)
    (SCREENSHOTS / "report-print.pdf").write_bytes(printed)
    assert printed.count(b"/Type /Page\n") in range(5, 21)


# The book


class Quietly(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of the built book on this machine."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason="the book's builder is not installed: .[book]")
    page = book.build_book(tmp_path_factory.mktemp("built") / "book")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quietly, directory=str(page.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pictures_of(notebook: Any) -> int:
    """How many outputs of a notebook a browser shows as pictures."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_the_book_is_read_page_by_page_and_asks_nobody_else(browser, site):
    """Along its links to the next page: every notebook and document is there, with every figure and formula."""
    from selenium.webdriver.common.by import By

    home, expected = folders.REPOSITORY, ["index"]
    for pattern in ("notebooks/*.ipynb", "results/reference/*/report.html", "docs/*.md", "CONTRIBUTING.md"):
        paths = [path.relative_to(home) for path in sorted(home.glob(pattern))]
        expected += [
            f"reports/{path.parent.name}" if path.suffix == ".html" else path.with_suffix("").as_posix()
            for path in paths
        ]
    look_like(browser, 1400, "light")
    requested(browser), browser.get_log("browser")  # of tests before
    browser.get(f"{site}/index.html")
    read = []
    while True:
        name = browser.current_url.removeprefix(f"{site}/").removesuffix(".html")
        read.append(name)
        until(lambda: browser.execute_script("return document.readyState") == "complete", f"{name} is there")
        images = browser.execute_script("return [...document.images].map(image => [image.naturalWidth, image.src])")
        assert [source for width, source in images if not width] == []
        notebook = home / f"{name}.ipynb"
        if notebook.exists():
            assert len(images) == pictures_of(notebook)
        if name.startswith("reports/"):
            browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
            assert "reproduced" in browser.find_element(By.TAG_NAME, "body").text
            browser.switch_to.default_content()
        if browser.find_elements(By.CSS_SELECTOR, ".math"):
            until(lambda: browser.find_elements(By.CSS_SELECTOR, "mjx-container"), f"formulas of {name}")
        if name == "notebooks/05_claims":
            keep_screenshot(browser, "book-claims")
        following = browser.find_elements(By.CSS_SELECTOR, "a.next-page")
        if not following:
            break
        browser.get(following[0].get_attribute("href"))
    assert read == expected
    back = browser.find_element(By.CSS_SELECTOR, "a.prev-page").get_attribute("href")
    assert back == f"{site}/{expected[-2]}.html"
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert [line for line in severe if "favicon.ico" not in line["message"]] == []
    near = (site, "data:", "chrome")
    assert [address for address in requested(browser) if not address.startswith(near)] == []


def test_the_book_is_searched(browser, site):
    from selenium.webdriver.common.by import By

    browser.get(f"{site}/notebooks/06_theory.html")
    browser.find_element(By.CSS_SELECTOR, "input[name=q]").send_keys("annotators\n")
    until(lambda: browser.find_elements(By.PARTIAL_LINK_TEXT, "Data"), "the chapter on data is found", 20)
    assert all(address.startswith((site, "data:")) for address in requested(browser))


# JupyterLab


@pytest.fixture
def lab_address(tmp_path):
    """Address at which `make lab` answers, in a folder of its own and with no results but the committed ones."""
    cleared = tmp_path / "lab"
    lab.copy_notebooks(cleared)
    notebook = folders.read_json(cleared / "explore.ipynb")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}  # so that one sees which cells were run here
    folders.write_json(cleared / "explore.ipynb", notebook)
    started = lab.prepare(tmp_path)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "NONDECOUPLING_RESULTS": "results"}
    environment = started.environment | {name: str(tmp_path / folder) for name, folder in places.items()}
    with (tmp_path / "lab.log").open("wb") as log:
        command = [*started.command, "--no-browser"]
        server = subprocess.Popen(command, env=environment | {"MPLBACKEND": ""}, stdout=log, stderr=subprocess.STDOUT)
    ping = started.address.replace("/lab/workspaces/nondecoupling", "/api")

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "lab.log").read_text()
        try:
            return urllib.request.urlopen(ping).status == 200
        except OSError:
            return False

    try:
        until(answers, "JupyterLab starts")
        yield started.address
    finally:
        server.terminate()
        server.wait(timeout=60)  # two kernels end with it


def test_lab_opens_tour_and_explore_which_runs_and_answers_its_bar(browser, lab_address):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector: str, text: str = "") -> Any:
        """The first visible element of the page that matches, None if there is none."""
        found = browser.find_elements(By.CSS_SELECTOR, selector)
        return next((element for element in found if text in element.text and element.is_displayed()), None)

    def plane() -> str:
        """The picture of the closed forms, the last but one of the notebook."""
        pictures = "return [...document.querySelectorAll('.jp-OutputArea-output img')].map(image => image.src)"
        return browser.execute_script(pictures)[-2]

    def outputs() -> int:
        """How many cells of explore show an output."""
        return sum(
            cell.is_displayed()
            for cell in browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell:has(.jp-OutputArea-output)")
        )

    look_like(browser, 1400, "light")
    browser.get(lab_address)
    until(lambda: find(".jp-Notebook", "four figures in five minutes"), "the tour is shown")
    keep_screenshot(browser, "lab-tour")
    until(lambda: find(".lm-TabBar-tab", "explore.ipynb"), "the other tab").click()
    until(lambda: find(".jp-Notebook", "To play"), "explore is shown")
    until(lambda: find(".jp-Notebook-ExecutionIndicator[data-status='idle']"), "its kernel is ready")
    keep_screenshot(browser, "lab-opened")
    assert outputs() == 0
    until(lambda: find(".lm-MenuBar-itemLabel", "Run"), "the menu").click()
    until(lambda: find(".lm-Menu-item[data-command='runmenu:run-all']"), "its entry").click()
    cells = json.loads((folders.REPOSITORY / "notebooks" / "explore.ipynb").read_text(encoding="utf-8"))["cells"]
    committed = sum(bool(cell.get("outputs")) for cell in cells)
    until(lambda: outputs() == committed, "all cells are run", 180)
    assert find("[data-mime-type='application/vnd.jupyter.stderr']") is None
    keep_screenshot(browser, "lab-run")
    assert find(".jp-Notebook", "policies of 'nano (reference)', replication 0")  # those of one are committed
    before = plane()
    slider = until(lambda: find(".widget-slider", "disagreement"), "the bar stays in view")
    slider.find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(Keys.ARROW_RIGHT * 5)
    until(lambda: slider.find_element(By.CSS_SELECTOR, ".widget-readout").text == "0.15", "the slider moves", 10)
    until(lambda: plane() != before, "the picture changes", 10)
    keep_screenshot(browser, "lab-slider")
    typed = until(lambda: find(".widget-text input"), "the sentence")
    typed.send_keys(Keys.CONTROL + "a")
    typed.send_keys("The xyzzy slept." + Keys.ENTER)
    until(lambda: find("mark", "xyzzy"), "the strange word is marked", 20)
    keep_screenshot(browser, "lab-sentence")
    near = ("http://127.0.0.1", "data:", "blob:", "chrome", "file:")
    assert [address for address in requested(browser) if not address.startswith(near)] == []
