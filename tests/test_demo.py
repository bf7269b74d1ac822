"""The embedded default: its corpus and judge, its tokenizer, and a small run from random weights to the checkpoint."""

import contextlib
import io
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.data.sources import load_pairs
from dpo_fast.demo import stages as demo
from dpo_fast.demo.questions import (
    POLITE,
    TERSE,
    Question,
    byte_tokenizer,
    is_correct,
    judge_style,
    make_questions,
    pair,
)
from dpo_fast.demo.stages import Settings, answer, one_thread, run

SEVEN = Question("Q: What is 3 plus 4?\nA: ", "7", "the sum is 7")


# The corpus and its judge.


def test_held_out_wordings_are_new_and_their_facts_are_not():
    train, held_out = make_questions()
    assert (len(train), len(held_out)) == (400, 200)
    assert len({q.prompt for q in train + held_out}) == 600
    assert {q.sentence for q in held_out} <= {q.sentence for q in train}


def test_the_seed_decides_what_is_held_out():
    assert make_questions(1) == make_questions(1)
    assert {q.prompt for q in make_questions(1)[1]} != {q.prompt for q in make_questions(2)[1]}


@pytest.mark.parametrize("style", [TERSE, POLITE])
def test_the_judge_agrees_with_the_generator(style):
    train, held_out = make_questions()
    for question in train + held_out:
        assert judge_style(question.styled(style)) == style
        assert is_correct(question, question.styled(style))


def test_the_styles_of_a_question():
    assert SEVEN.styled(TERSE) == "7."
    assert SEVEN.styled(POLITE) == "Gladly: the sum is 7."
    assert pair(SEVEN, TERSE) == {"prompt": SEVEN.prompt, "chosen": "7.", "rejected": "Gladly: the sum is 7."}
    assert pair(SEVEN, POLITE)["chosen"] == "Gladly: the sum is 7."


@pytest.mark.parametrize(
    "text", ["", "7", ".", "the sum is 7.", "Gladly: 7", "Gladly: the sum is 7", "gladly: it is 7."]
)
def test_the_judge_knows_neither_form(text):
    assert judge_style(text) is None


@pytest.mark.parametrize("text", ["", "8.", "17.", "seven.", "Gladly: the sum is 8.", "7 plus.", "Gladly: the sum is."])
def test_wrong_answers_are_wrong(text):
    assert not is_correct(SEVEN, text)


def test_style_and_content_are_judged_apart():
    assert judge_style("Gladly: the sum is 8.") == POLITE
    assert is_correct(SEVEN, "it is 7")


# The tokenizer.


@pytest.mark.parametrize(
    "text", ["plain , text .", "Grüße, 日本語, 😀", "\x00\t\r\n\x7f  two  spaces ", "e\u0301\ufeff"]
)
def test_one_token_a_byte_and_back(text, tmp_path):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded.padding_side == "left"


def test_every_byte_has_its_own_token():
    tokenizer = byte_tokenizer()
    points = [*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, 0xF000, *range(0x10000, 0x110000, 0x10000)]
    text = "".join(map(chr, points))
    seen = dict(zip(text.encode(), tokenizer(text)["input_ids"][1:], strict=True))
    assert len(seen) == 243  # C0, C1 and F5 to FF are in no text
    assert len(set(seen.values())) == len(seen)
    assert not set(seen.values()) & set(tokenizer.all_special_ids)
    assert len(tokenizer) == 259


# A run.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(result, folder, screen) of a run with a smaller model and fewer steps."""
    folder = tmp_path_factory.mktemp("demo")
    settings = Settings(output_dir=str(folder), hidden_size=96, layers=2, sft_epochs=4, dpo_epochs=2)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen), warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(settings)
    return result, folder, screen.getvalue()


@pytest.mark.slow
def test_dpo_turns_the_style(small):
    before, after = small[0].before, small[0].after
    assert 0.1 < before.polite < 0.6
    assert after.polite > before.polite + 0.3
    assert abs(before.margin) < 1e-5
    assert after.margin > 2
    assert after.accuracy > 0.95


@pytest.mark.slow
def test_what_was_measured_is_what_was_answered(small):
    result = small[0]
    for stage in (result.before, result.after):
        judged = [judge_style(a) == POLITE for a in stage.answers]
        right = [is_correct(q, a) for q, a in zip(result.questions, stage.answers, strict=True)]
        assert (stage.polite, stage.correct) == (sum(judged) / 200, sum(right) / 200)


@pytest.mark.slow
def test_sharing_saves_the_prompts_at_least(small):
    prompts = [len(q.prompt) + 1 for q in make_questions()[0]]
    both = [len(q.styled(TERSE) + q.styled(POLITE)) + 2 for q in make_questions()[0]]
    assert sum(prompts) / (2 * sum(prompts) + sum(both)) < small[0].tokens_saved < 0.6


@pytest.mark.slow
def test_the_checkpoint_answers_the_same(small):
    result = small[0]
    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    assert answer(model, tokenizer, [q.prompt for q in result.questions], seed=0) == result.after.answers


@pytest.mark.slow
def test_everything_lies_in_the_output_folder(small):
    folder = small[1]
    shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert shown == {"model", "pairs.jsonl", "ref_cache", "sft"}
    assert load_pairs(str(folder / "pairs.jsonl"), log=str).rows == [pair(q, POLITE) for q in make_questions()[0]]


@pytest.mark.slow
def test_the_screen(small):
    result, folder, screen = small
    assert f"polite answers   {result.before.polite:6.1%} before -> {result.after.polite:6.1%} after" in screen
    assert f'from_pretrained("{folder / "model"}")' in screen
    for word in ("warn", "Warn", "Traceback", "deprecat", "{'", "loss nan"):
        assert word not in screen


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_gives_the_same(tmp_path):
    settings = Settings(output_dir=str(tmp_path), hidden_size=32, layers=1, sft_epochs=0.3, dpo_epochs=0.5, seed=3)
    first, second = run(settings), run(settings)
    assert (first.before, first.after) == (second.before, second.after)
    assert first.after.margin > 0


def test_options_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", seen.append)
    assert demo.main([]) == 0
    assert demo.main(["--output_dir", "there", "--seed", "5"]) == 0
    assert seen == [Settings(), Settings(output_dir="there", seed=5)]


def test_threads_are_as_before_afterwards():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        inside = torch.get_num_threads()
    outside = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert (inside, outside) == (1, 2)
