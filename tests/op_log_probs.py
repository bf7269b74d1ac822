"""Rows of the table of ops (op_table.py): token and sequence log-probs of logits, and of hidden states."""

import math

import torch
from op_inputs import (
    ALL_IGNORED,
    HEAD,
    LAYOUTS,
    far,
    first_block,
    masked_bias,
    masked_target,
    mostly,
    other_index,
    peaked,
    repeated,
    spread,
    top_and_tail,
)
from op_options import (
    BATCHES,
    FROZEN,
    FULL,
    HEADS,
    NEEDS,
    POSITIVE,
    STATISTICS,
    TRAINED,
    TRANSFORMS,
    Op,
    merged,
)
from op_samples import BF16, F16, F32, F64, LENGTHS, SHORT, SIDES, Row

import dpo_fast
from dpo_fast import reference

# ---- Logits in, log-probs out ----

token_logps = Op(
    dpo_fast.token_logps,
    reference.token_logps,
    merged(
        {
            f"{t}, {b}": Row(v=257, lengths=SHORT, packed=packed, options={**transform, "outputs": STATISTICS})
            for t, transform in TRANSFORMS.items()
            for b, packed in BATCHES.items()
        },
        {
            f"{name} alone": Row(v=65, lengths=SHORT, options={**TRANSFORMS["all"], "outputs": (name,)}, dtypes=(F64, F32), kernel=True)
            for name in STATISTICS
        },
        {"no outputs": Row(lengths=SHORT, packed=True, graph=True)},
        {
            f"{n} rows of {v}": Row(v=v, lengths=((0, n),), packed=True, dtypes=(F32,), kernel=n == 0)
            for n in (0, 1, 5)
            for v in (1, 2, 3, 64, 1000)
        },
        # Rows shorter and longer than a block of one warp (1024 words of two bytes), at any alignment.
        {
            f"{n} rows of {v}, statistics": Row(
                v=v, lengths=((1, n - 1),), packed=True, options={"outputs": STATISTICS, **TRANSFORMS[t]}, dtypes=types, kernel=True
            )
            for n, v, t, types in (
                (1, 1, "plain", (F32, BF16, F16)), (3, 7, "plain", (F32, BF16, F16)),
                (5, 64, "plain", (F32, BF16, F16)), (2, 1031, "plain", (F32, BF16, F16)),
                (3, 4096, "plain", (F32, BF16, F16)), (4, 1500, "temperature", (F32, BF16)),
                (4, 1501, "softcap", (F32, BF16)), (4, 1502, "all", (F32, BF16)),
            )
        },
        {
            f"masked words, {t}": Row(
                v=39, lengths=SHORT, packed=True, edit=masked_target, options={**TRANSFORMS[t], "outputs": STATISTICS}, dtypes=(F32,)
            )
            for t in ("plain", "temperature", "softcap")
        },
        {
            f"{name}, {t}": Row(
                v=5000, lengths=((2, 3),), packed=True, edit=edit, dtypes=(F32,), kernel=True,
                options={**TRANSFORMS[t], "outputs": ("entropy", "is_top1", "log_sum_sq_probs")},
            )
            for name, edit in (("most words -inf", mostly(-math.inf)), ("most words lowest", mostly(torch.finfo(F32).min)))
            for t in ("plain", "temperature")
        },
        {"first block masked": Row(v=4500, lengths=((0, 2),), packed=True, edit=first_block, options={"outputs": STATISTICS}, dtypes=(F32,), kernel=True)},
        {
            f"peaked {size:g}": Row(lengths=SHORT, packed=True, edit=peaked(size), options={"outputs": STATISTICS}, dtypes=(F32, BF16), kernel=True)
            for size in (30.0, 1000.0)
        },
        # A row's log-sum-exp is one float32: probabilities are known to its rounding, 2**-24 times up to 10000.
        {"far from zero": Row(v=500, lengths=((1, 3),), packed=True, edit=far, dtypes=(F32,), floor=2**-10, kernel=True)},
        {"wide": Row(v=300, lengths=SHORT, packed=True, edit=spread(1000.0), options={"outputs": STATISTICS}, dtypes=(F32, BF16), floor=2**-10, kernel=True)},
        {"all ignored": Row(lengths=SHORT, edit=ALL_IGNORED, options={"outputs": STATISTICS}, dtypes=(F32,), kernel=True)},
        {"another ignore_index": Row(edit=other_index, options={"ignore_index": 5}, dtypes=(F64, F32))},
        {"two rows at a time": Row(lengths=SHORT, packed=True, options={**TRANSFORMS["all"], "outputs": STATISTICS}, tile=2, dtypes=(F64,))},
        {
            f"layout {name}": Row(v=33, lengths=lengths, packed=packed, layout=layout, options={"outputs": STATISTICS}, dtypes=(F32, BF16), kernel=packed)
            for name, (layout, lengths, packed) in LAYOUTS.items()
        },
        {"graph": Row(v=11, options={"outputs": STATISTICS, "temperature": 0.9, "softcap": 5.0}, dtypes=(F32,), graph=True)},
        {"graph of a slice": Row(v=11, lengths=SIDES, layout=LAYOUTS["shifted"][0], dtypes=(F32,), graph=True)},
    ),
    twice=True,
)  # fmt: skip

sequence_logps = Op(
    dpo_fast.sequence_logps,
    reference.sequence_logps,
    merged(
        {
            f"{'mean' if average else 'sum'}, {b}": Row(
                lengths=SHORT, packed=packed, options={"average": average, "temperature": 0.8, "softcap": 5.0, "logit_scale": 0.7}
            )
            for average in (False, True)
            for b, packed in BATCHES.items()
        },
        {"empty sequences": Row(lengths=((0, 0), (0, 3), (0, 2), (0, 0)), packed=True, dtypes=(F64, F32))},
        {"graph": Row(v=11, packed=True, options={"average": True}, dtypes=(F32,), graph=True)},
    ),
    twice=True,
)  # fmt: skip


# ---- Hidden states and an output layer in, log-probs out ----


def tokens(n, d, v, **more) -> Row:
    """n rows without a sequence, some of whose coefficients are 0 (as those of tokens common to a pair are)."""
    return Row(v=v, width=d, lengths=((0, n),), packed=True, **more)


linear_token_logps = Op(
    dpo_fast.linear_token_logps,
    reference.linear_token_logps,
    merged(
        {
            f"{n}x{d}x{v}{', bias' if bias else ''}, {t}": tokens(n, d, v, bias=bias, dtypes=(F64,), options={**o, "outputs": STATISTICS})
            for n, d, v in ((1, 5, 7), (13, 7, 31), (20, 8, 64), (37, 3, 101), (3, 1, 2), (5, 2, 1))
            for bias in (False, True)
            for t, o in TRANSFORMS.items()
        },
        # Four rows per tile; no, some or all rows kept for backward.
        {
            f"d{'+'.join(needs) or 'nothing'}, {kept} kept": tokens(
                21, 5, 33, needs=needs, tile=4, kept=kept, options={**TRANSFORMS["all"], "outputs": STATISTICS}, dtypes=(F64, F32)
            )
            for needs in NEEDS
            for kept in (0, 6, 1000)
        },
        {
            f"a tile of {tile} bytes, d{'+'.join(needs)}": tokens(5, 3, 17, needs=needs, tile_bytes=tile, kept=2, dtypes=(F64,))
            for tile in (1, 100)
            for needs in (FROZEN, (*FROZEN, "weight"), TRAINED)
        },
        {
            f"{name} alone, {t}": tokens(9, 4, 15, dtypes=(F64,), options={**o, "outputs": (name,)})
            for name in STATISTICS
            for t, o in TRANSFORMS.items()
        },
        {
            f"precision, {head}, {t}, {kept} kept": tokens(
                64, 32, 257, needs=needs, tile=9, kept=kept, options={**TRANSFORMS[t], "outputs": STATISTICS}, dtypes=(F32, BF16, F16)
            )
            for head, needs in HEADS.items()
            for t in ("plain", "all")
            for kept in (0, 10, 1000)
        },
        # `residual_` alone, whose rows are as long as a block and longer.
        {
            f"frozen {n}x{v}, {t}": tokens(
                n, 3, v, needs=FROZEN, options={**TRANSFORMS[t], "outputs": ("entropy", "is_top1")}, dtypes=(F32, BF16, F16), kernel=True
            )
            for n, v in ((2, 1), (4, 1031), (3, 4096))
            for t in TRANSFORMS
        },
        {
            f"strided, {head}": tokens(12, 6, 19, needs=needs, layout=HEAD, options={"outputs": STATISTICS}, dtypes=(F64, F32))
            for head, needs in HEADS.items()
        },
        {
            f"one row repeated, {head}": tokens(8, 6, 19, needs=needs, layout=repeated, grad=-3.0, dtypes=(F64, F32))
            for head, needs in HEADS.items()
        },
        {"peaked": tokens(16, 5, 21, edit=top_and_tail, options={"outputs": STATISTICS}, dtypes=(F64, F32))},
        {
            f"masked words, {head}, {t}": tokens(
                8, 4, 11, needs=needs, edit=masked_bias, dtypes=(F64,), options={**TRANSFORMS[t], **POSITIVE.get(t, {}), "outputs": STATISTICS}
            )
            for head, needs in HEADS.items()
            for t in TRANSFORMS
        },
        {"no rows": tokens(0, 4, 9, options={"outputs": STATISTICS}, kernel=True)},
        {
            f"gradient of {rows} rows, d{'+'.join(needs) or 'nothing'}, {kept} kept": tokens(
                13, 4, 9, needs=needs, tile=3, kept=kept, own={"grad_rows": rows}, options={"outputs": STATISTICS}, dtypes=(F64,)
            )
            for needs in ((), FROZEN, ("weight",), TRAINED)
            for rows in (0, 1, 7, 12, 13)
            for kept in (0, 6, 1000)
        },
        {
            f"ignored rows, {head}, {b}": Row(
                v=33, lengths=LENGTHS, packed=packed, needs=needs, tile=4, kept=6, options={"outputs": STATISTICS}
            )
            for head, needs in HEADS.items()
            for b, packed in BATCHES.items()
        },
        {
            f"all ignored, {head}": Row(v=33, needs=needs, edit=ALL_IGNORED, dtypes=(F64, F32)) for head, needs in HEADS.items()
        },
        {"no ignore_index": tokens(7, 5, 11, options={"ignore_index": None}, dtypes=(F64, F32))},
        {"graph, trained": tokens(7, 5, 11, kept=4, options={"logit_scale": 0.5, "outputs": ("entropy",)}, dtypes=(F32,), graph=True)},
        {"graph, frozen": tokens(7, 5, 11, needs=FROZEN, dtypes=(F32,), graph=True)},
    ),
    twice=True,
)  # fmt: skip

linear_sequence_logps = Op(
    dpo_fast.linear_sequence_logps,
    reference.linear_sequence_logps,
    merged(
        {
            f"{'mean' if average else 'sum'}, {head}, {b}": Row(
                v=13, width=6, packed=packed, needs=needs, kept=7, options={"average": average, "outputs": ("entropy",)}
            )
            for average in (False, True)
            for head, needs in HEADS.items()
            for b, packed in BATCHES.items()
        },
        {
            "graph": Row(
                v=11, lengths=FULL, packed=True, kept=7, options={"temperature": 1.2}, dtypes=(F32,), graph=True
            )
        },
    ),
    twice=True,
)
