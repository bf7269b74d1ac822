"""The candidates file and the command: kill -9 at any line, cut lines, other options, and a real server."""

import itertools
import json
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from tiny import llama

from dpo_fast import generate as command
from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.endpoint import Endpoint
from dpo_fast.loop.items import read_candidates

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and prompts of several lengths."""
    path = tmp_path_factory.mktemp("generate")
    llama(vocab_size=259, dtype=torch.float32).save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": f"Question {i}" + " and" * (i % 5)} for i in range(12)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder, output, *more):
    return [
        *("--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--output", str(output)),
        *("--num_generations", "3", "--max_new_tokens", "6", "--batch_size", "9", *more),
    ]


def content(path):
    return sorted(path.read_text().splitlines())


@pytest.fixture(scope="module")
def whole(folder):
    assert command.main(options(folder, folder / "whole.jsonl")) == 0
    return content(folder / "whole.jsonl")


def test_the_command_completes_every_prompt(folder, whole):
    rows = read_candidates(folder / "whole.jsonl")
    assert {row["prompt"] for row in rows} == {f"Question {i}" + " and" * (i % 5) for i in range(12)}
    assert {sum(c["count"] for c in row["completions"]) for row in rows} == {3}


@pytest.mark.parametrize("lines", [0, 1, 4, 11])
@pytest.mark.parametrize("tail", [b"", b'{"id": "12'])
def test_a_killed_run_goes_on_and_gives_the_same_set(folder, whole, tmp_path, lines, tail):
    """The file as a kill after so many lines leaves it."""
    path = tmp_path / "c.jsonl"
    written = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(written[:lines]) + tail)
    (tmp_path / "c.jsonl.options.json").write_text((folder / "whole.jsonl.options.json").read_text())
    assert command.main(options(folder, path)) == 0
    assert content(path) == whole


def test_kill_9_in_the_middle(folder, whole, tmp_path):
    path = tmp_path / "c.jsonl"
    program = tmp_path / "slowly.py"
    program.write_text(
        "import time, dpo_fast.loop.candidates as c\n"
        "add = c.CandidateFile.add\n"
        "c.CandidateFile.add = lambda *a: (add(*a), time.sleep(0.5))\n"
        "import dpo_fast.generate as g, sys\n"
        "sys.exit(g.main(sys.argv[1:]))"
    )
    process = forked.Forked(program, *options(folder, path))
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(content(path)) < 12
    assert command.main(options(folder, path)) == 0
    assert content(path) == whole


def test_a_file_that_is_whole_is_left_alone(folder, whole, tmp_path, capsys):
    before = (folder / "whole.jsonl").stat().st_mtime_ns
    assert command.main(options(folder, folder / "whole.jsonl")) == 0
    assert (folder / "whole.jsonl").stat().st_mtime_ns == before
    assert "12 of 12 prompts are there already" in capsys.readouterr().out


def fails(capsys, arguments):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_other_options_are_refused_by_name(folder, whole, capsys):
    error = fails(capsys, options(folder, folder / "whole.jsonl", "--seed", "1"))
    assert "was begun with seed=0, this run has 1" in error
    assert content(folder / "whole.jsonl") == whole


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(folder, whole, tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    text = f'{whole[0]}\n{{"id": "12\n{whole[1]}\n'
    path.write_text(text)
    (tmp_path / "c.jsonl.options.json").write_text((folder / "whole.jsonl.options.json").read_text())
    assert f"{path} line 2 is not a line of candidates" in fails(capsys, options(folder, path))
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "/no/such/folder"], "no such model folder: /no/such/folder"),
        (["--prompts", "/no/such.jsonl"], "no such file or directory: /no/such.jsonl"),
        (["--num_generations", "0"], "num_generations must be at least 1"),
        (["--engine", "vllm"], "engine is transformers or the address of a server"),
        (["--concurrency", "2"], "concurrency has no effect without a server"),
        (["--serve", "vllm serve {model}"], "serve must hold {port}"),
        (["--serve", "no-such-program {model} {port}"], "serve cannot start no-such-program"),
        (["--serve", "false {model} {port}"], "the server ended with status 1 (it printed nothing)"),
    ],
)
def test_bad_options_end_as_one_line(folder, tmp_path, capsys, change, message):
    assert message in fails(capsys, options(folder, tmp_path / "c.jsonl", *change))


def test_nobody_answers(capsys, folder, tmp_path):
    arguments = options(folder, tmp_path / "c.jsonl", "--engine", "http://127.0.0.1:9", "--retries", "1")
    assert "gave no answer in 2 tries" in fails(capsys, arguments)


# A real server.

needs_server = pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260k is not there")
SERVE = f"{Path(sys.executable).parent / 'transformers'} serve {{model}} --port {{port}} --host 127.0.0.1 --device cpu"
SAMPLE = json.dumps({"generation_config": json.dumps({"do_sample": True, "top_k": 0})})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, process group's check) of `transformers serve`."""
    pytest.importorskip("openai")
    from dpo_fast.loop.serve import serving

    log = tmp_path_factory.mktemp("server") / "log"
    with serving(SERVE, str(STORIES), log, timeout=240) as (url, _):
        yield url


@needs_server
@pytest.mark.slow
def test_a_real_server_and_a_run_that_goes_on(server, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nLily had a\nThe dog\n")
    arguments = [
        *("--model", str(STORIES), "--engine", server, "--prompts", str(prompts), "--num_generations", "3"),
        *("--max_new_tokens", "8", "--temperature", "1.0", "0.8", "--extra_body", SAMPLE, "--stop", "qqq", "."),
    ]
    path = tmp_path / "c.jsonl"
    assert command.main([*arguments, "--output", str(path)]) == 0
    rows = read_candidates(path)
    assert {row["prompt"] for row in rows} == {"Once upon a time", "Lily had a", "The dog"}
    for row in rows:
        assert sum(c["count"] for c in row["completions"]) == 3
        for c in row["completions"]:
            assert 1 <= c["tokens"] <= 8
            assert c["logp"] is None
            assert "." not in c["text"]
    assert len({c["text"] for row in rows for c in row["completions"]}) > 3
    kept = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(kept + b'{"id')
    assert command.main([*arguments, "--output", str(path)]) == 0
    assert path.read_bytes().startswith(kept)
    assert len(read_candidates(path)) == 3


@needs_server
@pytest.mark.slow
def test_a_server_that_decodes_greedily_is_reported(server):
    from dpo_fast.loop.candidates import Prompt
    from dpo_fast.loop.sampling import Sampling

    said = []
    endpoint = Endpoint(server, model=str(STORIES), log=said.append)
    found = list(endpoint.run([Prompt("Once upon"), Prompt("The")], set(), Sampling(2, max_new_tokens=4)))
    assert len(found) == 2
    assert any("decodes greedily" in text for text in said)


@needs_server
@pytest.mark.slow
def test_a_request_that_the_server_refuses_ends_as_its_own_words(server):
    from dpo_fast.loop.candidates import Prompt
    from dpo_fast.loop.sampling import Sampling

    endpoint = Endpoint(server, model=str(STORIES), extra_body={"no_such_field": 1}, log=str)
    with pytest.raises(ValueError, match=r"refuses the request, status 422.*no_such_field"):
        list(itertools.islice(endpoint.run([Prompt("The")], set(), Sampling(1, max_new_tokens=2)), 1))
