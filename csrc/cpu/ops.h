// CPU operators: one implementation per instruction set, and the function that picks one.
#pragma once

#include "common/bottleneck.h"
#include "common/compress.h"
#include "common/depthwise.h"
#include "common/dropout.h"
#include "common/effective_weight.h"
#include "common/low_rank.h"
#include "common/norm_act.h"
#include "common/shift_add.h"
#include "common/shuffle.h"
#include "common/stem.h"

namespace petite_fast {

// name, parameters
#define PF_FOR_CPU_OPS(X)                             \
  X(effective_weight, EffectiveWeightParams)          \
  X(bottleneck, BottleneckParams)                     \
  X(quantise, QuantiseParams)                         \
  X(dequantise, DequantiseParams)                     \
  X(dropout, DropoutParams)                           \
  X(low_rank, LowRankParams)                          \
  X(depthwise, DepthwiseParams)                       \
  X(depthwise_grad_weight, DepthwiseGradWeightParams) \
  X(norm_act, NormActForward)                         \
  X(norm_act_backward, NormActBackward)               \
  X(pack_signs, SignRows)                             \
  X(unpack_signs, SignRows)                           \
  X(shuffle, ShuffleParams)                           \
  X(shift_add, ShiftAddParams)                        \
  X(stem, StemParams)

#define PF_DECLARE(name, Params) void name(const Params& p, int threads);
#define PF_DECLARE_CPU_OPS(isa)                                       \
  namespace isa {                                                     \
  PF_FOR_CPU_OPS(PF_DECLARE)                                          \
  void norm_act_last(const NormActForward& p, int threads);           \
  void norm_act_last_backward(const NormActBackward& p, int threads); \
  }

PF_DECLARE_CPU_OPS(baseline)
PF_DECLARE_CPU_OPS(avx2)
PF_DECLARE_CPU_OPS(avx512)
PF_FOR_CPU_OPS(PF_DECLARE)
#undef PF_DECLARE_CPU_OPS
#undef PF_DECLARE

// Runs the phases of the CUDA kernel on the host, block by block with `threads` virtual threads.
void emulate_effective_weight(const EffectiveWeightParams& p, int threads);
void emulate_norm_act(const NormActForward& p, int threads);
void emulate_norm_act_backward(const NormActBackward& p, int threads);
void emulate_pack_signs(const SignRows& p);
void emulate_unpack_signs(const SignRows& p);
struct BlockCounts;
struct ConvHaloParams;
BlockCounts emulate_conv_halo(const ConvHaloParams& p);

}  // namespace petite_fast
