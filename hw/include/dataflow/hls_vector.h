// hls::vector for timed C-simulation: a fixed number of values.
#ifndef M3VIT_DATAFLOW_VECTOR_H_
#define M3VIT_DATAFLOW_VECTOR_H_
#include <array>
#include <cstddef>
namespace hls {
template <class T, size_t N> class vector : public std::array<T, N> {
  public:
    vector() : std::array<T, N>() {}
    vector(const T &value) : std::array<T, N>() { this->fill(value); }
};
} // namespace hls
#endif
