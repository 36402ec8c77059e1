"""The report: what is drawn is what ranks hold, no name in a model becomes markup, the page is complete."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.helpers import families
from tests.helpers.browser import browse, chromium
from tests.helpers.toys import Attention, Mlp
from tpcompile import Plan, TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.layout.segment import Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout, whole_layout
from tpcompile.ir.units import ranks_text
from tpcompile.planner.report import notebook
from tpcompile.planner.report.bars import loads
from tpcompile.planner.report.draw_graph import draw_graph
from tpcompile.planner.report.draw_partition import draw_partition
from tpcompile.planner.report.graph_boxes import boxes_of
from tpcompile.planner.report.graph_layout import lay_out
from tpcompile.planner.report.graph_section import graph_section
from tpcompile.planner.report.layer_kinds import kinds_of
from tpcompile.planner.report.markup import data, tag
from tpcompile.planner.report.notebook import graph_html
from tpcompile.planner.report.partition import MOST_CELLS, Partition, partition_of
from tpcompile.planner.report.timeline import timeline_of
from tpcompile.planner.report.tree import tree_of
from tpcompile.planner.report.weights_section import weights_section
from tpcompile.planner.search.axis_costs import EXACT

EVIL = "</script><script>alert('name')</script>&\"<b>"
X = torch.zeros(2, 5, 20)


class Nowhere(nn.Module):
    """Packed and plain attention, layers that repeat, one that does not, a name that wants to be markup."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([Attention(packed) for packed in (True, False)])
        self.layers = nn.ModuleList([Mlp(20, inner) for inner in (28, *[44] * 6)])
        self.add_module(EVIL, nn.Linear(20, 37, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.mixers, *self.layers):
            x = x + layer(x)
        y: Tensor = self._modules[EVIL](x)  # type: ignore[misc]
        return y


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Four ranks over two groups of keys: sub-axes, copies, segments and uneven parts at once."""
    return tpcompile.plan(Nowhere().eval(), 4, (X,), cost_model="cpu")


@pytest.fixture(scope="module")
def other() -> Plan:
    """The same model over two ranks."""
    return tpcompile.plan(Nowhere().eval(), 2, (X,))


@pytest.fixture(scope="module")
def page(plan: Plan, other: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    plan.report(path, title=EVIL, beside=other)
    return path


class Parsed(HTMLParser):
    """The elements of a page, with the text directly in each; refuses what is not closed."""

    VOID = {"meta", "input", "link", "br"}

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.elements: list[tuple[str, dict[str, Any], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = (tag, dict(attrs), list[str]())
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self.open:
            texts.append(data)

    def find(self, tag: str, **attributes: str) -> Iterator[tuple[dict[str, Any], str]]:
        for name, found, texts in self.elements:
            if name == tag and all(found.get(k.rstrip("_")) == v for k, v in attributes.items()):
                yield found, "".join(texts)


# -------------------------------------------------------------------------- what is drawn


def painted(partition: Partition, rank: int) -> Tensor:
    """Which elements of a drawn parameter a rank holds."""
    canvas = torch.zeros(partition.size, dtype=torch.int)
    for cell in partition.cells:
        if rank in cell.ranks:
            canvas[slice(*cell.rows), slice(*cell.columns)] += 1
    return canvas


def test_drawings_show_what_ranks_hold(plan: Plan) -> None:
    layout, seen = plan.layout, set()
    for name, param in layout.params.items():
        partition = partition_of(layout, name)
        assert partition is not None and partition.drawn == plan.ranks
        indices = torch.arange(math.prod(param.shape)).reshape(param.shape)
        for rank in range(plan.ranks):
            held = torch.isin(indices, layout.shard(name, indices, rank)).int()
            assert torch.equal(painted(partition, rank), held.reshape(partition.size))
        holders = {len(cell.ranks) for cell in partition.cells}
        seen |= {("holders", *sorted(holders)), ("borders", bool(partition.rows))}
        seen.add(("uneven", len({cell.rows[1] - cell.rows[0] for cell in partition.cells}) > 1))
    # All kinds of drawing were there: for one rank, for some, for all; in segments; uneven.
    assert seen >= {("holders", 1), ("holders", 2), ("holders", 4), ("borders", True), ("uneven", True)}


def test_more_dimensions_than_two() -> None:
    """Of a stack of experts the divided dimension is drawn, whichever it is."""
    factors = ((8,), (6,), (10,))
    for dim, drawn in ((0, (0, 2)), (1, (1, 2)), (2, (1, 2))):
        segment = Segment(factors, ((0, 8), (0, 6), (0, 10)), factors, (dim,))
        param = ParamLayout("stack", (8, 6, 10), torch.float32, (segment,))
        partition = partition_of(WeightLayout((2,), {"stack": param}), "stack")
        assert partition is not None and partition.dims == drawn
        half = (8, 6, 10)[dim] // 2
        along = [(cell.columns if dim == 2 else cell.rows, cell.ranks) for cell in partition.cells]
        assert along == [((0, half), (0,)), ((half, 2 * half), (1,))]


def test_many_ranks_are_not_all_drawn() -> None:
    segment = Segment(((4096,),), ((0, 4096),), ((4096,),), (0,))
    param = ParamLayout("weight", (4096,), torch.float32, (segment,))
    partition = partition_of(WeightLayout((1024,), {"weight": param}), "weight")
    assert partition is not None
    assert len(partition.cells) == partition.drawn == MOST_CELLS


def test_a_tree_shows_modules_that_are_alike_once(plan: Plan) -> None:
    tree = tree_of(plan.layout.params)
    weights = {weight.path: weight for weight in tree.every_weight()}
    assert sum(weight.count for weight in weights.values()) == len(plan.layout.params)
    assert weights["layers.1\N{EN DASH}6.up.weight"].count == 6
    assert weights["layers.0.up.weight"].count == 1
    assert [each.label for each in tree.inside] == ["mixers", "layers", f"{EVIL}.weight"]


def test_bars_add_up(plan: Plan) -> None:
    found = loads(plan.layout, tree_of(plan.layout.params))
    held = {rank: load.bytes for load in found for rank in load.ranks}
    assert held == {rank: plan.layout.held(rank) for rank in range(plan.ranks)}
    for load in found:
        expected = dict.fromkeys((1, 2, 4), 0)  # by how many ranks hold the same
        for name, param in plan.layout.params.items():
            indices = torch.arange(math.prod(param.shape)).reshape(param.shape)
            parts = [plan.layout.shard(name, indices, rank) for rank in range(plan.ranks)]
            holders = sum(torch.isin(parts[load.ranks[0]], part).int() for part in parts)
            for count in expected:
                expected[count] += int((holders == count).sum()) * param.dtype.itemsize  # type: ignore[union-attr]
        assert (load.own, load.shared, load.whole) == tuple(expected.values())


def test_a_timeline_adds_up_to_the_modelled_time(plan: Plan) -> None:
    """Also where one layer stands for others, and where two sub-axes share every cost."""
    assert plan.planned is not None and plan.planned.blocks is not None and len(plan.axis_sizes) == 2
    stretches = timeline_of(plan.planned, plan.cost)
    assert sum(each.seconds() for each in stretches) == pytest.approx(plan.seconds, rel=1e-9)
    assert [(s.name, s.times) for s in stretches if s.name.startswith("layers")] == [
        ("layers.*", 1),
        ("layers.*", 6),
    ]
    sends = sum(e.times for s in stretches for e in s.events if e.lane == "send")
    assert sends == sum(each.count for each in plan.collectives)


def test_a_graph_is_drawn_with_all_its_collectives(plan: Plan) -> None:
    program = plan.rewritten
    assert program is not None
    kinds = kinds_of(program)
    assert [(kind.name, kind.numbers) for kind in kinds] == [
        ("mixers.0", (0,)),  # packed
        ("mixers.1", (1,)),
        ("layers.3", (0, 1, 2, 3, 4, 5, 6)),
    ]
    for name, nodes in ((kind.name, kind.nodes) for kind in kinds):
        boxes = boxes_of(program, name, nodes)
        assert sorted(n.name for b in boxes.boxes if b.kind not in ENDS for n in b.nodes) == sorted(
            n.name for n in nodes
        )
        sends = [n for n in nodes if n.target in markers.COMMUNICATING]
        assert sends and len([b for b in boxes.boxes if b.kind == "collective"]) == len(sends)
        (sent,) = (b for b in boxes.boxes if b.nodes == sends[-1:] and b.kind == "collective")
        assert {p for (_, end), ps in boxes.edges.items() if end is sent for p in ps} == {"P(sum) x P(sum)"}
        assert {p for (start, _), ps in boxes.edges.items() if start is sent for p in ps} == {"R x R"}
        drawn = Parsed(draw_graph(boxes))
        assert len(list(drawn.find("g", class_="tpc-collective"))) == len(sends)


ENDS = {"given", "result"}


class Given(Mlp):
    """A layer that is given something beside its input, as masks and positions are."""

    def forward(self, x: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = x + super().forward(x * given)
        return y


class Alternating(nn.Module):
    """Every third layer is of another width, and is given the other of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Given(20, 36 if number % 3 == 2 else 28) for number in range(15))

    def forward(self, x: Tensor) -> Tensor:
        given = (x.sin(), x.cos())
        for number, layer in enumerate(self.layers):
            x = layer(x, given[number % 3 == 2])
        return x


def test_each_kind_of_layer_is_drawn_once() -> None:
    """Those that capture has left out belong to a kind too."""
    program = tpcompile.plan(Alternating().eval(), 2, (X,)).rewritten
    assert program is not None and program.blocks is not None
    kinds = {tuple(sorted(kind.numbers)): kind.name for kind in kinds_of(program)}
    assert set(kinds) == {(2, 5, 8, 11, 14), (0, 1, 3, 4, 6, 7, 9, 10, 12, 13)}
    assert kinds[2, 5, 8, 11, 14] == "layers.8"
    page = graph_section(program)
    assert page.count("tpc-graph") == 2 and "as all of 2, 5, 8, 11, 14" in page


PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "layer.svg"


def test_the_drawing_in_the_documentation_is_ours(request: pytest.FixtureRequest) -> None:
    """``--update-golden`` draws it anew."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=2,
        vocab_size=128,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    program = tpcompile.plan(model, 4).rewritten
    assert program is not None
    kind = kinds_of(program)[-1]
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" '
    drawn = draw_graph(boxes_of(program, kind.name, kind.nodes)).replace("<svg ", head, 1) + "\n"
    if request.config.getoption("--update-golden"):
        PICTURE.write_text(drawn)
    assert PICTURE.read_text() == drawn


def test_a_layout_has_edges_downward_and_boxes_apart() -> None:
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"), ("w", "d"), ("d", "e")]
    widths = {name: 30.0 + 10 * i for i, name in enumerate("abcwde")}
    found = lay_out(widths, edges)
    assert all(found.row[source] < found.row[target] for source, target in edges)
    assert found.row["w"] == found.row["d"] - 1  # right above what needs it
    assert len(found.paths["a", "d"]) == 3  # it passes the row of b and c
    for one, other in itertools.combinations(widths, 2):
        if found.row[one] == found.row[other]:
            apart = abs(found.centre[one] - found.centre[other])
            assert apart > (widths[one] + widths[other]) / 2
    assert all(width / 2 <= found.centre[n] <= found.width - width / 2 + 0.1 for n, width in widths.items())


def test_one_rank_holds_everything() -> None:
    """There is nothing to tell apart."""
    layout = WeightLayout((1,), {"a": whole_layout("a", torch.zeros(3, 4), 1)})
    partition = partition_of(layout, "a")
    assert partition is not None and [cell.ranks for cell in partition.cells] == [(0,)]
    assert "every rank" not in draw_partition(partition, 99, 99)


def test_ranks_are_named_by_runs() -> None:
    assert ranks_text((0, 1, 2, 5, 7, 8)) == "0\N{EN DASH}2, 5, 7\N{EN DASH}8"


# -------------------------------------------------------------------------- the page


def test_text_stays_text() -> None:
    assert "<script" not in tag("p", EVIL, title=EVIL).replace("</p>", "")
    assert "</script" not in data("x", EVIL).removesuffix("</script>")
    assert json.loads(Parsed(data("x", {"a": EVIL})).elements[0][2][0]) == {"a": EVIL}


def test_the_page_says_what_the_plan_says(plan: Plan, page: Path) -> None:
    text = page.read_text()
    parsed = Parsed(text)
    (script,) = parsed.find("script", type="application/json")
    found = json.loads(script[1])
    assert (found["ranks"], found["axes"], found["seconds"]) == (4, [2, 2], plan.seconds)
    assert sum(w["count"] * w["bytes"] for w in found["weights"]) == plan.layout.held(0)
    assert found["collectives"] == [vars(each) for each in plan.collectives]
    assert EVIL in next(text for _, text in parsed.find("h1"))
    rows = {attributes["data-name"] for attributes, _ in parsed.find("details", class_="weight")}
    assert rows == {w["path"] for w in found["weights"]}
    # The alternatives are those of plan.explain.
    shown = "".join(text for _, text in parsed.find("table", class_="why"))
    prices = [
        line.split(": ", 1)[1] for line in plan.explain("layers.1").splitlines() if line.startswith("    ")
    ]
    assert prices and all(price in shown for price in prices)


def test_the_page_is_whole(page: Path) -> None:
    text = page.read_text()
    parsed = Parsed(text)
    assert len(text.encode()) < 500_000
    assert len([1 for _ in parsed.find("script")]) == 2  # the data and ours: no name has become one
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a and not a["id"].startswith("tpc")]
    assert len(ids) == len(set(ids))
    targets = [a[key] for _, a, _ in parsed.elements for key in ("href", "src", "srcset", "data") if key in a]
    assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text


def test_a_page_of_many_weights_stays_small() -> None:
    """Hundreds on many ranks, some of them uneven; those that look alike are drawn once."""
    params = {}
    for i in range(400):
        size = 64 * (2 + i) + (i % 40 == 0)
        factors = ((size,), (256,))
        segment = Segment(factors, ((0, size), (0, 256)), factors, (i % 2,))
        name = f"part_{i}.weight"
        params[name] = ParamLayout(name, (size, 256), torch.float32, (segment,))
    section = weights_section(WeightLayout((64,), params), tree_of(params), {})
    parsed = Parsed(section)
    assert len(list(parsed.find("details", class_="weight"))) == 400
    assert len(section.encode()) < 800_000
    names = {a["id"] for _, a, _ in parsed.elements if a.get("id", "").startswith("drawing")}
    used = [a["href"].removeprefix("#") for a, _ in parsed.find("use")]
    assert len(used) == 800 and set(used) == names and len(names) < 30


def test_a_plan_from_disk_shows_what_it_has(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    Plan.load(tmp_path / "plan.json").report(tmp_path / "report.html")
    parsed = Parsed((tmp_path / "report.html").read_text())
    assert len(list(parsed.find("details", class_="weight"))) > 5
    assert not list(parsed.find("table", class_="why"))


def test_what_differs_between_plans(plan: Plan, other: Plan, page: Path) -> None:
    lines = plan.diff(other).splitlines()
    assert lines[0].startswith("- 4 ranks as 2 x 2: 10 collectives")
    assert lines[1].startswith("+ 2 ranks: 10 collectives")
    at = lines.index("layers.*.up.weight x 6")
    assert lines[at + 1 : at + 3] == ["- S(0) x S(0) [11, 20] float32", "+ S(0) [22, 20] float32"]
    assert plan.diff(plan).count("the same") == 2
    one, two = replace(plan, notes=("mine",)), replace(plan, collectives=plan.collectives[1:])
    assert one.diff(two).splitlines()[-2:] == [
        "- all_reduce x 2 of 800 B in mixers.*.out",
        "- note: mine",
    ]
    parsed = Parsed(page.read_text())
    rows = [text for _, text in parsed.find("tr") if "[11, 20]" in text]
    assert len(rows) == 1 and "layers.*.up.weight × 6" in rows[0] and "[22, 20]" in rows[0]


def test_a_notebook_shows_plans_and_graphs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = list(tree_of(plan.layout.params).every_weight())
    assert len(list(Parsed(plan._repr_html_()).find("tr"))) == len(weights)
    monkeypatch.setattr(notebook, "MOST_WEIGHTS", 3)
    assert len(list(Parsed(plan._repr_html_()).find("tr"))) == 3
    assert f"and {len(weights) - 3} more" in plan._repr_html_()
    assert f"{EVIL}" not in plan._repr_html_()
    assert plan.rewritten is not None
    assert len(list(Parsed(graph_html(plan.rewritten)).find("g", class_="tpc-matmul"))) == 2
    assert repr(plan).startswith("<Plan for 4 ranks as 2 x 2: ") and len(repr(plan)) < 120


def test_a_place_that_cannot_be_written_is_refused(plan: Plan, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "no" / "folder", "\0"):
        with patch("tpcompile.planner.plan.report_page") as made:
            with pytest.raises(TpCompileError, match="cannot be written"):
                plan.report(place)
        made.assert_not_called()  # nobody waits for it
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- in a browser

PROGRAM = chromium()


def test_pages_of_four_kinds_of_models(tmp_path: Path) -> None:
    """Dense, packed, of experts, encoder-decoder (the fifth is ``Nowhere``): complete, no errors."""
    pages = {}
    for name in ("llama", "phi3", "mixtral", "t5"):
        plan = tpcompile.plan(families.build(name), 2, example_kwargs=families.inputs(name))
        pages[name] = tmp_path / f"{name}.html"
        plan.report(pages[name], name, explain=False)
        parsed = Parsed(pages[name].read_text())
        weights = json.loads(next(parsed.find("script", id="plan"))[1])["weights"]
        assert sum(w["count"] * w["bytes"] for w in weights) == plan.layout.held(0)
        assert plan.planned is not None
        stretches = timeline_of(plan.planned, plan.cost)
        rounded = sum(event.times for each in stretches for event in each.events) / EXACT
        assert sum(each.seconds() for each in stretches) == pytest.approx(plan.seconds, rel=0, abs=rounded)
        graphs = list(parsed.find("svg", class_="tpc-graph"))
        assert len(graphs) == (4 if name == "t5" else 1)  # the first blocks have the position biases
        assert len(list(parsed.find("g", class_="tpc-collective"))) >= 2 * len(graphs)
    if PROGRAM is not None:
        with browse(PROGRAM, tmp_path / "profile") as browser:
            for page in pages.values():
                browser.open(page, 700, "dark")
                assert browser.run("document.documentElement.scrollWidth") <= 700
                assert browser.problems == []


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")
def test_in_a_browser(page: Path, plan: Plan, tmp_path: Path) -> None:
    assert PROGRAM is not None
    shown = "[...document.querySelectorAll('details.weight')].filter(e => e.checkVisibility()).length"
    every = len(list(tree_of(plan.layout.params).every_weight()))
    with browse(PROGRAM, tmp_path) as browser:
        for width, scheme in ((1200, "light"), (380, "dark")):
            browser.open(page, width, scheme)
            assert browser.run(shown) == every
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("getComputedStyle(document.body).colorScheme") == "light dark"
            # Folding.
            browser.click("#close")
            assert browser.run(shown) == every - browser.run(
                "document.querySelectorAll('.module .weight').length"
            )
            browser.click("details.module > summary")
            assert browser.run("document.querySelector('details.module').open")
            # Search, with the keyboard.
            browser.press("/")
            browser.type("layers up.weight")
            assert browser.run(shown) == 2
            assert browser.run("document.getElementById('found').textContent") == "2 weights"
            # Why, on a click.
            browser.click("details.weight:not([hidden]) > summary")
            why = "document.querySelector('details.weight[open] .why').checkVisibility()"
            assert browser.run(why)
            browser.run("document.getElementById('find').focus()")
            browser.press("Escape")
            browser.click("#open")
            assert browser.run(shown) == every
            assert browser.problems == []
        light, dark = (_paper(browser, page, scheme) for scheme in ("light", "dark"))
        assert light != dark


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")
def test_on_paper(page: Path, tmp_path: Path) -> None:
    """Modules are unfolded, what is for the screen is left out, paper is white for dark screens too."""
    assert PROGRAM is not None
    shown = "[...document.querySelectorAll('%s')].filter(e => e.checkVisibility()).length"
    with browse(PROGRAM, tmp_path) as browser:
        browser.open(page, 1200, "dark")
        browser.click("#close")
        assert browser.run(shown % "nav, .tools") > 1
        assert browser.run(shown % ".module .weight") == 0
        assert len(browser.call("Page.printToPDF")["data"]) > 10_000
        assert browser.run(shown % ".module .weight") > 1
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        browser.call("Emulation.setEmulatedMedia", media="print", features=[dark])
        assert browser.run(shown % "nav, .tools, .lead, #find") == 0
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.problems == []


def _paper(browser: Any, page: Path, scheme: str) -> str:
    browser.open(page, 800, scheme)
    colour: str = browser.run("getComputedStyle(document.body).backgroundColor")
    return colour
