// Every scalar formula of a step: registers in, registers out. backends/formulas.py and
// triton_kernels/formulas.py state the same formulas under the same names; each operation rounds
// once in all three.
#pragma once

#include <cmath>
#include <cstdint>

#include "chunk.h"
#include "storage.h"

namespace mechanic {

// min(1, max_norm / (N + 1e-6)) for clip = (N^2, max_norm), as torch's clip_grad_norm_ does.
MECHANIC_INLINE double clip_coefficient(const double* clip) {
  const double c = clip[1] / (std::sqrt(clip[0]) + 1e-6);
  return c < 1 ? c : 1;
}

// The factor of a gradient: -1 to maximize, over GradScaler's scale, times the clip coefficient. A
// null pointer leaves that factor out.
MECHANIC_INLINE double gradient_multiplier(const Hyper& h, const float* grad_scale,
                                           const double* clip) {
  double gradient = h.gradient;
  if (grad_scale != nullptr) gradient /= double(*grad_scale);
  if (clip != nullptr) gradient *= clip_coefficient(clip);
  return gradient;
}

// The peak lr over lr; 0 where lr is 0, so that there is no update to speak of.
MECHANIC_INLINE double peak_ratio(const Hyper& h) { return h.lr != 0 ? h.peak_lr / h.lr : 0; }

// The scalars of one update: computed in double once a chunk, then rounded to T. Their order
// decides which of them a GPU reads together: with another one, a kernel of step.cuh spilled.
template <class T>
struct Coefficients {
  T gradient;      // multiplies g, see gradient_multiplier
  T beta1, rest1;  // rest1 = 1 - beta1, or SGD's 1 - dampening
  T nesterov;      // 1 or 0; as a bool it would keep the loops over elements from vectorizing
  T beta2, rest2;
  T eps, l2;
  T rate;         // lr, for Adam over its first bias correction
  T decay;        // lr * decoupled weight decay
  T correction2;  // Adam's 1 / sqrt(1 - beta2^t)

  // Whether the update has a term of x.
  MECHANIC_INLINE bool reads_x() const { return l2 != T(0) || decay != T(0); }
};

template <class T>
MECHANIC_INLINE Coefficients<T> plain_coefficients(const Hyper& h) {
  Coefficients<T> c;
  c.gradient = T(h.gradient);
  c.beta1 = T(h.beta1);
  c.rest1 = T(1 - h.beta1);
  c.beta2 = T(h.beta2);
  c.rest2 = T(1 - h.beta2);
  c.eps = T(h.eps);
  c.l2 = T(h.l2);
  c.rate = T(h.lr);
  c.decay = T(h.lr * h.decay);
  c.correction2 = T(1);
  c.nesterov = T(h.nesterov != 0);
  return c;
}

// a + c x. Where x is given though c may be 0, an infinite x must not spoil the sum.
template <bool kMayBeZero, class T>
MECHANIC_INLINE T add_scaled(T a, T c, T x) {
  return !kMayBeZero || c != T(0) ? a + c * x : a;
}

// u = -lr (g + l2 x)
struct Sgd {
  static constexpr int kStates = 0;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double) {
    return plain_coefficients<T>(h);
  }

  template <bool kAnyX, class T>
  static MECHANIC_INLINE T update(T g, T x, T&, T&, const Coefficients<T>& c) {
    return -(c.rate * add_scaled<kAnyX>(g, c.l2, x));
  }
};

// buffer = mu buffer + (1 - dampening) d, at first d; u = -lr buffer, or Nesterov's
struct Momentum {
  static constexpr int kStates = 1;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double step) {
    Coefficients<T> c = plain_coefficients<T>(h);
    c.rest1 = step == 0 ? T(1) : T(1 - h.beta2);
    return c;
  }

  template <bool kAnyX, class T>
  static MECHANIC_INLINE T update(T g, T x, T& buffer, T&, const Coefficients<T>& c) {
    const T d = add_scaled<kAnyX>(g, c.l2, x);
    buffer = c.beta1 * buffer + c.rest1 * d;
    return -(c.rate * (c.nesterov != T(0) ? d + c.beta1 * buffer : buffer));
  }
};

// u = -lr/(1-beta1^t) m / (sqrt(v)/sqrt(1-beta2^t) + eps) - lr decay x, as torch's Adam and AdamW
struct Adam {
  static constexpr int kStates = 2;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double step) {
    Coefficients<T> c = plain_coefficients<T>(h);
    c.rate = T(h.lr / (1 - pow(h.beta1, step + 1)));
    c.correction2 = T(1 / sqrt(1 - pow(h.beta2, step + 1)));
    return c;
  }

  template <bool kAnyX, class T>
  static MECHANIC_INLINE T update(T g, T x, T& m, T& v, const Coefficients<T>& c) {
    // Beside a decoupled decay, too, x is given where l2 is 0.
    g = add_scaled<true>(g, c.l2, x);
    m = c.beta1 * m + c.rest1 * g;
    v = c.beta2 * v + c.rest2 * (g * g);
    const T direction = (c.rate * m) / (std::sqrt(v) * c.correction2 + c.eps);
    return add_scaled<kAnyX>(-direction, -c.decay, x);
  }
};

// u = -lr (sign(beta1 m + (1-beta1) g) + decay x); m = beta2 m + (1-beta2) g
// Source: arXiv 2302.06675.
struct Lion {
  static constexpr int kStates = 1;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double) {
    return plain_coefficients<T>(h);
  }

  template <bool kAnyX, class T>
  static MECHANIC_INLINE T update(T g, T x, T& m, T&, const Coefficients<T>& c) {
    const T mixed = c.beta1 * m + c.rest1 * g;
    const T direction = T(mixed > 0) - T(mixed < 0);
    m = c.beta2 * m + c.rest2 * g;
    return add_scaled<kAnyX>(-(c.rate * direction), -c.decay, x);
  }
};

// buffer = mu buffer + (1-mu) g, and n = mu buffer + (1-mu) g, or buffer; of n comes O, and
// u = -lr (d + decay x) of d = ratio O.
// Source: kellerjordan.github.io/posts/muon.
struct Muon {
  static constexpr int kStates = 1;

  template <class T>
  static MECHANIC_INLINE T momentum(T g, T& buffer, const Coefficients<T>& c) {
    const T added = c.rest1 * g;
    buffer = c.beta1 * buffer + added;
    return c.nesterov != T(0) ? c.beta1 * buffer + added : buffer;
  }

  template <class T>
  static MECHANIC_INLINE T update(T d, T x, const Coefficients<T>& c) {
    return add_scaled<true>(-(c.rate * d), -c.decay, x);
  }
};

// Call run with the update of this kind.
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

// g, or 0 where it is NaN or infinite.
template <class T>
MECHANIC_INLINE T finite_or_zero(T g) {
  return g - g == T(0) ? g : T(0);
}

// The hash "lowbias32"; each bit depends on every input bit.
// Source: C. Wellons, Prospecting for Hash Functions, 2018.
MECHANIC_INLINE uint32_t hash32(uint32_t n) {
  n = (n ^ (n >> 16)) * 0x7feb352du;
  n = (n ^ (n >> 15)) * 0x846ca68bu;
  return n ^ (n >> 16);
}

// The seed of the random bits of weight `number` after *step_count steps; 0 without a step count,
// where nothing is rounded stochastically.
MECHANIC_INLINE uint32_t rounding_seed(const double* step_count, int64_t number) {
  if (step_count == nullptr) return 0;
  return hash32(hash32(uint32_t(int64_t(*step_count))) + uint32_t(number));
}

// 16 random bits for an element, given its index in the weight's storage: the upper half of the
// hash, which the last step of hash32 does not change.
MECHANIC_INLINE uint32_t random_bits16(uint32_t seed, uint32_t element) {
  uint32_t n = element + seed;
  n = (n ^ (n >> 16)) * 0x7feb352du;
  return ((n ^ (n >> 15)) * 0x846ca68bu) >> 16;
}

// Round away from zero with probability equal to the discarded fraction, given 16 random bits. x is
// the result of an operation, so its NaNs are quiet: they stay NaN when their low bits are cut off,
// but adding to them could turn them into numbers.
MECHANIC_INLINE BFloat16 stochastic_round(uint32_t bits, float x) {
  return {uint16_t((bit_cast<uint32_t>(x) + (x == x ? bits : 0)) >> 16)};
}

// x_ref + S delta
template <class T>
MECHANIC_INLINE T apply_scale(T x_ref, T s, T delta) {
  return x_ref + s * delta;
}

// x + S u
template <class T>
MECHANIC_INLINE T apply_update(T x, T s, T u) {
  return x + s * u;
}

// w - c d
template <class T>
MECHANIC_INLINE T step_along(T w, T c, T d) {
  return w - c * d;
}

// b = sign(g) m / (max|m| + eps); u = -lr ((1 + boost b) g + decay x); m = beta m + (1 - beta) g
template <class T>
struct AdaRem {
  T lr, beta, rest;  // rest = 1 - beta
  T gain;            // boost / (max|m| + eps)
  T decay;

  MECHANIC_INLINE T update(T g, T x, T& m) const {
    const T sign = T(g > 0) - T(g < 0);
    const T adjusted = (T(1) + gain * (sign * m)) * g;
    m = beta * m + rest * g;
    return -(lr * (adjusted + decay * x));
  }
};

// S = sum of s, in the order of the tuner betas
MECHANIC_INLINE double total_scale(const double* s, int64_t betas) {
  double sum = s[0];
  for (int64_t i = 1; i < betas; ++i) sum = sum + s[i];
  return sum;
}

// h = g.delta + lambda S sqrt(g.g) / (sqrt(x.x) + eps) x.delta
MECHANIC_INLINE double tuner_h(const Sums& sums, double scale, double decay, double eps) {
  return sums.gd + decay * scale * std::sqrt(sums.gg) / (std::sqrt(sums.xx) + eps) * sums.xd;
}

// Update s, r, v, m of one scale. c: the constants, then the tuner betas.
// h' = clamp(h, -m, m) or h; m = max(beta m, |h| + eps or |h|); v = beta^2 v + h^2;
// r = beta r - h' s, clamped at 0 in some variants;
// s = ((s_init / n) m + max(0, r)) / (sqrt(v) + eps), or a fraction of that move
MECHANIC_INLINE void tuner_update(double h, double* s, double* r, double* v, double* m,
                                  const double* c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double beta = c[kBetas + i];
    const double reward_h = c[kClampsH] != 0 ? fmax(fmin(h, m[i]), -m[i]) : h;
    m[i] = fmax(beta * m[i], std::fabs(h) + (c[kEpsInM] != 0 ? c[kEps] : 0));
    v[i] = beta * beta * v[i] + h * h;
    r[i] = beta * r[i] - reward_h * s[i];
    if (c[kFloorsR] != 0) r[i] = fmax(r[i], 0.0);
    const double s_new =
        (c[kSInit] / double(n) * m[i] + fmax(r[i], 0.0)) / (std::sqrt(v[i]) + c[kEps]);
    s[i] = c[kAnnealingFactor] < 1 ? s[i] + c[kAnnealingFactor] * (s_new - s[i]) : s_new;
  }
}

// Update one row of the tuner's state from the sums of its scale; return whether they and h were
// finite. If not, the row keeps its numbers, but the step counts.
MECHANIC_INLINE bool tune_row(const Sums& sums, double* row, const double* c, int64_t n) {
  double *s = row + kS * n, *r = row + kR * n, *v = row + kV * n, *m = row + kM * n;
  double* counters = row + kTunerBlocks * n;
  const double h = tuner_h(sums, total_scale(s, n), c[kDecay], c[kEps]);
  const bool finite = std::isfinite(sums.gd) && std::isfinite(sums.xd) && std::isfinite(sums.gg) &&
                      std::isfinite(sums.xx) && std::isfinite(h);
  counters[kSteps] += 1;
  if (!finite || c[kTunesScale] == 0) return finite;
  tuner_update(h, s, r, v, m, c, n);
  return true;
}

// 0 where none was observed, which is no loss to learn from.
MECHANIC_INLINE double mean_loss(const Losses& losses) {
  return losses.count > 0 ? losses.sum / losses.count : 0;
}

// What all scales have in common: |g| |u|, the number of elements, and the loss of this step.
struct WholeModel {
  double power, size, loss;
};

// S with S |u| = norm_share |x| / cbrt(n): the more elements (n), the less each may move. |u| is a
// geometric mean over the last steps, as is |u| / |g|.
MECHANIC_INLINE double norm_estimate(const Sums& sums, const WholeModel& model, LogRow& row,
                                     const LogConstants& c) {
  const double norm = fmax(std::sqrt(sums.xx), c.least_rms * std::sqrt(sums.count));
  row.weight += (1 - row.weight) / c.average;
  const double ln_update = 0.5 * std::log(sums.uu), memory = c.average * row.weight;
  row.ln_update += (ln_update - row.ln_update) / memory;
  row.ln_ratio += (ln_update - 0.5 * std::log(sums.gg) - row.ln_ratio) / memory;
  return c.norm_share * norm * std::exp(-row.ln_update - std::log(model.size) / 3);
}

// S with S |g| |u| = anchor_share loss, geometric means over the steps so far; 0: unknown.
MECHANIC_INLINE double loss_estimate(const LogRow& row, const LogConstants& c) {
  // No double is larger than the exponential of 709.
  return row.anchors > 0 ? c.anchor_share * std::exp(fmin(row.ln_anchor, 709.0)) : 0;
}

// The geometric mean of the two; by the loss (0: unknown) it counts within a factor of that by
// norms.
MECHANIC_INLINE double joint_estimate(double by_loss, double norm, const LogConstants& c) {
  if (by_loss == 0) return norm;
  return std::sqrt(fmin(fmax(by_loss, norm / c.loss_range), c.loss_range * norm) * norm);
}

// The start of the running form, between two estimates: a step lowers the loss by no more than a
// share of it, by Cauchy and Schwarz, and a step is a share of the weights' norm; without a loss
// the latter alone. A scale that was set before any estimate is the user's, and stays.
MECHANIC_INLINE void estimate_scale(const Sums& sums, const WholeModel& model, LogRow& row,
                                    const LogConstants& c) {
  row.factor = fmax(row.factor, c.factor);
  if (row.weight == 0 && row.scale > 0) return;
  const double norm = norm_estimate(sums, model, row, c);
  row.start_ratio = row.ln_ratio;
  if (model.loss > 0 && std::isfinite(model.loss) && model.power > 0 &&
      std::isfinite(model.power)) {
    row.anchors += 1;
    const double decrease = std::log(model.loss) - std::log(model.power);
    row.ln_anchor += (decrease - row.ln_anchor) / row.anchors;
  }
  row.scale = row.start = fmin(joint_estimate(loss_estimate(row, c), norm, c), kMostScale);
}

// z = clamp(-h / sqrt(v), -1, 1) for h = g.(x - x_ref), v a mean square over the later steps;
// ln S += min(max_move, gain / (t + 1)) (z + bias). One h counts at most `outlier` deviations.
MECHANIC_INLINE void log_tuner_update(double h, LogRow& row, const LogConstants& c) {
  const double limit = c.outlier * std::sqrt(row.mean_square);
  if (limit > 0) h = fmax(fmin(h, limit), -limit);
  row.mean_square += (h * h - row.mean_square) / (1 + row.moves / c.memory);
  row.moves += 1;
  if (!(row.mean_square > 0)) return;
  const double z = fmax(fmin(-h / std::sqrt(row.mean_square), 1.0), -1.0);
  row.scale *= std::exp(fmin(c.max_move, c.gain / (row.informed + 1)) * (z + c.bias));
}

// Let S learn from h within bounds: S lr does not grow above a multiple of where it started, or of
// more where the base has since come to make less of a gradient, as Adagrad does; without a loss,
// of the estimate by the norms as they are now. Where a schedule rises again it stays below a
// multiple of what it has been.
MECHANIC_INLINE void learn_scale(const Sums& sums, const WholeModel& model, bool rises, LogRow& row,
                                 const LogConstants& c) {
  if (row.learns == 0 && row.weight > 0 && c.factor < row.factor) {
    // The lr has risen to a fraction of the peak that the estimate was for, and falls.
    row.scale /= row.factor;
  }
  row.learns = 1;
  row.factor = c.factor;
  const double before = row.scale;
  log_tuner_update(sums.gd, row, c);
  if (row.weight > 0) {
    const double norm = norm_estimate(sums, model, row, c);
    const double shrunk = std::exp(fmin(fmax(row.start_ratio - row.ln_ratio, 0.0), 709.0));
    const double ceiling = row.anchors > 0 ? c.ceiling * row.start * shrunk : c.norm_ceiling * norm;
    row.scale = fmin(row.scale, fmax(before, ceiling / c.factor));
  }
  if (rises && row.peak_rate > 0) {
    row.scale = fmin(row.scale, c.regrowth * row.peak_rate / c.factor);
  }
}

// Update one row of the log tuner's state from the sums of its scale; return whether they were
// finite. While the lr rises to its peak, and in the first steps, S is an estimate; then it learns.
MECHANIC_INLINE bool log_tune_row(const Sums& sums, const WholeModel& model, LogRow& row,
                                  const LogConstants& c) {
  row.steps += 1;
  const bool finite = std::isfinite(sums.gd) && std::isfinite(sums.gg) && std::isfinite(sums.xx) &&
                      std::isfinite(sums.uu) && std::isfinite(sums.gd * sums.gd);
  if (!finite) return false;
  const bool stays = c.tunes_scale == 0 && row.scale > 0;
  if (stays || !(sums.gg > 0 && sums.uu > 0)) return true;
  const bool rises = c.factor > row.factor * (1 + 1e-6);  // and not by a rounding
  row.informed += 1;
  if (row.learns == 0 && (rises || row.informed <= c.held)) {
    estimate_scale(sums, model, row, c);
    row.peak_rate = fmax(row.peak_rate, row.scale);
  } else {
    learn_scale(sums, model, rises, row, c);
    row.peak_rate = fmax(row.peak_rate, row.scale * c.factor);
  }
  return true;
}

}  // namespace mechanic
