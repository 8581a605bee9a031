// The verbs as loops over chunks. A chunk writes its own partial sums and a fixed order folds
// them, so the result does not depend on the number of threads.
#include "blocks.h"
#include "cpu.h"

namespace mechanic::cpu {
namespace {

// Weights that overflow the caches are written past them: apply does not read x, and the next to
// read it is a forward pass that starts at the other end.
constexpr int64_t kStreamed = 1 << 22;

template <class T>
T* at(int64_t address, int64_t offset) {
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + offset;
}

// Δ of a chunk; steps are needed where a narrow one is to be written.
template <class X>
Delta<Wide<X>> delta_of(const Bucket& bucket, const Chunk& chunk, const double* steps) {
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  const uint32_t first = seed(steps, tensor.number) + uint32_t(chunk.offset);
  if (bucket.delta == DType::kBFloat16) {
    return {nullptr, at<BFloat16>(tensor.delta, chunk.offset), first};
  }
  return {at<Wide<X>>(tensor.delta, chunk.offset), nullptr, first};
}

template <class Base, class X, class S>
void accumulate_chunk(const Bucket& bucket, const Chunk& chunk, const double* clip,
                      const double* steps, Sums& partial) {
  using T = Wide<X>;
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  partial.gd = partial.gg = 0;
  if (tensor.gradient == 0) return;
  const auto* step = at<const float>(tensor.step, 0);
  Hyper hyper = bucket.hyper[tensor.group];
  hyper.gradient = multiplier(hyper, nullptr, clip);
  const Coefficients<T> c = Base::template coefficients<T>(hyper, step ? double(*step) : 0.0);
  const Streams<X, S> streams = {
      at<X>(tensor.gradient, chunk.offset), at<X>(tensor.weight, chunk.offset),
      delta_of<X>(bucket, chunk, steps), at<S>(tensor.state0, chunk.offset),
      at<S>(tensor.state1, chunk.offset)};
  Lanes lanes;
  if (hyper.l2 != 0 || hyper.decay != 0) {
    accumulate_run<Base, true>(streams, chunk.length, c, lanes);
  } else {
    accumulate_run<Base, false>(streams, chunk.length, c, lanes);
  }
  partial.gd = fold(lanes.ab);
  partial.gg = fold(lanes.aa);
}

template <class X>
void norm_chunk(const Bucket& bucket, const Chunk& chunk, Sums& partial) {
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  partial.gg = 0;
  if (tensor.gradient == 0) return;
  const auto by = Wide<X>(multiplier(bucket.hyper[tensor.group], nullptr, nullptr));
  Lanes lanes;
  norm_run<X>(at<const X>(tensor.gradient, chunk.offset), chunk.length, by, lanes);
  partial.gg = fold(lanes.aa);
}

// Write x if there is a scale, and measure what stands there then.
template <class X>
void apply_chunk(const Bucket& bucket, const Chunk& chunk, const double* scale, Sums& partial) {
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  Lanes lanes;
  apply_run<X>(scale ? at<const X>(tensor.x_ref, chunk.offset) : nullptr,
               delta_of<X>(bucket, chunk, nullptr), at<X>(tensor.weight, chunk.offset),
               chunk.length, Wide<X>(scale ? *scale : 0), bucket.elements >= kStreamed, lanes);
  partial.xd = fold(lanes.ab);
  partial.xx = fold(lanes.aa);
}

template <class Run>
void for_kind(Kind kind, Run run) {
  switch (kind) {
    case Kind::kSgd:
      return run(Sgd());
    case Kind::kMomentum:
      return run(Momentum());
    case Kind::kAdam:
      return run(Adam());
    case Kind::kLion:
      return run(Lion());
  }
}

// Call work(chunk, partial) for all chunks, the last one first if so wished.
template <class Work>
void for_chunks(const Bucket& bucket, int threads, bool backwards, Work work) {
  const int64_t count = bucket.chunk_count;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (bucket.elements >= kSerial)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = backwards ? count - 1 - i : i;
    work(bucket.chunks[number], bucket.partials[number]);
  }
}

// Sums of these columns, chunk by chunk.
template <class... Column>
void fold_partials(const Bucket& bucket, Column... column) {
  for (int64_t i = 0; i < bucket.scale_count; ++i) ((bucket.sums[i].*column = 0), ...);
  for (int64_t i = 0; i < bucket.chunk_count; ++i) {
    Sums& sums = bucket.sums[bucket.tensors[bucket.chunks[i].tensor].scale];
    ((sums.*column += bucket.partials[i].*column), ...);
  }
}

void write_and_measure(const Bucket& bucket, const Tuner* tuner, int threads) {
  const int64_t width = tuner ? 4 * tuner->betas + 2 : 0;
  for_weight(bucket.weight, [&](auto weight) {
    // Backwards, since the end of delta is what accumulate has left in the cache.
    for_chunks(bucket, threads, true, [&](const Chunk& chunk, Sums& partial) {
      double scale = 0;
      if (tuner) {
        const int64_t row = bucket.tensors[chunk.tensor].scale;
        scale = total(tuner->state + row * width, tuner->betas);
      }
      apply_chunk<decltype(weight)>(bucket, chunk, tuner ? &scale : nullptr, partial);
    });
  });
  fold_partials(bucket, &Sums::xd, &Sums::xx);
}

}  // namespace

void accumulate(const Bucket& bucket, const double* clip, const double* steps, int threads) {
  for_kind(bucket.kind, [&](auto base) {
    for_weight(bucket.weight, [&](auto weight) {
      using X = decltype(weight);
      const bool narrow = bucket.state == bucket.weight;
      for_chunks(bucket, threads, false, [&](const Chunk& chunk, Sums& partial) {
        if (narrow) {
          accumulate_chunk<decltype(base), X, X>(bucket, chunk, clip, steps, partial);
        } else {
          accumulate_chunk<decltype(base), X, Wide<X>>(bucket, chunk, clip, steps, partial);
        }
      });
    });
  });
  fold_partials(bucket, &Sums::gd, &Sums::gg);
  // Only now, when no chunk reads the count any more.
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    const Tensor& tensor = bucket.tensors[i];
    if (tensor.gradient != 0 && tensor.step != 0) *at<float>(tensor.step, 0) += 1;
  }
}

void norm(const Bucket& bucket, int threads) {
  for_weight(bucket.weight, [&](auto weight) {
    // Backwards, since accumulate starts at the end that is then left in the cache.
    for_chunks(bucket, threads, true, [&](const Chunk& chunk, Sums& partial) {
      norm_chunk<decltype(weight)>(bucket, chunk, partial);
    });
  });
  fold_partials(bucket, &Sums::gg);
}

void apply(const Bucket& bucket, const Tuner& tuner, int threads) {
  write_and_measure(bucket, &tuner, threads);
}

void measure(const Bucket& bucket, int threads) { write_and_measure(bucket, nullptr, threads); }

void tune(const Sums* sums, const Tuner& tuner) { tune_rows(sums, tuner); }

const char* instruction_set() {
#if defined(MECHANIC_HAS_CLONES)
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "default";
}

}  // namespace mechanic::cpu
