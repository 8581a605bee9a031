// step: g.(x - x_ref), g.g, x.x and u.u with the x before it; the base's state moves, x += S u.
#include "chunks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

template <class Base, class X, class S>
void step_partial(const Bucket& bucket, const Chunk& chunk, const double* clip,
                  const double* step_count, double scale, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial = {};
  if (tensor.gradient == 0) return;
  const auto* step = at<const float>(tensor.step, 0);
  Hyper hyper = bucket.tables.hyper[tensor.group];
  hyper.gradient = gradient_multiplier(hyper, nullptr, clip);
  const Coefficients<T> c = Base::template coefficients<T>(hyper, step ? double(*step) : 0.0);
  const StepStreams<X, S> streams = streams_of<X, S>(bucket, chunk, step_count);
  StepLanes lanes;
  if (streams.kept.dropped == 0) {
    step_chunk<Base, false>(streams, chunk.length, c, T(scale), lanes);
  } else {
    step_chunk<Base, true>(streams, chunk.length, c, T(scale), lanes);
  }
  partial.gd = streams.kept.share() * reduce_lanes(lanes.gradient.ab);
  partial.gg = reduce_lanes(lanes.gradient.aa);
  partial.xx = reduce_lanes(lanes.update.ab);
  partial.count = double(chunk.length);
  const double to_peak = peak_ratio(hyper);
  partial.uu = reduce_lanes(lanes.update.aa) * (to_peak * to_peak);
}

}  // namespace

void step(const Bucket& bucket, const LogTuner& tuner, const double* clip, const double* step_count,
          int threads) {
  for_types(bucket, [&](auto base, auto weight, auto state) {
    for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
      const double scale = tuner.rows[bucket.tables.tensors[chunk.tensor].scale].scale;
      step_partial<decltype(base), decltype(weight), decltype(state)>(bucket, chunk, clip,
                                                                      step_count, scale, partial);
    });
  });
  reduce_partials(bucket, &Sums::gd, &Sums::gg, &Sums::xx, &Sums::uu, &Sums::count);
  advance_steps(bucket);
}

}  // namespace mechanic::cpu
