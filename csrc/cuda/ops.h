// CUDA operators as the bindings see them: no CUDA type crosses this header.
#pragma once

#include <string>

#include "common/conv_halo.h"
#include "common/effective_weight.h"

namespace petite_fast {
namespace cuda {

// Toolkit this part was built with, e.g. "13.0".
std::string toolkit_version();

// Why the kernels cannot run on `device` (driver too old, no code for its architecture); empty
// when they can.
std::string why_not(int device);

// Enqueues on `stream` (a cudaStream_t) of `device`; does not wait. Throws std::runtime_error with
// CUDA's own words when the launch is refused.
void launch_effective_weight(const EffectiveWeightParams& p, int device, void* stream);
void launch_conv_halo(const ConvHaloParams& p, int device, void* stream);

}  // namespace cuda
}  // namespace petite_fast
