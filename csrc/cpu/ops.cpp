// The ops as loops over chunks. A chunk writes its own partial sums and they are added in a fixed
// order, so the result does not depend on the number of threads.
#include "blocks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

// Elements of a bucket from which on apply writes x with non-temporal stores. It does not read x,
// so a store through the caches would first read each line; and so many weights overflow the
// caches before the forward pass, which starts at the other end, reads them.
constexpr int64_t kNonTemporalElements = 1 << 22;

template <class T>
T* at(int64_t address, int64_t offset) {
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + offset;
}

// Return Δ of a chunk; step_count is needed where it is written in bfloat16.
template <class T>
Delta<T> delta_of(const Bucket& bucket, const Chunk& chunk, const double* step_count) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  const uint32_t first = rounding_seed(step_count, tensor.number) + uint32_t(chunk.offset);
  if (bucket.dtypes.delta == DType::kBFloat16) {
    return {nullptr, at<BFloat16>(tensor.delta, chunk.offset), first};
  }
  return {at<T>(tensor.delta, chunk.offset), nullptr, first};
}

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
      delta_of<T>(bucket, chunk, step_count), at<S>(tensor.state0, chunk.offset),
      at<S>(tensor.state1, chunk.offset)};
  Lanes lanes;
  if (c.reads_x()) {
    accumulate_chunk<Base, true>(streams, chunk.length, c, lanes);
  } else {
    accumulate_chunk<Base, false>(streams, chunk.length, c, lanes);
  }
  partial.gd = reduce_lanes(lanes.ab);
  partial.gg = reduce_lanes(lanes.aa);
}

template <class Base, class X, class S>
void step_partial(const Bucket& bucket, const Chunk& chunk, const double* clip, double scale,
                  Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  partial = {};
  if (tensor.gradient == 0) return;
  const auto* step = at<const float>(tensor.step, 0);
  Hyper hyper = bucket.tables.hyper[tensor.group];
  hyper.gradient = gradient_multiplier(hyper, nullptr, clip);
  const Coefficients<T> c = Base::template coefficients<T>(hyper, step ? double(*step) : 0.0);
  const KeptBlocks kept = kept_blocks(tensor, chunk.offset);
  const StepStreams<X, S> streams = {
      at<X>(tensor.gradient, chunk.offset),
      {at<X>(tensor.weight, chunk.offset), at<int16_t>(tensor.x_low, chunk.offset)},
      at<X>(tensor.x_ref, kept.first),
      at<S>(tensor.state0, chunk.offset),
      at<S>(tensor.state1, chunk.offset),
      kept};
  StepLanes lanes;
  if (kept.dropped == 0) {
    step_chunk<Base, false>(streams, chunk.length, c, T(scale), lanes);
  } else {
    step_chunk<Base, true>(streams, chunk.length, c, T(scale), lanes);
  }
  partial.gd = kept.share() * reduce_lanes(lanes.gradient.ab);
  partial.gg = reduce_lanes(lanes.gradient.aa);
  partial.xx = reduce_lanes(lanes.update.ab);
  partial.count = double(chunk.length);
  const double to_peak = peak_ratio(hyper);
  partial.uu = reduce_lanes(lanes.update.aa) * (to_peak * to_peak);
}

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

// Write x if there is a scale, then measure it.
template <class X>
void apply_partial(const Bucket& bucket, const Chunk& chunk, const double* scale, Sums& partial) {
  using T = opmath_t<X>;
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  const ApplyStreams<X> streams = {scale ? at<const X>(tensor.x_ref, chunk.offset) : nullptr,
                                   delta_of<T>(bucket, chunk, nullptr),
                                   at<X>(tensor.weight, chunk.offset)};
  Lanes lanes;
  apply_chunk<X>(streams, chunk.length, T(scale ? *scale : 0),
                 bucket.counts.elements >= kNonTemporalElements, lanes);
  partial.xd = reduce_lanes(lanes.ab);
  partial.xx = reduce_lanes(lanes.aa);
}

// Call work(chunk, partial) for all chunks, optionally the last one first.
template <class Work>
void for_chunks(const Bucket& bucket, int threads, bool backwards, Work work) {
  const int64_t count = bucket.counts.chunks;
  const bool parallel = bucket.counts.elements >= kSerialElements;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parallel)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = backwards ? count - 1 - i : i;
    work(bucket.tables.chunks[number], bucket.tables.partials[number]);
  }
}

// Set these columns of the sums to the sums of the partial ones, chunk by chunk.
template <class... Column>
void reduce_partials(const Bucket& bucket, Column... column) {
  const Tables& tables = bucket.tables;
  for (int64_t i = 0; i < bucket.counts.scales; ++i) ((tables.sums[i].*column = 0), ...);
  for (int64_t i = 0; i < bucket.counts.chunks; ++i) {
    Sums& sums = tables.sums[tables.tensors[tables.chunks[i].tensor].scale];
    ((sums.*column += tables.partials[i].*column), ...);
  }
}

// Only when no chunk reads the counts any more.
void advance_steps(const Bucket& bucket) {
  for (int64_t i = 0; i < bucket.counts.tensors; ++i) {
    const Tensor& tensor = bucket.tables.tensors[i];
    if (tensor.gradient != 0 && tensor.step != 0) *at<float>(tensor.step, 0) += 1;
  }
}

void write_and_measure(const Bucket& bucket, const Tuner* tuner, int threads) {
  const int64_t width = tuner ? tuner_width(tuner->betas) : 0;
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    // Backwards, since accumulate has left the end of delta in the cache.
    for_chunks(bucket, threads, true, [&](const Chunk& chunk, Sums& partial) {
      double scale = 0;
      if (tuner) {
        const int64_t row = bucket.tables.tensors[chunk.tensor].scale;
        scale = total_scale(tuner->state + row * width + kS * tuner->betas, tuner->betas);
      }
      apply_partial<decltype(weight)>(bucket, chunk, tuner ? &scale : nullptr, partial);
    });
  });
  reduce_partials(bucket, &Sums::xd, &Sums::xx);
}

}  // namespace

void accumulate(const Bucket& bucket, const double* clip, const double* step_count, int threads) {
  for_kind(bucket.kind, [&](auto base) {
    for_dtype(bucket.dtypes.weight, [&](auto weight) {
      using Base = decltype(base);
      using X = decltype(weight);
      const bool state_is_weights = bucket.dtypes.state == bucket.dtypes.weight;
      for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
        if (state_is_weights) {
          accumulate_partial<Base, X, X>(bucket, chunk, clip, step_count, partial);
        } else {
          accumulate_partial<Base, X, opmath_t<X>>(bucket, chunk, clip, step_count, partial);
        }
      });
    });
  });
  reduce_partials(bucket, &Sums::gd, &Sums::gg);
  advance_steps(bucket);
}

void step(const Bucket& bucket, const LogTuner& tuner, const double* clip, int threads) {
  for_kind(bucket.kind, [&](auto base) {
    for_dtype(bucket.dtypes.weight, [&](auto weight) {
      using Base = decltype(base);
      using X = decltype(weight);
      const bool state_is_weights = bucket.dtypes.state == bucket.dtypes.weight;
      for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
        const double scale = tuner.rows[bucket.tables.tensors[chunk.tensor].scale].scale;
        if (state_is_weights) {
          step_partial<Base, X, X>(bucket, chunk, clip, scale, partial);
        } else {
          step_partial<Base, X, opmath_t<X>>(bucket, chunk, clip, scale, partial);
        }
      });
    });
  });
  reduce_partials(bucket, &Sums::gd, &Sums::gg, &Sums::xx, &Sums::uu, &Sums::count);
  advance_steps(bucket);
}

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
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "default";
}

}  // namespace mechanic::cpu
