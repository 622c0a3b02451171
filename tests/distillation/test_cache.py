"""A cache gives back what it took in, to whom it belongs, through crashes and other processes; all else it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.distillation import parts
from lightning_compress.distillation.cache import LogitCache, check_repeats
from lightning_compress.distillation.keys import example_keys
from lightning_compress.distillation.rows import RowFormat
from lightning_compress.errors import CompressError

DTYPES = {"float16": (torch.float16, "<f2"), "float32": (torch.float32, "<f4")}


def made(count, *shape, seed=0, first=0):
    """Keys and logits of examples."""
    logits = 4 * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return [(first + index).to_bytes(16, "big") for index in range(count)], logits


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 7), min_size=1, max_size=2),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 10**6),
    st.data(),
)
def test_whole_logits_come_back_rounded_to_the_dtype(count, shape, dtype, seed, data):
    keys, logits = made(count, *shape, seed=seed)
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=7))
    with tempfile.TemporaryDirectory() as folder:
        store = LogitCache(folder, dtype=dtype, top_k=data.draw(st.sampled_from([None, shape[-1], 99]))).open("a")
        store.add(keys, logits)
        for opened in (store, store.cache.open("a"), store.cache.open(None)):
            found = opened.find([keys[index] for index in order])
            assert found.dtype == torch.float32
            assert torch.equal(found, logits[order].to(DTYPES[dtype][0]).float())
            assert len(opened) == opened.known(keys) == count
            opened.close()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_files_are_rows_of_numbers_and_keys(tmp_path, dtype):
    keys, logits = made(5, 2, 3)
    store = LogitCache(str(tmp_path / "new" / "folder"), dtype=dtype).open("a")
    store.add(keys[:2], logits[:2])
    store.add(keys, logits)  # two are known
    store.add(keys[::-1], logits)  # all are
    values = np.fromfile(store.folder / "values-0.bin", DTYPES[dtype][1]).reshape(5, 2, 3)
    np.testing.assert_array_equal(values, logits.numpy().astype(DTYPES[dtype][1]))
    assert (store.folder / "keys-0.bin").read_bytes() == b"".join(keys)
    header = json.loads((store.folder / "header.json").read_text())
    assert header == {"format": 1, "teacher": "a", "shape": [2, 3], "dtype": dtype, "top_k": None}
    assert sorted(path.name for path in store.folder.iterdir()) == ["header.json", "keys-0.bin", "values-0.bin"]


def test_an_example_twice_in_a_batch_is_one_row_and_a_batch_partly_unknown_is_not_found(tmp_path):
    keys, logits = made(3, 4)
    store = LogitCache(tmp_path).open("a")
    assert (store.find(keys), store.known(keys), len(store)) == (None, 0, 0)
    store.add(keys[:2] * 2, torch.cat([logits[:2]] * 2))
    assert (store.find(keys), store.known(keys), len(store)) == (None, 2, 2)
    assert store.find(keys[:2] * 3).shape == (6, 4)
    store.add([], logits[:0])
    assert store.find([]).shape == (0, 4)


@pytest.mark.parametrize("given_as", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_come_in_any_floating_dtype(tmp_path, given_as):
    keys, logits = made(3, 4)
    store = LogitCache(tmp_path, dtype="float32").open("a")
    store.add(keys, logits.to(given_as).requires_grad_())
    assert torch.equal(store.find(keys), logits.to(given_as).float())


def test_a_class_that_the_teacher_rules_out_stays_so(tmp_path):
    keys, logits = made(2, 4)
    logits[:, 1:] = -math.inf
    for top_k in (None, 2):
        store = LogitCache(tmp_path / str(top_k), top_k=top_k).open("a")
        store.add(keys, logits)
        assert torch.equal(store.find(keys).softmax(-1), torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("shape", [(50,), (3, 50), (2, 70_000)], ids=str)
def test_top_classes_are_exact_and_the_others_share_the_rest_evenly(tmp_path, shape, dtype, tolerance):
    keys, logits = made(4, *shape)
    store = LogitCache(tmp_path, top_k=8, dtype=dtype).open("a")
    store.add(keys, logits)
    found = store.find(keys).double().numpy()
    wanted = logits.double().numpy()
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (wanted, found))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    order = np.argsort(-wanted, axis=-1)
    p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    np.testing.assert_allclose(q[..., :8], p[..., :8], rtol=4 * tolerance)
    rest, others = p[..., 8:].sum(-1, keepdims=True), shape[-1] - 8
    np.testing.assert_allclose(q[..., 8:], np.broadcast_to(rest / others, p[..., 8:].shape), rtol=4 * tolerance)
    divergence = (p * np.log(p / q)).sum(-1)  # all of it lies in the rest, which is uneven in the teacher
    uneven = (p[..., 8:] * np.log(p[..., 8:] * others / rest)).sum(-1)
    np.testing.assert_allclose(divergence, uneven, atol=tolerance)
    np.testing.assert_allclose(np.take_along_axis(found, order, -1)[..., :8], -np.sort(-wanted)[..., :8], rtol=1e-3)


def test_top_classes_take_little_room():
    assert RowFormat((32_000,), top_k=16).record.itemsize == 16 * (2 + 2) + 4
    assert RowFormat((128, 100_000), "float32", top_k=16).record.itemsize == 128 * (16 * (4 + 4) + 4)
    assert RowFormat((10,), top_k=16).record == RowFormat((10,)).record


@pytest.mark.parametrize(("kind", "cut"), [("keys", 1), ("keys", 15), ("values", 1), ("values", 9)])
def test_a_row_half_written_when_the_process_died_is_not_there(tmp_path, kind, cut):
    keys, logits = made(4, 5)
    LogitCache(tmp_path).open("a").add(keys[:3], logits[:3])
    path = tmp_path / f"{kind}-0.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    store = LogitCache(tmp_path).open("a")
    assert [store.known([key]) for key in keys] == [1, 1, 0, 0]
    store.add(keys, logits)
    for opened in (store, LogitCache(tmp_path).open("a")):
        assert torch.equal(opened.find(keys), logits.half().float())


def test_rows_without_keys_and_keys_without_values_are_not_there(tmp_path):
    keys, logits = made(3, 5)
    LogitCache(tmp_path).open("a").add(keys[:2], logits[:2])
    with (tmp_path / "values-0.bin").open("ab") as file:
        file.write(b"\0" * 27)
    (tmp_path / "keys-1.bin").touch()  # died between making its two files
    store = LogitCache(tmp_path).open("a")
    assert len(store) == 2
    store.add(keys, logits)
    assert torch.equal(LogitCache(tmp_path).open("a").find(keys), logits.half().float())


@pytest.mark.parametrize("kind", ["values", "keys"])
def test_a_full_disk_is_told_and_what_it_cut_is_not_gone_on_with(tmp_path, monkeypatch, kind):
    keys, logits = made(8, 5)
    store = LogitCache(tmp_path).open("a")
    store.add(keys[:1], logits[:1])
    append = parts._append

    def full(path, data):
        if path.name.startswith(kind):
            append(path, data[: len(data) // 2 + 1])
            raise OSError("no space left on device")
        append(path, data)

    monkeypatch.setattr(parts, "_append", full)
    with pytest.raises(OSError, match="no space left"):
        store.add(keys[1:7], logits[1:7])
    monkeypatch.setattr(parts, "_append", append)
    store.add(keys[7:], logits[7:])
    store.refresh()
    assert [store.known([key]) for key in keys] == [1, *([1, 1, 1] if kind == "keys" else [0] * 3), 0, 0, 0, 1]
    store.add(keys, logits)
    for opened in (store, LogitCache(tmp_path).open("a")):
        assert torch.equal(opened.find(keys), logits.half().float())


def test_rows_are_found_as_soon_as_they_are_added(tmp_path):
    keys, logits = made(6, 5)
    writer = LogitCache(tmp_path).open("a")
    writer.add(keys[:1], logits[:1])
    reader = LogitCache(tmp_path).open("a")
    for count in range(1, 7):
        writer.add(keys[:count], logits[:count])
        reader.refresh()
        for store in (writer, reader):
            assert torch.equal(store.find(keys[:count]), logits[:count].half().float())


def test_processes_write_side_by_side_and_read_each_other_after_a_refresh(tmp_path):
    keys, logits = made(6, 5)
    left, right = LogitCache(tmp_path).open("a"), LogitCache(tmp_path).open("a")
    for start in (0, 2, 4):
        left.add(keys[start : start + 1], logits[start : start + 1])
        right.add(keys[start + 1 : start + 2], logits[start + 1 : start + 2])
    assert (left.known(keys), right.known(keys)) == (3, 4)  # the right one read a row with the header
    right.add(keys, logits)  # the left one's too, as it has not seen them
    for store in (left, right, LogitCache(tmp_path).open("a")):  # also one process after two
        store.refresh()
        assert len(store) == 6
        assert torch.equal(store.find(keys[::-1]), logits.flip(0).half().float())


def test_many_writers_at_once_lose_nothing(tmp_path):
    batches = [made(20, 3, seed=seed, first=20 * seed) for seed in range(8)]

    def run(batch):
        store = LogitCache(tmp_path).open("a")
        for at in range(0, 20, 4):
            store.add(batch[0][at : at + 4], batch[1][at : at + 4])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, batches))
    store = LogitCache(tmp_path).open("a")
    assert len(store) == 160
    for keys, logits in batches:
        assert torch.equal(store.find(keys), logits.half().float())


def test_another_data_set_is_not_found(tmp_path):
    images = torch.rand(8, 1, 4, 4)
    store = LogitCache(tmp_path).open("a")
    store.add(example_keys((images,), {}), made(8, 3)[1])
    assert store.find(example_keys((images.flip(0),), {})) is not None
    for others in (images.flip(-1), images.double(), images + 1e-6):
        assert store.find(example_keys((others,), {})) is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_a_copy_reads_the_same_and_writes_beside(tmp_path, copied):
    keys, logits = made(4, 5)
    store = LogitCache(tmp_path).open("a")
    store.add(keys[:2], logits[:2])
    assert store.find(keys[:2]) is not None
    other = copied(store)
    assert torch.equal(other.find(keys[:2]), logits[:2].half().float())
    other.add(keys[2:3], logits[2:3])
    store.add(keys[3:], logits[3:])
    assert torch.equal(LogitCache(tmp_path).open(None).find(keys), logits.half().float())
    assert len(pickle.dumps(store)) < 400


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({}, "b", r"has teacher 'a', this run has teacher 'b'.*give each a folder of its own"),
        ({"dtype": "float32"}, "a", r"has dtype 'float16', this run has dtype 'float32'; pass .*dtype='float16'"),
        ({"top_k": 2}, "a", r"has top_k None, this run has top_k 2; pass .*top_k=None"),
        ({"top_k": 2}, None, r"has top_k None, this run has top_k 2"),
    ],
)
def test_a_folder_of_another_teacher_or_format_is_refused(tmp_path, options, teacher, message):
    LogitCache(tmp_path).open("a").add(*made(2, 5))
    with pytest.raises(CompressError, match=message):
        LogitCache(tmp_path, **options).open(teacher)


@pytest.mark.parametrize("text", ['{"format": 2, "teacher": "a"}', "[1]", "not json"])
def test_another_version_is_refused(tmp_path, text):
    LogitCache(tmp_path).open("a").add(*made(2, 5))
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(CompressError, match=r"has format (2|None), this run has format 1; delete it"):
        LogitCache(tmp_path).open("a")


def test_another_teacher_that_came_first_meanwhile_is_refused(tmp_path):
    late = LogitCache(tmp_path).open("a")
    LogitCache(tmp_path).open("b").add(*made(2, 5))
    with pytest.raises(CompressError, match="has teacher 'b', this run has teacher 'a'"):
        late.add(*made(2, 5))


@pytest.mark.parametrize("name", ["notes.txt", "header.json.old", "keys-a.bin", "keys-0.bin", "folder/x"])
def test_a_folder_of_other_things_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CompressError, match=f"got '{name.split('/')[0]}'; give the cache a folder of its own"):
        LogitCache(tmp_path).open("a")


def test_hidden_files_are_nobodys(tmp_path):
    (tmp_path / ".gitignore").write_text("*")
    LogitCache(tmp_path).open("a").add(*made(2, 5))
    assert len(LogitCache(tmp_path).open("a")) == 2


def test_without_a_teacher_a_cache_is_only_read(tmp_path):
    with pytest.raises(CompressError, match="holds no logits yet; open it with a teacher"):
        LogitCache(tmp_path).open(None)
    LogitCache(tmp_path).open("a").add(*made(2, 5))
    with pytest.raises(CompressError, match="only to read"):
        LogitCache(tmp_path).open(None).add(*made(2, 5))


@pytest.mark.parametrize("shape", [(2, 6), (3, 5), (2, 1, 5), (2,)], ids=str)
def test_logits_of_another_shape_are_refused_with_the_cure(tmp_path, shape):
    store = LogitCache(tmp_path).open("a")
    store.add(*made(2, 5))
    with pytest.raises(ValueError, match=r"expected logits of shape \(2, 5\).*pad all batches to one fixed length"):
        store.add([b"a" * 16, b"b" * 16], torch.zeros(shape))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2), r"got examples of shape \(\); pass outputs="),
        (torch.zeros(2, 3, 4, 5), r"got examples of shape \(3, 4, 5\)"),
        (torch.zeros(3, 5), r"expected logits of shape \(2, \.\.\.\).*got \(3, 5\)"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), r"1 of 2 new examples \(the first is number 1.*NaN or \+inf"),
        (torch.tensor([[math.inf, 1.0], [2.0, 0.0]]), r"1 of 2 new examples \(the first is number 0.*NaN or \+inf"),
        (torch.tensor([[0.0, 1.0], [0.0, -1e9]]), r"do not fit float16; pass LogitCache\(dtype='float32'\)"),
    ],
)
def test_logits_that_no_cache_holds_are_refused_and_nothing_is_written(tmp_path, logits, message):
    store = LogitCache(tmp_path).open("a")
    with pytest.raises(ValueError, match=message):
        store.add([b"a" * 16, b"b" * 16], logits)
    assert (len(store), list(tmp_path.glob("*.bin"))) == (0, [])


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": True}, {"dtype": "bfloat16"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        LogitCache("folder", **options)


@pytest.mark.parametrize("seen", [(False, 0, 8), (True, 1, 8), (True, 8, 8), (True, 0, 0)])
def test_inputs_that_repeat_pass(seen):
    check_repeats(*seen)


def test_inputs_that_change_from_epoch_to_epoch_are_refused():
    with pytest.raises(CompressError, match=r"none of this batch's 8.*fix the augmentation's seed per example"):
        check_repeats(first_epoch_done=True, known=0, asked=8)
