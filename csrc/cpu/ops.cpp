// norm, apply and measure as loops over chunks, and the tuners.
#include "chunks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

// Elements of a bucket from which on apply writes x with non-temporal stores. It does not read x,
// so a store through the caches would first read each line; and so many weights overflow the
// caches before the forward pass, which starts at the other end, reads them.
constexpr int64_t kNonTemporalElements = 1 << 22;

template <class X>
void norm_partial(const Bucket& bucket, const Chunk& chunk, Sums& partial) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial.gg = 0;
  if (tensor.gradient == 0) return;
  const Hyper& hyper = bucket.tables.hyper[tensor.group];
  const auto multiplier = opmath_t<X>(gradient_multiplier(hyper, nullptr, nullptr));
  Lanes lanes;
  norm_chunk<X>(at<const X>(tensor.gradient, chunk.offset), chunk.length, multiplier, lanes);
  partial.gg = reduce_lanes(lanes.aa);
}

// Write x if there is a scale, then measure it. S: codes if delta has codes, or anything else.
template <class X, class S>
void apply_partial(const Bucket& bucket, const Chunk& chunk, const double* scale, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  const ApplyStreams<X, S> streams = {scale ? at<const X>(tensor.x_ref, chunk.offset) : nullptr,
                                      delta_of<T, S>(bucket, chunk, nullptr),
                                      at<X>(tensor.weight, chunk.offset)};
  Lanes lanes;
  apply_chunk(streams, chunk.length, T(scale ? *scale : 0),
              bucket.counts.elements >= kNonTemporalElements, lanes);
  partial.xd = reduce_lanes(lanes.ab);
  partial.xx = reduce_lanes(lanes.aa);
}

void write_and_measure(const Bucket& bucket, const Tuner* tuner, int threads) {
  const int64_t width = tuner ? tuner_width(tuner->betas) : 0;
  for_delta(bucket.dtypes, [&](auto weight, auto delta) {
    // Backwards, since accumulate has left the end of delta in the cache.
    for_chunks(bucket, threads, true, [&](const Chunk& chunk, Sums& partial) {
      double scale = 0;
      if (tuner) {
        const int64_t row = bucket.tables.tensors[chunk.tensor].scale;
        scale = total_scale(tuner->state + row * width + kS * tuner->betas, tuner->betas);
      }
      apply_partial<decltype(weight), decltype(delta)>(bucket, chunk, tuner ? &scale : nullptr,
                                                       partial);
    });
  });
  reduce_partials(bucket, &Sums::xd, &Sums::xx);
}

}  // namespace

void norm(const Bucket& bucket, int threads) {
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    // Backwards, since accumulate starts at the end that is then left in the cache.
    for_chunks(bucket, threads, true, [&](const Chunk& chunk, Sums& partial) {
      norm_partial<decltype(weight)>(bucket, chunk, partial);
    });
  });
  reduce_partials(bucket, &Sums::gg);
}

void apply(const Bucket& bucket, const Tuner& tuner, int threads) {
  write_and_measure(bucket, &tuner, threads);
}

void measure(const Bucket& bucket, int threads) { write_and_measure(bucket, nullptr, threads); }

void tune(const Sums* sums, const Tuner& tuner) {
  const int64_t width = tuner_width(tuner.betas);
  bool finite = true;
  for (int64_t i = 0; i < tuner.scales; ++i) {
    finite &= tune_row(sums[i], tuner.state + i * width, tuner.constants, tuner.betas);
  }
  // The first row counts the steps in which any row was not finite.
  if (!finite) tuner.state[kTunerBlocks * tuner.betas + kNonfinite] += 1;
}

void log_tune(const Sums* sums, const LogTuner& tuner) {
  Sums total = {};
  for (int64_t i = 0; i < tuner.scales; ++i) {
    total.gg += sums[i].gg;
    total.uu += sums[i].uu;
    total.count += sums[i].count;
  }
  const WholeModel model = {std::sqrt(total.gg) * std::sqrt(total.uu), total.count,
                            mean_loss(*tuner.losses)};
  bool finite = true;
  for (int64_t i = 0; i < tuner.scales; ++i) {
    finite &= log_tune_row(sums[i], model, tuner.rows[i], *tuner.constants);
  }
  // The first row counts the steps in which any row was not finite.
  if (!finite) tuner.rows[0].nonfinite += 1;
  *tuner.losses = {};
}

const char* instruction_set() {
#if defined(MECHANIC_HAS_CLONES)
  if (__builtin_cpu_supports(MECHANIC_WIDEST)) return MECHANIC_WIDEST;
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "default";
}

}  // namespace mechanic::cpu
