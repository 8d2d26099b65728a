// Sum of depthwise convolutions with a tall, a wide and a small kernel, and its weight gradient.
//
// The arithmetic is that of a direct convolution, with vectors over channels. A block of as many
// channels as a vector holds is copied to a scratch plane with zero margins, [row][column][channel],
// which makes every load aligned and brings any memory layout and storage type to one form.
//
// Forward: a tile of outputs stays in registers while the taps along the long kernel axis go by.
// Up to five taps of the short axis are done at a time, so that an input vector, once loaded, enters
// several products. Taps that meet nothing but padding are left out.
//
// bfloat16 is widened to float32, except in the forward pass of processors that multiply pairs of it
// and add both products to a float32 lane: there a lane of the scratch plane holds a pixel and the one
// to its right, a lane of the weights two taps of a row, and taps go by in twos.
//
// Weight gradient: a block of up to 5 x 5 taps stays in registers while a row of the map goes by.
//
// The input gradient is the forward operator with flipped kernels; its branches read from different
// tensors and add to one.
//
// Plain C interface, no dependency: see slak_mm/ops/backends/cpu_native.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SLAK_SHUFFLE 1
#endif
#endif

extern "C" {

// Strides count elements.
struct SlakTensor {
  void* data;
  int64_t n, c, h, w;
};

// Tap (i, j) of an output at (y, x) meets the input at (y + i - row, x + j - column).
struct SlakBranch {
  void* weight;
  int64_t c, h, w;  // strides of the kernel, in elements
  int32_t rows, columns;
  int32_t row, column;
  int32_t source, target;
  int32_t flip, reserved;
};

// The signature of GOMP_parallel, which GNU's, LLVM's and Intel's OpenMP runtimes export.
typedef void (*SlakParallel)(void (*)(void*), void*, unsigned, unsigned);

struct SlakProblem {
  int64_t images, channels, height, width;
  int32_t dtype;  // 0: float32, 1: bfloat16, 2: float64
  int32_t threads;
  int32_t sources, targets, branches, reserved;
  SlakTensor source[4];
  SlakTensor target[3];
  SlakBranch branch[3];
  const void* bias;  // per channel, contiguous, or null; added to target 0
  SlakParallel parallel;
};
}

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__) || defined(__powerpc64__)
#define SLAK_MANY_REGISTERS 1  // 32 vector registers; otherwise 16
constexpr int kGradientBlock = 5;  // taps of one axis whose gradients are summed at a time
#else
constexpr int kGradientBlock = 3;
#endif

constexpr int kShort = 5;  // taps of the short axis done at a time
// Outputs along a row that are finished before the next rows are begun: the rows which a tall kernel
// reads should stay in the second-level cache.
constexpr int kStripColumns = 48;
constexpr int64_t kAlignment = 64;

template <typename F>
struct Vector {
  typedef F Type __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / int(sizeof(F));
};
template <typename F>
using Vec = typename Vector<F>::Type;
template <typename F>
constexpr int kLanes = Vector<F>::kLanes;

#define SLAK_INLINE __attribute__((always_inline)) inline
#define SLAK_LAMBDA __attribute__((always_inline))

template <int... I, typename Body>
SLAK_INLINE void unroll_indices(std::integer_sequence<int, I...>, Body&& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
// Runs the body for 0 to N - 1 as compile-time constants: what it indexes can live in registers.
template <int N, typename Body>
SLAK_INLINE void unroll(Body&& body) {
  unroll_indices(std::make_integer_sequence<int, N>{}, body);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes that differ by at most one, none above `largest`.
struct Split {
  int pieces, base, longer;
  Split(int length, int largest)
      : pieces(int(divide_up(length, largest))), base(length / pieces), longer(length % pieces) {}
  int first(int piece) const { return piece * base + (piece < longer ? piece : longer); }
  int size(int piece) const { return base + (piece < longer ? 1 : 0); }
};

// ------------------------------------------------------------------------------------ storage types

struct BFloat16 {
  uint16_t bits;
};

template <typename F>
SLAK_INLINE F widen(F value) {
  return value;
}
SLAK_INLINE float widen(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <typename S, typename F>
SLAK_INLINE S narrow(F value) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{uint16_t(is_nan ? 0x7fc0u : rounded)};
  } else {
    return S(value);
  }
}

// The bits of a vector of float32, and of as many bfloat16.
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <typename F, typename S>
SLAK_INLINE Vec<F> load_lanes(const S* from) {
  Vec<F> v;
  if constexpr (std::is_same_v<S, BFloat16>) {
    HalfBits half;
    std::memcpy(&half, from, sizeof(half));
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
    std::memcpy(&v, from, sizeof(v));
  }
  return v;
}
template <typename F, typename S>
SLAK_INLINE void store_lanes(S* to, const Vec<F>& v) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // as in narrow()
    Bits bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
    const HalfBits half =
        __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), HalfBits);
    std::memcpy(to, &half, sizeof(half));
  } else {
    std::memcpy(to, &v, sizeof(v));
  }
}

// Taps of a kernel row whose products one instruction adds to a lane of the sum.
template <typename S>
constexpr int kTapsPerLane = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kTapsPerLane<BFloat16> = 2;
#endif

template <int kTaps, typename V>
SLAK_INLINE void add_product(V& sum, const V& a, const V& b) {
#if defined(__AVX512BF16__)
  if constexpr (kTaps == 2) {
    sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    return;
  }
#endif
  sum += a * b;
}

// Lanes that hold the bfloat16 of `first` and behind it that of `second`, both widened.
SLAK_INLINE Vec<float> paired(const Vec<float>& first, const Vec<float>& second) {
  return (Vec<float>)(((Bits)first >> 16) | (Bits)second);
}

// ------------------------------------------------------------------------------------- transposition

#ifdef SLAK_SHUFFLE
template <typename F>
SLAK_INLINE void interleave(const Vec<F>& a, const Vec<F>& b, Vec<F>& low, Vec<F>& high) {
  if constexpr (kLanes<F> == 16) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(
        a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kLanes<F> == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (kLanes<F> == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  }
}
#endif

template <typename F>
inline void transpose(Vec<F>* v) {
  constexpr int L = kLanes<F>;
#ifdef SLAK_SHUFFLE
  Vec<F> other[L];
  for (int step = 1; step < L; step *= 2) {
    unroll<L / 2>([&](auto i) { interleave<F>(v[i], v[i + L / 2], other[2 * i], other[2 * i + 1]); });
    unroll<L>([&](auto i) { v[i] = other[i]; });
  }
#else
  F* lanes = reinterpret_cast<F*>(v);
  for (int i = 0; i < L; ++i)
    for (int j = i + 1; j < L; ++j) std::swap(lanes[i * L + j], lanes[j * L + i]);
#endif
}

// Reads `length` vectors of `channels` lanes, the other lanes zero; strides count elements.
template <typename F, typename S, typename Put>
inline void read_lanes(const S* from, int64_t channel_stride, int64_t stride, int channels,
                       int64_t length, Put&& put) {
  constexpr int L = kLanes<F>;
  if (channel_stride == 1 && channels == L) {
    for (int64_t i = 0; i < length; ++i) put(i, load_lanes<F>(from + i * stride));
    return;
  }
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= length; i += L) {
      Vec<F> square[L];
      for (int l = 0; l < L; ++l)
        square[l] = l < channels ? load_lanes<F>(from + l * channel_stride + i) : Vec<F>{};
      transpose<F>(square);
      for (int k = 0; k < L; ++k) put(i + k, square[k]);
    }
  }
  for (; i < length; ++i) {
    F lanes[L] = {};
    for (int l = 0; l < channels; ++l) lanes[l] = widen(from[l * channel_stride + i * stride]);
    put(i, load_lanes<F>(lanes));
  }
}

template <typename F, typename S, typename Get>
inline void write_lanes(S* to, int64_t channel_stride, int64_t stride, int channels, int64_t length,
                        Get&& get) {
  constexpr int L = kLanes<F>;
  if (channel_stride == 1 && channels == L) {
    for (int64_t i = 0; i < length; ++i) store_lanes<F>(to + i * stride, get(i));
    return;
  }
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= length; i += L) {
      Vec<F> square[L];
      for (int k = 0; k < L; ++k) square[k] = get(i + k);
      transpose<F>(square);
      for (int l = 0; l < channels; ++l) store_lanes<F>(to + l * channel_stride + i, square[l]);
    }
  }
  for (; i < length; ++i) {
    F lanes[L];
    Vec<F> v = get(i);
    std::memcpy(lanes, &v, sizeof(v));
    for (int l = 0; l < channels; ++l)
      to[l * channel_stride + i * stride] = narrow<S>(lanes[l]);
  }
}

// ------------------------------------------------------------------------------------------- scratch

// Memory of one thread that lasts from call to call: fresh pages would cost as much as the copying.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Returns null if there is no memory. What was there before is lost.
  void* reserve(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t huge = size_t(2) << 20;
    const size_t alignment = bytes >= huge ? huge : size_t(kAlignment);
    bytes = (bytes + alignment - 1) / alignment * alignment;
    if (posix_memalign(&data_, alignment, bytes) != 0) {
      data_ = nullptr;
      return nullptr;
    }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == huge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    size_ = bytes;
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Results are mostly fresh memory, of which every page that is touched first costs a fault: large
// pages make that one in 512. Only what lies wholly within the tensor is concerned.
inline void expect_writes(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// ------------------------------------------------------------------------------------------- threads

template <typename Body>
struct Queue {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  Body* body;
  static void work(void* argument) {
    auto* queue = static_cast<Queue*>(argument);
    for (int64_t task; (task = queue->next.fetch_add(1)) < queue->tasks;) (*queue->body)(task);
  }
};

template <typename Body>
void run_tasks(const SlakProblem& p, int64_t tasks, Body body) {
  Queue<Body> queue;
  queue.tasks = tasks;
  queue.body = &body;
  int64_t threads = p.threads < tasks ? p.threads : tasks;
  if (threads <= 1) {
    Queue<Body>::work(&queue);
  } else if (p.parallel) {
    p.parallel(&Queue<Body>::work, &queue, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(&Queue<Body>::work, &queue);
    Queue<Body>::work(&queue);
    for (auto& other : others) other.join();
  }
}

// ------------------------------------------------------------------------------------------- planes

// Where the copy of some rows of one image and channel block lies.
struct Plane {
  int64_t top = 0, left = 0;    // margins
  int64_t height = 0, width = 0;  // with margins; width in vectors
  int64_t first = 0;            // row of the image at `top`
  int64_t vectors() const { return height * width; }
  int64_t at(int64_t row, int64_t column) const {
    return (row - first + top) * width + column + left;
  }
};

// An odd width keeps the rows of a column from competing for the same cache set.
inline int64_t odd(int64_t n) { return n | 1; }

// With two taps per lane the plane must have a left margin.
template <typename F, typename S, int kTaps = 1>
void fill_plane(Vec<F>* to, const Plane& plane, const SlakTensor& t, int64_t image, int64_t channel,
                int channels, int64_t rows, int64_t width) {
  const S* from = static_cast<const S*>(t.data) + image * t.n + channel * t.c;
  const Vec<F> zero = {};
  for (int64_t i = 0; i < plane.top * plane.width; ++i) to[i] = zero;
  for (int64_t r = 0; r < rows; ++r) {
    Vec<F>* row = to + (plane.top + r) * plane.width;
    for (int64_t i = 0; i < plane.left; ++i) row[i] = zero;
    row += plane.left;
    if constexpr (kTaps == 2) {
      Vec<F> last = zero;
      read_lanes<F>(from + (plane.first + r) * t.h, t.c, t.w, channels, width,
                    [&](int64_t i, const Vec<F>& v) {
                      row[i - 1] = paired(last, v);
                      last = v;
                    });
      row[width - 1] = paired(last, zero);
    } else {
      read_lanes<F>(from + (plane.first + r) * t.h, t.c, t.w, channels, width,
                    [&](int64_t i, const Vec<F>& v) { row[i] = v; });
    }
    for (int64_t i = width; i < plane.width - plane.left; ++i) row[i] = zero;
  }
  for (int64_t i = (plane.top + rows) * plane.width; i < plane.vectors(); ++i) to[i] = zero;
}

// ------------------------------------------------------------------------------------------- forward

// Keeps a vector in a register: left alone, GCC reads it from memory again for every product.
#if defined(__AVX512F__)
#define SLAK_PIN(v) asm("" : "+v"(v))
#elif defined(__SSE2__)
#define SLAK_PIN(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
#define SLAK_PIN(v) asm("" : "+w"(v))
#else
#define SLAK_PIN(v) (void)0
#endif

// Keeps the compiler from computing addresses ahead, for which there are too few registers.
template <typename P>
SLAK_INLINE void advance(P*& pointer, int64_t stride) {
  pointer += stride;
  asm("" : "+r"(pointer));
}

// Adds taps `low` to `high` of the long kernel axis and N taps of the short one to a tile of R rows
// and C columns of outputs. `x` is what the first tap meets at the first output. Taps along a row
// are counted in lanes, kTaps each.
template <typename F, int kTaps, bool kTall, int R, int C, int N>
void multiply_tile(Vec<F>* tile, int64_t tile_width, const Vec<F>* x, int64_t width,
                   const Vec<F>* weight, int64_t pitch, int64_t low, int64_t high) {
  constexpr int kRows = R + (kTall ? 0 : N - 1), kColumns = C + (kTall ? kTaps * (N - 1) : 0);
  Vec<F> sum[R][C];
  Vec<F>* to = tile;
  unroll<R>([&](auto r) SLAK_LAMBDA {
    unroll<C>([&](auto c) SLAK_LAMBDA { sum[r][c] = to[c]; });
    advance(to, tile_width);
  });
  const int64_t step = kTall ? width : kTaps;
  x += low * step;
  weight += low * pitch;
  for (int64_t tap = low; tap < high; ++tap) {
    Vec<F> w[N];
    unroll<N>([&](auto n) SLAK_LAMBDA { w[n] = weight[n]; });
    const Vec<F>* row = x;
    unroll<kRows>([&](auto i) SLAK_LAMBDA {
      unroll<kColumns>([&](auto j) SLAK_LAMBDA {
        Vec<F> v = row[j];
        SLAK_PIN(v);
        unroll<N>([&](auto n) SLAK_LAMBDA {
          constexpr int r = kTall ? i : i - n, c = kTall ? j - kTaps * n : j;
          if constexpr (r >= 0 && r < R && c >= 0 && c < C) add_product<kTaps>(sum[r][c], v, w[n]);
        });
      });
      advance(row, width);
    });
    x += step;
    weight += pitch;
  }
  unroll<R>([&](auto r) SLAK_LAMBDA {
    unroll<C>([&](auto c) SLAK_LAMBDA { tile[c] = sum[r][c]; });
    advance(tile, tile_width);
  });
}

template <typename F>
using MultiplyTile = void (*)(Vec<F>*, int64_t, const Vec<F>*, int64_t, const Vec<F>*, int64_t,
                              int64_t, int64_t);

template <typename F, int kTaps, int R, int C, bool kTall>
MultiplyTile<F> choose_taps(int taps) {
  static constexpr MultiplyTile<F> table[kShort] = {
      multiply_tile<F, kTaps, kTall, R, C, 1>, multiply_tile<F, kTaps, kTall, R, C, 2>,
      multiply_tile<F, kTaps, kTall, R, C, 3>, multiply_tile<F, kTaps, kTall, R, C, 4>,
      multiply_tile<F, kTaps, kTall, R, C, 5>};
  return table[taps - 1];
}

struct TileShape {
  int rows, columns;
};
// The tile and the taps fill the vector registers.
#ifdef SLAK_MANY_REGISTERS
constexpr TileShape kTiles[] = {{4, 4}, {5, 4}, {4, 5}};
#else
constexpr TileShape kTiles[] = {{2, 4}, {4, 2}};
#endif
// double is there for checking gradients: the first shape must do, which compiles faster.
template <typename F>
constexpr int kTileShapes = std::is_same_v<F, double> ? 1 : int(sizeof(kTiles) / sizeof(kTiles[0]));

template <typename F, int kTaps, int R, int C>
MultiplyTile<F> choose_axis(bool is_tall, int taps) {
  return is_tall ? choose_taps<F, kTaps, R, C, true>(taps)
                 : choose_taps<F, kTaps, R, C, false>(taps);
}

template <typename F, int kTaps>
MultiplyTile<F> choose_tile(TileShape tile, bool is_tall, int taps) {
#ifdef SLAK_MANY_REGISTERS
  if constexpr (kTileShapes<F> > 1) {
    if (tile.rows == 5) return choose_axis<F, kTaps, 5, 4>(is_tall, taps);
    if (tile.columns == 5) return choose_axis<F, kTaps, 4, 5>(is_tall, taps);
  }
  return choose_axis<F, kTaps, 4, 4>(is_tall, taps);
#else
  if constexpr (kTileShapes<F> > 1) {
    if (tile.rows == 4) return choose_axis<F, kTaps, 4, 2>(is_tall, taps);
  }
  return choose_axis<F, kTaps, 2, 4>(is_tall, taps);
#endif
}

// The tile shape that computes the fewest outputs beyond the edges of the map.
template <typename F>
TileShape tile_shape(int64_t height, int64_t width) {
  TileShape best = kTiles[0];
  int64_t fewest = -1;
  for (int i = 0; i < kTileShapes<F>; ++i) {
    const TileShape tile = kTiles[i];
    const int64_t outputs = divide_up(height, tile.rows) * tile.rows *
                            (divide_up(width, tile.columns) * tile.columns);
    if (fewest < 0 || outputs < fewest) {
      fewest = outputs;
      best = tile;
    }
  }
  return best;
}

// Leaves out rows and columns at the rim that are zero in all channels, such as the padding of an
// off-center kernel, and turns a flipped kernel.
template <typename S>
SlakBranch trimmed(SlakBranch b, int64_t channels) {
  auto is_zero = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const S* taps = static_cast<const S*>(b.weight);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = row; i < row + rows; ++i)
        for (int64_t j = column; j < column + columns; ++j)
          if (widen(taps[c * b.c + i * b.h + j * b.w]) != 0) return false;
    return true;
  };
  auto drop = [&](int64_t row, int64_t column) {
    b.weight = static_cast<S*>(b.weight) + row * b.h + column * b.w;
    b.row -= int32_t(row);
    b.column -= int32_t(column);
  };
  for (; b.row > 0 && is_zero(0, 1, 0, b.columns); --b.rows) drop(1, 0);
  for (; b.row < b.rows - 1 && is_zero(b.rows - 1, 1, 0, b.columns);) --b.rows;
  for (; b.column > 0 && is_zero(0, b.rows, 0, 1); --b.columns) drop(0, 1);
  for (; b.column < b.columns - 1 && is_zero(0, b.rows, b.columns - 1, 1);) --b.columns;
  if (b.flip) {
    b.row = b.rows - 1 - b.row;
    b.column = b.columns - 1 - b.column;
  }
  return b;
}

// A kernel branch. Its taps lie in the scratch memory as rows() x columns() vectors.
template <int kTaps>
struct ForwardBranch {
  SlakBranch given;
  bool is_tall;
  int rows() const { return given.rows; }
  int columns() const { return int(divide_up(given.columns, kTaps)); }
  int64_t vectors() const { return int64_t(rows()) * columns(); }
  int up() const { return given.row; }
  int down() const { return given.rows - 1 - given.row; }
  int before() const { return given.column; }
  int behind() const { return given.columns - 1 - given.column; }
};

template <typename F, typename S>
class Forward {
  static constexpr int L = kLanes<F>;
  static constexpr int kTaps = kTapsPerLane<S>;
  typedef ForwardBranch<kTaps> Branch;

 public:
  explicit Forward(const SlakProblem& problem) : p_(problem) {
    tile_ = tile_shape<F>(p_.height, p_.width);
    const int64_t spill_rows = divide_up(p_.height, tile_.rows) * tile_.rows - p_.height;
    const int64_t spill_columns = divide_up(p_.width, tile_.columns) * tile_.columns - p_.width;
    for (int i = 0; i < p_.branches; ++i) {
      const SlakBranch given = trimmed<S>(p_.branch[i], p_.channels);
      // A tile loads fewer inputs for a square kernel if the taps go by along its shorter side.
      const bool is_square_tall = given.rows == given.columns && kTaps == 1 && tile_.rows <= tile_.columns;
      const Branch b{given, given.rows > given.columns || is_square_tall};
      branches_.push_back(b);
      vectors_ += b.vectors();
      up_ = std::max(up_, int64_t(b.up()));
      down_ = std::max(down_, int64_t(b.down()));
      // A tap of the long axis is left out if the whole tile meets padding, and so is a group of
      // taps of the short axis: this is as far out as they can reach.
      const int64_t rows = tile_.rows - 1 + (b.is_tall ? 0 : kShort - 1);
      const int64_t columns = tile_.columns - 1 + kTaps * (b.is_tall ? kShort : 1) - 1;
      top_ = std::max(top_, std::min(rows, int64_t(b.up())));
      bottom_ = std::max(bottom_, std::min(rows, b.down() + spill_rows));
      left_ = std::max(left_, std::min(columns, int64_t(b.before())));
      right_ = std::max(right_, std::min(columns, b.behind() + spill_columns));
    }
    blocks_ = divide_up(p_.channels, L);
    choose_chunks();
    strip_ = std::max(1, kStripColumns / tile_.columns) * tile_.columns;
    chunk_rows_ = divide_up(divide_up(p_.height, chunks_), tile_.rows) * tile_.rows;
    chunks_ = divide_up(p_.height, chunk_rows_);
    if (kTaps == 2) left_ = std::max<int64_t>(left_, 1);
    plane_.top = top_;
    plane_.left = left_;
    plane_.width = odd(left_ + p_.width + right_);
    plane_vectors_ = (top_ + std::min(p_.height, chunk_rows_ + up_ + down_) + bottom_) * plane_.width;
    band_vectors_ = tile_.rows * strip_;
  }

  int run() {
    for (int t = 0; t < p_.targets; ++t)
      expect_writes(p_.target[t].data,
                    size_t(p_.images * p_.channels * p_.height * p_.width) * sizeof(S));
    std::atomic<int> failed{0};
    run_tasks(p_, blocks_ * p_.images * chunks_, [&](int64_t task) {
      thread_local Scratch scratch;
      const size_t vectors =
          size_t(vectors_ + plane_vectors_ * p_.sources + band_vectors_ * p_.targets);
      auto* memory = static_cast<Vec<F>*>(scratch.reserve(vectors * sizeof(Vec<F>)));
      if (!memory) {
        failed = 1;
        return;
      }
      const int64_t chunk = task % chunks_;
      task /= chunks_;
      work(task / p_.images, task % p_.images, chunk, memory);
    });
    return failed;
  }

 private:
  // Few images of few channels are also divided by rows, or threads would go idle.
  void choose_chunks() {
    const int64_t tasks = blocks_ * p_.images;
    double least = 0;
    for (int64_t chunks = 1; chunks <= divide_up(p_.height, 2 * tile_.rows); ++chunks) {
      if (chunks > 1 && tasks * chunks > 8 * int64_t(p_.threads)) break;
      const double rows = double(divide_up(divide_up(p_.height, chunks), tile_.rows) * tile_.rows);
      const double copied = std::min(double(p_.height), rows + double(up_ + down_));
      // Copying a vector costs as much as some ten taps.
      const double cost = double(divide_up(tasks * chunks, p_.threads)) *
                          (rows * double(vectors_) + 10 * copied * p_.sources);
      if (least == 0 || cost < least) {
        least = cost;
        chunks_ = chunks;
      }
    }
  }

  void work(int64_t block, int64_t image, int64_t chunk, Vec<F>* memory) const {
    const int64_t channel = block * L;
    const int channels = int(std::min<int64_t>(L, p_.channels - channel));
    const int64_t begin = chunk * chunk_rows_;
    const int64_t end = std::min(p_.height, begin + chunk_rows_);

    Vec<F>* weights = memory;
    Vec<F>* planes = weights + vectors_;
    Vec<F>* bands = planes + plane_vectors_ * p_.sources;
    Vec<F>* weight = weights;
    for (const Branch& b : branches_) {
      fill_weights(b, channel, channels, weight);
      weight += b.vectors();
    }
    Plane plane = plane_;
    plane.first = std::max<int64_t>(0, begin - up_);
    const int64_t rows = std::min(p_.height, end + down_) - plane.first;
    plane.height = top_ + rows + bottom_;
    for (int s = 0; s < p_.sources; ++s)
      fill_plane<F, S, kTaps>(planes + s * plane_vectors_, plane, p_.source[s], image, channel,
                              channels, rows, p_.width);

    Vec<F> start = {};
    if (p_.bias)
      read_lanes<F>(static_cast<const S*>(p_.bias) + channel, 1, 1, channels, 1,
                    [&](int64_t, const Vec<F>& v) { start = v; });
    for (int64_t column = 0; column < p_.width; column += strip_) {
      const int64_t columns = std::min(strip_, p_.width - column);
      for (int64_t row = begin; row < end; row += tile_.rows) {
        for (int64_t i = 0; i < band_vectors_ * p_.targets; ++i)
          bands[i] = i < band_vectors_ ? start : Vec<F>{};
        const Vec<F>* taps = weights;
        for (const Branch& b : branches_) {
          multiply_band(b, taps, planes + b.given.source * plane_vectors_, plane,
                        bands + b.given.target * band_vectors_, row, column, columns);
          taps += b.vectors();
        }
        for (int t = 0; t < p_.targets; ++t)
          store_band(p_.target[t], image, channel, channels, row, std::min(end, row + tile_.rows),
                     column, columns, bands + t * band_vectors_);
      }
    }
  }

  // Kernel taps as vectors, the short axis contiguous.
  void fill_weights(const Branch& b, int64_t channel, int channels, Vec<F>* to) const {
    const SlakBranch& k = b.given;
    const S* from = static_cast<const S*>(k.weight) + channel * k.c;
    auto place = [&](int64_t i, int64_t j, const Vec<F>& v) {
      if (k.flip) i = k.rows - 1 - i, j = k.columns - 1 - j;
      const int64_t lane = j / kTaps;
      Vec<F>& tap = to[b.is_tall ? i * b.columns() + lane : lane * b.rows() + i];
      if constexpr (kTaps == 2) {
        // Either half of a lane comes first; the other is zero until it comes.
        const Vec<F> zero = {}, pair = j % 2 ? paired(zero, v) : paired(v, zero);
        tap = (Vec<F>)((Bits)tap | (Bits)pair);
      } else {
        tap = v;
      }
    };
    if (kTaps == 2) std::fill(to, to + b.vectors(), Vec<F>{});
    if (k.w == 1 && k.h == k.columns) {  // one run of taps per channel
      int64_t i = 0, j = 0;
      const int64_t taps = int64_t(k.rows) * k.columns;
      read_lanes<F>(from, k.c, 1, channels, taps, [&](int64_t, const Vec<F>& v) {
        place(i, j, v);
        if (++j == k.columns) j = 0, ++i;
      });
      return;
    }
    for (int64_t i = 0; i < k.rows; ++i)
      read_lanes<F>(from + i * k.h, k.c, k.w, channels, k.columns,
                    [&](int64_t j, const Vec<F>& v) { place(i, j, v); });
  }

  void multiply_band(const Branch& b, const Vec<F>* weight, const Vec<F>* source,
                     const Plane& plane, Vec<F>* band, int64_t row, int64_t column,
                     int64_t columns) const {
    const SlakBranch& k = b.given;
    const int length = b.is_tall ? b.columns() : b.rows();  // of the short axis
    const int64_t step_along = b.is_tall ? 1 : kTaps, step_across = b.is_tall ? kTaps : 1;
    const int64_t along_size = b.is_tall ? p_.height : p_.width;
    const int64_t across_size = b.is_tall ? p_.width : p_.height;
    const int64_t along_tile = b.is_tall ? tile_.rows : tile_.columns;
    const int64_t across_tile = b.is_tall ? tile_.columns : tile_.rows;
    // Taps of an axis which meet the map from a tile whose first output meets input `at` with tap 0.
    auto meets = [](int64_t at, int64_t tile, int64_t size, int64_t step, int64_t taps) {
      const int64_t low = std::max<int64_t>(0, divide_up(2 - step - tile - at, step));
      return std::pair(low, std::min<int64_t>(taps, divide_up(size - at, step)));
    };
    for (int64_t c = 0; c < columns; c += tile_.columns) {
      const int64_t y = row - k.row, x = column + c - k.column;
      const auto [low, high] = meets(b.is_tall ? y : x, along_tile, along_size, step_along,
                                     b.is_tall ? b.rows() : b.columns());
      const auto [begin, end] =
          meets(b.is_tall ? x : y, across_tile, across_size, step_across, length);
      if (low >= high || begin >= end) continue;
      const Split split(int(end - begin), kShort);
      for (int piece = 0; piece < split.pieces; ++piece) {
        const int64_t first = begin + split.first(piece);
        // The input that the first tap meets at the first output of the tile.
        const Vec<F>* input = source + plane.at(y + (b.is_tall ? 0 : first),
                                                x + (b.is_tall ? kTaps * first : 0));
        choose_tile<F, kTaps>(tile_, b.is_tall, split.size(piece))(
            band + c, strip_, input, plane.width, weight + first, length, low, high);
      }
    }
  }

  void store_band(const SlakTensor& t, int64_t image, int64_t channel, int channels, int64_t row,
                  int64_t end, int64_t column, int64_t columns, const Vec<F>* band) const {
    S* to = static_cast<S*>(t.data) + image * t.n + channel * t.c + column * t.w;
    for (; row < end; ++row, band += strip_)
      write_lanes<F>(to + row * t.h, t.c, t.w, channels, columns,
                     [&](int64_t i) -> const Vec<F>& { return band[i]; });
  }

  const SlakProblem& p_;
  TileShape tile_;
  std::vector<Branch> branches_;
  Plane plane_;
  int64_t vectors_ = 0, up_ = 0, down_ = 0, top_ = 0, bottom_ = 0, left_ = 0, right_ = 0;
  int64_t blocks_ = 0, chunks_ = 1, chunk_rows_ = 0, strip_ = 0;
  int64_t plane_vectors_ = 0, band_vectors_ = 0;
};

// ----------------------------------------------------------------------------------- weight gradient

// Adds to I x J taps the products of `columns` inputs of each of `rows` rows with the gradients that
// the taps meet there: sum[i][j] += x[i][u] * grad[u - j].
template <typename F, int I, int J>
void multiply_taps(Vec<F>* taps, int64_t pitch, const Vec<F>* x, int64_t x_width, const Vec<F>* grad,
                   int64_t grad_width, int64_t rows, int64_t columns) {
  Vec<F> sum[I][J] = {};
  for (; rows > 0; --rows, x += x_width, grad += grad_width) {
    // The last J gradients, in turn: at column u the newest is in slot u % J.
    Vec<F> recent[J];
    unroll<J>([&](auto j) SLAK_LAMBDA { recent[j] = grad[int(j) - J]; });
    const Vec<F>* g = grad;
    const Vec<F>* v = x;
    auto step = [&](auto slot) SLAK_LAMBDA {
      recent[slot] = g[slot];
      const Vec<F>* row = v + slot;
      unroll<I>([&](auto i) SLAK_LAMBDA {
        Vec<F> input = *row;
        SLAK_PIN(input);
        unroll<J>([&](auto j) SLAK_LAMBDA { sum[i][j] += input * recent[(slot + J - j) % J]; });
        advance(row, x_width);
      });
    };
    int64_t left = columns;
    for (; left >= J; left -= J, g += J, v += J) unroll<J>(step);
    unroll<J>([&](auto slot) SLAK_LAMBDA {
      if (slot < left) step(slot);
    });
  }
  unroll<I>([&](auto i) SLAK_LAMBDA { unroll<J>([&](auto j) SLAK_LAMBDA { taps[i * pitch + j] += sum[i][j]; }); });
}

template <typename F>
constexpr int kBlock = std::is_same_v<F, double> ? 2 : kGradientBlock;

template <typename F>
using MultiplyTaps = void (*)(Vec<F>*, int64_t, const Vec<F>*, int64_t, const Vec<F>*, int64_t,
                              int64_t, int64_t);

template <typename F, int... K>
MultiplyTaps<F> choose_block(int i, int j, std::integer_sequence<int, K...>) {
  constexpr int B = kBlock<F>;
  static constexpr MultiplyTaps<F> table[B * B] = {multiply_taps<F, K / B + 1, K % B + 1>...};
  return table[(i - 1) * B + j - 1];
}
template <typename F>
MultiplyTaps<F> choose_block(int i, int j) {
  return choose_block<F>(i, j, std::make_integer_sequence<int, kBlock<F> * kBlock<F>>{});
}

// Source 0 is the input, source `branch.source` the gradient of the branch's result.
template <typename F, typename S>
class KernelGradient {
  static constexpr int L = kLanes<F>;
  static constexpr int64_t kTasks = 32;      // enough for the threads of a large machine
  static constexpr int64_t kLeastRows = 16;  // rows that are worth a part of their own
  static constexpr int64_t kMostParts = 16;  // partial sums that are kept
  static constexpr int64_t kBandColumns = 128;  // products added in registers

 public:
  explicit KernelGradient(const SlakProblem& problem) : p_(problem) {
    blocks_ = divide_up(p_.channels, L);
    for (int i = 0; i < p_.branches; ++i) {
      const SlakBranch& b = p_.branch[i];
      taps_ += int64_t(b.rows) * b.columns;
      up_ = std::max(up_, int64_t(b.row));
      down_ = std::max(down_, int64_t(b.rows - 1 - b.row));
    }
    // The division must not depend on the number of threads, or the sums would.
    const int64_t tasks = blocks_ * p_.images;
    int64_t chunks = std::min(divide_up(kTasks, tasks), divide_up(p_.height, kLeastRows));
    chunk_rows_ = divide_up(p_.height, chunks);
    chunks_ = divide_up(p_.height, chunk_rows_);
    parts_ = std::min(p_.images * chunks_, kMostParts);
    band_rows_ = std::max<int64_t>(1, kBandColumns / p_.width);
    x_plane_.width = odd(p_.width);
    grad_plane_.left = kBlock<F>;
    grad_plane_.width = odd(p_.width + 2 * kBlock<F>);
    x_vectors_ = std::min(p_.height, chunk_rows_ + up_ + down_) * x_plane_.width;
    grad_vectors_ = chunk_rows_ * grad_plane_.width;
  }

  int run() {
    static thread_local Scratch sums_memory;
    const size_t bytes = size_t(blocks_ * parts_ * taps_) * sizeof(Vec<F>);
    auto* sums = static_cast<Vec<F>*>(sums_memory.reserve(bytes));
    if (!sums) return 1;
    std::atomic<int> failed{0};
    run_tasks(p_, blocks_ * parts_, [&](int64_t task) {
      thread_local Scratch scratch;
      const size_t vectors = size_t(x_vectors_ + grad_vectors_ * (p_.sources - 1));
      auto* memory = static_cast<Vec<F>*>(scratch.reserve(vectors * sizeof(Vec<F>)));
      if (!memory) {
        failed = 1;
        return;
      }
      work(task / parts_, task % parts_, sums + task * taps_, memory);
    });
    if (failed) return failed;
    run_tasks(p_, blocks_, [&](int64_t block) { store(block, sums + block * parts_ * taps_); });
    return 0;
  }

 private:
  void work(int64_t block, int64_t part, Vec<F>* sums, Vec<F>* memory) const {
    const int64_t channel = block * L;
    const int channels = int(std::min<int64_t>(L, p_.channels - channel));
    for (int64_t i = 0; i < taps_; ++i) sums[i] = Vec<F>{};
    const int64_t items = p_.images * chunks_;
    for (int64_t item = items * part / parts_; item < items * (part + 1) / parts_; ++item) {
      const int64_t image = item / chunks_;
      const int64_t begin = item % chunks_ * chunk_rows_;
      const int64_t end = std::min(p_.height, begin + chunk_rows_);
      Plane xs = x_plane_;
      xs.first = std::max<int64_t>(0, begin - up_);
      xs.height = std::min(p_.height, end + down_) - xs.first;
      fill_plane<F, S>(memory, xs, p_.source[0], image, channel, channels, xs.height, p_.width);
      Plane grads = grad_plane_;
      grads.first = begin;
      grads.height = end - begin;
      Vec<F>* grad = memory + x_vectors_;
      for (int s = 1; s < p_.sources; ++s)
        fill_plane<F, S>(grad + (s - 1) * grad_vectors_, grads, p_.source[s], image, channel,
                         channels, grads.height, p_.width);
      for (int64_t row = begin; row < end; row += band_rows_) {
        Vec<F>* taps = sums;
        for (int i = 0; i < p_.branches; ++i) {
          const SlakBranch& b = p_.branch[i];
          multiply_band(b, taps, memory, xs, grad + (b.source - 1) * grad_vectors_, grads, row,
                        std::min(end, row + band_rows_));
          taps += int64_t(b.rows) * b.columns;
        }
      }
    }
  }

  void multiply_band(const SlakBranch& b, Vec<F>* taps, const Vec<F>* x, const Plane& xs,
                     const Vec<F>* grad, const Plane& grads, int64_t begin, int64_t end) const {
    const Split rows(b.rows, kBlock<F>), columns(b.columns, kBlock<F>);
    for (int r = 0; r < rows.pieces; ++r) {
      const int64_t i = rows.first(r), size = rows.size(r);
      for (int64_t row = begin; row < end;) {
        // Taps of this block that meet the map, and the rows for which they are the same.
        int64_t low = std::max<int64_t>(i, b.row - row);
        int64_t high = std::min<int64_t>(i + size, p_.height + b.row - row);
        int64_t next = row + 1;
        if (low == i && high == i + size)
          next = std::max(next, std::min(end, p_.height + b.row - i - size + 1));
        if (low < high) {
          for (int c = 0; c < columns.pieces; ++c) {
            const int j = columns.first(c), width = columns.size(c);
            const int64_t from = std::max<int64_t>(0, j - b.column);
            const int64_t to = std::min(p_.width, p_.width + j + width - 1 - b.column);
            if (from >= to) continue;
            choose_block<F>(int(high - low), width)(
                taps + low * b.columns + j, b.columns, x + xs.at(row + low - b.row, from), xs.width,
                grad + grads.at(row, from - j + b.column), grads.width, next - row, to - from);
          }
        }
        row = next;
      }
    }
  }

  void store(int64_t block, Vec<F>* sums) const {
    const int64_t channel = block * L;
    const int channels = int(std::min<int64_t>(L, p_.channels - channel));
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t i = 0; i < taps_; ++i) sums[i] += sums[part * taps_ + i];
    for (int i = 0; i < p_.branches; ++i) {
      const SlakBranch& b = p_.branch[i];
      S* to = static_cast<S*>(b.weight) + channel * b.c;
      for (int64_t r = 0; r < b.rows; ++r, sums += b.columns)
        write_lanes<F>(to + r * b.h, b.c, b.w, channels, b.columns,
                       [&](int64_t j) -> const Vec<F>& { return sums[j]; });
    }
  }

  const SlakProblem& p_;
  Plane x_plane_, grad_plane_;
  int64_t blocks_ = 0, chunks_ = 1, chunk_rows_ = 0, parts_ = 1, band_rows_ = 1;
  int64_t taps_ = 0, up_ = 0, down_ = 0, x_vectors_ = 0, grad_vectors_ = 0;
};

template <template <typename, typename> class Operator>
int run(const SlakProblem& problem) {
  switch (problem.dtype) {
    case 0: return Operator<float, float>(problem).run();
    case 1: return Operator<float, BFloat16>(problem).run();
    case 2: return Operator<double, double>(problem).run();
    default: return 2;
  }
}

}  // namespace

extern "C" {

// Both return 0, or 1 if there is not enough memory, or 2 for an unknown dtype.
int slak_mm_cross_forward(const SlakProblem* problem) { return run<Forward>(*problem); }
int slak_mm_cross_kernel_gradient(const SlakProblem* problem) { return run<KernelGradient>(*problem); }
int slak_mm_problem_bytes() { return int(sizeof(SlakProblem)); }
}
