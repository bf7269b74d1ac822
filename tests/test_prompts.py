"""Prompts from every layout of the data, and the errors for rows without one."""

import json

import pytest

from dpo_fast.data.prompts import load_prompts
from dpo_fast.data.readers import DataError

USER = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be short."}


def write(tmp_path, rows, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, **options):
    return load_prompts(path, log=lambda _: None, **options)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Once"}, "Once"),
        ({"prompt": "Once", "chosen": " a", "rejected": " b"}, "Once"),
        ({"chosen": "Once a", "rejected": "Once b"}, "Once"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [{**REPLY, "content": "No."}]}, [USER]),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "No."}]}, [USER]),
        ({"prompt": "Why?", "chosen": [REPLY], "rejected": [{**REPLY, "content": "No."}]}, [USER]),
        ({"messages": [SYSTEM, USER, REPLY]}, [SYSTEM, USER]),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, [USER]),
        ({"system": "Be short.", "conversations": [{"from": "human", "value": "Why?"}]}, [SYSTEM, USER]),
        ({"prompt": "Once", "completions": [" a", " b"], "ranks": [1, 0]}, "Once"),
        ({"prompt": "Once", "completions": [" a", " b"], "ranks": [0, 0]}, "Once"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [{"role": "user", "content": "Add\n1 2"}]),
        ({"instruction": "Why?", "output": ["a", "b"], "system": "Be short."}, [SYSTEM, USER]),
        ({"instruction": "Why?"}, [USER]),
    ],
)
def test_the_prompt_of_a_layout(tmp_path, row, prompt):
    assert load(write(tmp_path, [row])) == [prompt]


def test_equal_prompts_count_once_in_order(tmp_path):
    assert load(write(tmp_path, [{"prompt": p} for p in "baba"])) == ["b", "a"]


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Once\u2028upon \r\n\n  a time\n".encode())
    assert load(str(path)) == ["Once\u2028upon ", "  a time"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": " "}], "line 2: the prompt is empty"),
        ([{"messages": [REPLY]}], "line 1: the prompt is empty"),
        ([{"text": "a"}], "no prompt, messages, conversations or instruction: found text"),
        ([["a"]], "not an object"),
        ([{"prompt": "a"}, {"prompt": [USER]}], "text and messages are mixed"),
        ([{"prompt": [USER], "tools": [{"name": "f"}]}], "'tools' cannot be kept"),
        ([], "no prompt in"),
    ],
)
def test_rows_without_a_usable_prompt(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, rows))


def test_bad_rows_are_left_out_on_request(tmp_path):
    path = write(tmp_path, [{"prompt": "a"}, {"text": "b"}])
    said = []
    assert load_prompts(path, skip_bad_rows=True, log=said.append) == ["a"]
    assert "1 rows left out (first: " in said[0]


def test_a_line_cut_in_the_middle_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b')
    with pytest.raises(DataError, match="line 2: the line is not valid JSON"):
        load(str(path))


def test_no_such_file(tmp_path):
    for name in ("none.jsonl", "none.txt"):
        with pytest.raises(FileNotFoundError):
            load(str(tmp_path / name))
