"""The engine inside the process: N completions per prompt from a model of transformers or a `HiddenStateModel`.

A prompt is computed once, in a prefill whose cache is repeated N times. Rows that have ended leave the batch when they are
half of it. Models whose cache cannot be repeated (recurrent layers and the like, see `sharing_obstacle`) run transformers'
own `generate` with each prompt N times and no padding; a `HiddenStateModel` runs with its own state.

The batches depend on all prompts and not on what is done already, so that a run which goes on after a kill computes a batch
as the first run would have.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..forest.gate import base_model, plan_model
from ..forest.model import evaluating
from ..training.ref_cache import weights_fingerprint
from .candidates import Completion, Prompt
from .sampling import Sampler, Sampling
from .text import Decoder, encode, eos_ids, pad_left, shown

Encoded = tuple[Prompt, list[int]]


class InProcess:
    """Samples from `model` and leaves it as it is. `batch_size` is the number of completions that are sampled at once.

    Raises ValueError for a prompt that does not fit the model's positions, before anything is sampled.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, *, batch_size: int = 64):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.plan = plan_model(base_model(model))
        self.fingerprint = weights_fingerprint(model)
        self.ends = eos_ids(base_model(model), tokenizer)

    def run(
        self, prompts: Sequence[Prompt], done: set[str], sampling: Sampling, round: int = 1
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield (prompt, its completions) for every prompt that is not in `done`."""
        for batch in self._batches(prompts, sampling):
            if all(prompt.id in done for prompt, _ in batch):
                continue
            with evaluating(self.model):
                found = self._complete(batch, sampling, round)
            for (prompt, _), completions in zip(batch, found, strict=True):
                if prompt.id not in done:
                    yield prompt, completions

    def _batches(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Encoded]]:
        """The prompts in batches of about the same length, or of equal length where the model cannot be padded."""
        encoded = [(prompt, encode(prompt.text, self.tokenizer)) for prompt in prompts]
        config = getattr(base_model(self.model), "config", None)
        limit = getattr(config and config.get_text_config(), "max_position_embeddings", None)
        for prompt, ids in encoded:
            if limit and len(ids) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"the prompt {shown(prompt.text)} has {len(ids)} tokens, and with max_new_tokens="
                    f"{sampling.max_new_tokens} it passes the model's {limit} positions: leave it out, or lower "
                    "max_new_tokens"
                )
        encoded.sort(key=lambda entry: (len(entry[1]), entry[0].id))
        size, batches = max(1, self.batch_size // sampling.num_generations), []
        for entry in encoded:
            last = batches[-1] if batches else []
            same = self.plan.path == "shared" or not last or len(last[0][1]) == len(entry[1])
            if last and len(last) < size and same:
                last.append(entry)
            else:
                batches.append([entry])
        return batches

    def _complete(self, batch: list[Encoded], sampling: Sampling, round: int) -> list[list[Completion]]:
        n = sampling.num_generations
        settings = [sampling.of(k, prompt.id, round) for prompt, _ in batch for k in range(n)]
        device = next(self.model.parameters()).device
        sampler = Sampler(settings, sampling.max_new_tokens, device)
        decoders = [Decoder(ids, self.tokenizer, sampling.stop, self.ends) for _, ids in batch for _ in range(n)]
        sample = {"shared": _with_cache, "padded": _with_generate, "segments": _with_state}[self.plan.path]
        trace = Trace(decoders, sampling, self.ends, device)
        sample(self.model, [ids for _, ids in batch], n, sampler, trace)
        rows = list(map(_completion, *trace.results(), decoders, settings))
        return [rows[i : i + n] for i in range(0, len(rows), n)]


def _completion(ids: list[int], logp: float, ended: bool, decoder: Decoder, setting) -> Completion:
    text = decoder.text(ids)
    temperature, top_p, seed = setting
    return Completion(text, len(ids), logp, temperature, top_p, seed, not ended, not text.strip())


class Trace:
    """The tokens that R rows have sampled so far, and which rows have ended."""

    def __init__(self, decoders: list[Decoder], sampling: Sampling, ends: list[int], device: torch.device):
        self.decoders, self.stop, self.longest = decoders, sampling.stop, sampling.max_new_tokens
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        shape = len(decoders), self.longest
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logps = torch.zeros(shape, dtype=torch.float64, device=device)
        self.length = torch.zeros(len(decoders), dtype=torch.long, device=device)
        self.ended = torch.zeros(len(decoders), dtype=torch.bool, device=device)

    def add(self, rows: torch.Tensor, step: int, tokens: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
        """Keep the tokens [r] of the rows [r] that had not ended; returns which of these rows go on [r]."""
        going = ~self.ended[rows]
        self.tokens[rows, step], self.logps[rows, step] = tokens, logps.double()
        self.length[rows] += going
        self.ended[rows] |= torch.isin(tokens, self.ends)
        if self.stop:
            for row in rows[going].tolist():
                if self.decoders[row].stopped(self.tokens[row, : step + 1].tolist()):
                    self.ended[row] = True
        return ~self.ended[rows]

    def results(self) -> tuple[list[list[int]], list[float], list[bool]]:
        """For each row its ids, its summed log-prob, and whether something other than the length ended it."""
        lengths, tokens = self.length.tolist(), self.tokens.tolist()
        inside = torch.arange(self.longest, device=self.length.device) < self.length[:, None]
        sums = (self.logps * inside).sum(1).tolist()
        return [ids[:n] for ids, n in zip(tokens, lengths, strict=True)], sums, self.ended.tolist()


def _with_cache(model, prompts: list[list[int]], n: int, sampler: Sampler, trace: Trace) -> None:
    """Sample from one prefill [B, P], whose cache is repeated to [B * n] rows, token by token."""
    device = trace.length.device
    ids, mask = pad_left(prompts, device)
    last = {"logits_to_keep": 1} if _takes(base_model(model).forward, "logits_to_keep") else {}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **last)
    cache = out.past_key_values
    cache.batch_repeat_interleave(n)
    mask, position = (x.repeat_interleave(n, 0) for x in (mask, positions[:, -1:]))
    logits, rows = out.logits[:, -1].repeat_interleave(n, 0), torch.arange(len(prompts) * n, device=device)
    for step in range(trace.longest):
        tokens, logps = sampler.draw(logits, rows, step)
        going = trace.add(rows, step, tokens, logps)
        left = int(going.sum())
        if not left or step + 1 == trace.longest:
            return
        if left <= len(rows) // 2:
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, mask, position, tokens = rows[keep], mask[keep], position[keep], tokens[keep]
        mask, position = torch.cat([mask, mask.new_ones(len(rows), 1)], 1), position + 1
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]


def _takes(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _with_generate(model, prompts: list[list[int]], n: int, sampler: Sampler, trace: Trace) -> None:
    """Sample by transformers' own loop over [B * n] rows of one length, with our draws in place of its own."""
    device = trace.length.device
    ids = torch.tensor(prompts, device=device).repeat_interleave(n, 0)
    rows, start = torch.arange(len(ids), device=device), ids.shape[1]

    class Draw(LogitsProcessor):
        def __call__(self, input_ids, scores):
            step = input_ids.shape[1] - start
            tokens, logps = sampler.draw(scores, rows, step)
            trace.add(rows, step, tokens, logps)
            return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)

    class Ended(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return trace.ended

    config = base_model(model).generation_config
    # The config is a fresh one: penalties and the like of the model's own would change its log-probs.
    plain = GenerationConfig(do_sample=False, max_new_tokens=trace.longest, pad_token_id=0)
    base_model(model).generation_config = plain
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[Draw()],
            stopping_criteria=[Ended()],
            generation_config=copy.deepcopy(plain),
        )
    finally:
        base_model(model).generation_config = config


def _with_state(model, prompts: list[list[int]], n: int, sampler: Sampler, trace: Trace) -> None:
    """Sample from a `HiddenStateModel`, one completion after the other; the state after the prompt is computed once."""
    device, head, carries = trace.length.device, model.get_output_embeddings(), getattr(model, "carries_state", False)
    for i, prompt in enumerate(prompts):
        hidden, begun = model.hidden_states(torch.tensor([prompt], device=device), None)
        for row in range(i * n, (i + 1) * n):
            ids, state, here = list(prompt), begun, hidden
            for step in range(trace.longest):
                which = torch.tensor([row], device=device)
                tokens, logps = sampler.draw(head(here[:, -1]), which, step)
                if not trace.add(which, step, tokens, logps):
                    break
                ids.append(int(tokens))
                new = [ids[-1]] if carries else ids
                here, state = model.hidden_states(torch.tensor([new], device=device), state if carries else None)
