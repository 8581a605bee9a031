// The sums of scales, from the partial sums of their chunks, in an order that depends on the tables
// alone.
//
// The chunks of a scale are adjacent. The last block of each group of kGroup chunks adds up that
// group, and the last block of the scale adds up the groups, so no block ever reads a long list
// alone. Integer tickets decide which block is the last; it resets its ticket to 0.
#pragma once

#include "cuda.h"
#include "launch.cuh"

namespace mechanic::cuda {

// Sums that are taken at once.
template <int N>
struct Totals {
  double of[N];
};

template <int N>
__device__ __forceinline__ Totals<N> operator+(Totals<N> a, const Totals<N>& b) {
#pragma unroll
  for (int k = 0; k < N; ++k) a.of[k] += b.of[k];
  return a;
}

// Return the totals over the block, in every thread. Contains barriers: every thread must call it.
template <int N>
__device__ __forceinline__ Totals<N> block_total(Totals<N> sum) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Totals<N> warps[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Totals<N> other;
#pragma unroll
    for (int k = 0; k < N; ++k) other.of[k] = __shfl_down_sync(~0u, sum.of[k], distance);
    sum = sum + other;
  }
  __syncthreads();  // the warps' sums of an earlier total may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warps[0];
  for (int i = 1; i < kWarps; ++i) sum = sum + warps[i];
  return sum;
}

// Return, in every thread, whether this block is the last of `count` blocks to draw this ticket.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, int64_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // this thread's writes become visible before its ticket
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
    __threadfence();  // and the other blocks' writes before theirs are visible after it
  }
  __syncthreads();
  const bool is_last = last;
  __syncthreads();
  return is_last;
}

// Scales without chunks: no block will ever reduce them. Visit each in one thread.
template <class Visit>
__device__ __forceinline__ void for_empty_scales(const Bucket& bucket, const Reduction& reduction,
                                                 Visit visit) {
  if (blockIdx.x != 0) return;
  for (int64_t scale = threadIdx.x; scale < bucket.counts.scales; scale += kThreads) {
    if (reduction.spans[scale].chunks == 0) visit(scale);
  }
}

// Some columns of the sums.
template <double Sums::*... kColumns>
struct SumColumns {
  using Total = Totals<int(sizeof...(kColumns))>;

  static __device__ void write(Sums* row, const Total& sum) {
    int k = 0;
    ((row->*kColumns = sum.of[k++]), ...);
  }

  // Past the first-level cache, which does not see the writes of other blocks.
  static __device__ Total read(const Sums* row) { return {__ldcg(&(row->*kColumns))...}; }

  // Return the totals of `count` rows that are `stride` apart.
  static __device__ Total total(const Sums* rows, int64_t count, int64_t stride) {
    Total sum = {};
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = sum + read(rows + i * stride);
    return block_total(sum);
  }

  // Store a block's sums, those of its first thread, as those of one chunk of a scale. Return true
  // in every thread of the scale's last block: then all its chunks are done and its sums are
  // written.
  static __device__ bool reduce_chunk(const Bucket& bucket, const Reduction& reduction,
                                      int64_t number, int64_t scale, Total sum) {
    const Span span = reduction.spans[scale];
    if (span.chunks == 1) {
      if (threadIdx.x == 0) write(bucket.tables.sums + scale, sum);
      return true;
    }
    Sums* const first = bucket.tables.partials + span.first_chunk;
    if (threadIdx.x == 0) write(bucket.tables.partials + number, sum);
    const int64_t group = (number - span.first_chunk) / kGroup * kGroup;
    const int64_t members = min(kGroup, span.chunks - group);
    const int64_t groups = (span.chunks + kGroup - 1) / kGroup;
    // No two groups share a ticket: the first chunks of a scale's groups are kGroup apart, and each
    // scale shifts its tickets by one.
    unsigned* const tickets = reduction.tickets + scale;
    if (!is_last_block(tickets + (span.first_chunk + group) / kGroup, members)) return false;
    sum = total(first + group, members, 1);
    if (groups > 1) {
      if (threadIdx.x == 0) write(first + group, sum);
      const int64_t group_tickets = bucket.counts.chunks / kGroup + bucket.counts.scales;
      if (!is_last_block(tickets + group_tickets, groups)) return false;
      sum = total(first, groups, kGroup);
    }
    if (threadIdx.x == 0) write(bucket.tables.sums + scale, sum);
    return true;
  }
};

}  // namespace mechanic::cuda
