"""What the page has of one experiment, behind its row and its point."""

from .html_text import shorten, text

# In the order in which they come; what a newer run times besides follows.
PHASES = ("setup", "compile", "training", "untimed", "evals", "evaluation", "audit", "total")
EVALS_SHOWN = 12  # with samples; the chart has all
MEANING = {
    "setup": "until the first step, without compiling",
    "compile": "compiling and warming up",
    "training": "steps inside the budget",
    "untimed": "steps before the budget began",
    "evals": "val_bpb on a small part, on the way",
    "overshoot": "beyond the budget",
    "stopped": "stood still inside the budget",
    "evaluation": "val_bpb",
    "audit": "whether val_bpb is what it says",
}


def details(one: dict, facts: dict) -> str:
    """An article, hidden until it is asked for; its curves are drawn when it is opened."""
    number = one["number"]
    title = one["description"] or one["name"]
    against = next((e for e in facts["experiments"] if e["number"] == one["incumbent"]), None)
    head = (f'<article id="e{number}" data-number="{number}"><h2><span class="quiet">#{number}</span> '
            f'<bdi dir="auto">{text(shorten(title))}</bdi></h2>')  # fmt: skip
    cut = shorten(title) != title
    whole = f'<div class="words bounded" dir="auto">{text(title)}</div>' if cut else ""
    flags = f"; flags: <code>{text(' '.join(one['flags']))}</code>" if one["flags"] else ""
    group = f"group {text(one['name'])} of {text(one['ledger'])}"
    origin = (f'<p class="quiet bounded">commit {text(one["commit"])}, {group}, {text(one["time"])};'
              f" {text(one['budget'])}{flags}</p>")  # fmt: skip
    verdict = (f'<p class="verdict {one["result"].replace(" ", "-")}"><b>{one["result"]}.</b> '
               f"{text(one['in_words'])}</p>")  # fmt: skip
    note = f'<p class="quiet bounded">In the ledger: {text(one["verdict"])}. {text(one["note"])}</p>'
    missing = "".join(f'<p class="missing">{text(words)}</p>' for words in one.get("missing") or ())
    over = ""
    if against:
        name = text(shorten(against["description"], 60))
        over = f" over those of the incumbent, #{against['number']} {name}, in grey"
    curves = f"<h3>Curves{over}</h3>" if one.get("curves") else ""
    chart = '<div class="chart"></div>' if one.get("curves") else ""
    return "".join([
        head, whole, verdict, note, origin, missing, _runs(one), curves, chart, _evals(one),
        _part("What it changed", "diff", one.get("diff"), "Nothing: its commit is its parent's code."),
        _part("What its model writes", "sample", one.get("sample"), "Nothing."),
        _seconds(one), _summary(one), "</article>",
    ])  # fmt: skip


def _part(title: str, kind: str, content: str | None, empty: str) -> str:
    if content is None:
        return ""
    if not content.strip():
        return f'<h3>{title}</h3><p class="quiet">{empty}</p>'
    return f'<h3>{title}</h3><pre class="{kind}">{_lines(kind, content)}</pre>'


def _evals(one: dict) -> str:
    """Of the run that came last and has any: a chart, and a few of its evaluations with what the model wrote then."""
    name, found = next(reversed((one.get("evals") or {}).items()), (None, None))
    if not found:
        return ""
    every = max(1, -(-len(found["step"]) // EVALS_SHOWN))
    rows = "".join(
        f"<tr><td>{text(step)}</td><td>{bpb:.6f}</td><td dir=\"auto\">{text(sample)}</td></tr>"
        for step, bpb, sample in [*zip(found["step"], found["val_bpb"], found["sample"], strict=True)][::-1][::every]
    )
    return ('<h3>On the way: val_bpb on a small part</h3><div class="chart evals"></div>'
            f"<details><summary>What the model of {text(name)} wrote meanwhile</summary>"
            '<div class="wide"><table class="plain"><thead><tr><th>step</th><th>val_bpb</th><th>sample</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div></details>")  # fmt: skip


def _lines(kind: str, content: str) -> str:
    if kind != "diff":
        return "\n".join(map(text, content.split("\n")))
    shown = []
    for line in content.strip("\n").split("\n"):
        sort = {"+": "added", "-": "removed", "@": "place"}.get(line[:1], "")
        sort = "file" if line.startswith(("diff --git", "+++", "---", "index ")) else sort
        shown.append(f'<span class="{sort}">{text(line)}</span>' if sort else text(line))
    return "\n".join(shown)


def _runs(one: dict) -> str:
    rows = []
    for run in one["runs"]:
        bpb = "" if run["val_bpb"] is None else f"{run['val_bpb']:.6f}"
        audit = "" if run["audit"] in ("", "ok") else f"audit: {run['audit']}"
        said = "; ".join(filter(None, (run["verdict"], run["error"], *run["doubts"], audit)))
        rows.append(f"<tr><td>{text(run['run'])}</td><td>{text(run['seed'])}</td><td>{bpb}</td><td>{text(said)}</td></tr>")
    return ('<div class="wide"><table class="plain"><thead><tr><th>run</th><th>seed</th><th>val_bpb</th>'
            f"<th>verdict</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>")  # fmt: skip


def _seconds(one: dict) -> str:
    """Of the run that came last. Compiling is a part of other phases too, so the bars do not add up to the total."""
    seconds = one["runs"][-1]["seconds"]
    total = seconds.get("total") or max(seconds.values(), default=0.0)
    names = [name for name in (*PHASES, *sorted(seconds.keys() - {*PHASES})) if seconds.get(name)]
    if not names or not total:
        return ""
    rows = []
    for name in names:
        share = min(max(seconds[name] / total, 0.0), 1.0)
        value = f"{seconds[name]:.1f} s" if seconds[name] >= 1 else f"{1000 * seconds[name]:.0f} ms"
        rows.append(f"<tr><td>{text(name)}</td><td>{value}</td><td><meter value=\"{share:.4f}\"></meter></td>"
                    f'<td class="quiet">{text(MEANING.get(name, ""))}</td></tr>')  # fmt: skip
    return ('<h3>Where its seconds went</h3><div class="wide"><table class="plain seconds"><tbody>'
            f"{''.join(rows)}</tbody></table></div>")  # fmt: skip


def _summary(one: dict) -> str:
    summary = next((run["summary"] for run in reversed(one["runs"]) if run["summary"]), None)
    if not summary:
        return ""
    rows = "".join(f"<tr><td>{text(key)}</td><td>{text('n/a' if value is None else value)}</td></tr>"
                   for key, value in summary.items())  # fmt: skip
    return (f"<details><summary>The whole summary of its last run</summary>"
            f'<div class="wide"><table class="plain"><tbody>{rows}</tbody></table></div></details>')  # fmt: skip
