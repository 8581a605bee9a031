// accumulate: g.Δ and g.g with the old Δ, then the base's state and Δ move. One block a chunk: the
// hardware assigns the next chunk to whichever multiprocessor is free, so chunks of unequal length
// need no plan, and while one block starts or reduces, its neighbours keep the memory busy.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "advance_steps.cuh"
#include "packets.cuh"
#include "reduce.cuh"

namespace mechanic::cuda {

// The arrays of one chunk.
template <class X, class S>
struct AccumulateStreams {
  const X* gradient;
  const X* weight;
  Delta<opmath_t<X>> delta;
  S* state0;
  S* state1;
  bool reads_x;  // only with weight decay: the bytes saved are worth a uniform branch
};

// N elements from i on in each thread: all loads, then all arithmetic.
template <int N, class Base, class X, class S>
__device__ __forceinline__ void accumulate_block(const AccumulateStreams<X, S>& at, int i,
                                                 const Coefficients<opmath_t<X>>& c,
                                                 Totals<2>& sum) {
  using T = opmath_t<X>;
  T g[N], delta[N], a[N] = {}, b[N] = {}, x[N] = {};
  load<Reuse::kNever>(at.gradient + i, g);
  if constexpr (Base::kStates > 0) load<Reuse::kNever>(at.state0 + i, a);
  if constexpr (Base::kStates > 1) load<Reuse::kNever>(at.state1 + i, b);
  if (at.reads_x) load<Reuse::kNever>(at.weight + i, x);
  // The last load, since widening a bfloat16 Δ waits for it.
  at.delta.template load<Reuse::kSoon>(i, delta);
#pragma unroll
  for (int l = 0; l < N; ++l) {
    const T gradient = g[l] * c.gradient;
    // Products of floats are exact in double, so the fused form rounds no differently.
    sum.of[0] = fma(double(gradient), double(delta[l]), sum.of[0]);
    sum.of[1] = fma(double(gradient), double(gradient), sum.of[1]);
    delta[l] =
        delta[l] + Base::template update<false>(finite_or_zero(gradient), x[l], a[l], b[l], c);
  }
  at.delta.template store<Reuse::kSoon>(i, delta);
  if constexpr (Base::kStates > 0) store<Reuse::kNever>(a, at.state0 + i);
  if constexpr (Base::kStates > 1) store<Reuse::kNever>(b, at.state1 + i);
}

// The elements [begin, end) of the chunk. Not a loop shared with the other kernels: around a lambda
// the compiler keeps more of the coefficients in shared memory and registers.
template <int N, class Base, class X, class S>
__device__ __forceinline__ Totals<2> accumulate_range(const AccumulateStreams<X, S>& at, int begin,
                                                      int end, const Coefficients<opmath_t<X>>& c,
                                                      Totals<2> sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    accumulate_block<N, Base>(at, i, c, sum);
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
  const Hyper& hyper = bucket.tables.hyper[tensor.group];
  if (threadIdx.x == 0) {
    Hyper scaled = hyper;
    scaled.gradient = gradient_multiplier(hyper, scalars.grad_scale, scalars.clip);
    const double step = tensor.step != 0 ? double(*address<const float>(tensor.step, 0)) : 0;
    shared = Base::template coefficients<T>(scaled, step);
  }
  AccumulateStreams<X, S> at = {};
  at.gradient = address<const X>(tensor.gradient, chunk.offset);
  at.weight = address<const X>(tensor.weight, chunk.offset);
  at.delta = delta_of<T>(bucket, tensor, chunk, scalars.step_count);
  if constexpr (Base::kStates > 0) at.state0 = address<S>(tensor.state0, chunk.offset);
  if constexpr (Base::kStates > 1) at.state1 = address<S>(tensor.state1, chunk.offset);
  const int n = int(chunk.length);
  const int in_packets = packet_elements<X>(n, at.gradient, at.weight, at.delta.full,
                                            at.delta.bfloat16, at.state0, at.state1);
  __syncthreads();
  const Coefficients<T> c = shared;
  at.reads_x = c.reads_x();
  Totals<2> sum = {};
  sum = accumulate_range<kLanes<X>, Base>(at, 0, in_packets, c, sum);
  return accumulate_range<1, Base>(at, in_packets, n, c, sum);
}

// Blocks of a multiprocessor: as many as its registers hold without spills.
template <class Base, class X>
constexpr int kBlocks = (Base::kStates > 1 ? 3 : 4) + (std::is_same_v<X, float> ? 1 : 0);

template <class Base, class X, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<Base, X>)
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

template <class X>
void launch_accumulate(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
                       cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("accumulate", kernel, bucket.counts.chunks, stream, bucket, reduction, scalars);
  };
  for_kind(bucket.kind, [&](auto base) {
    using Base = decltype(base);
    // Without a state there is nothing whose dtype could differ.
    using WeightState = std::conditional_t<(Base::kStates > 0), X, opmath_t<X>>;
    if (bucket.dtypes.state == bucket.dtypes.weight) {
      run(accumulate_kernel<Base, X, WeightState>);
    } else {
      run(accumulate_kernel<Base, X, opmath_t<X>>);
    }
  });
}

}  // namespace mechanic::cuda
