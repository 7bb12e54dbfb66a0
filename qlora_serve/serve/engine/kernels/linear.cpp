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

int64_t pieces_of(const Linear& layer) { return (layer.out + chunk_of(layer) - 1) / chunk_of(layer); }

// Layers that are computed together, in pieces: first the low-rank products of their adapters, then their outputs.
struct Job {
  const Linear* layers;
  int64_t count, threads, pieces = 0;
  std::vector<float> numbers;  // the low-rank products; as large as was ever needed
  std::vector<float*> lows;    // of each layer's groups, one after the other
  std::vector<LowItem> items;

  void begin(const Linear* its_layers, int64_t its_count);
  void compute_low(int64_t number) const;
  void compute_piece(int64_t number) const;

 private:
  struct Place {
    const Linear* layer;  // null behind the last piece
    float* const* lows;
    int64_t first;        // output
  };

  Place place_of(int64_t number) const;
  Stream stream_for(int64_t number, const Place& place) const;
};

void Job::begin(const Linear* its_layers, int64_t its_count) {
  layers = its_layers;
  count = its_count;
  threads = team::size();
  pieces = 0;
  int64_t size = 0;
  for (int64_t n = 0; n < count; ++n) {
    pieces += pieces_of(layers[n]);
    for (int64_t g = 0; g < layers[n].count; ++g)
      size += (layers[n].groups[g].last - layers[n].groups[g].first) * layers[n].groups[g].rank;
  }
  if (static_cast<int64_t>(numbers.size()) < size) numbers.resize(size);
  lows.clear();
  items.clear();
  float* low = numbers.data();
  for (int64_t n = 0; n < count; ++n)
    for (int64_t g = 0; g < layers[n].count; ++g) {
      const AdapterRows& group = layers[n].groups[g];
      lows.push_back(low);
      for (int64_t component = 0; component < group.rank; component += kWidth)
        for (int64_t row = group.first; row < group.last; row += kLowRows)
          items.push_back({n, g, component, row, std::min(row + kLowRows, group.last), low});
      low += (group.last - group.first) * group.rank;
    }
}

void Job::compute_low(int64_t number) const {
  const Linear& layer = layers[items[number].layer];
  low_product(layer.low_x, layer.in, layer.groups[items[number].group], items[number]);
}

Job::Place Job::place_of(int64_t number) const {
  float* const* its_lows = lows.data();
  for (const Linear* layer = layers; layer < layers + count; ++layer) {
    if (number < pieces_of(*layer)) return {layer, its_lows, number * chunk_of(*layer)};
    number -= pieces_of(*layer);
    its_lows += layer->count;
  }
  return {nullptr, nullptr, 0};
}

// Inputs by which the memory is asked ahead within a panel: 6 kB.
constexpr int64_t kAhead = 48;

// The weights that the calling thread asked for last.
thread_local const void* asked = nullptr;

// The memory that is asked for during a piece. The next piece of the same thread is the one `threads` further on.
Stream Job::stream_for(int64_t number, const Place& place) const {
  const Linear& layer = *place.layer;
  const Place next = place_of(number + threads);
  const auto weights = [](const Place& at) -> Part {
    const Linear& layer = *at.layer;
    if (layer.kind <= Linear::kRowMajor) return {nullptr, 0};
    if (layer.kind == Linear::kPanels) return {layer.weights + at.first * layer.in, layer.in};
    // In as many floats as there are words.
    const Coded panel = layer.codes.panel(at.first / kPanel, layer.bits);
    return {reinterpret_cast<const float*>(panel.codes), layer.in * layer.bits / 32};
  };
  // With few rows the memory has always something to do: it is asked for the updates first, and then for the panel
  // itself and the beginning of the next, a little ahead. Products of more rows take longer than reading, which has
  // time for all that the next piece needs.
  const bool is_few = layer.rows <= kPanelRows;
  const Part own = weights(place), following = next.layer ? weights(next) : Part{nullptr, 0};
  const int64_t near = std::min(own.steps, kAhead);
  Stream stream;
  if (is_few || asked != own.at) {
    fetch_updates(layer.groups, layer.count, place.first, std::min(place.first + kPanel, layer.out));
    // Codes are read before the stream is: by the first rows.
    if (layer.kind == Linear::kPanels) stream.add(own.at + near * kPanel, own.steps - near);
  }
  if (is_few) {
    if (layer.kind == Linear::kPanels) stream.add(following.at, std::min(following.steps, kAhead));
  } else if (next.layer) {
    stream.add(following.at, following.steps);
    stream.add_updates(next.layer->groups, next.layer->count, next.first);
    asked = following.at;
  }
  return stream;
}

void Job::compute_piece(int64_t number) const {
  const Place place = place_of(number);
  const Linear& layer = *place.layer;
  const int64_t first = place.first, last = std::min(first + chunk_of(layer), layer.out);
  const float* bias = layer.bias ? layer.bias + first : nullptr;
  float* y = layer.y + first;
  if (layer.kind <= Linear::kRowMajor) {
    fetch_updates(layer.groups, layer.count, first, last);
    if (layer.kind == Linear::kRowMajor)
      outputs_of_rows(layer.x, layer.rows, FloatWeights{layer.weights, layer.in}, layer.bias, layer.y, layer.out,
                      first, last);
  } else {
    Stream stream = stream_for(number, place);
    if (layer.kind == Linear::kPanels)
      panel_product(layer.x, layer.rows, layer.in, layer.weights + first * layer.in, stream, bias, y, layer.out,
                    last - first);
    else
      coded_product(layer.x, layer.rows, layer.codes.panel(first / kPanel, layer.bits), layer.bits, stream, bias, y,
                    layer.out, last - first);
  }
  for (int64_t g = 0; g < layer.count; ++g)
    for (int64_t at = first; layer.groups[g].rank > 0 && at < last; at += kWidth)
      add_update(layer.groups[g], place.lows[g], layer.y, layer.out, at, std::min(kWidth, last - at));
}

}  // namespace

void compute(const Linear* layers, int64_t count) {
  thread_local Job own;
  Job& job = own;  // which is this thread's, whichever thread computes a piece of it
  job.begin(layers, count);
  team::parallel(job.items.size(), [&job](int64_t number) { job.compute_low(number); });
  team::parallel(job.pieces, [&job](int64_t number) { job.compute_piece(number); });
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
