#include "cpu/isa.h"

#include <atomic>

namespace tq {

namespace {

Isa detect_isa() {
#if TQ_HAS_X86_VARIANTS
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? Isa::kAvx512 : has_avx2 ? Isa::kAvx2 : Isa::kBase;
#else
  return Isa::kBase;
#endif
}

std::atomic<Isa> g_limit{Isa::kAvx512};

}  // namespace

Isa current_isa() {
  static const Isa detected = detect_isa();
  const Isa limit = g_limit.load(std::memory_order_relaxed);
  return detected < limit ? detected : limit;
}

void limit_isa(Isa limit) { g_limit.store(limit, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "base";
}

}  // namespace tq
