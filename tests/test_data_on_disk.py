"""Rows and tokens in Arrow files are the same as lists. When they are made again, and kept: test_data_cache.py."""

import pickle

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from disk_tools import cache, fields, made_examples, quiet, random_rows, write  # noqa: E402, F401 - cache is a fixture
from tokenizer_tools import STRICT, bot, chat_row, letters, make_tokenizer, text_row, user  # noqa: E402

from dpo_fast.data import tokenization  # noqa: E402
from dpo_fast.data.examples import Examples, example_key  # noqa: E402
from dpo_fast.data.pairs import PairDataset, prepare  # noqa: E402
from dpo_fast.data.readers import DataError, Source  # noqa: E402
from dpo_fast.data.sources import load_pairs, split_pairs  # noqa: E402
from dpo_fast.data.tokenization import tokenize_pairs  # noqa: E402
from dpo_fast.forest.batch import ForestCollator  # noqa: E402
from dpo_fast.forest.packing import pair_tokens  # noqa: E402


def same_batches(ours, theirs, share):
    collate = ForestCollator(share, max_tokens=200)
    for a, b in zip(collate(ours)["parts"], collate(theirs)["parts"], strict=True):
        assert (a.pairs, a.chosen_tokens, a.longest) == (b.pairs, b.chosen_tokens, b.longest)
        for name, x in vars(a.forest).items():
            y = getattr(b.forest, name)
            equal = x.equal(y) and x.dtype == y.dtype if hasattr(x, "equal") else x == y
            assert equal, name
        for x, y in ((a.ref_logps, b.ref_logps), (a.p_chosen, b.p_chosen)):
            assert x is y is None or (x.equal(y) and x.dtype == y.dtype)


def test_examples_are_those_of_the_lists():
    made = made_examples()
    view = Examples.of(made)
    assert [fields(e) for e in view] == made
    assert [e["index"] for e in view] == list(range(len(made)))
    assert view[-1]["index"] == len(made) - 1
    with pytest.raises(IndexError):
        view[len(made)]
    assert [k.tobytes() for k in view.keys()] == [example_key(e) for e in made]  # noqa: SIM118
    for share in ("prefix", "prompt", "none"):
        assert view.pair_tokens(share).tolist() == [pair_tokens(e, share) for e in made]
        same_batches([{k: x for k, x in e.items() if k != "p_chosen"} for e in view.replace(noise=False)],
                     [{k: x for k, x in e.items() if k != "p_chosen"} | {"index": i} for i, e in enumerate(made)], share)  # fmt: skip
    tokens = sum(len(x) for e in made for k, x in e.items() if k != "p_chosen")
    ids = sum(view.table[name].nbytes for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert ids < 6 * tokens


def test_views_keep_their_columns_together():
    made = [e | {"ref_chosen_logps": -0.1 * i, "ref_rejected_logps": -1 / 3 - i} for i, e in enumerate(made_examples())]
    for example in made:
        example["p_chosen"] = example.get("p_chosen", 1.0)
    view = Examples.of(made)
    again = pickle.loads(pickle.dumps(view[3::2][::-1]))
    assert [fields(e) for e in again] == made[3::2][::-1]
    assert [e["index"] for e in again] == list(range(len(again)))
    assert [k.tobytes() for k in again.keys()] == [example_key(e) for e in made[3::2][::-1]]  # noqa: SIM118
    assert again.pair_tokens("prefix").tolist() == [pair_tokens(e, "prefix") for e in made[3::2][::-1]]
    same_batches(view, [e | {"index": i} for i, e in enumerate(made)], "prefix")
    scored = [len(e["chosen_ids"]) - (not e["prompt_ids"]) for e in made]
    assert PairDataset(made).mean_chosen_length() == sum(scored) / len(scored)


def test_rows_on_disk_are_those_in_memory(tmp_path):
    a = write(tmp_path / "a.jsonl", [*random_rows(30), {"prompt": "x"}, random_rows(31)[30]])
    b = write(tmp_path / "b.jsonl", random_rows(20, seed=1))
    c = [Source(a, weight=0.5), Source(b, weight=2.3), a]
    for what in (a, b, c):
        lines, options = ([], []), {"skip_bad_rows": True, "seed": 4}
        plain = load_pairs(what, log=lines[0].append, **options)
        kept = load_pairs(what, log=lines[1].append, cache=True, **options)
        assert kept.rows == plain.rows
        assert (kept.layout, kept.dropped, lines[1]) == (plain.layout, plain.dropped, lines[0])
        for x, y in zip(split_pairs(kept, 0.3, 1), split_pairs(plain, 0.3, 1), strict=True):
            assert x.rows == y.rows
    with pytest.raises(DataError, match=r"a\.jsonl line 31: no known layout .*Mend the row"):
        load_pairs(a, cache=True, log=quiet)
    text, chat = (
        write(tmp_path / "t.jsonl", [text_row("a", "b", "c")]),
        write(tmp_path / "c.jsonl", [chat_row("a", "b", "c")]),
    )
    with pytest.raises(DataError, match=r"mixed: .*t\.jsonl line 1 is text, .*c\.jsonl line 1 is messages"):
        load_pairs([text, chat], cache=True, log=quiet)


OPTIONS = {"max_length": 20, "skip_bad_rows": True, "log": quiet}


@pytest.mark.parametrize("num_proc", [None, 2])
def test_mapped_tokens_are_those_in_memory(tmp_path, num_proc, monkeypatch):
    monkeypatch.setattr(tokenization, "ROWS_A_CALL", 16)
    long = text_row("p" * 50, "a", "b")  # fills max_length
    rows = [*random_rows(30), long, *random_rows(12, seed=2), text_row("", "</s>", "a"), long]
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = letters(bos=False)
    kept = load_pairs([Source(path, weight=1.5)], cache=True, log=quiet).rows
    plain = tokenize_pairs(list(kept), tokenizer, **OPTIONS)
    assert plain.truncated
    assert plain.dropped
    found = tokenize_pairs(kept, tokenizer, num_proc=num_proc, **OPTIONS)
    assert [fields(e) for e in found.examples] == plain.examples
    for name in ("dropped", "truncated", "identical", "warnings"):
        assert getattr(found, name) == getattr(plain, name), name
    if num_proc:
        memory = tokenize_pairs(list(kept), tokenizer, num_proc=num_proc, **OPTIONS)
        assert memory.dropped == plain.dropped
        assert [fields(e) for e in memory.examples] == [fields(e) for e in found.examples]


def test_messages_name_the_line(tmp_path):
    bad = {"prompt": [{"role": "system", "content": "S"}, user("?")], "chosen": [bot("a")], "rejected": [bot("b")]}
    rows = load_pairs(write(tmp_path / "a.jsonl", [chat_row("what", "is", "it"), bad]), cache=True, log=quiet).rows
    tokenizer = make_tokenizer(template=STRICT)
    for num_proc in (None, 2):
        with pytest.raises(
            DataError, match=r"a\.jsonl line 2: the chat template refuses .*no system turn.*Mend the row"
        ):
            tokenize_pairs(rows, tokenizer, num_proc=num_proc, log=quiet)
    rows = load_pairs(write(tmp_path / "b.jsonl", [text_row("ab", "c", "z")]), cache=True, log=quiet).rows
    with pytest.raises(ValueError, match=r"b\.jsonl line 1: token 'z' has id 27"):
        tokenize_pairs(rows, letters(), vocab_size=27, log=quiet)
    with pytest.raises(DataError, match=r"no pair is left of 1 rows.*the prompt fills max_length"):
        tokenize_pairs(rows, letters(), max_length=3, log=quiet)


def test_a_dataset_of_rows_or_of_ids_gives_the_examples_of_its_list(tmp_path):
    from trainer_tools import config

    args = config(tmp_path, max_length=20, skip_bad_rows=True, label_noise="ignore", dataset_num_proc=2)
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in random_rows(30)]
    rows.append(text_row("p" * 50, "a", "b"))  # fills max_length
    ids = [{k: e[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for e in
           tokenize_pairs(rows, letters(), max_length=None, log=quiet).examples]  # fmt: skip
    for data in (rows, ids):
        plain = prepare(data, letters(), args, 100, "train")
        mapped = prepare(datasets.Dataset.from_list(data), letters(), args, 100, "train")
        assert [fields(e) for e in mapped.examples] == [fields(e) for e in plain.examples]
        assert len(mapped) == 30
    with pytest.raises(ValueError, match="train row 1: chosen_ids is empty: drop the pair"):
        prepare(datasets.Dataset.from_list([ids[0], ids[1] | {"chosen_ids": []}]), None, args, 100, "train")


def test_an_example_has_lists_as_users_expect():
    row = {"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6, 7]}
    data = PairDataset([row])
    assert data[0]["prompt_ids"] == [3, 4]
    assert data[0]["rejected_ids"] == [6, 7]
    assert [list(x["chosen_ids"]) for x in data.__getitems__([0])] == [[5]]
