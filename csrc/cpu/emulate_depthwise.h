// The phases of the depthwise CUDA kernels run on the host, block by block.
#pragma once

#include "common/depthwise.h"
#include "cuda/depthwise_grad_weight.h"

namespace petite_fast {

void emulate_depthwise(const DepthwiseParams& p);
void emulate_depthwise_grad_weight(const DepthwiseGradWeightCudaParams& p);

}  // namespace petite_fast
