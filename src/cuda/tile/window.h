// A tensor map that clips rows: a box of fixed height touches exactly the rows it is told, and the
// copy engine takes the rest as out of bounds. No masks, no stores past an expert's last row.
//
// Coordinates (column, x, y, z), x < kWindow; x and y both step one row. A box at x = kWindow -
// num_rows, y = row + num_rows reaches rows row .. row + num_rows - 1 before x ends. The address
// then holds kWindow rows too many: z = kWindow, of stride 2^34 bytes less a row, takes them off by
// wrapping the 64-bit address round (kWindow * 2^34 = 2^64).
#pragma once

#include <cstdint>

namespace flashmoe::cuda::tile {

inline constexpr int32_t kWindow = 1 << 30;
inline constexpr uint64_t kWindowTurn = uint64_t{1} << 34;  // bytes

}  // namespace flashmoe::cuda::tile
