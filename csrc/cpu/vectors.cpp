// The vector ops as loops over chunks. Products and their sums are in double from the start: angles
// near 0 need it, and these passes run once in many steps.
#include "blocks.h"
#include "cpu.h"

namespace mechanic::cpu {

// x = round(w - c d); x and w may be the same.
template <class X>
MECHANIC_CLONES void step_along_chunk(X* x, const X* w, const opmath_t<X>* __restrict d, int64_t n,
                                      opmath_t<X> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    narrow(mechanic::step_along(opmath_t<X>(widen(w[i])), c, d[i]), x[i]);
  }
}

// s = a s + c x, or c x without reading s.
template <class X>
MECHANIC_CLONES void axpby_chunk(opmath_t<X>* __restrict s, const X* __restrict x, int64_t n,
                                 bool reads_s, opmath_t<X> a, opmath_t<X> c) {
  if (!reads_s) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) s[i] = c * widen(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) s[i] = a * s[i] + c * widen(x[i]);
  }
}

// lanes.ab += (a - b).s, lanes.aa += (a - b).(a - b); s = a - b.
template <class X>
MECHANIC_CLONES void difference_dots_chunk(opmath_t<X>* __restrict s, const X* __restrict a,
                                           const X* __restrict b, int64_t n, Lanes& out) {
  alignas(64) opmath_t<X> difference[kBlock];
  Lanes lanes = {};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int length = int(n - i < kBlock ? n - i : kBlock);
    for (int l = 0; l < length; ++l) difference[l] = widen(a[i + l]) - widen(b[i + l]);
    add_products_wide(difference, s + i, length, lanes);
    memcpy(s + i, difference, length * sizeof(*s));
  }
  out = lanes;
}

// gl.ab += g.l, gl.aa += g.g; lp.ab += g.p, lp.aa += l.l.
template <class X>
MECHANIC_CLONES void dots_chunk(const X* __restrict g, const X* __restrict l,
                                const opmath_t<X>* __restrict p, int64_t n, Lanes& gl, Lanes& lp) {
  Lanes first = {}, second = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int length = int(n - i < kLanes ? n - i : kLanes);
    for (int k = 0; k < length; ++k) {
      const auto a = double(widen(g[i + k])), b = double(widen(l[i + k]));
      first.ab[k] += a * b;
      first.aa[k] += a * a;
      second.ab[k] += a * double(p[i + k]);
      second.aa[k] += b * b;
    }
  }
  gl = first;
  lp = second;
}

// Return the largest magnitude, NaN if any element is NaN.
template <class X>
MECHANIC_CLONES double abs_max_chunk(const X* a, int64_t n) {
  opmath_t<X> largest = 0;
  int is_nan = 0;
#pragma omp simd reduction(max : largest) reduction(| : is_nan)
  for (int64_t i = 0; i < n; ++i) {
    const opmath_t<X> size = std::fabs(opmath_t<X>(widen(a[i])));
    largest = size > largest ? size : largest;
    is_nan |= size != size;
  }
  return is_nan ? NAN : double(largest);
}

// x = round(x + u), m = the new m; return its largest magnitude, NaN if any element is NaN.
template <class X>
MECHANIC_CLONES double adarem_chunk(X* __restrict x, const X* __restrict g,
                                    opmath_t<X>* __restrict m, int64_t n,
                                    const AdaRem<opmath_t<X>>& rule) {
  using T = opmath_t<X>;
  const AdaRem<T> r = rule;
  T largest = 0;
  int is_nan = 0;
#pragma omp simd reduction(max : largest) reduction(| : is_nan)
  for (int64_t i = 0; i < n; ++i) {
    const T weight = widen(x[i]);
    T m_new = m[i];
    narrow(weight + r.update(finite_or_zero(T(widen(g[i]))), weight, m_new), x[i]);
    m[i] = m_new;
    const T size = std::fabs(m_new);
    largest = size > largest ? size : largest;
    is_nan |= size != size;
  }
  return is_nan ? NAN : double(largest);
}

namespace {

template <class T>
T* stream(const Vectors& vectors, const Chunk& chunk, int number) {
  return reinterpret_cast<T*>(vectors.streams[chunk.tensor].address[number]) + chunk.offset;
}

// Call work(x, chunk, partial) for all chunks, where x is a number of the weights' dtype.
template <class Work>
void for_chunks(const Vectors& vectors, int threads, Work work) {
  const bool parallel = vectors.elements >= kSerialElements;
  for_dtype(vectors.dtype, [&](auto x) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parallel)
    for (int64_t i = 0; i < vectors.chunk_count; ++i) {
      work(x, vectors.chunks[i], vectors.partials[i].value);
    }
  });
}

}  // namespace

void step_along(const Vectors& vectors, const double* c, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double*) {
    using X = decltype(weight);
    step_along_chunk(stream<X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
                     stream<const opmath_t<X>>(vectors, chunk, 2), chunk.length, opmath_t<X>(*c));
  });
}

void axpby(const Vectors& vectors, double a, double c, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double*) {
    using X = decltype(weight);
    axpby_chunk(stream<opmath_t<X>>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
                chunk.length, a != 0, opmath_t<X>(a), opmath_t<X>(c));
  });
}

void difference_dots(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double* partial) {
    using X = decltype(weight);
    Lanes lanes;
    difference_dots_chunk(stream<opmath_t<X>>(vectors, chunk, 0),
                          stream<const X>(vectors, chunk, 1), stream<const X>(vectors, chunk, 2),
                          chunk.length, lanes);
    partial[0] = reduce_lanes(lanes.ab);
    partial[1] = reduce_lanes(lanes.aa);
  });
}

void dots(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double* partial) {
    using X = decltype(weight);
    Lanes gl, lp;
    dots_chunk(stream<const X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
               stream<const opmath_t<X>>(vectors, chunk, 2), chunk.length, gl, lp);
    partial[0] = reduce_lanes(gl.aa);
    partial[1] = reduce_lanes(gl.ab);
    partial[2] = reduce_lanes(lp.aa);
    partial[3] = reduce_lanes(lp.ab);
  });
}

void abs_max(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double* partial) {
    using X = decltype(weight);
    partial[0] = abs_max_chunk(stream<const X>(vectors, chunk, 0), chunk.length);
  });
}

void adarem(const Vectors& vectors, const AdaRemOptions& o, const double* peaks, int threads) {
  for_chunks(vectors, threads, [&](auto weight, const Chunk& chunk, double* partial) {
    using X = decltype(weight);
    using T = opmath_t<X>;
    const double gain = o.boost / (peaks[chunk.tensor] + o.eps);
    const AdaRem<T> rule = {T(o.lr), T(o.beta), T(1 - o.beta), T(gain), T(o.decay)};
    partial[0] = adarem_chunk(stream<X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
                              stream<T>(vectors, chunk, 2), chunk.length, rule);
  });
}

}  // namespace mechanic::cpu
