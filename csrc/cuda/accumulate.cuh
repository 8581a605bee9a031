// accumulate: g.Δ and g.g with the old Δ, then the base's state and Δ move on. One block a chunk:
// the hardware hands the next chunk to whichever multiprocessor is free, so chunks of unequal
// length need no plan, and while one block starts or folds, its neighbours keep memory busy.
#pragma once

#include <type_traits>

#include "fold.cuh"
#include "packets.cuh"

namespace mechanic::cuda {

// The streams of one chunk.
template <class X, class S>
struct Streams {
  const X* gradient;
  const X* weight;
  Delta<Wide<X>> delta;
  S* state0;
  S* state1;
  bool reads_x;  // only with weight decay: the bytes are worth a uniform branch
};

// Elements [begin, end) of the chunk, N at a time in each thread: all loads, then all arithmetic.
template <int N, class Base, class X, class S>
__device__ __forceinline__ Pair accumulate_span(const Streams<X, S>& at, int begin, int end,
                                                const Coefficients<Wide<X>>& c, Pair sum) {
  using T = Wide<X>;
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    T g[N], delta[N], a[N] = {}, b[N] = {}, x[N] = {};
    load<Reuse::kNever>(at.gradient + i, g);
    if constexpr (Base::kStates > 0) load<Reuse::kNever>(at.state0 + i, a);
    if constexpr (Base::kStates > 1) load<Reuse::kNever>(at.state1 + i, b);
    if (at.reads_x) load<Reuse::kNever>(at.weight + i, x);
    // The last one, since widening a narrow Δ waits for it.
    at.delta.template load<Reuse::kSoon>(i, delta);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const T gradient = g[l] * c.gradient;
      // Products of floats are exact in double, so the fused form rounds no differently.
      sum.first = fma(double(gradient), double(delta[l]), sum.first);
      sum.second = fma(double(gradient), double(gradient), sum.second);
      delta[l] = delta[l] + Base::update(finite_or_zero(gradient), x[l], a[l], b[l], c);
    }
    at.delta.template store<Reuse::kSoon>(i, delta);
    if constexpr (Base::kStates > 0) store<Reuse::kNever>(a, at.state0 + i);
    if constexpr (Base::kStates > 1) store<Reuse::kNever>(b, at.state1 + i);
  }
  return sum;
}

template <class Base, class X, class S>
__device__ __forceinline__ Pair accumulate_chunk(const Bucket& bucket, const Tensor& tensor,
                                                 const Chunk& chunk, const StepScalars& scaler) {
  using T = Wide<X>;
  // The bias corrections take two powers in double: once a chunk, not once a thread.
  __shared__ Coefficients<T> shared;
  const Hyper& hyper = bucket.hyper[tensor.group];
  if (threadIdx.x == 0) {
    Hyper scaled = hyper;
    scaled.gradient = multiplier(hyper, scaler.grad_scale, scaler.clip);
    const double step = tensor.step != 0 ? double(*address<const float>(tensor.step, 0)) : 0;
    shared = Base::template coefficients<T>(scaled, step);
  }
  Streams<X, S> at = {};
  at.gradient = address<const X>(tensor.gradient, chunk.offset);
  at.weight = address<const X>(tensor.weight, chunk.offset);
  at.delta = delta_of<T>(bucket, tensor, chunk, scaler.steps);
  if constexpr (Base::kStates > 0) at.state0 = address<S>(tensor.state0, chunk.offset);
  if constexpr (Base::kStates > 1) at.state1 = address<S>(tensor.state1, chunk.offset);
  at.reads_x = hyper.l2 != 0 || hyper.decay != 0;
  const int n = int(chunk.length);
  const int body =
      packed<X>(n, at.gradient, at.weight, at.delta.wide, at.delta.narrow, at.state0, at.state1);
  __syncthreads();
  const Coefficients<T> c = shared;
  Pair sum = {0, 0};
  sum = accumulate_span<kLanes<X>, Base>(at, 0, body, c, sum);
  return accumulate_span<1, Base>(at, body, n, c, sum);
}

// Only when no chunk of the scale reads the counts any more.
__device__ __forceinline__ void advance_steps(const Bucket& bucket, const Span& span, int first,
                                              int stride) {
  for (int64_t i = first; i < span.tensors; i += stride) {
    const Tensor& tensor = bucket.tensors[span.first_tensor + i];
    if (tensor.gradient != 0 && tensor.step != 0) *address<float>(tensor.step, 0) += 1;
  }
}

// Blocks of a multiprocessor: as many as the registers hold without spilling.
template <class Base, class X>
constexpr int kBlocks = (Base::kStates > 1 ? 3 : 4) + (std::is_same_v<X, float> ? 1 : 0);

template <class Base, class X, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<Base, X>)
    accumulate_kernel(Bucket bucket, Reduction folding, StepScalars scaler) {
  if (scaler.found_inf != nullptr && *scaler.found_inf != 0) return;
  using Folded = Columns<&Sums::gd, &Sums::gg>;
  for_empty_scales(bucket, folding, [&](int64_t scale) {
    Folded::write(bucket.sums + scale, {0, 0});
    advance_steps(bucket, folding.spans[scale], 0, 1);
  });
  if (blockIdx.x >= bucket.chunk_count) return;
  const Chunk chunk = bucket.chunks[blockIdx.x];
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  Pair sum = {0, 0};
  if (tensor.gradient != 0) {
    sum = accumulate_chunk<Base, X, S>(bucket, tensor, chunk, scaler);
    sum = block_total(sum);
  }
  if (Folded::reduce_chunk(bucket, folding, blockIdx.x, tensor.scale, sum)) {
    advance_steps(bucket, folding.spans[tensor.scale], threadIdx.x, kThreads);
  }
}

template <class Base, class X>
void launch_accumulate(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler,
                       cudaStream_t stream) {
  // Without a state there is nothing whose dtype could differ.
  using Narrow = std::conditional_t<(Base::kStates > 0), X, Wide<X>>;
  const auto run = [&](auto kernel) {
    launch("accumulate", kernel, bucket.chunk_count, stream, bucket, folding, scaler);
  };
  if (bucket.state == bucket.weight) return run(accumulate_kernel<Base, X, Narrow>);
  return run(accumulate_kernel<Base, X, Wide<X>>);
}

template <class X>
void launch_accumulate(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler,
                       cudaStream_t stream) {
  switch (bucket.kind) {
    case Kind::kSgd:
      return launch_accumulate<Sgd, X>(bucket, folding, scaler, stream);
    case Kind::kMomentum:
      return launch_accumulate<Momentum, X>(bucket, folding, scaler, stream);
    case Kind::kAdam:
      return launch_accumulate<Adam, X>(bucket, folding, scaler, stream);
    case Kind::kLion:
      return launch_accumulate<Lion, X>(bucket, folding, scaler, stream);
  }
}

}  // namespace mechanic::cuda
