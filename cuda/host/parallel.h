// A pool of threads that share out the tasks of one call. Calls come from one thread at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace foretoken {

// Run task(0) … task(num_tasks - 1) on up to `num_threads` threads, the caller's included; returns when all are done.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace foretoken
