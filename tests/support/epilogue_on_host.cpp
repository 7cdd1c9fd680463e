// The epilogue of the CUDA kernels, walked through by a host: all lanes of one tile in the order of the GPU's kernel,
// which hands them the dot products that its matrix instructions have left in each lane's registers.
#include <vector>

#include "../../csrc/common/contrastive/epilogue.h"

using namespace sbert_kernels::contrastive;

namespace {

template <Policy POLICY, bool IDS>
void walk(Epilogue const& epilogue, int tile_row, int tile_column, float const* dots, float* weights) {
  using Tile = Lane<128, 128, POLICY, IDS>;
  int const row = tile_row * Tile::TILE_M, column = tile_column * Tile::TILE_N;
  std::vector<Tile> lanes;
  for (int thread = 0; thread < Tile::LANES; ++thread) lanes.emplace_back(epilogue, tile_row, tile_column, thread);
  // What `give` returns for lane ^ mask is handed to `take` of each lane, after all have given.
  auto exchange = [&](int mask, auto give, auto take) {
    std::vector<float> given;
    for (auto const& lane : lanes) given.push_back(give(lane));
    for (int thread = 0; thread < Tile::LANES; ++thread) take(lanes[thread], given[thread ^ mask]);
  };
  static float by_warp[Tile::WARPS][Tile::TILE_N];
  for (auto& lane : lanes) lane.begin();
  for (int subtile = 0; subtile < Tile::SUBTILES; ++subtile) {
    for (auto& lane : lanes) lane.begin_subtile(subtile);
    for (int block = 0; block < Tile::BLOCKS; ++block)
      for (auto& lane : lanes) {
        float dot[Tile::ENTRIES], weight[Tile::ENTRIES];
        auto at = [&](int i) { return (lane.row(block, i) - row) * Tile::TILE_N + lane.column(subtile, i) - column; };
        for (int i = 0; i < Tile::ENTRIES; ++i) dot[i] = dots[at(i)];
        lane.visit(dot, block, subtile, weight);
        if (POLICY != Policy::sums)
          for (int i = 0; i < Tile::ENTRIES; ++i) weights[at(i)] = weight[i];
      }
    if (POLICY != Policy::sums || !epilogue.column_sums) continue;
    for (int mask = 16; mask >= 4; mask /= 2)
      for (int j = 0; j < mask / 4; ++j)
        exchange(
            mask, [&](Tile const& lane) { return lane.given_of_columns(mask, j); },
            [&](Tile& lane, float received) { lane.take_of_columns(mask, j, received); });
    for (auto const& lane : lanes) by_warp[lane.warp][lane.summed_column(subtile)] = lane.column_sum[0];
  }
  if (POLICY == Policy::known) return;
  for (int mask = 1; mask <= 2; mask *= 2)
    for (int block = 0; block < Tile::BLOCKS; ++block)
      for (int half = 0; half < 2; ++half)
        exchange(
            mask, [&](Tile const& lane) { return lane.given_of_row(block, half); },
            [&](Tile& lane, float received) { lane.take_of_row(block, half, received); });
  for (auto const& lane : lanes) lane.store_row_sums();
  if (epilogue.column_sums)
    for (auto const& lane : lanes) lane.store_column_sums(by_warp);
}

}  // namespace

// dots, weights: (128, 128) of the tile; dots outside of the matrix are 0, as the hardware loads them.
extern "C" void walk_tile(
    Epilogue const* epilogue, int policy, int ids, int tile_row, int tile_column, float const* dots, float* weights) {
  auto const walk_it = policy == 0   ? (ids ? walk<Policy::rows, true> : walk<Policy::rows, false>)
                       : policy == 1 ? (ids ? walk<Policy::sums, true> : walk<Policy::sums, false>)
                                     : (ids ? walk<Policy::known, true> : walk<Policy::known, false>);
  walk_it(*epilogue, tile_row, tile_column, dots, weights);
}

extern "C" int epilogue_bytes() { return sizeof(Epilogue); }
