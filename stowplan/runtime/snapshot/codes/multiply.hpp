// sum ^= coefficient * source, for each instruction set that can look sixteen products up at once.
//
// Note: fetching ahead. One core waits for memory most of its time, and hardware prefetchers stop at the end of a page.
// So while a tile is worked on, what comes next is asked for, line by line: the next source's tile, spread over all
// passes over this one, and the sum's next tile, which would else stall its first store. Addresses of what is fetched
// are no pointers, as they may be past the end of their buffers, where a prefetch does nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "field.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace stowplan {

enum class Variant { kPortable = 0, kSsse3 = 1, kAvx2 = 2, kGfni = 3, kNeon = 4 };

constexpr size_t kTile = 4096;  // of each buffer at a time: two sums, a source and the next ones stay in L1
constexpr size_t kLine = 64;

struct Ahead {
  uintptr_t source;  // the next tile's lines that this pass fetches begin here
  int halved;        // 1: this pass and another fetch half of them each
};

using MultiplyAdd = void (*)(uint8_t* sum, const uint8_t* source, const Ahead& ahead, uint8_t by, size_t bytes);

inline __attribute__((always_inline)) void fetch(const Ahead& ahead, const uint8_t* sum, size_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(ahead.source + (at >> ahead.halved)));
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(sum) + kTile + at), 1);
}

inline void multiply_rest(uint8_t* sum, const uint8_t* source, const Products& by, size_t at, size_t bytes) {
  for (; at < bytes; ++at) sum[at] ^= by.low[source[at] & 15] ^ by.high[source[at] >> 4];
}

inline void add(uint8_t* __restrict sum, const uint8_t* __restrict source, const Ahead& ahead, size_t bytes) {
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) {
    fetch(ahead, sum, at);
    uint64_t a[kLine / 8], b[kLine / 8];
    std::memcpy(a, sum + at, kLine);
    std::memcpy(b, source + at, kLine);
    for (size_t word = 0; word < kLine / 8; ++word) a[word] ^= b[word];
    std::memcpy(sum + at, a, kLine);
  }
  for (; at < bytes; ++at) sum[at] ^= source[at];
}

inline void multiply_add_portable(uint8_t* sum, const uint8_t* source, const Ahead& ahead, uint8_t by, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kLine) fetch(ahead, sum, at);
  multiply_rest(sum, source, kProducts[by], 0, bytes);
}

#if defined(__x86_64__)

__attribute__((target("ssse3"))) inline void multiply_add_ssse3(uint8_t* sum, const uint8_t* source, const Ahead& ahead,
                                                                uint8_t by, size_t bytes) {
  const Products& products = kProducts[by];
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(products.low));
  const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(products.high));
  const __m128i half = _mm_set1_epi8(15);
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) {
    fetch(ahead, sum, at);
    for (size_t part = at; part < at + kLine; part += sizeof(__m128i)) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part));
      auto* const out = reinterpret_cast<__m128i*>(sum + part);
      const __m128i lower = _mm_shuffle_epi8(low, _mm_and_si128(x, half));
      const __m128i upper = _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi64(x, 4), half));
      _mm_storeu_si128(out, _mm_xor_si128(_mm_loadu_si128(out), _mm_xor_si128(lower, upper)));
    }
  }
  multiply_rest(sum, source, products, at, bytes);
}

__attribute__((target("avx2"))) inline void multiply_add_avx2(uint8_t* sum, const uint8_t* source, const Ahead& ahead,
                                                              uint8_t by, size_t bytes) {
  const Products& products = kProducts[by];
  const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(products.low)));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(products.high)));
  const __m256i half = _mm256_set1_epi8(15);
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) {
    fetch(ahead, sum, at);
    for (size_t part = at; part < at + kLine; part += sizeof(__m256i)) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + part));
      auto* const out = reinterpret_cast<__m256i*>(sum + part);
      const __m256i lower = _mm256_shuffle_epi8(low, _mm256_and_si256(x, half));
      const __m256i upper = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi64(x, 4), half));
      _mm256_storeu_si256(out, _mm256_xor_si256(_mm256_loadu_si256(out), _mm256_xor_si256(lower, upper)));
    }
  }
  multiply_rest(sum, source, products, at, bytes);
}

__attribute__((target("avx2,gfni"))) inline void multiply_add_gfni(uint8_t* sum, const uint8_t* source,
                                                                   const Ahead& ahead, uint8_t by, size_t bytes) {
  const Products& products = kProducts[by];
  const __m256i matrix = _mm256_set1_epi64x(static_cast<long long>(products.matrix));
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) {
    fetch(ahead, sum, at);
    for (size_t part = at; part < at + kLine; part += sizeof(__m256i)) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + part));
      auto* const out = reinterpret_cast<__m256i*>(sum + part);
      _mm256_storeu_si256(out, _mm256_xor_si256(_mm256_loadu_si256(out), _mm256_gf2p8affine_epi64_epi8(x, matrix, 0)));
    }
  }
  multiply_rest(sum, source, products, at, bytes);
}

#elif defined(__aarch64__)

inline void multiply_add_neon(uint8_t* sum, const uint8_t* source, const Ahead& ahead, uint8_t by, size_t bytes) {
  const Products& products = kProducts[by];
  const uint8x16_t low = vld1q_u8(products.low), high = vld1q_u8(products.high), half = vdupq_n_u8(15);
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) {
    fetch(ahead, sum, at);
    for (size_t part = at; part < at + kLine; part += sizeof(uint8x16_t)) {
      const uint8x16_t x = vld1q_u8(source + part);
      const uint8x16_t both = veorq_u8(vqtbl1q_u8(low, vandq_u8(x, half)), vqtbl1q_u8(high, vshrq_n_u8(x, 4)));
      vst1q_u8(sum + part, veorq_u8(vld1q_u8(sum + part), both));
    }
  }
  multiply_rest(sum, source, products, at, bytes);
}

#endif

inline int variants() {
  int found = 1 << static_cast<int>(Variant::kPortable);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2");
  found |= (__builtin_cpu_supports("ssse3") != 0) << static_cast<int>(Variant::kSsse3);
  found |= avx2 << static_cast<int>(Variant::kAvx2);
  found |= (avx2 && __builtin_cpu_supports("gfni")) << static_cast<int>(Variant::kGfni);
#elif defined(__aarch64__)
  found |= 1 << static_cast<int>(Variant::kNeon);
#endif
  return found;
}

inline MultiplyAdd multiply_add_of(Variant variant) {
  switch (variant) {
#if defined(__x86_64__)
    case Variant::kSsse3:
      return multiply_add_ssse3;
    case Variant::kAvx2:
      return multiply_add_avx2;
    case Variant::kGfni:
      return multiply_add_gfni;
#elif defined(__aarch64__)
    case Variant::kNeon:
      return multiply_add_neon;
#endif
    default:
      return multiply_add_portable;
  }
}

}  // namespace stowplan
