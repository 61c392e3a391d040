// Scratch memory that outlives a call: the first touch of fresh pages costs more than many an op. One pool for the whole
// process, of pieces that only grow, as many as calls ran at once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nasdet {

// What a call should keep its scratch below, in bytes: it works in smaller pieces instead. 64 MiB unless set. Setting it
// frees the idle pieces that are larger.
int64_t scratch_limit();
void set_scratch_limit(int64_t bytes);

// Gives the memory of all calls that are over back to the system, and says how much it was, in bytes.
int64_t release_scratch();

// At least `bytes` of memory for the time of one call, its contents arbitrary: a piece that an earlier call of any thread
// left, grown if need be. Take it on the calling thread, before the parallel part.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements, aligned to 4096 bytes.
  template <class T> T* take(size_t count) {
    char* const piece = data_ + used_;
    used_ += padded(count * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }
  // What was taken after used() was `used` may be taken again.
  size_t used() const { return used_; }
  void rewind(size_t used) { used_ = used; }

  static constexpr size_t padded(size_t bytes) {
    return (bytes + 4095) / 4096 * 4096;
  }  // what a piece takes of `bytes`

 private:
  char* data_;
  size_t size_, used_ = 0;
};

}  // namespace nasdet
