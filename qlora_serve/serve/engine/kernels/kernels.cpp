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

// Sums that the components of a row are spread over: one row alone would wait for each of its sums. As
// many for any number of rows, so that a row's result is the same to the last bit in any company.
constexpr int kSums = 4;

// Floats by which the memory is asked ahead for an adapter's first matrix: 4 kB.
constexpr int64_t kLowAhead = 1024;

template <int ROWS>
inline void low_rows(const float* x, int64_t in, const float* a, int64_t rank, int64_t width,
                     float* low) {
  Vector sums[ROWS][kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= in; i += kSums)
    for (int k = 0; k < kSums; ++k) {
      const Vector weights = load(a + (i + k) * rank);
      __builtin_prefetch(a + (i + k) * rank + kLowAhead, 0, 2);
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

constexpr int64_t kLowRows = 6;  // times kSums: in the registers

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

constexpr int64_t kUpdatedRows = 4;

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

// What to ask the memory for while the sums are computed: for each input the two vectors at `first`, from
// input `turn` on those at `then`.
struct Fetch {
  const float *first, *then;
  int64_t turn;

  Fetch from(int64_t i) const {
    if (first == nullptr) return *this;
    return i < turn ? Fetch{first + i * kPanel, then, turn - i} : Fetch{then + (i - turn) * kPanel, then, INT64_MAX};
  }
};

// Rows of x are `stride` apart, of which `in` are multiplied; `more` adds to what y holds.
template <int ROWS, bool FETCH>
inline void panel_rows(const float* x, int64_t stride, int64_t in, const float* panel, Fetch fetch,
                       const float* bias, bool more, float* y, int64_t out, int64_t width) {
  Vector sums[ROWS][2] = {};
  const auto add = [&](int64_t i, int64_t end, const float* next) {
    for (; i < end; ++i, next += kPanel) {
      const float* weights = panel + i * kPanel;
      const Vector left = load(weights), right = load(weights + kWidth);
      if (FETCH) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + kWidth, 0, 2);
      }
      for (int r = 0; r < ROWS; ++r) {
        sums[r][0] += left * x[r * stride + i];
        sums[r][1] += right * x[r * stride + i];
      }
    }
  };
  const int64_t turn = FETCH ? std::min(in, fetch.turn) : in;
  add(0, turn, fetch.first);
  if (FETCH && turn < in) add(turn, in, fetch.then);
  for (int r = 0; r < ROWS; ++r) keep_sums(sums[r], more, bias, y + r * out, width);
}

// Inputs whose products are added up before they join the sum so far. One sum over all inputs of a wide
// layer would lose a digit.
constexpr int64_t kSummed = 256;

// Inputs by which the memory is asked ahead: 6 kB of a panel.
constexpr int64_t kAhead = 48;

template <int ROWS>
void remaining_rows(const float* x, int64_t rows, int64_t in, const float* panel,
                    const Fetch& fetch, const float* bias, float* y, int64_t out, int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return remaining_rows<ROWS - 1>(x, rows, in, panel, fetch, bias, y, out, width);
    for (int64_t i = 0; i < in; i += kSummed) {
      const int64_t count = std::min(kSummed, in - i);
      const float *own = panel + i * kPanel, *own_bias = i == 0 ? bias : nullptr;
      if (fetch.first)
        panel_rows<ROWS, true>(x + i, in, count, own, fetch.from(i), own_bias, i > 0, y, out, width);
      else
        panel_rows<ROWS, false>(x + i, in, count, own, fetch, own_bias, i > 0, y, out, width);
    }
  }
}

// The outputs of one panel, `width` of them, for all rows; `next` is the panel that is needed after it, or
// null where the panel is near already.
void panel_product(const float* x, int64_t rows, int64_t in, const float* panel, const float* next,
                   const float* bias, float* y, int64_t out, int64_t width) {
  // The first rows ask a little ahead for the panel itself, and at its end for the beginning of the
  // next; the second rows, for whom the panel is near, for the rest of the next.
  Fetch fetch{}, rest{};
  if (next) {
    const int64_t turn = std::max<int64_t>(0, in - kAhead);
    fetch = {turn > 0 ? panel + kAhead * kPanel : next, next, turn > 0 ? turn : INT64_MAX};
    rest = {next, next, INT64_MAX};
  }
  for (bool is_first = true; rows > 0; rows -= kPanelRows, x += kPanelRows * in, y += kPanelRows * out) {
    remaining_rows<kPanelRows>(x, std::min<int64_t>(rows, kPanelRows), in, panel, fetch, bias, y, out,
                               width);
    fetch = is_first ? rest : Fetch{};  // once is enough
    is_first = false;
  }
}

// A panel of codes with a scale for each group of inputs: the weight of input i and an output is
// table[code] * scale + offset, or code * scale + offset with 8 bits. That is NF4 (arXiv:2305.14314),
// where there is no offset, and GPTQ (arXiv:2210.17323), where it is -scale * zero point and the table
// counts; there the product is exact in float32, since scales have 11 bits and codes at most 8.
struct Coded {
  // [in * BITS / 32, 2, 16]: a word holds 32 / BITS inputs of one output, the first in its lowest bits.
  const int32_t* codes;
  const float* scales;       // [count, 32]
  const float* offsets;      // [count, 32], or null for none
  const float* table;        // [16]
  int64_t in, count, shift;  // input i is in group i >> shift

  // These are of the first panel; gives another.
  Coded panel(int64_t p, int64_t bits) const {
    const int64_t groups = p * count * kPanel;
    return {codes + p * in * kPanel * bits / 32, scales + groups,
            offsets ? offsets + groups : nullptr, table, in, count, shift};
  }
};

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
template <int BITS, typename Use>
inline void each_input(const Coded& w, int64_t first, int64_t last, const Use& use) {
  constexpr int64_t kParts = 32 / BITS;
  const Vector table = load(w.table);
  const int64_t size = w.shift < 40 ? int64_t{1} << w.shift : w.in;
  for (int64_t i = first; i < last;) {
    const int64_t g = w.shift < 40 ? i >> w.shift : 0;
    const Vector left_scale = load(w.scales + g * kPanel);
    const Vector right_scale = load(w.scales + g * kPanel + kWidth);
    Vector left_offset = {}, right_offset = {};
    if (w.offsets) {
      left_offset = load(w.offsets + g * kPanel);
      right_offset = load(w.offsets + g * kPanel + kWidth);
    }
    for (const int64_t end = std::min(last, (g + 1) * size); i < end; i += kParts) {
      const int32_t* words = w.codes + i / kParts * kPanel;
      const Integers left = load_integers(words), right = load_integers(words + kWidth);
#pragma GCC unroll 8
      for (int k = 0; k < kParts; ++k)
        use(i + k, decode<BITS>(left, k * BITS, table) * left_scale + left_offset,
            decode<BITS>(right, k * BITS, table) * right_scale + right_offset);
    }
  }
}

template <int BITS>
void decode_panel(const Coded& w, float* panel) {
  each_input<BITS>(w, 0, w.in, [&](int64_t i, Vector left, Vector right) {
    store(panel + i * kPanel, left);
    store(panel + i * kPanel + kWidth, right);
  });
}

template <int ROWS, int BITS>
void coded_rows(const float* x, int64_t rows, const Coded& w, const float* bias, float* y,
                int64_t out, int64_t width) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return coded_rows<ROWS - 1, BITS>(x, rows, w, bias, y, out, width);
    // In the order of panel_rows, so that few rows and many give the same to the last bit.
    for (int64_t first = 0; first < w.in; first += kSummed) {
      Vector sums[ROWS][2] = {};
      each_input<BITS>(w, first, std::min(w.in, first + kSummed),
                       [&](int64_t i, Vector left, Vector right) {
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

// Few rows: decoded in registers while they are multiplied. Many: decoded once, for all of them.
constexpr int kCodedRows = kPanelRows > 12 ? 12 : kPanelRows;

template <int BITS>
void coded_product(const float* x, int64_t rows, const Coded& w, const float* bias, float* y,
                   int64_t out, int64_t width) {
  if (rows <= kCodedRows) return coded_rows<kCodedRows, BITS>(x, rows, w, bias, y, out, width);
  thread_local std::vector<float> panel;
  panel.resize(w.in * kPanel);
  decode_panel<BITS>(w, panel.data());
  panel_product(x, rows, w.in, panel.data(), nullptr, bias, y, out, width);
}

}  // namespace

extern "C" {

// Ends the calling thread's team of helpers; the next parallel region makes a new one. While there are
// more teams than cores, the library lets everybody sleep at each barrier, which doubles the time of
// a small layer.
void release_threads() { omp_pause_resource_all(omp_pause_soft); }

// From now on the calling thread computes without helpers, torch's operators included.
void compute_alone() { omp_set_num_threads(1); }

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
  // The chunks go to the threads in turn, so that this many further on comes the same thread's next. Behind
  // the layer's last lies, as a rule, the next layer; asking for what is not there does nothing.
  const int64_t ahead = omp_get_max_threads() * kPanel;
  with_updates(x, in, y, out, groups, count, low, kPanel, [&](int64_t first, int64_t last) {
    const float* panel = panels + first * in;
    panel_product(x, rows, in, panel, panel + ahead * in,
                  bias ? bias + first : nullptr, y + first, out, last - first);
  });
}

// The same for coded panels, see Coded. `low_x` is what the adapters multiply: x has its columns in the
// order of the groups, `low_x` in the layer's own.
void linear_coded(const float* x, const float* low_x, int64_t rows, int64_t in, int64_t bits,
                  const int32_t* codes, const float* scales, const float* offsets,
                  const float* table, int64_t count, int64_t shift, const float* bias, float* y,
                  int64_t out, const AdapterRows* groups, int64_t group_count, float* low) {
  const Coded all{codes, scales, offsets, table, in, count, shift};
  with_updates(low_x, in, y, out, groups, group_count, low, kPanel,
               [&](int64_t first, int64_t last) {
                 const Coded panel = all.panel(first / kPanel, bits);
                 const float* own_bias = bias ? bias + first : nullptr;
                 if (bits == 8)
                   coded_product<8>(x, rows, panel, own_bias, y + first, out, last - first);
                 else
                   coded_product<4>(x, rows, panel, own_bias, y + first, out, last - first);
               });
}

// The update alone of one adapter, for a layer whose product is computed elsewhere.
void update_f32(const float* x, int64_t in, float* y, int64_t out, const AdapterRows* group,
                float* low) {
  with_updates(x, in, y, out, group, 1, low, kChunk, [](int64_t, int64_t) {});
}

// w [out, in] in panels: [out / 32 rounded up, in, 32], filled up with zeros. torch's own copy between the two
// orders takes several times as long.
void to_panels_f32(const float* w, int64_t out, int64_t in, float* panels) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < (out + kPanel - 1) / kPanel; ++p) {
    float* panel = panels + p * in * kPanel;
    const int64_t width = std::min(kPanel, out - p * kPanel);
    if (width < kPanel) std::fill(panel, panel + in * kPanel, 0.0f);
    constexpr int64_t kInputs = 16;  // a cache line of each row at a time
    for (int64_t i = 0; i < in; i += kInputs)
      for (int64_t j = 0; j < width; ++j) {
        const float* row = w + (p * kPanel + j) * in;
        for (int64_t k = i; k < std::min(in, i + kInputs); ++k) panel[k * kPanel + j] = row[k];
      }
  }
}

// All weights of coded panels as floats: [out / 32 rounded up, in, 32].
void decode_panels(int64_t in, int64_t bits, const int32_t* codes, const float* scales,
                   const float* offsets, const float* table, int64_t count, int64_t shift,
                   float* panels, int64_t number) {
  const Coded all{codes, scales, offsets, table, in, count, shift};
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < number; ++p) {
    if (bits == 8)
      decode_panel<8>(all.panel(p, bits), panels + p * in * kPanel);
    else
      decode_panel<4>(all.panel(p, bits), panels + p * in * kPanel);
  }
}

}  // extern "C"
