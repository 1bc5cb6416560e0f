"""The softmax of a chunk of logits on a CPU: losses, and slopes in the place of the logits, in one compiled pass.

    n tokens, V vocabulary, G groups of tokens

PyTorch's operations read and write the (n, V) logits in memory once for each of maximum, exponential, sum, difference
and cast; here a row stays in the processor's second cache from the first of these to the last. Rows are shared among
as many threads as torch uses; no row depends on another one, and what is summed over rows is summed in fixed groups,
so that the number of threads changes no bit. The price: the exponential is our own, since compilers vectorise no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rnnlm.kernels import compile_with, on_threads, unlocked_kernel

GROUP = 32  # rows whose slopes are summed one after the other, and the least that a thread takes
MOST_NEGATIVE = np.float32(-87.0)  # below this the exponential counts as 0; e^-87.3 is the least normal fp32


_helper = compile_with(boundscheck=False, error_model="numpy")
_reordering = compile_with(boundscheck=False, error_model="numpy", fastmath={"reassoc", "contract"})


def softmax_rows(
    logits: np.ndarray, bias: np.ndarray, targets: np.ndarray, most: np.ndarray | None, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace logits by the loss's slope by them, softmax - one-hot; all arithmetic in fp32.

    Args:
        logits: (n, V) float32, or uint16 that are the bits of bfloat16; the slopes afterwards, zero in masked rows.
        bias: (V,) float32, added to the logits.
        targets: (n,) int64, negative where masked.
        most: (V,) float32, filled with the largest absolute slope of each column; None: not asked for.

    Returns:
        (n,) float32 losses in nats, 0 where masked; (V,) float32 the slopes' sum over the rows, before rounding.
    """
    groups = -(-len(logits) // GROUP)
    losses, sums = np.empty(len(logits), np.float32), np.empty((groups, len(bias)), np.float32)
    peaks = np.empty((groups if most is not None else 0, len(bias)), np.float32)

    run = _bf16_rows if logits.dtype == np.uint16 else _fp32_rows
    on_threads(lambda begin, end: run(begin, end, logits, bias, targets, losses, sums, peaks), groups, threads)
    if most is not None:
        peaks.max(axis=0, initial=0, out=most)
    return losses, sums.sum(axis=0)


@unlocked_kernel
def _fp32_rows(begin: int, end: int, logits: Any, bias: Any, targets: Any, losses: Any, sums: Any, peaks: Any) -> None:
    """As `softmax_rows`, for groups begin ... end - 1.

    logits (n, V) float32, sums (G, V) float32 of each group, peaks likewise or (0, V).
    """
    for group in range(begin, end):
        sums[group] = 0
        if len(peaks):
            peaks[group] = 0

        for row in range(group * GROUP, min(len(logits), (group + 1) * GROUP)):
            losses[row] = _softmax(logits[row], bias, targets[row])
            _gather(logits[row], sums[group], peaks[group : group + 1])


@unlocked_kernel
def _bf16_rows(begin: int, end: int, logits: Any, bias: Any, targets: Any, losses: Any, sums: Any, peaks: Any) -> None:
    """The same for logits (n, V) uint16, the bits of bfloat16: the upper half of those of fp32."""
    wide = np.empty(logits.shape[1], np.float32)
    for group in range(begin, end):
        sums[group] = 0
        if len(peaks):
            peaks[group] = 0

        for row in range(group * GROUP, min(len(logits), (group + 1) * GROUP)):
            _widen(logits[row], wide)
            losses[row] = _softmax(wide, bias, targets[row])
            _gather(wide, sums[group], peaks[group : group + 1])
            _narrow(wide, logits[row])


@_helper
def _softmax(values, bias, target):  # type: ignore[no-untyped-def]
    """The loss of one row; values (V,) float32: products before, slopes after."""
    if target < 0:
        values[:] = 0
        return np.float32(0)

    top = _add_and_find_top(values, bias)
    aim = values[target]
    total = _exponentials(values, top)
    _divide(values, total)

    # from the difference, as p - 1 would lose the digits of a p near 1
    loss = np.float32(np.log(total)) - (aim - top)
    values[target] = np.float32(np.expm1(-loss))
    return loss


@_helper
def _add_and_find_top(values, bias):  # type: ignore[no-untyped-def]
    """Add bias (V,) to values (V,) float32; their maximum, NaN if one is a NaN with a positive sign.

    Compared as whole numbers of the same order, which is vectorised: with NaN a maximum of floats is not.
    """
    most = np.int32(-(2**31))
    for column in range(len(values)):
        values[column] += bias[column]
        bits = np.float32(values[column]).view(np.int32)
        most = max(most, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@_reordering
def _exponentials(values, top):  # type: ignore[no-untyped-def]
    """Replace values (V,) float32 by exp(value - top); their sum, NaN if any is."""
    total = np.float32(0)
    for column in range(len(values)):
        each = _exp(values[column] - top)
        values[column] = each
        total += each
    return total


@_helper
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x for float32 x <= 0, within 2 units in the last place; 0 below MOST_NEGATIVE; NaN for NaN.

    Cody & Waite's reduction x = k ln 2 + r in two parts, and the polynomial of Cephes' expf (Moshier 1992).
    """
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)  # 1.5 * 2^23: k is now in the lowest bits
    k = shifted - np.float32(12582912.0)
    r = (x - k * np.float32(0.693359375)) - k * np.float32(-2.12194440e-4)

    power = np.float32(1.9875691500e-4)
    power = power * r + np.float32(1.3981999507e-3)
    power = power * r + np.float32(8.3334519073e-3)
    power = power * r + np.float32(4.1665795894e-2)
    power = power * r + np.float32(1.6666665459e-1)
    power = power * r + np.float32(5.0000001201e-1)
    power = power * (r * r) + r + np.float32(1)

    exponent = np.int32((np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000))
    return np.float32(0) if x < MOST_NEGATIVE else np.float32(power * np.int32(exponent).view(np.float32))


@_helper
def _divide(values, total):  # type: ignore[no-untyped-def]
    """Divide values (V,) float32 by their sum."""
    inverse = np.float32(1) / total
    for column in range(len(values)):
        values[column] *= inverse


@_helper
def _gather(slopes, sums, peaks):  # type: ignore[no-untyped-def]
    """Add slopes (V,) to sums (V,), and raise peaks (1, V), or (0, V), to their absolute values; all float32."""
    for column in range(len(slopes)):
        sums[column] += slopes[column]

    for row in range(len(peaks)):
        for column in range(len(slopes)):
            size = abs(slopes[column])
            peaks[row, column] = peaks[row, column] if size <= peaks[row, column] else size  # NaN stays


@_helper
def _widen(bits, values):  # type: ignore[no-untyped-def]
    """bits (V,) uint16 of bfloat16 as values (V,) float32."""
    for column in range(len(bits)):
        values[column] = np.uint32(np.uint32(bits[column]) << np.uint32(16)).view(np.float32)


@_helper
def _narrow(values, bits):  # type: ignore[no-untyped-def]
    """values (V,) float32 as bits (V,) uint16 of bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    for column in range(len(bits)):
        whole = np.float32(values[column]).view(np.uint32)
        rounded = (whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (whole & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits[column] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
