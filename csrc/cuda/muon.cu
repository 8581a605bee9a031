// muon_momentum: the sums with the x before the step; the momentum moves, and n is left.
// muon_update: x += S.u of O, and u.u. One block a chunk, as in step.cuh.
#include "step.cuh"

namespace mechanic::cuda {
namespace {

// n or O of a chunk, T or bfloat16: a branch that all threads take alike. Both pointers have the
// same address.
template <class T>
struct Direction {
  T* full;
  BFloat16* bfloat16;
  bool narrow;

  template <int N, bool kPackets>
  __device__ __forceinline__ void load(int i, T (&to)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (narrow) return cuda::load<Reuse::kNever, N, kPackets>(bfloat16 + i, to);
    }
    cuda::load<Reuse::kNever, N, kPackets>(full + i, to);
  }

  // The products read it next.
  template <int N, bool kPackets>
  __device__ __forceinline__ void store(int i, const T (&from)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (narrow) return cuda::store<Reuse::kSoon, N, kPackets>(from, bfloat16 + i);
    }
    cuda::store<Reuse::kSoon, N, kPackets>(from, full + i);
  }
};

template <class T>
__device__ __forceinline__ Direction<T> direction_of(const Directions& directions,
                                                     const Chunk& chunk) {
  const int64_t first = reinterpret_cast<int64_t>(directions.first);
  const int64_t offset = chunk.tensor * directions.size + chunk.offset;
  return {address<T>(first, offset), address<BFloat16>(first, offset),
          directions.dtype == DType::kBFloat16};
}

// The alignment of n or O, whichever of the two dtypes they are in.
template <class T>
__device__ __forceinline__ const void* start_of(const Direction<T>& direction) {
  return direction.narrow ? static_cast<const void*>(direction.bfloat16) : direction.full;
}

// The sums of a thread, in this order: g.(x - x_ref), g.g, x.x.
using MomentumSums = Totals<3>;

template <int N, bool kPackets, bool kInPart, class X, class S>
__device__ __forceinline__ void momentum_block(const StepStreams<X, S>& at,
                                               const Direction<opmath_t<X>>& to, int i,
                                               const Coefficients<opmath_t<X>>& c,
                                               MomentumSums& sum) {
  using T = opmath_t<X>;
  T g[N], x[N], x_ref[N], buffer[N] = {}, none[N] = {};
  load<Reuse::kNever, N, kPackets>(at.gradient + i, g);
  const bool has_x_ref = !kInPart || at.kept.has(i);
  if (has_x_ref) {
    load<Reuse::kNever, N, kPackets>(at.x_ref + (kInPart ? at.kept.place(i) : i), x_ref);
  }
  const ChunkRounding& rounding = *at.rounding;
  at.states.template load<Muon, N, kPackets>(i, buffer, none);
  at.weights.template load<N, kPackets>(i, rounding, x);
#pragma unroll
  for (int l = 0; l < N; ++l) {
    g[l] = g[l] * c.gradient;
    if (has_x_ref) sum.of[0] = fma(double(g[l]), double(x[l] - x_ref[l]), sum.of[0]);
    sum.of[1] = fma(double(g[l]), double(g[l]), sum.of[1]);
    sum.of[2] = fma(double(x[l]), double(x[l]), sum.of[2]);
    g[l] = Muon::momentum(finite_or_zero(g[l]), buffer[l], c);
  }
  to.template store<N, kPackets>(i, g);
  at.states.template store<Muon, N, kPackets>(i, rounding, buffer, none);
}

template <int N, bool kPackets, bool kInPart, class X, class S>
__device__ __forceinline__ MomentumSums momentum_range(const StepStreams<X, S>& at,
                                                       const Direction<opmath_t<X>>& to, int begin,
                                                       int end, const Coefficients<opmath_t<X>>& c,
                                                       MomentumSums sum) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    momentum_block<N, kPackets, kInPart>(at, to, i, c, sum);
  }
  return sum;
}

template <bool kInPart, class X, class S>
__device__ __forceinline__ MomentumSums momentum_chunk(const Bucket& bucket, const Tensor& tensor,
                                                       const Chunk& chunk, const Directions& n,
                                                       const StepScalars& scalars) {
  using T = opmath_t<X>;
  __shared__ Coefficients<T> c;
  __shared__ ChunkRounding rounding;
  if (threadIdx.x == 0) {
    Hyper hyper = bucket.tables.hyper[tensor.group];
    hyper.gradient = gradient_multiplier(hyper, scalars.grad_scale, scalars.clip);
    rounding = chunk_rounding(tensor, chunk, scalars.step_count);
    c = plain_coefficients<T>(hyper);
  }
  const auto at = streams_of<kInPart, Muon, X, S>(bucket, tensor, chunk, &rounding);
  const Direction<T> to = direction_of<T>(n, chunk);
  const int length = int(chunk.length);
  int in_packets = packet_elements<X>(length, at.gradient, at.weights.x, at.weights.low, at.x_ref,
                                      at.states.first.at, start_of(to));
  if (kInPart && at.kept.phase % kLanes<X> != 0) in_packets = 0;
  __syncthreads();
  MomentumSums sum = {};
  sum = momentum_range<kLanes<X>, true, kInPart>(at, to, 0, in_packets, c, sum);
  sum = momentum_range<kSingles<X, S>, false, kInPart>(at, to, in_packets, length, c, sum);
  if constexpr (kInPart) sum.of[0] = at.kept.share() * sum.of[0];
  return sum;
}

// Blocks of a multiprocessor: n takes registers beside those of a step, most where no other array
// is narrow.
template <bool kInPart, class X, class S>
constexpr int kMomentumBlocks =
    kStepBlocks<kInPart, Muon, X, S> - (!kInPart && std::is_same_v<S, opmath_t<X>>);

template <bool kInPart, class X, class S>
__global__ void __launch_bounds__(kThreads, kMomentumBlocks<kInPart, X, S>)
    momentum_kernel(Bucket bucket, Reduction reduction, Directions n, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::gd, &Sums::gg, &Sums::xx, &Sums::count>;
  for_empty_scales(bucket, reduction,
                   [&](int64_t scale) { Columns::write(bucket.tables.sums + scale, {}); });
  if (blockIdx.x >= bucket.counts.chunks) return;
  const Chunk chunk = bucket.tables.chunks[blockIdx.x];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  typename Columns::Total total = {};
  if (tensor.gradient != 0) {
    const MomentumSums sum =
        block_total(momentum_chunk<kInPart, X, S>(bucket, tensor, chunk, n, scalars));
    total = {sum.of[0], sum.of[1], sum.of[2], double(chunk.length)};
  }
  Columns::reduce_chunk(bucket, reduction, blockIdx.x, tensor.scale, total);
}

// The x of an update, whose dtype alone says whether it may be rounded stochastically.
template <class X>
using UpdatedWeights = Weights<X, std::conditional_t<std::is_same_v<X, BFloat16>, X, float>>;

template <int N, bool kPackets, class X>
__device__ __forceinline__ Totals<1> update_range(const UpdatedWeights<X>& weights,
                                                  const Direction<opmath_t<X>>& o, int begin,
                                                  int end, const ChunkRounding& rounding,
                                                  const Coefficients<opmath_t<X>>& c,
                                                  opmath_t<X> ratio, opmath_t<X> scale,
                                                  Totals<1> sum) {
  using T = opmath_t<X>;
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    T d[N], x[N];
    o.template load<N, kPackets>(i, d);
    weights.template load<N, kPackets>(i, rounding, x);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const T u = Muon::update(d[l] * ratio, x[l], c);
      sum.of[0] = fma(double(u), double(u), sum.of[0]);
      x[l] = apply_update(x[l], scale, u);
    }
    weights.template store<N, kPackets>(i, rounding, x);
  }
  return sum;
}

template <class X>
__device__ __forceinline__ Totals<1> update_chunk(const Bucket& bucket, const Tensor& tensor,
                                                  const Chunk& chunk, const Directions& directions,
                                                  double ratio, double scale,
                                                  const StepScalars& scalars) {
  using T = opmath_t<X>;
  __shared__ Coefficients<T> c;
  __shared__ ChunkRounding rounding;
  if (threadIdx.x == 0) {
    rounding = chunk_rounding(tensor, chunk, scalars.step_count);
    c = plain_coefficients<T>(bucket.tables.hyper[tensor.group]);
  }
  UpdatedWeights<X> weights = {};
  weights.x = address<X>(tensor.weight, chunk.offset);
  if constexpr (UpdatedWeights<X>::kHasLow) {
    weights.low = address<int16_t>(tensor.x_low, chunk.offset);
  }
  const Direction<T> o = direction_of<T>(directions, chunk);
  const int n = int(chunk.length);
  const int in_packets = packet_elements<X>(n, weights.x, weights.low, start_of(o));
  __syncthreads();
  Totals<1> sum = {};
  sum = update_range<kLanes<X>, true, X>(weights, o, 0, in_packets, rounding, c, T(ratio), T(scale),
                                         sum);
  return update_range<1, false, X>(weights, o, in_packets, n, rounding, c, T(ratio), T(scale), sum);
}

template <class X>
__global__ void __launch_bounds__(kThreads, 4)
    update_kernel(Bucket bucket, Reduction reduction, Directions o, double ratio, LogTuner tuner,
                  StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  using Columns = SumColumns<&Sums::uu>;
  for_empty_scales(bucket, reduction,
                   [&](int64_t scale) { Columns::write(bucket.tables.sums + scale, {}); });
  if (blockIdx.x >= bucket.counts.chunks) return;
  const Chunk chunk = bucket.tables.chunks[blockIdx.x];
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  Totals<1> total = {};
  if (tensor.gradient != 0) {
    const double scale = tuner.rows[tensor.scale].scale;
    total = block_total(update_chunk<X>(bucket, tensor, chunk, o, ratio, scale, scalars));
    const double to_peak = peak_ratio(bucket.tables.hyper[tensor.group]);
    total.of[0] = total.of[0] * (to_peak * to_peak);
  }
  Columns::reduce_chunk(bucket, reduction, blockIdx.x, tensor.scale, total);
}

}  // namespace

void muon_momentum(const Bucket& bucket, const Reduction& reduction, const Directions& n,
                   const StepScalars& scalars, CUstream_st* stream) {
  const auto run = [&](auto kernel) {
    launch("muon_momentum", kernel, bucket.counts.chunks, stream, bucket, reduction, n, scalars);
  };
  for_stored(bucket.dtypes, [&](auto weight, auto state) {
    if (bucket.counts.in_part != 0) {
      run(momentum_kernel<true, decltype(weight), decltype(state)>);
    } else {
      run(momentum_kernel<false, decltype(weight), decltype(state)>);
    }
  });
}

void muon_update(const Bucket& bucket, const Reduction& reduction, const Directions& o,
                 double ratio, const LogTuner& tuner, const StepScalars& scalars,
                 CUstream_st* stream) {
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    launch("muon_update", update_kernel<decltype(weight)>, bucket.counts.chunks, stream, bucket,
           reduction, o, ratio, tuner, scalars);
  });
}

}  // namespace mechanic::cuda
