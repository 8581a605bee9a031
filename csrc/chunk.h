// The layout of the tables that ops work on: addresses, lengths and numbers, the same in C++, CUDA,
// Triton and Python. mechanic_fused/backends/layout.py and triton_kernels/layout.py name the same
// columns; tests/backends/test_layout.py compares the three.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MECHANIC_INLINE __host__ __device__ __forceinline__
#else
#define MECHANIC_INLINE inline __attribute__((always_inline))
#endif

namespace mechanic {

// A row of the tensor table. An address of 0: the weight has no such array.
struct Tensor {
  int64_t gradient, weight, x_low, x_ref, delta, state0, state1, step;
  int64_t scales0, scales1, delta_scales;  // of blocks of codes
  int64_t scale;                           // the weight's row of the sums and of the tuner's state
  int64_t group;                           // its row of the hyperparameters
  int64_t number;                          // its number in the optimizer
  int64_t phase;    // where its first element is among kReferencePeriod; -1: all have an x_ref
  int64_t element;  // the index of its first element in the whole weight, whose shard it may be
};

// Of a weight with a phase the first kReferenceBlock of every kReferencePeriod elements have an
// x_ref, see mechanic_fused/kept_blocks.py.
constexpr int kReferenceBlock = 128, kReferencePeriod = 1024;

// A row of the chunk table: the elements [offset, offset + length) of one tensor.
struct Chunk {
  int64_t tensor, offset, length;
};

// Where the x_ref of a chunk's elements are.
struct KeptBlocks {
  int64_t first;  // the place of the period that the chunk begins in, in the weight's x_ref
  int phase;      // the chunk's own
  int dropped;    // elements without an x_ref in each period: 0 where all have one

  // Return what an element's g.(x - x_ref) counts.
  MECHANIC_INLINE double share() const {
    return dropped == 0 ? 1 : kReferencePeriod / kReferenceBlock;
  }

  // Whether element i of the chunk has an x_ref.
  MECHANIC_INLINE bool has(int i) const {
    return (phase + i) % kReferencePeriod < kReferencePeriod - dropped;
  }

  // The place of its x_ref behind `first`.
  MECHANIC_INLINE int place(int i) const {
    return phase + i - (phase + i) / kReferencePeriod * dropped;
  }
};

// Return those of a chunk at this offset in a weight.
MECHANIC_INLINE KeptBlocks kept_blocks(const Tensor& tensor, int64_t offset) {
  if (tensor.phase < 0) return {offset, 0, 0};
  const int64_t element = tensor.phase + offset;
  const int64_t before = tensor.phase < kReferenceBlock ? tensor.phase : kReferenceBlock;
  return {element / kReferencePeriod * kReferenceBlock - before, int(element % kReferencePeriod),
          kReferencePeriod - kReferenceBlock};
}

// A row of the span table: the chunks and the tensors of one scale, which are adjacent.
struct Span {
  int64_t first_chunk, chunks, first_tensor, tensors;
};

// A row of the hyperparameters. SGD's momentum and dampening are stored as beta1 and beta2; l2 is
// added to the gradient, decay is decoupled; gradient multiplies every gradient; peak_lr is the
// largest lr of the schedule.
struct Hyper {
  double lr, beta1, beta2, eps, l2, decay, nesterov, gradient, peak_lr;
};

// A row of the sums over one scale, or of the partial sums of one chunk: g.Δ (of the running form
// g.(x - x_ref)), x.Δ, g.g, x.x, and of the running form u.u at the
// peak lr and the number of elements that have a gradient.
struct Sums {
  double gd, xd, gg, xx, uu, count;
};

// The blocks of a row of the tuner's state, a number a tuner beta in each; the counters follow.
enum TunerBlock { kS, kR, kV, kM, kTunerBlocks };
enum Counter { kSteps, kNonfinite, kCounters };

// Return the number of columns of the tuner's state.
MECHANIC_INLINE int64_t tuner_width(int64_t betas) { return kTunerBlocks * betas + kCounters; }

// The tuner's constants; the tuner betas follow.
enum Constant {
  kDecay,
  kSInit,
  kEps,
  kEpsInM,
  kClampsH,
  kFloorsR,
  kTunesScale,
  kAnnealingFactor,
  kBetas
};

// The largest S that a run starts with: where updates are tiny, it must not overflow in float.
constexpr double kMostScale = 1e30;

// A row of the log tuner's state, see LOG_TUNER in backends/layout.py.
struct LogRow {
  double scale, mean_square, moves, steps, nonfinite, informed, learns;
  double weight, ln_update, ln_ratio, start_ratio, start, anchors, ln_anchor, factor, peak_rate;
};

// Its constants.
struct LogConstants {
  double tunes_scale, factor, norm_share, anchor_share, loss_range, least_rms, average, held;
  double gain, max_move, bias, outlier, memory, ceiling, norm_ceiling, regrowth;
};

// The losses observed since the last step.
struct Losses {
  double sum, count;
};

// The log tuner of a bucket's scales.
struct LogTuner {
  LogRow* rows;
  const LogConstants* constants;
  Losses* losses;
  int64_t scales;
};

// A base's update; for_kind in formulas.h calls a function with its formula.
enum class Kind : int64_t { kSgd, kMomentum, kAdam, kLion };

// How numbers are stored; for_dtype in storage.h calls a function with a number of that dtype.
// Only a state and delta have codes, see quantize.h.
enum class DType : int64_t { kFloat, kDouble, kBFloat16, kHalf, kCode };

// Where the tables of a bucket are.
struct Tables {
  const Tensor* tensors;
  const Chunk* chunks;
  const Hyper* hyper;
  Sums* partials;  // one a chunk
  Sums* sums;      // one a scale
};

struct Counts {
  int64_t tensors, chunks, scales, elements;
  int64_t in_part;      // tensors with a phase
  int64_t state_block;  // elements that share a scale of an 8-bit state; 0 without one
};

struct DTypes {
  DType weight;  // of x, g and x_ref; arithmetic is in opmath_t of it
  DType state;   // of the base's own state: the weight's, the arithmetic's, bfloat16 or codes
  DType delta;   // the arithmetic's, or bfloat16
};

// The tensors of one device, dtype and update that one call of an op works on.
struct Bucket {
  Tables tables;
  Counts counts;
  Kind kind;
  DTypes dtypes;
};

// Matrices n or O beside the tensors of a bucket, all of one size: a tensor's begins at its number
// times that size, and lies in memory as the weight does. In T or in bfloat16.
struct Directions {
  void* first;
  int64_t size;
  DType dtype;
};

// The tuner's state, a row a scale, and its constants.
struct Tuner {
  double* state;
  const double* constants;
  int64_t scales, betas;
};

}  // namespace mechanic
