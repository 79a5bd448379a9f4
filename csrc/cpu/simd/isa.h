// Which instruction-set variant of the vector code runs, chosen once at run time.
//
// Files named *_rows.cpp are compiled once for each variant, in namespace tq::TQ_ISA, and must not
// instantiate anything of the standard library: the linker keeps one copy of an inline function, and
// it could be the AVX-512 one.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define TQ_HAS_X86_VARIANTS 1
#else
#define TQ_HAS_X86_VARIANTS 0
#endif

namespace tq {

// AMX is no variant of its own: some products of the AVX-512 variant use its tiles.
enum class Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The best variant that this processor and the limit below allow: AVX-512 at most.
Isa current_isa();

// Whether products of bf16 numbers may use the tiles of AMX: the processor, the operating system and the
// limit below allow it.
bool can_use_amx();

// For tests: run as if the processor had no more than this.
void limit_isa(Isa limit);

const char* isa_name(Isa isa);

// Traits of the processor, beside the variants, that the choice between kernels depends on. Always false
// off x86-64.
// kAmx: the tiles may be used, as long as no limit is set. kByteTables: one instruction looks bytes up in a
// table of 128.
enum class CpuTrait : int { kBf16Dot, kAmx, kAmd, kByteTables };

// Tells of the processor itself, whatever the limit.
bool cpu_has(CpuTrait trait);

}  // namespace tq

// TQ_FOR_EACH_ISA(DECLARE) expands DECLARE(base) and, on x86-64, DECLARE(avx2) and DECLARE(avx512).
// TQ_SELECT_ISA(function) is the variant of tq::<isa>::function to run now.
#if TQ_HAS_X86_VARIANTS
#define TQ_FOR_EACH_ISA(DECLARE) DECLARE(base) DECLARE(avx2) DECLARE(avx512)
#define TQ_SELECT_ISA(function)                                        \
  (::tq::current_isa() == ::tq::Isa::kAvx512 ? &::tq::avx512::function \
   : ::tq::current_isa() == ::tq::Isa::kAvx2 ? &::tq::avx2::function   \
                                             : &::tq::base::function)
#else
#define TQ_FOR_EACH_ISA(DECLARE) DECLARE(base)
#define TQ_SELECT_ISA(function) (&::tq::base::function)
#endif
