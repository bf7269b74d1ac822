"""The command and the page's server, without a browser: what it gives out, to whom, and what it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra [loop]")

from label_tools import candidates, store_of

from dpo_fast.annotate import main
from dpo_fast.loop.server import PageOptions, PageServer, is_loopback, mark_differences

store = store_of()


def ask(url, body=None):
    """Status, headers and text of one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_labels_through_the_server(store):
    with PageServer(store) as server:
        link = server.link("ann")
        assert link == server.link("ann")
        status, headers, text = ask(link)
        assert (status, "page.js" in text) == (200, True)
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        pair = json.loads(ask(f"{link}/next")[2])
        assert not {"id", "a", "b", "gold"} & pair.keys()
        status, _, text = ask(f"{link}/label", {"token": pair["token"], "choice": "left"})
        assert (status, json.loads(text)["mine"]) == (200, 1)
        (label,) = store.labels()
        assert getattr(store.item(label.item), label.choice) == pair["left"]["text"]
        for body, refused in (
            ({"token": pair["token"], "choice": "left"}, 409),
            ({"token": json.loads(text)["token"], "choice": "best"}, 400),
            ({"token": "x"}, 422),
        ):
            assert ask(f"{link}/label", body)[0] == refused
        assert ask(f"{link}/diff?token=x")[0] == 409
        assert ask(f"{link}/undo", {})[0] == 200
        assert ask(f"{link}/undo", {})[0] == 409
        assert store.labels() == []
        for path in ("", "/next", "/diff?token=x"):
            assert ask(f"{server.address}/a/nobody{path}")[0] in (404, 409)
        assert ask(f"{server.address}/docs")[0] == 404


def test_judges_have_no_page(store):
    secret = store.add_annotator("rule", "judge")
    with PageServer(store) as server:
        assert ask(f"{server.address}/a/{secret}")[0] == 404
        with pytest.raises(ValueError, match="is a judge"):
            server.link("rule")


def test_a_token_guards_every_address(store):
    with PageServer(store, PageOptions(token="a b&c")) as server:
        link = server.link("ann")
        bare = link.partition("?")[0]
        for url in (bare, f"{bare}/next", f"{server.address}/page.js", f"{bare}?access=wrong", f"{server.address}/"):
            assert ask(url)[0] == 403
        status, headers, _ = ask(link)
        assert (status, "HttpOnly" in headers["Set-Cookie"]) == (200, True)
        assert ask(f"{bare}/next?{link.partition('?')[2]}")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_host_for_other_machines_needs_a_token(store, host):
    with pytest.raises(ValueError, match="set a token"):
        PageServer(store, host=host)


def test_loopback_hosts():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4


def test_a_port_in_use_is_named(store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port \d+ is in use"):
            PageServer(store, port=taken.getsockname()[1])


def test_differences_rebuild_both_texts():
    left, right = mark_differences("the cat\n sat. <b>", "the dog\n sat! <b>")
    assert ("".join(t for t, _ in left), "".join(t for t, _ in right)) == ("the cat\n sat. <b>", "the dog\n sat! <b>")
    assert ([t for t, differs in left if differs], [t for t, differs in right if differs]) == (
        ["cat", "."],
        ["dog", "!"],
    )
    assert mark_differences("", "one") == ([], [("one", True)])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--labels", "none.sqlite"], "no such labels file"),
        (["--candidates", "none.jsonl"], "none.jsonl"),
        (["--judge_template", "x"], "no effect without an llm"),
        (["--seed", "3"], "seed has no effect"),
        (["--policy", "run"], "policy has no effect"),
        (["--select", "margin"], "needs a policy"),
        (["--annotators", "ann", "--split", "heldout"], "people label training prompts"),
        (["--max_pairs", "0"], "max_pairs=0"),
        (["--labels_per_pair", "0"], "labels_per_pair=0"),
        (["--gold", "none.jsonl"], "none.jsonl"),
        (["--guidelines", "none.md"], "none.md"),
        (["--host", "0.0.0.0"], "set a token"),
        (["--judge", "best:one"], "a judge is rule"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    if "--candidates" not in argv and "--labels" not in argv:
        argv = ["--candidates", str(candidates(tmp_path / "c.jsonl")), *argv]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_serves_until_the_labels_are_there(tmp_path):
    path = candidates(tmp_path / "c.jsonl", prompts=2)
    command = [sys.executable, "-m", "dpo_fast.annotate", "--candidates", str(path), "--port", "0"]
    command += ["--labels", str(tmp_path / "l.sqlite"), "--annotators", "ann"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        link = re.fullmatch(r"ann: (\S+)\n", running.stdout.readline())[1]
        state = json.loads(ask(f"{link}/next")[2])
        state = json.loads(ask(f"{link}/label", {"token": state["token"], "choice": "tie"})[2])
        # The server is killed in the middle: labels that it reported as saved are there, and the link stays good.
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        again = re.fullmatch(r"ann: (\S+)\n", running.stdout.readline())[1]
        assert again.rpartition("/")[2] == link.rpartition("/")[2]
        state = json.loads(ask(f"{again}/next")[2])
        assert state["mine"] == 1
        ask(f"{again}/label", {"token": state["token"], "choice": "left"})
        out, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0
    assert "2 of 2 labels" in out
