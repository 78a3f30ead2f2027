// CPU form of common/compress.h; compiled once per instruction set, each into its own namespace
// PF_ISA. A block is widened to float once and stays in the first-level cache for its loops, which
// are plain enough for the compiler to vectorise.
#include "common/compress.h"

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kGrain = 64;  // blocks worth waking a thread for

void make_codes(const float* __restrict values, BlockScale scale, uint32_t first, uint32_t second,
                int8_t* __restrict codes) {
  for (int i = 0; i < kCompressBlock; ++i) {
    const int32_t fraction = random_fraction(first, second, static_cast<uint32_t>(i));
    codes[i] = code_of(values[i] * scale.factor, fraction);
  }
}

template <typename T>
void quantise_blocks(const QuantiseParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kCompressBlock;
    const int count = static_cast<int>(std::min<int64_t>(kCompressBlock, p.count - start));
    const T* source = static_cast<const T*>(p.values) + start;
    alignas(64) float values[kCompressBlock] = {};
    for (int i = 0; i < count; ++i) values[i] = widen<float>(source[i]);
    uint32_t bits = 0;
    for (float value : values) bits = std::max(bits, bit_cast<uint32_t>(value) & 0x7fffffffu);
    const BlockScale scale = block_scale(bits);
    p.scales[block] = scale.stored;
    int8_t* codes = p.codes + start;
    if (scale.factor == 0.0f) {
      std::fill_n(codes, kCompressBlock, int8_t(0));
      continue;
    }
    if (scale.lift != 1.0f) {
      for (float& value : values) value *= scale.lift;
    }
    make_codes(values, scale, block_key(p.keys[0], block), block_key(p.keys[1], block), codes);
  }
}

template <typename T>
void dequantise_blocks(const DequantiseParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kCompressBlock;
    const int count = static_cast<int>(std::min<int64_t>(kCompressBlock, p.count - start));
    const int8_t* codes = p.codes + start;
    const float scale = p.scales[block];
    T* target = static_cast<T*>(p.values) + start;
    for (int i = 0; i < count; ++i) target[i] = round_from<T>(value_of(codes[i], scale));
  }
}

}  // namespace

void quantise(const QuantiseParams& p, int threads) {
  parallel_for(block_count(p.count), kGrain, threads, [&p](int64_t begin, int64_t end) {
    if (p.dtype == DType::kFloat32) return quantise_blocks<float>(p, begin, end);
    if (p.dtype == DType::kBFloat16) return quantise_blocks<BFloat16>(p, begin, end);
    quantise_blocks<Float16>(p, begin, end);
  });
}

void dequantise(const DequantiseParams& p, int threads) {
  parallel_for(block_count(p.count), kGrain, threads, [&p](int64_t begin, int64_t end) {
    if (p.dtype == DType::kFloat32) return dequantise_blocks<float>(p, begin, end);
    if (p.dtype == DType::kBFloat16) return dequantise_blocks<BFloat16>(p, begin, end);
    dequantise_blocks<Float16>(p, begin, end);
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
