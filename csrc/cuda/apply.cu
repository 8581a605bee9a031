// apply: x = round(x_ref + S.Δ), with x.Δ and x.x of what stands there then. measure: only these.
#include "fold.cuh"
#include "packets.cuh"

namespace mechanic::cuda {
namespace {

// The streams of one chunk.
template <class X>
struct Streams {
  const X* x_ref;
  Delta<Wide<X>> delta;
  X* x;
};

template <class X>
__device__ __forceinline__ Wide<X> rounded(Wide<X> wide) {
  X x;
  narrow(wide, x);
  return widen(x);
}

// Elements [begin, end) of the chunk, N at a time in each thread: all loads, then all arithmetic.
template <int N, bool kWrites, class X>
__device__ __forceinline__ Pair apply_span(const Streams<X>& at, int begin, int end, Wide<X> scale,
                                           Pair sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    Wide<X> delta[N], x[N];
    at.delta.template load<Reuse::kNever>(i, delta);
    if constexpr (kWrites) {
      load<Reuse::kNever>(at.x_ref + i, x);
#pragma unroll
      for (int l = 0; l < N; ++l) x[l] = rounded<X>(blend(x[l], scale, delta[l]));
      store<Reuse::kSoon>(x, at.x + i);
    } else {
      load<Reuse::kSoon>(at.x + i, x);
    }
#pragma unroll
    for (int l = 0; l < N; ++l) {
      sum.first = fma(double(x[l]), double(delta[l]), sum.first);
      sum.second = fma(double(x[l]), double(x[l]), sum.second);
    }
  }
  return sum;
}

// Blocks of a multiprocessor: as many as no kernel of these spills with.
constexpr int kBlocks = 6;

template <bool kWrites, class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apply_kernel(Bucket bucket, Reduction folding, Tuner tuner, StepScalars scaler) {
  if (scaler.found_inf != nullptr && *scaler.found_inf != 0) return;
  using Folded = Columns<&Sums::xd, &Sums::xx>;
  for_empty_scales(bucket, folding,
                   [&](int64_t scale) { Folded::write(bucket.sums + scale, {0, 0}); });
  if (blockIdx.x >= bucket.chunk_count) return;
  // Backwards, since the end of Δ is what accumulate has left in the cache.
  const int64_t number = bucket.chunk_count - 1 - blockIdx.x;
  const Chunk chunk = bucket.chunks[number];
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  const double* s = tuner.state + tensor.scale * (4 * tuner.betas + 2);
  const auto scale = Wide<X>(kWrites ? total(s, tuner.betas) : 0);
  const Streams<X> at = {address<const X>(tensor.x_ref, chunk.offset),
                         delta_of<Wide<X>>(bucket, tensor, chunk, nullptr),
                         address<X>(tensor.weight, chunk.offset)};
  const int n = int(chunk.length);
  // measure adds in the same order as apply, so that their bits agree: x_ref decides for both.
  const int body = packed<X>(n, at.x_ref, at.delta.wide, at.delta.narrow, at.x);
  Pair sum = {0, 0};
  sum = apply_span<kLanes<X>, kWrites>(at, 0, body, scale, sum);
  sum = apply_span<1, kWrites>(at, body, n, scale, sum);
  Folded::reduce_chunk(bucket, folding, number, tensor.scale, block_total(sum));
}

template <bool kWrites>
void launch_apply(const char* verb, const Bucket& bucket, const Reduction& folding,
                  const Tuner& tuner, const StepScalars& scaler, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch(verb, kernel, bucket.chunk_count, stream, bucket, folding, tuner, scaler);
  };
  switch (bucket.weight) {
    case DType::kFloat:
      return run(apply_kernel<kWrites, float>);
    case DType::kDouble:
      return run(apply_kernel<kWrites, double>);
    case DType::kBFloat16:
      return run(apply_kernel<kWrites, BFloat16>);
    case DType::kHalf:
      return run(apply_kernel<kWrites, Half>);
  }
}

}  // namespace

void apply(const Bucket& bucket, const Reduction& folding, const Tuner& tuner, const StepScalars& scaler,
           cudaStream_t stream) {
  launch_apply<true>("apply", bucket, folding, tuner, scaler, stream);
}

void measure(const Bucket& bucket, const Reduction& folding, cudaStream_t stream) {
  launch_apply<false>("measure", bucket, folding, {}, {}, stream);
}

}  // namespace mechanic::cuda
