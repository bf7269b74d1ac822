"""Judges: machines that say which of two completions is better. They are annotators with a name in the labels file.

| spec | a pair is judged by |
| --- | --- |
| `rule:FILE.py:FUNCTION` | your function: `f(prompt, completion)` returns a score, or `f(prompt, a, b)` a number above 0 for a |
| `reward:MODEL` | a sequence classifier with one output |
| `llm:URL#MODEL` | a chat model behind an OpenAI-compatible endpoint, asked in both orders (llm_judge.py) |
| `implicit:RUN` or `implicit:RUN#REFERENCE` | the margin of a trained policy against its reference (scoring.py) |

A judge is a function from items to an iterator of (item, choice, note), so that each verdict is saved before the next one
is asked for.
"""

import importlib.util
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .items import Item
from .store import LabelStore

Verdicts = Iterator[tuple[Item, str, str | None]]
Judge = Callable[[Iterable[Item]], Verdicts]
ITEMS_A_CALL = 64  # pairs that a model scores between two savings


def run_judge(
    store: LabelStore,
    spec: str | Callable,
    *,
    name: str | None = None,
    split: str = "train",
    limit: int | None = None,
    log: Callable[[str], None] = print,
    **options,
) -> Counter:
    """Have a judge label the items that it has not labelled yet; returns how often it gave each choice, old labels included.

    spec      one of the above, or a function for `rule`
    name      the annotator's name; by default the spec
    limit     only the first `limit` items are judged, and gold questions beside them
    options   those of `llm_judge.ask_llm`: template, timeout, concurrency, api_key, max_tokens

    Raises ValueError for a judge that cannot be loaded, that raises, that returns something other than a number, or that
    calls everything a tie. The labels that it gave before are saved, and a second run goes on after them.
    """
    name = name or (spec if isinstance(spec, str) else spec.__name__)
    judge = make_judge(spec, **options)
    store.add_annotator(name, "judge")
    wanted = store.items(split)[:limit] + (store.items(gold=True) if split == "train" else [])
    known = store.labelled_by(name)
    open_items = [item for item in wanted if item.id not in known]
    saved = 0
    try:
        for item, choice, note in judge(open_items):
            store.add_label(name, item.id, choice, note=note)
            saved += 1
    except Exception as error:
        raise ValueError(
            f"judge {name} stopped: {error}. Its {saved} labels of this run are saved: mend it and run it again, it goes "
            "on there"
        ) from error
    keys = {item.id for item in wanted}
    counts = Counter(
        x.choice for x in store.labels() + store.labels(gold=True) if x.annotator == name and x.item in keys
    )
    log(
        f"judge {name}: {saved} new labels; of all, " + ", ".join(f"{n} {choice}" for choice, n in counts.most_common())
    )
    if counts and not counts["a"] + counts["b"]:
        raise ValueError(
            f"judge {name} prefers no completion of {counts.total()} pairs to the other: nothing can be learned from "
            "that. Look at its rule or template, or give it another name when it is mended"
        )
    return counts


def make_judge(spec: str | Callable, **options) -> Judge:
    """The judge of a spec. Raises ValueError for a spec that is not understood, and for options that have no effect."""
    if callable(spec):
        kind, target = "rule", spec
    else:
        kind, _, target = spec.partition(":")
    if kind not in JUDGES or not target:
        raise ValueError(f"a judge is rule:FILE.py:FUNCTION, reward:MODEL, llm:URL#MODEL or implicit:RUN, not {spec!r}")
    options = {key: value for key, value in options.items() if value is not None}
    if options and kind != "llm":
        raise ValueError(f"{', '.join(options)} has no effect with {spec!r}: it is for judges that begin with llm:")
    return JUDGES[kind](target, **options)


def _number(value, what: str, item: Item) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"pair {item.id}: {what} gave {value!r}, which is no number") from None
    if math.isnan(number):
        raise ValueError(f"pair {item.id}: {what} gave NaN")
    return number


def _choice(a: float, b: float) -> str:
    return "tie" if a == b else "a" if a > b else "b"


def _rule(target: str | Callable) -> Judge:
    function = target if callable(target) else _load_function(target)
    label = getattr(function, "__name__", "the rule")
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(required) not in (2, 3):
        raise ValueError(
            f"{label} must take (prompt, completion) or (prompt, a, b), it takes {len(required)} arguments"
        )

    def judge(items: Iterable[Item]) -> Verdicts:
        for item in items:
            try:
                if len(required) == 2:
                    scores = [function(item.prompt, text) for text in (item.a, item.b)]
                else:
                    scores = [function(item.prompt, item.a, item.b), 0.0]
            except Exception as error:
                raise ValueError(f"pair {item.id}: {label} raised {type(error).__name__}: {error}") from error
            yield item, _choice(*(_number(score, label, item) for score in scores)), None

    return judge


def _load_function(target: str) -> Callable:
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file or target} (a rule is rule:FILE.py:FUNCTION)")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}")
    return function


def _reward(target: str) -> Judge:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(target, dtype="float32").eval()
    if model.config.num_labels != 1:
        raise ValueError(f"{target} has {model.config.num_labels} outputs: a reward model has one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = model.to(device), AutoTokenizer.from_pretrained(target)

    def ids(item: Item, text: str) -> list[int]:
        if isinstance(item.prompt, str):
            return tokenizer(item.prompt + text)["input_ids"]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the prompts are messages and {target} has no chat template")
        messages = [*item.prompt, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]

    def judge(items: Iterable[Item]) -> Verdicts:
        for item in items:
            # The model reads one sequence at a time, since padding changes the last token that some classifiers read.
            with torch.no_grad():
                rows = (torch.tensor([ids(item, text)], device=device) for text in (item.a, item.b))
                scores = [model(input_ids=row).logits.item() for row in rows]
            yield item, _choice(*(_number(score, target, item) for score in scores)), None

    return judge


def pair_row(item: Item) -> dict:
    """A row in TRL's layout with `a` as the chosen completion: text or messages, like the prompt."""
    return {"prompt": item.prompt, "chosen": reply(item.prompt, item.a), "rejected": reply(item.prompt, item.b)}


def reply(prompt: str | list[dict], text: str) -> str | list[dict]:
    """A completion in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _implicit(target: str) -> Judge:
    from .scoring import implicit_margins, load_policy

    policy, reference, tokenizer = load_policy(target)

    def judge(items: Iterable[Item]) -> Verdicts:
        items = list(items)
        for start in range(0, len(items), ITEMS_A_CALL):
            group = items[start : start + ITEMS_A_CALL]
            margins = implicit_margins(policy, reference, tokenizer, [pair_row(item) for item in group])
            for item, margin in zip(group, margins.tolist(), strict=True):
                yield item, _choice(margin, 0.0), None

    return judge


def _llm(target: str, **options) -> Judge:
    from .llm_judge import ask_llm

    return ask_llm(target, **options)


JUDGES = {"rule": _rule, "reward": _reward, "llm": _llm, "implicit": _implicit}
