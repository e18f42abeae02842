from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import pytest

from pytest_gpumem import records
from pytest_gpumem.cli import main as cli
from pytest_gpumem.records import (
    Card,
    CardUsage,
    FixtureUsage,
    Holder,
    LeaseUsage,
    RecordedTest,
    RunRecord,
    ScopeUsage,
)

pytest.importorskip("plotly")

HOSTILE = "test_a.py::test_x[</script><script>document.title='broken'</script><b>&\"']"
MIB = 2**20
CARD = Card("GPU-1", "A <card>", 4096 * MIB)


def usage(peak, leaked=0, holders=()):
    return CardUsage(
        "GPU-1", 0, peak * MIB, leaked, peak * MIB, peak * MIB, 0, 0, None, leaked, holders
    )


def run():
    holder = Holder("test_a.py: module global CACHE['<i>']", (4, 4), "float32", 64 * MIB)
    oom = "CUDA out of memory. Tried to allocate 5.00 GiB"
    tests = (
        RecordedTest(HOSTILE, "passed", 1.0, "gw0", (usage(100),), start=10.0),
        RecordedTest("test_a.py::test_leak", "passed", 1.0, "gw1",
                     (usage(300, 64 * MIB, (holder,)),), start=10.5,
                     lease=LeaseUsage(("GPU-1",), 400 * MIB, False, 0.25)),
        RecordedTest("test_a.py::test_oom", "failed", 0.5, "gw0", (usage(20),), oom=oom,
                     start=11.0),
        RecordedTest("test_b.py::test_again", "rerun", 0.5, "gw1", (usage(30),), oom=oom,
                     start=11.5),
        RecordedTest("test_b.py::test_again", "passed", 0.5, "gw1", (usage(30),), start=12.0),
        RecordedTest("test_b.py::test_cpu", "passed", 0.5, "gw0", start=12.0),
    )  # fmt: skip
    return RunRecord(records.SCHEMA, "on", (CARD,), True, 2, tests, ("a <note>",), 384 * MIB)


@pytest.fixture
def page(tmp_path, capsys):
    records.save(run(), tmp_path / "run.json")
    assert cli.main(["report", str(tmp_path / "run.json"), "--html", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'p.html'}\n"
    return tmp_path / "p.html"


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(page):
    text = page.read_text(encoding="utf-8")
    own = text[text.index("<h2>Out of memory") :]

    assert escape(HOSTILE) in own
    assert "<script>document.title" not in text
    assert " src=" not in own
    assert "A &lt;card&gt;" in text
    assert "held by <code>test_a.py: module global CACHE[&#x27;&lt;i&gt;&#x27;]" in own


def test_the_page_says_when_it_ran_and_how_and_is_small_when_its_library_is_linked(tmp_path):
    told = run()._replace(command="pytest -k '<a>'", commit="abc123-dirty")
    scope = ScopeUsage("module", "test_a.py", "GPU-1", 3 * MIB)
    tests = (told.tests[0]._replace(scopes=(scope,)), *told.tests[1:])
    records.save(told._replace(tests=tests), tmp_path / "run.json")
    command = ["report", str(tmp_path / "run.json"), "--html", str(tmp_path / "p.html")]

    assert cli.main([*command, "--linked"]) == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert "<p>1970-01-01 00:00 UTC, commit abc123-dirty</p>" in text
    assert "which was not loaded" in text  # where the timeline would be
    assert "<code>pytest -k &#x27;&lt;a&gt;&#x27;</code>" in text
    assert '<td class="n">3.00 MiB</td><td>test_a.py</td>' in text


def test_many_that_ran_out_are_ranked_by_cause_as_forensics_ranks_them(tmp_path, capsys):
    ooms = [f"out of memory. Tried to allocate {size}" for size in ("2.00 MiB", *2 * ["5.00 GiB"])]
    failed = tuple(
        RecordedTest(f"test_a.py::test_{at}", "failed", 1.0, "gw0", (usage(20),),
                     oom=f"CUDA {oom}", start=at)
        for at, oom in enumerate(ooms)
    )  # fmt: skip
    records.save(run()._replace(tests=failed), tmp_path / "run.json")
    paths = str(tmp_path / "run.json"), str(tmp_path / "p.html")
    cli.main(["report", paths[0], "--html", paths[1]])
    cli.main(["forensics", paths[0]])

    told = capsys.readouterr().out
    page = Path(paths[1]).read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles.pop() == "One by one"
    assert titles[0].startswith("2 tests: ")
    assert titles[1].startswith("1 test: ")
    assert [title in told for title in titles] == [True] * len(titles)
    assert page.index("<h3>") < page.index('id="cascade"')


def made_of(tests, tmp_path, **told):
    records.save(run()._replace(tests=tuple(tests), **told), tmp_path / "run.json")
    path = tmp_path / "p.html"
    assert cli.main(["report", str(tmp_path / "run.json"), "--html", str(path), "--linked"]) == 0
    return path.read_text(encoding="utf-8")


def test_leaks_of_one_kind_are_one_entry_and_a_fixture_is_named_before_its_test(tmp_path):
    def leaks(name, size, where, **more):
        holder = Holder(where, (4, 4), "float32", size * MIB)
        return RecordedTest(name, "passed", 1.0, "", (usage(size, size * MIB, (holder,)),), **more)

    kept = FixtureUsage("model", "module", "GPU-1", 8 * MIB, 8 * MIB, 0, 8 * MIB, ())
    page = made_of(
        [
            *(
                leaks(f"a.py::test_{at}", at + 1, f"a.py: module global KEPT[{at}]")
                for at in range(5)
            ),
            leaks("b.py::test_b", 3, "b.py: module global CACHE", fixtures=(kept,)),
        ],
        tmp_path,
    )
    shown = page[page.index('id="leaks"') : page.index('id="tests"')]

    assert shown.count("<details open>") == 3
    assert "<summary><b>5.00 MiB</b> by a.py::test_4</summary>" in shown
    assert "likewise 10.00 MiB in 4 leaks" in shown
    assert shown.count("KEPT[") == 1
    assert "<b>8.00 MiB</b> by fixture model (module), torn down after b.py::test_b" in shown


@pytest.mark.parametrize(("number", "more"), [(10, 0), (11, 1), (150, 140)])
def test_what_ran_out_of_memory_is_folded_where_it_is_long(tmp_path, number, more):
    tests = (
        RecordedTest(f"a.py::test_{at}", "failed", 1.0, "", (usage(20),),
                     oom=f"CUDA out of memory. Tried to allocate {at + 1}.00 GiB", start=at)
        for at in range(number)
    )  # fmt: skip
    page = made_of(tests, tmp_path)
    shown = page[page.index('id="cascade"') : page.index('id="tests"')]

    assert shown.count('class="cause"') == number
    assert shown.count("<details>") + shown.count("<details open>") == number + bool(more)
    assert shown.count("</details>") == number + bool(more)
    assert (f"<summary>{more} more</summary>" in shown) == bool(more)


@pytest.mark.parametrize(("outcome", "kind"), [("failed", "bad"), ("error", "bad"), ("passed", "")])
def test_figures_are_red_where_something_is_wrong(tmp_path, outcome, kind):
    page = made_of([RecordedTest("a.py::test_a", outcome, 1.0, "")], tmp_path, workers=0)

    bad = int(outcome != "passed")
    assert f'<div class="figure {kind}"><b>{bad}</b><span>failed or error</span>' in page
    assert "<b>1</b><span>worker</span>" in page


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    records.save(run(), tmp_path / "run.json")
    missing = tmp_path / "none" / "p.html"

    assert cli.main(["report", str(tmp_path / "run.json"), "--html", str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"gpumem report: error: '{missing}': No such file or directory\n"
    )


def test_the_example_in_the_documents_still_makes_a_page(tmp_path):
    example = Path(__file__).parents[3] / "docs" / "page-example.json"

    assert cli.main(["report", str(example), "--html", str(tmp_path / "p.html")]) == 0
    assert "felled 3 tests" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_a_run_without_tests_has_a_page(tmp_path, capsys):
    records.save(run()._replace(tests=(), cards=()), tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json"), "--html", str(tmp_path / "p.html")]) == 0


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_a_run_writes_its_page_where_it_is_asked_to(tmp_path, options):
    (tmp_path / "test_it.py").write_text("def test_x(): ...\n")
    command = [sys.executable, "-m", "pytest", "-p", "gpumem", "-q", "--gpumem-html=p.html"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, check=False)

    assert done.returncode == 0, done.stdout
    assert "test_it.py::test_x" in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.fixture
def browser(monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver here: the page is not opened")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


def test_the_page_works_in_a_browser(page, browser):
    def column(number):
        cells = browser.find_elements("css selector", f"#tests tbody td:nth-child({number})")
        return [cell.text for cell in cells if cell.is_displayed()]

    def click(selector):
        browser.execute_script(
            "arguments[0].click()", browser.find_element("css selector", selector)
        )

    def back():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    def ink():
        return browser.execute_script(
            "return getComputedStyle(document.querySelector('#timeline .ytick text')).fill"
        )

    def scheme(name):
        feature = {"name": "prefers-color-scheme", "value": name}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        time.sleep(0.2)

    browser.get(page.as_uri())
    scheme("light")
    assert (back(), ink()) == ("rgb(255, 255, 255)", "rgb(28, 32, 36)")
    scheme("dark")
    assert (back(), ink()) == ("rgb(20, 23, 26)", "rgb(228, 230, 234)")
    click("#tests tbody tr:first-child a")
    time.sleep(0.2)
    begin, end = browser.execute_script(
        "return document.getElementById('timeline').layout.xaxis.range"
    )
    # test_leak, whose lease it waited for, ran from 0.75 to 1.75 s
    assert begin < 0.75
    assert end > 1.75
    assert end - begin < 6

    assert browser.title == "GPU memory"
    assert browser.find_elements("css selector", "#timeline svg .scatterlayer path.js-line")
    assert len(browser.find_elements("css selector", "#timeline svg .barlayer .point")) == 6
    assert len(browser.find_elements("css selector", "#timeline .scatterlayer path.point")) == 4
    assert column(1)[0] == "test_a.py::test_leak"
    click("#tests th:nth-child(4) button")
    assert [float(text) for text in column(4)] == sorted(map(float, column(4)), reverse=True)
    click("#tests th:nth-child(4) button")
    assert [float(text) for text in column(4)] == sorted(map(float, column(4)))
    click("#tests th:nth-child(1) button")
    assert column(1) == sorted(column(1))
    browser.find_element("id", "filter").send_keys("gw1 rerun")
    assert column(1) == ["test_b.py::test_again"]
    assert browser.find_element("id", "shown").text == "1 of 6 tests"
    event = browser.find_element("css selector", "#cascade details")
    assert "one request larger than the card" in event.text
    assert event.find_elements("css selector", "pre")[0].is_displayed()
    click("#cascade summary")
    assert not event.find_elements("css selector", "pre")[0].is_displayed()
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0
    assert browser.get_log("browser") == []
