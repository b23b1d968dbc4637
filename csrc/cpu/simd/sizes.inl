// Sizes, and memory of the thread that asks.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Memory of this thread for `count` numbers.
template <class T>
inline T* room(Scratch purpose, int64_t count) {
  return reinterpret_cast<T*>(scratch(purpose, static_cast<size_t>(count) * sizeof(T)));
}
