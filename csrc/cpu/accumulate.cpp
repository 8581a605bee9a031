// accumulate: g.Δ and g.g with the old Δ, then the base's state and Δ move.
#include "chunks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

template <class Base, class X, class S>
void accumulate_partial(const Bucket& bucket, const Chunk& chunk, const double* clip,
                        const double* step_count, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial.gd = partial.gg = 0;
  if (tensor.gradient == 0) return;
  const auto* step = at<const float>(tensor.step, 0);
  Hyper hyper = bucket.tables.hyper[tensor.group];
  hyper.gradient = gradient_multiplier(hyper, nullptr, clip);
  const Coefficients<T> c = Base::template coefficients<T>(hyper, step ? double(*step) : 0.0);
  const AccumulateStreams<X, S> streams = {
      at<X>(tensor.gradient, chunk.offset), at<X>(tensor.weight, chunk.offset),
      delta_of<T, S>(bucket, chunk, step_count), states_of<T, S>(bucket, chunk, step_count)};
  Lanes lanes;
  if (c.reads_x()) {
    accumulate_chunk<Base, true>(streams, chunk.length, c, lanes);
  } else {
    accumulate_chunk<Base, false>(streams, chunk.length, c, lanes);
  }
  partial.gd = reduce_lanes(lanes.ab);
  partial.gg = reduce_lanes(lanes.aa);
}

}  // namespace

void accumulate(const Bucket& bucket, const double* clip, const double* step_count, int threads) {
  for_types(bucket, [&](auto base, auto weight, auto state) {
    for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
      accumulate_partial<decltype(base), decltype(weight), decltype(state)>(bucket, chunk, clip,
                                                                            step_count, partial);
    });
  });
  reduce_partials(bucket, &Sums::gd, &Sums::gg);
  advance_steps(bucket);
}

}  // namespace mechanic::cpu
