// Weights as torch has them, [out, in]: for those that something else has to read as well.
#pragma once

#include "vectors.h"

namespace {

// Where a tile's weights come from: 16 neighbours of one output's row, as floats.
struct FloatWeights {
  const float* w;  // [out, in]
  int64_t in;

  Vector at(int64_t o, int64_t i) const { return load(w + o * in + i); }
  float one(int64_t o, int64_t i) const { return w[o * in + i]; }
  void prefetch(int64_t o, int64_t i) const { __builtin_prefetch(w + o * in + i); }
};

// ROWS inputs times OUTS weight rows, with every partial sum in a register.
template <int ROWS, int OUTS, typename Weights>
inline void tile(const float* x, const Weights& w, const float* bias, float* y, int64_t out,
                 int64_t first) {
  const int64_t in = w.in;
  Vector partial[OUTS][ROWS] = {};
  int64_t i = 0;
  for (; i + kWidth <= in; i += kWidth) {
    Vector weights[OUTS];
    for (int o = 0; o < OUTS; ++o) {
      weights[o] = w.at(first + o, i);
      // The next tile's weights: the processor's own prefetching does not see that far.
      w.prefetch(first + o + OUTS, i);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vector input = load(x + r * in + i);
      for (int o = 0; o < OUTS; ++o) partial[o][r] += weights[o] * input;
    }
  }
  for (int o = 0; o < OUTS; ++o)
    for (int r = 0; r < ROWS; ++r) {
      float s = sum(partial[o][r]);
      for (int64_t j = i; j < in; ++j) s += w.one(first + o, j) * x[r * in + j];
      y[r * out + first + o] = s + (bias ? bias[first + o] : 0.0f);
    }
}

template <int ROWS, typename Weights>
void outputs(const float* x, const Weights& w, const float* bias, float* y, int64_t out,
             int64_t first, int64_t last) {
  // As many weight rows at a time as leave the partial sums in 32 registers.
  constexpr int kOuts = ROWS <= 2 ? 8 : ROWS <= 4 ? 6 : ROWS <= 6 ? 4 : 3;
  for (; first + kOuts <= last; first += kOuts) tile<ROWS, kOuts>(x, w, bias, y, out, first);
  for (; first < last; ++first) tile<ROWS, 1>(x, w, bias, y, out, first);
}

template <typename Weights>
void outputs_of_rows(const float* x, int64_t rows, const Weights& w, const float* bias, float* y,
                     int64_t out, int64_t first, int64_t last) {
  for (; rows >= 8; rows -= 8, x += 8 * w.in, y += 8 * out)
    outputs<8>(x, w, bias, y, out, first, last);
  switch (rows) {
    case 7: return outputs<7>(x, w, bias, y, out, first, last);
    case 6: return outputs<6>(x, w, bias, y, out, first, last);
    case 5: return outputs<5>(x, w, bias, y, out, first, last);
    case 4: return outputs<4>(x, w, bias, y, out, first, last);
    case 3: return outputs<3>(x, w, bias, y, out, first, last);
    case 2: return outputs<2>(x, w, bias, y, out, first, last);
    case 1: return outputs<1>(x, w, bias, y, out, first, last);
    default: return;
  }
}

}  // namespace
