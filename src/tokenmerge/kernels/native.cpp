// Matching without the score matrix and merging in one pass, for CPUs. Called from cpu.py through a plain C interface,
// so that one build serves every version of torch. The truth these are compared with is reference.py.
//
// Shapes: B batch, H heads, N tokens in, M tokens out, R absorbed tokens, D head width, C channels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif

#define ALWAYS inline __attribute__((always_inline))

namespace {

typedef int64_t i64;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
constexpr i64 LANES = 16, BLOCK = 64;
#ifdef __AVX512F__
constexpr i64 ROWS = 8;  // a tile of scores is ROWS x LANES, as many as there are registers for
#else
constexpr i64 ROWS = 4;
#endif
struct bf16 { uint16_t bits; };

inline float load(float x) { return x; }
inline float load(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float rounded(float x, float) { return x; }
inline float rounded(float x, bf16) {
  bf16 y;
  store(&y, x);
  return load(y);
}
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
inline i64 up(i64 n, i64 step) { return (n + step - 1) / step * step; }

// the two sides: unprotected tokens at even and at odd places of the whole sequence
struct Sides {
  i64 first_a, first_b, a, b, width;
  Sides(i64 N, i64 D, i64 prefix)
      : first_a(prefix + prefix % 2), first_b(prefix + 1 - prefix % 2),
        a(N > first_a ? (N - first_a + 1) / 2 : 0), b(N > first_b ? (N - first_b + 1) / 2 : 0), width(up(D, LANES)) {}
  i64 floats_a() const { return up(a, ROWS) * width; }
  i64 floats_b() const { return up(b, LANES) * width; }
  i64 floats() const { return up(floats_a() + floats_b() + 4 * a, LANES); }
  uint64_t* keys(float* own) const { return (uint64_t*)(own + floats_a() + floats_b()); }
  i64* partners(float* own) const { return (i64*)keys(own) + a; }
};

inline vec load_vec(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vec load_vec(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * LANES)));
  typedef uint32_t word __attribute__((vector_size(4 * LANES)));
  half bits;
  memcpy(&bits, p, sizeof bits);
  return (vec)(__builtin_convertvector(bits, word) << 16);
}

// mean over heads of one token, normalised; the one that lies `ahead` is fetched meanwhile (a seventh of the time of all matching)
template <typename T>
ALWAYS void normalise(const T* metric, i64 H, i64 D, i64 sH, i64 ahead, float* row) {
  const float mean = 1.0f / H;
  vec squares = {};
  for (i64 d = 0; d < D; d += LANES) {
    vec sum = {};
    if (d + LANES <= D)
      for (i64 h = 0; h < H; h++) {
        __builtin_prefetch(metric + ahead + h * sH + d);
        sum += load_vec(metric + h * sH + d);
      }
    else
      for (i64 h = 0; h < H; h++)
        for (i64 i = 0; i < D - d; i++) sum[i] += load(metric[h * sH + d + i]);
    sum *= mean;
    squares += sum * sum;
    memcpy(row + d, &sum, sizeof sum);
  }
  float part[LANES];
  memcpy(part, &squares, sizeof part);
  for (i64 half = LANES / 2; half; half /= 2)  // pairwise: a chain of sixteen additions would be waited for
    for (i64 i = 0; i < half; i++) part[i] += part[i + half];
  const float scale = 1.0f / std::max(std::sqrt(part[0]), 1e-12f);
  for (i64 d = 0; d < up(D, LANES); d++) row[d] *= scale;
}

template <typename T>
ALWAYS void lay_out(const T* metric, i64 H, i64 D, i64 sH, i64 sN, const Sides& s, i64 begin, i64 end, float* out) {
  alignas(64) float row[1024];
  const i64 width = up(D, LANES);
  float* side_b = out + s.floats_a();
  for (i64 i = begin; i < std::min(end, s.a); i++)
    normalise(metric + (s.first_a + 2 * i) * sN, H, D, sH, 8 * sN, out + i * width);
  for (i64 i = begin; i < std::min(end, s.b); i++) {  // tokens of a tile side by side: [tile][D][LANES]
    normalise(metric + (s.first_b + 2 * i) * sN, H, D, sH, 8 * sN, row);
    float* tile = side_b + i / LANES * width * LANES + i % LANES;
    for (i64 d = 0; d < width; d++) tile[d * LANES] = row[d];
  }
  if (end < std::max(s.a, s.b)) return;
  // what fills up the last tiles is no token, but arithmetic on the denormals it may hold is a hundred times slower
  std::fill(out + s.a * width, side_b, 0.0f);
  for (i64 i = s.b; i < up(s.b, LANES); i++)
    for (i64 d = 0; d < width; d++) side_b[(i / LANES * width + d) * LANES + i % LANES] = 0;
}

template <typename T>
void prepare(const T* metric, i64 H, i64 D, i64 sH, i64 sN, const Sides& s, i64 begin, i64 end, float* out) {
  if (D == 64)  // most heads: with a width that the compiler knows, a token stays in registers
    lay_out(metric, H, 64, sH, sN, s, begin, end, out);
  else
    lay_out(metric, H, D, sH, sN, s, begin, end, out);
}

// scores sort as unsigned integers once the sign is folded in; equal scores: the lower place comes first
inline uint64_t key_of(float score, i64 place) {
  uint32_t bits;
  score += 0.0f;  // -0 is 0
  memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)place);
}

// best partner of the rows [begin, end) of side A: scores tile by tile, the best so far per lane
void best_partners(const float* a, const float* b, const Sides& s, i64 begin, i64 end, uint64_t* keys,
                                i64* partner) {
  vec best[BLOCK];
  ivec place[BLOCK];
  const float lowest = -std::numeric_limits<float>::infinity();
  for (i64 i = 0; i < BLOCK; i++) best[i] = lowest - vec{}, place[i] = ivec{};
  ivec column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (i64 tile = 0; tile < s.b; tile += LANES, b += s.width * LANES, column += (int32_t)LANES) {
    for (i64 i = 0; i < end - begin; i += ROWS) {
      const float* row = a + (begin + i) * s.width;
      vec score[ROWS] = {};
      for (i64 d = 0; d < s.width; d++) {
        vec tokens;
        memcpy(&tokens, b + d * LANES, sizeof tokens);
        for (i64 k = 0; k < ROWS; k++) score[k] += row[k * s.width + d] * tokens;
      }
      for (i64 k = 0; k < ROWS; k++) {
        // what fills up the last tile is no token
        if (tile + LANES > s.b) score[k] = column < (int32_t)s.b ? score[k] : lowest - vec{};
        const ivec is_better = score[k] > best[i + k];
        best[i + k] = is_better ? score[k] : best[i + k];
        place[i + k] = is_better ? column : place[i + k];
      }
    }
  }
  for (i64 i = begin; i < end; i++) {
    const vec& scores = best[i - begin];
    const ivec& places = place[i - begin];
    float highest = scores[0];
    for (i64 k = 1; k < LANES; k++) highest = std::max(highest, scores[k]);
    int32_t first = std::numeric_limits<int32_t>::max();
    for (i64 k = 0; k < LANES; k++) first = std::min(first, scores[k] == highest ? places[k] : first);
    keys[i] = key_of(highest, i);
    partner[i] = first;
  }
}

// the r best pairs by partial selection, and the plan of one image
void choose(uint64_t* keys, i64* partner, const Sides& s, i64 r, i64 prefix, i64* keep, i64* src, i64* dst) {
  std::nth_element(keys, keys + r - 1, keys + s.a, std::greater<uint64_t>());
  std::sort(keys, keys + r, std::greater<uint64_t>());
  const i64 unmerged = s.a - r;
  for (i64 i = 0; i < r; i++) {
    i64 place = 0xffffffffu - (uint32_t)keys[i];
    src[i] = s.first_a + 2 * place;
    dst[i] = prefix + unmerged + partner[place];
    partner[place] = -1;
  }
  for (i64 i = 0; i < prefix; i++) keep[i] = i;
  // the rest of A in order of place; what follows the last of them is overwritten by B
  for (i64 i = 0, m = prefix; i < s.a; i++) {
    keep[m] = s.first_a + 2 * i;
    m += partner[i] >= 0;
  }
  for (i64 i = 0; i < s.b; i++) keep[prefix + unmerged + i] = s.first_b + 2 * i;
}

template <typename T>
inline void add_row(const T* x, const T* branch, i64 C, T* out) {
  if (!branch) {
    memcpy(out, x, C * sizeof(T));
    return;
  }
  for (i64 c = 0; c < C; c++) store(out + c, load(x[c]) + load(branch[c]));
}

// rows [begin, end) of one image's output: kept rows copied, then their sources added in order
template <typename T>
bool merge_rows(const T* x, i64 sN, const T* branch, i64 bN, const float* size, const i64* keep, const i64* src,
                       const i64* dst, i64 N, i64 M, i64 R, i64 C, i64 begin, i64 end, T* out, float* new_size) {
  for (i64 m = begin; m < end; m++) {
    if (keep[m] < 0 || keep[m] >= N) return false;
    new_size[m] = size ? size[keep[m]] : 1;
    add_row(x + keep[m] * sN, branch ? branch + keep[m] * bN : nullptr, C, out + m * C);
  }
  for (i64 i = 0; i < R; i++) {
    if (dst[i] < 0 || dst[i] >= M || src[i] < 0 || src[i] >= N) return false;
    if (dst[i] >= begin && dst[i] < end) new_size[dst[i]] += size ? size[src[i]] : 1;
  }
  for (i64 i = 0; i < R; i++) {
    if (dst[i] < begin || dst[i] >= end) continue;
    const float weight = (size ? size[src[i]] : 1) / std::max(new_size[dst[i]], 1e-12f);
    const T *from = x + src[i] * sN, *kept = x + keep[dst[i]] * sN;
    T* to = out + dst[i] * C;
    if (branch) {
      const T *from_branch = branch + src[i] * bN, *kept_branch = branch + keep[dst[i]] * bN;
      for (i64 c = 0; c < C; c++) {
        float absorbed = rounded(load(from[c]) + load(from_branch[c]), T());
        float lead = rounded(load(kept[c]) + load(kept_branch[c]), T());
        store(to + c, load(to[c]) + weight * (absorbed - lead));
      }
    } else {
      for (i64 c = 0; c < C; c++) store(to + c, load(to[c]) + weight * (load(from[c]) - load(kept[c])));
    }
  }
  return true;
}

}  // namespace

extern "C" {

// raised with every change of this interface, so that cpu.py refuses a library built from another version
int tokenmerge_interface() { return 1; }

// floats of scratch memory that one image needs
i64 tokenmerge_scratch(i64 N, i64 D, i64 prefix) { return Sides(N, D, prefix).floats(); }

// metric [B, H, N, D] with strides sB, sH, sN and 1; keep [B, N - r], src and dst [B, r]; D at most 1024; scratch for
// as many images as there are, or as there are threads if these are fewer.
void tokenmerge_bipartite(const void* metric, int is_bf16, i64 B, i64 H, i64 N, i64 D, i64 sB, i64 sH, i64 sN, i64 r,
                          i64 prefix, i64* keep, i64* src, i64* dst, float* scratch, int threads) {
  const Sides s(N, D, prefix);
  const i64 longer = std::max(s.a, s.b), blocks = (longer + BLOCK - 1) / BLOCK;
  auto fill = [&](i64 image, i64 block, float* own) {
    const i64 begin = block * BLOCK, end = std::min(begin + BLOCK, longer);
    if (is_bf16)
      prepare((const bf16*)metric + image * sB, H, D, sH, sN, s, begin, end, own);
    else
      prepare((const float*)metric + image * sB, H, D, sH, sN, s, begin, end, own);
  };
  auto match = [&](i64 block, float* own) {
    const i64 begin = block * BLOCK, end = std::min(begin + BLOCK, s.a);
    if (begin < end) best_partners(own, own + s.floats_a(), s, begin, end, s.keys(own), s.partners(own));
  };
  auto pick = [&](i64 image, float* own) {
    choose(s.keys(own), s.partners(own), s, r, prefix, keep + image * (N - r), src + image * r, dst + image * r);
  };
  if (B >= threads) {  // one thread does all of an image, which stays in its cache
#pragma omp parallel for num_threads(threads) schedule(static) if (B * H * N * D > 16384)
    for (i64 image = 0; image < B; image++) {
      float* own = scratch + thread_number() * s.floats();
      for (i64 block = 0; block < blocks; block++) fill(image, block, own);
      for (i64 block = 0; block < blocks; block++) match(block, own);
      pick(image, own);
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (B * H * N * D > 16384)
  {
#pragma omp for schedule(static)
    for (i64 task = 0; task < B * blocks; task++) fill(task / blocks, task % blocks, scratch + task / blocks * s.floats());
#pragma omp for schedule(static)
    for (i64 task = 0; task < B * blocks; task++) match(task % blocks, scratch + task / blocks * s.floats());
#pragma omp for schedule(static)
    for (i64 image = 0; image < B; image++) pick(image, scratch + image * s.floats());
  }
}

// x [B, N, C] and branch (or none) with strides per image and token, size [B, N] or none; out [B, M, C], new_size [B, M].
// Returns 0, or 1 where an index is out of range.
int tokenmerge_merge(const void* x, i64 xB, i64 xN, const void* branch, i64 yB, i64 yN, int is_bf16, const float* size,
                     const i64* keep, const i64* src, const i64* dst, i64 B, i64 N, i64 M, i64 R, i64 C, void* out,
                     float* new_size, int threads) {
  // all of an image's sources are looked through for every part of its rows: few parts where there are many images
  const i64 step = std::max<i64>(16, M / std::max<i64>(1, 4 * threads / std::max<i64>(1, B)));
  const i64 parts = (M + step - 1) / step;
  int is_wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : is_wrong) if (B * M * C > 16384)
  for (i64 task = 0; task < B * parts; task++) {
    const i64 image = task / parts, begin = task % parts * step, end = std::min(begin + step, M);
    const float* own_size = size ? size + image * N : nullptr;
    const i64 *k = keep + image * M, *s = src + image * R, *d = dst + image * R;
    bool is_right;
    if (is_bf16)
      is_right = merge_rows((const bf16*)x + image * xB, xN, branch ? (const bf16*)branch + image * yB : nullptr, yN,
                            own_size, k, s, d, N, M, R, C, begin, end, (bf16*)out + image * M * C, new_size + image * M);
    else
      is_right = merge_rows((const float*)x + image * xB, xN, branch ? (const float*)branch + image * yB : nullptr, yN,
                           own_size, k, s, d, N, M, R, C, begin, end, (float*)out + image * M * C, new_size + image * M);
    is_wrong |= !is_right;
  }
  return is_wrong;
}

}  // extern "C"
