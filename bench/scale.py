"""A plan on paper: memory, traffic and time per GPU of one DPO step under FSDP2, for models that do not fit one accelerator.

    python -m bench.scale        # the tables of docs/scale.md

Nothing here was measured. The formulas are in the functions' docstrings; link and FLOP rates are the vendor's.
"""

import dataclasses

GIB = 2**30
WORKSPACE = GIB  # the head's logits at most, dpo_fast's default
LAYERS_GATHERED = 2  # the layer that runs and the one that is fetched meanwhile


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama: layers, width, width of keys and values, width of the feed-forward, vocabulary."""

    name: str
    layers: int
    hidden: int
    kv: int
    feed_forward: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Weights of one layer: attention 2 D^2 + 2 D K, feed-forward 3 D F."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.feed_forward

    @property
    def table(self) -> int:
        """Weights of the embedding, and as many of the head."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """All weights but the norms'."""
        return self.layers * self.layer + 2 * self.table


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published rates of an H100 SXM: dense bf16 operations, NVLink one way, and its share of eight 400 Gb/s adapters."""

    flops: float = 989e12
    used: float = 0.40  # the share of it that a step is assumed to reach
    nvlink: float = 450e9
    network: float = 8 * 50e9  # of a node of eight, which a ring over nodes goes through at once


@dataclasses.dataclass(frozen=True)
class Step:
    """What one GPU does in a step: rows through the trunk, those of them that are scored, passes it is cut into."""

    rows: int = 16384
    scored: int = 12288
    passes: int = 1


LLAMA = {
    "8B": Model("8B", 32, 4096, 1024, 14336, 128256),
    "70B": Model("70B", 80, 8192, 1024, 28672, 128256),
}
GPUS = (8, 64, 256)


def memory(model: Model, gpus: int, step: Step) -> dict[str, float]:
    """Bytes per GPU, by use.

    weights, gradients: float32, 4 bytes each, sharded. optimizer: AdamW's two moments in float32, sharded. gathered: two
    layers in bf16, the embedding or the head in bf16, and the float32 gradient of whichever of layer and head is larger.
    activations: with checkpointing, a bf16 row of D per layer, and all rows of one layer: 2 bytes * (8 D + 2 K + 4 F).
    head: the logits' workspace, the scored hidden states and their gradients in bf16 and float32.
    """
    shard = model.weights / gpus
    inside = 8 * model.hidden + 2 * model.kv + 4 * model.feed_forward
    rows = step.rows / step.passes
    return {
        "weights": 4 * shard,
        "gradients": 4 * shard,
        "optimizer": 8 * shard,
        "gathered": 2 * (LAYERS_GATHERED * model.layer + model.table) + 4 * max(model.layer, model.table),
        "activations": 2 * rows * (model.layers * model.hidden + inside),
        "head": WORKSPACE + 6 * step.scored / step.passes * model.hidden,
    }


def traffic(model: Model, gpus: int, step: Step) -> dict[str, float]:
    """Bytes that one GPU receives in a step: the bf16 weights for forward and for backward, float32 gradients, per pass.

    A ring hands (gpus - 1) / gpus of the whole to every rank.
    """
    share = (gpus - 1) / gpus * step.passes
    return {"all-gather": 2 * 2 * model.weights * share, "reduce-scatter": 4 * model.weights * share}


def seconds(model: Model, gpus: int, step: Step, gpu: Gpu) -> dict[str, float]:
    """Compute and transfer of a step, each alone; FSDP2 runs them side by side, so a step takes at least the longer.

    compute: 2 operations per weight and row forward, 4 backward, 2 again for checkpointing; the head three products of 2 per
    weight and scored row, none again.
    """
    trunk = 8 * model.layers * model.layer * step.rows
    head = 6 * model.table * step.scored
    rate = gpu.nvlink if gpus <= 8 else gpu.network
    return {
        "compute": (trunk + head) / (gpu.flops * gpu.used),
        "transfer": sum(traffic(model, gpus, step).values()) / rate,
    }


def table(model: Model, step: Step, gpu: Gpu) -> str:
    """One Markdown table, a column per number of GPUs."""
    columns = [(memory(model, n, step), traffic(model, n, step), seconds(model, n, step, gpu)) for n in GPUS]
    rows = [("", *(f"{n} GPUs" for n in GPUS)), ("---",) * (1 + len(GPUS))]
    for name in columns[0][0]:
        rows.append((f"{name}, GiB", *(f"{found[name] / GIB:.1f}" for found, _, _ in columns)))
    rows.append(("**memory, GiB**", *(f"**{sum(found.values()) / GIB:.1f}**" for found, _, _ in columns)))
    for name in columns[0][1]:
        rows.append((f"{name}, GB", *(f"{found[name] / 1e9:.1f}" for _, found, _ in columns)))
    for name in columns[0][2]:
        rows.append((f"{name}, s", *(f"{found[name]:.2f}" for _, _, found in columns)))
    rows.append(("**step at least, s**", *(f"**{max(found.values()):.2f}**" for _, _, found in columns)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tables() -> dict[str, str]:
    """Name of a model -> its table, with one pass per step."""
    return {name: table(model, Step(), Gpu()) for name, model in LLAMA.items()}


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"### {name}\n\n{text}\n")
