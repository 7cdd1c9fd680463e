// Threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sbert_kernels {

// Runs tasks 0 .. tasks - 1, each of which writes what no other writes, in an order of its own: results do not depend
// on who runs them. `worker` is called once for each thread, with a function that hands out the next task or -1: cores
// that are faster, or not shared with somebody else, take more of them. An exception of a worker reaches the caller,
// and the others then stop after the task that they are at.
template <class Worker>
void parallel(int64_t tasks, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto next_task = [&] {
    const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    try {
      worker(next_task);
    } catch (...) {
      next = tasks;
      throw;
    }
  });
}

}  // namespace sbert_kernels
