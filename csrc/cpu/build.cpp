// What this library is and which instruction set it chose: nasdet info prints it, and it marks the library as loaded.
#include "nasdet/isa.h"

#ifdef NASDET_REGISTER
#include "nasdet/checks.h"

namespace nasdet {
namespace {
int64_t cpu_isa() { return int64_t(cpu_capability()); }
int64_t cpu_tiles() { return int64_t(tiles()); }
}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_FRAGMENT(nasdet, m) {
  m.def("_cpu_isa() -> int");
  m.def("_cpu_tiles() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(nasdet, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&nasdet::cpu_isa));
  m.impl("_cpu_tiles", TORCH_BOX(&nasdet::cpu_tiles));
}
#endif
