// The stages of the layer, one function a task. Every function is called by one thread with a panel
// of its own; what it waits for and what it publishes stands beside it.
#pragma once

#include "cpu/launch.h"

namespace flashmoe::cpu {

// 64 tokens of the router, or of the ids that came from outside, and their histogram.
// Waits: nothing. Publishes: routed.
template <class T>
void route_tile(Launch<T>& launch, int64_t tile, void* panel);

// Places all slots, exchanges metadata with the peers, lays out rows, blocks and tasks.
// Waits: routed, the peers' credit and metadata. Publishes: this rank's metadata, planned.
template <class T>
void make_plan(Launch<T>& launch);

// Sends the token rows of a chunk to every rank that holds one of their experts.
// Waits: planned. Publishes: push flags at the peers.
template <class T>
void push_chunk(Launch<T>& launch, int64_t chunk);

// Forward: hidden rows of a block for one range of intermediate columns.
// Backward: weight * hidden rows, gradient of Z, and pieces of the weights' gradient.
// Waits: push flags of the block's remote tokens. Publishes: up_done, up_total.
template <class T>
void up_tile(Launch<T>& launch, int64_t position, int64_t tile, void* panel);
template <class T>
void grad_up_tile(Launch<T>& launch, int64_t position, int64_t tile, void* panel);

// One column block of the down product (backward: of the input gradient) for a block of rows.
// Waits: up_done of the block, return_done of the ring slot's last user. Publishes: down_done.
template <class T>
void down_tile(Launch<T>& launch, int64_t column_block, int64_t block_idx, void* panel);

// Sums the local contributions of a chunk of one source's tokens for a column block.
// Waits: down_done (the last one also for that of the column block before, whose pieces of the
// slots' gradients it sends). Publishes: return flags at the source, return_done.
template <class T>
void return_chunk(Launch<T>& launch, int64_t column_block, int64_t chunk, void* panel);

// A tile of an expert's weight gradients, or its bias gradients. Waits: up_total.
template <class T>
void weight_tile(Launch<T>& launch, int64_t index, void* panel);
template <class T>
int64_t weight_tiles_per_expert(const Launch<T>& launch);

// Sums the ranks' partials of a chunk; backward: the gradient of the weights and of the router's
// logits. Waits: return flags of all owners. Publishes: combined.
template <class T>
void combine_chunk(Launch<T>& launch, int64_t chunk, void* panel);

// Gradient of the router's weight and bias for a range of experts. Waits: combined.
template <class T>
void router_tile(Launch<T>& launch, int64_t index, void* panel);

}  // namespace flashmoe::cpu
