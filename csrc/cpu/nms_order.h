// Launcher side of the suppression family: reading boxes of any stride and dtype, ranking them by score, grouping them by class.
// Only for code under NASDET_REGISTER.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "nasdet/boxes.h"
#include "nasdet/op_checks.h"
#include "nasdet/simd.h"

namespace nasdet {

template <class T> struct Buffer {  // memory that is written before it is read
  std::unique_ptr<T[]> memory;
  explicit Buffer(int64_t count = 0) : memory(count ? new T[size_t(count)] : nullptr) {}
  T* get() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory[size_t(i)]; }
};

inline float widened(float v) { return v; }
inline double widened(double v) { return v; }
inline float widened(Half v) { return NASDET_ISA::half_to_float(v.bits); }
inline float widened(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// The boxes of one image: strides in elements.
struct BoxList {
  const void *boxes, *scores;
  const int64_t* classes;  // or null
  int64_t count, box_stride, coordinate_stride, score_stride, class_stride;
  int storage;  // of boxes and scores: storage_code()
};

// Calls f with a value of the stored type.
template <class F> auto with_storage(int storage, F f) {
  switch (storage) {
    case 1:
      return f(double{});
    case 2:
      return f(BFloat16{});
    case 3:
      return f(Half{});
    default:
      return f(float{});
  }
}

inline void check_cpu_boxes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& classes,
                            double threshold, int64_t leading) {
  STD_TORCH_CHECK(boxes.is_cpu(), "boxes must be on the CPU");
  check_boxes(boxes, scores, classes, threshold, leading);
  STD_TORCH_CHECK(boxes.size(leading) <= std::numeric_limits<int32_t>::max(), "boxes must be at most 2147483647, got ",
                  boxes.size(leading));
}

inline BoxList list_of(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& classes) {
  const int64_t d = boxes.dim() - 2;
  return {boxes.const_data_ptr(),
          scores.const_data_ptr(),
          classes ? static_cast<const int64_t*>(classes->const_data_ptr()) : nullptr,
          boxes.size(d),
          boxes.stride(d),
          boxes.stride(d + 1),
          scores.stride(d),
          classes ? classes->stride(d) : 0,
          storage_code(boxes, "boxes")};
}

constexpr int kDigitBits = 11;
constexpr int64_t kRadixCount = 256;  // fewer are sorted by comparison

// Stable ascending sort by the bits [first_bit, last_bit) of key(entry); digits that are the same everywhere cost nothing.
// Returns where the result lies: `entries` or `scratch`.
template <class Entry, class Key>
Entry* radix_sort(Entry* entries, Entry* scratch, int64_t count, int first_bit, int last_bit, Key key) {
  constexpr int64_t kDigits = 1 << kDigitBits;
  const int passes = (last_bit - first_bit + kDigitBits - 1) / kDigitBits;
  std::vector<uint32_t> counts(size_t(passes * kDigits));
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = uint64_t(key(entries[i])) >> first_bit;
    for (int pass = 0; pass < passes; ++pass, bits >>= kDigitBits)
      ++counts[size_t(pass * kDigits + int64_t(bits % kDigits))];
  }
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t* places = &counts[size_t(pass * kDigits)];
    const int shift = first_bit + pass * kDigitBits;
    const auto digit = [&](const Entry& entry) { return (uint64_t(key(entry)) >> shift) % kDigits; };
    if (places[digit(entries[0])] == uint64_t(count)) continue;
    uint32_t place = 0;
    for (int64_t d = 0; d < kDigits; ++d) place += std::exchange(places[d], place);
    for (int64_t i = 0; i < count; ++i) scratch[places[digit(entries[i])]++] = entries[i];
    std::swap(entries, scratch);
  }
  return entries;
}

struct KeyedIndex {
  uint64_t key;
  uint32_t index;
  bool operator<(const KeyedIndex& other) const { return key != other.key ? key < other.key : index < other.index; }
};

inline KeyedIndex* sorted(KeyedIndex* entries, KeyedIndex* scratch, int64_t count) {
  if (count > kRadixCount) return radix_sort(entries, scratch, count, 0, 64, [](const KeyedIndex& e) { return e.key; });
  std::sort(entries, entries + count);
  return entries;
}

// indices[r] = the box of rank r: score descending, NaN first, ties by index.
template <class S> void rank_by_score(const BoxList& list, uint32_t* indices) {
  const S* scores = static_cast<const S*>(list.scores);
  const int64_t n = list.count;
  if constexpr (sizeof(S) == 8) {
    Buffer<KeyedIndex> entries(n), scratch(n > kRadixCount ? n : 0);
    for (int64_t i = 0; i < n; ++i) entries[i] = {descending_key(scores[i * list.score_stride]), uint32_t(i)};
    const KeyedIndex* result = sorted(entries.get(), scratch.get(), n);
    for (int64_t r = 0; r < n; ++r) indices[r] = result[r].index;
  } else {
    Buffer<uint64_t> entries(n), scratch(n > kRadixCount ? n : 0);
    for (int64_t i = 0; i < n; ++i)
      entries[i] = uint64_t(descending_key(widened(scores[i * list.score_stride]))) << 32 | uint64_t(i);
    uint64_t* result = entries.get();
    if (n > kRadixCount) result = radix_sort(result, scratch.get(), n, 32, 64, [](uint64_t e) { return e; });
    else std::sort(result, result + n);
    for (int64_t r = 0; r < n; ++r) indices[r] = uint32_t(result[r]);
  }
}

// Ranks in the order of (class, rank), and where each class begins; the last entry of `starts` is the number of boxes.
struct Groups {
  Buffer<uint32_t> ranks;
  std::vector<int64_t> starts;
};

inline Groups group_by_class(const BoxList& list, const uint32_t* indices) {
  const int64_t n = list.count;
  Groups groups{Buffer<uint32_t>(n), {0}};
  const auto class_of = [&](int64_t rank) { return list.classes[int64_t(indices[rank]) * list.class_stride]; };
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = list.classes[i * list.class_stride];
    low = std::min(low, c);
    high = std::max(high, c);
  }
  const uint64_t range = uint64_t(high) - uint64_t(low);
  if (range < uint64_t(4 * n + 64)) {
    std::vector<uint32_t> places(size_t(range) + 1);
    for (int64_t i = 0; i < n; ++i) ++places[size_t(list.classes[i * list.class_stride] - low)];
    uint32_t place = 0;
    for (uint32_t& p : places) {
      const uint32_t members = std::exchange(p, place);
      place += members;
      if (members) groups.starts.push_back(place);
    }
    for (int64_t r = 0; r < n; ++r) groups.ranks[places[size_t(class_of(r) - low)]++] = uint32_t(r);
    return groups;
  }
  Buffer<KeyedIndex> entries(n), scratch(n > kRadixCount ? n : 0);
  for (int64_t r = 0; r < n; ++r) entries[r] = {uint64_t(class_of(r)), uint32_t(r)};
  const KeyedIndex* result = sorted(entries.get(), scratch.get(), n);
  for (int64_t i = 0; i < n; ++i) {
    groups.ranks[i] = result[i].index;
    if (i + 1 == n || result[i].key != result[i + 1].key) groups.starts.push_back(i + 1);
  }
  return groups;
}

// The boxes in the order of `indices` (through `ranks` unless null), one array per coordinate: planes[coordinate * count + i].
template <class S>
void gather_boxes(const BoxList& list, const uint32_t* indices, const uint32_t* ranks,
                  NASDET_ISA::arithmetic_t<S>* planes) {
  const S* boxes = static_cast<const S*>(list.boxes);
  for (int64_t i = 0; i < list.count; ++i) {
    const S* box = boxes + int64_t(indices[ranks ? ranks[i] : i]) * list.box_stride;
    for (int64_t d = 0; d < 4; ++d) planes[d * list.count + i] = widened(box[d * list.coordinate_stride]);
  }
}

}  // namespace nasdet
