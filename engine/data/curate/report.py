"""report.html: what a run of curation took out and why, in one page that needs no network.

Counts by stage, reasons, histograms with the limits drawn, examples of what each stage removed, and
languages and licences before and after. Every text that comes from data is escaped, and the page's
own policy lets a browser load nothing and run nothing. The same run gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from carillon.engine.data.curate.pipeline import pipeline_hash, pipeline_values
from carillon.engine.data.curate.report_charts import histogram, share_bar
from carillon.engine.data.curate.report_examples import examples_of, figure
from carillon.engine.data.curate.score import PASSED
from carillon.engine.data.curate.stage import SetStage
from carillon.engine.data.curate.stages.pii import Pii
from carillon.engine.data.curate.write import Curated

REPORT_NAME = "report.html"
_MAX_REASONS = 8
_MAX_TABLE = 40
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--ink:#3d6fb4;--limit:#c2410c}
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-top:1px solid var(--line);
padding-top:1rem;font-size:1.2rem}h3{font-size:1rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .8rem .2rem 0;text-align:left;
border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}
.bar{display:inline-block;width:9rem;height:.7rem;background:var(--line)}
.bar span{display:block;height:100%;background:var(--ink)}
.histogram{width:100%;max-width:40rem;display:block;margin:.6rem 0}
.histogram rect{fill:var(--ink)}
.histogram text{font-size:11px;fill:CanvasText;paint-order:stroke;stroke:Canvas;stroke-width:3px}
.histogram line.limit{stroke:var(--limit);stroke-width:2;stroke-dasharray:4 3}
.examples{display:flex;flex-wrap:wrap;gap:.8rem}
figure{margin:0;max-width:15rem;font-size:12px;overflow-wrap:anywhere}
figure img{margin-right:4px;border-radius:3px}
.none{display:inline-block;padding:1.6rem .8rem;background:var(--line);border-radius:3px}
code{font-size:.85em;overflow-wrap:anywhere}.tables{display:flex;flex-wrap:wrap;gap:3rem}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report_html(curated: Curated) -> str:
    """The whole page."""
    name = escape(curated.pipeline.name)
    sections = [
        _summary(curated),
        *(_stage_section(curated, place) for place in range(len(curated.pipeline.stages))),
        _quarantine(curated),
        _tables(curated),
        _settings(curated),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Curation: {name}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


def _summary(curated: Curated) -> str:
    dropped_by = curated.verdict.dropped_by[: curated.num_rows]
    kept = int((dropped_by == PASSED).sum())
    quarantined = int((dropped_by < PASSED).sum())
    inputs = ", ".join(
        f"{escape(d.name)} <code>{d.fingerprint[:12]}</code>" for d in curated.datasets
    )
    against = ", ".join(escape(d.name) for d in curated.against) or "none"
    share = kept / max(1, curated.num_rows)
    rows = [_stage_row(curated, place) for place in range(len(curated.pipeline.stages))]
    heads = ("stage", "kind", "action", "dropped", "flagged", "captions removed", "share dropped")
    return (
        f"<h1>Curation: {escape(curated.pipeline.name)}</h1>"
        f"<p>From {inputs}; compared with evaluation sets: {against}.<br>"
        f"Pipeline <code>{pipeline_hash(curated.pipeline)[:12]}</code>.</p>"
        f'<p id="counts"><b>{kept:,}</b> of <b>{curated.num_rows:,}</b> items are kept '
        f"({100 * share:.1f}%), {curated.num_rows - kept - quarantined:,} dropped, "
        f"{quarantined:,} quarantined.</p>{share_bar(share)}"
        f"<h2>Stages</h2>{_table(heads, rows, numbers=(3, 4, 5))}"
    )


def _stage_row(curated: Curated, place: int) -> list[str]:
    stage = curated.pipeline.stages[place]
    dropped = int((curated.verdict.dropped_by[: curated.num_rows] == place).sum())
    flagged = sum(1 for _ in curated.judged_by(place)) - dropped
    captions = _captions_removed(curated, place)
    return [
        f'<a href="#stage{place}">{escape(stage.label)}</a>',
        escape(str(stage.type)),
        stage.action,
        f"{dropped:,}",
        f"{flagged:,}",
        f"{captions:,}",
        share_bar(dropped / max(1, curated.num_rows)),
    ]


def _captions_removed(curated: Curated, place: int) -> int:
    removed = map(json.loads, _texts(curated, "captions_removed", curated.num_rows))
    return sum(one.get(curated.label(place), 0) for one in removed)


def _texts(curated: Curated, column: str, num_rows: int) -> Iterator[str]:
    """The JSON texts of a column that are not empty."""
    for chunk in curated.scored.column(column).slice(0, num_rows).chunks:
        yield from (text for text in chunk.to_pylist() if text)


def _stage_section(curated: Curated, place: int) -> str:
    stage = curated.pipeline.stages[place]
    described = (type(stage).__doc__ or "").strip().split("\n")[0]
    reasons = Counter(_reasons(curated, place))
    listed = [[escape(r), f"{n:,}"] for r, n in reasons.most_common(_MAX_REASONS)]
    table = _table(("reason", "items"), listed, numbers=(1,)) if listed else ""
    figures = [figure(curated, *found) for found in examples_of(curated, place)]
    grid = f'<h3>Examples</h3><div class="examples">{"".join(figures)}</div>' if figures else ""
    return (
        f'<section id="stage{place}"><h2>{escape(stage.label)}</h2><p>{escape(described)}</p>'
        f"{''.join(_histograms(curated, place))}{_words(curated, place)}{table}{grid}</section>"
    )


def _words(curated: Curated, place: int) -> str:
    """What a stage did, in a sentence."""
    stage = curated.pipeline.stages[place]
    num_items = sum(1 for _ in curated.judged_by(place))
    done = [f"{num_items:,} items do not pass."] if num_items else []
    if removed := _captions_removed(curated, place):
        done.append(f"{removed:,} single captions were removed.")
    if isinstance(stage, Pii) and stage.replace:
        finds = curated.scored.column(f"score{place}.finds").slice(0, curated.num_rows)
        replaced = int((finds.drop_null().to_numpy() > 0).sum())
        done.append(f"Personal data was replaced in {replaced:,} items.")
    return f"<p>{' '.join(done) or 'Everything passes.'}</p>"


def _histograms(curated: Curated, place: int) -> Iterator[str]:
    stage = curated.pipeline.stages[place]
    if isinstance(stage, SetStage):
        told = [one[place].score for one in curated.verdict.told.values() if place in one]
        if told and stage.score_names[0] not in ("same_bytes", "share"):
            yield histogram(told, [], f"{stage.score_names[0]} of what was found")
        return
    for name in stage.score_names:
        column = curated.scored.column(f"score{place}.{name}").slice(0, curated.num_rows)
        limits = [limit for limit in stage.limits().get(name, ()) if limit is not None]
        yield histogram(
            column.drop_null().to_numpy(), limits, f"{stage.label}: {name.replace('_', ' ')}"
        )


def _reasons(curated: Curated, place: int) -> Iterator[str]:
    """Reasons without their numbers and keys, so that alike ones count together."""
    for _, reason, match in curated.judged_by(place):
        plain = reason.rsplit(" ", 1)[0] + " ..." if match >= 0 else reason
        yield re.sub(r"(?<!\w)\d[\d.,e+-]*", "N", plain, count=1)


def _quarantine(curated: Curated) -> str:
    rows = np.flatnonzero(curated.verdict.dropped_by[: curated.num_rows] < PASSED).tolist()
    if not rows:
        return "<h2>Quarantined</h2><p>Nothing.</p>"
    found = Counter(str(curated.scored.column("reason")[row].as_py()) for row in rows)
    listed = [[escape(reason), f"{n:,}"] for reason, n in found.most_common(_MAX_TABLE)]
    return f"<h2>Quarantined</h2>{_table(('reason', 'items'), listed, numbers=(1,))}"


def _tables(curated: Curated) -> str:
    kept = curated.verdict.dropped_by[: curated.num_rows] == PASSED
    languages, licences = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    start = 0
    names = ["languages_before", "languages", "licence"]
    table = curated.scored.table.select(names).slice(0, curated.num_rows)
    for batch in table.to_batches():
        for at, row in enumerate(batch.to_pylist()):
            licences[0][row["licence"] or "unreadable"] += 1
            languages[0].update(_loaded(row["languages_before"]))
            if kept[start + at]:
                licences[1][row["licence"]] += 1
                languages[1].update(_loaded(row["languages"]))
        start += batch.num_rows
    return (
        '<h2>Before and after</h2><div class="tables">'
        f"<div><h3>Captions by language</h3>{_compared('language', *languages)}</div>"
        f"<div><h3>Items by licence</h3>{_compared('licence', *licences)}</div></div>"
    )


def _loaded(text: str) -> dict[str, int]:
    return json.loads(text) if text else {}


def _compared(what: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    names = sorted({*before, *after}, key=lambda name: (-before.get(name, 0), name))[:_MAX_TABLE]
    rows = [[escape(name), f"{before.get(name, 0):,}", f"{after.get(name, 0):,}"] for name in names]
    return _table((what, "before", "after"), rows, numbers=(1, 2))


def _settings(curated: Curated) -> str:
    text = json.dumps(pipeline_values(curated.pipeline), indent=1, ensure_ascii=False)
    return f"<h2>Settings</h2><details><summary>All</summary><pre>{escape(text)}</pre></details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """A table; the cells are HTML already."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=n' if at in numbers else ''}>{cell}</{tag}>"
            for at, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table>"
