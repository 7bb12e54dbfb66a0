// Weights in panels.
#pragma once

#include "vectors.h"

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

// What the memory is asked for while sums are computed: two vectors with each input.
class Stream {
 public:
  struct Part {
    const float* at;  // null where nothing is left
    int64_t inputs;
  };

  // After what is there already, `inputs` times two vectors from `at`; two parts at most.
  void add(const float* at, int64_t inputs) {
    if (inputs > 0) parts_[count_++] = {at, inputs};
  }

  // What comes next, for at most `most` inputs.
  Part take(int64_t most) {
    if (at_ == count_) return {nullptr, most};
    Part& part = parts_[at_];
    const Part taken{part.at, std::min(most, part.inputs)};
    part.at += taken.inputs * kPanel;
    part.inputs -= taken.inputs;
    at_ += part.inputs == 0;
    return taken;
  }

 private:
  Part parts_[2];
  int count_ = 0, at_ = 0;
};

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
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + kWidth, 0, 2);
      next += kPanel;
    }
    for (int r = 0; r < ROWS; ++r) {
      const float input = r < 5 ? low[r * stride] : r < 10 ? middle[(r - 5) * stride] : high[(r - 10) * stride];
      sums[r][0] += left * input;
      sums[r][1] += right * input;
    }
  }
}

// Rows of x are `stride` apart, of which `in` are multiplied; `more` adds to what y holds. A function of its own for each
// number of rows: where the compiler put them all into one, it ran out of registers.
template <int ROWS>
__attribute__((noinline)) void panel_rows(const float* x, int64_t stride, int64_t in, const float* panel, Stream& stream,
                       const float* bias, bool more, float* y, int64_t out, int64_t width) {
  Vector sums[ROWS][2] = {};
  for (int64_t i = 0; i < in;) {
    const Stream::Part part = stream.take(in - i);
    if (part.at)
      add_inputs<ROWS, true>(x, stride, i, i + part.inputs, panel, part.at, sums);
    else
      add_inputs<ROWS, false>(x, stride, i, i + part.inputs, panel, nullptr, sums);
    i += part.inputs;
  }
  for (int r = 0; r < ROWS; ++r) keep_sums(sums[r], more, bias, y + r * out, width);
}

// Inputs whose products are added up before they join the sum so far. One sum over all inputs of a wide
// layer would lose a digit.
constexpr int64_t kSummed = 256;

template <int ROWS>
void remaining_rows(const float* x, int64_t rows, int64_t in, const float* panel, Stream& stream, const float* bias,
                    float* y, int64_t out, int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return remaining_rows<ROWS - 1>(x, rows, in, panel, stream, bias, y, out, width);
    for (int64_t i = 0; i < in; i += kSummed)
      panel_rows<ROWS>(x + i, in, std::min(kSummed, in - i), panel + i * kPanel, stream, i == 0 ? bias : nullptr,
                       i > 0, y, out, width);
  }
}

// The outputs of one panel, `width` of them, for all rows. While the first few are computed, the memory is asked for
// what `own` holds, and then for `rest`.
void panel_product(const float* x, int64_t rows, int64_t in, const float* panel, Stream& own, Stream& rest,
                   const float* bias, float* y, int64_t out, int64_t width) {
  for (int64_t row = 0; row < rows; row += kPanelRows)
    remaining_rows<kPanelRows>(x + row * in, std::min<int64_t>(rows - row, kPanelRows), in, panel,
                               row == 0 ? own : rest, bias, y + row * out, out, width);
}

}  // namespace
