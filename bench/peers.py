"""What each integration saves on a CPU: the loss step of a peer, its own code against ours, in turns.

    python -m bench.peers [--turns 9] [peer ...]

A step goes from hidden states [8, 128, 512] and a head [32000, 512], both float32 with a gradient, to the gradients; half
of the tokens are prompt. Peers that are not installed are named with the pip command.

The seconds are medians of the processor time of one thread, which other work on the machine disturbs less than the clock.
Both sides run in turns; the range is of the ratio within a turn. The memory is what a process adds to its resident set at
most during its second step (the first one compiles where a peer compiles), the gradients included; median of 3 processes.
"""

import argparse
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import commit

S, T, D, V = 8, 128, 512, 32000


def batch() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, T, D, generator=rng).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(V, D, generator=rng) * D**-0.5)
    labels = torch.randint(V, (S, T), generator=rng)
    labels[:, : T // 2] = -100
    return hidden, weight, labels


def dpo(logps: Tensor) -> Tensor:
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return hidden[:, :-1].reshape(-1, D), labels[:, 1:].reshape(-1)


def trl() -> tuple[Callable, Callable]:
    """TRL 1.16 off a GPU has every position in its head; under the patch completion rows alone."""
    theirs = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    ours = importlib.import_module("dpo_fast.integrations.trl").ChunkedLogProbFunction

    def step(function, compact):
        def run(hidden, weight, labels):
            rows, targets = shifted(hidden, labels)
            scored = targets != -100
            if compact:
                logps = rows.new_zeros(len(rows)).index_put(
                    (scored.nonzero()[:, 0],),
                    function.apply(rows[scored], weight, None, targets[scored], 1.0, 256, None, 1.0, ())[0],
                )
            else:
                found = function.apply(rows, weight, None, targets.clamp(min=0), 1.0, 256, None, 1.0, ())[0]
                logps = found.masked_fill(~scored, 0)
            return dpo(logps.view(S, T - 1).sum(1))

        return run

    return step(theirs, False), step(ours, True)


def old_trl() -> tuple[Callable, Callable]:
    """TRL 1.8 and 1.9, which Axolotl pins: log-probs of logits."""
    theirs = importlib.import_module("trl.trainer.utils").selective_log_softmax
    ours = importlib.import_module("dpo_fast.integrations.trl").selective_log_softmax

    def step(function):
        def run(hidden, weight, labels):
            targets = labels[:, 1:]
            logps = function(F.linear(hidden, weight)[:, :-1], targets.clamp(min=0))
            return dpo((logps * (targets != -100)).sum(1))

        return run

    return step(theirs), step(ours)


def liger() -> tuple[Callable, Callable]:
    """The fused loss with a reference, as it comes: Liger's is compiled."""

    def step(module):
        loss = importlib.import_module(module).LigerFusedLinearDPOLoss()

        def run(hidden, weight, labels):
            rows, targets = hidden[:, :-1].contiguous(), labels[:, 1:].contiguous()
            return loss(weight, rows, targets, ref_input=rows.detach(), ref_weight=weight.detach())[0]

        return run

    return step("liger_kernel.chunked_loss"), step("dpo_fast.integrations.liger")


def llamafactory() -> tuple[Callable, Callable]:
    """Its trainer's `get_batch_loss_metrics`, reference and metrics included, on a Llama whose trunk is given."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # This is its own switch: transformers may be newer than its pin.
    if importlib.util.find_spec("torchaudio") is None:  # It imports this for sound.
        sys.modules["torchaudio"] = type(sys)("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import BaseModelOutputWithPast

    theirs = importlib.import_module("llamafactory.train.dpo.trainer").CustomDPOTrainer
    ours = importlib.import_module("dpo_fast.integrations.llamafactory")
    patched = {name: getattr(ours, name) for name in ("concatenated_forward", "compute_preference_loss")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1))

    def step(kind):
        trainer = object.__new__(kind)
        trainer.__dict__ |= {
            "finetuning_args": SimpleNamespace(use_ref_model=True), "ref_model": model, "loss_type": "sigmoid",
            "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "ftx_gamma": 0.0, "bco_gemma": 0.0,
            "f_divergence_type": "reverse_kl", "reference_free": False,
            "accelerator": SimpleNamespace(unwrap_model=lambda model: model, device="cpu"),
        }  # fmt: skip

        def run(hidden, weight, labels):
            states = BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=(hidden,))
            model.model.forward, model.lm_head.weight = lambda *_, **__: states, weight
            ids = torch.zeros_like(labels)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            return trainer.get_batch_loss_metrics(model, given)[0]

        return run

    return step(theirs), step(type("Patched", (theirs,), patched))


def torchtune() -> tuple[Callable, Callable]:
    """Log-probs of logits and the loss, as its 0.6 recipes call them; the reference's log-probs are given."""

    def step(log_probs, loss):
        function = importlib.import_module(log_probs).get_batch_log_probs
        loss = importlib.import_module(loss).DPOLoss(beta=0.1)

        def run(hidden, weight, labels):
            chosen, rejected = function(F.linear(hidden, weight), labels).chunk(2)
            return loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen))[0].mean()

        return run

    ours = "dpo_fast.integrations.torchtune"
    return step("torchtune.rlhf", "torchtune.rlhf.loss"), step(ours, ours)


def cross_entropy() -> tuple[Callable, Callable]:
    """Its implementation for processors, torch_compile."""

    def step(module, **options):
        function = importlib.import_module(module).linear_cross_entropy
        return lambda hidden, weight, labels: function(hidden, weight, labels, shift=True, **options)

    return step("cut_cross_entropy", impl="torch_compile"), step("dpo_fast.integrations.cross_entropy")


# The peer, its package, and the versions that its row is of.
PEERS = {
    "trl": (trl, "trl", ("1.16",)),
    "old_trl": (old_trl, "trl", ("1.8", "1.9")),
    "liger": (liger, "liger-kernel", ()),
    "llamafactory": (llamafactory, "llamafactory", ()),
    "torchtune": (torchtune, "torchtune", ()),
    "cross_entropy": (cross_entropy, "cut-cross-entropy", ()),
}


def installed(peer: str) -> str | None:
    _, package, wanted = PEERS[peer]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if not wanted or found.startswith(wanted) else None


def step(function: Callable, given: tuple) -> list[Tensor]:
    loss = function(*given)
    return [loss.detach(), *torch.autograd.grad(loss, given[:2])]


def in_turns(functions: tuple[Callable, Callable], turns: int) -> list[list[float]]:
    """The seconds of each turn, theirs and ours."""
    given, seconds = batch(), ([], [])
    torch.testing.assert_close(*(step(f, given) for f in functions), rtol=1e-3, atol=1e-6)
    for _ in range(turns):
        for function, found in zip(functions, seconds, strict=True):
            start = time.process_time()
            step(function, given)
            found.append(time.process_time() - start)
    return seconds


def status(name: str) -> int:
    """MiB of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) // 1024


def memory(function: Callable) -> int:
    """MiB added at most during the second step."""
    given = batch()
    step(function, given)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The peak counts from here.
    before = status("VmRSS")
    step(function, given)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--memory", type=int, choices=(0, 1), help="print the MiB of theirs (0) or ours (1) alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory is not None:
        print("MiB", memory(PEERS[options.peers[0]][0]()[options.memory]))
        return
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, 1 thread, {options.turns} turns, load {load:.1f}, commit {commit()}")
    print("| peer | theirs s | ours s | theirs / ours | its range | theirs MiB | ours MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for peer in options.peers or PEERS:
        found = installed(peer)
        if found is None:
            _, package, wanted = PEERS[peer]
            print(f"| {peer} | not installed: pip install {package}{f'=={wanted[-1]}.0' if wanted else ''} |")
            continue
        theirs, ours = in_turns(PEERS[peer][0](), options.turns)
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        theirs, ours = statistics.median(theirs), statistics.median(ours)
        used = []
        for side in (0, 1):
            command = [sys.executable, "-m", "bench.peers", peer, "--memory", str(side)]
            said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
            used.append(statistics.median(int(text.split("MiB")[-1]) for text in said))
        print(
            f"| {PEERS[peer][1]} {found} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {used[0]} | {used[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
