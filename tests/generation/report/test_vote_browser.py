"""The vote page as a person uses it, in a real browser; skipped where none is installed."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_folders import write_evaluation

from ldm.generation.report import EvaluationFolder, count, curves, make_ballot, read_votes, report_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
selenium = pytest.importorskip("selenium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1100,900"),
)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def browser(tmp_path: Path, downloads: Path) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def ballot(tmp_path: Path) -> Any:
    folders = [write_evaluation(tmp_path / name, num=6, first_picture=50 * i) for i, name in enumerate("ab")]
    made = make_ballot(*map(EvaluationFolder, folders))
    (tmp_path / "vote.html").write_text(made.html, encoding="utf-8")
    return made


@pytest.fixture
def press(browser: Any) -> Callable[..., None]:
    from selenium.webdriver.common.action_chains import ActionChains

    return lambda *keys: ActionChains(browser).send_keys(*keys).perform()


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def mistakes(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_person_votes_by_keys_and_mouse_and_downloads_what_counts(
    browser: Any, ballot: Any, press: Callable[..., None], tmp_path: Path, downloads: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get((tmp_path / "vote.html").as_uri())
    assert text(browser, "progress") == "pair 1 of 6"
    assert browser.execute_script("return document.getElementById('left-picture').naturalWidth") == 32
    shown = [browser.find_element("id", f"{side}-picture").get_attribute("src") for side in ("left", "right")]
    press(Keys.ARROW_LEFT)
    browser.find_element("id", "right").click()
    press(Keys.ARROW_DOWN)
    press("2")
    assert text(browser, "progress") == "pair 5 of 6"
    press(Keys.BACKSPACE)
    assert text(browser, "progress") == "pair 4 of 6"
    for _ in range(8):
        browser.refresh()
        assert text(browser, "progress") == "pair 4 of 6"
    browser.find_element("id", "voter").send_keys("Ada 12")
    assert text(browser, "progress") == "pair 4 of 6"
    browser.find_element("id", "tie").click()
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(browser, "progress") == "6 of 6"
    assert "All pairs are voted on" in text(browser, "done")
    browser.find_element("id", "download").click()
    file = wait_for(downloads, "votes-*.json")
    votes, repeated = read_votes([file], ballot.key)
    assert (len(votes), repeated) == (6, 0)
    content = json.loads(file.read_text())
    assert content["voter"] == "Ada 12"
    left = [vote.get("choice") == vote["left"] for vote in content["votes"]]
    assert left == [True, False, False, False, False, False]
    assert [vote["choice"] for vote in content["votes"]].count("tie") == 2
    first = content["votes"][0]
    pictures = json.loads(ballot.html.split('id="pairs">')[1].split("</script>")[0])["pairs"][first["pair"]]["pictures"]
    assert shown == [pictures[first["left"]], pictures[1 - first["left"]]]
    assert count(votes).ties == 2
    assert mistakes(browser) == []


def test_votes_outlive_the_tab(browser: Any, ballot: Any, press: Callable[..., None], tmp_path: Path) -> None:
    browser.get((tmp_path / "vote.html").as_uri())
    press("1")
    assert text(browser, "progress") == "pair 2 of 6"
    browser.switch_to.new_window("tab")
    browser.get((tmp_path / "vote.html").as_uri())
    until(lambda: browser.refresh() or text(browser, "progress") == "pair 2 of 6")


def test_a_person_can_start_again(browser: Any, ballot: Any, press: Callable[..., None], tmp_path: Path) -> None:
    browser.get((tmp_path / "vote.html").as_uri())
    press("1")
    browser.find_element("id", "restart").click()
    browser.switch_to.alert.dismiss()
    assert text(browser, "progress") == "pair 2 of 6"
    browser.find_element("id", "restart").click()
    browser.switch_to.alert.accept()
    assert text(browser, "progress") == "pair 1 of 6"


def test_a_report_shows_its_pictures_and_breaks_no_rule_of_its_own(browser: Any, tmp_path: Path) -> None:
    found = []
    for name, scale in (("one", 1.0), ("two", 2.0)):
        told = {"guidance": {"scale": scale}}
        found.append(EvaluationFolder(write_evaluation(tmp_path / name, num=4, fid=scale, protocol=told)))
    file = tmp_path / "report.html"
    file.write_text(report_page(found, curves=curves(found)), encoding="utf-8")
    browser.get(file.as_uri())
    # Those that are folded away load when they are unfolded.
    browser.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    browser.execute_script("document.querySelectorAll('img').forEach((one) => { one.loading = 'eager'; })")
    whole = "return [...document.images].length > 8 && [...document.images].every((one) => one.naturalWidth > 0)"
    until(lambda: browser.execute_script(whole))
    width = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(width)
    browser.set_window_size(400, 800)
    assert browser.execute_script(width)
    browser.set_window_size(1100, 900)
    assert mistakes(browser) == []


def wait_for(folder: Path, pattern: str) -> Path:
    until(lambda: list(folder.glob(pattern)))
    return next(folder.glob(pattern))


def until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
