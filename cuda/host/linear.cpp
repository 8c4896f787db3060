#include "abi.h"
#include "gemm.h"
#include "parallel.h"

using namespace foretoken;

int64_t foretoken_abi_version() { return FORETOKEN_ABI_VERSION; }

void foretoken_linear(const float* x, const float* weight, const float* bias, float* y, int64_t num_rows,
                      int64_t num_in, int64_t num_out, int64_t num_threads) {
  std::vector<const float*> inputs(num_rows);
  std::vector<float*> outputs(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    inputs[r] = x + r * num_in;
    outputs[r] = y + r * num_out;
  }
  // A task has enough columns and rows that handing it out is cheap beside it: about 100 thousand multiply-adds.
  const int64_t row_chunk = 120;
  const int64_t rows = std::min<int64_t>(num_rows, row_chunk);
  const int64_t work_a_column = std::max<int64_t>(1, rows * num_in);
  const int64_t strips = std::max<int64_t>(1, 100000 / (work_a_column * kStrip));
  const int64_t wide = rows == 1 ? kRegisters / 2 * kLanes : kStrip;
  const int64_t columns = (strips * kStrip + wide - 1) / wide * wide;
  const int64_t num_column_tasks = (num_out + columns - 1) / columns;
  const int64_t num_row_tasks = (num_rows + row_chunk - 1) / row_chunk;
  const int threads = num_rows * num_in * num_out < kWorthThreads ? 1 : static_cast<int>(num_threads);
  parallel_for(num_column_tasks * num_row_tasks, threads, [&](int64_t task) {
    thread_local std::vector<float> buffer;
    const int64_t begin = task % num_column_tasks * columns, end = std::min(num_out, begin + columns);
    const int64_t first = task / num_column_tasks * row_chunk, last = std::min(num_rows, first + row_chunk);
    gemm_packed(inputs.data() + first, last - first, weight, num_out, num_in, outputs.data() + first, begin, end,
                buffer);
    if (bias != nullptr)
      for (int64_t r = first; r < last; ++r)
        for (int64_t n = begin; n < end; ++n) outputs[r][n] += bias[n];
  });
}
