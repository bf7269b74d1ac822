"""The engine behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, `transformers serve`).

Text prompts go to /v1/completions, messages to /v1/chat/completions, with one request per completion: not every server
knows `n`, and the common ones cache the prompt. The server decides whether a seed gives the same completion again.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from .candidates import Completion, Prompt
from .sampling import Sampling

_BUSY = (408, 409, 425, 429)  # these, and every status from 500, are worth another try
_REFUSED = (400, 422)
_LONGEST_PAUSE = 30.0  # seconds


class RefusedError(ValueError):
    """The server says that the request is wrong, so another try would not help."""


class Endpoint:
    """Samples from the server at `url`, with or without /v1 at its end.

    model        name in each request; by default the only one that /v1/models lists
    concurrency  requests at once
    retries      further tries where the server is busy, broken or silent, each after twice the pause
    timeout      seconds per request
    extra_body   further fields of each request
    fingerprint  name of the served weights; by default the model's name
    check        function that is called before each further try and raises where the server is known to be gone

    Raises ValueError where there is no answer, and for a request that the server refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        extra_body: dict | None = None,
        api_key: str | None = None,
        fingerprint: str | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = print,
    ):
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise ValueError("concurrency must be at least 1, retries at least 0 and timeout above 0")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self.extra, self.check, self.log = extra_body or {}, check, log
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self.model = model or self._only_model()
        self.fingerprint = fingerprint or self.model
        self.logprobs = True  # until the server refuses to give them

    def _only_model(self) -> str:
        names = [entry["id"] for entry in self._ask("/models").get("data") or []]
        if len(names) != 1:
            raise ValueError(f"{self.url} serves {', '.join(names) or 'no model by name'}: name the model")
        return names[0]

    def run(
        self, prompts: Sequence[Prompt], done: set[str], sampling: Sampling, round: int = 1
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield (prompt, its completions) for every prompt that is not in `done`, as soon as all of them are there."""
        todo = [prompt for prompt in prompts if prompt.id not in done]
        parts: dict[str, dict[int, Completion]] = {prompt.id: {} for prompt in todo}
        alike = sampling.num_generations > 1 and max(sampling.temperature) > 0
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = {
                pool.submit(self._complete, prompt, sampling, sampling.of(k, prompt.id, round)): (prompt, k)
                for prompt in todo
                for k in range(sampling.num_generations)
            }
            for answer in as_completed(asked):
                prompt, k = asked[answer]
                parts[prompt.id][k] = answer.result()
                if len(parts[prompt.id]) == sampling.num_generations:
                    completions = [part for _, part in sorted(parts.pop(prompt.id).items())]
                    alike = alike and len({c.text for c in completions}) == 1
                    yield prompt, completions
        finally:
            pool.shutdown(cancel_futures=True)
        if alike and todo:
            self.log(
                f"{self.url} gave every sample of a prompt alike: it decodes greedily. Have it sample, with its own "
                "options or with extra_body"
            )

    def _complete(self, prompt: Prompt, sampling: Sampling, settings: tuple[float, float, int]) -> Completion:
        temperature, top_p, seed = settings
        chat = not isinstance(prompt.text, str)
        body = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"messages": prompt.text} if chat else {"prompt": prompt.text}),
            **self.extra,
        }
        answer = self._with_logprobs("/chat/completions" if chat else "/completions", body, True if chat else 1)
        try:
            choice = answer["choices"][0]
            text = (choice["message"]["content"] if chat else choice["text"]) or ""
            tokens, reason = answer["usage"]["completion_tokens"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url} does not answer as an OpenAI-compatible server: {_short(answer)}") from None
        # Some servers leave the stop string in the text.
        text = text[: min((at for at in map(text.find, sampling.stop) if at >= 0), default=None)]
        logp = _summed(choice.get("logprobs"))
        return Completion(text, tokens, logp, temperature, top_p, seed, reason == "length", not text.strip())

    def _with_logprobs(self, path: str, body: dict, value) -> dict:
        if self.logprobs:
            try:
                return self._ask(path, {**body, "logprobs": value})
            except RefusedError as error:
                answer = self._ask(path, body)
                if self.logprobs:
                    self.logprobs = False
                    self.log(f"{self.url} tells no log-probs, so logp is null ({error})")
                return answer
        return self._ask(path, body)

    def _ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request, problem = urllib.request.Request(self.url + path, data, self.headers), ""
        for attempt in range(self.retries + 1):
            pause = min(_LONGEST_PAUSE, 0.5 * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_short(error.read().decode(errors='replace'))}"
                if error.code not in _BUSY and error.code < 500:
                    kind = RefusedError if error.code in _REFUSED else ValueError
                    raise kind(f"{self.url}{path} refuses the request, {problem}") from None
                told = error.headers.get("Retry-After") or ""
                pause = min(_LONGEST_PAUSE, float(told)) if told.isdigit() else pause
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                problem = str(error) or type(error).__name__
            self.check()
            if attempt < self.retries:
                time.sleep(pause)
        raise ValueError(
            f"{self.url} gave no answer in {self.retries + 1} tries ({problem}): what was generated is kept, start the "
            "server and run the same command again"
        )


def _summed(logprobs: dict | None) -> float | None:
    """The sum of the sampled tokens' log-probs in either layout, or None where there is none."""
    if not logprobs:
        return None
    values = logprobs.get("token_logprobs") or [token["logprob"] for token in logprobs.get("content") or []]
    return float(sum(values)) if values and None not in values else None


def _short(text) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else text[:300] + "..."
