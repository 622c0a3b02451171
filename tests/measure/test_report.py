"""The report says what was measured, rightly, and nothing else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.measure.latency import Latency
from lightning_compress.measure.report import Measurement, compare
from lightning_compress.measure.wording import NOT_MEASURED, three_digits, times

DENSE = Measurement(
    "dense",
    {"torch": 0.912, "onnx": 0.91},
    size_bytes=1_200_000,
    zipped_bytes=1_100_000,
    nonzero=300_000,
    total=300_000,
    latency=Latency(4.0, 3.5, 4.5, 3.4, 50, 1, 1.0),
)
SMALL = Measurement(
    "pruned int8",
    {"torch": 0.908, "onnx": 0.9105},
    size_bytes=310_000,
    zipped_bytes=55_000,
    nonzero=30_000,
    total=300_000,
    latency=Latency(2.0, 1.9, 2.6, 1.8, 50, 1, 1.75),
    note="int8 by ONNX Runtime",
)
NOTHING = Measurement("nothing")
ABOUT = {"machine": "x86_64, 2 cores", "data": "1000 images"}


def cells(report):
    return {row.quantity: (row.before, row.after, row.change) for row in report.rows()}


def test_every_row_of_a_full_report():
    assert cells(compare(DENSE, SMALL, about=ABOUT)) == {
        "accuracy (torch)": ("91.20 %", "90.80 %", "-0.40 points"),
        "accuracy (onnx)": ("91.00 %", "91.05 %", "+0.05 points"),
        "file, bytes": ("1,200,000", "310,000", "3.87x smaller"),
        "file zipped, bytes": ("1,100,000", "55,000", "20.0x smaller"),
        "non-zero weights": ("300,000", "30,000", "10.0x fewer"),
        "weights counted": ("300,000", "300,000", "same"),
        "sparsity": ("0.0000", "0.9000", "+0.9000"),
        "latency, median": ("4.00 ms", "2.00 ms", "1.75x faster"),
        "latency, p10 to p90": ("3.50 to 4.50 ms", "1.90 to 2.60 ms", ""),
        "latency, threads": ("1", "1", ""),
    }


def test_backwards_it_is_larger_more_and_slower():
    changes = {name: change for name, (_, _, change) in cells(compare(SMALL, DENSE)).items()}
    assert changes["file, bytes"] == "3.87x larger"
    assert changes["non-zero weights"] == "10.0x more"
    assert changes["latency, median"] == "1.75x slower"


def test_what_was_not_measured_says_so_on_its_side_only():
    got = cells(compare(DENSE, NOTHING))
    assert got["accuracy (onnx)"] == ("91.00 %", NOT_MEASURED, NOT_MEASURED)
    for before, after, change in got.values():
        assert before != NOT_MEASURED
        assert after == NOT_MEASURED
        assert change in (NOT_MEASURED, "")


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_a_report_of_nothing_holds_no_digit_but_those_of_its_own_words(form):
    text = getattr(compare(NOTHING, NOTHING), form)()
    assert re.findall(r"\d+", text.replace("p10 to p90", "")) == []
    assert text.count(NOT_MEASURED) >= 20


def test_a_place_measured_on_one_side_only_is_kept_in_order():
    got = compare(Measurement("a", {"torch": 0.5}), Measurement("b", {"onnx": 0.25, "torch": 0.5}))
    assert [row.quantity for row in got.rows()[:2]] == ["accuracy (torch)", "accuracy (onnx)"]
    assert cells(got)["accuracy (torch)"][2] == "same"
    assert cells(got)["accuracy (onnx)"] == (NOT_MEASURED, "25.00 %", NOT_MEASURED)


def test_latencies_measured_apart_are_compared_by_their_medians():
    apart = replace(SMALL, latency=replace(SMALL.latency, speedup=None))
    assert compare(DENSE, apart).changes()["speedup"] == 2.0


def test_unequal_and_unstated_threads_are_shown():
    other = replace(SMALL, latency=replace(SMALL.latency, threads=None))
    assert cells(compare(DENSE, other))["latency, threads"] == ("1", "not stated", "not equal")


def test_json_is_plain_and_whole():
    got = json.loads(json.dumps(compare(DENSE, SMALL, about=ABOUT).json(), allow_nan=False))
    assert got["schema"] == 2
    assert got["about"] == ABOUT
    assert got["before"]["latency"]["p90_ms"] == 4.5
    assert got["after"]["sparsity"] == pytest.approx(0.9)
    assert got["changes"]["zipped_ratio"] == 20.0
    assert got["changes"]["speedup"] == 1.75
    assert got["changes"]["accuracy_points"] == pytest.approx({"torch": -0.4, "onnx": 0.05})


def test_json_has_null_for_what_was_not_measured():
    got = compare(DENSE, NOTHING).json()
    assert got["after"]["size_bytes"] is got["after"]["latency"] is got["after"]["sparsity"] is None
    assert set(got["changes"].pop("accuracy_points").values()) == {None}
    assert set(got["changes"].values()) == {None}


def test_save_writes_three_files_and_says_where(tmp_path):
    report = compare(DENSE, SMALL, about=ABOUT)
    paths = report.save(tmp_path / "new" / "folder")
    assert {name: path.name for name, path in paths.items()} == {
        n: n for n in ("report.md", "report.json", "report.html")
    }
    assert paths["report.md"].read_text(encoding="utf-8") == report.markdown()
    assert json.loads(paths["report.json"].read_text(encoding="utf-8")) == json.loads(json.dumps(report.json()))


def test_markdown_is_a_table_of_four_columns_with_notes():
    text = compare(replace(DENSE, name="dense | fp32"), SMALL, about=ABOUT).markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert "dense \\| fp32" in table[0]
    assert "- pruned int8: int8 by ONNX Runtime\n- machine: x86_64, 2 cores\n- data: 1000 images\n" in text


@pytest.mark.parametrize("name", ["dense", "a name of many words that would never fit into a column", "x" * 60])
def test_text_fits_a_terminal_and_lines_up(name):
    huge = 10**12
    before = Measurement(name, {"torch, fake-quantized": 1.0}, huge, huge, huge, huge, DENSE.latency, "w " * 90)
    lines = compare(before, replace(SMALL, name=name), about=ABOUT).text().splitlines()
    assert max(map(len, lines)) <= 100
    table = lines[: lines.index("")]
    ruler = next(line for line in table if line.startswith("---"))
    assert all(len(line) <= len(ruler) for line in table)
    assert {len(line) for line in table if line.endswith(("smaller", "fewer", "points"))} == {len(ruler)}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"accuracy": {"torch": 91.2}}, "fraction in .*got 91.2 for 'torch' of 'm'; divide per cents by 100"),
        ({"accuracy": {"torch": math.nan}}, "got nan"),
        ({"size_bytes": -1}, "size_bytes counts from 0, got -1"),
        ({"nonzero": 5, "total": 4}, "at most total=4 .* got 5"),
    ],
)
def test_impossible_measurements_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        Measurement("m", **values)


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_times_is_the_ratio_to_three_digits_and_its_direction(before, after):
    text = times(before, after, "smaller", "larger")
    if before == after:
        assert text == "same"
        return
    shown, word = text.replace(",", "").split("x ")
    assert word == ("smaller" if after < before else "larger")
    assert float(shown) == pytest.approx(max(before, after) / min(before, after), rel=0.006)


def test_a_side_of_zero_has_no_ratio():
    assert times(5, 0, "smaller", "larger") == times(0, 5, "smaller", "larger") == "no ratio"
    assert times(0, 0, "smaller", "larger") == "same"


@given(st.floats(1e-4, 1e9))
def test_three_digits_keeps_three_digits(value):
    text = three_digits(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006)
