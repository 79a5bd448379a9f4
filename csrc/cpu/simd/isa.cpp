#include "cpu/simd/isa.h"

#include <atomic>

#if TQ_HAS_X86_VARIANTS
#include <cpuid.h>
#endif
#if TQ_HAS_X86_VARIANTS && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

std::atomic<Isa> g_limit{Isa::kAmx};

#if TQ_HAS_X86_VARIANTS
// Reads cpuid leaf 7 itself, because not all compilers that build this know these features by name.
bool has_leaf_7_bit(unsigned subleaf, bool in_edx, unsigned bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx) == 0) return false;
  return ((in_edx ? edx : eax) >> bit & 1u) != 0;
}
#endif

// Asks the system for the tile registers, which a process may use only after it has asked.
bool enable_amx() {
#if TQ_HAS_X86_VARIANTS && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  // Tiles, products of bf16 numbers, and of int8 numbers: no processor has but some of them.
  const bool has_tiles = has_leaf_7_bit(0, true, 24) && has_leaf_7_bit(0, true, 22) && has_leaf_7_bit(0, true, 25);
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  static const bool is_enabled = detect_isa() == Isa::kAvx512 && enable_amx();
  return is_enabled;
}

}  // namespace

bool cpu_has([[maybe_unused]] CpuTrait trait) {
#if TQ_HAS_X86_VARIANTS
  switch (trait) {
    case CpuTrait::kBf16Dot:
      return has_leaf_7_bit(1, false, 5);
    case CpuTrait::kAmx:
      return has_amx();
    case CpuTrait::kAmd:
      __builtin_cpu_init();
      return __builtin_cpu_is("amd") != 0;
    case CpuTrait::kByteTables:
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx512vbmi") != 0;
  }
#endif
  return false;
}

Isa current_isa() {
  static const Isa detected = detect_isa();
  const Isa limit = g_limit.load(std::memory_order_relaxed);
  return detected < limit ? detected : limit;
}

bool can_use_amx() { return has_amx() && g_limit.load(std::memory_order_relaxed) == Isa::kAmx; }

void limit_isa(Isa limit) { g_limit.store(limit, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  return isa == Isa::kAmx ? "amx" : isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "base";
}

}  // namespace tq
