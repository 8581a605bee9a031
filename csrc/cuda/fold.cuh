// Partial sums of chunks become the sums of scales, in an order that depends on the table alone.
//
// A scale's chunks lie together. They are folded in groups of kGroup by the last block of each
// group, and the groups by the last block of the scale, so that no block ever reads a long list
// alone. "Last" is decided by integer tickets, which their last user puts back to 0.
#pragma once

#include "cuda.h"
#include "launch.cuh"

namespace mechanic::cuda {

struct Pair {
  double first, second;
};

__device__ __forceinline__ Pair operator+(Pair a, Pair b) {
  return {a.first + b.first, a.second + b.second};
}

// Return the block's total, in every thread. Contains barriers: every thread calls it.
__device__ __forceinline__ Pair block_total(Pair sum) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Pair warps[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum = sum + Pair{__shfl_down_sync(~0u, sum.first, distance),
                     __shfl_down_sync(~0u, sum.second, distance)};
  }
  __syncthreads();  // an earlier total may still be in use
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warps[0];
  for (int i = 1; i < kWarps; ++i) sum = sum + warps[i];
  return sum;
}

// Return, in every thread, whether this block is the last of `count` to come here.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, int64_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // what this thread has written comes before its ticket
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
    __threadfence();  // and what the others have written before theirs is seen after it
  }
  __syncthreads();
  const bool is_last = last;
  __syncthreads();
  return is_last;
}

// Visit, in one thread each, the scales that have no chunk here: no block will hand in for them.
template <class Visit>
__device__ __forceinline__ void for_empty_scales(const Bucket& bucket, const Reduction& folding,
                                                 Visit visit) {
  if (blockIdx.x != 0) return;
  for (int64_t scale = threadIdx.x; scale < bucket.scale_count; scale += kThreads) {
    if (folding.spans[scale].chunks == 0) visit(scale);
  }
}

// Two columns of the sums, or one: then the second of a pair means nothing.
template <double Sums::* kFirst, double Sums::* kSecond = nullptr>
struct Columns {
  static __device__ void write(Sums* row, Pair sum) {
    row->*kFirst = sum.first;
    if constexpr (kSecond != nullptr) row->*kSecond = sum.second;
  }

  // Past the first-level cache, which knows nothing of what other blocks write.
  static __device__ Pair read(const Sums* row) {
    Pair sum = {__ldcg(&(row->*kFirst)), 0};
    if constexpr (kSecond != nullptr) sum.second = __ldcg(&(row->*kSecond));
    return sum;
  }

  // Total of `count` rows that are `stride` apart.
  static __device__ Pair total(const Sums* rows, int64_t count, int64_t stride) {
    Pair sum = {0, 0};
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = sum + read(rows + i * stride);
    return block_total(sum);
  }

  // Hand in a block's sum for one chunk of a scale. Return true in every thread of the scale's
  // last block: its sums are there then, and all its chunks are done.
  static __device__ bool reduce_chunk(const Bucket& bucket, const Reduction& folding, int64_t number,
                                 int64_t scale, Pair sum) {
    const Span span = folding.spans[scale];
    if (span.chunks == 1) {
      if (threadIdx.x == 0) write(bucket.sums + scale, sum);
      return true;
    }
    Sums* const first = bucket.partials + span.first_chunk;
    if (threadIdx.x == 0) write(bucket.partials + number, sum);
    const int64_t group = (number - span.first_chunk) / kGroup * kGroup;
    const int64_t members = min(kGroup, span.chunks - group);
    const int64_t groups = (span.chunks + kGroup - 1) / kGroup;
    // No two groups share a ticket: in a scale their first chunks are kGroup apart, and every scale
    // before adds one.
    unsigned* const tickets = folding.tickets + scale;
    if (!is_last_block(tickets + (span.first_chunk + group) / kGroup, members)) return false;
    sum = total(first + group, members, 1);
    if (groups > 1) {
      if (threadIdx.x == 0) write(first + group, sum);
      const int64_t group_tickets = bucket.chunk_count / kGroup + bucket.scale_count;
      if (!is_last_block(tickets + group_tickets, groups)) return false;
      sum = total(first, groups, kGroup);
    }
    if (threadIdx.x == 0) write(bucket.sums + scale, sum);
    return true;
  }
};

}  // namespace mechanic::cuda
