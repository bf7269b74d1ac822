"""`python -m dpo_fast.generate`: N completions per prompt from a policy, one line per prompt in a candidates file.

Completions that the file already holds are not generated again: the same command goes on where a killed one stopped.
"""

import argparse
import json
import sys

from .data.prompts import load_prompts
from .data.readers import Source
from .loop.candidates import Prompt
from .loop.command import run_command
from .loop.engines import TRANSFORMERS, open_engine
from .loop.generation import generate
from .loop.sampling import Sampling


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m dpo_fast.generate", description=__doc__, allow_abbrev=False)
    add = made.add_argument
    add("--model", "--model_name_or_path", metavar="NAME", help="model folder, hub name, or folder with adapters")
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help="prompts or pairs in any layout of dpo_fast.train, or .txt lines",
    )
    add("--split", default="train", help="of a directory or hub data set (%(default)s)")
    add("--skip_bad_rows", action="store_true", help="count and leave out unusable rows instead of stopping")
    add("--max_prompts", type=int, metavar="N", help="the first N prompts only")
    add("--output", default="candidates.jsonl", help="candidates file (%(default)s)")
    add("--num_generations", type=int, default=4, metavar="N", help="completions per prompt (%(default)s)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="one, or several that are cycled (1.0)")
    add("--top_p", type=float, nargs="+", default=[1.0], help="one, or several that are cycled (1.0)")
    add("--max_new_tokens", type=int, default=256, help="longest completion (%(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="strings that a completion ends before")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add(
        "--engine",
        default=TRANSFORMERS,
        help="transformers, or http://... of an OpenAI-compatible server (%(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the model in the process (bfloat16 on a GPU)")
    add("--batch_size", type=int, default=64, help="completions sampled at once in the process (%(default)s)")
    server = made.add_argument_group("server")
    add = server.add_argument
    add("--serve", metavar="COMMAND", help='starts a server for this run, as in "vllm serve {model} --port {port}"')
    add("--concurrency", type=int, help="requests at once (8)")
    add("--retries", type=int, help="further tries of a request that got no answer (5)")
    add("--timeout", type=float, help="seconds per request (120)")
    add("--extra_body", type=json.loads, metavar="JSON", help="further fields of each request")
    add("--api_key", metavar="KEY", help="bearer token of the server")
    return made


def run(argv: list[str]) -> None:
    """Generate as the options say. Raises ValueError or OSError for what a user can mend."""
    args = parser().parse_args(argv)
    sampling = Sampling(
        args.num_generations,
        tuple(args.temperature),
        tuple(args.top_p),
        args.max_new_tokens,
        tuple(args.stop),
        args.seed,
    )
    source = Source(args.prompts, split=None if args.split == "train" else args.split)
    prompts = load_prompts(source, skip_bad_rows=args.skip_bad_rows)[: args.max_prompts]
    names = ("concurrency", "retries", "timeout", "extra_body", "api_key")
    endpoint = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {"engine": args.engine, "serve": args.serve, "log_file": args.output + ".server.log"}
    if args.engine == TRANSFORMERS and args.serve is None:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    with open_engine(args.model, dtype=args.dtype, batch_size=args.batch_size, **options, **endpoint) as engine:
        generate(args.output, [Prompt(p) for p in prompts], engine, sampling, progress=sys.stderr.isatty())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
