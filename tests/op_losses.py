"""Rows of the table of ops (op_table.py): the losses of logits, of hidden states, and of log-probs."""

from op_inputs import ALL_IGNORED, HEAD, LAYOUTS, apart, ignore, masked, other_index, peaked
from op_options import (
    BATCHES,
    FROZEN,
    FULL,
    HEADS,
    LOSSES,
    MIXED,
    NEEDS,
    PAIRS,
    TOKENS,
    Op,
    merged,
)
from op_samples import BF16, F16, F32, F64, LENGTHS, SIDES, Row

import dpo_fast
from dpo_fast import reference

# ---- The losses ----


def ignored_rows(**more) -> dict[str, Row]:
    """One sequence, one pair, or all without a scored token."""
    return {
        f"{name}, {what} ignored, {b}": Row(
            packed=packed,
            options=LOSSES[name],
            edit=edit,
            dtypes=(F64, F32),
            kernel=packed and not more and name in ("sigmoid", "simpo"),
            **more,
        )
        for what, edit in (("a sequence", ignore(1)), ("a pair", ignore(2, 6)), ("all", ALL_IGNORED))
        for name in ("sigmoid", "ipo", "simpo", "sft", "aot")
        for b, packed in BATCHES.items()
    }


dpo_loss = Op(
    dpo_fast.dpo_loss,
    reference.dpo_loss,
    merged(
        {
            f"{name}, {b}": Row(packed=packed, options=options, grad=-1.7, dtypes=(F64, F32) if b == "padded" else (F32,))
            for name, options in LOSSES.items()
            for b, packed in BATCHES.items()
        },
        {
            f"{name}, {b}": Row(packed=packed, options=options, grad=3.0, dtypes=(F64, F32))
            for name, options in (MIXED | TOKENS).items()
            for b, packed in BATCHES.items()
        },
        {
            f"{name}, half precision, {b}": Row(v=257, packed=packed, options=LOSSES[name], grad=2.0, dtypes=(BF16, F16))
            for name in ("sigmoid", "ipo", "aot", "simpo")
            for b, packed in BATCHES.items()
        },
        # A factor that is no power of two rounds a gradient that was rounded before.
        {
            f"{name}, half precision times 2.5": Row(v=257, packed=True, options=LOSSES[name], grad=2.5, dtypes=(BF16, F16), floor=2**-8)
            for name in ("sigmoid", "ipo", "aot", "simpo")
        },
        {f"{name}, one block and more": Row(v=1031, packed=True, options=LOSSES[name], lengths=((0, 2), (1, 2), (0, 3), (0, 1)), dtypes=(F32, BF16, F16), kernel=True)
            for name in ("sigmoid", "discopop")
        },
        {"a power of two": Row(v=2048, packed=True, lengths=((0, 2), (1, 2), (0, 3), (0, 1)), dtypes=(F32, BF16, F16), kernel=True)},
        {"long sequences": Row(v=3, packed=True, lengths=((0, 33), (4, 66)), dtypes=(F32,), kernel=True)},
        {"no reference": Row(ref=None, dtypes=(F32,))},
        # Unscaled, most of this gradient is below the smallest float16.
        {"a loss scale": Row(v=4001, packed=True, grad=65536.0, dtypes=(F16,))},
        ignored_rows(),
        {f"another ignore_index, {b}": Row(packed=packed, edit=other_index, options={"ignore_index": 5}, dtypes=(F64, F32)) for b, packed in BATCHES.items()},
        {
            f"one pair {lengths}, V {v}, {b}": Row(v=v, lengths=lengths, packed=packed, ref=1.0, dtypes=(F32,))
            for lengths in (((0, 1), (0, 1)), ((0, 4), (1, 2)), ((0, 1), (4, 0)))
            for v in (1, 2, 130)
            for b, packed in BATCHES.items()
        },
        # Pairs of any size, whatever the size of a grid says of the order of a kernel's programs.
        {
            f"lengths {name}": Row(v=19, lengths=tuple((0, n) for n in lengths), packed=True, dtypes=(F32,), kernel=True)
            for name, lengths in (
                ("0 3 2 0", (0, 3, 2, 0)), ("9 2", (9, 2)), ("0 0 4 3 0 2", (0, 0, 4, 3, 0, 2)), ("0 0", (0, 0)), ("3 six times", (3,) * 6),
                ("1 ten times", (1,) * 10),
            )
        },
        {"masked words": Row(v=39, packed=True, edit=masked, dtypes=(F32,), kernel=True)},
        {"peaked": Row(packed=True, edit=peaked(60.0), dtypes=(F32, BF16), kernel=True)},
        {f"{name}, two pairs": Row(lengths=PAIRS, packed=True, options=options, grad=0.5, dtypes=(F32, BF16) if name in ("sigmoid", "discopop") else (F32,), kernel=True) for name, options in (LOSSES | {k: MIXED[k] for k in ("smoothed", "discopop, tau 0.05")}).items() if name not in ("aot", "aot_unpaired", "sft", "orpo")},
        {
            f"{name}, margin {sign}e4": Row(v=11, lengths=PAIRS, packed=True, options=options, ref=sign * 1e5, edit=apart(sign), dtypes=(F32,), kernel=True)
            for name, options in LOSSES.items()
            for sign in (-1, 1)
        },
        {
            f"layout {name}": Row(v=33, lengths=lengths[:4], packed=packed, layout=layout, grad=1.5, dtypes=(F32,), kernel=packed)
            for name, (layout, lengths, packed) in LAYOUTS.items()
        },
        {
            f"{name} in place, {b}": Row(packed=packed, options=LOSSES[name], grad=2.0, own={"inplace": True}, dtypes=(F32, F16))
            for name in ("sigmoid", "aot", "sft")
            for b, packed in BATCHES.items()
        },
        {
            f"in place, {name}": Row(v=v, lengths=PAIRS, packed=name == "packed in wider memory", layout=LAYOUTS["words"][0], grad=-0.5, own={"inplace": True}, dtypes=(F32, BF16), kernel=True)
            for name, v in (("packed in wider memory", 37), ("padded in wider memory", 37), ("one word of wider memory", 1))
        },
        {"graph": Row(v=11, dtypes=(F32,), grad=3.0, graph=True)},
        {"graph, packed": Row(v=11, packed=True, options={"loss_type": "hinge", "pair_weights": MIXED["weighted pairs"]["pair_weights"]}, dtypes=(F32,), graph=True)},
        {"graph, two": Row(v=11, options=MIXED["two"], dtypes=(F32,), graph=True)},
        {"graph, in place": Row(v=11, own={"inplace": True}, dtypes=(F32,), grad=3.0, graph=True)},
        {"graph, aot in place": Row(v=11, own={"inplace": True}, options={"loss_type": "aot"}, dtypes=(F32,), graph=True)},
        {"graph of a slice": Row(v=11, lengths=SIDES, layout=LAYOUTS["shifted"][0], dtypes=(F32,), graph=True)},
        {"graph without a gradient": Row(v=11, needs=(), dtypes=(F32,), graph=True)},
    ),
    loss=True,
)  # fmt: skip

linear_dpo_loss = Op(
    dpo_fast.linear_dpo_loss,
    reference.linear_dpo_loss,
    merged(
        {
            f"{name}, {head}": Row(packed=True, needs=needs, options=options, grad=-1.7, tile=3, kept=12, dtypes=(F32,))
            for name, options in LOSSES.items()
            for head, needs in HEADS.items()
        },
        # Workspaces of no row, of part of a pair, of a few pairs, of everything.
        {
            f"d{'+'.join(needs) or 'nothing'}, {kept} kept, {b}": Row(
                packed=packed, needs=needs, grad=2.0, tile=4, kept=kept, options={"logit_scale": 0.6, "softcap": 4.0}, dtypes=(F64,)
            )
            for needs in NEEDS
            for kept in (0, 7, 12, 1000)
            for b, packed in BATCHES.items()
        },
        {
            f"{name}, {b}, {kept} kept": Row(packed=packed, tile=4, kept=kept, options=options, dtypes=(F64,))
            for name, options in (MIXED | TOKENS).items()
            for b, packed in BATCHES.items()
            for kept in (0, 9, 12, 1000)
        },
        {
            f"{name}, ref_hidden, {b}, {kept} kept": Row(
                width=6, v=13, packed=packed, kept=kept, ref="hidden", options={**options, "outputs": ("entropy", "is_top1")}, dtypes=(F64,)
            )
            for name, options in (MIXED | TOKENS).items()
            if options.get("loss_type") != "orpo"
            for b, packed in BATCHES.items()
            for kept in (0, 9, 1000)
        },
        {
            f"precision, {head}, {t}, {kept} kept": Row(
                v=257, lengths=tuple((p, 5 * c) for p, c in LENGTHS), needs=needs, tile=9, kept=kept, grad=0.5,
                options=transform, dtypes=(F32, BF16, F16),
            )
            for head, needs in HEADS.items()
            for t, transform in (("plain", {}), ("transform", {"logit_scale": 0.6, "softcap": 4.0}))
            for kept in (0, 50, 1000)
        },
        {f"{name}, frozen": row for name, row in ignored_rows(needs=FROZEN, tile=4, kept=12).items()},
        {f"{name}, trained": row for name, row in ignored_rows(tile=4, kept=12).items()},
        {
            f"one pair {lengths}, V {v}, {head}": Row(v=v, lengths=lengths, needs=needs, ref=1.0, dtypes=(F32,))
            for lengths in (((0, 1), (0, 1)), ((0, 4), (1, 2)), ((0, 1), (4, 0)))
            for v in (1, 2, 130)
            for head, needs in HEADS.items()
        },
        {f"strided, {head}": Row(needs=needs, layout=HEAD, dtypes=(F64, F32)) for head, needs in HEADS.items()},
        {
            f"{name}, margin 1e4, {head}": Row(needs=needs, ref=1e4, options=LOSSES[name], dtypes=(F64,))
            for name in ("sigmoid", "ipo", "hinge")
            for head, needs in HEADS.items()
        },
        {"graph, trained": Row(v=11, kept=7, grad=3.0, options={"outputs": ("entropy",)}, dtypes=(F32,), graph=True)},
        {"graph, frozen": Row(v=11, needs=FROZEN, dtypes=(F32,), graph=True)},
        {"graph, aot": Row(v=11, lengths=FULL, packed=True, needs=("hidden", "weight"), options={"loss_type": "aot"}, dtypes=(F32,), graph=True)},
    ),
    loss=True,
)  # fmt: skip

preference_loss = Op(
    dpo_fast.preference_loss,
    reference.preference_loss,
    merged(
        {name: Row(options=options, grad=-1.7, dtypes=(F64, F32, BF16)) for name, options in (LOSSES | MIXED).items()},
        {
            f"{name}, {f}": Row(options={**options, "f_divergence_type": f}, dtypes=(F64, F32))
            for name, options in LOSSES.items()
            if name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
            for f in ("forward_kl", "js_divergence", "alpha_divergence")
        },
        {f"{name}, margin {sign}e4": Row(options=options, ref=sign * 1e4, dtypes=(F64, F32)) for name, options in LOSSES.items() for sign in (-1, 1)},
        {"graph": Row(options={"loss_type": ["sigmoid", "ipo", "discopop", "sft"]}, dtypes=(F64,), graph=True)},
    ),
    back_ends=False,
    twice=True,
    loss=True,
)  # fmt: skip
