// Winograd's transforms of tiles with fewer than 4 outputs on a side, as a map's last ones have: m outputs take the first
// m + 2 points. They share the kernel's transform, so the inputs' has the quotients of what the points' differences multiply to.
#pragma once
#include <type_traits>

#include "winograd_transforms.h"

namespace nasdet::NASDET_ISA {
namespace {

// The input transform of a line of m + 2 values.
struct InputLine {
  template <class Get> static NASDET_INLINE void whole(const Get& get, float* out, int64_t plane) {
    transform_input(get, out, plane);
  }
  static constexpr int from(int outputs) { return outputs + 2; }
  static constexpr int to(int outputs) { return outputs + 2; }
  template <int kOutputs> static NASDET_INLINE void transform(const Vector* d, Vector* out) {
    if constexpr (kOutputs == 1) {
      out[0] = d[0] - kB * d[1];
      out[1] = d[2] - kA * d[1];
      out[2] = (-1.5f * kB) * d[1];
    } else if constexpr (kOutputs == 2) {
      const Vector even = -1.5f * d[2], odd = (-1.5f * kA) * d[1];
      out[0] = d[0] - 2 * d[2];
      out[1] = d[3] - 0.5f * d[1];
      out[2] = even + odd, out[3] = even - odd;
    } else if constexpr (kOutputs == 3) {
      const Vector even = -1.5f * d[2];
      out[0] = (d[0] - 2 * d[2]) + (kB * d[3] - kA * d[1]);
      out[1] = (d[4] - 0.5f * d[2]) + (kA * d[1] - kB * d[3]);
      out[2] = even + (1.5f * kB) * (d[3] - d[1]);
      out[3] = even + kA * (d[3] + d[1]);
      out[4] = (2 * kB) * d[3] - kB * d[1];
    } else {
      interpolate(d, out);
    }
  }
};

// The output transform of a line of m + 2 values.
struct OutputLine {
  static constexpr int from(int outputs) { return outputs + 2; }
  static constexpr int to(int outputs) { return outputs; }
  template <int kOutputs> static NASDET_INLINE void transform(const Vector* m, Vector* out) {
    if constexpr (kOutputs == 1) {
      out[0] = m[0] + m[1] + m[2];
    } else if constexpr (kOutputs == 2) {
      out[0] = m[0] + (m[2] + m[3]);
      out[1] = m[1] + kA * (m[2] - m[3]);
    } else if constexpr (kOutputs == 3) {
      const Vector even = m[2] + m[3], odd = m[2] - m[3];
      out[0] = m[0] + even + m[4];
      out[1] = kA * odd + kB * m[4];
      out[2] = 0.5f * even + (2 * m[4] + m[1]);
    } else {
      sum4(m, out);
    }
  }
};

// The transpose of the output transform, of a line of m gradients.
struct GradientLine {
  template <class Get> static NASDET_INLINE void whole(const Get& get, float* out, int64_t plane) {
    transform_gradient(get, out, plane);
  }
  static constexpr int from(int outputs) { return outputs; }
  static constexpr int to(int outputs) { return outputs + 2; }
  template <int kOutputs> static NASDET_INLINE void transform(const Vector* g, Vector* out) {
    if constexpr (kOutputs == 1) {
      out[0] = out[1] = out[2] = g[0];
    } else if constexpr (kOutputs == 2) {
      const Vector odd = kA * g[1];
      out[0] = g[0], out[1] = g[1];
      out[2] = g[0] + odd, out[3] = g[0] - odd;
    } else if constexpr (kOutputs == 3) {
      const Vector even = g[0] + 0.5f * g[2], odd = kA * g[1];
      out[0] = g[0], out[1] = g[2];
      out[2] = even + odd, out[3] = even - odd;
      out[4] = (g[0] + 2 * g[2]) + kB * g[1];
    } else {
      evaluate4(g, out);
    }
  }
};

template <class Run> NASDET_INLINE void with_outputs(int outputs, const Run& run) {
  switch (outputs) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    default:
      return run(std::integral_constant<int, 4>{});
  }
}

// A transform down the columns, then along the rows, of a tile of rows x columns outputs: get(row, column) and
// put(row, column, value) are of its sides.
template <class Line, class Get, class Put>
NASDET_INLINE void transform_sides(int rows, int columns, const Get& get, const Put& put) {
  Vector lines[6][6];
  with_outputs(rows, [&](auto outputs) {
    for (int c = 0; c < Line::from(columns); ++c) {
      Vector in[6], out[6];
      for (int r = 0; r < Line::from(outputs); ++r) in[r] = get(r, c);
      Line::template transform<outputs>(in, out);
      for (int r = 0; r < Line::to(outputs); ++r) lines[r][c] = out[r];
    }
  });
  with_outputs(columns, [&](auto outputs) {
    for (int r = 0; r < Line::to(rows); ++r) {
      Vector out[6];
      Line::template transform<outputs>(lines[r], out);
      for (int c = 0; c < Line::to(outputs); ++c) put(r, c, out[c]);
    }
  });
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
