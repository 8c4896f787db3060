#include "parallel.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace foretoken {
namespace {

// About as long as a layer's gaps between calls: a worker that sleeps costs a system call to wake.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int num_workers) {
    for (int i = 0; i < num_workers; ++i) std::thread([this, i] { work(i); }).detach();
  }

  void run(int64_t num_tasks, int num_workers, const std::function<void(int64_t)>& task) {
    task_ = &task;
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(num_workers, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const uint64_t count = (generation_.load(std::memory_order_relaxed) >> kCountBits) + 1;
      generation_.store(count << kCountBits | static_cast<uint64_t>(num_workers), std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    take();
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // its core may be somebody else's just now
      }
    }
  }

 private:
  static constexpr int kCountBits = 16;

  void take() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) (*task_)(i);
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_release);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_release);
      }
      seen = generation_.load(std::memory_order_acquire);
      // `run` waits for the workers that its generation counts, and for no others: who is not among them may be late,
      // and must not look at anything but this word.
      if (index < static_cast<int>(seen & ((1u << kCountBits) - 1))) {
        take();
        busy_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};  // of the call, and below it how many workers it wants
  std::atomic<int> sleeping_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t num_tasks_ = 0;
};

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  static std::mutex calls;
  static Pool* pool = nullptr;  // never destroyed: its threads outlive static destruction
  static int size = 0;
  static pid_t owner = 0;
  const int num_wanted = static_cast<int>(num_tasks < num_threads ? num_tasks : num_threads);
  if (num_wanted <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  std::lock_guard<std::mutex> lock(calls);
  // Sized by the threads that the process may use, not by this call's tasks: a pool that grew would leave its threads.
  // A fork keeps the memory of a pool and none of its threads.
  if (pool == nullptr || size < num_threads - 1 || owner != getpid()) {
    size = num_threads - 1;
    pool = new Pool(size);
    owner = getpid();
  }
  pool->run(num_tasks, num_wanted - 1, task);
}

void parallel_ranges(int64_t count, int64_t grain, int num_threads,
                     const std::function<void(int64_t, int64_t)>& range) {
  grain = grain < 1 ? 1 : grain;
  parallel_for((count + grain - 1) / grain, num_threads, [&](int64_t task) {
    const int64_t begin = task * grain, end = begin + grain < count ? begin + grain : count;
    range(begin, end);
  });
}

}  // namespace foretoken
