// Sums of multiples of buffers over GF(2^8), and CRC-32C: the interface that native.py loads.
//
//   field.hpp      the field, tables of its products
//   multiply.hpp   sum ^= coefficient * source, once for each instruction set
//   checksum.hpp   CRC-32C, with the processor's instruction or by tables
//
// Nothing here allocates, throws or keeps state: any number of threads may call at once.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checksum.hpp"
#include "multiply.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Bit v is set where variant v (of stowplan::Variant) runs on this processor.
EXPORTED int stowplan_variants() { return stowplan::variants(); }

// outs[o] = sum over s of coefficients[o * num_sources + s] * sources[s]; with `add` that is added to what outs[o] has.
// All buffers have `bytes` bytes, at any alignment; an output overlaps no other buffer.
EXPORTED void stowplan_combine(int variant, int num_outs, int num_sources, const uint8_t* coefficients,
                               const uint8_t* const* sources, uint8_t* const* outs, size_t bytes, int add) {
  using namespace stowplan;
  const MultiplyAdd multiply_add = multiply_add_of(static_cast<Variant>(variant));
  for (size_t at = 0; at < bytes; at += kTile) {
    const size_t length = std::min(kTile, bytes - at);
    for (int o = 0; o < num_outs && !add; ++o) std::memset(outs[o] + at, 0, length);
    for (int s = 0; s < num_sources; ++s) {
      const bool last = s + 1 == num_sources;
      const uintptr_t next = reinterpret_cast<uintptr_t>(sources[last ? 0 : s + 1]) + at + (last ? kTile : 0);
      for (int o = 0; o < num_outs; ++o) {
        const uint8_t coefficient = coefficients[o * num_sources + s];
        const Ahead ahead{next + static_cast<size_t>(o) * kTile / static_cast<size_t>(num_outs), num_outs > 1};
        if (coefficient == 1)
          stowplan::add(outs[o] + at, sources[s] + at, ahead, length);
        else if (coefficient != 0)
          multiply_add(outs[o] + at, sources[s] + at, ahead, coefficient, length);
      }
    }
  }
}

// The CRC-32C of what `crc` is that of (0: of nothing), followed by `data`.
EXPORTED uint32_t stowplan_crc32c(int hardware, uint32_t crc, const uint8_t* data, size_t bytes) {
  return stowplan::crc32c(hardware != 0, crc, data, bytes);
}
