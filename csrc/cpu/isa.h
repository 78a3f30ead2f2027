// Which of the compiled instruction sets the CPU operators run on.
#pragma once

#include <string>
#include <vector>

namespace petite_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// The sets in this binary, and those of them that this CPU (and its system) can run; best last.
std::vector<Isa> built_isas();
std::vector<Isa> usable_isas();

// The set in use; the best usable one until set_isa is called.
Isa current_isa();

// Throws std::invalid_argument when `name` is unknown, was not built or cannot run here.
void set_isa(const std::string& name);

}  // namespace petite_fast
