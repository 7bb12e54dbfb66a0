#include "coded.h"

#include "panels.h"

namespace {

inline Integers load_integers(const int32_t* from) {
  Integers v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The numbers that the codes in some bits of 16 words stand for.
template <int BITS>
inline Vector decode(Integers words, int at, Vector table) {
  const Integers codes = (words >> at) & ((1 << BITS) - 1);
  if (BITS == 8) return __builtin_convertvector(codes, Vector);
#if defined(__clang__)
  Vector values;
  for (int64_t j = 0; j < kWidth; ++j) values[j] = table[codes[j]];
  return values;
#else
  return __builtin_shuffle(table, codes);
#endif
}

// Calls `use(input, left, right)` with the weights of the inputs [first, last) in turn; both are
// multiples of kWidth.
template <int BITS, bool OFFSETS, typename Use>
inline void each_input_of(const Coded& w, int64_t first, int64_t last, const Use& use) {
  constexpr int64_t kParts = 32 / BITS;
  const Vector table = load(w.table);
  const int64_t size = w.shift < 40 ? int64_t{1} << w.shift : w.in;
  for (int64_t i = first; i < last;) {
    const int64_t g = w.shift < 40 ? i >> w.shift : 0;
    const Vector left_scale = load(w.scales + g * kPanel);
    const Vector right_scale = load(w.scales + g * kPanel + kWidth);
    Vector left_offset = {}, right_offset = {};
    if (OFFSETS) {
      left_offset = load(w.offsets + g * kPanel);
      right_offset = load(w.offsets + g * kPanel + kWidth);
    }
    const auto weights = [](Vector values, Vector scale, Vector offset) {
      return OFFSETS ? values * scale + offset : values * scale;
    };
    for (const int64_t end = std::min(last, (g + 1) * size); i < end; i += kParts) {
      const int32_t* words = w.codes + i / kParts * kPanel;
      const Integers left = load_integers(words), right = load_integers(words + kWidth);
#pragma GCC unroll 8
      for (int k = 0; k < kParts; ++k)
        use(i + k, weights(decode<BITS>(left, k * BITS, table), left_scale, left_offset),
            weights(decode<BITS>(right, k * BITS, table), right_scale, right_offset));
    }
  }
}

template <int BITS, typename Use>
inline void each_input(const Coded& w, int64_t first, int64_t last, const Use& use) {
  if (w.offsets)
    each_input_of<BITS, true>(w, first, last, use);
  else
    each_input_of<BITS, false>(w, first, last, use);
}

template <int BITS>
void decode_all(const Coded& w, float* panel) {
  each_input<BITS>(w, 0, w.in, [&](int64_t i, Vector left, Vector right) {
    store(panel + i * kPanel, left);
    store(panel + i * kPanel + kWidth, right);
  });
}

// The outputs of one panel for `rows` ≤ ROWS rows; KEEP stores the weights as well, for rows that come after.
template <int ROWS, int BITS, bool KEEP>
void coded_rows(const float* x, int64_t rows, const Coded& w, float* panel, const float* bias, float* y, int64_t out,
                int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return coded_rows<ROWS - 1, BITS, KEEP>(x, rows, w, panel, bias, y, out, width);
    // In the order of panel_rows, so that few rows and many give the same to the last bit.
    for (int64_t first = 0; first < w.in; first += kSummed) {
      Vector sums[ROWS][2] = {};
      each_input<BITS>(w, first, std::min(w.in, first + kSummed), [&](int64_t i, Vector left, Vector right) {
        if (KEEP) {
          store(panel + i * kPanel, left);
          store(panel + i * kPanel + kWidth, right);
        }
        for (int r = 0; r < ROWS; ++r) {
          sums[r][0] += left * x[r * w.in + i];
          sums[r][1] += right * x[r * w.in + i];
        }
      });
      for (int r = 0; r < ROWS; ++r)
        keep_sums(sums[r], first > 0, first == 0 ? bias : nullptr, y + r * out, width);
    }
  }
}

// Rows for which weights are decoded in registers while they are multiplied; fewer where there are more to come, which
// leaves registers to decode in.
constexpr int kCodedRows = std::min(kPanelRows, 12), kFirstRows = std::min(kPanelRows, 8);

template <int BITS>
void product(const float* x, int64_t rows, const Coded& w, Stream& stream, const float* bias, float* y, int64_t out,
             int64_t width) {
  if (rows <= kCodedRows) return coded_rows<kCodedRows, BITS, false>(x, rows, w, nullptr, bias, y, out, width);
  thread_local std::vector<float> panel;
  panel.resize(w.in * kPanel);
  // In halves while there are two: a few rows alone wait for the weights.
  const int64_t early = std::min<int64_t>(kFirstRows, (rows + 1) / 2), late = rows - early;
  coded_rows<kFirstRows, BITS, true>(x, early, w, panel.data(), bias, y, out, width);
  panel_product(x + early * w.in, late, w.in, panel.data(), stream, bias, y + early * out, out, width);
}

}  // namespace

void coded_product(const float* x, int64_t rows, const Coded& w, int64_t bits, Stream& stream, const float* bias,
                   float* y, int64_t out, int64_t width) {
  if (bits == 8)
    product<8>(x, rows, w, stream, bias, y, out, width);
  else
    product<4>(x, rows, w, stream, bias, y, out, width);
}

void decode_panel(const Coded& w, int64_t bits, float* panel) {
  if (bits == 8)
    decode_all<8>(w, panel);
  else
    decode_all<4>(w, panel);
}
