// accumulate: g.Δ and g.g with the old Δ, then the base's state and Δ move. One block a chunk: the
// hardware assigns the next chunk to whichever multiprocessor is free, so chunks of unequal length
// need no plan, and while one block starts or reduces, its neighbours keep the memory busy.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "advance_steps.cuh"
#include "packets.cuh"
#include "reduce.cuh"
#include "states.cuh"

namespace mechanic::cuda {

// The arrays of one chunk.
template <class X, class S>
struct AccumulateStreams {
  const X* gradient;
  const X* weight;
  Delta<opmath_t<X>, S> delta;
  States<opmath_t<X>, S> states;
  const ChunkRounding* rounding;  // in shared memory
  bool reads_x;  // only with weight decay: the bytes saved are worth a uniform branch
};

// N elements from i on in each thread: all loads, then all arithmetic.
template <int N, bool kPackets, class Base, class X, class S>
__device__ __forceinline__ void accumulate_block(const AccumulateStreams<X, S>& at, int i,
                                                 const Coefficients<opmath_t<X>>& c,
                                                 Totals<2>& sum) {
  using T = opmath_t<X>;
  T g[N], delta[N], a[N] = {}, b[N] = {}, x[N] = {};
  load<Reuse::kNever, N, kPackets>(at.gradient + i, g);
  const ChunkRounding& rounding = *at.rounding;
  at.states.template load<Base, N, kPackets>(i, a, b);
  if (at.reads_x) load<Reuse::kNever, N, kPackets>(at.weight + i, x);
  // The last load, since widening a bfloat16 Δ waits for it.
  at.delta.template load<Reuse::kSoon, N, kPackets>(i, delta);
#pragma unroll
  for (int l = 0; l < N; ++l) {
    const T gradient = g[l] * c.gradient;
    // Products of floats are exact in double, so the fused form rounds no differently.
    sum.of[0] = fma(double(gradient), double(delta[l]), sum.of[0]);
    sum.of[1] = fma(double(gradient), double(gradient), sum.of[1]);
    delta[l] =
        delta[l] + Base::template update<false>(finite_or_zero(gradient), x[l], a[l], b[l], c);
  }
  at.delta.template store<Reuse::kSoon, N, kPackets>(i, rounding, delta);
  at.states.template store<Base, N, kPackets>(i, rounding, a, b);
}

// The elements [begin, end) of the chunk. Not a loop shared with the other kernels: around a lambda
// the compiler keeps more of the coefficients in shared memory and registers.
template <int N, bool kPackets, class Base, class X, class S>
__device__ __forceinline__ Totals<2> accumulate_range(const AccumulateStreams<X, S>& at, int begin,
                                                      int end, const Coefficients<opmath_t<X>>& c,
                                                      Totals<2> sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    accumulate_block<N, kPackets, Base>(at, i, c, sum);
  }
  return sum;
}

template <class Base, class X, class S>
__device__ __forceinline__ Totals<2> accumulate_chunk(const Bucket& bucket, const Tensor& tensor,
                                                      const Chunk& chunk,
                                                      const StepScalars& scalars) {
  using T = opmath_t<X>;
  // The bias corrections take two powers in double: once a chunk, not once a thread.
  __shared__ Coefficients<T> shared;
  __shared__ ChunkRounding shared_rounding;
  const Hyper& hyper = bucket.tables.hyper[tensor.group];
  if (threadIdx.x == 0) {
    Hyper scaled = hyper;
    scaled.gradient = gradient_multiplier(hyper, scalars.grad_scale, scalars.clip);
    const double step = tensor.step != 0 ? double(*address<const float>(tensor.step, 0)) : 0;
    shared_rounding = chunk_rounding(tensor, chunk, scalars.step_count);
    shared = Base::template coefficients<T>(scaled, step);
  }
  AccumulateStreams<X, S> at = {};
  at.gradient = address<const X>(tensor.gradient, chunk.offset);
  at.weight = address<const X>(tensor.weight, chunk.offset);
  at.delta = delta_of<T, S>(bucket, tensor, chunk, scalars.step_count);
  at.states = states_of<Base, T, S>(bucket, tensor, chunk);
  at.rounding = &shared_rounding;
  const int n = int(chunk.length);
  const int in_packets = packet_elements<X>(n, at.gradient, at.weight, at.delta.begin(),
                                            at.states.first.at, at.states.second.at);
  __syncthreads();
  const Coefficients<T> c = shared;
  at.reads_x = c.reads_x();
  Totals<2> sum = {};
  sum = accumulate_range<kLanes<X>, true, Base>(at, 0, in_packets, c, sum);
  return accumulate_range<kSingles<X, S>, false, Base>(at, in_packets, n, c, sum);
}

// Blocks of a multiprocessor: as many as its registers hold without spills.
template <class Base, class X, class S>
constexpr int kBlocks = (Base::kStates > 1 ? 3 : 4) + std::is_same_v<X, float> - kRounds<Base, S>;

template <class Base, class X, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<Base, X, S>)
    accumulate_kernel(Bucket bucket, Reduction reduction, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::gd, &Sums::gg>;
  for_empty_scales(bucket, reduction, [&](int64_t scale) {
    Columns::write(bucket.tables.sums + scale, {});
    advance_steps(bucket, reduction.spans[scale], 0, 1);
  });
  if (blockIdx.x >= bucket.counts.chunks) return;
  const Chunk chunk = bucket.tables.chunks[blockIdx.x];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  Totals<2> sum = {};
  if (tensor.gradient != 0) {
    sum = accumulate_chunk<Base, X, S>(bucket, tensor, chunk, scalars);
    sum = block_total(sum);
  }
  if (Columns::reduce_chunk(bucket, reduction, blockIdx.x, tensor.scale, sum)) {
    advance_steps(bucket, reduction.spans[tensor.scale], threadIdx.x, kThreads);
  }
}

template <class X, class S>
void launch_accumulate(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
                       cudaStream_t stream) {
  for_kind(bucket.kind, [&](auto base) {
    using Base = decltype(base);
    if constexpr (Base::kStates > 0 || std::is_same_v<S, opmath_t<X>>) {
      launch("accumulate", accumulate_kernel<Base, X, S>, bucket.counts.chunks, stream, bucket,
             reduction, scalars);
    }
  });
}

}  // namespace mechanic::cuda
