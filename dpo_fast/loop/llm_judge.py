"""A chat model as judge, behind any OpenAI-compatible endpoint. It is asked in both orders; if they disagree, it is a tie."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from .items import Item

TEMPLATE = """Two answers to one prompt follow. Which is better? Judge what is said, not how long it is or which comes first.

# Prompt

{prompt}

# Answer A

{a}

# Answer B

{b}

# Verdict

Reply with A, B or TIE, and nothing else."""
TRIES = 4
_RETRIED = (408, 429, 500, 502, 503, 504)
_VERDICT = re.compile(r"\W*(?:(?:final\W+)?(?:answer|verdict)\W*(?:is\W*)?)?(A|B|TIE)\W*", re.IGNORECASE)


def ask_llm(
    target: str,
    *,
    template: str = TEMPLATE,
    timeout: float = 120.0,
    concurrency: int = 4,
    api_key: str | None = None,
    max_tokens: int = 256,
):
    """A judge (judges.py) from "URL#MODEL", where URL may end with `/v1` or before it.

    template     text with {prompt}, {a} and {b}; the reply's last line must be A, B or TIE
    timeout      seconds per request; a request is tried four times with growing pauses
    concurrency  pairs that are judged at once
    max_tokens   tokens of a reply at most

    After an unreadable reply the question is asked once more; a second one is recorded as a skip. Raises ValueError for a
    template that lacks a place; the judge raises it for an endpoint that does not answer.
    """
    url, _, model = target.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise ValueError(f"llm:{target} must be llm:URL#MODEL, such as llm:http://127.0.0.1:8000#my-model")
    lacking = [place for place in ("{prompt}", "{a}", "{b}") if place not in template]
    if lacking:
        raise ValueError(f"the judge's template lacks {', '.join(lacking)}")
    address = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"

    def ask(item: Item, first: str, second: str) -> str | None:
        """ "first", "second" or "tie", or None where the reply cannot be read."""
        places = {"prompt": prompt_text(item.prompt), "a": first, "b": second}
        # All places are filled in one pass, since a completion may itself hold "{b}".
        content = re.sub(r"\{(prompt|a|b)\}", lambda match: places[match[1]], template)
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        body["messages"] = [{"role": "user", "content": content}]
        for _ in range(2):
            verdict = read_verdict(_post(address, body, timeout, api_key))
            if verdict:
                return {"A": "first", "B": "second", "TIE": "tie"}[verdict]
        return None

    def verdict(item: Item) -> tuple[Item, str, str | None]:
        forward, backward = ask(item, item.a, item.b), ask(item, item.b, item.a)
        if forward is None or backward is None:
            return item, "skip", "the reply could not be read"
        there = {"first": "a", "second": "b", "tie": "tie"}[forward]
        back = {"first": "b", "second": "a", "tie": "tie"}[backward]
        return (item, there, None) if there == back else (item, "tie", f"the orders disagree: {there}, {back}")

    def judge(items: Iterable[Item]) -> Iterator[tuple[Item, str, str | None]]:
        failure = None
        with ThreadPoolExecutor(concurrency) as pool:
            pending = {pool.submit(verdict, item) for item in items}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                failed = [future.exception() for future in done if future.exception()]
                if failed and failure is None:
                    failure = failed[0]
                    # Requests under way may still give a verdict; no further one is sent.
                    pending = {future for future in pending if not future.cancel()}
                yield from (future.result() for future in done if not future.exception())
        if failure is not None:
            raise failure

    return judge


def read_verdict(text: str) -> str | None:
    """ "A", "B" or "TIE" if the last line says that and nothing else, otherwise None."""
    lines = [line for line in text.splitlines() if line.strip()]
    match = _VERDICT.fullmatch(lines[-1]) if lines else None
    return match[1].upper() if match else None


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as text; each message begins with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _post(address: str, body: dict, timeout: float, api_key: str | None) -> str:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key.strip()}"} if api_key else {})
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
                return content or ""
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.read()[:200].decode(errors='replace')}"
            if error.code not in _RETRIED:
                break
        except (OSError, ValueError) as error:  # refused, cut off, timed out, not JSON
            problem = str(error)
        except (KeyError, IndexError, TypeError):
            problem = "the reply has no choices[0].message.content"
            break
        if attempt + 1 < TRIES:
            time.sleep(2.0**attempt / 2)
    raise ValueError(f"{address} does not answer: {problem}")
