"""The report is one page that needs nothing else, shows what happened, and runs nothing."""

from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from carillon.engine.data.curate.report_charts import histogram
from carillon.engine.data.curate.run import CurateOptions, curate

HOSTILE = 'a drawing <script>alert(1)</script> & "quoted" <img src=http://x.example/y> of a thing'


class Page(HTMLParser):
    """Counts tags, collects addresses and what stands in table cells."""

    VOID = ("meta", "img", "br", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = dict(attrs)
        self.addresses += [str(given[k]) for k in ("src", "href") if k in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def text(tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    samples = [tools.sample(f"s{i}", i, licence="CC0-1.0") for i in range(8)]
    samples += [tools.sample("twin", 2, licence="MIT")]
    samples[0] = tools.sample("s0", 0, "a drawing, mail ann@b.example", licence="CC0-1.0")
    small = tools.jpeg(tools.scene(30).resize((40, 40)))
    samples += [("small", {"jpg": small}, {"captions": {"en": [HOSTILE, "mail ann@b.example"]}})]
    samples += [("broken", {"jpg": b"\xff\xd8\xff<b>"}, {"captions": {"de": ["kaputt"]}})]
    source = tools.write_set(folder / "source", samples)
    pipeline = tools.pipeline(
        {"type": "picture_size", "min_side": 100},
        {"type": "blur", "action": "flag", "min_sharpness": 1000},
        {"type": "exact_duplicates"},
        {"type": "pii"},
        max_bad_share=0.5,
        name="<b>mine</b>",
    )
    curate(pipeline, [str(source)], folder / "out", options=CurateOptions(workers=1))
    return (folder / "out" / "report.html").read_text()


def test_the_page_is_whole_and_loads_nothing(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert all(a.startswith(("data:image/jpeg;base64,", "#stage")) for a in page.addresses)
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "alert(1)" not in text.replace("&lt;script&gt;", ""), "captions are cleaned on storing"
    assert "&lt;b&gt;mine&lt;/b&gt;" in text


def test_the_page_has_counts_reasons_examples_and_tables(text: str) -> None:
    page = Page(text)
    assert "<b>8</b> of <b>11</b> items are kept (72.7%), 2 dropped, 1 quarantined." in text
    assert page.tags["section"] == 4
    assert page.tags["svg"] == 5  # two scores of size, two of blur, finds of pii
    assert text.count('class="limit"') == 4
    figures = 1 + 8 + 1  # too small; flagged; the twin beside its original
    assert page.tags["figure"] == figures
    assert page.tags["img"] == figures + 1
    rows = [page.cells[i : i + 7] for i in range(0, 28, 7)]
    assert [row[:6] for row in rows] == [
        ["picture_size", "picture_size", "drop", "1", "0", "0"],
        ["blur", "blur", "flag", "0", "8", "0"],
        ["exact_duplicates", "exact_duplicates", "drop", "1", "0", "0"],
        ["pii", "pii", "drop", "0", "0", "0"],
    ]
    table = list(zip(page.cells, page.cells[1:], page.cells[2:], strict=False))
    assert ("CC0-1.0", "8", "8") in table
    assert ("MIT", "1", "0") in table
    assert ("en", "11", "8") in table
    assert ("de", "1", "0") in table
    assert any(cell.startswith("the picture") for cell in page.cells), "the quarantined one"


def test_personal_data_does_not_reach_the_page(text: str) -> None:
    assert "ann@b.example" not in text
    assert "Personal data was replaced in 1 items." in text
    assert "8 items do not pass." in text


def test_histograms_hold_limits_and_odd_values() -> None:
    drawn = histogram([1.0, 2.0, float("nan"), float("inf")], [0.5], "a <score>")
    assert "a &lt;score&gt; of 2 items" in drawn
    assert "limit 0.5" in drawn
    assert drawn.count("<rect") == 2
    assert "<rect" in histogram([3.0, 3.0], [], "same")
    assert histogram([], [1.0], "none") == "<p>No none was measured.</p>"
