// Weights in panels.
#pragma once

#include "stream.h"

namespace {

// A panel holds the weights of kPanel outputs, input by input: [in, 32]. Each input of a row is multiplied
// with two vectors of weights, and the sums of 32 outputs stay in registers until they are whole:
// nothing is added up across a vector, and the weights are read in one sweep.

// Rows at a time: as many as leave their sums in the registers.
#if defined(__AVX512F__)
constexpr int kPanelRows = 14;
#elif defined(__AVX2__)
constexpr int kPanelRows = 3;
#else
constexpr int kPanelRows = 2;
#endif

// Stores the sums of a row's outputs, `width` of them; `more` adds them to what y holds.
inline void keep_sums(const Vector* sums, bool more, const float* bias, float* y, int64_t width) {
  if (width == kPanel) {
    store(y, more ? load(y) + sums[0] : sums[0]);
    store(y + kWidth, more ? load(y + kWidth) + sums[1] : sums[1]);
  } else {
    float whole[kPanel];
    store(whole, sums[0]);
    store(whole + kWidth, sums[1]);
    for (int64_t j = 0; j < width; ++j) y[j] = more ? y[j] + whole[j] : whole[j];
  }
  if (bias)
    for (int64_t j = 0; j < width; ++j) y[j] += bias[j];
}

// Adds to the sums of ROWS rows what the inputs [i, end) give; asks the memory for what is at `next`, if anything.
template <int ROWS, bool ASK>
inline void add_inputs(const float* x, int64_t stride, int64_t i, int64_t end, const float* panel, const float* next,
                       Vector (&sums)[ROWS][2]) {
  // Three addresses that the compiler takes for unrelated: it would keep one for each row, more than there are
  // registers.
  const float *low = x + i, *middle = low + 5 * stride, *high = low + 10 * stride;
  asm("" : "+r"(middle), "+r"(high));
  const float* weights = panel + i * kPanel;
  for (const float* last = panel + end * kPanel; weights < last; weights += kPanel, ++low, ++middle, ++high) {
    const Vector left = load(weights), right = load(weights + kWidth);
    if (ASK) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + kWidth);
      next += kPanel;
    }
    for (int r = 0; r < ROWS; ++r) {
      const float input = r < 5 ? low[r * stride] : r < 10 ? middle[(r - 5) * stride] : high[(r - 10) * stride];
      sums[r][0] += left * input;
      sums[r][1] += right * input;
    }
  }
}

// Of so many inputs the first few ask the memory for something, as many as are needed to ask for all.
constexpr int64_t kTurn = 8;

// Rows of x are `stride` apart, of which `in` are multiplied; `more` adds to what y holds. Of each kTurn inputs
// `asking` ask for what the stream holds. A function of its own for each number of rows: where the compiler put them
// all into one, it ran out of registers.
template <int ROWS>
__attribute__((noinline)) void panel_rows(const float* x, int64_t stride, int64_t in, const float* panel,
                                          Stream& stream, int64_t asking, const float* bias, bool more, float* y,
                                          int64_t out, int64_t width) {
  Vector sums[ROWS][2] = {};
  for (int64_t i = 0; i < in;) {
    const Part part = stream.take(asking < kTurn ? std::min(in - i, asking) : in - i);
    int64_t end = in;
    if (part.at) {
      add_inputs<ROWS, true>(x, stride, i, i + part.steps, panel, part.at, sums);
      i += part.steps;
      end = asking < kTurn ? std::min(in, i + part.steps * (kTurn - asking) / asking) : i;
    }
    if (i < end) add_inputs<ROWS, false>(x, stride, i, end, panel, nullptr, sums);
    i = end;
  }
  for (int r = 0; r < ROWS; ++r) keep_sums(sums[r], more, bias, y + r * out, width);
}

// Inputs whose products are added up before they join the sum so far. One sum over all inputs of a wide
// layer would lose a digit.
constexpr int64_t kSummed = 256;

template <int ROWS>
void remaining_rows(const float* x, int64_t rows, int64_t in, const float* panel, Stream& stream, int64_t asking,
                    const float* bias, float* y, int64_t out, int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return remaining_rows<ROWS - 1>(x, rows, in, panel, stream, asking, bias, y, out, width);
    for (int64_t i = 0; i < in; i += kSummed)
      panel_rows<ROWS>(x + i, in, std::min(kSummed, in - i), panel + i * kPanel, stream, asking,
                       i == 0 ? bias : nullptr, i > 0, y, out, width);
  }
}

// The outputs of one panel, `width` of them, for all rows. Meanwhile the memory is asked for what `stream` holds.
void panel_product(const float* x, int64_t rows, int64_t in, const float* panel, Stream& stream, const float* bias,
                   float* y, int64_t out, int64_t width) {
  // As many rows at a time in each turn, or nearly: a few alone would take longer for each.
  const int64_t turns = std::max<int64_t>(1, (rows + kPanelRows - 1) / kPanelRows);
  const int64_t together = (rows + turns - 1) / turns, inputs = turns * in;
  const int64_t asking = std::clamp<int64_t>((stream.steps() * kTurn + inputs - 1) / inputs, 1, kTurn);
  for (int64_t row = 0; row < rows; row += together)
    remaining_rows<kPanelRows>(x + row * in, std::min(rows - row, together), in, panel, stream,
                               asking, bias, y + row * out, out, width);
  stream.ask();
}

}  // namespace
