// step: g.(x - x_ref), g.g, x.x and u.u with the x before it, then the base's state moves and
// x += S.u. One block a chunk, as in accumulate.cuh.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "advance_steps.cuh"
#include "packets.cuh"
#include "reduce.cuh"
#include "states.cuh"

namespace mechanic::cuda {

// The weights of a chunk: in T, or in 16 bits with low bits beside them. A BFloat16 whose state is
// narrow may have none: then it is rounded stochastically, a branch that all threads take alike.
template <class X, class S>
struct Weights {
  static constexpr bool kHasLow = !std::is_same_v<X, opmath_t<X>>;
  static constexpr bool kMayRound = std::is_same_v<X, BFloat16> && !std::is_same_v<S, float>;

  X* x;
  int16_t* low;

  template <int N, bool kPackets>
  __device__ __forceinline__ void load(int i, const ChunkRounding& rounding,
                                       opmath_t<X> (&to)[N]) const {
    if constexpr (kHasLow) {
      X high[N];
      load_each<Reuse::kNever, N, kPackets>(x + i, [&](int l, X y) { high[l] = y; });
      if (kMayRound && rounding.of_weights) {
#pragma unroll
        for (int l = 0; l < N; ++l) to[l] = widen(high[l]);
        return;
      }
      int16_t bits[N];
      load_each<Reuse::kNever, N, kPackets>(low + i, [&](int l, int16_t y) { bits[l] = y; });
#pragma unroll
      for (int l = 0; l < N; ++l) to[l] = join(high[l], bits[l]);
    } else {
      cuda::load<Reuse::kNever, N, kPackets>(x + i, to);
    }
  }

  // The forward pass reads x next, from the other end on.
  template <int N, bool kPackets>
  __device__ __forceinline__ void store(int i, const ChunkRounding& rounding,
                                        const opmath_t<X> (&from)[N]) const {
    if constexpr (kMayRound) {
      if (rounding.of_weights) {
        return store_each<Reuse::kSoon, N, kPackets>(x + i, [&](int l) {
          const uint32_t bits = rounding_bits(rounding, uint32_t(i + l), kWeightStride);
          return stochastic_round(bits >> 16, from[l]);
        });
      }
    }
    if constexpr (kHasLow) {
      X high[N];
      int16_t bits[N];
#pragma unroll
      for (int l = 0; l < N; ++l) split(from[l], high[l], bits[l]);
      store_each<Reuse::kSoon, N, kPackets>(x + i, [&](int l) { return high[l]; });
      store_each<Reuse::kNever, N, kPackets>(low + i, [&](int l) { return bits[l]; });
    } else {
      cuda::store<Reuse::kSoon, N, kPackets>(from, x + i);
    }
  }
};

// The arrays of one chunk.
template <class X, class S>
struct StepStreams {
  const X* gradient;
  Weights<X, S> weights;
  const X* x_ref;  // from kept.first on
  States<opmath_t<X>, S> states;
  const ChunkRounding* rounding;  // in shared memory
  KeptBlocks kept;
};

// The sums of a thread, in this order: g.(x - x_ref), g.g, x.x, u.u.
using StepSums = Totals<4>;

// N elements from i on in each thread: all loads, then all arithmetic. First the sums that x_ref
// takes part in, so that its registers are free when the updates need theirs.
template <int N, bool kPackets, bool kInPart, class Base, class X, class S>
__device__ __forceinline__ void step_block(const StepStreams<X, S>& at, int i,
                                           const Coefficients<opmath_t<X>>& c, opmath_t<X> scale,
                                           StepSums& sum) {
  using T = opmath_t<X>;
  T g[N], x[N], x_ref[N], a[N] = {}, b[N] = {};
  load<Reuse::kNever, N, kPackets>(at.gradient + i, g);
  // Of a phase that is a multiple of 128, blocks of float32 numbers are those of whole warps.
  const bool has_x_ref = !kInPart || at.kept.has(i);
  if (has_x_ref) {
    load<Reuse::kNever, N, kPackets>(at.x_ref + (kInPart ? at.kept.place(i) : i), x_ref);
  }
  const ChunkRounding& rounding = *at.rounding;
  at.states.template load<Base, N, kPackets>(i, a, b);
  at.weights.template load<N, kPackets>(i, rounding, x);
#pragma unroll
  for (int l = 0; l < N; ++l) {
    g[l] = g[l] * c.gradient;
    // Products of floats are exact in double, so the fused form rounds no differently.
    if (has_x_ref) sum.of[0] = fma(double(g[l]), double(x[l] - x_ref[l]), sum.of[0]);
    sum.of[1] = fma(double(g[l]), double(g[l]), sum.of[1]);
    sum.of[2] = fma(double(x[l]), double(x[l]), sum.of[2]);
  }
#pragma unroll
  for (int l = 0; l < N; ++l) {
    const T u = Base::template update<true>(finite_or_zero(g[l]), x[l], a[l], b[l], c);
    sum.of[3] = fma(double(u), double(u), sum.of[3]);
    x[l] = apply_update(x[l], scale, u);
  }
  at.weights.template store<N, kPackets>(i, rounding, x);
  at.states.template store<Base, N, kPackets>(i, rounding, a, b);
}

// The elements [begin, end) of the chunk.
template <int N, bool kPackets, bool kInPart, class Base, class X, class S>
__device__ __forceinline__ StepSums step_range(const StepStreams<X, S>& at, int begin, int end,
                                               const Coefficients<opmath_t<X>>& c,
                                               opmath_t<X> scale, StepSums sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    step_block<N, kPackets, kInPart, Base>(at, i, c, scale, sum);
  }
  return sum;
}

// The arrays of a chunk; rounding is in shared memory.
template <bool kInPart, class Base, class X, class S>
__device__ __forceinline__ StepStreams<X, S> streams_of(const Bucket& bucket, const Tensor& tensor,
                                                        const Chunk& chunk,
                                                        const ChunkRounding* rounding) {
  StepStreams<X, S> at = {};
  at.gradient = address<const X>(tensor.gradient, chunk.offset);
  at.weights.x = address<X>(tensor.weight, chunk.offset);
  // Without low bits it is never read: a select of another address cost Lion's step 8 bytes of
  // spills.
  if constexpr (Weights<X, S>::kHasLow) {
    at.weights.low = address<int16_t>(tensor.x_low, chunk.offset);
  }
  if constexpr (kInPart) at.kept = kept_blocks(tensor, chunk.offset);
  at.x_ref = address<const X>(tensor.x_ref, kInPart ? at.kept.first : chunk.offset);
  at.states = states_of<Base, opmath_t<X>, S>(bucket, tensor, chunk);
  at.rounding = rounding;
  return at;
}

template <bool kInPart, class Base, class X, class S>
__device__ __forceinline__ StepSums step_chunk(const Bucket& bucket, const Tensor& tensor,
                                               const Chunk& chunk, double scale,
                                               const StepScalars& scalars) {
  using T = opmath_t<X>;
  // The bias corrections take two powers in double: once a chunk, not once a thread.
  __shared__ Coefficients<T> shared;
  __shared__ ChunkRounding shared_rounding;
  if (threadIdx.x == 0) {
    Hyper hyper = bucket.tables.hyper[tensor.group];
    hyper.gradient = gradient_multiplier(hyper, scalars.grad_scale, scalars.clip);
    const double step = tensor.step != 0 ? double(*address<const float>(tensor.step, 0)) : 0;
    shared_rounding = chunk_rounding(tensor, chunk, scalars.step_count);
    shared = Base::template coefficients<T>(hyper, step);
  }
  const auto at = streams_of<kInPart, Base, X, S>(bucket, tensor, chunk, &shared_rounding);
  const int n = int(chunk.length);
  int in_packets = packet_elements<X>(n, at.gradient, at.weights.x, at.weights.low, at.x_ref,
                                      at.states.first.at, at.states.second.at);
  // Packets must not reach across the ends of kept blocks.
  if (kInPart && at.kept.phase % kLanes<X> != 0) in_packets = 0;
  __syncthreads();
  // Read where they are needed: copies would take the registers of a block.
  const Coefficients<T>& c = shared;
  StepSums sum = {};
  sum = step_range<kLanes<X>, true, kInPart, Base>(at, 0, in_packets, c, T(scale), sum);
  sum = step_range<kSingles<X, S>, false, kInPart, Base>(at, in_packets, n, c, T(scale), sum);
  if constexpr (kInPart) sum.of[0] = at.kept.share() * sum.of[0];
  return sum;
}

// Blocks of a multiprocessor: as many as its registers hold without spills. To find an x_ref that
// is kept in part takes a few, which cost one block, or two beside 16-bit weights: so the others
// have a kernel of their own.
template <bool kInPart, class Base, class X, class S>
constexpr int kStepBlocks =
    sizeof(X) == 2 && (kInPart || std::is_same_v<S, Code>)
        ? 2
        : (Base::kStates > 1 ? 3 : 4) + std::is_same_v<X, float> - kInPart - kRounds<Base, S>;

// kInPart: some weights of the bucket keep x_ref in part.
template <bool kInPart, class Base, class X, class S>
__global__ void __launch_bounds__(kThreads, kStepBlocks<kInPart, Base, X, S>)
    step_kernel(Bucket bucket, Reduction reduction, LogTuner tuner, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::gd, &Sums::gg, &Sums::xx, &Sums::uu, &Sums::count>;
  for_empty_scales(bucket, reduction, [&](int64_t scale) {
    Columns::write(bucket.tables.sums + scale, {});
    advance_steps(bucket, reduction.spans[scale], 0, 1);
  });
  if (blockIdx.x >= bucket.counts.chunks) return;
  const Chunk chunk = bucket.tables.chunks[blockIdx.x];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  typename Columns::Total total = {};
  if (tensor.gradient != 0) {
    const double scale = tuner.rows[tensor.scale].scale;
    const StepSums sum =
        block_total(step_chunk<kInPart, Base, X, S>(bucket, tensor, chunk, scale, scalars));
    const double to_peak = peak_ratio(bucket.tables.hyper[tensor.group]);
    total = {sum.of[0], sum.of[1], sum.of[2], sum.of[3] * (to_peak * to_peak),
             double(chunk.length)};
  }
  if (Columns::reduce_chunk(bucket, reduction, blockIdx.x, tensor.scale, total)) {
    advance_steps(bucket, reduction.spans[tensor.scale], threadIdx.x, kThreads);
  }
}

template <class X, class S>
void launch_step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
                 const StepScalars& scalars, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("step", kernel, bucket.counts.chunks, stream, bucket, reduction, tuner, scalars);
  };
  for_kind(bucket.kind, [&](auto base) {
    using Base = decltype(base);
    if constexpr (Base::kStates > 0 || std::is_same_v<S, opmath_t<X>>) {
      if (bucket.counts.in_part != 0) {
        run(step_kernel<true, Base, X, S>);
      } else {
        run(step_kernel<false, Base, X, S>);
      }
    }
  });
}

}  // namespace mechanic::cuda
