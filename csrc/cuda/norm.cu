// norm: g.g over the finite elements. It reads the gradients and writes nothing but sums.
#include "../formulas.h"
#include "packets.cuh"
#include "reduce.cuh"

namespace mechanic::cuda {
namespace {

// N elements from i on in each thread.
template <int N, class X>
__device__ __forceinline__ void norm_block(const X* gradient, int i, opmath_t<X> multiplier,
                                           double& sum) {
  opmath_t<X> g[N];
  load<Reuse::kSoon>(gradient + i, g);
#pragma unroll
  for (int l = 0; l < N; ++l) {
    const auto finite = double(finite_or_zero(g[l] * multiplier));
    sum = fma(finite, finite, sum);
  }
}

// The elements [begin, end) of the chunk.
template <int N, class X>
__device__ __forceinline__ double norm_range(const X* gradient, int begin, int end,
                                             opmath_t<X> multiplier, double sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    norm_block<N>(gradient, i, multiplier, sum);
  }
  return sum;
}

template <class X>
__device__ __forceinline__ double norm_chunk(const Bucket& bucket, const Tensor& tensor,
                                             const Chunk& chunk, const float* grad_scale) {
  // A division in double: once a chunk, not once a thread.
  __shared__ opmath_t<X> shared;
  if (threadIdx.x == 0) {
    shared = gradient_multiplier(bucket.tables.hyper[tensor.group], grad_scale, nullptr);
  }
  const X* const gradient = address<const X>(tensor.gradient, chunk.offset);
  const int n = int(chunk.length);
  const int in_packets = packet_elements<X>(n, gradient);
  __syncthreads();
  const opmath_t<X> multiplier = shared;
  const double sum = norm_range<kLanes<X>>(gradient, 0, in_packets, multiplier, 0);
  return norm_range<1>(gradient, in_packets, n, multiplier, sum);
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(Bucket bucket, Reduction reduction, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::gg>;
  for_empty_scales(bucket, reduction,
                   [&](int64_t scale) { Columns::write(bucket.tables.sums + scale, {}); });
  if (blockIdx.x >= bucket.counts.chunks) return;
  // Backwards, since accumulate starts at the end that is then left in the cache.
  const int64_t number = bucket.counts.chunks - 1 - blockIdx.x;
  const Chunk chunk = bucket.tables.chunks[number];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  Totals<1> sum = {};
  if (tensor.gradient != 0) {
    sum.of[0] = norm_chunk<X>(bucket, tensor, chunk, scalars.grad_scale);
    sum = block_total(sum);
  }
  Columns::reduce_chunk(bucket, reduction, number, tensor.scale, sum);
}

}  // namespace

void norm(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
          cudaStream_t stream) {
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    launch("norm", norm_kernel<decltype(weight)>, bucket.counts.chunks, stream, bucket, reduction,
           scalars);
  });
}

}  // namespace mechanic::cuda
