"""Reports as files: pages that are well-formed and reach for nothing outside, pictures that are pictures."""

import base64
import json
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import pytest

from cluster.bench.measure import measure
from cluster.bench.page import as_html, write
from cluster.bench.picture import as_png, as_svg, safe
from cluster.bench.table import as_table
from cluster.cli_options import console
from cluster.errors import InvalidRequest
from tests.cluster.bench.records import run_of, small_run

EVIL = '<script src="http://evil/x.js">$\\frac{_[red]é漢'
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page and keeps what matters: whether tags close, where it points, what it says."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def reports(*names: str):
    """The same run under each name."""
    return [measure(name, "2026-01-01T00:00:00+00:00", small_run(), 1.0, 0.2) for name in names]


def test_a_page_is_well_formed_and_self_contained():
    page = Page(as_html(reports("apart", "together")))
    assert page.open == []
    assert page.tags.count("th") == 3 + page.tags.count("tr") - 1
    [picture] = page.sources
    kind, _, data = picture.partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert xml.fromstring(base64.b64decode(data)).tag == "{http://www.w3.org/2000/svg}svg"
    assert "25.0% of offered, 0.2 requests/s" in page.words


def test_whatever_a_name_holds_it_is_text():
    [report] = reports(EVIL)
    text = as_html([report])
    page = Page(text)
    assert EVIL in page.words
    assert "script" not in page.tags
    assert len(page.sources) == 1
    with console.capture() as shown:
        console.print(as_table([report]))
    assert "[red]" in shown.get().replace("\n", "")


def test_pictures_bear_any_name():
    names = [EVIL, "", "_hidden", "x" * 500, "\n"]
    assert as_png(reports(*names)).startswith(PNG_SIGNATURE)
    assert as_svg(reports(EVIL)).count(b"<script") == 0
    assert all(1 <= len(safe(name)) <= 32 for name in names)


def test_pictures_of_nothing_and_of_many():
    nothing = measure("nothing", "", run_of(elapsed_s=0.0), 1.0, 1.0)
    assert as_png([nothing]).startswith(PNG_SIGNATURE)
    assert b"<svg" in as_svg([nothing, *reports("one")])
    drawn = as_png(reports(*map(str, range(8))))
    assert drawn.startswith(PNG_SIGNATURE) and drawn.rstrip().endswith(b"IEND\xaeB`\x82")


def test_the_same_reports_make_the_same_picture():
    assert as_svg(reports("one")) == as_svg(reports("one"))


def test_files_are_written_by_their_endings(tmp_path):
    for name in ("r.html", "r.png", "r.json"):
        write(tmp_path / name, reports("one"))
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.png").read_bytes().startswith(PNG_SIGNATURE)
    assert json.loads((tmp_path / "r.json").read_text())["reports"][0]["name"] == "one"
    with pytest.raises(InvalidRequest, match="--output"):
        write(tmp_path / "missing" / "r.json", reports("one"))
