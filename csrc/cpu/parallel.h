// A parallel loop on the OpenMP runtime that the process already has: torch's.
//
// Only parallel.cpp is compiled with OpenMP, and nothing links libgomp: `import torch` loads its
// copy globally and the symbols resolve there. Two runtimes in one process fight for the cores.
#pragma once

#include <cstdint>

namespace petite_fast {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) on disjoint ranges that cover [0, count), on at most
// `threads` threads. An exception in any range is thrown here once all ranges have stopped.
void parallel_ranges(int64_t count, int threads, RangeFunction function, const void* context);

// body(begin, end) over [0, count); no thread is given fewer than `grain` items.
template <typename Body>
static void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t useful = count / (grain > 0 ? grain : 1);
  const int used = useful < threads ? static_cast<int>(useful) : threads;
  parallel_ranges(
      count, used,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

}  // namespace petite_fast
