"""The page without a browser: whatever people wrote is text there, nothing is loaded, and the table has the facts."""

import base64
import hashlib
import json
import re
import resource
import tomllib
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.words import install_line, printable
from tests.helpers.ledger_entries import a_night, add, entry
from tests.helpers.night_page import (
    NOW,
    a_small_night,
    evals_of,
    facts_of,
    of_seeds,
    page_of,
    read_page,
    rows_of,
    write_run,
)
from train.config import ROOT
from train.page.html import _script, page
from train.page.html_text import text
from train.page.library import FILES, library
from train.report import main as report_main
from train.resilience import durable
from train.results.ledger import Ledger

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "\"' onmouseover='alert(1)",
    "$x^2$ and \\(y\\) and $$z$$",
    "&lt;b&gt; &amp;",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc\u2066",
    "a\udcff\ud800\x00\x1b[31m",
    "javascript:alert(1)",
    "{{constructor}} @name @{number}{safe} %s {0}",
    "</title></style></dialog></table>",
]


@pytest.fixture
def small_library(monkeypatch):
    """In place of a plotting library, for what is not about it."""
    monkeypatch.setattr("train.page.html.library", lambda: ["var Bokeh = {};"])


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("words", HOSTILE)
def test_a_hostile_sample_made_on_the_way_is_text(tmp_path, words):
    a_small_night(tmp_path)
    plain = json.loads(evals_of(4))
    (tmp_path / "gain-42" / "evals.jsonl").write_text(json.dumps(plain))
    tags = [element.tag for element in page_of(tmp_path).all()]
    (tmp_path / "gain-42" / "evals.jsonl").write_text(json.dumps(plain | {"sample": words}))
    document = page_of(tmp_path)
    assert [element.tag for element in document.all()] == tags
    assert printable(words) in document.one("article", id="e3").text


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_are_text_wherever_they_stand(tmp_path, words):
    """The same elements as of a night with plain words, and the words themselves among their text."""
    places = {"description": words, "flags": [words], "commit": words, "doubts": [words], "audit": words}
    a_small_night(tmp_path / "plain", flags=["x"])
    a_small_night(tmp_path / "hostile", description=words, flags=[words], commit=words)
    for night, said in (("plain", "x"), ("hostile", words)):
        for name, content in (("sample.txt", said), ("changes.diff", f"+{said}\n-{said}\n {said}\n@@ {said}\n")):
            (tmp_path / night / "worse" / name).write_bytes(content.encode(errors="replace"))
    add(Ledger(tmp_path / "hostile"), entry("odd", 1.0, **places))
    add(Ledger(tmp_path / "plain"), entry("odd", 1.0, **{**places, "description": "x", "audit": "x", "doubts": ["x"]}))
    plain, hostile = (page_of(tmp_path / name) for name in ("plain", "hostile"))
    assert shape(hostile) == shape(plain)
    shown = printable(words)
    (row,) = [row for row in hostile.all("tr") if row.attributes.get("data-number") == "2"]
    assert row.all("bdi")[0].text == shown
    article = hostile.one("article", id="e2")
    assert article.all("bdi")[0].text == shown
    assert shown in article.text
    assert shown in hostile.one("section", id="failures").text
    worse, there = hostile.one("article", id="e4"), printable(words.encode(errors="replace").decode())
    assert worse.one("pre", class_="diff").text == f"+{there}\n-{there}\n {there}\n@@ {there}"
    assert worse.one("pre", class_="sample").text == there


def shape(element) -> list:
    """Tags and the names of attributes; not how many lines a text has, nor what it says."""
    return [element.tag, sorted(element.attributes), [shape(c) for c in element.children if not isinstance(c, str)]]


@pytest.mark.usefixtures("small_library")
def test_a_description_of_100_kb(tmp_path):
    words = "<b>" * 34_000
    a_small_night(tmp_path, description=words)
    content = page(facts_of(tmp_path), NOW)
    assert len(content) < 1_500_000
    found = read_page(content)
    assert found.one("div", class_="words").text == words
    assert len(found.one("table", id="table").text) < 3_000
    assert not found.all("b", class_="x")
    assert len(json.loads(found.one("script", id="data").text)["experiments"][1]["name"]) == 60


@given(st.text(st.characters(exclude_categories=[])))
@settings(deadline=None)
def test_any_words_are_text(words):
    found = read_page(f'<p title="{text(words)}">{text(words)}</p>'.encode())
    (paragraph,) = found.children
    assert (paragraph.text, paragraph.attributes["title"]) == (printable(words), printable(words))


def policy_of(document) -> dict[str, list[str]]:
    (meta,) = [m for m in document.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    parts = [part.split() for part in meta.attributes["content"].split(";")]
    return {name: values for name, *values in parts}


def test_the_policy_names_every_script_and_nothing_else(tmp_path):
    """With the real library."""
    a_small_night(tmp_path)
    document = page_of(tmp_path, refresh=15)
    policy = policy_of(document)
    scripts = [script for script in document.all("script") if script.attributes.get("type") != "application/json"]
    digests = [base64.b64encode(hashlib.sha256(s.text.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == len(FILES) + 1
    assert policy == {
        "default-src": ["'none'"], "script-src": [f"'sha256-{digest}'" for digest in digests],
        "style-src": ["'unsafe-inline'"], "img-src": ["data:"], "base-uri": ["'none'"], "form-action": ["'none'"],
    }  # fmt: skip
    metas = [m.attributes.get("http-equiv") for m in document.all("meta")]
    assert metas.index("Content-Security-Policy") < metas.index("refresh")  # before it nothing is guarded
    head = document.one("head").all()
    assert [e.tag for e in head].index("style") > [e.tag for e in head].index("meta")


@pytest.mark.usefixtures("small_library")
def test_nothing_is_loaded_and_nothing_leads_elsewhere(tmp_path):
    a_small_night(tmp_path)
    document = page_of(tmp_path)
    for element in document.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "action", "data", "background", "style"), name
            assert name != "href" or re.fullmatch(r"#e\d+", value), value
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "form", "img", "svg")
    assert not document.all("meta", http_equiv="refresh")
    css = document.one("head").all("style")[0].text
    assert "url(" not in css
    assert "@import" not in css


def test_the_library_is_the_pinned_one_and_can_stand_in_a_page():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = extras["report"]
    assert pinned in extras["dev"]
    assert pinned == f"bokeh=={version('bokeh')}"
    assert all(len(_script(script)) > 50_000 for script in library())


@pytest.mark.parametrize("script", ["a = '</script>'", "a = '</SCRIPT >'", "<!-- a"])
def test_a_script_that_would_end_itself_is_refused(script):
    with pytest.raises(ValueError, match="cannot stand in a page"):
        _script(script)


def test_a_source_map_is_not_asked_for():
    assert _script("a;\n//# sourceMappingURL=bokeh.js.map\nb\u2028;") == "a;\n\nb\u2028;"


def cells(row) -> list[str]:
    return [cell.text for cell in row.all("td")]


@pytest.mark.usefixtures("small_library")
def test_the_table_has_the_ledgers_numbers(tmp_path):
    ledger = a_small_night(tmp_path)
    document = page_of(tmp_path)
    rows = document.one("table", id="table").one("tbody").all("tr")
    by_name = {cells(row)[1]: cells(row) for row in rows}
    assert cells(rows[0])[:6] == ["1", "baseline", "kept", "1.000000", "0.004000", "3"]
    assert [*by_name] == ["baseline", "all rates higher", "wider", "half the width", "no luck"]
    note = next(run["note"] for run in ledger.runs() if run["run"] == "worse")
    mean, low, high = map(float, re.search(r": (\S+), with 95 % from (\S+) to (\S+);", note).groups())
    assert by_name["half the width"][2:] == [
        "worse", "1.200000", "", "1", f"{mean:+.6f}", f"±{(high - low) / 2:.6f}", "5.3", "44.0",
    ]  # fmt: skip
    assert by_name["no luck"][2:] == ["crashed", "", "", "0", "", "", "5.3", "0.0"]
    ordered = {float(row.all("td")[3].attributes["data-sort"] or "nan") for row in rows}
    assert {1.0, 0.998, 0.9705, 1.2} <= ordered


@pytest.mark.usefixtures("small_library")
def test_an_experiment_has_all_that_is_known_of_it(tmp_path):
    a_small_night(tmp_path)
    document = page_of(tmp_path)
    wider = document.one("article", id="e3")
    assert "over those of the incumbent, #1 baseline" in wider.text
    assert wider.one("pre", class_="diff").text.strip() == (
        "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-width = 1\n+width = 2 < 3 & 4"
    )
    assert [span.text for span in wider.all("span", class_="added")] == ["+width = 2 < 3 & 4"]
    assert [span.text for span in wider.all("span", class_="removed")] == ["-width = 1"]
    assert wider.one("pre", class_="sample").text == "def f():\n    return 1\n"
    seconds = {cells(row)[0]: cells(row)[1] for row in wider.one("table", class_="seconds").all("tr")}
    assert seconds == {"training": "300.0 s", "total": "320.0 s"}
    assert [m.attributes["value"] for m in wider.all("meter")] == ["0.9375", "1.0000"]
    assert "--depth=9" in wider.text
    assert "mfu_percentn/a" in wider.text
    assert "It is better: -0.0" in wider.one("p", class_="verdict").text
    failed = document.one("section", id="failures")
    assert [link.text for link in failed.all("a")] == ["half the width", "all rates higher", "no luck"]
    assert [link.text for link in document.one("section", id="worked").all("a")] == ["baseline", "wider"]
    tiles = {tile.all("span")[0].text: tile.all("b")[0].text for tile in document.all("div", class_="tile")}
    assert tiles["val_bpb now, -2.9 % from 1.0000"] == "0.9705"
    assert tiles["runs of 5 experiments"] == "9"
    assert tiles["tokens trained on"] == "5 M"


@pytest.mark.usefixtures("small_library")
def test_what_was_evaluated_on_the_way_has_a_chart_and_a_table(tmp_path):
    """Newest first, and a dozen of them; an experiment that has none says nothing of it."""
    a_small_night(tmp_path)
    (tmp_path / "gain-42" / "evals.jsonl").write_text(evals_of(*range(1, 25)))
    document = page_of(tmp_path)
    wider, base = (document.one("article", id=f"e{number}") for number in (3, 1))
    assert len(wider.all("div", class_="evals")) == 1
    table = next(table for table in wider.all("table") if "sample" in table.text)
    shown = [cells(row) for row in table.one("tbody").all("tr")]
    assert shown[0] == ["24", "1.541667", "after 24 <b>"]
    assert [int(step) for step, *_ in shown] == [*range(24, 0, -2)]
    assert "What the model of gain-42 wrote meanwhile" in wider.text
    assert not base.all("div", class_="evals")
    assert "On the way" not in base.text
    data = json.loads(document.one("script", id="data").text)
    assert data["experiments"][2]["evals"]["gain-42"]["step"] == [*range(1, 25)]
    assert data["experiments"][0]["evals"] == {}


@pytest.mark.usefixtures("small_library")
def test_a_page_says_what_is_missing(tmp_path):
    a_small_night(tmp_path)
    (tmp_path / "worse" / "changes.diff").unlink()
    document = page_of(tmp_path)
    assert [p.text for p in document.all("p", class_="missing")] == ["changes.diff of worse is missing or damaged."]
    assert not document.one("article", id="e4").all("pre", class_="diff")


@pytest.mark.usefixtures("small_library")
def test_pages_of_little(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 experiments" in page_of(tmp_path / "empty").text
    add(Ledger(tmp_path / "crash"), entry("a"))
    assert "loss is nan" in page_of(tmp_path / "crash").text


@pytest.mark.usefixtures("small_library")
def test_sets_that_are_not_compared_can_be_chosen_between(tmp_path):
    add(Ledger(tmp_path), entry("a", 1.0))
    other = entry("b", 0.5)
    other["comparable"]["machine"] = "<another>"
    add(Ledger(tmp_path), other)
    options = page_of(tmp_path).one("select", id="set").all("option")
    assert [option.text for option in options] == ["300 s after 10 steps on a GPU (1)",
                                                   "300 s after 10 steps on <another> (1)"]  # fmt: skip
    assert not page_of_one(tmp_path / "one").all("select", id="set")


def page_of_one(folder):
    add(Ledger(folder), *of_seeds("a", 1.0, 1.1))
    return page_of(folder)


# The command.


def test_without_the_package_there_is_a_picture_and_a_line(tmp_path, monkeypatch, capsys):
    add(Ledger(tmp_path), entry("a", 1.0))
    monkeypatch.setattr("train.page.library.find_spec", lambda name: None)
    assert report_main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == (f"error: report.html needs the package bokeh, which is not installed:"
                        f" {install_line('-e', '.[report]')}, or leave the page out with --no-page\n")  # fmt: skip
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.md", "report.png"}
    assert report_main(["--no-page", str(tmp_path)]) == 0
    assert "report.html" not in capsys.readouterr().out


def test_a_package_that_is_damaged_is_one_line(tmp_path, monkeypatch, capsys):
    add(Ledger(tmp_path), entry("a", 1.0))
    monkeypatch.setattr("train.page.library.FILES", ("no-such.js",))
    assert report_main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: report.html: the package bokeh is damaged (")


@pytest.mark.usefixtures("small_library")
def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    add(Ledger(tmp_path), entry("a", 1.0))
    (tmp_path / "report.html").write_text("before")
    real = durable.write_synced

    def full(path, *pieces):
        if not path.name.startswith("report.html"):
            return real(path, *pieces)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(durable, "write_synced", full)
    assert report_main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "report.html").read_text() == "before"
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.html", "report.md", "report.png"}


class NightIsOverError(Exception):
    pass


@pytest.mark.usefixtures("small_library")
def test_watching_a_night(tmp_path, monkeypatch, capsys):
    """From before its first run has ended; a disk that is full for a while ends nothing."""
    rounds = []
    real = report_main.__globals__["replace_file"]

    def replace(path, content):
        if len(rounds) == 1:
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    def sleep(seconds):
        rounds.append((seconds, read_page((tmp_path / "report.html").read_bytes())))
        if len(rounds) == 1:
            a_small_night(tmp_path / "night")
            for path in (tmp_path / "night").iterdir():
                path.rename(tmp_path / path.name)
        if len(rounds) == 3:
            raise NightIsOverError

    folder = tmp_path / "now"
    write_run(folder, metrics="\n".join(json.dumps(row) for row in rows_of(100)[:20]))
    (folder / "evals.jsonl").write_text(evals_of(4, 8))
    (folder / "summary.json").unlink()
    (folder / "config.json").write_text(json.dumps({"config": {"description": "<i>now", "time_budget": 60}}))
    monkeypatch.setattr("train.report.time", lambda: (folder / "metrics.jsonl").stat().st_mtime + 1)
    monkeypatch.setattr("train.report.sleep", sleep)
    monkeypatch.setattr("train.report.replace_file", replace)
    monkeypatch.setattr("prepare.words.SAID", set())
    with pytest.raises(NightIsOverError):
        report_main(["--watch", "7", str(tmp_path)])
    said = capsys.readouterr()
    assert "report.html\nmade anew every 7 s, until Ctrl-C" in said.out
    assert said.err.count("the page stays as it was") == 1
    (_, first), (_, second), (seconds, third) = rounds
    assert seconds == 7
    assert "0 experiments" in first.text
    assert second.one("h1").text == first.one("h1").text
    assert "5 experiments" in third.one("h1").text
    refresh = next(m for m in third.all("meta") if m.attributes.get("http-equiv") == "refresh")
    assert refresh.attributes["content"] == "7"
    running = third.one("section", id="running")
    assert "step 19, val_bpb 1.6250 on a small part after 8 steps, on" in running.text
    assert "<i>now" in running.text
    assert "training, 51 s left" in running.text
    assert running.one("progress").attributes["value"] == "0.2000"
    data = json.loads(third.one("script", id="data").text)
    assert data["running"][0]["curve"]["step"][-1] == 19
    assert data["running"][0]["incumbent"] == 3


@pytest.mark.parametrize("arguments", [
    ["--watch", "0"], ["--watch", "x"], ["--json", "--watch"], ["--json", "--no-page"],
])  # fmt: skip
def test_arguments_of_no_use_are_one_line(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        report_main([str(tmp_path), *arguments])
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_watched_is_one_line(tmp_path, capsys):
    assert report_main(["--watch", "9", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("small_library")
def test_a_page_of_200_runs_is_made_in_seconds(tmp_path):
    """Of the processor, whatever else it does meanwhile."""
    a_night(tmp_path, 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    page_of(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 10
