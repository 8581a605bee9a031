"""The columns of the tables in kernels: ``mechanic_fused.backends.layout`` as constexprs.

Kernels must import these names one by one: Triton compiles a kernel anew when a constexpr that its
module names has changed, but does not notice a changed attribute of another module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton.language as tl

from mechanic_fused.backends import layout


def columns(names: Sequence[str]) -> Iterator[tl.constexpr]:
    """Return the number of each column."""
    return (tl.constexpr(i) for i in range(len(names)))


(
    TENSOR_GRADIENT,
    TENSOR_WEIGHT,
    TENSOR_X_LOW,
    TENSOR_X_REF,
    TENSOR_DELTA,
    TENSOR_STATE0,
    TENSOR_STATE1,
    TENSOR_STEP,
    TENSOR_SCALES0,
    TENSOR_SCALES1,
    TENSOR_DELTA_SCALES,
    TENSOR_SCALE,
    TENSOR_GROUP,
    TENSOR_NUMBER,
    TENSOR_PHASE,
    TENSOR_ELEMENT,
) = columns(layout.TENSOR)
TENSOR_COLUMNS = tl.constexpr(len(layout.TENSOR))

REFERENCE_BLOCK = tl.constexpr(layout.REFERENCE_BLOCK)
REFERENCE_EVERY = tl.constexpr(layout.REFERENCE_EVERY)
REFERENCE_PERIOD = tl.constexpr(layout.REFERENCE_PERIOD)
MOST_SCALE = tl.constexpr(layout.MOST_SCALE)

CHUNK_TENSOR, CHUNK_OFFSET, CHUNK_LENGTH = columns(layout.CHUNK)
CHUNK_COLUMNS = tl.constexpr(len(layout.CHUNK))

SPAN_FIRST_CHUNK, SPAN_CHUNKS, SPAN_FIRST_TENSOR, SPAN_TENSORS = columns(layout.SPAN)
SPAN_COLUMNS = tl.constexpr(len(layout.SPAN))

(
    HYPER_LR,
    HYPER_BETA1,
    HYPER_BETA2,
    HYPER_EPS,
    HYPER_L2,
    HYPER_DECAY,
    HYPER_NESTEROV,
    HYPER_GRADIENT,
    HYPER_PEAK_LR,
) = columns(layout.HYPER)
HYPER_COLUMNS = tl.constexpr(len(layout.HYPER))

SUMS_GD, SUMS_XD, SUMS_GG, SUMS_XX, SUMS_UU, SUMS_COUNT = columns(layout.SUMS)
SUMS_COLUMNS = tl.constexpr(len(layout.SUMS))

# Blocks of a row of the tuner's state, a number a tuner beta in each, then the counters.
TUNER_S, TUNER_R, TUNER_V, TUNER_M = columns(layout.TUNER)
TUNER_BLOCKS = tl.constexpr(len(layout.TUNER))
COUNTERS_STEPS, COUNTERS_NONFINITE = columns(layout.COUNTERS)
COUNTERS_COLUMNS = tl.constexpr(len(layout.COUNTERS))

(
    CONSTANTS_DECAY,
    CONSTANTS_S_INIT,
    CONSTANTS_EPS,
    CONSTANTS_EPS_IN_M,
    CONSTANTS_CLAMPS_H,
    CONSTANTS_FLOORS_R,
    CONSTANTS_TUNES_SCALE,
    CONSTANTS_ANNEALING_FACTOR,
) = columns(layout.CONSTANTS)
# The tuner betas follow the other constants.
CONSTANTS_BETAS = tl.constexpr(len(layout.CONSTANTS))

(
    LOG_SCALE,
    LOG_MEAN_SQUARE,
    LOG_MOVES,
    LOG_STEPS,
    LOG_NONFINITE,
    LOG_INFORMED,
    LOG_LEARNS,
    LOG_WEIGHT,
    LOG_LN_UPDATE,
    LOG_LN_RATIO,
    LOG_START_RATIO,
    LOG_START,
    LOG_ANCHORS,
    LOG_LN_ANCHOR,
    LOG_FACTOR,
    LOG_PEAK_RATE,
) = columns(layout.LOG_TUNER)
LOG_COLUMNS = tl.constexpr(len(layout.LOG_TUNER))

(
    LOG_CONSTANTS_TUNES_SCALE,
    LOG_CONSTANTS_FACTOR,
    LOG_CONSTANTS_NORM_SHARE,
    LOG_CONSTANTS_ANCHOR_SHARE,
    LOG_CONSTANTS_LOSS_RANGE,
    LOG_CONSTANTS_LEAST_RMS,
    LOG_CONSTANTS_AVERAGE,
    LOG_CONSTANTS_HELD,
    LOG_CONSTANTS_GAIN,
    LOG_CONSTANTS_MAX_MOVE,
    LOG_CONSTANTS_BIAS,
    LOG_CONSTANTS_OUTLIER,
    LOG_CONSTANTS_MEMORY,
    LOG_CONSTANTS_CEILING,
    LOG_CONSTANTS_NORM_CEILING,
    LOG_CONSTANTS_REGROWTH,
) = columns(layout.LOG_CONSTANTS)

LOSSES_SUM, LOSSES_COUNT = columns(layout.LOSSES)

# Of the vector ops, see csrc/vectors.h: addresses a weight, and partial results a chunk.
STREAM_COLUMNS = tl.constexpr(4)
PARTIAL_COLUMNS = tl.constexpr(4)
