"""The report as a person uses it: in a real browser, with filters, keyboard, both colour schemes and a narrow window.

Needs Debian's package `chromium` (`apt-get install chromium`); without it these tests are skipped.
"""

import base64
import io
import time

import numpy as np
import pytest
from matplotlib.image import imread

import report
from browser import Browser, find_chromium
from draw_tools import ARC_COLOURS
from report_folders import HARMFUL_NAME, NEAR, SOLUTION, large_run, outcome_tasks, task_file, write_run

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="the Debian package `chromium` is not installed")
READY = "!document.getElementById('tasks').hidden"
NAMES = "[...document.querySelectorAll('#list .task')].map(one => one.textContent)"
ACTIVE = "document.activeElement.id || document.activeElement.textContent.trim()"
CHOOSE = "(id, value) => { const box = document.getElementById(id); box.value = value; " \
         "box.dispatchEvent(new Event('input')); }"
# the lowest contrast of text with what is behind it, with that text; colours are opaque on this page
CONTRAST = """(() => {
  const light = text => {
    const part = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(c => part(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = one => {
    while (one && getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;
    return getComputedStyle(one || document.body).backgroundColor;
  };
  const texts = [...document.querySelectorAll('body *')].filter(one => one.checkVisibility() &&
    [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const found = texts.map(one => {
    const style = getComputedStyle(one);
    const [a, b] = [light(one instanceof SVGElement ? style.fill : style.color), light(behind(one))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.textContent.trim().slice(0, 30)];
  });
  return found.sort((a, b) => a[0] - b[0])[0].concat(found.length);
})()"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = outcome_tasks()
    files[HARMFUL_NAME] = task_file(HARMFUL_NAME, [(SOLUTION, 2, 0.5)])
    files["unknown"] = task_file("unknown", [(NEAR, 2, 0.5)], solution=None)
    large = [[(row + column) % 10 for column in range(30)] for row in range(30)]
    files["wide"] = task_file("wide", [(large, 2, 0.5), (large[:20], 2, 0.75), (NEAR, 1, 20.0)], solution=large,
                              seconds=9.5)
    folder = write_run(tmp_path_factory.mktemp("report") / "run", files, tasks=[*files, "later"])
    report.write_report(folder)
    return folder


@pytest.fixture
def page(browser, folder):
    """The report, open in a wide window with light colours; at the end it must have logged and fetched nothing."""
    browser.look()
    address = (folder / "report.html").as_uri()
    browser.open(address)
    assert browser.run(READY)
    yield browser
    assert browser.complaints == [] and browser.requests == [address]


def names(page):
    return page.run(NAMES)


def open_task(page, name):
    """Open a task; return the text of what it shows."""
    return page.run(f"""(async () => {{
        const all = [...document.querySelectorAll('#list > li > details')];
        const one = all.find(each => each.querySelector('.task').textContent === {name!r});
        one.open = true;
        await new Promise(done => setTimeout(done, 50));
        one.scrollIntoView();
        return one.querySelector('.body').innerText;
    }})()""")


def test_filters_and_order(page):
    everything = ["empty", "later", "missed", "outranked", "solved", "unknown", "wide"]
    assert names(page) == [HARMFUL_NAME, *everything]
    for control, value, expected in (
            ("name", " SOL ", ["solved"]), ("name", "nothing", []), ("name", "", [HARMFUL_NAME, *everything]),
            ("outcome", "solved", [HARMFUL_NAME, "solved", "wide"]), ("outcome", "not found", ["missed"]),
            ("outcome", "found but not submitted", ["outranked"]), ("outcome", "no candidates", ["empty"]),
            ("outcome", "solution unknown", ["unknown"]), ("outcome", "not finished", ["later"]), ("outcome", "", None),
            ("side", "4", ["wide"]), ("side", "unknown", ["later"]), ("side", "", None)):
        page.run(f"({CHOOSE})({control!r}, {value!r})")
        assert expected is None or names(page) == expected, (control, value)
        assert page.run("document.getElementById('count').textContent").startswith(f"{len(names(page))} of 8 tasks")
    page.run(f"({CHOOSE})('sort', 'candidates')")
    assert names(page)[:4] == ["empty", "later", HARMFUL_NAME, "unknown"]
    page.run("document.getElementById('descending').click()")
    assert names(page)[:2] == ["outranked", "wide"]
    for by in ("seconds", "size"):
        page.run(f"({CHOOSE})('sort', {by!r})")
        assert names(page)[0] == "wide"
    page.run("document.querySelector('button[type=reset]').click(); new Promise(done => setTimeout(done, 20))")
    assert names(page) == [HARMFUL_NAME, *everything]


def test_a_wrong_task_says_why_and_shows_its_candidates(page):
    text = open_task(page, "outranked")
    for words in ("2 demonstration pairs", "found but not submitted", "Found in 2 of 16 views, rank 3", "query, 1 × 2",
                  "solution, 2 × 2", "3 candidates, best first", "Attempt 1", "Attempt 2", "Candidate 3 ✓ correct",
                  "product_of_experts 2.25", "Differs from the solution in 1 of 4 cells", "Found in 12 of 16 views"):
        assert words in text, words
    labels = page.run("[...document.querySelectorAll('.body canvas')].map(one => one.ariaLabel)")
    assert "solution, 2 rows, 2 columns: 12, 34" in labels and len(labels) == 9
    charts = page.run("[...document.querySelectorAll('.chart')].map(one => [one.querySelectorAll('.scored').length, "
                      "one.querySelectorAll('.found').length, one.querySelectorAll('.threshold').length])")
    assert charts == [[16, 12, 1], [16, 3, 1], [16, 2, 1]]
    page.run("document.querySelector('.candidate details').open = true; new Promise(done => setTimeout(done, 50))")
    assert page.run("document.querySelectorAll('.candidate tbody tr').length") == 16
    page.run("document.querySelector('#list details[open]').open = false; new Promise(done => setTimeout(done, 50))")
    assert page.run("document.querySelectorAll('canvas').length") == 0


def pixels(page, canvas):
    """Return the picture (rows, columns, RGB) that a canvas with this selector shows."""
    data = page.run(f"document.querySelector({canvas!r}).toDataURL()").split(",")[1]
    return np.round(255 * imread(io.BytesIO(base64.b64decode(data)))[..., :3]).astype(int)


def test_a_right_task_has_the_arc_colours_and_digits_on_demand(page):
    assert "Solved by attempt 1" in open_task(page, "solved")
    solution = "canvas[aria-label^='solution']"
    picture = pixels(page, solution)
    height, width, _ = picture.shape
    for value, (row, column) in ((1, (1, 1)), (2, (1, 3)), (3, (3, 1)), (4, (3, 3))):
        expected = [int(ARC_COLOURS[value][i:i + 2], 16) for i in (1, 3, 5)]
        assert picture[row * height // 4, column * width // 4].tolist() == expected
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 5, "four colours and the lines"
    page.run("document.getElementById('digits').click()")
    assert len(np.unique(pixels(page, solution).reshape(-1, 3), axis=0)) > 5
    wrong = ".candidate:nth-child(2) canvas"
    before = pixels(page, wrong)
    page.run("document.getElementById('marks').click()")
    assert (pixels(page, wrong) != before).any(), "marks of wrong cells"


def test_the_largest_grids_fit_a_narrow_window(page):
    for width in (1200, 400):
        page.look(width=width)
        text = open_task(page, "wide")
        assert "solution, 30 × 30" in text and "Other size than the solution: 20 × 30" in text
        assert page.run(TOO_WIDE) <= 0
        page.run("document.getElementById('digits').click()")
        cell = page.run("(document.querySelector(\"canvas[aria-label^='solution']\").clientWidth - 1) / 30")
        assert cell >= 12 and page.run(TOO_WIDE) <= 0
        page.run("document.getElementById('digits').click()")


def test_other_outcomes_can_be_opened(page):
    assert "No candidate at all" in open_task(page, "empty")
    assert open_task(page, "later").strip() == "not finished"
    assert "The solution is not known." in open_task(page, "unknown")


def test_harmful_names_are_only_text(page):
    assert "Solved by attempt 1" in open_task(page, HARMFUL_NAME)
    assert page.run("document.querySelectorAll('img').length") == 0


def test_keyboard_alone(page):
    page.press("Tab")
    assert page.run(ACTIVE) == "Skip to the tasks"
    page.press("Enter", "Tab")
    assert page.run(ACTIVE) == "name"
    page.press(*"miss")
    assert names(page) == ["missed"]
    for expected in ("outcome", "side", "sort", "descending", "digits", "marks"):
        page.press("Tab")
        assert page.run(ACTIVE) == expected
    page.press("Tab", "Tab")
    assert page.run("document.activeElement.matches('summary:focus-visible')")
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert page.run("document.querySelector('#list details').open && document.querySelectorAll('canvas').length > 5")
    page.press("Tab", "Space")
    assert page.run("document.querySelector('.candidate details').open")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_enough_in_both_schemes(page, dark):
    page.look(dark=dark)
    for name in ("outranked", "empty", "solved", "unknown"):
        open_task(page, name)
    lowest, text, n_texts = page.run(CONTRAST)
    assert n_texts > 150 and lowest >= 4.5, text
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_every_control_has_a_name(page):
    open_task(page, "outranked")
    unnamed = page.run("[...document.querySelectorAll('input, select, button')].filter(one => "
                       "!(one.labels && one.labels.length) && !one.textContent.trim()).length + "
                       "document.querySelectorAll('canvas:not([aria-label]), svg:not([aria-label]):not([aria-hidden])')"
                       ".length")
    assert unnamed == 0


def test_without_javascript_the_summary_stays(page, folder):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open((folder / "report.html").as_uri())
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        shown = [page.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"] > 0
                 for selector in ("noscript p", ".card", "#tasks[hidden]", "#list > li")]
        assert shown == [True, True, True, False]
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_400_tasks_can_be_used_within_three_seconds(browser, tmp_path):
    path = report.write_report(large_run(tmp_path / "run"))
    browser.look()
    start = time.perf_counter()
    browser.open(path.as_uri())
    assert browser.run(READY) and browser.run("document.querySelectorAll('#list > li').length") == 400
    loaded = time.perf_counter() - start
    text = open_task(browser, "task399")
    assert "solution, 30 × 30" in text and "10 candidates" in text
    assert loaded < 3 and time.perf_counter() - start < 5
    browser.run(f"({CHOOSE})('outcome', 'not found')")
    assert len(names(browser)) == 200 and browser.complaints == []
