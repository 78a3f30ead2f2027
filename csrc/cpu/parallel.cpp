#include "cpu/parallel.h"

#include <omp.h>

#include <atomic>
#include <exception>

namespace petite_fast {

void parallel_ranges(int64_t count, int threads, RangeFunction function, const void* context) {
  if (count <= 0) return;
  if (threads <= 1) {
    function(context, 0, count);
    return;
  }
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than asked for (a nested region gets one).
    const int64_t team = omp_get_num_threads();
    const int64_t member = omp_get_thread_num();
    const int64_t begin = count * member / team;
    const int64_t end = count * (member + 1) / team;
    try {
      if (begin < end) function(context, begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace petite_fast
