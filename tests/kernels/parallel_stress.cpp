// Calls of changing thread and task counts on one pool: every task runs exactly once, and none after its call returned.
#include <atomic>
#include <cstdio>
#include <memory>

#include "parallel.h"

int main() {
  const int threads[] = {2, 5, 1, 3, 5, 2};
  for (int call = 0; call < 4000; ++call) {
    const int64_t num_tasks = 1 + call * 7 % 23;
    auto counts = std::make_unique<std::atomic<int>[]>(num_tasks);
    int64_t plain[32] = {};  // written by tasks without atomics: a task that outlives its call is a race
    foretoken::parallel_for(num_tasks, threads[call % 6], [&](int64_t i) {
      plain[i] = i + 1;
      counts[i].fetch_add(1);
    });
    for (int64_t i = 0; i < num_tasks; ++i)
      if (counts[i].load() != 1 || plain[i] != i + 1) {
        std::printf("call %d: task %lld ran %d times\n", call, static_cast<long long>(i), counts[i].load());
        return 1;
      }
  }
  return 0;
}
