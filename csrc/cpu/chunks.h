// What the ops have in common: the arrays of a chunk, the loop over chunks, and their sums. A chunk
// writes its own partial sums and they are added in a fixed order, so the result does not depend on
// the number of threads.
#pragma once

#include "blocks.h"
#include "states.h"

namespace mechanic::cpu {

template <class T>
T* at(int64_t address, int64_t offset) {
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + offset;
}

// What decides how the elements of a chunk are rounded; step_count may be null where none is.
inline Rounding rounding_of(const Tensor& tensor, const Chunk& chunk, const double* step_count) {
  return mechanic::rounding_of(step_count, tensor.number, tensor.element + chunk.offset);
}

// Describe a state of a chunk in these arrays.
template <class T, class S, class Codes>
void describe(State<T, S, Codes>& state, int64_t address, int64_t scales, const Bucket& bucket,
              const Chunk& chunk, const Rounding& rounding) {
  using Described = State<T, S, Codes>;
  state.at = at<typename Described::Stored>(address, chunk.offset);
  state.rounding = rounding;
  if constexpr (Described::kHasCodes) {
    while ((2 << state.log_block) <= bucket.counts.state_block) ++state.log_block;
    state.scales = at<float>(scales, chunk.offset >> state.log_block);
  }
}

// Return delta of a chunk beside a state in S; step_count is needed where it is written narrow.
template <class T, class S>
Delta<T, S> delta_of(const Bucket& bucket, const Chunk& chunk, const double* step_count) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  if constexpr (std::is_same_v<S, Code>) {
    Delta<T, S> delta = {};
    const Rounding rounding = rounding_of(tensor, chunk, step_count);
    describe(delta, tensor.delta, tensor.delta_scales, bucket, chunk, rounding);
    return delta;
  } else {
    const uint32_t first =
        rounding_seed(step_count, tensor.number) + uint32_t(tensor.element + chunk.offset);
    if (bucket.dtypes.delta == DType::kBFloat16) {
      return {nullptr, at<BFloat16>(tensor.delta, chunk.offset), first};
    }
    return {at<T>(tensor.delta, chunk.offset), nullptr, first};
  }
}

// Return the base's state of a chunk; step_count is needed where it is narrower than T.
template <class T, class S>
States<T, S> states_of(const Bucket& bucket, const Chunk& chunk, const double* step_count) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  States<T, S> states = {};
  const Rounding rounding = rounding_of(tensor, chunk, step_count);
  describe(states.first, tensor.state0, tensor.scales0, bucket, chunk, rounding);
  describe(states.second, tensor.state1, tensor.scales1, bucket, chunk, rounding);
  return states;
}

// Return x of a chunk, as a step of the running form writes it.
template <class X>
Weights<X> weights_of(const Bucket& bucket, const Chunk& chunk, const double* step_count) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  return {at<X>(tensor.weight, chunk.offset), at<int16_t>(tensor.x_low, chunk.offset),
          rounding_of(tensor, chunk, step_count)};
}

// Return the arrays of a chunk of the running form.
template <class X, class S>
StepStreams<X, S> streams_of(const Bucket& bucket, const Chunk& chunk, const double* step_count) {
  const Tensor& tensor = bucket.tables.tensors[chunk.tensor];
  const KeptBlocks kept = kept_blocks(tensor, chunk.offset);
  return {at<X>(tensor.gradient, chunk.offset), weights_of<X>(bucket, chunk, step_count),
          at<X>(tensor.x_ref, kept.first), states_of<opmath_t<X>, S>(bucket, chunk, step_count),
          kept};
}

// Call run(base, weight, state): the base's update and a value of each dtype, whose types count.
template <class Run>
void for_types(const Bucket& bucket, Run run) {
  for_kind(bucket.kind, [&](auto base) {
    for_stored(bucket.dtypes, [&](auto weight, auto state) {
      // Without a state there is nothing whose dtype could differ.
      using T = opmath_t<decltype(weight)>;
      using S = std::conditional_t<(decltype(base)::kStates > 0), decltype(state), T>;
      run(base, weight, S());
    });
  });
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
inline void advance_steps(const Bucket& bucket) {
  for (int64_t i = 0; i < bucket.counts.tensors; ++i) {
    const Tensor& tensor = bucket.tables.tensors[i];
    if (tensor.gradient != 0 && tensor.step != 0) *at<float>(tensor.step, 0) += 1;
  }
}

}  // namespace mechanic::cpu
