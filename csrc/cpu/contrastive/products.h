// The three matrix products of a tile, in the number format that the caller chose.
//
//   float32      operands as they are
//   bfloat16     operands rounded, pairs interleaved for the dot-product instructions (AMX, AVX512-bf16)
//   bfloat16x3   each operand as the sum of two bfloat16 numbers a = high + low; a b = high high + low high + high low,
//                which drops 2^-16 of the product
//
// Accumulation is float32 in all of them. The tile products themselves are ATen's brgemm, which compiles a kernel for
// the machine it runs on, and is a BLAS call where it can't.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <unordered_set>

#include "../common/memory.h"
#include "problem.h"
#include "tile.h"

namespace sbert_kernels {

using Bf16 = c10::BFloat16;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Float32Products {
  using Element = float;
  static constexpr int kParts = 1;
  static constexpr bool kPaired = false;
};

template <int Parts>
struct Bfloat16Products {
  using Element = Bf16;
  static constexpr int kParts = Parts;
  static constexpr bool kPaired = true;
};

// Room for the code of a product: oneDNN's 256 KiB, doubled as often as it may grow, and what is around it.
constexpr int64_t kCodeBytes = 4 << 20;

// The shapes of a product, and whether this thread has computed one of these shapes before.
class ProductShape {
 public:
  ProductShape(std::initializer_list<int64_t> shape) {
    for (const int64_t size : shape) key_ = (key_ ^ static_cast<uint64_t>(size)) * 0x9E3779B97F4A7C15u;
  }
  bool known() const { return shapes().count(key_) != 0; }
  void remember() const { shapes().insert(key_); }

 private:
  static std::unordered_set<uint64_t>& shapes() {
    static thread_local std::unordered_set<uint64_t> shapes;
    return shapes;
  }
  uint64_t key_ = 0;
};

// C [m, n] = or += A [m, k] B [k, n], for operands in parts; B's rows in pairs where the format wants them so.
template <class P>
void multiply(
    int64_t m, int64_t n, int64_t k, const std::array<const typename P::Element*, P::kParts>& a, int64_t ld_a,
    const std::array<const typename P::Element*, P::kParts>& b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  const auto product = [&] {
    using at::native::cpublas::brgemm;
    brgemm(m, n, k, ld_a, ld_b, ld_c, add, a[0], b[0], c, P::kPaired);
    if constexpr (P::kParts == 2) {
      brgemm(m, n, k, ld_a, ld_b, ld_c, true, a[1], b[0], c, P::kPaired);
      brgemm(m, n, k, ld_a, ld_b, ld_c, true, a[0], b[1], c, P::kPaired);
    }
  };
  const ProductShape shape{m, n, k, ld_a, ld_b, ld_c, add, P::kParts, P::kPaired};
  if (shape.known()) return product();
  // The first time, brgemm compiles a kernel for this thread. Where it has no memory for the code, oneDNN crashes when
  // it destroys what there is of it.
  const std::lock_guard<std::mutex> lock(memory_mutex());
  require_memory(kCodeBytes);
  product();
  shape.remember();
}

// A set of vectors in the products' format: [rows, width], slices padded where elements go in pairs.
template <class P>
class Operand {
 public:
  using Element = typename P::Element;
  using Pointers = std::array<const Element*, P::kParts>;

  Operand(const Vectors& vectors, bool bf16, const std::vector<Slice>& slices) : slices_(slices), rows_(vectors.rows) {
    const Slice& last = slices.back();
    width_ = last.begin + last.width;
    depth_ = P::kPaired ? last.padded_begin + last.padded_width : width_;
    ld_ = depth_;
    const bool as_it_is = bf16 == P::kPaired && depth_ == width_;
    if (as_it_is) {
      parts_[0] = static_cast<const Element*>(vectors.data);
      ld_ = vectors.dimension;
      return;
    }
    if constexpr (P::kPaired) {
      for (auto& part : own_) part = buffer<Element>(rows_ * ld_);
      at::parallel_for(0, rows_, 64, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) convert(vectors, bf16, row);
      });
      for (int part = 0; part < P::kParts; ++part) parts_[part] = own_[part].get();
    }
  }

  int64_t rows() const { return rows_; }
  int64_t ld() const { return ld_; }

  // Rows from `row`, a slice of them: the left operand of a product over the dimensions.
  Pointers left(int64_t row, const Slice& slice) const {
    return offset(parts_, row * ld_ + (P::kPaired ? slice.padded_begin : slice.begin));
  }

  // The transposed rows, [dimensions, rows] zero-padded to `padded` rows: its right operand. `out` holds
  // packed_size(padded) elements.
  int64_t packed_size(int64_t padded) const { return P::kParts * depth_ * padded; }
  void pack_transposed(int64_t row, int64_t count, int64_t padded, Element* out) const {
    for (int part = 0; part < P::kParts; ++part, out += depth_ * padded) {
      const Element* in = parts_[part] + row * ld_;
      constexpr int64_t kStep = P::kPaired ? 2 : 1;
      if (count < padded) std::memset(static_cast<void*>(out), 0, depth_ * padded * sizeof(Element));
      for (int64_t d0 = 0; d0 < depth_; d0 += 32) {
        const int64_t d1 = std::min<int64_t>(d0 + 32, depth_);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t d = d0; d < d1; d += kStep) {
            std::memcpy(static_cast<void*>(out + d * padded + i * kStep), in + i * ld_ + d, kStep * sizeof(Element));
          }
        }
      }
    }
  }
  Pointers packed(const Element* pack, int64_t padded, const Slice& slice) const {
    Pointers result;
    for (int part = 0; part < P::kParts; ++part) {
      result[part] = pack + part * depth_ * padded + (P::kPaired ? slice.padded_begin : slice.begin) * padded;
    }
    return result;
  }

  // Rows in their own layout [rows, dimensions]: the right operand of a product over the rows. Where elements go in
  // pairs of rows, `out` (panel_size(count) elements) receives them, an odd last row paired with zeros.
  static constexpr bool kNeedsPanel = P::kPaired;
  int64_t panel_size(int64_t count) const { return kNeedsPanel ? P::kParts * round_up(count, 2) * width_ : 0; }
  void fill_panel(int64_t row, int64_t count, Element* out) const {
    const int64_t pairs = round_up(count, 2) / 2;
    for (int part = 0; part < P::kParts; ++part, out += pairs * 2 * width_) {
      for (const Slice& slice : slices_) {
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const Element* first = parts_[part] + (row + 2 * pair) * ld_ + slice.padded_begin;
          const Element* second = 2 * pair + 1 < count ? first + ld_ : nullptr;
          Element* to = out + (pair * width_ + slice.begin) * 2;
          interleave(first, second, slice.width, to);
        }
      }
    }
  }
  Pointers panel(int64_t row, int64_t count, const Element* filled, const Slice& slice) const {
    Pointers result;
    for (int part = 0; part < P::kParts; ++part) {
      result[part] = kNeedsPanel ? filled + part * round_up(count, 2) * width_ + slice.begin * 2
                                 : parts_[part] + row * ld_ + slice.begin;
    }
    return result;
  }
  int64_t panel_ld() const { return kNeedsPanel ? width_ : ld_; }

 private:
  static Pointers offset(Pointers pointers, int64_t by) {
    for (auto& pointer : pointers) pointer += by;
    return pointers;
  }

  static void interleave(const Element* first, const Element* second, int64_t count, Element* out) {
    // Through integers, which vectorise.
    const auto* a = reinterpret_cast<const uint16_t*>(first);
    const auto* b = reinterpret_cast<const uint16_t*>(second);
    auto* to = reinterpret_cast<uint16_t*>(out);
    for (int64_t d = 0; d < count; ++d) {
      to[2 * d] = a[d];
      to[2 * d + 1] = b ? b[d] : uint16_t{0};
    }
  }

  void convert(const Vectors& vectors, bool bf16, int64_t row) {
    const auto& kernels = tile_kernels();
    for (const Slice& slice : slices_) {
      const int64_t from = row * vectors.dimension + slice.begin, to = row * ld_ + slice.padded_begin;
      if (bf16) {
        std::memcpy(
            static_cast<void*>(own_[0].get() + to), static_cast<const Bf16*>(vectors.data) + from,
            slice.width * sizeof(Bf16));
        if constexpr (P::kParts == 2) {
          std::memset(static_cast<void*>(own_[1].get() + to), 0, slice.width * sizeof(Bf16));
        }
      } else if constexpr (P::kPaired) {
        kernels.split(
            static_cast<const float*>(vectors.data) + from, slice.width, own_[0].get() + to,
            P::kParts == 2 ? own_[P::kParts - 1].get() + to : nullptr);
      }
      for (auto& part : own_) {
        std::fill_n(part.get() + to + slice.width, slice.padded_width - slice.width, Element(0.0f));
      }
    }
  }

  const std::vector<Slice>& slices_;
  int64_t rows_;
  int64_t width_ = 0;  // of the widest prefix
  int64_t depth_ = 0;  // the same with padding
  int64_t ld_ = 0;
  Pointers parts_{};
  std::array<Buffer<Element>, P::kParts> own_;
};

}  // namespace sbert_kernels
