// The CUDA convolution's blocks on the host, one after the other.
#include "common/conv_halo.h"
#include "cpu/emulate_block.h"
#include "cpu/ops.h"

namespace petite_fast {

BlockCounts emulate_conv_halo(const ConvHaloParams& p) {
  BlockCounts counts;
  visit_conv_halo(p, [&](auto kind) {
    using Kind = decltype(kind);
    for (int64_t block = 0; block < conv_halo_blocks(p); ++block) {
      EmulatedBlock<kConvHaloWarps> machine(Kind::kSharedBytes, counts);
      conv_halo_block<Kind>(p, block, machine);
    }
  });
  return counts;
}

}  // namespace petite_fast
