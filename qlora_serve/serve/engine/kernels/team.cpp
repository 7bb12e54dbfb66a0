// Threads for jobs of a few microseconds, of which a decoding step has some two hundred.
//
// OpenMP's threads meet at barriers: one that another process keeps from its core holds up all the others,
// even when it has nothing to do, and meanwhile they spin. Here pieces are counted, not threads. Whoever is
// running takes the next piece, a job is done when its pieces are, and who has waited for a while sleeps, so
// that the core is free for the thread it waits for.

#include "team.h"

#include <omp.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace team {
namespace {

// How long a thread looks for what it waits for before it lets others have its core, if there are any; and before
// it sleeps. To wake a thread whose core has gone idle can take a millisecond or two on a virtual machine, so that
// helpers stay awake from one decoding step to the next.
constexpr auto kAlone = std::chrono::microseconds(50);
constexpr auto kHelpers = std::chrono::microseconds(5000);
constexpr auto kOwner = std::chrono::microseconds(500);

constexpr int kLooks = 32;  // between two looks at the clock

using Word = std::atomic<uint32_t>;

// Sleeps while the word holds `value`; may return early.
void sleep_while(Word& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake_all(Word& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `is_so()`, for `patience` at most; returns whether it is.
template <typename Condition>
bool watch(std::chrono::microseconds patience, const Condition& is_so) {
  const auto look = [&] {
    for (int n = 0; n < kLooks; ++n) {
      if (is_so()) return true;
      relax();
    }
    return false;
  };
  if (look()) return true;
  const auto begun = std::chrono::steady_clock::now();
  for (auto waited = begun - begun; waited < patience; waited = std::chrono::steady_clock::now() - begun) {
    if (look()) return true;
    if (waited > kAlone) std::this_thread::yield();
  }
  return is_so();
}

class Team {
 public:
  explicit Team(int64_t threads) : size_(threads), lanes_(threads) {
    for (int64_t n = 1; n < threads; ++n) begin_helper(n);
  }

  int64_t size() const { return size_; }

  // Whether the caller may use the team; if so it has to `leave` it.
  bool enter() { return size_ > 1 && !is_used_.test_and_set(std::memory_order_acquire); }
  void leave() { is_used_.clear(std::memory_order_release); }

  void run(int64_t count, Piece piece, const void* job) {
    piece_ = piece;
    job_ = job;
    count_ = count;
    unfinished_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
    // What comes before is seen by whoever gets a piece. In one order with `sleepers_`: either a helper that
    // lies down sees its pieces, or we see it.
    for (int64_t lane = size_ - 1; lane >= 0; --lane)
      lanes_[lane].left.store(pieces_of(lane), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      call_.fetch_add(1);
      wake_all(call_);
    }
    take_pieces(0);
    while (!watch(kOwner, [&] { return unfinished_.load(std::memory_order_acquire) == 0; })) {
      // Another process has the core of a helper in the middle of a piece; it can have ours.
      is_waiting_.store(true, std::memory_order_seq_cst);
      const uint32_t now = unfinished_.load(std::memory_order_seq_cst);
      if (now > 0) sleep_while(unfinished_, now);
    }
    is_waiting_.store(false, std::memory_order_relaxed);
  }

 private:
  // The pieces of each thread are every size_-th: what it asks the memory for while it computes one is what it
  // needs for its next. They are its own as long as nobody else runs out of work.
  struct alignas(128) Lane {              // two cache lines, which processors fetch together
    std::atomic<int64_t> left{0};         // pieces that nobody has begun; below 0 after somebody looked
  };

  int64_t pieces_of(int64_t lane) const { return (count_ - lane + size_ - 1) / size_; }

  void begin_helper(int64_t lane) {
#if defined(__linux__)
    // Signals are for the threads that wait for them.
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
#endif
    std::thread([this, lane] { help(lane); }).detach();
#if defined(__linux__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void help(int64_t lane) {
    std::atomic<int64_t>& left = lanes_[lane].left;
    for (;;) {
      if (watch(kHelpers, [&] { return left.load(std::memory_order_relaxed) > 0; })) {
        take_pieces(lane);
        continue;
      }
      const uint32_t call = call_.load();
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (left.load(std::memory_order_seq_cst) <= 0) sleep_while(call_, call);
      sleepers_.fetch_sub(1);
    }
  }

  // A thread's own pieces, and then what others have not begun.
  void take_pieces(int64_t own) {
    for (int64_t n = 0; n < size_; ++n) {
      const int64_t lane = (own + n) % size_;
      std::atomic<int64_t>& left = lanes_[lane].left;
      while (left.load(std::memory_order_relaxed) > 0) {
        // Only who gets a piece may look at the job: its owner waits for the piece, and so for us.
        const int64_t got = left.fetch_sub(1, std::memory_order_acquire);
        if (got <= 0) break;
        piece_(job_, lane + size_ * (pieces_of(lane) - got));
        if (unfinished_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
            is_waiting_.load(std::memory_order_seq_cst))
          wake_all(unfinished_);
      }
    }
  }

  const int64_t size_;
  std::vector<Lane> lanes_;
  Piece piece_ = nullptr;
  const void* job_ = nullptr;
  int64_t count_ = 0;
  std::atomic_flag is_used_ = ATOMIC_FLAG_INIT;
  alignas(128) Word unfinished_{0};      // pieces that are not done
  alignas(128) Word call_{0};            // counts the calls to those who sleep
  std::atomic<int> sleepers_{0};
  std::atomic<bool> is_waiting_{false};  // the owner of the job sleeps until it is done
};

// Never taken down: helpers may be asleep in it when the process ends.
Team& the_team() {
  static Team* team = new Team(omp_get_max_threads());
  return *team;
}

thread_local bool is_alone = false;

}  // namespace

void run(int64_t count, Piece piece, const void* job) {
  if (!is_alone && count > 1 && the_team().enter()) {
    the_team().run(count, piece, job);
    the_team().leave();
    return;
  }
  for (int64_t number = 0; number < count; ++number) piece(job, number);
}

void stay_alone() { is_alone = true; }

int64_t size() { return is_alone ? 1 : the_team().size(); }

}  // namespace team
