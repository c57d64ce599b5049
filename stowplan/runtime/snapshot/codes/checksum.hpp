// CRC-32C (Castagnoli; RFC 3720, appendix B.4), bits reflected, as iSCSI and ext4 have it.
//
// Note: three streams. The instruction takes three cycles and a new one may begin in each, so three equal pieces are
// taken at once, each from a register of its own. A CRC is linear: that of a piece followed by n zero bytes is a fixed
// function of its CRC, four lookups in the tables of `Skip`, and the CRCs of the pieces are added up that way.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace stowplan {

constexpr uint32_t kCastagnoli = 0x82F63B78;  // x^32 left out, x^31 the lowest bit

constexpr uint32_t after_bit(uint32_t crc) { return crc >> 1 ^ (crc & 1 ? kCastagnoli : 0); }

// tables[k][b]: what byte b, followed by k zero bytes, makes of a register of zeros.
using Slices = std::array<std::array<uint32_t, 256>, 8>;

constexpr Slices all_slices() {
  Slices tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = after_bit(crc);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < tables.size(); ++k)
    for (size_t byte = 0; byte < 256; ++byte)
      tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 255];
  return tables;
}

inline constexpr Slices kSlices = all_slices();

// A register after `zeros` zero bytes.
struct Skip {
  std::array<std::array<uint32_t, 256>, 4> table{};

  constexpr explicit Skip(size_t zeros) {
    std::array<uint32_t, 32> image{};  // of each bit
    for (int bit = 0; bit < 32; ++bit) image[static_cast<size_t>(bit)] = uint32_t{1} << bit;
    for (uint32_t& one : image)
      for (size_t byte = 0; byte < zeros; ++byte) one = one >> 8 ^ kSlices[0][one & 255];
    for (size_t place = 0; place < 4; ++place)
      for (size_t byte = 0; byte < 256; ++byte)
        for (size_t bit = 0; bit < 8; ++bit)
          if (byte >> bit & 1) table[place][byte] ^= image[8 * place + bit];
  }

  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
  }
};

inline uint32_t crc_portable(uint32_t crc, const uint8_t* data, size_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    const uint32_t low = crc ^ (data[0] | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 | uint32_t{data[3]} << 24);
    crc = kSlices[7][low & 255] ^ kSlices[6][low >> 8 & 255] ^ kSlices[5][low >> 16 & 255] ^ kSlices[4][low >> 24] ^
          kSlices[3][data[4]] ^ kSlices[2][data[5]] ^ kSlices[1][data[6]] ^ kSlices[0][data[7]];
  }
  for (; bytes; ++data, --bytes) crc = crc >> 8 ^ kSlices[0][(crc ^ *data) & 255];
  return crc;
}

#if defined(__x86_64__)
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("sse4.2,crc32")))  // two features there
#else
#define CRC_TARGET __attribute__((target("sse4.2")))
#endif
#define CRC_WORD(crc, word) static_cast<uint32_t>(_mm_crc32_u64(crc, word))
#define CRC_BYTE(crc, byte) _mm_crc32_u8(crc, byte)
#elif defined(__aarch64__) && defined(__clang__)
#define CRC_TARGET __attribute__((target("crc")))
#define CRC_WORD(crc, word) __crc32cd(crc, word)
#define CRC_BYTE(crc, byte) __crc32cb(crc, byte)
#elif defined(__aarch64__)
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC_WORD(crc, word) __crc32cd(crc, word)
#define CRC_BYTE(crc, byte) __crc32cb(crc, byte)
#endif

#if defined(CRC_TARGET)

inline uint64_t word_at(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

// Takes as many times three pieces of `piece` bytes as there are; moves `data` and `bytes` past them.
CRC_TARGET inline uint32_t crc_pieces(uint32_t crc, const uint8_t*& data, size_t& bytes, size_t piece,
                                      const Skip& skip) {
  for (; bytes >= 3 * piece; data += 3 * piece, bytes -= 3 * piece) {
    uint32_t second = 0, third = 0;
    for (size_t at = 0; at < piece; at += 8) {
      crc = CRC_WORD(crc, word_at(data + at));
      second = CRC_WORD(second, word_at(data + piece + at));
      third = CRC_WORD(third, word_at(data + 2 * piece + at));
    }
    crc = skip(skip(crc) ^ second) ^ third;
  }
  return crc;
}

CRC_TARGET inline uint32_t crc_hardware(uint32_t crc, const uint8_t* data, size_t bytes) {
  constexpr size_t kLong = 4096, kShort = 256;
  static constexpr Skip skip_long(kLong), skip_short(kShort);
  crc = crc_pieces(crc, data, bytes, kLong, skip_long);
  crc = crc_pieces(crc, data, bytes, kShort, skip_short);
  for (; bytes >= 8; data += 8, bytes -= 8) crc = CRC_WORD(crc, word_at(data));
  for (; bytes; ++data, --bytes) crc = CRC_BYTE(crc, *data);
  return crc;
}

inline bool has_crc_instruction() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2");
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_CRC32;
#else
  return true;
#endif
}

#endif

inline uint32_t crc32c(bool hardware, uint32_t crc, const uint8_t* data, size_t bytes) {
#if defined(CRC_TARGET)
  if (hardware && has_crc_instruction()) return ~crc_hardware(~crc, data, bytes);
#endif
  return ~crc_portable(~crc, data, bytes);
}

}  // namespace stowplan
