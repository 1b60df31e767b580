"""Reports in a real browser: no error, layers that switch, nothing outside of the frame."""

import shutil

import pytest
from oracles.inspections import typed_inspection
from oracles.run_folders import evaluation_line, train_line, write_folder

from switchyard.report import inspection
from switchyard.report.page import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium with chromedriver on this machine: scripts/install_browser.sh installs them (root, Debian)"
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, *QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of two runs, whose experts were typed by hand."""
    folder, load = tmp_path_factory.mktemp("runs"), [[8, 0, 0, 0], [2, 2, 2, 2]]
    moe, long = {"expert_num": 4, "layers": [0, 2]}, "a_long_name_" * 12
    sample = {
        "kind": "sample",
        "step": 20,
        "prompt": "<script>",
        "text": "document.title = 'evil'</script>" + "x" * 900,
    }
    lines = [train_line(1, load), train_line(20, load), evaluation_line(20, 2.5, load), sample]
    runs = [write_folder(folder / name, lines, moe=moe, data={"path": long}) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "inspect", lambda *rest: typed_inspection())
        return write_report(runs, folder / "report.html")


def colours(browser) -> list[str]:
    """Background of the first tokens of the coloured text."""
    spans = "[...document.querySelectorAll('.run:not([hidden]) .text span')]"
    return browser.execute_script(f"return {spans}.slice(0, 4).map(span => span.style.background)")


def open_page(browser, report, fragment: str = "", width: int = 1300):
    browser.get("about:blank")
    browser.set_window_size(width, 900)
    browser.get(report.as_uri() + fragment)


def test_no_error_and_no_script_of_a_text_runs(browser, report):
    open_page(browser, report)
    assert browser.get_log("browser") == []
    assert browser.title == "one · two"
    assert len(browser.find_elements("css selector", ".run:not([hidden]) .card")) == 4
    assert len(browser.find_elements("css selector", "figure svg polyline")) > 8
    text = browser.find_element("css selector", ".run:not([hidden]) .text").text
    assert text.startswith("<b>fox jumps")


def test_layer_switches_by_button_key_and_address(browser, report):
    open_page(browser, report)
    first = colours(browser)
    assert len(set(first)) == 4
    browser.find_elements("css selector", "#layers button")[1].click()
    second = colours(browser)
    assert second == [*first[1:], first[0]]  # each token went one expert further
    assert browser.current_url.endswith("#layer=2&run=0")
    browser.find_element("css selector", "body").send_keys("0")
    assert colours(browser) == first
    open_page(browser, report, "#layer=2&run=1")
    assert colours(browser) == second
    pressed = browser.find_elements("css selector", "[aria-pressed=true]")
    assert {"2", "two"} <= {button.text for button in pressed}


def test_cards_and_heat_maps_follow_the_choice(browser, report):
    open_page(browser, report)
    assert browser.find_element("css selector", ".card .chips b").text == "<b>"
    painted = (
        "const c = document.querySelector('.heat canvas'); return [...c.getContext('2d').getImageData(0, 0, 2, 4).data]"
    )
    light = browser.execute_script(painted)
    assert light[:4] != light[8:12]  # the expert that gets all, and one that gets nothing
    browser.find_element("id", "theme").click()
    assert browser.execute_script(painted) != light
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1300, 800])
def test_nothing_leaves_the_frame(browser, report, width):
    open_page(browser, report, width=width)
    script = """const wide = document.documentElement.clientWidth, inner = (e) => e.closest('.scroll, svg, .context');
        return [document.documentElement.scrollWidth - wide, [...document.querySelectorAll('main *')]
          .filter(e => !inner(e) && e.getBoundingClientRect().right > wide + 1).map(e => e.outerHTML.slice(0, 80))]"""
    beyond, elements = browser.execute_script(script)
    assert (beyond <= 0, elements) == (True, [])
