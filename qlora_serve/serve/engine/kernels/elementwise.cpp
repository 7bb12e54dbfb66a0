// What stands between a model's matrix products, for float32 on a CPU: each in one pass over its rows,
// where torch takes up to eight.

#include <atomic>

#include "team.h"
#include "vectors.h"

namespace {

// Floats in one piece: with fewer, threads would take longer to meet than to work.
constexpr int64_t kWorthThreads = 1 << 14;

// Calls work(first, last) for pieces of [0, count) things of `size` floats each.
template <typename Work>
void in_pieces(int64_t count, int64_t size, const Work& work) {
  const int64_t own = std::max<int64_t>(1, kWorthThreads / size);
  team::parallel((count + own - 1) / own,
                 [&](int64_t n) { work(n * own, std::min(count, (n + 1) * own)); });
}

// x / (1 + e^-x), without ever raising e to a positive power.
inline Vector silu(Vector x) {
  const Vector e = exponential(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : Vector{} + 1.0f) / (1.0f + e);
}

// The largest of n numbers, NaN if one is, and where the first such is (undefined with NaN).
float largest_of(const float* x, int64_t n, int64_t* place) {
  float found = x[0];
  int64_t at = 0, i = 0;
  bool has_nan = false;
  if (n >= kWidth) {
    Vector best = load(x);
    Integers places = lanes(), not_equal = best != best;
    for (i = kWidth; i + kWidth <= n; i += kWidth) {
      const Vector v = load(x + i);
      const Integers is_more = v > best;
      not_equal |= v != v;
      places = is_more ? lanes() + static_cast<int32_t>(i) : places;
      best = is_more ? v : best;
    }
    found = best[0], at = places[0];
    for (int j = 0; j < kWidth; ++j) {
      has_nan |= not_equal[j] != 0;
      if (best[j] > found || (best[j] == found && places[j] < at)) found = best[j], at = places[j];
    }
  }
  for (; i < n; ++i) {
    has_nan |= x[i] != x[i];
    if (x[i] > found) found = x[i], at = i;
  }
  *place = at;
  return has_nan ? NAN : found;
}

}  // namespace

extern "C" {

// The largest number of each row, NaN if it holds one, and its place: the first of several, undefined
// with NaN.
//   x [rows, n] with 0 < n < 2³¹; largest, places [rows]
void largest_f32(const float* x, int64_t rows, int64_t n, float* largest, int64_t* places) {
#pragma omp parallel for schedule(static) if (rows * n > kWorthThreads)
  for (int64_t r = 0; r < rows; ++r) largest[r] = largest_of(x + r * n, n, places + r);
}

// RMSNorm (arXiv:1910.07467): out = x / sqrt(mean(x²) + eps) * (offset + weight), row by row.
//   x, out [rows, n]; weight [n]
void rms_norm_f32(const float* x, int64_t rows, int64_t n, const float* weight, float eps,
                  float offset, float* out) {
  in_pieces(rows, n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* from = x + r * n;
      float* to = out + r * n;
      Vector squares = {};
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) squares += load(from + i) * load(from + i);
      float total = sum(squares);
      for (; i < n; ++i) total += from[i] * from[i];
      const float scale = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
      for (i = 0; i + kWidth <= n; i += kWidth)
        store(to + i, load(from + i) * scale * (load(weight + i) + offset));
      for (; i < n; ++i) to[i] = from[i] * scale * (weight[i] + offset);
    }
  });
}

// SwiGLU (arXiv:2002.05202): out = silu(gate) * up; all [count], a multiple of 16.
void silu_product_f32(const float* gate, const float* up, int64_t count, float* out) {
  in_pieces(count / kWidth, kWidth, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kWidth; i < last * kWidth; i += kWidth)
      store(out + i, silu(load(gate + i)) * load(up + i));
  });
}

// out = left + right; all [count]
void add_f32(const float* left, const float* right, float* out, int64_t count) {
  const int64_t vectors = count / kWidth * kWidth;
  in_pieces(vectors / kWidth, kWidth, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kWidth; i < last * kWidth; i += kWidth) store(out + i, load(left + i) + load(right + i));
  });
  for (int64_t i = vectors; i < count; ++i) out[i] = left[i] + right[i];
}

// Rotary embedding (arXiv:2104.09864) with the halves of a head as real and imaginary parts.
//   x [heads, dim] of a row, `head` and `row` apart; cosines, sines [rows, dim]
//   out [rows, heads, dim]; dim is a multiple of 32
void rotate_f32(const float* x, int64_t head, int64_t row, int64_t heads, int64_t rows, int64_t dim,
                const float* cosines, const float* sines, float* out) {
  const int64_t half = dim / 2;
  in_pieces(rows, heads * dim, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        const float* from = x + h * head + r * row;
        const float *cosine = cosines + r * dim, *sine = sines + r * dim;
        float* to = out + (r * heads + h) * dim;
        for (int64_t d = 0; d < half; d += kWidth) {
          const Vector real = load(from + d), imaginary = load(from + half + d);
          store(to + d, real * load(cosine + d) - imaginary * load(sine + d));
          store(to + half + d, imaginary * load(cosine + half + d) + real * load(sine + half + d));
        }
      }
  });
}

// The rows `ids` of a weight in panels [known / 32 rounded up, n, 32], each multiplied by `scale`.
//   ids [count], out [count, n]
// Returns how many ids are no row of it; what is put out for those is undefined.
int64_t look_up_f32(const int64_t* ids, int64_t count, const float* panels, int64_t known, int64_t n, float scale,
                    float* out) {
  std::atomic<int64_t> unknown{0};
  in_pieces(count, n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t id = ids[r];
      if (id < 0 || id >= known) {
        ++unknown;
        continue;
      }
      const float* from = panels + id / kPanel * n * kPanel + id % kPanel;
      float* to = out + r * n;
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * kPanel] * scale;
    }
  });
  return unknown;
}

}  // extern "C"
