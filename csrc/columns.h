// The names of the columns in chunk.h and of its enumerations, for the test that compares them with
// those in Python. The compiler checks that they are complete and in order.
#pragma once

#include <cstddef>

#include "chunk.h"

namespace mechanic {

struct Column {
  const char* name;
  size_t index;
};

// Every column has 8 bytes.
#define MECHANIC_COLUMN(Row, name) {#name, offsetof(Row, name) / sizeof(int64_t)}

template <size_t kCount>
constexpr bool in_order(const Column (&columns)[kCount], size_t count) {
  for (size_t i = 0; i < kCount; ++i) {
    if (columns[i].index != i) return false;
  }
  return kCount == count;
}

template <class Row, size_t kCount>
constexpr bool covers(const Column (&columns)[kCount]) {
  return in_order(columns, sizeof(Row) / sizeof(int64_t)) && sizeof(Row) % sizeof(int64_t) == 0;
}

constexpr Column kTensorColumns[] = {
    MECHANIC_COLUMN(Tensor, gradient),     MECHANIC_COLUMN(Tensor, weight),
    MECHANIC_COLUMN(Tensor, x_low),        MECHANIC_COLUMN(Tensor, x_ref),
    MECHANIC_COLUMN(Tensor, delta),        MECHANIC_COLUMN(Tensor, state0),
    MECHANIC_COLUMN(Tensor, state1),       MECHANIC_COLUMN(Tensor, step),
    MECHANIC_COLUMN(Tensor, scales0),      MECHANIC_COLUMN(Tensor, scales1),
    MECHANIC_COLUMN(Tensor, delta_scales), MECHANIC_COLUMN(Tensor, scale),
    MECHANIC_COLUMN(Tensor, group),        MECHANIC_COLUMN(Tensor, number),
    MECHANIC_COLUMN(Tensor, phase),        MECHANIC_COLUMN(Tensor, element)};
static_assert(covers<Tensor>(kTensorColumns), "the names must be those of Tensor, in order");

constexpr Column kChunkColumns[] = {MECHANIC_COLUMN(Chunk, tensor), MECHANIC_COLUMN(Chunk, offset),
                                    MECHANIC_COLUMN(Chunk, length)};
static_assert(covers<Chunk>(kChunkColumns), "the names must be those of Chunk, in order");

constexpr Column kSpanColumns[] = {
    MECHANIC_COLUMN(Span, first_chunk), MECHANIC_COLUMN(Span, chunks),
    MECHANIC_COLUMN(Span, first_tensor), MECHANIC_COLUMN(Span, tensors)};
static_assert(covers<Span>(kSpanColumns), "the names must be those of Span, in order");

constexpr Column kHyperColumns[] = {
    MECHANIC_COLUMN(Hyper, lr),       MECHANIC_COLUMN(Hyper, beta1),
    MECHANIC_COLUMN(Hyper, beta2),    MECHANIC_COLUMN(Hyper, eps),
    MECHANIC_COLUMN(Hyper, l2),       MECHANIC_COLUMN(Hyper, decay),
    MECHANIC_COLUMN(Hyper, nesterov), MECHANIC_COLUMN(Hyper, gradient),
    MECHANIC_COLUMN(Hyper, peak_lr)};
static_assert(covers<Hyper>(kHyperColumns), "the names must be those of Hyper, in order");

constexpr Column kSumsColumns[] = {MECHANIC_COLUMN(Sums, gd), MECHANIC_COLUMN(Sums, xd),
                                   MECHANIC_COLUMN(Sums, gg), MECHANIC_COLUMN(Sums, xx),
                                   MECHANIC_COLUMN(Sums, uu), MECHANIC_COLUMN(Sums, count)};
static_assert(covers<Sums>(kSumsColumns), "the names must be those of Sums, in order");

constexpr Column kLogTunerColumns[] = {
    MECHANIC_COLUMN(LogRow, scale),       MECHANIC_COLUMN(LogRow, mean_square),
    MECHANIC_COLUMN(LogRow, moves),       MECHANIC_COLUMN(LogRow, steps),
    MECHANIC_COLUMN(LogRow, nonfinite),   MECHANIC_COLUMN(LogRow, informed),
    MECHANIC_COLUMN(LogRow, learns),      MECHANIC_COLUMN(LogRow, weight),
    MECHANIC_COLUMN(LogRow, ln_update),   MECHANIC_COLUMN(LogRow, ln_ratio),
    MECHANIC_COLUMN(LogRow, start_ratio), MECHANIC_COLUMN(LogRow, start),
    MECHANIC_COLUMN(LogRow, anchors),     MECHANIC_COLUMN(LogRow, ln_anchor),
    MECHANIC_COLUMN(LogRow, factor),      MECHANIC_COLUMN(LogRow, peak_rate)};
static_assert(covers<LogRow>(kLogTunerColumns), "the names must be those of LogRow, in order");

constexpr Column kLogConstantColumns[] = {
    MECHANIC_COLUMN(LogConstants, tunes_scale),  MECHANIC_COLUMN(LogConstants, factor),
    MECHANIC_COLUMN(LogConstants, norm_share),   MECHANIC_COLUMN(LogConstants, anchor_share),
    MECHANIC_COLUMN(LogConstants, loss_range),   MECHANIC_COLUMN(LogConstants, least_rms),
    MECHANIC_COLUMN(LogConstants, average),      MECHANIC_COLUMN(LogConstants, held),
    MECHANIC_COLUMN(LogConstants, gain),         MECHANIC_COLUMN(LogConstants, max_move),
    MECHANIC_COLUMN(LogConstants, bias),         MECHANIC_COLUMN(LogConstants, outlier),
    MECHANIC_COLUMN(LogConstants, memory),       MECHANIC_COLUMN(LogConstants, ceiling),
    MECHANIC_COLUMN(LogConstants, norm_ceiling), MECHANIC_COLUMN(LogConstants, regrowth)};
static_assert(covers<LogConstants>(kLogConstantColumns),
              "the names must be those of LogConstants, in order");

constexpr Column kLossesColumns[] = {MECHANIC_COLUMN(Losses, sum), MECHANIC_COLUMN(Losses, count)};
static_assert(covers<Losses>(kLossesColumns), "the names must be those of Losses, in order");

#undef MECHANIC_COLUMN

constexpr Column kTunerColumns[] = {{"s", kS}, {"r", kR}, {"v", kV}, {"m", kM}};
static_assert(in_order(kTunerColumns, kTunerBlocks), "the names must be those of TunerBlock");

constexpr Column kCounterColumns[] = {{"steps", kSteps}, {"nonfinite", kNonfinite}};
static_assert(in_order(kCounterColumns, kCounters), "the names must be those of Counter");

constexpr Column kConstantColumns[] = {{"decay", kDecay},
                                       {"s_init", kSInit},
                                       {"eps", kEps},
                                       {"eps_in_m", kEpsInM},
                                       {"clamps_h", kClampsH},
                                       {"floors_r", kFloorsR},
                                       {"tunes_scale", kTunesScale},
                                       {"annealing_factor", kAnnealingFactor}};
static_assert(in_order(kConstantColumns, kBetas), "the names must be those of Constant");

constexpr Column kKinds[] = {{"sgd", size_t(Kind::kSgd)},
                             {"momentum", size_t(Kind::kMomentum)},
                             {"adam", size_t(Kind::kAdam)},
                             {"lion", size_t(Kind::kLion)}};
static_assert(in_order(kKinds, 4), "the names must be those of Kind, in order");

constexpr Column kDTypes[] = {{"float32", size_t(DType::kFloat)},
                              {"float64", size_t(DType::kDouble)},
                              {"bfloat16", size_t(DType::kBFloat16)},
                              {"float16", size_t(DType::kHalf)},
                              {"int8", size_t(DType::kCode)}};
static_assert(in_order(kDTypes, 5), "the names must be those of DType, in order");

}  // namespace mechanic
