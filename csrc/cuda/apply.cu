// apply: x = round(x_ref + S.Δ), then x.Δ and x.x of the rounded x. measure: the sums alone.
#include "../formulas.h"
#include "packets.cuh"
#include "reduce.cuh"
#include "states.cuh"

namespace mechanic::cuda {
namespace {

// The arrays of one chunk. S: codes if Δ has codes, or anything else.
template <class X, class S>
struct ApplyStreams {
  const X* x_ref;
  Delta<opmath_t<X>, S> delta;
  X* x;
};

template <class X>
__device__ __forceinline__ opmath_t<X> rounded(opmath_t<X> wide) {
  X x;
  narrow(wide, x);
  return widen(x);
}

// N elements from i on in each thread: all loads, then all arithmetic.
template <int N, bool kWrites, class X, class S>
__device__ __forceinline__ void apply_block(const ApplyStreams<X, S>& at, int i, opmath_t<X> scale,
                                            Totals<2>& sum) {
  opmath_t<X> delta[N], x[N];
  at.delta.template load<Reuse::kNever>(i, delta);
  if constexpr (kWrites) {
    load<Reuse::kNever>(at.x_ref + i, x);
#pragma unroll
    for (int l = 0; l < N; ++l) x[l] = rounded<X>(apply_scale(x[l], scale, delta[l]));
    store<Reuse::kSoon>(x, at.x + i);
  } else {
    load<Reuse::kSoon>(at.x + i, x);
  }
#pragma unroll
  for (int l = 0; l < N; ++l) {
    sum.of[0] = fma(double(x[l]), double(delta[l]), sum.of[0]);
    sum.of[1] = fma(double(x[l]), double(x[l]), sum.of[1]);
  }
}

// The elements [begin, end) of the chunk.
template <int N, bool kWrites, class X, class S>
__device__ __forceinline__ Totals<2> apply_range(const ApplyStreams<X, S>& at, int begin, int end,
                                                 opmath_t<X> scale, Totals<2> sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    apply_block<N, kWrites>(at, i, scale, sum);
  }
  return sum;
}

// Blocks of a multiprocessor: the highest occupancy at which none of these kernels spills.
constexpr int kBlocks = 6;

template <bool kWrites, class X, class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apply_kernel(Bucket bucket, Reduction reduction, Tuner tuner, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::xd, &Sums::xx>;
  for_empty_scales(bucket, reduction,
                   [&](int64_t scale) { Columns::write(bucket.tables.sums + scale, {}); });
  if (blockIdx.x >= bucket.counts.chunks) return;
  // Backwards, since accumulate has left the end of Δ in the cache.
  const int64_t number = bucket.counts.chunks - 1 - blockIdx.x;
  const Chunk chunk = bucket.tables.chunks[number];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  const double* s = tuner.state + tensor.scale * tuner_width(tuner.betas) + kS * tuner.betas;
  const auto scale = opmath_t<X>(kWrites ? total_scale(s, tuner.betas) : 0);
  const ApplyStreams<X, S> at = {address<const X>(tensor.x_ref, chunk.offset),
                                 delta_of<opmath_t<X>, S>(bucket, tensor, chunk, nullptr),
                                 address<X>(tensor.weight, chunk.offset)};
  const int n = int(chunk.length);
  // measure must add in the same order as apply, so that their bits agree: x_ref counts in both.
  const int in_packets = packet_elements<X>(n, at.x_ref, at.delta.begin(), at.x);
  Totals<2> sum = {};
  sum = apply_range<kLanes<X>, kWrites>(at, 0, in_packets, scale, sum);
  sum = apply_range<1, kWrites>(at, in_packets, n, scale, sum);
  Columns::reduce_chunk(bucket, reduction, number, tensor.scale, block_total(sum));
}

template <bool kWrites>
void launch_apply(const char* op, const Bucket& bucket, const Reduction& reduction,
                  const Tuner& tuner, const StepScalars& scalars, cudaStream_t stream) {
  for_delta(bucket.dtypes, [&](auto weight, auto delta) {
    launch(op, apply_kernel<kWrites, decltype(weight), decltype(delta)>, bucket.counts.chunks,
           stream, bucket, reduction, tuner, scalars);
  });
}

}  // namespace

void apply(const Bucket& bucket, const Reduction& reduction, const Tuner& tuner,
           const StepScalars& scalars, cudaStream_t stream) {
  launch_apply<true>("apply", bucket, reduction, tuner, scalars, stream);
}

void measure(const Bucket& bucket, const Reduction& reduction, cudaStream_t stream) {
  launch_apply<false>("measure", bucket, reduction, {}, {}, stream);
}

}  // namespace mechanic::cuda
