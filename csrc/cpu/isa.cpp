#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#include "cpu/ops.h"

namespace petite_fast {
namespace {

bool runs_here(Isa isa) {
#if defined(PF_HAVE_X86_ISAS)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
  }
#endif
  return isa == Isa::kBaseline;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{usable_isas().back()};
  return isa;
}

std::string joined(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

std::vector<Isa> built_isas() {
#if defined(PF_HAVE_X86_ISAS)
  return {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};
#else
  return {Isa::kBaseline};
#endif
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
  for (Isa isa : built_isas()) {
    if (runs_here(isa)) usable.push_back(isa);
  }
  return usable;
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
  for (Isa isa : usable_isas()) {
    if (name == isa_name(isa)) {
      selected().store(isa, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "': built for " + joined(built_isas()) +
                              "; this CPU runs " + joined(usable_isas()));
}

// The operator of the chosen instruction set.
#if defined(PF_HAVE_X86_ISAS)
#define PF_DISPATCH(name, Params)                                       \
  void name(const Params& p, int threads) {                             \
    if (current_isa() == Isa::kAvx512) return avx512::name(p, threads); \
    if (current_isa() == Isa::kAvx2) return avx2::name(p, threads);     \
    baseline::name(p, threads);                                         \
  }
#else
#define PF_DISPATCH(name, Params) \
  void name(const Params& p, int threads) { baseline::name(p, threads); }
#endif

PF_DISPATCH(effective_weight, EffectiveWeightParams)
PF_DISPATCH(quantise, QuantiseParams)
PF_DISPATCH(dequantise, DequantiseParams)
PF_DISPATCH(dropout, DropoutParams)
PF_DISPATCH(norm_act, NormActForward)
PF_DISPATCH(norm_act_backward, NormActBackward)
PF_DISPATCH(pack_signs, SignRows)
PF_DISPATCH(unpack_signs, SignRows)
PF_DISPATCH(shuffle, ShuffleParams)
PF_DISPATCH(stem, StemParams)
PF_DISPATCH(shift_add, ShiftAddParams)
#undef PF_DISPATCH

}  // namespace petite_fast
