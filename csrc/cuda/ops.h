// CUDA operators as the bindings see them: no CUDA type crosses this header.
#pragma once

#include <string>

#include "common/conv_halo.h"
#include "common/depthwise.h"
#include "common/effective_weight.h"
#include "common/norm_act_backward.h"
#include "common/norm_act_forward.h"
#include "cuda/depthwise_grad_weight.h"

namespace petite_fast {
namespace cuda {

// Toolkit this part was built with, e.g. "13.0".
std::string toolkit_version();

// Why the kernels cannot run on `device` (driver too old, no code for its architecture); empty
// when they can.
std::string why_not(int device);

// Each enqueues on `stream` (a cudaStream_t) of `device`; does not wait. Throws std::runtime_error
// with CUDA's own words when the launch is refused.
void launch_effective_weight(const EffectiveWeightParams& p, int device, void* stream);
void launch_depthwise(const DepthwiseParams& p, int device, void* stream);
void launch_depthwise_grad_weight(const DepthwiseGradWeightCudaParams& p, int device, void* stream);
void launch_norm_act(const NormActForward& p, int device, void* stream);
void launch_norm_act_backward(const NormActBackward& p, int device, void* stream);
void launch_pack_signs(const SignRows& p, int device, void* stream);
void launch_unpack_signs(const SignRows& p, int device, void* stream);
void launch_conv_halo(const ConvHaloParams& p, int device, void* stream);

}  // namespace cuda
}  // namespace petite_fast
