"""The HTML page: one inert file, whole without a network, and laid out by a real browser without overlaps."""

from __future__ import annotations

import builtins
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_compress.measure.attributions import Attributions
from lightning_compress.measure.differences import compare_predictions
from lightning_compress.measure.examples import Examples, as_picture
from lightning_compress.measure.html_parts import png
from lightning_compress.measure.layers import grouped_layers, layer_changes
from lightning_compress.measure.report import Measurement, compare
from lightning_compress.measure.size import LayerRow
from tests.measure.test_report import ABOUT, DENSE, NOTHING, SMALL

pytest.importorskip("matplotlib")
EVIL = """<script>window.hit=1</script>"'><img src=x onerror="window.hit=1">&amp;--> $x$ """
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLASSES = ["T-shirt", "Trouser", "Pullover", EVIL]


def layers(count=60, name="encoder.layer.{}.attention.self.query.weight"):
    before = [LayerRow(name.format(i), (8, 8), 64, 64, 0.0, 32) for i in range(count)]
    after = [replace(row, nonzero=64 - i % 64, sparsity=i % 64 / 64, bits=8) for i, row in enumerate(before)]
    return layer_changes(before, after[1:])


def full(evil=EVIL, count=60):
    """A report with everything in it; `evil` stands wherever a user's text can."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    before = torch.nn.functional.one_hot(labels, 4) * 3.0 + torch.randn(40, 4, generator=generator)
    after = before + torch.randn(40, 4, generator=generator)
    images = torch.randn(40, 1, 6, 5, generator=generator)
    heat, ids = torch.randn(2, 1, 6, 5, generator=generator), torch.arange(10).view(2, 5)
    words = [[evil, "not", "bad", "at", "all"]] * 2
    strip = torch.randn(2, 5, generator=generator)
    return compare(
        replace(DENSE, name=f"dense {evil}", macs=1e9, note=evil, accuracy={"torch": 0.9, evil: 0.8}),
        replace(SMALL, energy_joules=0.0123, accuracy={"torch": 0.9, evil: 0.7}),
        about={**ABOUT, evil: evil},
        layers=[*layers(count - 1), *layer_changes([], [LayerRow(evil, (2, 2), 4, 1, 0.75, 4)])],
        differences=compare_predictions(before, after, labels, {evil: labels > 1}),
        history=[(step, step / 100, step // 10 / 10) for step in range(0, 91, 5)],
        explanations=[
            Attributions("occlusion", images[:2], labels[:2], heat, heat.flip(0)),
            Attributions(
                evil, ids, labels[:2], strip, strip, torch.tensor([[1] * 5, [1] * 3 + [0] * 2]) > 0, None, words
            ),
        ],
        examples=Examples(images, [evil] * 40, CLASSES),
    )


@pytest.fixture(scope="module")
def whole():
    other = compare(DENSE, replace(SMALL, name="other", accuracy={"torch": 0.85}, size_bytes=500_000))
    return full().html([other])


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def test_nothing_is_fetched_and_nothing_runs(whole):
    read = Reader(whole)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(src.startswith("data:image/png;base64,") for src in read.values("src"))
    assert all(target.startswith("#") for name in ("href", "xlink:href") for target in read.values(name))
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    # Left over are the names of XML's vocabularies, which are no addresses to read from.
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', "", whole)
    assert "http" not in re.sub(r"http-equiv", "", rest)
    assert not re.search(r"@import|url\((?!#)", rest)


def test_hostile_text_is_shown_as_it_is(whole):
    shown = " ".join("".join(Reader(whole).text).split())
    # Title, heading, table, key, notes, classes, cards, words: at least once each.
    assert shown.count(" ".join(EVIL.split())) >= 12
    assert EVIL not in whole


def test_ids_are_there_once_and_links_lead_to_them(whole):
    read = Reader(whole)
    headings = [attrs["id"] for tag, attrs in read.tags if tag == "section"]
    assert [
        target.removeprefix("#") for tag, attrs in read.tags if tag == "a" for target in [attrs["href"]]
    ] == headings
    assert headings == [
        "numbers", "tradeoff-1", "tradeoff-2", "tradeoff-3", "layers", "schedule", "classes", "flipped",
        "attributions-1", "attributions-2", "about",
    ]  # fmt: skip
    assert max(Counter(headings).values()) == 1
    used = set(re.findall(r"url\(#([^)]+)\)", whole)) | {h[1:] for h in read.values("xlink:href")}
    assert used <= set(read.values("id"))


def test_a_report_of_nothing_has_no_chart_and_no_claim():
    page = compare(NOTHING, NOTHING).html()
    read = Reader(page)
    assert [attrs["id"] for tag, attrs in read.tags if tag == "section"] == ["numbers"]
    body = page[page.index("<main>") :].replace("p10 to p90", "")
    assert re.findall(r"\d+", re.sub(r"<[^>]*>", "", body)) == []
    assert "svg" not in body


def test_charts_carry_the_numbers_of_the_report(whole):
    svgs = re.findall(r"<svg.*?</svg>", whole, re.DOTALL)
    texts = [" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg)) for svg in svgs]
    assert len(svgs) == 3 + 3 + 1 + 1  # a trade-off at three places, 60 layers in three, schedule, classes
    for place, layer in enumerate(layers(59)):
        chart = texts[3 + place // 20]
        assert layer.name in chart
        assert layer.after is None or f"{layer.after.sparsity:.4f}" in chart
    for row in full().differences.classes:
        assert (f"{100 * row.delta:+.2f}" if row.delta else " 0 ") in texts[-1].replace("\N{MINUS SIGN}", "-")


def test_without_matplotlib_the_numbers_are_there_and_the_page_says_what_is_missing(monkeypatch, tmp_path):
    report, real = full(), builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    page = report.save(tmp_path)["report.html"].read_text(encoding="utf-8")
    assert "<svg" not in page
    assert page.count("charts need matplotlib: pip install") == 7
    assert all(escape(cell) in page for row in report.rows() for cell in row.cells)
    assert page.count("<img") == len(report.differences.flips[:24]) + 2 * 3


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_pictures_are_read_back_by_another_library(pixels):
    image = pytest.importorskip("PIL.Image")
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(pixels)))), pixels)


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
def test_pictures_of_every_layout(shape):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    got = as_picture(values)
    assert got.shape == (6, 5, 3)
    grey = values.reshape(6, 5) if values.size == 30 else None
    wanted = values.transpose(1, 2, 0) if shape == (3, 6, 5) else values[..., :3] if grey is None else grey[..., None]
    np.testing.assert_array_equal(got, np.broadcast_to(wanted, (6, 5, 3)))
    scaled = as_picture(values / 255.0 * 7 - 3)
    stretched = (got - float(values.min())) / (float(values.max()) - float(values.min())) * 255
    assert np.abs(scaled - stretched).max() <= 255 if shape[-1] == 4 else np.abs(scaled - stretched).max() < 1


def test_other_shapes_are_no_pictures():
    with pytest.raises(ValueError, match=r"shape \(h, w\).*got \(7,\)"):
        as_picture(np.zeros(7))


@given(st.integers(1, 150), st.integers(1, 8), st.integers(1, 70))
def test_groups_of_layers_lose_no_weight(count, words, most):
    rows = [
        LayerRow(
            ".".join(["b", str(i % 50), str(i)][-min(words, 3) :]), (i + 1,), i + 1, i // 2, 1 - (i // 2) / (i + 1), 8
        )
        for i in range(count)
    ]
    shown = grouped_layers(layer_changes(rows, rows), most)
    assert len(shown) <= max(most, 1)
    assert sum(layer.after.total for layer in shown) == sum(row.total for row in rows)
    assert sum(layer.after.nonzero for layer in shown) == sum(row.nonzero for row in rows)
    assert all(layer.before == layer.after for layer in shown)
    assert all(layer.after.sparsity == pytest.approx(1 - layer.after.nonzero / layer.after.total) for layer in shown)


def test_json_holds_what_the_page_shows(whole):
    report = full()
    got = json.loads(json.dumps(report.json(), allow_nan=False))
    assert got["layers"][0] == {
        "name": "encoder.layer.0.attention.self.query.weight",
        "shape_before": [8, 8], "sparsity_before": 0.0, "bits_before": 32,
        "shape_after": None, "sparsity_after": None, "bits_after": None,
    }  # fmt: skip
    assert got["differences"]["flips"][0]["index"] == report.differences.flips[0].index
    assert got["history"][-1] == [90, 0.9, 0.9]
    assert [each["method"] for each in got["explanations"]] == ["occlusion", EVIL]
    assert got["before"]["macs"] == 1e9
    assert got["changes"]["macs_ratio"] is got["changes"]["energy_ratio"] is None


def test_rows_of_new_measures_are_there_where_a_side_has_them():
    rows = {row.quantity: row.cells[1:] for row in compare(replace(DENSE, macs=1e9), SMALL).rows()}
    assert rows["MACs"] == ("1,000,000,000", "not measured", "not measured")
    assert not {"energy", "peak memory, bytes", "entropy bound, bytes", "MACs without zeros"} & rows.keys()
    measures = {"entropy_bytes": 10.4, "effective_macs": 30, "peak_memory_bytes": 60, "energy_joules": 0.002}
    halves = {name: value / 2 for name, value in measures.items()}
    rows = {
        row.quantity: row.cells[1:] for row in compare(Measurement("a", **measures), Measurement("b", **halves)).rows()
    }
    assert rows["entropy bound, bytes"] == ("10", "5", "2.00x smaller")
    assert rows["MACs without zeros"] == ("30", "15", "2.00x fewer")
    assert rows["peak memory, bytes"] == ("60", "30", "2.00x smaller")
    assert rows["energy"] == ("2.00 mJ", "1.00 mJ", "2.00x less")
    with pytest.raises(ValueError, match="energy_joules counts from 0, got nan"):
        Measurement("a", energy_joules=float("nan"))


def test_markdown_and_text_gain_the_new_parts():
    report = full("| name |")
    text = report.markdown()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Before and after compression", "## Layers", "## Accuracy by class and slice",
        f"## Flipped examples ({min(24, len(report.differences.flips))} of {len(report.differences.flips)})",
    ]  # fmt: skip
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    shown = " ".join(report.text().split())
    assert "schedule: sparsity 0.9000 of 0.9000 asked, at optimizer step 90" in shown
    assert f"{report.differences.right_to_wrong} right to wrong" in shown
    assert "attributions: occlusion, rank agreement (Spearman)" in shown
    assert max(map(len, report.text().splitlines())) <= 100


def open_in_browser(page, folder, width=1200):
    """Load a file as a user would; returns its final HTML and what it wrote to the console."""
    switches = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--dump-dom"),
    ]
    profile = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000"]
    done = subprocess.run(
        [BROWSER, *switches, *profile, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Run by the page around the report: how wide each report became, and every text of a chart that lies on another.
MEASURE = """
const found = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, lies = [];
  for (const svg of page.querySelectorAll("svg")) {
    const edge = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([name, a], i) => {
      if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
        lies.push("outside: " + name);
      for (const [other, b] of texts.slice(i + 1)) {  // boxes hold room above letters: 2 px of it may be shared
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 2 && y > 2) lies.push(name + " on " + other);
      }
    });
  }
  const sizes = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
  const pictures = [...page.querySelectorAll("img")].map(image => image.naturalWidth);
  return {hit: "hit" in frame.contentWindow, width: page.documentElement.scrollWidth, lies,
    smallest: Math.min(...sizes), pictures, charts: page.querySelectorAll("svg").length};
});
document.title = JSON.stringify(found);
"""


@pytest.mark.optional
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: install chromium")
def test_a_browser_opens_the_page_without_a_word_on_its_console(whole, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(whole, encoding="utf-8")
    shown, console = open_in_browser(page, tmp_path)
    assert console == []
    assert shown.count("<svg") == 8
    # That an error would have been seen, and a picture from the network refused:
    page.write_text(whole.replace("<main>", '<main><img src="https://localhost/x.png">'), encoding="utf-8")
    assert "Content Security Policy" in "".join(open_in_browser(page, tmp_path)[1])


@pytest.mark.optional
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: install chromium")
def test_charts_are_legible_on_a_telephone_and_on_a_desk(whole, tmp_path):
    page = tmp_path / "frames.html"
    frames = "".join(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(whole)}"></iframe>'
        for width in (400, 1100)
    )
    page.write_text(
        f"<!doctype html><body onload='measure()'>{frames}<script>function measure() {{{MEASURE}}}</script>"
    )
    shown, console = open_in_browser(page, tmp_path)
    assert console == []
    title = next(data for data in Reader(shown).text if data.startswith("[{"))
    for seen, width in zip(json.loads(title), (400, 1100), strict=True):
        assert not seen["hit"]
        assert seen["width"] <= width
        assert seen["lies"] == []
        assert seen["smallest"] >= 8  # px
        assert seen["charts"] == 8
        assert min(seen["pictures"]) == 5
