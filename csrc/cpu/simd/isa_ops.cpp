// Which instruction set the CPU kernels use: shown by `tq-fast info`, limited by tests.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "cpu/simd/isa.h"

namespace tq {

namespace {

std::string cpu_isa() { return isa_name(current_isa()); }

void limit_cpu_isa(const std::string& name) {
  for (const Isa isa : {Isa::kBase, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (name == isa_name(isa)) return limit_isa(isa);
  }
  STD_TORCH_CHECK(false, "limit_cpu_isa: ", name, " is not one of base, avx2, avx512, amx");
}

bool cpu_has_trait(const std::string& name) {
  if (name == "avx512_bf16") return cpu_has(CpuTrait::kBf16Dot);
  if (name == "amx") return cpu_has(CpuTrait::kAmx);
  if (name == "amd") return cpu_has(CpuTrait::kAmd);
  STD_TORCH_CHECK(false, "cpu_has: ", name, " is not one of avx512_bf16, amx, amd");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_has", TORCH_BOX(&cpu_has_trait));
  m.impl("limit_cpu_isa", TORCH_BOX(&limit_cpu_isa));
}

}  // namespace tq
