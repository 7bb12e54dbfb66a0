// Linear layers for float32 on a CPU, with the updates of adapters.
//
// A decoding step multiplies every weight of the model with a handful of rows, one a sequence. The
// libraries behind torch are made for larger matrices; here each weight is read from memory once and
// multiplied with all rows while it is in a register, which comes close to what the memory allows.

#include <omp.h>

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

// NF4 (arXiv:2305.14314) as bitsandbytes stores it: two codes a byte, the first in the high half, and
// a scale for each 64 weights. `in` is a multiple of 64.
struct Nf4Weights {
  const uint8_t* codes;  // [out, in / 2]
  const float* scales;   // [out, in / 64]
  const float* table;    // [16]
  int64_t in;

  Vector at(int64_t o, int64_t i) const {
    typedef uint64_t Longs __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    uint64_t eight;  // bytes: the codes of 16 weights
    std::memcpy(&eight, codes + (o * in + i) / 2, sizeof eight);
    const Longs first = {4, 12, 20, 28, 36, 44, 52, 60}, second = {0, 8, 16, 24, 32, 40, 48, 56};
    const Longs all = Longs{} + eight;
    // A lane of 64 bits holds two neighbours, the first in its lower half.
    const Longs pairs = ((all >> first) & 15) | (((all >> second) & 15) << 32);
    Ints index;
    std::memcpy(&index, &pairs, sizeof index);
#if defined(__clang__)
    Vector value;
    for (int64_t j = 0; j < kWidth; ++j) value[j] = table[index[j]];
#else
    const Vector value = __builtin_shuffle(load(table), index);
#endif
    return value * scales[(o * in + i) / 64];
  }
  float one(int64_t, int64_t) const { return 0; }  // `in` leaves no rest
  void prefetch(int64_t, int64_t) const {}
};

// GPTQ (arXiv:2210.17323): weight = scale * (code - zero point) of the group that the input is in.
// Every product here is exact in float32: the scales have 11 bits and the codes at most 8.
template <int BITS>
struct GptqWeights {
  // [out, blocks, 16]: a word holds 32 / BITS codes, the first in its lowest bits, and code k of word
  // j of a block is that of input 16 * k + j: 16 neighbours are one load, one shift and one mask.
  const uint32_t* codes;
  const float* groups;  // [out, count, 2]: scale, and -scale * zero point
  int64_t count;        // groups of an output
  int64_t shift;        // input i is in group i >> shift; a group holds at least 16
  int64_t in;           // a multiple of 16

  Vector at(int64_t o, int64_t i) const {
    typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
    typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
    constexpr int64_t kParts = 32 / BITS, kBlock = kParts * kWidth;
    const int64_t blocks = (in + kBlock - 1) / kBlock;
    Words words;
    std::memcpy(&words, codes + (o * blocks + i / kBlock) * kWidth, sizeof words);
    words = (words >> static_cast<int>(i / kWidth % kParts * BITS)) & ((1u << BITS) - 1);
    Ints code;  // signed: processors turn these into floats more easily
    std::memcpy(&code, &words, sizeof code);
    const float* group = groups + (o * count + (i >> shift)) * 2;
    return __builtin_convertvector(code, Vector) * group[0] + group[1];
  }
  float one(int64_t, int64_t) const { return 0; }  // `in` leaves no rest
  void prefetch(int64_t, int64_t) const {}
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

constexpr int64_t kChunk = 48;  // outputs that one thread computes at a time; a multiple of 16

// The rows of one adapter, and its update of this layer: y[first:last] += scale * (x aᵀ) b. Rank 0:
// none. Rows with several adapters are in several groups, and each adds its own update.
struct AdapterRows {
  int64_t first, last, rank;
  const float* a;  // [in, rank], and 16 floats more that may be read and are not used
  const float* b;  // [out / 16 rounded up, rank, 16], with the scaling in it: read in one sweep
  float scale;     // the request's own factor
};

// A piece of the low-rank products: up to 16 components of some rows of one group.
struct LowItem {
  int64_t group, component, first, last;
  float* low;  // of the group's first row: [rows, rank]
};

template <int ROWS>
inline void low_rows(const float* x, int64_t in, const float* a, int64_t rank, int64_t width,
                     float* low) {
  // One row alone would wait for each of its sums: it takes every fourth input for four sums.
  constexpr int kSums = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
  Vector sums[ROWS][kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= in; i += kSums)
    for (int k = 0; k < kSums; ++k) {
      const Vector weights = load(a + (i + k) * rank);
      for (int r = 0; r < ROWS; ++r) sums[r][k] += weights * x[r * in + i + k];
    }
  for (; i < in; ++i)
    for (int r = 0; r < ROWS; ++r) sums[r][0] += load(a + i * rank) * x[r * in + i];
  for (int r = 0; r < ROWS; ++r) {
    Vector total = sums[r][0];
    for (int k = 1; k < kSums; ++k) total += sums[r][k];
    float whole[kWidth];
    store(whole, total);
    std::memcpy(low + r * rank, whole, width * sizeof(float));
  }
}

constexpr int64_t kLowRows = 12;

template <int ROWS>
void low_remaining(const float* x, int64_t rows, int64_t in, const float* a, int64_t rank,
                   int64_t width, float* low) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return low_rows<ROWS>(x, in, a, rank, width, low);
    low_remaining<ROWS - 1>(x, rows, in, a, rank, width, low);
  }
}

// low = x a, for the item's rows and components.
inline void low_product(const float* x, int64_t in, const AdapterRows& group,
                        const LowItem& item) {
  const int64_t rows = item.last - item.first, width = std::min(kWidth, group.rank - item.component);
  low_remaining<kLowRows>(x + item.first * in, rows, in, group.a + item.component, group.rank,
                          width, item.low + (item.first - group.first) * group.rank + item.component);
}

// Adds one group's update of the `width` outputs from `at` to ROWS rows.
template <int ROWS>
inline void update_rows(const float* low, int64_t rank, const float* b, float scale, float* y,
                        int64_t out, int64_t width) {
  constexpr int kSums = ROWS == 1 ? 4 : 1;  // one row alone would wait for each of its sums
  Vector sums[ROWS][kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= rank; c += kSums)
    for (int k = 0; k < kSums; ++k) {
      const Vector weights = load(b + (c + k) * kWidth);
      for (int r = 0; r < ROWS; ++r) sums[r][k] += weights * low[r * rank + c + k];
    }
  for (; c < rank; ++c)
    for (int r = 0; r < ROWS; ++r) sums[r][0] += load(b + c * kWidth) * low[r * rank + c];
  for (int r = 0; r < ROWS; ++r, y += out) {
    Vector total = sums[r][0];
    for (int k = 1; k < kSums; ++k) total += sums[r][k];
    total *= scale;
    if (width == kWidth) {
      store(y, load(y) + total);
    } else {
      for (int64_t j = 0; j < width; ++j) y[j] += total[j];
    }
  }
}

constexpr int64_t kUpdatedRows = 8;

// Adds one group's update of the `width` outputs from `at`, a multiple of 16, to all its rows.
inline void add_update(const AdapterRows& group, const float* low, float* y, int64_t out,
                       int64_t at, int64_t width) {
  const float* b = group.b + at * group.rank;
  const int64_t rank = group.rank;
  y += group.first * out + at;
  int64_t rows = group.last - group.first;
  for (; rows >= kUpdatedRows; rows -= kUpdatedRows) {
    update_rows<kUpdatedRows>(low, rank, b, group.scale, y, out, width);
    low += kUpdatedRows * rank;
    y += kUpdatedRows * out;
  }
  for (; rows > 0; --rows, low += rank, y += out)
    update_rows<1>(low, rank, b, group.scale, y, out, width);
}

// Asks for what a chunk's updates will read, while its main product is computed.
inline void fetch_updates(const AdapterRows* groups, int64_t count, int64_t first, int64_t last) {
  for (int64_t g = 0; g < count; ++g) {
    const int64_t rank = groups[g].rank;
    for (int64_t at = first * rank; at < last * rank; at += kWidth)
      __builtin_prefetch(groups[g].b + at, 0, 2);
  }
}

// Runs `compute(first, last)` for all outputs, `chunk` (a multiple of kWidth) of them at a time, and
// adds to each chunk the adapters' updates of their own rows.
template <typename Compute>
void with_updates(const float* x, int64_t in, float* y, int64_t out, const AdapterRows* groups,
                  int64_t count, float* low, int64_t chunk, const Compute& compute) {
  std::vector<LowItem> items;
  std::vector<float*> lows(count);
  for (int64_t g = 0; g < count; ++g) {
    const AdapterRows& group = groups[g];
    lows[g] = low;
    for (int64_t component = 0; component < group.rank; component += kWidth)
      for (int64_t row = group.first; row < group.last; row += kLowRows)
        items.push_back({g, component, row, std::min(row + kLowRows, group.last), low});
    low += (group.last - group.first) * group.rank;
  }
#pragma omp parallel
  {
    if (!items.empty()) {
#pragma omp for schedule(static)
      for (size_t i = 0; i < items.size(); ++i)
        low_product(x, in, groups[items[i].group], items[i]);
    }
    // Dynamic: on a shared machine one core may be slower than the other for a while.
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < (out + chunk - 1) / chunk; ++number) {
      const int64_t first = number * chunk, last = std::min(first + chunk, out);
      fetch_updates(groups, count, first, last);
      compute(first, last);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t at = first; groups[g].rank > 0 && at < last; at += kWidth)
          add_update(groups[g], lows[g], y, out, at, std::min(kWidth, last - at));
    }
  }
}

// y = x wᵀ + bias, plus each adapter's update of its own rows; see linear_f32. The adapters multiply
// `low_x`, which is x unless the weights are for its columns in another order.
template <typename Weights>
void linear(const float* x, const float* low_x, int64_t rows, const Weights& w, const float* bias, float* y,
            int64_t out, const AdapterRows* groups, int64_t count, float* low) {
  with_updates(low_x, w.in, y, out, groups, count, low, kChunk, [&](int64_t first, int64_t last) {
    outputs_of_rows(x, rows, w, bias, y, out, first, last);
  });
}

// A panel holds the weights of 32 outputs, input by input: [in, 32]. Each input of a row is multiplied
// with two vectors of weights, and the sums of 32 outputs stay in registers until they are whole:
// nothing is added up across a vector, and the weights are read in one sweep.
constexpr int64_t kPanel = 2 * kWidth;

// Rows at a time: as many as leave their sums in the registers.
#if defined(__AVX512F__)
constexpr int kPanelRows = 14;
#elif defined(__AVX2__)
constexpr int kPanelRows = 3;
#else
constexpr int kPanelRows = 2;
#endif

// With FETCH, asks for the panel `next` on the way: the memory works while the sums are computed.
template <int ROWS, bool FETCH>
inline void panel_rows(const float* x, int64_t in, const float* panel, const float* next,
                       const float* bias, float* y, int64_t out, int64_t width) {
  Vector sums[ROWS][2] = {};
  for (int64_t i = 0; i < in; ++i) {
    const float* weights = panel + i * kPanel;
    const Vector left = load(weights), right = load(weights + kWidth);
    if (FETCH) {
      __builtin_prefetch(next + i * kPanel, 0, 2);
      __builtin_prefetch(next + i * kPanel + kWidth, 0, 2);
    }
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] += left * x[r * in + i];
      sums[r][1] += right * x[r * in + i];
    }
  }
  for (int r = 0; r < ROWS; ++r, y += out) {
    float whole[kPanel];
    float* to = width == kPanel ? y : whole;
    store(to, sums[r][0]);
    store(to + kWidth, sums[r][1]);
    if (to == whole) std::memcpy(y, whole, width * sizeof(float));
    if (bias)
      for (int64_t j = 0; j < width; ++j) y[j] += bias[j];
  }
}

template <int ROWS>
void remaining_rows(const float* x, int64_t rows, int64_t in, const float* panel,
                    const float* next, const float* bias, float* y, int64_t out, int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return remaining_rows<ROWS - 1>(x, rows, in, panel, next, bias, y, out, width);
    if (next) return panel_rows<ROWS, true>(x, in, panel, next, bias, y, out, width);
    panel_rows<ROWS, false>(x, in, panel, next, bias, y, out, width);
  }
}

// The outputs of one panel, `width` of them, for all rows; `next` is a panel that is needed soon.
void panel_product(const float* x, int64_t rows, int64_t in, const float* panel, const float* next,
                   const float* bias, float* y, int64_t out, int64_t width) {
  // The first rows wait for the panel itself to come from memory; only then is there time to fetch.
  const float* fetched = nullptr;
  for (; rows > 0; rows -= kPanelRows, x += kPanelRows * in, y += kPanelRows * out) {
    remaining_rows<kPanelRows>(x, std::min<int64_t>(rows, kPanelRows), in, panel, fetched, bias, y,
                               out, width);
    fetched = fetched == nullptr ? next : panel;  // once is enough
  }
}

}  // namespace

extern "C" {

// y = x wᵀ + bias, plus each adapter's update of its own rows.
//   x [rows, in], w [out, in], bias [out] or null, y [rows, out]
//   groups [count]; low: scratch for the sum over groups of (last - first) * rank floats
void linear_f32(const float* x, int64_t rows, int64_t in, const float* w, const float* bias,
                float* y, int64_t out, const AdapterRows* groups, int64_t count, float* low) {
  linear(x, x, rows, FloatWeights{w, in}, bias, y, out, groups, count, low);
}

// The same for weights in panels: [out / 32 rounded up, in, 32], filled up with zeros.
void linear_panels(const float* x, int64_t rows, int64_t in, const float* panels, const float* bias,
                   float* y, int64_t out, const AdapterRows* groups, int64_t count, float* low) {
  // The chunks go to the threads in turn, so that this many further on comes the same thread's next.
  const int64_t ahead = omp_get_max_threads() * kPanel;
  with_updates(x, in, y, out, groups, count, low, kPanel, [&](int64_t first, int64_t last) {
    const float* panel = panels + first * in;
    panel_product(x, rows, in, panel, first + ahead < out ? panel + ahead * in : panel,
                  bias ? bias + first : nullptr, y + first, out, last - first);
  });
}

// The same for NF4 weights: codes [out, in / 2], scales [out, in / 64], table [16].
void linear_nf4(const float* x, int64_t rows, int64_t in, const uint8_t* codes,
                const float* scales, const float* table, const float* bias, float* y, int64_t out,
                const AdapterRows* groups, int64_t count, float* low) {
  linear(x, x, rows, Nf4Weights{codes, scales, table, in}, bias, y, out, groups, count, low);
}

// The same for GPTQ weights of 2, 4 or 8 bits; see GptqWeights. `x` has its columns in the order of
// the groups, `low_x` in the layer's own.
void linear_gptq(const float* x, const float* low_x, int64_t rows, int64_t in, int64_t bits,
                 const uint32_t* codes, const float* scales, int64_t count, int64_t shift,
                 const float* bias, float* y, int64_t out, const AdapterRows* groups,
                 int64_t group_count, float* low) {
  const auto run = [&](auto w) {
    linear(x, low_x, rows, w, bias, y, out, groups, group_count, low);
  };
  if (bits == 8) return run(GptqWeights<8>{codes, scales, count, shift, in});
  if (bits == 4) return run(GptqWeights<4>{codes, scales, count, shift, in});
  run(GptqWeights<2>{codes, scales, count, shift, in});
}

// All weights of a GPTQ layer, [out, in], for a product of many rows.
void dequantize_gptq(int64_t in, int64_t bits, const uint32_t* codes, const float* scales,
                     int64_t count, int64_t shift, float* weight, int64_t out) {
  const auto run = [&](auto w) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; i += kWidth) store(weight + o * in + i, w.at(o, i));
  };
  if (bits == 8) return run(GptqWeights<8>{codes, scales, count, shift, in});
  if (bits == 4) return run(GptqWeights<4>{codes, scales, count, shift, in});
  run(GptqWeights<2>{codes, scales, count, shift, in});
}

}  // extern "C"
