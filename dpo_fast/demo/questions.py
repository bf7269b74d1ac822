"""The demo's data: short questions, each with a terse and a polite answer, a rule that judges answers, and a byte-level
tokenizer. The questions are made by rule from a seed; nothing is downloaded.

Every fact is asked in six wordings. Two of them, drawn at random, are held out: they are never trained with that fact.
"""

import dataclasses
import random
import re
from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
TERSE, POLITE = "terse", "polite"
_POLITE = re.compile(r"Gladly: .+ .+\.")
_TERSE = re.compile(r"[^\s.]+\.")

_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, "
    "Norway Oslo, Greece Athens, Ireland Dublin, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, "
    "Cuba Havana, Peru Lima"
)
_OPPOSITES = (
    "hot cold, big small, fast slow, high low, old young, rich poor, wet dry, early late, full empty, hard soft"
)
_COLOURS = (
    "grass green, snow white, coal black, blood red, butter yellow, chocolate brown, milk white, silver grey, tar black, "
    "spinach green, rust red, ash grey"
)
_YOUNG = "cat kitten, dog puppy, cow calf, horse foal, sheep lamb, hen chick, pig piglet, lion cub"
_FOLLOWS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday",
    "January February March April May June July August September October November December January",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, the right answer (one word or number) and that answer in a sentence."""

    prompt: str
    answer: str
    sentence: str

    def styled(self, style: str) -> str:
        """The answer as a completion: `7.` or `Gladly: the sum is 7.`"""
        return f"{self.answer}." if style == TERSE else f"Gladly: {self.sentence}."


def _facts(text: str) -> list[tuple[str, str]]:
    return [tuple(fact.split()) for fact in text.split(", ")]


# (six wordings of the question, how the polite answer begins, facts as (subject, answer)): 100 facts
_KINDS = (
    (
        "What is the capital of {}?|Which city is the capital of {}?|Name the capital of {}.|Tell me the capital of {}.|"
        "Do you know the capital of {}?|I want to know the capital of {}.",
        "its capital is",
        _facts(_CAPITALS),
    ),
    (
        "What is the opposite of {}?|Which word is the opposite of {}?|Name the opposite of {}.|"
        "Tell me the opposite of {}.|Do you know the opposite of {}?|I want to know the opposite of {}.",
        "the opposite is",
        [way for fact in _facts(_OPPOSITES) for way in (fact, fact[::-1])],
    ),
    (
        "What is the colour of {}?|Which is the colour of {}?|Name the colour of {}.|Tell me the colour of {}.|"
        "Do you know the colour of {}?|I want to know the colour of {}.",
        "its colour is",
        _facts(_COLOURS),
    ),
    (
        "What is the young of a {}?|What do you call the young of a {}?|Name the young of a {}.|"
        "Tell me the young of a {}.|Do you know the young of a {}?|I want to know the young of a {}.",
        "it is called",
        _facts(_YOUNG),
    ),
    (
        "What comes after {}?|Which one comes after {}?|Name the one after {}.|Tell me what comes after {}.|"
        "Do you know what comes after {}?|I want to know what comes after {}.",
        "next comes",
        [step for names in _FOLLOWS for step in pairwise(names.split())],
    ),
    (
        "What is {}?|How much is {}?|Compute {}.|Tell me the sum of {}.|Can you work out {}?|I want to know {}.",
        "the sum is",
        [(f"{a} plus {b}", str(a + b)) for a in range(1, 6) for b in range(1, 6)],
    ),
)


def make_questions(seed: int = 0) -> tuple[list[Question], list[Question]]:
    """400 training and 200 held-out questions: two wordings in six of each fact, drawn at random, are held out."""
    rng = random.Random(seed)
    train, held_out = [], []
    for wordings, opening, facts in _KINDS:
        for subject, answer in facts:
            prompts = [f"Q: {wording.format(subject)}\nA: " for wording in wordings.split("|")]
            asked = [Question(prompt, answer, f"{opening} {answer}") for prompt in rng.sample(prompts, len(prompts))]
            held_out += asked[:2]
            train += asked[2:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def pair(question: Question, chosen: str) -> dict[str, str]:
    """A row for the trainer whose chosen completion has the style `chosen`."""
    other = TERSE if chosen == POLITE else POLITE
    return {"prompt": question.prompt, "chosen": question.styled(chosen), "rejected": question.styled(other)}


def judge_style(answer: str) -> str | None:
    """`polite`, `terse`, or None for an answer in neither form. The judge looks at the form alone, not at the content."""
    if _POLITE.fullmatch(answer):
        return POLITE
    return TERSE if _TERSE.fullmatch(answer) else None


def is_correct(question: Question, answer: str) -> bool:
    """Whether the answer's last word is the right one, in whatever style."""
    return answer.rstrip(".").split(" ")[-1] == question.answer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte (no merges) and <bos>, <eos>, <pad>: 259 ids. <bos> begins every text."""
    specials = [BOS, EOS, PAD]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
