"""What people see of pools on 80 columns, and that nobody's name can draw on their screen."""

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from cluster.proto import trivium_pb2
from cluster.show_pools import ago, bar, pages_table, pools_table, pools_view, ready_words, requests_table
from tests.cluster.pools_told import EVIL, HARMLESS, cluster, pools, requests

LONG = "a name that is as long as names may be and not one more letter.."


def drawn(view: RenderableType, columns_count: int = 80) -> str:
    """As a terminal without colours shows it."""
    console = Console(width=columns_count, file=StringIO(), color_system=None)
    console.print(view)
    return console.file.getvalue()


TABLES = {
    "pools": (lambda name: pools_table(pools(name)), "pool ready aim bounds pressure held"),
    "nodes": (
        lambda name: pages_table(cluster(name)),
        "node state runs waits leased cached pages tokens/s",
    ),
    "requests": (
        lambda name: requests_table(requests(name)),
        "request phase age in out tries prefill decode",
    ),
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("name", ["a1b2c3", LONG])
def test_80_columns_show_every_heading_whole(what: str, name: str):
    made, headings = TABLES[what]
    lines = drawn(made(name)).splitlines()
    assert lines[2].replace("┃", " ").split() == headings.split()
    assert max(map(len, lines)) <= 80


def test_a_pool_in_a_line():
    lines = drawn(pools_table(pools()), 200).splitlines()
    [decode] = [line for line in lines if line.startswith("│ decode")]
    cells = [cell.strip() for cell in decode.strip("│").split("│")]
    assert cells == [
        "decode",
        "2, 1 starting, 2 draining, 3 lent, 4 borrowed",
        "3",
        "1-8",
        "████████ 150% inter-token latency",
        "3 by scale, somebody",
    ]
    [gateway] = [line for line in lines if line.startswith("│ gateway")]
    assert [cell.strip() for cell in gateway.strip("│").split("│")] == ["gateway", "2", "3", "1-8", "", ""]


def test_the_whole_view_tells_outlooks_and_the_newest_decisions():
    text = drawn(pools_view(pools()), 200)
    assert "counts follow the load" in text and "decode: as somebody" in text
    assert "0 → 1" in text and "5 → 6" in text and "6 → 7" not in text
    assert "counts are set by people" in drawn(pools_view(pools(autoscaled=False)))
    assert drawn(pools_view(trivium_pb2.GetPoolsResponse())), "before anything is known too"


@pytest.mark.parametrize(
    "view",
    [
        pools_view(pools(EVIL)),
        pages_table(cluster(EVIL)),
        requests_table(requests(EVIL)),
    ],
)
def test_names_mean_nothing_but_themselves(view: RenderableType):
    console = Console(width=200, file=StringIO(), force_terminal=True, color_system="standard")
    console.print(view)
    coloured = console.file.getvalue()
    assert "\x07" not in coloured and "\x1b[31mevil" not in coloured
    text = drawn(view, 300)
    assert HARMLESS[:8] in text and "\x1b" not in text and "\x07" not in text


def test_the_names_are_whole():
    text = drawn(pools_view(pools(EVIL)), 300)
    assert text.count(HARMLESS) == 1 + 4 + 6, "who holds, the outlooks, and the decisions shown"


@pytest.mark.parametrize(
    ("level", "words"),
    [(0.0, "░░░░░░░░ 0%"), (0.5, "████░░░░ 50%"), (1.0, "████████ 100%"), (7.0, "████████ 700%")],
)
def test_bars(level: float, words: str):
    assert bar(level, "").plain == words and bar(level, "pages").plain == f"{words} pages"
    assert bar(-1.0, "").plain.startswith("░░░░░░░░")


@pytest.mark.parametrize(("level", "colour"), [(0.5, "green"), (0.8, "yellow"), (1.01, "red")])
def test_bars_are_red_where_it_hurts(level: float, colour: str):
    assert bar(level, "").style == colour


def test_who_comes_and_goes():
    assert ready_words(trivium_pb2.Pool(ready_count=3)) == "3"
    assert ready_words(trivium_pb2.Pool(ready_count=3, lent_count=1)) == "3, 1 lent"


def test_nodes_without_pages_have_no_bars():
    [gateway] = [line for line in drawn(pages_table(cluster()), 200).splitlines() if "gateway" in line]
    assert "%" not in gateway and "░" not in gateway and "ready" in gateway


@pytest.mark.parametrize(
    ("age_s", "words"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (150.0, "2 min"), (7200.0, "2.0 h")],
)
def test_ages(age_s: float, words: str):
    assert ago(age_s) == words
