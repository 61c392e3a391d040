// The pool behind Scratch: pieces of memory between the calls that use them.
#ifdef NASDET_REGISTER
#include "scratch.h"

#include "nasdet/checks.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace nasdet {
namespace {

constexpr size_t kHugePage = 2 << 20;

struct Piece {
  char* data;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Piece> idle;
};

// Never destroyed: threads may outlive static objects. A fork waits until no thread holds the pool, or the child's could never
// be taken again.
Pool& pool() {
  static Pool* const shared = [] {
    Pool* const made = new Pool;
#if defined(__linux__)
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
#endif
    return made;
  }();
  return *shared;
}

std::atomic<int64_t> limit{64 << 20};

// What a piece of at least `bytes` takes: huge pages, and small ones for an end that would leave most of a huge one idle.
size_t piece_size(size_t bytes) {
  const size_t whole = bytes / kHugePage * kHugePage, rest = bytes - whole;
  return whole > 0 && rest <= kHugePage / 2 ? whole + Scratch::padded(rest) : rest > 0 ? whole + kHugePage : whole;
}

// Pieces on Linux are maps of their own: the heap would keep what is freed below something that is in use.
Piece allocated(size_t bytes) {
  const size_t size = piece_size(bytes);
#if defined(__linux__)
  void* const map = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  char* const first = static_cast<char*>(map);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(map) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + size, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(first + before, size / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return {first + before, size};
#else
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, size) != 0) throw std::bad_alloc();
  return {static_cast<char*>(data), size};
#endif
}

void give_back(const Piece& piece) {
#if defined(__linux__)
  if (piece.size > 0) munmap(piece.data, piece.size);
#else
  std::free(piece.data);
#endif
}

// Frees the idle pieces that `wanted` picks, and says how much that was.
template <class F> int64_t release_idle(const F& wanted) {
  std::vector<Piece> picked;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<Piece>& idle = pool().idle;
    const auto first = std::partition(idle.begin(), idle.end(), [&](const Piece& piece) { return !wanted(piece); });
    for (auto piece = first; piece != idle.end(); ++piece) picked.push_back(*piece);
    idle.erase(first, idle.end());
  }
  size_t bytes = 0;
  for (const Piece& piece : picked) {
    bytes += piece.size;
    give_back(piece);
  }
  return int64_t(bytes);
}

}  // namespace

int64_t scratch_limit() { return limit.load(std::memory_order_relaxed); }

void set_scratch_limit(int64_t bytes) {
  limit.store(bytes, std::memory_order_relaxed);
  release_idle([&](const Piece& piece) { return piece.size > piece_size(size_t(bytes)); });
}

int64_t release_scratch() {
  return release_idle([](const Piece&) { return true; });
}

Scratch::Scratch(size_t bytes) : data_(nullptr), size_(0) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<Piece>& idle = pool().idle;
    if (!idle.empty()) {
      data_ = idle.back().data, size_ = idle.back().size;
      idle.pop_back();
    }
  }
  if (size_ >= bytes) return;
  give_back({data_, size_});
  data_ = nullptr, size_ = 0;  // if there is no memory for the next
  const Piece piece = allocated(bytes);
  data_ = piece.data, size_ = piece.size;
}

int64_t scratch_limit_op(int64_t bytes) {  // negative: as it is
  if (bytes >= 0) set_scratch_limit(bytes);
  return scratch_limit();
}
int64_t release_scratch_op() { return release_scratch(); }

Scratch::~Scratch() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().idle.push_back({data_, size_});
}

}  // namespace nasdet

STABLE_TORCH_LIBRARY_FRAGMENT(nasdet, m) {
  m.def("_scratch_limit(int bytes) -> int");
  m.def("_release_scratch() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(nasdet, CompositeExplicitAutograd, m) {
  m.impl("_scratch_limit", TORCH_BOX(&nasdet::scratch_limit_op));
  m.impl("_release_scratch", TORCH_BOX(&nasdet::release_scratch_op));
}
#endif
