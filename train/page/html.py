"""The page: one HTML document with all that it needs inside, and nothing that it would load from elsewhere.

Whatever people wrote goes through `text`. The page's own policy lets no script run but the three whose hashes it names,
and nothing be fetched: what slipped through would still be no code.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..results.judge import KEEP
from .details import details
from .html_text import shorten, text
from .library import library

OURS = Path(__file__).parent
COLUMNS = (  # title, kind of order, what the column says to a pointer
    ("#", "number", "in the order of their first runs"),
    ("experiment", "text", "what its author called it"),
    ("result", "text", "what became of it"),
    ("val_bpb", "number", "bits per byte on the validation text, mean over seeds: less is better"),
    ("± sd", "number", "standard deviation over seeds"),
    ("seeds", "number", "runs that have a number"),
    ("difference", "number", "against the incumbent of then: negative is better"),
    ("95 %", "number", "half the width of the difference's interval"),
    ("minutes", "number", "of all its runs, from start to end"),
    ("GB", "number", "peak memory"),
)


def page(facts: dict, made: float, refresh: int | None = None) -> bytes:
    """`facts` as `facts.facts` gives them; `made`: seconds since 1970; `refresh`: seconds until the page reads itself
    anew. Raises InputError where the plotting library is missing."""
    scripts = [*map(_script, library()), _script((OURS / "page.js").read_text(encoding="utf-8"))]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
        " form-action 'none'"
    )
    time = datetime.fromtimestamp(made, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        f"<title>{text(facts['headline'])}</title>",
        f"<style>\n{(OURS / 'page.css').read_text(encoding='utf-8')}</style>",
        "<noscript><style>#articles { display: block }</style></noscript>\n</head>\n<body>",
        _top(facts, time, refresh),
        _running(facts),
        _picture(facts),
        _found(facts),
        _table(facts),
        _small_print(facts),
        '<dialog id="dialog" aria-label="experiment"><div id="bar"><button id="back">← earlier</button>'
        '<button id="on">later →</button><button id="close">close</button></div><div id="shown"></div></dialog>',
        f'<div id="articles">{"".join(details(one, facts) for one in facts["experiments"])}</div>',
        f'<script type="application/json" id="data">{_json(_data(facts))}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts).encode()


def _script(code: str) -> str:
    """A browser takes the text of a script up to the next end tag, whatever the script says there: it may have none.
    And it would look for a source map."""
    code = re.sub(r"(?m)^//# sourceMappingURL=.*$", "", code)
    if "</script" in code.lower() or "<!--" in code:
        raise ValueError("a script that ends itself cannot stand in a page")
    return code


def _json(value: object) -> str:
    """JSON that ends no script and begins no comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _data(facts: dict) -> dict:
    """What the pictures are drawn from; the words stand in the page itself."""
    kept = ("number", "ledger", "result", "time", "mean", "sd", "seeds", "fresh", "incumbent")
    return {
        "sets": facts["sets"],
        "experiments": [
            {key: one[key] for key in kept} | {
                "name": shorten(one["description"] or one["name"], 60),
                "curves": one.get("curves") or {},
                "evals": {run: {key: found[key] for key in ("step", "seconds", "val_bpb")}
                          for run, found in (one.get("evals") or {}).items()},
                "runs": [{key: run[key] for key in ("run", "seed", "val_bpb", "time", "set")} for run in one["runs"]],
            } for one in facts["experiments"]
        ],
        "running": [{key: run[key] for key in ("run", "curve", "incumbent")} for run in facts["running"]],
    }  # fmt: skip


def _top(facts: dict, time: str, refresh: int | None) -> str:
    totals = facts["totals"]
    best = next((one for one in facts["sets"] if one["now"] is not None), None)
    tiles = []
    if best:
        gain = (best["now"] / best["first"] - 1) * 100 if best["first"] else 0.0
        change = f"{gain:+.1f} % from {best['first']:.4f}" if best["now"] != best["first"] else "no gain so far"
        tiles.append((f"{best['now']:.4f}", f"val_bpb now, {change}", "good" if gain < 0 else ""))
    tiles += [
        (str(totals["kept"]), "kept, the baseline included", "good"),
        (str(totals["worse"] + totals["no_gain"]), f"not better, {totals['worse']} of them surely worse", ""),
        (str(totals["undecided"] + totals["not_compared"]), "undecided or not compared", ""),
        (str(totals["crashed"]), "crashed", "bad" if totals["crashed"] else ""),
        (str(totals["runs"]), f"runs of {totals['experiments']} experiments", ""),
        (_duration(3600 * totals["hours"]), f"{_duration(3600 * totals['hours_of_training'])} of it training", ""),
        (_count(totals["tokens"]), "tokens trained on", ""),
        (str(totals["holdout_looks"]), "looks at the holdout", "bad" if totals["holdout_looks"] else ""),
    ]
    cells = "".join(f'<div class="tile {kind}"><b>{text(n)}</b><span>{text(what)}</span></div>'
                    for n, what, kind in tiles)  # fmt: skip
    again = f"; the page is made anew every {refresh} s" if refresh else ""
    names = ", ".join(ledger["name"] for ledger in facts["ledgers"])
    return (f"<header><h1>{text(facts['headline'])}</h1>"
            f'<p class="quiet"><bdi>{text(names)}</bdi>, as of {time}{again}</p></header>'
            f'<section class="tiles" aria-label="totals">{cells}</section>')  # fmt: skip


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def _running(facts: dict) -> str:
    cards = []
    for i, run in enumerate(facts["running"]):
        left, share = run["remaining_seconds"], run["progress"] or 0.0
        over = left is None or run["phase"].startswith(("trained", "killed"))
        remaining = "" if over else f", {_duration(left)} left"
        found = run["last_eval"]
        evaluated = f", val_bpb {found['val_bpb']:.4f} on a small part after {found['step']} steps" if found else ""
        cards.append(
            f'<article class="run"><h3 dir="auto">{text(shorten(run["description"] or run["run"]))}</h3>'
            f'<p>{text(run["phase"])}{text(remaining)}; seed {text(run["seed"])}, step {text(run["step"] or 0)}'
            f'{evaluated}, on {text(run["ledger"])}; last sign {_duration(run["last_sign_seconds_ago"])}'
            ' before this was made</p>'
            f'<progress max="1" value="{min(max(share, 0.0), 1.0):.4f}"></progress>'
            f'<div class="chart" id="running{i}"></div></article>'
        )
    if not cards:
        return ""
    return f'<section id="running"><h2>Running now</h2>{"".join(cards)}</section>'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _picture(facts: dict) -> str:
    sets = facts["sets"]
    names = [f"{one['budget']} on {one['machine']}" for one in sets]
    options = "".join(f'<option value="{i}">{text(shorten(name, 60))} ({sets[i]["runs"]})</option>'
                      for i, name in enumerate(names))  # fmt: skip
    choice = f'<label>runs <select id="set">{options}</select></label>' if len(sets) > 1 else ""
    marks = "".join(f'<span><i class="mark {kind}"></i>{words}</span>' for kind, words in (
        ("kept", "kept"), ("not", "not kept"), ("above", "above the picture"), ("crashed", "crashed"),
        ("spread", "mean ± sd over seeds"), ("best", "incumbent: best so far"),
    ))  # fmt: skip
    return ('<section><h2>The night</h2><div class="controls"><label>along x '
            '<select id="along"><option value="number">experiment</option><option value="time">time (UTC)</option>'
            f'</select></label>{choice}</div><div class="chart tall" id="night"></div><p class="legend">{marks}</p>'
            '<p class="quiet">Point at a mark to see its numbers; a click opens its experiment.</p>'
            "</section>")  # fmt: skip


RESULTS = {"kept": "Kept", "worse": "Surely worse", "no gain": "No gain seen", "undecided": "Undecided",
           "not compared": "Compared with no other", "crashed": "Crashed"}  # fmt: skip


def _found(facts: dict) -> str:
    """What worked, and what was tried and did not: those that look worst first, so that nobody tries them again."""
    blocks = {}
    for result, title in RESULTS.items():
        ones = [one for one in facts["experiments"] if one["result"] == result]
        if result != "kept":
            ones.sort(key=lambda one: -(one["difference"] or {"mean": 0.0})["mean"])
        rows = "".join(f'<li><a href="#e{one["number"]}" dir="auto">{_named(one)}</a>'
                       f" <span>{_in_short(one)}</span></li>" for one in ones)  # fmt: skip
        if rows:
            opened = " open" if len(ones) <= 12 else ""
            blocks[result] = f"<details{opened}><summary>{title}: {len(ones)}</summary><ul>{rows}</ul></details>"
    worked = blocks.pop("kept", '<p class="quiet">Nothing yet.</p>')
    failed = "".join(blocks.values()) or '<p class="quiet">Nothing yet.</p>'
    return (f'<div class="found"><section id="worked"><h2>What worked</h2>{worked}</section>'
            f'<section id="failures"><h2>What did not work</h2>{failed}</section></div>{_findings(facts)}')  # fmt: skip


def _findings(facts: dict) -> str:
    found = "".join(f"<li>{text(one['text'])}" + "".join(f"<br><small>{text(more)}</small>" for more in one["more"])
                    + "</li>" for one in facts["findings"])  # fmt: skip
    return f'<section><h2>From the first to now</h2><ul class="findings">{found}</ul></section>' if found else ""


def _named(one: dict) -> str:
    return text(shorten(one["description"] or one["name"]))


def _in_short(one: dict) -> str:
    found = one["difference"]
    if found:
        return f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
    if one["status"] == KEEP and one["mean"] is not None:
        return f"the first of its kind: {one['mean']:.4f}"
    return text(shorten(one["note"] or one["verdict"], 90))


def _table(facts: dict) -> str:
    head = "".join(f'<th aria-sort="{"none" if i else "ascending"}"><button data-kind="{kind}" title="{hint}">'
                   f"{name}</button></th>" for i, (name, kind, hint) in enumerate(COLUMNS))  # fmt: skip
    results = dict.fromkeys(one["result"] for one in facts["experiments"])
    options = "".join(f"<option>{result}</option>" for result in results)
    rows = "".join(_row(one) for one in facts["experiments"])
    return ('<section><h2>All experiments</h2><div class="controls">'
            '<label>find <input id="find" type="search" placeholder="words of a description"></label>'
            f'<label>result <select id="only"><option value="">all</option>{options}</select></label>'
            f'<span id="count" class="quiet"></span></div><div class="wide"><table id="table"><thead><tr>{head}</tr>'
            f"</thead><tbody>{rows}</tbody></table></div></section>")  # fmt: skip


def _row(one: dict) -> str:
    found = one["difference"]
    half = (found["high"] - found["low"]) / 2 if found else None
    mean, sd = one["mean"], one["sd"]
    cells: Sequence[tuple[float | str | None, str]] = (
        (one["number"], f'<a href="#e{one["number"]}">{one["number"]}</a>'),
        (shorten(one["description"] or one["name"]).lower(), f'<bdi dir="auto">{_named(one)}</bdi>'),
        (one["result"], f'<span class="{one["result"].replace(" ", "-")}">{one["result"]}</span>'),
        (mean, "" if mean is None else f"{mean:.6f}"),
        (sd, "" if sd is None else f"{sd:.6f}"),
        (one["seeds"], str(one["seeds"])),
        (found["mean"] if found else None, f"{found['mean']:+.6f}" if found else ""),
        (half, f"±{half:.6f}" if found else ""),
        (one["seconds"], f"{(one['seconds'] or 0.0) / 60:.1f}"),
        (one["memory_gb"], f"{one['memory_gb']:.1f}"),
    )
    shown = "".join(f'<td data-sort="{text("" if value is None else value)}">{cell}</td>' for value, cell in cells)
    return f'<tr data-number="{one["number"]}" data-result="{one["result"]}">{shown}</tr>'


def _small_print(facts: dict) -> str:
    rows = "".join(
        f"<li><bdi>{text(one['name'])}</bdi>: {one['runs']} runs, {one['holdout_looks']} looks at the holdout,"
        f" {one['damaged_lines']} damaged lines left out</li>" for one in facts["ledgers"]
    )  # fmt: skip
    return (
        f'<section class="quiet"><h2>Where this comes from</h2><ul>{rows}</ul>'
        "<p>A verdict comes of a look after each seed; an interval is of one look at all of them, and may reach across"
        " zero where the verdict is plain (docs/numbers.md). No number here is the holdout's.</p></section>"
    )
