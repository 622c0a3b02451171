"""Charts hold the numbers of the report, as text, inside the picture and apart from each other."""

from __future__ import annotations

import builtins
import sys
from itertools import combinations

import numpy as np
import pytest

from lightning_compress.measure import chart
from lightning_compress.measure.chart import plot_pruning_curve, plot_report
from lightning_compress.measure.report import Measurement, compare
from tests.measure.test_report import DENSE, NOTHING, SMALL

pytest.importorskip("matplotlib")
HISTORY = [(step, min(0.9, step / 100), min(0.9, step // 10 / 10)) for step in range(0, 200, 5)]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to look inside."""
    saved = []
    save = chart.save_png

    def remember(figure, path):
        saved.append(figure)
        return save(figure, path)

    monkeypatch.setattr(chart, "save_png", remember)
    return saved


def texts(axes):
    return [text.get_text() for text in axes.texts]


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def picture(path):
    from matplotlib import image

    return image.imread(path)


def test_bars_carry_their_values_and_ticks_the_change(tmp_path, figures):
    plot_report(compare(DENSE, SMALL), tmp_path / "report.png", HISTORY)
    accuracy, size, latency, curve = figures[0].axes
    assert texts(accuracy) == ["91.20 %", "90.80 %", "91.00 %", "91.05 %"]
    assert ticks(accuracy) == ["torch\n-0.40 points", "onnx\n+0.05 points"]
    assert texts(size) == ["1.20 MB", "310 kB", "1.10 MB", "55.0 kB"]
    assert [bar.get_height() for bar in size.patches] == [1.2, 0.31, 1.1, 0.055]
    assert ticks(size) == ["file\n3.87x smaller", "zipped\n20.0x smaller"]
    assert texts(latency) == ["4.00 ms", "2.00 ms"]
    assert ticks(latency) == ["threads: 1\n1.75x faster"]
    np.testing.assert_array_equal(curve.lines[0].get_xydata(), [(s, t) for s, t, _ in HISTORY])
    np.testing.assert_array_equal(curve.lines[1].get_xydata(), [(s, a) for s, _, a in HISTORY])


def test_what_was_not_measured_has_no_bar(tmp_path, figures):
    plot_report(compare(DENSE, NOTHING), tmp_path / "half.png")
    plot_report(compare(NOTHING, NOTHING), tmp_path / "none.png")
    half, none = figures
    assert [len(axes.patches) for axes in half.axes] == [2, 2, 1]
    assert [axes.texts[-1].get_text() for axes in half.axes] == ["not\nmeasured"] * 3
    assert [texts(axes) for axes in none.axes] == [["not measured"]] * 3
    assert [len(axes.patches) for axes in none.axes] == [0, 0, 0]


def test_no_text_lies_on_another_or_outside(tmp_path, figures):
    wide = Measurement("a rather long name of a model", {"torch": 1.0, "onnx": 1.0}, 10**9, 10**9)
    plot_report(compare(DENSE, SMALL), tmp_path / "full.png", HISTORY)
    plot_report(compare(wide, SMALL), tmp_path / "wide.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        page, shown = figure.bbox, list(figure.legends[0].get_texts())
        for axes in figure.axes:
            shown += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
            shown += axes.get_xticklabels() if axes.patches else []
        boxes = [text.get_window_extent(renderer) for text in shown if text.get_text()]
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
        assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_files_are_pictures_with_something_on_them(tmp_path):
    report = plot_report(compare(DENSE, SMALL), tmp_path / "new" / "report.png")
    curve = plot_pruning_curve(HISTORY, str(tmp_path / "curve.png"))
    for path in (report, curve):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert picture(path).std() > 0.05


def test_names_are_not_read_as_formulas(tmp_path, figures):
    plot_report(compare(Measurement("costs $5 $"), Measurement("$\\nope$")), tmp_path / "report.png")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == [r"costs \$5 \$", r"\$\nope\$"]


def test_a_curve_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plot_pruning_curve([], tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_stays_out(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_report(compare(DENSE, SMALL), tmp_path / "report.png", HISTORY)
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'charts need matplotlib: pip install "lightning-compress\[demo\]"'):
        plot_report(compare(DENSE, SMALL), tmp_path / "report.png")
