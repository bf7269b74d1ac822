"""Time of N completions per prompt: one prefill whose cache is repeated, beside transformers' `num_return_sequences`.

    python -m bench.generate --model FOLDER --prompts FILE [--count 4] [--num_generations 8] [--max_new_tokens 32]

Both sample at temperature 1 from the whole vocabulary and never end early (no id ends a sequence), so both compute the
same number of tokens. The two take turns, and medians are reported.
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import GenerationConfig

from dpo_fast.data.prompts import load_prompts
from dpo_fast.loop.candidates import Prompt
from dpo_fast.loop.engines import load
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.sampling import Sampling
from dpo_fast.loop.text import encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, default=4, help="prompts")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    prompts = load_prompts(args.prompts, log=lambda _: None)[: args.count]
    rows = [encode(prompt, tokenizer) for prompt in prompts]
    sampling = Sampling(args.num_generations, max_new_tokens=args.max_new_tokens)
    engine = InProcess(model, tokenizer, batch_size=args.num_generations)
    engine.ends = []

    def ours() -> int:
        found = engine.run([Prompt(p) for p in prompts], set(), sampling)
        return sum(c.tokens for _, completions in found for c in completions)

    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.num_generations,
        pad_token_id=0,
    )
    model.generation_config = GenerationConfig()

    def theirs() -> int:
        total = 0
        for ids in rows:
            batch = torch.tensor([ids], device=model.device)
            out = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=config)
            total += out.shape[0] * (out.shape[1] - len(ids))
        return total

    seconds = {ours: [], theirs: []}
    for turn in range(args.repeats + 1):
        for run, times in seconds.items():
            began, tokens = time.perf_counter(), run()
            assert tokens == args.count * args.num_generations * args.max_new_tokens
            if turn:  # the first one warms up
                times.append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{args.count} prompts of {sorted(map(len, rows))} tokens, {args.num_generations} x {args.max_new_tokens} new tokens"
    )
    medians = [statistics.median(times) for times in seconds.values()]
    print(
        f"one prefill {medians[0]:.2f} s, num_return_sequences {medians[1]:.2f} s: {medians[1] / medians[0]:.2f} times"
    )


if __name__ == "__main__":
    main()
