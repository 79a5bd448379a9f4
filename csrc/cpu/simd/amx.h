// The tile registers of AMX: loads, stores and products of tiles of bf16 numbers. Included only by *_rows.cpp
// (see isa.h), in code that runs where can_use_amx() says so.
#pragma once

#include <cstdint>

#include "cpu/simd/lanes.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)

// A tile register has sixteen rows of 64 bytes.
constexpr int kAmxTileRows = 16;
constexpr int64_t kAmxRowBytes = 64;

// The instructions are written in assembly, because not all compilers that build this know them by name.
template <int kTile>
TQ_INLINE void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
TQ_INLINE void amx_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
TQ_INLINE void amx_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Tile kSums [16, 16] += tile kLeft [16, 32] times tile kRight [32, 16], whose pairs of rows lie side by side:
// [pair of rows][column].
template <int kSums, int kLeft, int kRight>
TQ_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// Tile kSums [16, 16] of 32-bit integers += tile kLeft [16, 64] of signed bytes times tile kRight [64, 16] of unsigned ones; of
// kRight four rows lie side by side: [four rows][column].
template <int kSums, int kLeft, int kRight>
TQ_INLINE void amx_multiply_int8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// While one of these lives, the thread has eight tile registers of full size.
class AmxRegisters {
 public:
  AmxRegisters() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = kAmxRowBytes;
      config.rows[i] = kAmxTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxRegisters() { asm volatile("tilerelease"); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

#endif

}  // namespace TQ_ISA
}  // namespace tq
