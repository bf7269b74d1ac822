"""Where the pairs of a run come from: data sets, mixtures, splits, and prompts that are held out."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from option_tools import parsed

from dpo_fast.cli.options import eval_sources, train_sources
from dpo_fast.data.readers import Source
from dpo_fast.data.sources import Pairs, split_pairs


@pytest.fixture
def train_file(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return str(tmp_path / "pairs.jsonl")


def test_datasets_of_trl_become_sources(train_file):
    script, _, _ = parsed(
        dataset_name=None,
        datasets=[{"path": train_file, "split": "train"}, {"path": "org/x", "name": "n", "split": "s"}, "org/y"],
        dataset_weights=[1, 2, 0.5],
    )
    assert train_sources(script) == [
        Source(train_file),
        Source("org/x", 2.0, "s", "n"),
        Source("org/y", 0.5),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x", "fraction": 0.5}, "fraction=0.5.*dataset_weights"),
        ({"path": "json", "data_files": "x"}, "data_files"),
        ({"path": "x", "data_dir": "d"}, "data_dir"),
        ({"path": "x", "splt": "d"}, r"unknown option splt \(did you mean split\?\)"),
        ({"name": "x"}, "path"),
    ],
)
def test_what_a_mixture_cannot_say_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        train_sources(parsed(dataset_name=None, datasets=[entry])[0])


def test_weights_and_splits_that_do_not_fit_are_refused(train_file):
    with pytest.raises(ValueError, match="dataset_weights has 2 numbers for 1"):
        train_sources(parsed(dataset_weights=[1, 2])[0])
    with pytest.raises(ValueError, match="dataset_train_split has no effect"):
        train_sources(parsed(dataset_name=train_file, dataset_train_split="x")[0])
    with pytest.raises(ValueError, match=r"has no split 'test'.*--eval_dataset_name"):
        eval_sources(parsed(dataset_name=train_file, eval_strategy="epoch")[0])


def test_a_split_holds_whole_prompts_out():
    rows = [{"prompt": str(i // 3), "chosen": str(i), "rejected": "x"} for i in range(30)]
    rest, held = split_pairs(Pairs(rows=rows), 0.2, seed=1)
    assert len(held.rows) == 6
    assert sorted(r["chosen"] for r in rest.rows + held.rows) == sorted(r["chosen"] for r in rows)
    assert not {r["prompt"] for r in rest.rows} & {r["prompt"] for r in held.rows}
    assert split_pairs(Pairs(rows=rows), 0.2, seed=1)[1].rows == held.rows
    assert split_pairs(Pairs(rows=rows), 0.2, seed=2)[1].rows != held.rows
    assert len(split_pairs(Pairs(rows=rows), 4)[1].rows) == 6
    with pytest.raises(ValueError, match="no pair on one side"):
        split_pairs(Pairs(rows=rows), 30)
