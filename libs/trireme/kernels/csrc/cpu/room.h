// Memory of one thread that grows and stays.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace trireme {
namespace {

class Room {
  public:
    ~Room() { std::free(start_); }
    // Null without memory. What was there before is lost.
    char* at_least(int64_t bytes) {
        if (bytes > size_) {
            std::free(start_);
            size_ = (bytes + 4095) / 4096 * 4096;
            start_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
            if (!start_) size_ = 0;
        }
        return start_;
    }

  private:
    char* start_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace
}  // namespace trireme
