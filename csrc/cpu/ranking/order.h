// The order of labels, by a radix sort of their bits.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "../common/isa.h"
#include "../common/memory.h"

namespace sbert_kernels {

// Unsigned integers in the order of the labels, equal for equal labels; none of these is NaN.
inline uint32_t order_key(float label) {
  const uint32_t u = bits<uint32_t>(label + 0.0f);  // -0 + 0 is 0
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
inline uint64_t order_key(double label) {
  const uint64_t u = bits<uint64_t>(label + 0.0);
  return u >> 63 ? ~u : u | (uint64_t{1} << 63);
}
inline uint64_t order_key(int64_t label) { return static_cast<uint64_t>(label) ^ (uint64_t{1} << 63); }

template <class Key>
struct Ranked {
  Key key;
  uint32_t index;
};

// Labels and their positions in ascending order of the labels; of equal ones, in order of position. Linear time: a pass
// over 8 bits at a time, the lowest first, and none over bits that all labels have in common.
template <class Label>
auto ordered(const Label* labels, int64_t count) {
  using Key = decltype(order_key(Label{}));
  constexpr size_t kPasses = sizeof(Key);
  Array<Ranked<Key>> items(count), other(count);
  std::array<std::array<uint32_t, 256>, kPasses> counts{};
  for (int64_t i = 0; i < count; ++i) {
    const Key key = order_key(labels[i]);
    items[i] = {key, static_cast<uint32_t>(i)};
    for (size_t pass = 0; pass < kPasses; ++pass) ++counts[pass][(key >> (8 * pass)) & 255];
  }
  for (size_t pass = 0; pass < kPasses; ++pass) {
    auto& places = counts[pass];
    if (count == 0 || places[(items[0].key >> (8 * pass)) & 255] == count) continue;
    uint32_t place = 0;
    for (uint32_t& digit : places) place += std::exchange(digit, place);
    for (const Ranked<Key>& item : items) other[places[(item.key >> (8 * pass)) & 255]++] = item;
    items.swap(other);
  }
  return items;
}

}  // namespace sbert_kernels
