// The kernel that multiplies and weighs on Hopper (sm_90a): CUTLASS's product with the epilogue of csrc/common in it.
//
// One warp group loads tiles by TMA, two others take turns: while one multiplies, the other weighs what it has
// multiplied (CUTLASS's ping-pong schedule), so that the epilogue costs no time as long as it is shorter than the
// product. Logits never leave the registers.
//
// FLOPs: 2 M N D. Bytes: the rows and columns once a tile (from L2, shared by a cluster), the weights once.
#pragma once
#include "core.h"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace sbert_kernels::contrastive {

namespace fusion = cutlass::epilogue::fusion;

// A visitor of CUTLASS's epilogue: it hands each subtile of dot products to a `Lane`.
template <class Element, Policy POLICY, bool IDS>
struct Visitor : fusion::Sm90VisitorImpl<> {
  using Arguments = Epilogue;
  using Params = Epilogue;
  using ElementAux = Element;  // CUTLASS asks for it where nothing is stored
  using Tile = Lane<TILE_M, TILE_N, POLICY, IDS>;

  struct ColumnSums {
    float by_warp[Tile::WARPS][TILE_N];
  };
  struct Nothing {};
  using SharedStorage = cute::conditional_t<POLICY == Policy::sums, ColumnSums, Nothing>;

  template <class Shape>
  static constexpr Params to_underlying_arguments(Shape const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static bool can_implement(Shape const&, Arguments const&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(
      Shape const&, Arguments const&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  Params params;
  SharedStorage* shared;

  CUTLASS_HOST_DEVICE Visitor() {}
  CUTLASS_HOST_DEVICE Visitor(Params const& params, SharedStorage const& shared)
      : params(params), shared(const_cast<SharedStorage*>(&shared)) {}

  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Tile tile;
    SharedStorage* shared;

    CUTLASS_DEVICE Callbacks(Params const& params, SharedStorage* shared, int tile_row, int tile_column, int thread)
        : tile(params, tile_row, tile_column, thread), shared(shared) {}

    CUTLASS_DEVICE void begin() { tile.begin(); }

    CUTLASS_DEVICE void begin_loop(int block, int subtile) {
      if (block == 0) tile.begin_subtile(subtile);
    }

    template <class Dot, int ENTRIES>
    CUTLASS_DEVICE auto visit(cutlass::Array<Dot, ENTRIES> const& dot, int, int block, int subtile) {
      static_assert(ENTRIES == Tile::ENTRIES);
      cutlass::Array<float, ENTRIES> weight;
      tile.visit(dot, block, subtile, weight);
      if constexpr (POLICY == Policy::sums) {
        return cutlass::Array<Element, ENTRIES>{};  // nobody stores it; CUTLASS's barriers for its stores remain
      } else {
        return cutlass::NumericArrayConverter<Element, float, ENTRIES>{}(weight);
      }
    }

    CUTLASS_DEVICE void end_loop(int block, int subtile) {
      if constexpr (POLICY == Policy::sums) {
        if (block != Tile::BLOCKS - 1 || tile.epilogue.column_sums == nullptr) return;
        SBERT_KERNELS_UNROLL
        for (int mask = 16; mask >= 4; mask /= 2) {
          SBERT_KERNELS_UNROLL
          for (int j = 0; j < mask / 4; ++j)
            tile.take_of_columns(mask, j, __shfl_xor_sync(~0u, tile.given_of_columns(mask, j), mask));
        }
        shared->by_warp[tile.warp][tile.summed_column(subtile)] = tile.column_sum[0];
      }
    }

    CUTLASS_DEVICE void end() {
      if constexpr (POLICY != Policy::known) {
        SBERT_KERNELS_UNROLL
        for (int mask = 1; mask <= 2; mask *= 2) {
          SBERT_KERNELS_UNROLL
          for (int row = 0; row < 2 * Tile::BLOCKS; ++row)
            tile.take_of_row(row / 2, row % 2, __shfl_xor_sync(~0u, tile.given_of_row(row / 2, row % 2), mask));
        }
        tile.store_row_sums();
      }
      if constexpr (POLICY == Policy::sums) {
        if (tile.epilogue.column_sums == nullptr) return;
        // Both warp groups use the same memory: the schedule lets a group into its epilogue when the other has left it.
        synchronize();
        tile.store_column_sums(shared->by_warp);
      }
    }

    CUTLASS_DEVICE static void synchronize() {
      cutlass::arch::NamedBarrier::sync(Tile::LANES, cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    }
  };

  template <bool, class... Arguments>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Arguments...> const& arguments) {
    auto [tile_row, tile_column, k, l] = arguments.tile_coord_mnkl;
    static_assert(decltype(cute::size(arguments.tiled_mma))::value == Tile::LANES);
    return Callbacks(params, shared, int(tile_row), int(tile_column), arguments.thread_idx);
  }
};

template <class Element, Policy POLICY, bool IDS>
struct Kernel {
  using TileShape = cute::Shape<cute::Int<TILE_M>, cute::Int<TILE_N>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two blocks load the columns together
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Stored = cute::conditional_t<POLICY == Policy::sums, void, Element>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster, cute::Shape<cute::_64, cute::_32>, float,
      float, void, Row, 8, Stored, Row, 8, cutlass::epilogue::TmaWarpSpecialized,
      fusion::Sm90EVT<Visitor<Element, POLICY, IDS>>>::CollectiveOp;
  using CollectiveProduct = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, 8, Element, Column, 8, float, TileShape,
      Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveProduct, CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;

  static typename Gemm::Arguments arguments(Call const& call) {
    auto strides = [](int64_t stride) { return cute::make_stride(stride, cute::_1{}, int64_t{0}); };
    auto* const weights = static_cast<Element*>(call.weights);
    typename Gemm::Arguments found{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {call.epilogue.rows, call.epilogue.columns, call.width, 1},
        {static_cast<Element const*>(call.rows), strides(call.rows_stride), static_cast<Element const*>(call.columns),
         strides(call.columns_stride)},
        {{call.epilogue}, nullptr, strides(call.weights_stride), weights, strides(call.weights_stride)}};
    found.hw_info.sm_count = call.multiprocessors;
    return found;
  }
};

// Launched without CUTLASS's adapter, which tells of no error what it was. Nor is its check of a call made
// (`can_implement`): it asks for a number of columns that is a multiple of 8, where the hardware only wants rows of
// weights that are so many numbers apart. The bindings check that.
template <class Element, Policy POLICY, bool IDS>
char const* launch(Call const& call) {
  using Gemm = typename Kernel<Element, POLICY, IDS>::Gemm;
  using Cluster = typename Kernel<Element, POLICY, IDS>::Cluster;
  auto const arguments = Kernel<Element, POLICY, IDS>::arguments(call);
  if (Gemm::get_workspace_size(arguments) != 0) return "the kernel asks for a workspace";
  auto params = Gemm::to_underlying_arguments(arguments, nullptr);
  auto const kernel = reinterpret_cast<void const*>(cutlass::device_kernel<Gemm>);

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), cute::size<2>(Cluster{})};
  cudaLaunchConfig_t config{};
  config.gridDim = Gemm::get_grid_shape(params);
  config.blockDim = Gemm::get_block_shape();
  config.dynamicSmemBytes = Gemm::SharedStorageSize;
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::SharedStorageSize);
  void* parameters[] = {&params};
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, kernel, parameters);
  return described(error);
}

}  // namespace sbert_kernels::contrastive
