// norm: g.g over the elements that are finite. It reads the gradients and writes its sums alone.
#include "fold.cuh"
#include "packets.cuh"

namespace mechanic::cuda {
namespace {

// Elements [begin, end) of the chunk, N at a time in each thread.
template <int N, class X>
__device__ __forceinline__ double norm_span(const X* gradient, int begin, int end,
                                            Wide<X> multiplier, double sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    Wide<X> g[N];
    load<Reuse::kSoon>(gradient + i, g);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const auto finite = double(finite_or_zero(g[l] * multiplier));
      sum = fma(finite, finite, sum);
    }
  }
  return sum;
}

template <class X>
__device__ __forceinline__ double norm_chunk(const Bucket& bucket, const Tensor& tensor,
                                             const Chunk& chunk, const float* grad_scale) {
  // A division in double: once a chunk, not once a thread.
  __shared__ Wide<X> shared;
  if (threadIdx.x == 0) shared = multiplier(bucket.hyper[tensor.group], grad_scale, nullptr);
  const X* const gradient = address<const X>(tensor.gradient, chunk.offset);
  const int n = int(chunk.length);
  const int body = packed<X>(n, gradient);
  __syncthreads();
  const Wide<X> by = shared;
  const double sum = norm_span<kLanes<X>>(gradient, 0, body, by, 0);
  return norm_span<1>(gradient, body, n, by, sum);
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(Bucket bucket, Reduction folding, StepScalars scaler) {
  if (scaler.found_inf != nullptr && *scaler.found_inf != 0) return;
  using Folded = Columns<&Sums::gg>;
  for_empty_scales(bucket, folding,
                   [&](int64_t scale) { Folded::write(bucket.sums + scale, {0, 0}); });
  if (blockIdx.x >= bucket.chunk_count) return;
  // Backwards, since accumulate starts at the end that is then left in the cache.
  const int64_t number = bucket.chunk_count - 1 - blockIdx.x;
  const Chunk chunk = bucket.chunks[number];
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  Pair sum = {0, 0};
  if (tensor.gradient != 0) {
    sum.first = norm_chunk<X>(bucket, tensor, chunk, scaler.grad_scale);
    sum = block_total(sum);
  }
  Folded::reduce_chunk(bucket, folding, number, tensor.scale, sum);
}

}  // namespace

void norm(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("norm", kernel, bucket.chunk_count, stream, bucket, folding, scaler);
  };
  switch (bucket.weight) {
    case DType::kFloat:
      return run(norm_kernel<float>);
    case DType::kDouble:
      return run(norm_kernel<double>);
    case DType::kBFloat16:
      return run(norm_kernel<BFloat16>);
    case DType::kHalf:
      return run(norm_kernel<Half>);
  }
}

}  // namespace mechanic::cuda
