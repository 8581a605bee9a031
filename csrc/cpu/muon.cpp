// The two ends of a step of Muon around products of matrices: muon_momentum takes the sums with the
// x before it, moves the momentum and leaves n; muon_update writes x += S u of O.
#include "chunks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

template <class N>
N* direction_of(const Directions& directions, const Chunk& chunk) {
  return static_cast<N*>(directions.first) + chunk.tensor * directions.size + chunk.offset;
}

// Call run with a number of the dtype of directions beside weights whose arithmetic is in T.
template <class T, class Run>
void for_direction(DType dtype, Run run) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype == DType::kBFloat16) return run(BFloat16());
  }
  run(T());
}

template <class X, class S, class N>
void momentum_partial(const Bucket& bucket, const Chunk& chunk, const Directions& n,
                      const double* clip, const double* step_count, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial = {};
  if (tensor.gradient == 0) return;
  Hyper hyper = bucket.tables.hyper[tensor.group];
  hyper.gradient = gradient_multiplier(hyper, nullptr, clip);
  const auto c = plain_coefficients<T>(hyper);
  const StepStreams<X, S> streams = streams_of<X, S>(bucket, chunk, step_count);
  N* const to = direction_of<N>(n, chunk);
  StepLanes lanes;
  if (streams.kept.dropped == 0) {
    momentum_chunk<false>(streams, to, chunk.length, c, lanes);
  } else {
    momentum_chunk<true>(streams, to, chunk.length, c, lanes);
  }
  partial.gd = streams.kept.share() * reduce_lanes(lanes.gradient.ab);
  partial.gg = reduce_lanes(lanes.gradient.aa);
  partial.xx = reduce_lanes(lanes.update.aa);
  partial.count = double(chunk.length);
}

template <class X, class N>
void update_partial(const Bucket& bucket, const Chunk& chunk, const Directions& o, double ratio,
                    const LogTuner& tuner, const double* step_count, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial = {};
  if (tensor.gradient == 0) return;
  const Hyper& hyper = bucket.tables.hyper[tensor.group];
  const Weights<X> weights = weights_of<X>(bucket, chunk, step_count);
  const T scale = T(tuner.rows[tensor.scale].scale);
  Lanes lanes;
  direction_chunk(weights, direction_of<const N>(o, chunk), chunk.length,
                  plain_coefficients<T>(hyper), T(ratio), scale, lanes);
  const double to_peak = peak_ratio(hyper);
  partial.uu = reduce_lanes(lanes.aa) * (to_peak * to_peak);
}

}  // namespace

void muon_momentum(const Bucket& bucket, const Directions& n, const double* clip,
                   const double* step_count, int threads) {
  for_stored(bucket.dtypes, [&](auto weight, auto state) {
    using X = decltype(weight);
    for_direction<opmath_t<X>>(n.dtype, [&](auto direction) {
      for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
        momentum_partial<X, decltype(state), decltype(direction)>(bucket, chunk, n, clip,
                                                                  step_count, partial);
      });
    });
  });
  reduce_partials(bucket, &Sums::gd, &Sums::gg, &Sums::xx, &Sums::count);
}

void muon_update(const Bucket& bucket, const Directions& o, double ratio, const LogTuner& tuner,
                 const double* step_count, int threads) {
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    using X = decltype(weight);
    for_direction<opmath_t<X>>(o.dtype, [&](auto direction) {
      for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
        update_partial<X, decltype(direction)>(bucket, chunk, o, ratio, tuner, step_count, partial);
      });
    });
  });
  reduce_partials(bucket, &Sums::uu);
}

}  // namespace mechanic::cpu
