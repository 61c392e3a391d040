// The convolution in the frequency domain, forward or to the gradient of the input: spectra, products, and back.
#pragma once
#include "frequency_work.h"

namespace nasdet {
namespace {

// Products of the spectra of a map with those of the weights between `ins` of its channels and `outs` others.
struct Products {
  const float* from;  // spectra of the map, from the block of the first of the channels
  float* to;
  int64_t from_plane, from_block, to_plane, tiles;
  bool add;
};
void multiply_by_weights(const WeightScratch& s, const FrequencyWeights& w, const Products& m) {
  const int64_t depth = w.transposed ? w.outs : w.ins;
  const int64_t width = padded_to(w.transposed ? w.ins : w.outs, frequency_costs().lanes);
  const int64_t tile = s.sizes.g.tile, plane = frequency_step_plane(frequency_costs().lanes);
  s.fold(w);
  s.run_steps([&](int step, float* planes) {
    const int64_t first = step * frequency_step_planes(tile);
    for (int64_t row = 0; row < depth; row += m.from_block) {
      const int64_t rows = std::min(m.from_block, depth - row);
      const float* const from = m.from + row / m.from_block * frequency_planes(tile) * m.from_plane;
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes)(s.sizes.g.tile, s.sizes.g.grid, w,
                                                       {step, planes, row, rows, false});
      NASDET_FREQUENCY_KERNEL(frequency_multiply)
      ({from + first * m.from_plane, planes, m.to + first * m.to_plane, m.from_plane, plane, m.to_plane, m.from_block,
        width, m.tiles, width, rows, frequency_step_complex(tile, step), frequency_step_real(tile, step),
        m.add || row > 0, row == 0, planes + frequency_step_planes(tile) * plane});
    }
  });
}

// A chunk of channels is worked on by one thread, with scratch of its own that stays in the caches, where there are enough
// chunks and memory; otherwise by all threads together, or as many as have room, which then read what others have just written.
struct Crew {
  static constexpr size_t kMostEach = 8 << 20;
  int64_t size, threads;  // chunks at once, and threads of each
  size_t shared, each;    // bytes
  size_t bytes() const { return shared + size_t(size) * each; }

  // each(threads): bytes of a chunk; `held`: those that the call holds besides
  template <class F> Crew(int64_t chunks, size_t held, size_t all, const F& each_on) : shared(all) {
    const int64_t most = nasdet::threads();
    const auto fits = [&](int64_t at_once, int64_t threads_of_each) {
      return int64_t(held + shared + size_t(at_once) * each_on(threads_of_each)) <= scratch_limit();
    };
    size = std::min(most, chunks);
    const bool busy = 4 * chunks >= 3 * pieces_of(chunks, size) * most;  // three quarters of the time
    if (!busy || each_on(1) > kMostEach || !fits(size, 1)) size = 1;
    threads = size > 1 ? 1 : most;
    while (threads > 1 && !fits(size, threads)) --threads;
    each = each_on(threads);
  }

  // f(the one of the crew, its chunk)
  template <class F> void run(int64_t chunks, const F& f) const {
    for_tasks(chunks, size, [&](int64_t one, int64_t chunk) { f(size_t(one), chunk); });
  }
};

// `held`: bytes of the spectra of all of the map, if they are there.
Crew crew_of(const FrequencyPlan& plan, int64_t in_padded, int64_t out, size_t held) {
  const FrequencySizes s = plan.sizes();
  return {pieces_of(out, plan.outs), held,
          held ? 0 : Scratch::padded(size_t(s.spectra(in_padded, block_of(in_padded))) * 4), [&](int64_t threads) {
            return Scratch::padded(size_t(s.spectra(plan.outs, plan.outs)) * 4) + WeightScratch(plan, threads).bytes();
          }};
}

// `to` = the convolution of `from`; for the gradient of the input, with the kernels turned round and the channels swapped.
// `spectra` of all of `from`, if they are there.
void convolve(const ConvProblem& p, const FrequencyPlan& plan, const Crew& crew, const float* from, float* to,
              bool gradient, const float* spectra, Scratch& scratch) {
  const int64_t in = gradient ? p.out_channels : p.in_channels, out = gradient ? p.in_channels : p.out_channels;
  const int64_t lanes = frequency_costs().lanes, in_padded = padded_to(in, lanes);
  const FrequencyGeometry& g = plan.g;
  const FrequencySizes sizes = plan.sizes();
  const TapFold fold(p);
  const std::vector<FrequencyBranch> branches = frequency_branches(p, fold);
  std::vector<int32_t> ends;
  const int64_t block = block_of(in_padded);
  const int64_t from_plane = sizes.plane(block);
  const int64_t to_plane = sizes.plane(plan.outs);
  const int64_t from_elements = sizes.spectra(in_padded, block);
  float* const own = scratch.take<float>(spectra ? 0 : size_t(from_elements));
  std::vector<float*> results;
  for (int64_t one = 0; one < crew.size; ++one)
    results.push_back(scratch.take<float>(size_t(sizes.spectra(plan.outs, plan.outs))));
  std::vector<WeightScratch> scratches(size_t(crew.size), WeightScratch(plan, crew.threads));
  for (WeightScratch& one : scratches) one.take(scratch);
  FrequencyWeights all{branches.data(),
                       int64_t(branches.size()),
                       p.in_channels,
                       p.out_channels,
                       fold.of(g.grid, ends),
                       0,
                       0,
                       0,
                       0,
                       gradient,
                       nullptr};
  for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
    const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
    FrequencyTiles written = g.tiles(p, out, false, row, rows);
    written.streaming = written_past(to, out * 4, p.map_floats() * 4);
    if (!spectra)
      run_spectra(g, g.tiles(p, in, true, row, rows),
                  {own, from_plane, block, in_padded, 0, from_elements * 4 >= kFrequencyCached}, from);
    crew.run(pieces_of(out, plan.outs), [&](size_t one, int64_t chunk) {
      const int64_t o = chunk * plan.outs, outs = std::min(plan.outs, out - o);
      for (int64_t i = 0; i < in; i += plan.ins) {
        FrequencyWeights w = all;
        w.first_in = i;
        w.ins = std::min(plan.ins, in - i);
        w.first_out = o;
        w.outs = outs;
        w.folded = scratches[one].folded;
        if (gradient) std::swap(w.first_in, w.first_out), std::swap(w.ins, w.outs);
        multiply_by_weights(scratches[one], w,
                            {(spectra ? spectra : own) + i / block * g.planes() * from_plane, results[one], from_plane,
                             block, to_plane, tiles, i > 0});
      }
      const FrequencyPlanes result{results[one], to_plane, padded_to(outs, lanes), padded_to(outs, lanes), o, false};
      run_maps(g, written, result, to);
    });
  }
}

}  // namespace
}  // namespace nasdet
