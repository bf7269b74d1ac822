"""The objectives of dpo_fused: a loss of one pair and its derivatives by the two log-probs, one function per row of PAIR_LOSSES.

    in    log-probs and reference log-probs of the chosen (w) and rejected (l) sequence, their lengths, beta,
          label smoothing, discopop_tau, simpo_gamma
    out   loss, dloss/dpw, dloss/dpl

The formulas are those of loss_table.py. All numbers are float32 scalars.
"""

import triton
import triton.language as tl

from .rows import LOG2E


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) - log(1 + z) with z = exp(-|x|); log(1 + z) = 2 atanh(z / (2 + z)) keeps its digits where z is small."""
    z = tl.exp2(-tl.abs(x) * LOG2E)
    w = z / (2.0 + z)
    w2 = w * w
    series = 1.0 / 11 + w2 * (1.0 / 13 + w2 * (1.0 / 15))
    series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * (1.0 / 9 + w2 * series))))
    return tl.minimum(x, 0.0) - 2.0 * w * series


@triton.jit
def _smooth(x, e):
    """Cross-entropy of the margin x against the label 1 - e, and its derivative."""
    loss = -(1.0 - e) * _log_sigmoid(x) - e * _log_sigmoid(-x)
    return loss, e * _sigmoid(x) - (1.0 - e) * _sigmoid(-x)


@triton.jit
def _dpo(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    loss, g = _smooth(b * ((pw - rw) - (pl - rl)), e)
    return loss, b * g, -b * g


@triton.jit
def _dpo_norm(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    x = b * ((pw - rw) / nw - (pl - rl) / nl)
    g = -b * _sigmoid(-x)
    return -_log_sigmoid(x), g / nw, -g / nl


@triton.jit
def _hinge(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    left = 1.0 - b * ((pw - rw) - (pl - rl))
    g = tl.where(left <= 0, 0.0, -b)
    return tl.where(left <= 0, 0.0, left), g, -g


@triton.jit
def _ipo(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    z = (pw - rw) / nw - (pl - rl) / nl - 0.5 / b
    return z * z, 2.0 * z / nw, -2.0 * z / nl


@triton.jit
def _exo_pair(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    x = b * ((pw - rw) - (pl - rl))
    log_w, log_l = tl.log(1.0 - e), tl.log(e)
    p, q = _sigmoid(x), _sigmoid(-x)
    g = b * p * q * (x - log_w + log_l)
    return p * (_log_sigmoid(x) - log_w) + q * (_log_sigmoid(-x) - log_l), g, -g


@triton.jit
def _nca_pair(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    xw, xl = b * (pw - rw), b * (pl - rl)
    loss = -_log_sigmoid(xw) - 0.5 * _log_sigmoid(-xw) - 0.5 * _log_sigmoid(-xl)
    return loss, b * (0.5 * _sigmoid(xw) - _sigmoid(-xw)), 0.5 * b * _sigmoid(xl)


@triton.jit
def _robust(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    x = b * ((pw - rw) - (pl - rl))
    loss = (-(1.0 - e) * _log_sigmoid(x) + e * _log_sigmoid(-x)) / (1.0 - 2.0 * e)
    g = -b * ((1.0 - e) * _sigmoid(-x) + e * _sigmoid(x)) / (1.0 - 2.0 * e)
    return loss, g, -g


@triton.jit
def _bco_pair(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    xw, xl = b * (pw - rw), b * (pl - rl)
    return -_log_sigmoid(xw) - _log_sigmoid(-xl), -b * _sigmoid(-xw), b * _sigmoid(xl)


@triton.jit
def _sppo_hard(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    zw, zl = (pw - rw) - 0.5 / b, (pl - rl) + 0.5 / b
    return zw * zw + zl * zl, 2.0 * zw, 2.0 * zl


@triton.jit
def _apo_zero(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    xw, xl = b * (pw - rw), b * (pl - rl)
    gw, gl = -b * _sigmoid(xw) * _sigmoid(-xw), b * _sigmoid(xl) * _sigmoid(-xl)
    return _sigmoid(-xw) + _sigmoid(xl), gw, gl


@triton.jit
def _apo_down(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    xw, x = b * (pw - rw), b * ((pw - rw) - (pl - rl))
    gl = b * _sigmoid(x) * _sigmoid(-x)
    return _sigmoid(xw) + _sigmoid(-x), b * _sigmoid(xw) * _sigmoid(-xw) - gl, gl


@triton.jit
def _discopop(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    x = b * ((pw - rw) - (pl - rl))
    ls, up, down = _log_sigmoid(x), _sigmoid(x / tau), _sigmoid(-x / tau)
    # m exp(-x) is computed as one exponential, which is flat past 80 as in loss_table.py.
    exponent = _log_sigmoid(x / tau) - x
    bump = tl.exp2(tl.minimum(exponent, 80.0) * LOG2E)
    g = up * down * ls / tau - down * _sigmoid(-x) + tl.where(exponent <= 80.0, bump * (down / tau - 1.0), 0.0)
    return bump - down * ls, b * g, -b * g


@triton.jit
def _simpo(pw, pl, rw, rl, nw, nl, b, e, tau, gamma):
    loss, g = _smooth(b * (pw / nw - pl / nl) - gamma, e)
    return loss, b * g / nw, -b * g / nl


PAIR_LOSSES = {
    "sigmoid": _dpo,
    "sigmoid_norm": _dpo_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
}
