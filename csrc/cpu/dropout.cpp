// CPU form of common/dropout.h; compiled once per instruction set, each into its own namespace
// PF_ISA. The hash is some ten integer operations an element, which the compiler vectorises.
#include "common/dropout.h"

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth waking a thread for

template <typename T>
void drop_blocks(const DropoutParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kRandomBlock;
    const int count = static_cast<int>(std::min<int64_t>(kRandomBlock, p.count - start));
    const T* x = static_cast<const T*>(p.x) + start;
    T* y = static_cast<T*>(p.y) + start;
    const uint32_t first = block_key(p.keys[0], block), second = block_key(p.keys[1], block);
    alignas(64) int32_t fractions[kRandomBlock];
    for (int i = 0; i < kRandomBlock; ++i) {
      fractions[i] = random_fraction(first, second, static_cast<uint32_t>(i));
    }
    for (int i = 0; i < count; ++i) {
      y[i] = round_from<T>(dropped(widen<float>(x[i]), fractions[i], p.threshold, p.scale));
    }
  }
}

}  // namespace

void dropout(const DropoutParams& p, int threads) {
  const int64_t blocks = (p.count + kRandomBlock - 1) / kRandomBlock;
  parallel_for(blocks, kGrain, threads, [&p](int64_t begin, int64_t end) {
    if (p.dtype == DType::kFloat32) return drop_blocks<float>(p, begin, end);
    if (p.dtype == DType::kBFloat16) return drop_blocks<BFloat16>(p, begin, end);
    drop_blocks<Float16>(p, begin, end);
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
