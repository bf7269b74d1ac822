"""Loading a model or tokenizer by name: a folder or hub name, of a model or of trained adapters. Each failure is one line."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..forest.gate import base_model
from ..forest.head import output_layer
from .config import DPOConfig
from .handed_on import check_lora_targets
from .quantised import settle

_ADAPTER_CONFIG = "adapter_config.json"
_NETWORK_SECONDS = 5  # huggingface_hub itself tries for 24 s per file


def load_config(name: str, args: DPOConfig):
    """The model's config. Raises ValueError for a name that does not exist and for a file that is no config."""
    check_name(name, args)
    options = {"revision": _revision(args), "trust_remote_code": args.trust_remote_code}
    with _one_line(name):
        return AutoConfig.from_pretrained(name, **options)


def empty_model(name: str, args: DPOConfig) -> torch.nn.Module:
    """The model of that name without weights, on the meta device."""
    config = load_config(name, args)
    with torch.device("meta"), _one_line(name):
        return _auto_class(config).from_config(config, trust_remote_code=args.trust_remote_code)


def load_model(model, args: DPOConfig, shared: bool = False, quantisation=None) -> torch.nn.Module:
    """The model itself, or the one of that name: float32 unless `model_init_kwargs` says otherwise, safetensors only.

    A folder of adapters is loaded on its base model, as a PeftModel whose adapters can be trained further. `shared` says
    that the model will run dpo_fast's attention, so an implementation that is asked for by name need not be installed.
    `quantisation` is the one of the base, see quantised.py.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs:
            raise ValueError("model_init_kwargs has no effect: the model is already loaded")
        return model
    base = adapter_base(model, args)
    name = base or model
    config = load_config(name, args)
    options = {"dtype": "float32", "use_safetensors": True, "trust_remote_code": args.trust_remote_code}
    options = {**options, **(args.model_init_kwargs or {}), "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are named below
    if shared and options.get("attn_implementation") not in ("eager", "sdpa"):
        options.pop("attn_implementation", None)
    if quantisation is not None:
        options["quantization_config"] = quantisation
    with _one_line(name):
        loaded, info = _auto_class(config).from_pretrained(name, **options)
    if info["mismatched_keys"]:
        weight, found, wanted = min(info["mismatched_keys"])
        raise ValueError(
            f"the weights of {name} do not have the shapes of its config.json: {weight} is {list(found)}, not {list(wanted)}"
        )
    if info["missing_keys"]:
        raise ValueError(
            f"{name} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}, which would be random: is it a "
            "causal language model?"
        )
    loaded = settle(loaded)
    if base is None:
        return loaded
    from peft import PeftModel

    if Path(model).is_dir() and not (Path(model) / "adapter_model.safetensors").is_file():
        raise ValueError(f"{model} holds no adapter_model.safetensors: save the adapters with safe_serialization=True")
    with _one_line(model):
        return PeftModel.from_pretrained(loaded, model, is_trainable=True)


def load_tokenizer(name: str, args: DPOConfig):
    """The tokenizer of a folder or hub name, or None. Adapters without a tokenizer have that of their base model."""
    check_name(name, args)
    options = {"revision": _revision(args), "trust_remote_code": args.trust_remote_code}
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not Path(name).is_dir() or any((Path(name) / file).is_file() for file in files):
        with _one_line(name, "tokenizer"):
            return AutoTokenizer.from_pretrained(name, **options)
    base = adapter_base(name, args)
    return None if base is None else load_tokenizer(base, args)


def adapter_base(name: str, args: DPOConfig) -> str | None:
    """The base model of a folder or hub name that holds adapters alone; None for a model."""
    from transformers.utils import find_adapter_config_file

    check_name(name, args)
    if Path(name).is_dir() and (Path(name) / "config.json").is_file():
        return None
    with _one_line(name):
        file = find_adapter_config_file(name, revision=_revision(args))
    if file is None:
        return None
    with _one_line(name):
        config = json.loads(Path(file).read_text())
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name its base model (base_model_name_or_path)")
    if config.get("peft_type") != "LORA":
        check_adapters(config)
    return base


def add_adapters(model, peft_config):
    """The model in PEFT's wrapper. Raises ValueError for adapters that cannot be trained exactly."""
    if peft_config is not None:
        try:
            from peft import get_peft_model
        except ModuleNotFoundError as error:
            raise ImportError("peft_config needs peft: pip install 'dpo_fast[train]'") from error
        if hasattr(model, "disable_adapter"):
            raise ValueError("the model already has adapters: merge them first, or leave peft_config out")
        check_lora_targets(model, peft_config)
        model = get_peft_model(model, peft_config)
        output_layer(base_model(model))
    return model


def check_adapters(peft_config) -> None:
    """Raise ValueError for prompt, prefix and p-tuning: virtual tokens are no part of the forest."""
    config = peft_config if isinstance(peft_config, dict) else vars(peft_config)
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT"):
        raise ValueError(
            f"{kind.lower()} is not supported: prompt-learning puts virtual tokens before the prompt; use LoRA"
        )


def check_name(name: str, args: DPOConfig) -> None:
    """Raise ValueError, within seconds, for a hub name that does not exist or cannot be reached and is not cached."""
    if Path(name).is_dir():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    revision = _revision(args)
    known = (try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", _ADAPTER_CONFIG))
    if any(isinstance(path, str) for path in known):
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=_NETWORK_SECONDS)
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms on its page and log in (hf auth login)") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no model {name!r}: there is no such folder, and the hub has no such name (or it is private: hf auth login)"
        ) from None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub does not hand out {name!r}: {error}") from None
    except Exception as error:  # each HTTP library has its own
        raise ValueError(
            f"no model {name!r}: there is no such folder, it is not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}). Give the path of a folder, or connect to the network"
        ) from None


def _revision(args: DPOConfig) -> str:
    return (args.model_init_kwargs or {}).get("revision") or "main"


def _auto_class(config) -> type:
    """The class to load with: vision-language models that have no causal LM class are trained whole, on text alone."""
    if (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def _one_line(name: str, what: str = "model"):
    """Turn what the libraries raise while they read files of `name` into a ValueError that says which file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"a safetensors file of {name} is damaged or none ({error}): copy or download it again{_damaged(name)}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"a {what} file of {name} is not valid JSON: {error}") from error
    except RuntimeError as error:
        if "size mismatch" in str(error) or "shape" in str(error) or "mismatch" in str(error):
            raise ValueError(f"the weights of {name} do not have the shapes of its config.json: {error}") from error
        raise
    except (KeyError, AttributeError, TypeError) as error:
        if "unexpected keyword argument" in str(error):
            raise ValueError(f"model_init_kwargs do not fit the model: {error}") from error
        raise ValueError(
            f"the {what} files of {name} cannot be read: {type(error).__name__} {error}. Is {_files(what)} whole?"
        ) from error
    except Exception as error:
        # The tokenizers library raises plain Exceptions.
        if type(error) is not Exception:
            raise
        raise ValueError(f"the {what} files of {name} cannot be read: {error}. Is {_files(what)} whole?") from error


def _files(what: str) -> str:
    return "tokenizer.json" if what == "tokenizer" else "config.json"


def _damaged(name: str) -> str:
    """The names of a folder's damaged files, in parentheses."""
    from safetensors import safe_open

    bad = []
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            bad.append(path.name)
    return f" ({', '.join(bad)})" if bad else ""
