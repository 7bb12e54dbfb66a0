// A job in pieces, for the cores of the machine.
#pragma once

#include <cstdint>

namespace team {

using Piece = void (*)(const void* job, int64_t number);

// Calls piece(job, 0), ..., piece(job, count - 1), each once, on whichever thread is free; returns when all
// are done. In the order of their numbers, as far as they begin. One job at a time: another thread that comes
// meanwhile does its own alone, as does one that was told to.
void run(int64_t count, Piece piece, const void* job);

// From now on the calling thread does all its jobs alone.
void stay_alone();

// How many threads share a job, the caller among them.
int64_t size();

// Calls work(0), ..., work(count - 1), see `run`.
template <typename Work>
void parallel(int64_t count, const Work& work) {
  run(count, [](const void* job, int64_t number) { (*static_cast<const Work*>(job))(number); }, &work);
}

}  // namespace team
