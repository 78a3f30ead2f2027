// Python's way to the shuffle of convolutions whose kernel is their stride.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "common/shuffle.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

using Triple = std::array<int64_t, 3>;

float* floats(const char* name, const Operand& operand, int64_t elements) {
  check_operand(name, operand, elements);
  require(!present(operand) || dtype_of(operand) == DType::kFloat32,
          std::string(name) + ": must be float32");
  return static_cast<float*>(data_of(operand));
}

}  // namespace

void bind_shuffle(py::module_& m) {
  m.def(
      "shuffle",
      [](int form, bool to_volume, int64_t channels, const Triple& block, const Triple& size,
         int64_t first, int64_t rows, const Operand& volume, const Operand& matrix,
         const Operand& bias, int threads) {
        require(form >= 0 && form < kShuffleFormCount, "form code must be 0 to 2" + got(form));
        require(channels > 0, "channels must be positive" + got(channels));
        require(threads > 0, "threads must be positive" + got(threads));
        require(present(volume) && present(matrix), "volume and matrix must not be null");
        ShuffleParams p{};
        int64_t taps = 1, voxels = 1;
        for (int i = 0; i < 3; ++i) {
          require(block[i] > 0 && size[i] >= block[i],
                  "a block must be positive and fit the volume" + got(block[i]));
          p.block[i] = block[i];
          p.size[i] = size[i];
          p.blocks[i] = size[i] / block[i];
          taps *= block[i];
          voxels *= size[i];
        }
        require(first >= 0 && rows > 0 && rows <= p.blocks[0] * p.blocks[1] - first,
                "rows must be some of the volume's" + got(rows));
        p.form = static_cast<ShuffleForm>(form);
        p.to_volume = to_volume;
        p.channels = channels;
        p.first = first;
        p.rows = rows;
        p.volume = floats("volume", volume, channels * voxels);
        p.matrix = floats("matrix", matrix, channels * taps * rows * p.blocks[2]);
        const bool last = p.form == ShuffleForm::kChannelsLast;
        p.bias = floats("bias", bias, last ? channels * block[2] : channels);
        py::gil_scoped_release release;
        shuffle(p, threads);
      },
      "A volume from the matrix of its blocks, or the matrix from it. See common/shuffle.h.");
}

}  // namespace petite_fast
