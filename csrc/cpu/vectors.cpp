// The vector verbs as loops over chunks. Products and their sums are in double from the start:
// angles near 0 need it, and these passes come once in many steps.
#include "blocks.h"
#include "cpu.h"

namespace mechanic::cpu {
// x = round(w - c d); x and w may be the same.
template <class X>
MECHANIC_CLONES void step_along_run(X* x, const X* w, const Wide<X>* __restrict d, int64_t n,
                                  Wide<X> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(stepped_along(Wide<X>(widen(w[i])), c, d[i]), x[i]);
}

// s = a s + c x, or c x without reading s.
template <class X>
MECHANIC_CLONES void axpby_run(Wide<X>* __restrict s, const X* __restrict x, int64_t n, bool reads,
                             Wide<X> a, Wide<X> c) {
  if (!reads) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) s[i] = c * widen(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) s[i] = a * s[i] + c * widen(x[i]);
  }
}

// lanes.ab += (a - b).s, lanes.aa += (a - b).(a - b); s = a - b.
template <class X>
MECHANIC_CLONES void difference_dots_run(Wide<X>* __restrict s, const X* __restrict a, const X* __restrict b,
                              int64_t n, Lanes& out) {
  alignas(64) Wide<X> fresh[kBlock];
  Lanes lanes = {};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int length = int(n - i < kBlock ? n - i : kBlock);
    for (int l = 0; l < length; ++l) fresh[l] = widen(a[i + l]) - widen(b[i + l]);
    add_products_wide(fresh, s + i, length, lanes);
    memcpy(s + i, fresh, length * sizeof(*s));
  }
  out = lanes;
}

// gl.ab += g.l, gl.aa += g.g; lp.ab += g.p, lp.aa += l.l.
template <class X>
MECHANIC_CLONES void dots_run(const X* __restrict g, const X* __restrict l,
                              const Wide<X>* __restrict p, int64_t n, Lanes& gl, Lanes& lp) {
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

// The largest magnitude; NaN if there is one.
template <class X>
MECHANIC_CLONES double abs_max_run(const X* a, int64_t n) {
  Wide<X> most = 0;
  int bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const Wide<X> size = std::fabs(Wide<X>(widen(a[i])));
    most = size > most ? size : most;
    bad |= size != size;
  }
  return bad ? NAN : double(most);
}

// x = round(x + u) and m moved on; the largest magnitude of the new m, NaN if there is one.
template <class X>
MECHANIC_CLONES double adarem_run(X* __restrict x, const X* __restrict g, Wide<X>* __restrict m,
                                  int64_t n, const AdaRem<Wide<X>>& rule) {
  using T = Wide<X>;
  const AdaRem<T> r = rule;
  T most = 0;
  int bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const T weight = widen(x[i]);
    T moved = m[i];
    narrow(weight + r.update(finite_or_zero(T(widen(g[i]))), weight, moved), x[i]);
    m[i] = moved;
    const T size = std::fabs(moved);
    most = size > most ? size : most;
    bad |= size != size;
  }
  return bad ? NAN : double(most);
}

namespace {

template <class T>
T* stream(const Vectors& vectors, const Chunk& chunk, int number) {
  return reinterpret_cast<T*>(vectors.streams[chunk.tensor].at[number]) + chunk.offset;
}

// Call work(x, chunk, partial) for all chunks, x being a number of the narrow streams' dtype.
template <class Work>
void for_chunks(const Vectors& vectors, int threads, Work work) {
  for_weight(vectors.dtype, [&](auto x) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (vectors.elements >= kSerial)
    for (int64_t i = 0; i < vectors.chunk_count; ++i) {
      work(x, vectors.chunks[i], vectors.partials[i].value);
    }
  });
}

}  // namespace

void step_along(const Vectors& vectors, const double* c, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double*) {
    using X = decltype(narrowest);
    step_along_run(stream<X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
                 stream<const Wide<X>>(vectors, chunk, 2), chunk.length, Wide<X>(*c));
  });
}

void axpby(const Vectors& vectors, double a, double c, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double*) {
    using X = decltype(narrowest);
    axpby_run(stream<Wide<X>>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1), chunk.length,
            a != 0, Wide<X>(a), Wide<X>(c));
  });
}

void difference_dots(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double* partial) {
    using X = decltype(narrowest);
    Lanes lanes;
    difference_dots_run(stream<Wide<X>>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
             stream<const X>(vectors, chunk, 2), chunk.length, lanes);
    partial[0] = fold(lanes.ab);
    partial[1] = fold(lanes.aa);
  });
}

void dots(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double* partial) {
    using X = decltype(narrowest);
    Lanes gl, lp;
    dots_run(stream<const X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
             stream<const Wide<X>>(vectors, chunk, 2), chunk.length, gl, lp);
    partial[0] = fold(gl.aa);
    partial[1] = fold(gl.ab);
    partial[2] = fold(lp.aa);
    partial[3] = fold(lp.ab);
  });
}

void abs_max(const Vectors& vectors, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double* partial) {
    using X = decltype(narrowest);
    partial[0] = abs_max_run(stream<const X>(vectors, chunk, 0), chunk.length);
  });
}

void adarem(const Vectors& vectors, const AdaRemOptions& o, const double* peaks, int threads) {
  for_chunks(vectors, threads, [&](auto narrowest, const Chunk& chunk, double* partial) {
    using X = decltype(narrowest);
    using T = Wide<X>;
    const double reach = o.boost / (peaks[chunk.tensor] + o.eps);
    const AdaRem<T> rule = {T(o.lr), T(o.beta), T(1 - o.beta), T(reach), T(o.decay)};
    partial[0] = adarem_run(stream<X>(vectors, chunk, 0), stream<const X>(vectors, chunk, 1),
                            stream<T>(vectors, chunk, 2), chunk.length, rule);
  });
}

}  // namespace mechanic::cpu
