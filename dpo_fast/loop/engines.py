"""Options decide the engine: a model in the process, an endpoint that exists, or a server that is started."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .endpoint import Endpoint
from .generation import Engine
from .serve import serving

TRANSFORMERS = "transformers"


def load(name: str, dtype: str | None = None) -> tuple[torch.nn.Module, object]:
    """A causal LM and its tokenizer from a folder or hub name; adapters are merged into their base model.

    `dtype` is "float32" or "bfloat16"; the default is bfloat16 on a GPU and float32 elsewhere.
    Raises FileNotFoundError for a folder that does not exist, ValueError for one without a tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_name(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} holds no tokenizer: save it beside the model ({error})") from None
    return model.to(device).eval(), tokenizer


def check_name(name: str) -> None:
    """Raise FileNotFoundError for a name that is no folder and does not look like a hub name."""
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no such model folder: {name} (absolute: {Path(name).absolute()})")


def folder_fingerprint(folder: str | Path) -> str:
    """32 hex digits that change with the weights, config or tokenizer files of a model folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".jinja"):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def open_engine(
    model: str | None,
    *,
    engine: str = TRANSFORMERS,
    serve: str | None = None,
    log_file: str | Path = "server.log",
    dtype: str | None = None,
    batch_size: int = 64,
    log: Callable[[str], None] = print,
    **endpoint,
) -> Iterator[Engine]:
    """The engine for one generation; a server that `serve` starts ends with it. `endpoint` holds options of `Endpoint`.

    Raises ValueError for options that do not go together.
    """
    if serve is None and engine != TRANSFORMERS:
        if not engine.startswith(("http://", "https://")):
            raise ValueError(f"engine is {TRANSFORMERS} or the address of a server (http://...), not {engine!r}")
        yield Endpoint(engine, model=model, log=log, **endpoint)
        return
    if model is None:
        raise ValueError("no model: name a folder or a hub name")
    if serve is not None:
        if engine != TRANSFORMERS:
            raise ValueError("serve starts a server of its own: leave engine out")
        check_name(model)
        mark = folder_fingerprint(model) if Path(model).is_dir() else model
        with serving(serve, model, log_file) as (url, check):
            yield Endpoint(url, model=model, fingerprint=mark, check=check, log=log, **endpoint)
        return
    if endpoint:
        raise ValueError(f"{', '.join(endpoint)} has no effect without a server (engine http://... or serve)")
    from .in_process import InProcess

    yield InProcess(*load(model, dtype), batch_size=batch_size)
