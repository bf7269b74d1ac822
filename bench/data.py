"""Data that fills a disk: how fast pairs become tokens, how soon a run starts from what is kept, and what memory it takes.

    python -m bench.data --pairs 20000                      # tokenise with one and two processes, then start again
    python -m bench.data --pairs 1000000 --start_only       # a million pairs, whose tokens are written without a tokenizer

The pairs are conversations of made-up words, about 500 tokens each with a BPE tokenizer that is trained on them. Each
measurement is a process of its own. Memory is what the process holds for itself (RssAnon, at the end), beyond
what it held before it touched the data; pages of mapped files (RssFile) belong to the kernel, which takes them back.
Processor seconds of the process and of its workers stand beside the time: where others use the machine, `own + children / n` is
what n idle cores would take.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import conditions

RESULT = Path(__file__).parent / "results" / "data.json"
WORDS = {"prompt": 100, "chosen": 110, "rejected": 110}  # of which about 500 tokens are made
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_pairs(path: Path, count: int) -> None:
    """JSON lines of messages; words as rare as Zipf has them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlcumwfgypbvk", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (1 + i) for i in range(len(words))]
    pool = rng.choices(words, weights, k=1_000_000)

    def text(n: int) -> str:
        start = rng.randrange(len(pool) - 2 * n)
        return " ".join(pool[start : start + rng.randint(n // 2, 2 * n - n // 2)])

    with path.open("w") as file:
        for _ in range(count):
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {side: [{"role": role, "content": text(WORDS[side])}] for side, role in roles.items()}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(path: Path, folder: Path) -> None:
    """A BPE tokenizer of 8192 tokens with the ChatML template, from the first pairs of `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with path.open() as file:
        lines = [line for line, _ in zip(file, range(2000), strict=False)]
    texts = [m["content"] for line in lines for side in json.loads(line).values() for m in side]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def measure(path: str, tokenizer: str, num_proc: int, lists: bool, fake: bool) -> dict:
    """What a run does before its first step, in this process: seconds, memory, pairs and tokens."""
    import datasets  # noqa: F401 (imported before memory and time are looked at)
    import transformers

    from dpo_fast import DPOConfig
    from dpo_fast.data import mapped
    from dpo_fast.data.pairs import prepare
    from dpo_fast.data.sources import load_pairs
    from dpo_fast.training.fingerprint import _data_digest

    fast = transformers.AutoTokenizer.from_pretrained(tokenizer)
    args = DPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, disable_tqdm=True, report_to="none",
                     dataset_num_proc=num_proc or None)  # fmt: skip
    if fake:
        mapped.tokens_of = fake_tokens
    fast("warm"), fast.apply_chat_template([{"role": "user", "content": "warm"}], tokenize=False)
    before, start, used = memory(), time.perf_counter(), os.times()
    rows = load_pairs(path, log=lambda _: None, cache=not lists)
    read = time.perf_counter()
    if lists:  # as it was before: every token is a Python int, in every process
        from dpo_fast.data.tokenization import tokenize_pairs

        data = tokenize_pairs(rows.rows, fast, log=lambda _: None).examples
        tokens = sum(len(x) for e in data for x in e.values())
        after = memory()
    else:
        data = prepare(rows, fast, args, 8192, "train")
        _data_digest(data)
        after = memory()
        tokens = sum(int(data.examples.lengths(f).sum()) for f in ("prompt_ids", "chosen_ids", "rejected_ids"))
    end, now = time.perf_counter(), os.times()
    return {
        "cpu_seconds_own": now.user + now.system - used.user - used.system,
        "cpu_seconds_children": now.children_user + now.children_system - used.children_user - used.children_system,
        "pairs": len(data), "tokens": tokens, "seconds": end - start, "of_which_reading": read - start,
        "anonymous_mib": (after["RssAnon"] - before["RssAnon"]) / 1024,
        "mapped_mib": (after["RssFile"] - before["RssFile"]) / 1024, "before_mib": before["RssAnon"] / 1024,
    }  # fmt: skip


def fake_tokens(rows, places, tokenizer, **options):
    """Tokens without a tokenizer, of the right number, so that a million pairs take minutes."""
    import numpy as np

    from dpo_fast.data.tokens import Tokens

    rng = np.random.default_rng(len(rows))
    for row in rows:
        sizes = {side: int(1.56 * (1 + row[side][0]["content"].count(" "))) for side in WORDS}
        yield Tokens({f"{side}_ids": rng.integers(3, 8192, n) for side, n in sizes.items()})


def memory() -> dict[str, int]:
    """KiB of each kind that the process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))}


def child(what: str, cache: Path, *given, threads: int) -> dict:
    """`measure` in a new process that keeps its files in `cache`."""
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache), "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.data", "--child", json.dumps(given)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[-2000:]}")
    row = {"what": what, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="one and two processes are measured in turns so often")
    parser.add_argument("--start_only", action="store_true", help="write tokens without a tokenizer, measure the start")
    parser.add_argument("--folder", type=Path, help="where the pairs and the cache go; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, tokenizer = Path(folder) / "pairs.jsonl", Path(folder) / "tokenizer"
        write_pairs(path, args.pairs)
        make_tokenizer(path, tokenizer)
        given, rows = (str(path), str(tokenizer)), []
        if args.start_only:
            rows.append(child("write without a tokenizer", Path(folder) / "cache", *given, 0, False, True, threads=1))
            rows.append(child("start from what is kept", Path(folder) / "cache", *given, 0, False, True, threads=1))
        else:
            for k in range(args.rounds):
                for n in (1, 2):
                    cache = Path(folder) / f"cache-{n}-{k}"
                    rows.append(child(f"tokenise with {n}", cache, *given, n, False, False, threads=1))
            rows.append(child("start from what is kept", cache, *given, 2, False, False, threads=1))
            rows.append(child("lists of Python ints", cache, *given, 0, True, False, threads=1))
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found[f"{args.pairs} pairs{', start only' if args.start_only else ''}"] = {
        **conditions("cpu", "bench.data"),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
