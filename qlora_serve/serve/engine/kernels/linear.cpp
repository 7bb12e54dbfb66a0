// Linear layers for float32 on a CPU, with the updates of adapters.
//
// A decoding step multiplies every weight of the model with a handful of rows, one a sequence. The
// libraries behind torch are made for larger matrices; here each weight is read from memory once and
// multiplied with all rows while it is in a register, which comes close to what the memory allows.

#include "linear.h"

#include <omp.h>

#include "panels.h"
#include "row_major.h"
#include "team.h"

namespace {

constexpr int64_t kChunk = 48;  // outputs in one piece where weights are not in panels; a multiple of 16

int64_t chunk_of(const Linear& layer) { return layer.kind <= Linear::kRowMajor ? kChunk : kPanel; }

// Inputs by which the memory is asked ahead: 6 kB of a panel.
constexpr int64_t kAhead = 48;

// The outputs [first, last) of a layer in panels. `ahead` panels further on is the one that the same thread will need
// next, as a rule. Behind the layer's last lies the next layer's first; asking for what is not there does nothing.
void panel_piece(const Linear& layer, int64_t first, int64_t last, int64_t ahead) {
  const int64_t in = layer.in, near = std::min(in, kAhead);
  const float* panel = layer.weights + first * in;
  const float* next = panel + ahead * kPanel * in;
  // The first rows ask a little ahead for the panel itself, and at its end for the beginning of the next;
  // later ones for the rest of that.
  Stream own, rest;
  own.add(panel + near * kPanel, in - near);
  own.add(next, near);
  rest.add(next + near * kPanel, in - near);
  fetch_updates(layer.groups, layer.count, first, last);
  panel_product(layer.x, layer.rows, in, panel, own, rest, layer.bias ? layer.bias + first : nullptr,
                layer.y + first, layer.out, last - first);
}

void piece(const Linear& layer, float* const* lows, int64_t number, int64_t threads) {
  const int64_t chunk = chunk_of(layer), first = number * chunk, last = std::min(first + chunk, layer.out);
  if (layer.kind == Linear::kPanels) {
    panel_piece(layer, first, last, threads);
  } else {
    fetch_updates(layer.groups, layer.count, first, last);
    if (layer.kind == Linear::kRowMajor) {
      outputs_of_rows(layer.x, layer.rows, FloatWeights{layer.weights, layer.in}, layer.bias, layer.y, layer.out,
                      first, last);
    } else if (layer.kind == Linear::kCoded) {
      const Coded panel = layer.codes.panel(first / kPanel, layer.bits);
      coded_product(layer.x, layer.rows, panel, layer.bits, layer.bias ? layer.bias + first : nullptr,
                    layer.y + first, layer.out, last - first);
    }
  }
  for (int64_t g = 0; g < layer.count; ++g)
    for (int64_t at = first; layer.groups[g].rank > 0 && at < last; at += kWidth)
      add_update(layer.groups[g], lows[g], layer.y, layer.out, at, std::min(kWidth, last - at));
}

// What the low-rank products of a thread's layers are kept in; as large as was ever needed.
struct Scratch {
  std::vector<float> numbers;
  std::vector<float*> lows;  // of each layer's groups, one after the other
  std::vector<LowItem> items;
};

}  // namespace

void compute(const Linear* layers, int64_t count) {
  thread_local Scratch scratch;
  int64_t size = 0, pieces = 0;
  for (int64_t n = 0; n < count; ++n) {
    pieces += (layers[n].out + chunk_of(layers[n]) - 1) / chunk_of(layers[n]);
    for (int64_t g = 0; g < layers[n].count; ++g)
      size += (layers[n].groups[g].last - layers[n].groups[g].first) * layers[n].groups[g].rank;
  }
  if (static_cast<int64_t>(scratch.numbers.size()) < size) scratch.numbers.resize(size);
  scratch.lows.clear();
  scratch.items.clear();
  float* low = scratch.numbers.data();
  for (int64_t n = 0; n < count; ++n)
    for (int64_t g = 0; g < layers[n].count; ++g) {
      const AdapterRows& group = layers[n].groups[g];
      scratch.lows.push_back(low);
      for (int64_t component = 0; component < group.rank; component += kWidth)
        for (int64_t row = group.first; row < group.last; row += kLowRows)
          scratch.items.push_back({n, g, component, row, std::min(row + kLowRows, group.last), low});
      low += (group.last - group.first) * group.rank;
    }
  const std::vector<LowItem>& items = scratch.items;
  team::parallel(items.size(), [&](int64_t i) {
    const Linear& layer = layers[items[i].layer];
    low_product(layer.low_x, layer.in, layer.groups[items[i].group], items[i]);
  });
  float* const* lows = scratch.lows.data();
  const int64_t threads = team::size();
  team::parallel(pieces, [&](int64_t number) {
    int64_t n = 0, groups = 0;
    for (;; ++n) {
      const int64_t own = (layers[n].out + chunk_of(layers[n]) - 1) / chunk_of(layers[n]);
      if (number < own) break;
      number -= own;
      groups += layers[n].count;
    }
    piece(layers[n], lows + groups, number, threads);
  });
}

extern "C" {

// Ends the calling thread's team of torch's helpers; the next of torch's parallel operators makes a new one.
// While there are more of OpenMP's threads than cores, they all sleep at each barrier.
void release_threads() { omp_pause_resource_all(omp_pause_soft); }

// From now on the calling thread computes without helpers, torch's operators included.
void compute_alone() {
  omp_set_num_threads(1);
  team::stay_alone();
}

// From now on torch's operators have no helpers in the calling thread. Theirs would spin on the cores that ours need.
void torch_alone() { omp_set_num_threads(1); }

// How many threads share a job of the calling thread, itself among them.
int64_t team_size() { return team::size(); }

// y = x wᵀ + bias, plus each adapter's update of its own rows.
//   x [rows, in], w [out, in], bias [out] or null, y [rows, out]; groups [count]
void linear_f32(const float* x, int64_t rows, int64_t in, const float* w, const float* bias, float* y, int64_t out,
                const AdapterRows* groups, int64_t count) {
  const Linear layer = Linear::row_major(x, rows, in, w, bias, y, out, groups, count);
  compute(&layer, 1);
}

// The same for weights in panels: [out / 32 rounded up, in, 32], filled up with zeros.
void linear_panels(const float* x, int64_t rows, int64_t in, const float* panels, const float* bias, float* y,
                   int64_t out, const AdapterRows* groups, int64_t count) {
  const Linear layer = Linear::panels(x, rows, in, panels, bias, y, out, groups, count);
  compute(&layer, 1);
}

// The same for coded panels, see Coded. `low_x` is what the adapters multiply: x has its columns in the
// order of the groups, `low_x` in the layer's own.
void linear_coded(const float* x, const float* low_x, int64_t rows, int64_t in, int64_t bits, const int32_t* codes,
                  const float* scales, const float* offsets, const float* table, int64_t count, int64_t shift,
                  const float* bias, float* y, int64_t out, const AdapterRows* groups, int64_t group_count) {
  const Coded all{codes, scales, offsets, table, in, count, shift};
  const Linear layer = Linear::coded(x, low_x, rows, all, bits, bias, y, out, groups, group_count);
  compute(&layer, 1);
}

// The update alone of one adapter, for a layer whose product is computed elsewhere.
void update_f32(const float* x, int64_t in, float* y, int64_t out, const AdapterRows* group) {
  const Linear layer = Linear::updates(x, group->last, in, y, out, group, 1);
  compute(&layer, 1);
}

// w [out, in] in panels: [out / 32 rounded up, in, 32], filled up with zeros. torch's own copy between the two
// orders takes several times as long.
void to_panels_f32(const float* w, int64_t out, int64_t in, float* panels) {
  team::parallel((out + kPanel - 1) / kPanel, [&](int64_t p) {
    float* panel = panels + p * in * kPanel;
    const int64_t width = std::min(kPanel, out - p * kPanel);
    if (width < kPanel) std::fill(panel, panel + in * kPanel, 0.0f);
    constexpr int64_t kInputs = 16;  // a cache line of each row at a time
    for (int64_t i = 0; i < in; i += kInputs)
      for (int64_t j = 0; j < width; ++j) {
        const float* row = w + (p * kPanel + j) * in;
        for (int64_t k = i; k < std::min(in, i + kInputs); ++k) panel[k * kPanel + j] = row[k];
      }
  });
}

// All weights of coded panels as floats: [out / 32 rounded up, in, 32].
void decode_panels(int64_t in, int64_t bits, const int32_t* codes, const float* scales, const float* offsets,
                   const float* table, int64_t count, int64_t shift, float* panels, int64_t number) {
  const Coded all{codes, scales, offsets, table, in, count, shift};
  team::parallel(number, [&](int64_t p) { decode_panel(all.panel(p, bits), bits, panels + p * in * kPanel); });
}

}  // extern "C"
