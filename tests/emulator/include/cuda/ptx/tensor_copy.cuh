// The tensor copy engine: boxes between global and shared memory (<cuda/ptx> on a GPU).
#pragma once

#include <cuda.h>

#include <algorithm>
#include <vector>

#include "../../../tensor_map.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// 128-byte swizzle of an address in shared memory.
inline std::size_t swizzled(std::size_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls use(offset in the box, address in global memory or null) for every run of elements along
// the innermost dimension's 16 bytes.
template <class Use>
void for_each_piece(const emulator::TensorMap& map, const int32_t* at, const Use& use) {
  constexpr std::size_t kPiece = 16;
  const std::size_t row_bytes = map.box[0] * map.element_bytes;
  std::size_t rows = 1;
  for (uint32_t dim = 1; dim < map.rank; ++dim) rows *= map.box[dim];
  for (std::size_t row = 0; row < rows; ++row) {
    std::size_t rest = row;
    bool exists = true;
    // Modulo 2^64, as the engine adds: a map may start where it holds nothing.
    auto address = reinterpret_cast<uint64_t>(map.base);
    for (uint32_t dim = 1; dim < map.rank; ++dim) {
      const int64_t place = at[dim] + static_cast<int64_t>(rest % map.box[dim]);
      rest /= map.box[dim];
      exists &= place >= 0 && static_cast<uint64_t>(place) < map.sizes[dim];
      if (exists) address += static_cast<uint64_t>(place) * map.strides[dim];
    }
    for (std::size_t byte = 0; byte < row_bytes; byte += kPiece) {
      const int64_t place = at[0] + static_cast<int64_t>(byte / map.element_bytes);
      const int64_t num =
          std::min<int64_t>(static_cast<int64_t>(map.sizes[0]) - place, kPiece / map.element_bytes);
      const bool has_piece = exists && place >= 0 && num > 0;
      use(row * row_bytes + byte,
          has_piece ? reinterpret_cast<std::byte*>(address +
                                                   static_cast<uint64_t>(place) * map.element_bytes)
                    : nullptr,
          has_piece ? static_cast<std::size_t>(num) * map.element_bytes : 0);
    }
  }
}

inline std::size_t box_bytes(const emulator::TensorMap& map) {
  std::size_t bytes = map.element_bytes;
  for (uint32_t dim = 0; dim < map.rank; ++dim) bytes *= map.box[dim];
  return bytes;
}

inline std::size_t place_in_shared(const emulator::TensorMap& map, std::size_t address) {
  return map.is_swizzled ? swizzled(address) : address;
}

inline std::vector<emulator::Access> accesses_of_load(const emulator::TensorMap& map,
                                                      const int32_t* at, std::byte* shared,
                                                      std::size_t destination) {
  std::vector<emulator::Access> accesses;
  for_each_piece(map, at, [&](std::size_t offset, std::byte* from, std::size_t num_bytes) {
    if (from != nullptr) accesses.push_back({from, num_bytes, false});
    accesses.push_back({shared + place_in_shared(map, destination + offset), 16, true});
  });
  return accesses;
}
// A box into one CTA's shared memory, counted on its barrier.
inline void load_box(const emulator::TensorMap& map, const int32_t* at, std::byte* shared,
                     std::size_t destination, void* barrier) {
  for_each_piece(map, at, [&](std::size_t offset, const std::byte* from, std::size_t num_bytes) {
    std::byte piece[16] = {};
    if (from != nullptr) std::copy_n(from, num_bytes, piece);
    std::copy_n(piece, sizeof(piece), shared + place_in_shared(map, destination + offset));
  });
  mbarrier_complete(barrier, static_cast<uint32_t>(box_bytes(map)));
}

// To the CTAs of `mask`, the same place in each.
template <int kDims>
void cp_async_bulk_tensor(ClusterSpace, GlobalSpace, void* destination, const CUtensorMap* map,
                          const int32_t (&at)[kDims], uint64_t* barrier, uint16_t mask) {
  std::vector<int32_t> place(at, at + kDims);
  const emulator::Cluster& cluster = *emulator::self().cta->cluster;
  for (uint32_t rank = 0; rank < cluster.ctas.size(); ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    std::byte* shared = cluster.ctas[rank]->shared;
    const std::size_t to = shared_address(destination);
    void* counted = emulator::shared_of(barrier, rank);
    const emulator::TensorMap& read = emulator::read_map(map);
    if constexpr (emulator::kSeesRaces) see_copy(counted, accesses_of_load(read, at, shared, to));
    emulator::start_background([=, &read] { load_box(read, place.data(), shared, to, counted); });
  }
}
template <int kDims>
void cp_async_bulk_tensor(ClusterSpace to, GlobalSpace from, void* destination,
                          const CUtensorMap* map, const int32_t (&at)[kDims], uint64_t* barrier) {
  cp_async_bulk_tensor(to, from, destination, map, at, barrier,
                       static_cast<uint16_t>(1u << get_sreg_cluster_ctarank()));
}

inline void see_store(const emulator::TensorMap& map, const int32_t* at, const std::byte* shared,
                      std::size_t source) {
  for_each_piece(map, at, [&](std::size_t offset, std::byte* to, std::size_t num_bytes) {
    emulator::see_read(shared + place_in_shared(map, source + offset), 16);
    if (to != nullptr) emulator::see_write(to, num_bytes);
  });
}
// From shared memory: read when the thread waits for that, written when it waits for all.
template <int kDims>
void cp_async_bulk_tensor(GlobalSpace, SharedSpace, const CUtensorMap* map,
                          const int32_t (&at)[kDims], const void* source) {
  const emulator::TensorMap& read = emulator::read_map(map);
  std::vector<int32_t> place(at, at + kDims);
  const std::byte* shared = emulator::self().cta->shared;
  const std::size_t from = shared_address(source);
  auto box = std::make_shared<std::vector<std::byte>>(box_bytes(read));
  if constexpr (emulator::kSeesRaces) see_store(read, at, shared, from);
  emulator::self().reads.add([=, &read] {
    for (std::size_t offset = 0; offset < box->size(); offset += 16) {
      std::copy_n(shared + place_in_shared(read, from + offset), 16, box->data() + offset);
    }
  });
  emulator::self().writes.add([=, &read] {
    for_each_piece(read, place.data(),
                   [&](std::size_t offset, std::byte* to, std::size_t num_bytes) {
                     if (to != nullptr) std::copy_n(box->data() + offset, num_bytes, to);
                   });
  });
}
inline void cp_async_bulk_commit_group() {
  emulator::self().reads.commit();
  emulator::self().writes.commit();
}
template <int kPending>
void cp_async_bulk_wait_group_read(n32_t<kPending>) {
  emulator::self().reads.wait(kPending);
}
template <int kPending>
void cp_async_bulk_wait_group(n32_t<kPending>) {
  emulator::self().reads.wait(kPending);
  emulator::self().writes.wait(kPending);
}

}  // namespace flashmoe::cuda::ptx
