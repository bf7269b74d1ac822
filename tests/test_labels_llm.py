"""Judges that are language models: both orders, templates, replies, and endpoints that fail."""

import http.server
import json
import threading
from collections import Counter

import pytest
from label_tools import store_of

from dpo_fast.loop.judges import run_judge
from dpo_fast.loop.llm_judge import read_verdict
from dpo_fast.loop.store import LabelStore

store = store_of(prompts=5, completions=3)


def quiet(_):
    pass


class Endpoint:
    """A chat endpoint whose replies `reply(content)` gives: text, or a status."""

    def __init__(self, reply):
        outer = self
        self.bodies = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                answer = reply(body["messages"][0]["content"])
                content = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


TEMPLATE = "{prompt}|{a}|{b}"


def test_an_llm_is_asked_in_both_orders_and_its_position_bias_is_a_tie(store):
    def longest_number(content):
        _, a, b = content.split("|")
        return "The answer is:\n**A**" if int(a[-1]) > int(b[-1]) else "b."

    with Endpoint(longest_number) as fair, Endpoint(lambda _: "A") as biased:
        assert run_judge(store, f"llm:{fair.url}#m", template=TEMPLATE, log=quiet) == {"b": 15}
        assert (len(fair.bodies), fair.bodies[0]["model"]) == (30, "m")
        with pytest.raises(ValueError, match="prefers no completion"):
            run_judge(store, f"llm:{biased.url}/v1#m", template=TEMPLATE, log=quiet)
        notes = {x.note for x in store.labels() if "m" in x.annotator and x.choice == "tie"}
        assert notes == {"the orders disagree: a, b"}


def test_a_template_is_filled_in_one_pass(tmp_path):
    row = {"id": "p", "prompt": "{a}{b}", "completions": [{"text": "{b} one"}, {"text": "{prompt} two"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    seen = []
    with (
        LabelStore(tmp_path / "l.sqlite", tmp_path / "c.jsonl") as store,
        Endpoint(lambda content: seen.append(content) or ("A" if len(seen) == 1 else "B")) as server,
    ):
        run_judge(store, f"llm:{server.url}#m", template=TEMPLATE, log=quiet)
    assert seen == ["{a}{b}|{b} one|{prompt} two", "{a}{b}|{prompt} two|{b} one"]
    with pytest.raises(ValueError, match=r"lacks \{b\}"), LabelStore(tmp_path / "l.sqlite") as store:
        run_judge(store, "llm:http://127.0.0.1:1#m", template="{prompt} {a}", log=quiet)


def test_an_endpoint_that_recovers_or_not(store, monkeypatch):
    monkeypatch.setattr("dpo_fast.loop.llm_judge.time.sleep", quiet)
    calls = Counter()

    def flaky(content):
        calls[content] += 1
        return 503 if calls[content] < 3 else "A" if content[-1] == "0" else "B"

    with Endpoint(flaky) as server:
        counts = run_judge(store, f"llm:{server.url}#m", template=TEMPLATE, concurrency=2, limit=4, log=quiet)
        assert counts.total() == 4
        dead = f"llm:{server.url}#other"
    with pytest.raises(ValueError, match="does not answer"):
        run_judge(store, dead, log=quiet)
    with Endpoint(lambda _: 400) as refusing, pytest.raises(ValueError, match="400"):
        run_judge(store, f"llm:{refusing.url}#m3", log=quiet)
    assert len(refusing.bodies) <= 8


def test_an_unreadable_reply_is_a_skip(store):
    with Endpoint(lambda content: "hm" if "question 0" in content else "A" if content[-1] == "0" else "B") as server:
        counts = run_judge(store, f"llm:{server.url}#m", template="{prompt}|{b}|{a}", log=quiet)
    assert counts["skip"] == 3


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"), (" b\n", "B"), ("[[A]]", "A"), ("<think>A or B?</think>\nB", "B"), ("Final verdict: TIE.", "TIE"),
        ("B is better than A", None), ("", None), ("Both are fine", None), ("Answer: **B**", "B"), ("ABBA", None),
    ],
)  # fmt: skip
def test_verdicts(text, verdict):
    assert read_verdict(text) == verdict
