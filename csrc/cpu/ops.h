// CPU operators: one implementation per instruction set, and the function that picks one.
#pragma once

#include "common/compress.h"
#include "common/dropout.h"
#include "common/effective_weight.h"
#include "common/norm_act.h"
#include "common/shift_add.h"
#include "common/shuffle.h"
#include "common/stem.h"

namespace petite_fast {

#define PF_DECLARE_CPU_OPS(isa)                                       \
  namespace isa {                                                     \
  void effective_weight(const EffectiveWeightParams& p, int threads); \
  void quantise(const QuantiseParams& p, int threads);                \
  void dequantise(const DequantiseParams& p, int threads);            \
  void dropout(const DropoutParams& p, int threads);                  \
  void norm_act(const NormActForward& p, int threads);                \
  void norm_act_last(const NormActForward& p, int threads);           \
  void norm_act_backward(const NormActBackward& p, int threads);      \
  void norm_act_last_backward(const NormActBackward& p, int threads); \
  void pack_signs(const SignRows& p, int threads);                    \
  void unpack_signs(const SignRows& p, int threads);                  \
  void shuffle(const ShuffleParams& p, int threads);                  \
  void stem(const StemParams& p, int threads);                        \
  void shift_add(const ShiftAddParams& p, int threads);               \
  }

PF_DECLARE_CPU_OPS(baseline)
PF_DECLARE_CPU_OPS(avx2)
PF_DECLARE_CPU_OPS(avx512)
#undef PF_DECLARE_CPU_OPS

void effective_weight(const EffectiveWeightParams& p, int threads);
void quantise(const QuantiseParams& p, int threads);
void dequantise(const DequantiseParams& p, int threads);
void dropout(const DropoutParams& p, int threads);
void norm_act(const NormActForward& p, int threads);
void norm_act_backward(const NormActBackward& p, int threads);
void pack_signs(const SignRows& p, int threads);
void unpack_signs(const SignRows& p, int threads);
void shuffle(const ShuffleParams& p, int threads);
void stem(const StemParams& p, int threads);
void shift_add(const ShiftAddParams& p, int threads);

// Runs the phases of the CUDA kernel on the host, block by block with `threads` virtual threads.
void emulate_effective_weight(const EffectiveWeightParams& p, int threads);

}  // namespace petite_fast
