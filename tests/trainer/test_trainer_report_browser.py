"""The page in a real browser, from disk: charts are drawn, nothing is asked of any host, nothing is wrong.

Needs Debian's chromium: `make test-system` installs it. Screenshots are kept under
pytest's own temporary directory; `pytest --basetemp DIR` says where.
"""

import pytest
from browser import find_browser, running_browser
from made_runs import made_run

from basestone.trainer.report.page import write_report

pytestmark = pytest.mark.system
CHARTS_DRAWN = """
[...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 50 &&
  [...svg.querySelectorAll("polyline, polygon")].some(line => line.getBBox().width > 100)).length
"""
OVERLAPS = """
[...document.querySelectorAll("svg")].filter(svg => {
  const ticks = [...svg.querySelectorAll('.tick[text-anchor="middle"]')].map(one => one.getBoundingClientRect());
  return ticks.some((one, i) => i > 0 && one.left < ticks[i - 1].right);
}).length
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pages(folder):
    runs = [made_run(folder / "a" / "run", 3000), made_run(folder / "b" / "run", 2400, lr=3e-4, seed=2)]
    never = folder / "never" / "run"
    never.mkdir(parents=True)
    (never / "lock").touch()
    return {
        "one": write_report(runs[:1], folder / "one.html"),
        "two": write_report(runs, folder / "two.html"),
        "never": write_report([never], folder / "never.html"),
    }


@pytest.fixture(scope="module")
def browser(folder):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, as root with a network)")
    with running_browser(path, folder / "profile") as opened:
        yield opened


@pytest.mark.parametrize(("name", "num_charts"), [("one", 13), ("two", 9 + 2 * 13), ("never", 0)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opens_from_disk(browser, pages, folder, name, num_charts, scheme):
    browser.colour_scheme(scheme)
    seconds = browser.open(pages[name])
    print(f"{name}, {scheme}: opened in {seconds:.2f} s")
    assert browser.problems() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.value(CHARTS_DRAWN) == num_charts
    assert browser.value(OVERLAPS) == 0
    page, ink = (
        browser.value(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color")
    )
    assert (page, ink) == {
        "light": ("rgb(255, 255, 255)", "rgb(28, 33, 39)"),
        "dark": ("rgb(20, 24, 29)", "rgb(228, 232, 236)"),
    }[scheme]
    for width in (1240, 420):
        browser.screenshot(folder / f"{name}_{scheme}_{width}.png", width)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth"), f"{width} px is too narrow"


def test_paper_is_light_and_has_the_folded_runs(browser, pages, folder):
    browser.colour_scheme("dark", "print")
    browser.open(pages["two"])
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") > 8
    browser.colour_scheme("light")


def test_a_page_with_a_fault_is_caught(browser, pages, folder):
    """The tests above would see an error, a request and a chart that is not drawn."""
    text = pages["one"].read_text()
    spoilt = folder / "spoilt.html"
    image = '<img src="http://127.0.0.1:9/x.png"><script>nothing.at.all()</script>'
    spoilt.write_text(text.replace("<polyline", "<nothing").replace("<polygon", "<nothing") + image)
    browser.open(spoilt)
    assert any("nothing" in problem for problem in browser.problems())
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.value(CHARTS_DRAWN) == 0
