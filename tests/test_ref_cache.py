"""The cache of reference log-probs: found by content only, whole after any kill, shared by concurrent writers."""

import fcntl
import json
import signal
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from cache_tools import KEY, make_examples, reference, start_code

from dpo_fast.training.ref_cache import RefCache, compute_missing


def test_round_trip_is_bit_exact(tmp_path):
    examples = make_examples(50)
    values = np.random.default_rng(1).normal(size=(50, 2)) * 10.0 ** np.arange(-25, 25)[:, None]
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples[:20], values[:20].tolist())
    cache.put_many(examples[20:], torch.from_numpy(values[20:]))
    for reader in (cache, RefCache(tmp_path, **KEY)):
        found, missing = reader.lookup(examples)
        assert missing == []
        assert found.dtype == np.float64
        assert found.tobytes() == values.tobytes()
        assert reader.get(examples[7]) == tuple(values[7])
        assert len(reader) == 50
    header = json.loads(cache.path.with_suffix(".json").read_text())
    assert {k: header[k] for k in KEY} == KEY
    assert "reference log-probs" in header["about"]


def test_lookup_names_what_is_missing(tmp_path):
    examples = make_examples(5)
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples[1:3], [[-1, -2], [-3, -4]])
    values, missing = cache.lookup(examples)
    assert missing == [0, 3, 4]
    assert np.isnan(values[missing]).all()
    assert values[1:3].tolist() == [[-1, -2], [-3, -4]]
    assert cache.get(examples[0]) is None
    assert cache.lookup([])[0].shape == (0, 2)


def test_ids_of_any_integer_type_are_the_same_example(tmp_path):
    example = make_examples(1)[0]
    cache = RefCache(tmp_path, **KEY)
    cache.put_many([example], [[-1, -2]])
    for convert in (torch.tensor, np.array, lambda x: np.array(x, np.int32), lambda x: torch.tensor(x).int(), tuple):
        assert cache.get({k: convert(v) for k, v in example.items()}) == (-1, -2)
    for bad in ([1.5], [[1]], ["1"]):
        with pytest.raises(ValueError, match="chosen_ids must be a flat sequence of ints"):
            cache.get({**example, "chosen_ids": bad})


def test_a_changed_or_moved_token_misses(tmp_path):
    example = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    cache = RefCache(tmp_path, **KEY)
    cache.put_many([example], [[-1, -2]])
    for change in (
        {"prompt_ids": [1, 2, 7]},
        {"chosen_ids": [4, 7]},
        {"rejected_ids": [7]},
        {"rejected_ids": [6, 0]},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5]},
        {"chosen_ids": [4], "rejected_ids": [5, 6]},
        {"chosen_ids": [6], "rejected_ids": [4, 5]},
        {"prompt_ids": [], "chosen_ids": [1, 2, 3, 4, 5]},
    ):
        assert cache.get({**example, **change}) is None, change


@pytest.mark.parametrize(
    "change", [{"weights": "w1"}, {"precision": "fp32"}, {"version": "2"}, {"extra": {"temperature": 2.0}}]
)
def test_a_changed_key_misses_and_keeps_the_other_file(tmp_path, change):
    examples = make_examples(3)
    RefCache(tmp_path, **KEY).put_many(examples, reference(examples))
    other = RefCache(tmp_path, **{**KEY, **change})
    assert other.lookup(examples)[1] == [0, 1, 2]
    other.put_many(examples, reference(examples) - 1)
    assert RefCache(tmp_path, **KEY).get(examples[0]) == tuple(reference(examples)[0].tolist())
    assert RefCache(tmp_path, **KEY, extra={}).get(examples[0]) is not None


def test_a_torn_tail_is_dropped_at_every_byte(tmp_path):
    examples = make_examples(4)
    values = reference(examples).double().numpy()
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples, values)
    whole = cache.path.read_bytes()
    size = len(whole) // 4
    assert len(whole) == 4 * 36
    for cut in range(3 * size, 4 * size):
        cache.path.write_bytes(whole[:cut])
        torn = RefCache(tmp_path, **KEY)
        found, missing = torn.lookup(examples)
        assert missing == [3], cut
        assert (found[:3] == values[:3]).all()
        torn.put_many(examples[3:], values[3:])
        assert cache.path.read_bytes() == whole


def test_a_damaged_record_misses_and_the_others_stay(tmp_path):
    examples = make_examples(4)
    values = reference(examples).double().numpy()
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples, values)
    whole = bytearray(cache.path.read_bytes())
    for at in range(36, 72):
        damaged = whole.copy()
        damaged[at] ^= 4
        cache.path.write_bytes(damaged)
        repaired = RefCache(tmp_path, **KEY)
        assert repaired.lookup(examples)[1] == [1], at
        repaired.put_many(examples, values)
        assert (RefCache(tmp_path, **KEY).lookup(examples)[0] == values).all()
    # A file system may have allocated space and never filled it.
    cache.path.write_bytes(whole + bytes(72))
    assert len(RefCache(tmp_path, **KEY)) == 4


def test_a_deleted_file_is_written_anew(tmp_path):
    examples = make_examples(4)
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples[:3], reference(examples[:3]))
    cache.path.unlink()
    cache.put_many(examples[3:], reference(examples[3:]))
    assert RefCache(tmp_path, **KEY).lookup(examples)[1] == [0, 1, 2]


@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_a_value_that_is_not_finite_is_refused(tmp_path, bad):
    examples = make_examples(3)
    cache = RefCache(tmp_path, **KEY)
    with pytest.raises(ValueError, match="value 1 is not finite"):
        cache.put_many(examples, [[-1, -1], [-1, bad], [-1, -1]])
    assert len(RefCache(tmp_path, **KEY)) == len(cache) == 0
    compute = lambda batch: torch.tensor([[-1, bad if e is examples[2] else -1] for e in batch])  # noqa: E731
    with pytest.raises(ValueError, match=r"example 2 log-probs .*prompt_ids \d+, chosen_ids \d+"):
        compute_missing(cache, examples, 2, compute)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (3, 1), (2, 3)])
def test_values_of_a_wrong_shape_are_refused(tmp_path, shape):
    examples = make_examples(3)
    cache = RefCache(tmp_path, **KEY)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        cache.put_many(examples, np.zeros(shape))
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        compute_missing(cache, examples, 3, lambda batch: torch.zeros(shape))
    with pytest.raises(ValueError, match="batch_size"):
        compute_missing(cache, examples, 0, reference)


def test_compute_missing_longest_first_and_only_once(tmp_path):
    examples = make_examples(10)
    examples += [dict(e) for e in examples[:4]]
    calls, reports = [], []

    def compute(batch):
        calls.append([sum(map(len, e.values())) for e in batch])
        return reference(batch)

    values = compute_missing(RefCache(tmp_path, **KEY), examples, 3, compute, progress=lambda *a: reports.append(a))
    assert values.dtype == np.float64
    assert (values == reference(examples).double().numpy()).all()
    lengths = [n for call in calls for n in call]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(c) for c in calls] == [3, 3, 3, 1], "duplicates are computed once"
    assert reports == [(3, 10), (6, 10), (9, 10), (10, 10)]
    again = compute_missing(RefCache(tmp_path, **KEY), examples, 3, lambda batch: pytest.fail("computed again"))
    assert again.tobytes() == values.tobytes()


def test_misordered_examples_get_their_own_values(tmp_path):
    examples = make_examples(30)
    first = compute_missing(RefCache(tmp_path, **KEY), examples, 4, reference)
    order = np.random.default_rng(2).permutation(30)
    shuffled = compute_missing(RefCache(tmp_path, **KEY), [examples[i] for i in order], 4, reference)
    assert (shuffled == first[order]).all()


def test_an_interrupted_pass_resumes(tmp_path):
    examples = make_examples(10)

    def fails_at_third_call(batch, calls=[]):  # noqa: B006
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reference(batch)

    with pytest.raises(KeyboardInterrupt):
        compute_missing(RefCache(tmp_path, **KEY), examples, 2, fails_at_third_call)
    assert len(RefCache(tmp_path, **KEY)) == 4


def test_kill_in_the_middle_of_a_write_then_resume(tmp_path):
    child = start_code(
        tmp_path,
        """
        import os, signal, sys
        from dpo_fast.training import ref_cache
        from cache_tools import KEY, make_examples, reference

        fsync, calls = os.fsync, []
        def torn_fsync(fd):  # the fourth batch reaches the disk without its last 10 bytes
            calls.append(fd)
            if len(calls) == 4:
                os.ftruncate(fd, os.fstat(fd).st_size - 10)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(fd)
        os.fsync = torn_fsync
        ref_cache.compute_missing(ref_cache.RefCache(sys.argv[1], **KEY), make_examples(40), 4, reference)
        """,
    )
    assert child.wait(120).returncode == -signal.SIGKILL
    examples, computed = make_examples(40), []
    cache = RefCache(tmp_path, **KEY)
    assert len(cache) == 4 * 4 - 1

    def compute(batch):
        computed.append(len(batch))
        return reference(batch)

    values = compute_missing(cache, examples, 4, compute)
    assert computed == [4] * 6 + [1], "25 of 40 examples are left"
    assert (values == reference(examples).double().numpy()).all()
    assert cache.path.stat().st_size == 40 * 36


def test_concurrent_writers(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from dpo_fast.training.ref_cache import RefCache
        from cache_tools import KEY, make_examples, reference

        folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        examples, cache = make_examples(600), RefCache(folder, **KEY)
        Path(folder, f"ready{first}").touch()
        while len(list(Path(folder).glob("ready*"))) < 2:
            time.sleep(0.001)
        for i in range(first, last, 2):
            cache.put_many(examples[i : i + 2], reference(examples[i : i + 2]))
    """
    children = [start_code(tmp_path, code, *part) for part in ((0, 400), (200, 600))]
    assert [child.wait(120).returncode for child in children] == [0, 0]
    examples, cache = make_examples(600), RefCache(tmp_path, **KEY)
    values, missing = cache.lookup(examples)
    assert missing == []
    assert (values == reference(examples).double().numpy()).all()
    assert cache.path.stat().st_size == 600 * 36, "each example is stored once"


def test_writers_and_readers_wait_for_the_lock(tmp_path):
    examples = make_examples(2)
    cache = RefCache(tmp_path, **KEY)
    cache.put_many(examples[:1], [[-1, -2]])
    record = cache.path.read_bytes()
    with ThreadPoolExecutor(2) as pool:
        with open(cache.path, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(record[:20])  # another writer, half way through its append
            put = pool.submit(cache.put_many, examples[1:], [[-3, -4]])
            read = pool.submit(RefCache, tmp_path, **KEY)
            done, _ = wait([put, read], timeout=0.3)
            assert not done
            file.write(record[20:])
        put.result(timeout=60)
        assert read.result(timeout=60).get(examples[0]) == (-1, -2)
    assert cache.path.stat().st_size == 3 * 36
    assert RefCache(tmp_path, **KEY).lookup(examples)[0].tolist() == [[-1, -2], [-3, -4]]


def test_a_writer_sees_what_another_wrote_and_the_first_value_stays(tmp_path):
    examples = make_examples(3)
    one, two = RefCache(tmp_path, **KEY), RefCache(tmp_path, **KEY)
    one.put_many(examples[:2], [[-1, -1], [-2, -2]])
    two.put_many(examples[1:], [[-9, -9], [-3, -3]])
    assert two.lookup(examples)[0].tolist() == [[-1, -1], [-2, -2], [-3, -3]]
    assert one.lookup(examples)[1] == [2]
    assert RefCache(tmp_path, **KEY).lookup(examples)[0].tolist() == [[-1, -1], [-2, -2], [-3, -3]]
