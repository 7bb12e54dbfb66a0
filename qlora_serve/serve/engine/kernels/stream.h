// What the memory is asked for while sums are computed.
#pragma once

#include "updates.h"

// Memory in steps of kPanel floats: two cache lines, as much as a panel holds for one input.
struct Part {
  const float* at;  // null where nothing is left
  int64_t steps;
};

// What is not near yet and will be needed soon, in the order in which it is asked for. A core waits when it
// asks for much at once, and its memory is idle while it only computes: so it asks a little with each input.
class Stream {
 public:
  // After what is there already, `steps` from `at`; two such parts at most.
  void add(const float* at, int64_t steps) {
    if (steps <= 0) return;
    parts_[count_++] = {at, steps};
    all_ += steps;
  }

  // After those, the second matrices of groups for the panel whose first output is `first`.
  void add_updates(const AdapterRows* groups, int64_t count, int64_t first) {
    group_ = groups;
    last_ = groups + count;
    first_ = first;
    for (int64_t g = 0; g < count; ++g) all_ += groups[g].rank;
  }

  // Steps of all that was added.
  int64_t steps() const { return all_; }

  // What comes next, `most` steps of it at most.
  Part take(int64_t most) {
    if (now_.steps == 0 && !next()) return {nullptr, 0};
    const Part taken{now_.at, std::min(most, now_.steps)};
    now_.at += taken.steps * kPanel;
    now_.steps -= taken.steps;
    return taken;
  }

  // Asks for all that is left.
  void ask() {
    for (Part part = take(INT64_MAX); part.at; part = take(INT64_MAX))
      for (int64_t line = 0; line < 2 * part.steps; ++line) __builtin_prefetch(part.at + line * kWidth);
  }

 private:
  bool next() {
    if (begun_ < count_) {
      now_ = parts_[begun_++];
      return true;
    }
    while (group_ < last_ && group_->rank == 0) ++group_;
    if (group_ == last_) return false;
    now_ = {group_->b + first_ * group_->rank, group_->rank};
    ++group_;
    return true;
  }

  Part parts_[2], now_{nullptr, 0};
  int count_ = 0, begun_ = 0;
  const AdapterRows *group_ = nullptr, *last_ = nullptr;
  int64_t first_ = 0, all_ = 0;
};
