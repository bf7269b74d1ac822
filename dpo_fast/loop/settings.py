"""The options of the loop: a YAML file with one section per step, checked before anything is computed.

    model: NAME            prompts: FILE          output_dir: runs/loop     rounds: 3
    reference: round       replay: 0              heldout: 0.2              patience: 2     seed: 0
    generate: {num_generations: 4, temperature: [1.0], ...}     annotate: {judge: rule:FILE.py:FUNCTION}
    labels: {method: majority}   train: {beta: 0.1, ...}   evaluate: {max_new_tokens: 128}   limits: {kl: 0.5}

Everything under `train` is an option of dpo_fast.train; the other sections are the classes below.
"""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path

from .aggregate import METHODS
from .sampling import Sampling

REFERENCES = ("round", "start")
SELECTIONS = ("random", "margin")
# Options that the loop decides itself, which therefore cannot be under `train`.
_OURS = ("model_name_or_path", "dataset_name", "datasets", "output_dir", "eval_dataset_name", "test_split_size")


@dataclasses.dataclass(frozen=True)
class GenerateSection:
    """Options of dpo_fast.generate; `serve` starts a server with each round's weights."""

    num_generations: int = 4
    temperature: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    top_p: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    max_new_tokens: int = 256
    stop: list[str] = dataclasses.field(default_factory=list)
    batch_size: int = 64
    dtype: str | None = None
    serve: str | None = None
    concurrency: int | None = None
    retries: int | None = None
    timeout: float | None = None
    extra_body: dict | None = None

    def sampling(self, seed: int) -> Sampling:
        """These options as a `Sampling`. Raises ValueError for a value out of range."""
        several = {name: _several(getattr(self, name)) for name in ("temperature", "top_p", "stop")}
        return Sampling(self.num_generations, max_new_tokens=self.max_new_tokens, seed=seed, **several)


@dataclasses.dataclass(frozen=True)
class AnnotateSection:
    """Who labels: a judge (loop/judges.py; or a function), people on a page, or people with a judge for held-out pairs.

    `max_pairs` training pairs and `max_heldout_pairs` held-out ones are labelled per round (None: all). `select` says
    which training pairs come first: "random" or "margin" (small implicit margin of the round's first model against the
    loop's first one, loop/selection.py). `gold` is a file of pairs with a known answer; one question in `gold_every` is
    of these. `judge_template` and `judge_api_key` are files for an llm judge.
    """

    judge: str | Callable | None = None
    judge_template: str | None = None
    judge_api_key: str | None = None
    annotators: list[str] = dataclasses.field(default_factory=list)
    labels_per_pair: int = 1
    max_pairs: int | None = None
    max_heldout_pairs: int | None = None
    select: str | None = None
    gold: str | None = None
    gold_every: int = 10
    guidelines: str | None = None
    host: str = "127.0.0.1"
    port: int = 8421
    token: str | None = None

    def judge_options(self) -> dict[str, str]:
        """Options of `run_judge` beside the spec. Raises OSError for a file that is not there."""
        files = {"template": self.judge_template, "api_key": self.judge_api_key}
        return {name: Path(file).read_text() for name, file in files.items() if file is not None}


@dataclasses.dataclass(frozen=True)
class LabelsSection:
    """How several labels of a pair become one (loop/aggregate.py)."""

    method: str = "majority"
    min_p: float = 0.5


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
    """One sample per held-out prompt is compared; it is drawn at temperature 1, so that the KL is that of the policy."""

    max_new_tokens: int | None = None  # default: that of generate


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits past which the report warns (loop/limits.py); None switches a warning off."""

    kl: float | None = 0.5  # nats per token from the start
    length: float | None = 1.5  # times longer or shorter than the start's samples
    repetition: float | None = 0.1  # more of the 4-grams repeated than at the start
    entropy: float | None = 0.5  # times the start's entropy
    chosen_drop: float | None = 10.0  # nats that a chosen held-out completion lost in the round
    gap: float | None = 0.15  # reward accuracy in training minus held out


_SECTIONS = {
    "generate": GenerateSection,
    "annotate": AnnotateSection,
    "labels": LabelsSection,
    "evaluate": EvaluateSection,
    "limits": Limits,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All options of a loop. Raises ValueError at construction, naming the option, for what cannot work.

    reference  the reference of a round's training: "round" is the model that the round starts from, "start" the first one
    replay     how many earlier rounds' pairs are trained on again
    heldout    share (below 1) or number of prompts that are never labelled for training
    patience   the loop ends after so many rounds without a better win rate against the start; 0 never ends it early
    """

    model: str
    prompts: str
    output_dir: str = "runs/loop"
    rounds: int = 3
    reference: str = "round"
    replay: int = 0
    heldout: float = 0.2
    patience: int = 2
    seed: int = 0
    generate: GenerateSection = dataclasses.field(default_factory=GenerateSection)
    annotate: AnnotateSection = dataclasses.field(default_factory=AnnotateSection)
    labels: LabelsSection = dataclasses.field(default_factory=LabelsSection)
    train: dict = dataclasses.field(default_factory=dict)
    evaluate: EvaluateSection = dataclasses.field(default_factory=EvaluateSection)
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self):
        for name, least in (("rounds", 1), ("replay", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference={self.reference!r} is not one of {', '.join(REFERENCES)}")
        if not (0 < self.heldout < 1 or (self.heldout >= 1 and self.heldout == int(self.heldout))):
            raise ValueError(f"heldout={self.heldout:g} is neither a share below 1 nor a number of prompts")
        if self.labels.method not in METHODS:
            raise ValueError(f"labels: method={self.labels.method!r} is not one of {', '.join(METHODS)}")
        self._check_annotate()
        for name in _OURS:
            if name in self.train:
                raise ValueError(f"train: {name} is decided by the loop: leave it out")
        self.generate.sampling(self.seed)

    def _check_annotate(self) -> None:
        given, names = self.annotate, self.annotate.annotators
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"annotate: annotators must be a list of names, found {names!r}")
        if given.judge is None and not names:
            raise ValueError("nobody prefers: name a judge or annotators in the section annotate")
        if len(set(names)) < len(names):
            raise ValueError(f"annotate: a name comes twice in annotators: {', '.join(names)}")
        if names and given.labels_per_pair > len(names):
            raise ValueError(
                f"annotate: labels_per_pair={given.labels_per_pair} needs that many annotators, {len(names)} are named"
            )
        if given.select not in (None, *SELECTIONS):
            raise ValueError(
                f"annotate: select={given.select!r} is not one of {', '.join(SELECTIONS)} (disagreement needs labels that "
                "are there already, as python -m dpo_fast.annotate has them)"
            )
        for name, least in (("labels_per_pair", 1), ("gold_every", 1), ("max_pairs", 1), ("max_heldout_pairs", 1)):
            value = getattr(given, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"annotate: {name} must be a whole number of at least {least}, found {value!r}")
        if (given.gold is not None or given.guidelines is not None) and not names:
            raise ValueError("annotate: gold and guidelines have no effect without annotators")

    @property
    def folder(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.output_dir)

    def identity(self) -> dict:
        """The options that decide the content of the rounds, as JSON; the others may change when a loop goes on."""
        values = dataclasses.asdict(self)
        judge = self.annotate.judge
        values["annotate"]["judge"] = getattr(judge, "__qualname__", judge)
        for name in ("output_dir", "rounds", "patience", "limits"):
            del values[name]
        for name in ("guidelines", "host", "port", "token", "judge_api_key"):
            del values["annotate"][name]
        return values


def _several(value) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def read_settings(config: dict) -> Settings:
    """Settings from a YAML file's mapping. Raises ValueError for an unknown name, with the nearest known one."""
    values = dict(_known(config, Settings, "the file"))
    for name, kind in _SECTIONS.items():
        section = values.get(name)
        if section is None:
            values.pop(name, None)
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{name} must be a section of options, found {section!r}")
        values[name] = kind(**_known(section, kind, name))
    if not isinstance(values.setdefault("train", {}) or {}, dict):
        raise ValueError(f"train must be a section of options, found {values['train']!r}")
    values["train"] = values["train"] or {}
    for name in ("model", "prompts"):
        if not values.get(name):
            raise ValueError(f"no {name}: give --{name}, or {name} in the file")
    return Settings(**values)


def _known(values: dict, kind: type, where: str) -> dict:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            raise ValueError(f"{where}: unknown option {name}" + (f": did you mean {near[0]}?" if near else ""))
        default = fields[name].default
        if type(default) in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} must be a number, found {value!r}")
        if type(default) is int and not isinstance(value, int):
            raise ValueError(f"{where}: {name} must be a whole number, found {value!r}")
    return values
