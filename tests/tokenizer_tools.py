"""Tiny tokenizers with chat templates, and rows of text and of messages for them."""

import tokenizers
import transformers

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
# The prompt alone ends in a block that the whole conversation lacks.
THINKING = TURNS + "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
OPTIONS = "{{ bos_token }}{% if tools %}{{ tools | length }} tools {% endif %}{{ style or 'plain' }}:" + TEMPLATE
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE

CORPUS = [
    "the sky is blue",
    "the sky is green",
    "the sea is blue too",
    "[user]what is it?</s>[assistant]it is blue",
] * 4


def make_tokenizer(bos=True, template=None):
    """Byte-level BPE with merges across words' letters; adds <s> in front of plain text if `bos`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def letters(bos=True):
    """One token per character, so that ids can be counted by hand. <s> is 0, </s> is 1, 'a' is 2, 'b' is 3, ..."""
    vocab = {"<s>": 0, "</s>": 1} | {chr(ord("a") + i): 2 + i for i in range(26)} | {" ": 28}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def text_row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_row(prompt, chosen, rejected, **extras):
    return {"prompt": [user(prompt)], "chosen": [bot(chosen)], "rejected": [bot(rejected)], **extras}
