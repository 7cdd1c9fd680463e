// Compares where `Lane` says that its entries lie with CUTLASS's own partition of a tile. Prints how many differ.
#include <cutlass/numeric_types.h>

#include <cstdio>
#include <cute/tensor.hpp>

// After the file that names their classes.
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "../../csrc/cuda/contrastive/core.h"

using namespace cute;

int main() {
  using Tile = sbert_kernels::contrastive::Lane<128, 128, sbert_kernels::contrastive::Policy::rows, false>;
  using Atom = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>;
  static_assert(
      Tile::TILE_M == sbert_kernels::contrastive::TILE_M && Tile::TILE_N == sbert_kernels::contrastive::TILE_N);
  auto const product = make_tiled_mma(Atom{}, Layout<Shape<_1, _1, _1>>{});
  // As the epilogue of sm_90 partitions what it stores.
  auto const atom = make_tiled_copy_C_atom(Copy_Atom<SM90_U32x4_STSM_N, cutlass::half_t>{}, product);
  auto const copy = make_tiled_copy_S(Copy_Atom<SM90_U32x4_STSM_N, cutlass::bfloat16_t>{}, atom);
  auto const coordinates = make_identity_tensor(make_shape(Int<Tile::TILE_M>{}, Int<Tile::TILE_N>{}));
  sbert_kernels::contrastive::Epilogue epilogue{};
  int wrong = int(size(product)) != Tile::LANES, seen = 0;
  for (int thread = 0; thread < Tile::LANES; ++thread) {
    Tile const lane(epilogue, 0, 0, thread);
    auto const mine = copy.get_slice(thread).partition_S(flat_divide(coordinates, Shape<_64, _32>{}));
    wrong += int(size<3>(mine)) != Tile::BLOCKS || int(size<4>(mine)) != Tile::SUBTILES;
    for (int subtile = 0; subtile < Tile::SUBTILES; ++subtile)
      for (int block = 0; block < Tile::BLOCKS; ++block) {
        auto const entries = mine(_, _, _, block, subtile);
        wrong += int(size(entries)) != Tile::ENTRIES;
        for (int i = 0; i < Tile::ENTRIES; ++i, ++seen)
          wrong += get<0>(entries(i)) != lane.row(block, i) || get<1>(entries(i)) != lane.column(subtile, i);
      }
  }
  std::printf("%d entries, %d wrong\n", seen, wrong);
  return wrong != 0;
}
