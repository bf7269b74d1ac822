"""An engine completes many prompts into a candidates file; completions that are there already are left alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from .candidates import CandidateFile, Completion, Prompt
from .sampling import Sampling


class Engine(Protocol):
    """A source of samples. `fingerprint` names the model, by its weights where they can be read, else by the server's name."""

    fingerprint: str

    def run(
        self, prompts: Sequence[Prompt], done: set[str], sampling: Sampling, round: int = 1
    ) -> Iterator[tuple[Prompt, list[Completion]]]: ...


def generate(
    path: str | Path,
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: Sampling,
    *,
    round: int = 1,
    progress: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Complete every prompt that the candidates file `path` does not hold yet; returns `path`.

    A run that was killed goes on where it stopped and gives the same set. Raises ValueError for two equal prompts and for a
    file of another model or other options, and whatever the engine raises; the lines written so far stay.
    """
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError("a prompt comes twice: leave one out, since equal completions of it would be merged anyway")
    options = {"model": engine.fingerprint, "round": round, **vars(sampling)}
    with CandidateFile(path, options) as file:
        there = sum(prompt.id in file.done for prompt in prompts)
        if there:
            log(f"{path}: {there} of {len(prompts)} prompts are there already")
        samples, sampled = [], tqdm(total=len(prompts), initial=there, unit="prompt", disable=not progress)
        with sampled:
            for prompt, completions in engine.run(prompts, set(file.done), sampling, round):
                file.add(prompt, completions, round, engine.fingerprint)
                samples += completions
                sampled.update()
    if samples:
        log(_summary(path, samples))
    return Path(path)


def _summary(path, samples: list[Completion]) -> str:
    tokens = sum(c.tokens for c in samples)
    marks = [("truncated", sum(c.truncated for c in samples)), ("empty", sum(c.empty for c in samples))]
    marked = "".join(f", {count / len(samples):.0%} {name}" for name, count in marks if count)
    return f"{path}: {len(samples)} completions, {tokens / len(samples):.0f} tokens each{marked}"
