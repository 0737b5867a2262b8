"""The page in a headless Chromium: `make test-extras`. It clicks, sorts and filters, and compares what is shown with
the ledger. No part of `make test`, since it needs a browser: Debian's package `chromium`, or another of its kind."""

import json
import os
import random
from pathlib import Path

import pytest

from prepare.words import printable
from tests.helpers.chromium import Browser
from tests.helpers.ledger_entries import add, entry
from tests.helpers.night_page import evals_of, of_seeds, rows_of, write_run
from train.report import main as report_main
from train.results.judge import experiments
from train.results.ledger import Ledger

HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "$x^2$ $$y$$ \\(z\\)", "\u05e9\u05dc\u05d5\u05dd abc",
    "a\udcff \u202e\ud800", "{{x}} @seed @{bpb}{safe}", "x" * 100_000,
)  # fmt: skip
# What the plotting library calls the night's picture.
VIEW = "[...Bokeh.index].filter((v) => v.frame_view && document.querySelector('#night').contains(v.el)).at(-1)"
# What stands beside the pointer.
TOLD = "[...document.querySelectorAll('.bk-Tooltip')].map((e) => e.shadowRoot.textContent).join('')"


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Path:
    return make_night(tmp_path_factory.mktemp("night") / "runs")


def make_night(folder: Path) -> Path:
    """Twenty-six experiments; all that a page can show is among them."""
    ledger, rng = Ledger(folder), random.Random(1)
    add(ledger, *of_seeds("base", 1.000, 1.004, 0.996, description="baseline", time="2026-11-24T20:00:00+00:00"))
    add(ledger, *of_seeds("gain", 0.950, 0.951, description="wider", time="2026-11-24T20:30:00+00:00"))
    for i, words in enumerate(HOSTILE):
        time = f"2026-11-24T21:{i:02d}:00+00:00"
        add(ledger, entry(f"hostile{i}", 0.96 + i / 100, description=words, flags=[words], time=time))
    for i in range(17):
        time = f"2026-11-24T22:{i:02d}:00+00:00"
        bpb = rng.uniform(0.95, 1.3)
        add(ledger, entry(f"idea{i}", None if i % 9 == 4 else bpb, description=f"idea {i}", time=time))
    for run in ledger.runs():
        sample = next((w for w in HOSTILE[:3] if run["description"] == w), "text")
        write_run(folder / run["run"], steps=300, sample=sample, changes=f"+ {sample}\n- x\n")
    return folder


@pytest.fixture
def page(night) -> Path:
    assert report_main([str(night)]) == 0
    return night / "report.html"


@pytest.fixture
def browser(tmp_path, request):
    wide = getattr(request, "param", "desktop") == "desktop"
    browser = Browser(tmp_path / "profile", *((1366, 900) if wide else (390, 844)), touch=not wide)
    yield browser
    browser.close()


def shown(browser, page) -> None:
    """Opens the page, until its picture is drawn."""
    browser.open(page, "window.Bokeh && document.querySelector('#night').firstElementChild?.shadowRoot")
    browser.until(f"{VIEW}?.frame.bbox.width > 0")


def no_complaint(browser, page) -> None:
    """No error, no warning, no dialog, and nothing was asked for but the file and what lies inside it."""
    assert browser.log == []
    assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == {page.resolve().as_uri()}


def column(browser, index: int) -> list[str]:
    return browser.value(
        "[...document.querySelectorAll('#table tbody tr')].filter((row) => !row.hidden)"
        f".map((row) => row.cells[{index}].textContent)"
    )


def means(night) -> dict[int, float | None]:
    """By number of the experiment, from the ledger itself."""
    groups = experiments(Ledger(night).runs()).values()
    numbers = [[*group.numbers.values()] for group in groups]
    return {i: sum(values) / len(values) if values else None for i, values in enumerate(numbers, 1)}


def test_the_table_is_the_ledgers_and_sorts(browser, page, night):
    shown(browser, page)
    wanted = means(night)
    assert column(browser, 3) == ["" if mean is None else f"{mean:.6f}" for mean in wanted.values()]
    with_numbers = sorted(mean for mean in wanted.values() if mean is not None)
    without = [""] * (len(wanted) - len(with_numbers))
    for order in (with_numbers, with_numbers[::-1]):
        browser.click("#table th:nth-child(4) button")
        assert column(browser, 3) == [*(f"{mean:.6f}" for mean in order), *without]
    assert browser.value("document.querySelector('#table th:nth-child(4)').ariaSort") == "descending"
    browser.click("#table th:nth-child(1) button")
    assert column(browser, 0) == [str(number) for number in wanted]
    browser.click("#table th:nth-child(2) button")
    names = column(browser, 1)
    assert names.index("baseline") < names.index("idea 0") < names.index("idea 10") < names.index("wider")
    no_complaint(browser, page)


def test_the_table_filters(browser, page, night):
    shown(browser, page)
    browser.click("#find")
    browser.type("idea 1")
    assert column(browser, 1) == ["idea 1", *(f"idea {i}" for i in range(10, 17))]
    assert browser.value("document.querySelector('#count').textContent") == "8 of 26"
    browser.value("document.querySelector('#find').value = ''")
    browser.value("(() => { const e = document.querySelector('#only'); e.value = 'crashed';"
                  " e.dispatchEvent(new Event('change')); })()")  # fmt: skip
    crashed = [run["description"] for run in Ledger(night).runs() if run["outcome"] == "failed"]
    assert column(browser, 1) == crashed == ["idea 4", "idea 13"]
    no_complaint(browser, page)


def test_what_was_evaluated_on_the_way_is_drawn(browser, night):
    """Over the incumbent's, in a chart of its own; also of one evaluation, which makes no line."""
    for run, steps in (("base-42", (90, 180, 270)), ("gain-42", (100, 200, 300)), ("gain-43", (100,))):
        (night / run / "evals.jsonl").write_text(evals_of(*steps))
    assert report_main([str(night)]) == 0
    page = night / "report.html"
    shown(browser, page)
    browser.click('#table tr[data-number="2"] td:nth-child(2)')
    browser.until("document.querySelector('#shown .chart.evals')?.firstElementChild?.shadowRoot")
    assert browser.value("document.querySelectorAll('#shown .chart').length") == 2
    legend = "document.querySelector('#shown .chart.evals').nextElementSibling.textContent"
    assert browser.value(legend) == "incumbent, seed 42this, seed 42this, seed 43"
    view = VIEW.replace("#night", "#shown .chart.evals")
    browser.until(f"{view}?.frame.bbox.width > 0")
    assert browser.value(f"{view}.model.left[0].axis_label") == "val_bpb on a small part"
    assert browser.value(f"{view}.model.renderers.map((r) => r.data_source.data.y.length)") == [3, 3, 3, 3, 1, 1]
    browser.click("#close")
    browser.click('#table tr[data-number="3"] td:nth-child(2)')  # one without: no such chart
    assert browser.value("document.querySelectorAll('#shown .chart.evals').length") == 0
    for run in ("base-42", "gain-42", "gain-43"):
        (night / run / "evals.jsonl").unlink()
    no_complaint(browser, page)


def test_hostile_words_are_shown_as_they_are(browser, page):
    shown(browser, page)
    for number, words in enumerate(HOSTILE, 3):
        browser.click(f'#table tr[data-number="{number}"] td:nth-child(2)')
        browser.until("document.querySelector('#dialog').open")
        text = browser.value("document.querySelector('#shown').textContent")
        assert printable(words) in text
        browser.until("document.querySelector('#shown .chart').firstElementChild?.shadowRoot")
        browser.click("#close")
    assert browser.value("document.querySelectorAll('img, #shown script, #articles script').length") == 0
    no_complaint(browser, page)


def place_of(browser, x: float, y: float) -> list[float]:
    """Where on the screen the night's picture has a value."""
    return browser.value(f"""(() => {{
      const e = document.querySelector('#night'); e.scrollIntoView({{block: 'center', behavior: 'instant'}});
      const view = {VIEW};
      const frame = view.frame, box = view.canvas_view.el.getBoundingClientRect();
      return [box.x + frame.x_scale.compute({x}), box.y + frame.y_scale.compute({y})];
    }})()""")


def test_the_picture_answers_to_a_pointer(browser, page):
    shown(browser, page)
    browser.move_to(*place_of(browser, 2, 0.951))
    browser.until(f"{TOLD}.includes('0.951000')")
    assert "wider" in browser.value(TOLD)
    browser.move_to(*place_of(browser, 3, 0.96))
    browser.until(f"{TOLD}.includes('<script>alert(1)</script>')")
    browser.move_to(*place_of(browser, 8, 1.01))
    browser.until(f"{TOLD}.includes('@{{bpb}}{{safe}}')")
    browser.click_at(*place_of(browser, 2, 0.95))
    browser.until("document.querySelector('#dialog').open")
    assert browser.value("document.querySelector('#shown h2').textContent") == "#2 wider"
    browser.click("#on")
    assert browser.value("document.querySelector('#shown h2').textContent") == "#3 <script>alert(1)</script>"
    assert browser.value("document.querySelectorAll('#shown article').length") == 1
    assert "over those of the incumbent, #2 wider" in browser.value("document.querySelector('#shown').textContent")
    legend = "incumbent, seed 42incumbent, seed 43this, seed 42"
    browser.until(f"document.querySelector('#shown .legend')?.textContent === '{legend}'")
    no_complaint(browser, page)


def test_along_time(browser, page):
    shown(browser, page)
    label = f"{VIEW}.model.below[0].axis_label"
    assert browser.value(label) == "experiment"
    browser.value("(() => { const e = document.querySelector('#along'); e.value = 'time';"
                  " e.dispatchEvent(new Event('change')); })()")  # fmt: skip
    browser.until(f"{label} === 'when the run ended (UTC)'")
    no_complaint(browser, page)


def test_what_a_reader_chose_outlives_the_next_page(browser, page):
    shown(browser, page)
    browser.click("#table th:nth-child(4) button")
    browser.click("#find")
    browser.type("idea")
    before = column(browser, 1)
    browser.click('#table tr[data-number="12"] td:nth-child(2)')
    title = browser.value("document.querySelector('#shown h2').textContent")
    shown(browser, page)  # as the page does that is made anew
    browser.until("document.querySelector('#dialog').open")
    assert browser.value("document.querySelector('#shown h2').textContent") == title
    assert column(browser, 1) == before
    no_complaint(browser, page)


def test_the_policy_bites(browser, page):
    """What slipped through would be no code, and could tell nobody."""
    shown(browser, page)
    browser.value("(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
                  " document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
                  " '<img src=\"https://example.com/x\" onerror=\"window.ran = 2\">'); })()")  # fmt: skip
    asked = "fetch('https://example.com/').then(() => 'answered', () => 'refused')"
    assert browser.value(asked) == "refused"
    assert browser.value("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in line for line in browser.log)


@pytest.mark.parametrize("browser", ["phone"], indirect=True)
def test_on_a_phone(browser, page):
    shown(browser, page)
    assert browser.value("document.documentElement.scrollWidth") <= 390
    x, y = place_of(browser, 12, 0.99)
    before = browser.value("scrollY")
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    for step in range(1, 11):
        browser.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y - 20 * step}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.wait(lambda: browser.value("scrollY") > before + 100, "a finger on the picture scrolls the page")
    still = "new Promise((go) => { const y = scrollY; setTimeout(() => go(y === scrollY), 200); })"
    browser.wait(lambda: browser.value(still), "the page stands still again")
    x, y = place_of(browser, 2, 0.95)
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.until("document.querySelector('#dialog').open")
    assert browser.value("document.querySelector('#shown h2').textContent") == "#2 wider"
    assert browser.value("document.querySelector('#dialog').scrollWidth <= 390")
    no_complaint(browser, page)


def test_a_night_that_goes_on(browser, tmp_path, monkeypatch):
    """The page reads itself anew, and shows what runs."""
    folder = tmp_path / "runs"
    add(Ledger(folder), *of_seeds("base", 1.000, 1.004, description="baseline"))
    write_run(folder / "base-42")
    write_run(folder / "now", metrics="\n".join(json.dumps(row) for row in rows_of(100)[:20]))
    (folder / "now" / "summary.json").unlink()
    (folder / "now" / "config.json").write_text(json.dumps({"config": {"description": "now", "time_budget": 60}}))
    for path in (folder / "now").iterdir():
        os.utime(path)
    rounds = []

    def sleep(seconds):
        if not rounds:
            shown(browser, folder / "report.html")
            assert browser.value("document.querySelector('h1').textContent").startswith("1 experiment:")
            assert "51 s left" in browser.value("document.querySelector('#running').textContent")
            browser.until("document.querySelector('#running0').firstElementChild?.shadowRoot")
            add(Ledger(folder), entry("next", 0.9, description="next"))
        else:
            browser.until("document.querySelector('h1')?.textContent.startsWith('2 experiments:')")
            raise KeyboardInterrupt
        rounds.append(seconds)

    monkeypatch.setattr("train.report.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report_main(["--watch", "1", str(folder)])
    no_complaint(browser, folder / "report.html")
