"""How a token is drawn: temperature, top-p, and one stream of random numbers per completion.

A completion's random numbers depend on its own seed alone and not on the rest of its batch, so that completions which a
killed run had not written are drawn again as they would have been.
"""

import dataclasses
import hashlib
import math

import torch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of one generation. Completion k of a prompt has the k-th temperature and the k-th top_p, cycled.

    Temperature 0 takes the likeliest token. A completion ends before the first of the `stop` strings.
    Raises ValueError for a value out of range.
    """

    num_generations: int = 4
    temperature: tuple[float, ...] = (1.0,)
    top_p: tuple[float, ...] = (1.0,)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("num_generations", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature or not all(t >= 0 and math.isfinite(t) for t in self.temperature):
            raise ValueError(f"temperature must be numbers of at least 0, got {list(self.temperature)}")
        if not self.top_p or not all(0 < p <= 1 for p in self.top_p):
            raise ValueError(f"top_p must be numbers in (0, 1], got {list(self.top_p)}")
        if not all(self.stop):
            raise ValueError("a stop string is empty, which would end every completion at once: leave it out")

    def of(self, k: int, prompt: str, round: int) -> tuple[float, float, int]:
        """Temperature, top_p and seed (31 bits, which every server accepts) of completion k of the prompt with that id."""
        digest = hashlib.blake2b(f"{self.seed}:{round}:{prompt}:{k}".encode(), digest_size=4).digest()
        temperature, top_p = self.temperature[k % len(self.temperature)], self.top_p[k % len(self.top_p)]
        return temperature, top_p, int.from_bytes(digest, "little") >> 1


class Sampler:
    """Draws tokens for R rows.

    `settings` holds (temperature, top_p, seed) of each row. Rows are given by index, so that finished ones can be left out.
    """

    def __init__(self, settings: list[tuple[float, float, int]], max_new_tokens: int, device: torch.device):
        streams = (torch.Generator().manual_seed(seed) for _, _, seed in settings)
        # A float32 number in [0, 1) has only 2^24 values, fewer than the tails of some vocabularies need.
        uniform = [torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in streams]
        self.uniform = torch.stack(uniform).to(device)  # [R, max_new_tokens]
        self.temperature = torch.tensor([t for t, _, _ in settings], dtype=torch.float64, device=device)
        self.top_p = torch.tensor([p for _, p, _ in settings], dtype=torch.float64, device=device)
        self.greedy = all(t == 0 for t, _, _ in settings)
        self.whole = all(p == 1 for _, p, _ in settings)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [r] and their log-probs [r] (float32, temperature 1) from logits [r, V] of the rows [r]."""
        logits = logits.float()
        likeliest = logits.argmax(-1)
        tokens = likeliest if self.greedy else self._sample(logits, rows, step, likeliest)
        logps = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens, logps

    def _sample(self, logits, rows, step, likeliest) -> torch.Tensor:
        temperature = self.temperature[rows, None]
        probs = (logits.double() / temperature.where(temperature > 0, 1.0)).softmax(-1)
        order = None
        if not self.whole:
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            # The smallest set of tokens whose probability reaches top_p stays; the first token always does.
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p[rows, None], 0.0)
        cumulative = probs.cumsum(-1)
        target = self.uniform[rows, step, None] * cumulative[:, -1:]
        # With right=True this is the first place whose sum passes the target, which is never a token of probability 0.
        place = torch.searchsorted(cumulative, target, right=True).clamp_max(probs.shape[-1] - 1)
        tokens = (place if order is None else order.gather(1, place))[:, 0]
        return tokens.where(self.temperature[rows] > 0, likeliest)
