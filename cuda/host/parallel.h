// A pool of threads that share out the tasks of one call. Calls come from one thread at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace foretoken {

// Multiply-adds under which a call is not worth a second thread: about what waking one costs.
constexpr int64_t kWorthThreads = 100000;

// Run task(0) … task(num_tasks - 1) on up to `num_threads` threads, the caller's included; returns when all are done.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

// The same over ranges [begin, end) of `count` items, about `grain` each; a single range runs on the caller's thread.
void parallel_ranges(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& range);

}  // namespace foretoken
