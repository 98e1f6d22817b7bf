// Matching without the score matrix and merging in one pass, for CPUs. Called from cpu.py through a plain C interface,
// so that one build serves every version of torch. The truth these are compared with is reference.py.
//
// Shapes: B batch, H heads, N tokens in, M tokens out, R absorbed tokens, D head width, C channels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#define ALWAYS inline __attribute__((always_inline))

namespace {

typedef int64_t i64;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
constexpr i64 LANES = 16, BLOCK = 64, WIDEST = 1024, PART = 1024;
#ifdef __AVX512F__
constexpr i64 ROWS = 8;  // a tile of scores is ROWS x LANES, as many as there are registers for
#else
constexpr i64 ROWS = 4;
#endif
enum { FINE, WRONG_INDEX, WRONG_SIZES, NO_MEMORY };  // what a call returns
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

// what brings a token to length 1 whose squares may overflow or vanish; it is divided by its largest value first. Of a
// token with an entry that is not a number, or infinite, no score is a number: the first entry says so.
float rescaled(float* row, i64 D) {
  float most = 0, squares = 0, odd = 0;
  for (i64 d = 0; d < D; d++) most = std::max(most, std::abs(row[d])), odd += row[d] * 0;
  if (odd != odd) row[0] = odd;
  for (i64 d = 0; d < D; d++) row[d] /= std::max(most, 2e-38f), squares += row[d] * row[d];
  return 1.0f / std::max(std::sqrt(squares), 1e-12f);
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
  float norm = std::sqrt(part[0]), scale = 1.0f / std::max(norm, 1e-12f);
  if (!(norm >= 1e-12f && norm <= 1e15f)) scale = rescaled(row, D);
  for (i64 d = 0; d < up(D, LANES); d++) row[d] *= scale;
}

template <typename T>
ALWAYS void lay_out(const T* metric, i64 H, i64 D, i64 sH, i64 sN, const Sides& s, i64 begin, i64 end, float* out) {
  alignas(64) float row[WIDEST];
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
  score = score != score ? std::numeric_limits<float>::quiet_NaN() : score + 0.0f;  // above all others; -0 is 0
  memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)place);
}

// best partner of the rows [begin, end) of side A: scores tile by tile, the best so far per lane
void best_partners(const float* a, const float* side_b, const Sides& s, i64 begin, i64 end, uint64_t* keys,
                   i64* partner) {
  const float* b = side_b;
  vec best[BLOCK];
  ivec place[BLOCK];
  const float lowest = -std::numeric_limits<float>::infinity();
  for (i64 i = 0; i < BLOCK; i++) best[i] = lowest - vec{}, place[i] = ivec{};
  ivec column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, odd = {};
  for (i64 tile = 0; tile < s.b; tile += LANES, b += s.width * LANES, column += (int32_t)LANES) {
    const vec firsts = s.width ? load_vec(b) : vec{};
    odd |= firsts != firsts;
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
  // as in reference.py, a score that is not a number is the best there is, and the first of them wins
  i64 first_odd = s.b;
  for (i64 k = 0; k < LANES; k++)
    if (odd[k])
      for (i64 i = k; i < first_odd; i += LANES) {
        const float entry = side_b[(i - k) * s.width + k];
        if (entry != entry) first_odd = i;
      }
  for (i64 i = begin; i < end; i++) {
    const vec& scores = best[i - begin];
    const ivec& places = place[i - begin];
    float highest = scores[0];
    for (i64 k = 1; k < LANES; k++) highest = std::max(highest, scores[k]);
    i64 first = s.b;
    if (first_odd < s.b || highest == lowest) {  // the lowest: not one of this row's scores is a number
      highest = std::numeric_limits<float>::quiet_NaN();
      first = s.b && a[i * s.width] != a[i * s.width] ? 0 : first_odd;
    } else {
      for (i64 k = 0; k < LANES; k++) first = std::min<i64>(first, scores[k] == highest ? places[k] : first);
    }
    keys[i] = key_of(highest, i);
    partner[i] = first;
  }
}

// the r best pairs by partial selection, and the plan of one image
void choose(uint64_t* keys, i64* partner, const Sides& s, i64 r, i64 prefix, i64* keep, i64* src, i64* dst) {
  if (r) std::nth_element(keys, keys + r - 1, keys + s.a, std::greater<uint64_t>());
  std::sort(keys, keys + r, std::greater<uint64_t>());
  const i64 unmerged = s.a - r;
  for (i64 i = 0; i < r; i++) {
    i64 place = 0xffffffffu - (uint32_t)keys[i];
    src[i] = s.first_a + 2 * place;
    dst[i] = prefix + unmerged + partner[place];
    partner[place] = -1;
  }
  for (i64 i = 0; i < prefix; i++) keep[i] = i;
  for (i64 i = 0, m = prefix; i < s.a; i++)  // the rest of A in order of place
    if (partner[i] >= 0) keep[m++] = s.first_a + 2 * i;
  for (i64 i = 0; i < s.b; i++) keep[prefix + unmerged + i] = s.first_b + 2 * i;
}

// rows [begin, end) of one image's output: each is summed up in float and written once
template <typename T>
int merge_rows(const T* x, i64 sN, const T* branch, i64 bN, const float* size, const i64* keep, const i64* src,
               const i64* dst, i64 N, i64 M, i64 R, i64 C, i64 begin, i64 end, T* out, float* new_size) {
  // the sources of each row, chained in their order: the first of all rows, then each one's next
  const std::unique_ptr<int32_t, void (*)(void*)> chains((int32_t*)malloc((end - begin + R) * sizeof(int32_t)), free);
  if (!chains) return NO_MEMORY;
  int32_t *head = chains.get() - begin, *next = chains.get() + (end - begin);
  for (i64 m = begin; m < end; m++) {
    if (keep[m] < 0 || keep[m] >= N) return WRONG_INDEX;
    head[m] = -1;
  }
  for (i64 i = R - 1; i >= 0; i--) {
    if (dst[i] < 0 || dst[i] >= M || src[i] < 0 || src[i] >= N) return WRONG_INDEX;
    if (dst[i] < begin || dst[i] >= end) continue;
    next[i] = head[dst[i]];
    head[dst[i]] = (int32_t)i;
  }
  auto size_of = [&](i64 token) { return size ? size[token] : 1.0f; };
  for (i64 m = begin; m < end; m++) {
    const T *lead = x + keep[m] * sN, *more = branch ? branch + keep[m] * bN : nullptr;
    T* to = out + m * C;
    float total = size_of(keep[m]);
    for (i64 i = head[m]; i >= 0; i = next[i]) total += size_of(src[i]);
    new_size[m] = total;
    if (head[m] < 0) {
      if (!branch)
        std::copy(lead, lead + C, to);
      else
        for (i64 c = 0; c < C; c++) store(to + c, load(lead[c]) + load(more[c]));
      continue;
    }
    float kept[PART], sum[PART];
    for (i64 c0 = 0; c0 < C; c0 += PART) {
      const i64 count = std::min(PART, C - c0);
      if (branch)
        for (i64 c = 0; c < count; c++) sum[c] = kept[c] = rounded(load(lead[c0 + c]) + load(more[c0 + c]), T());
      else
        for (i64 c = 0; c < count; c++) sum[c] = kept[c] = load(lead[c0 + c]);
      for (i64 i = head[m]; i >= 0; i = next[i]) {
        const float weight = size_of(src[i]) / std::max(total, 1e-12f);
        const T* from = x + src[i] * sN + c0;
        if (branch) {
          const T* from_branch = branch + src[i] * bN + c0;
          for (i64 c = 0; c < count; c++)
            sum[c] += weight * (rounded(load(from[c]) + load(from_branch[c]), T()) - kept[c]);
        } else {
          for (i64 c = 0; c < count; c++) sum[c] += weight * (load(from[c]) - kept[c]);
        }
      }
      for (i64 c = 0; c < count; c++) store(to + c0 + c, sum[c]);
    }
  }
  return FINE;
}

// what cpu.py hands over: where it lies, and how many elements of its type may be touched from there on
struct Memory {
  const void* at;
  i64 count;
};
// in the interface as two arguments, which cost less to hand over than a struct
#define MEMORY(name) const void *name##_at, i64 name##_count
#define TAKE(name) const Memory name{name##_at, name##_count}

inline bool is_size(i64 n) { return n >= 0 && n <= std::numeric_limits<int32_t>::max(); }

// whether [n0, n1, n2, n3] with these strides and 1 lies in the memory
bool holds(Memory memory, i64 n0, i64 s0, i64 n1, i64 s1, i64 n2, i64 s2, i64 n3, i64 align) {
  if (n0 == 0 || n1 == 0 || n2 == 0 || n3 == 0) return true;
  if (s0 < 0 || s1 < 0 || s2 < 0 || !memory.at || (uintptr_t)memory.at % align) return false;
  typedef __int128 wide;
  return (wide)(n0 - 1) * s0 + (wide)(n1 - 1) * s1 + (wide)(n2 - 1) * s2 + n3 <= memory.count;
}
// whether it is [n0, n1], row by row, no more and no less
inline bool holds(Memory memory, i64 n0, i64 n1, i64 align) {
  return (__int128)n0 * n1 == memory.count && holds(memory, 1, 0, 1, 0, n0, n1, n1, align);
}

}  // namespace

extern "C" {

// raised with every change of this interface, so that cpu.py refuses a library built from another version
int tokenmerge_interface() { return 2; }

// floats of scratch memory that one image needs; -1 for sizes that nothing can have
i64 tokenmerge_scratch(i64 N, i64 D, i64 prefix) {
  const bool is_right = is_size(N) && D >= 0 && D <= WIDEST && prefix >= 0 && prefix <= N;
  return is_right ? Sides(N, D, prefix).floats() : -1;
}

// metric [B, H, N, D] with strides sB, sH, sN and 1; keep [B, N - r], src and dst [B, r]; D at most 1024; scratch for
// as many images as there are, or as there are threads if these are fewer. Nothing is touched where the sizes do not
// fit: 0, or WRONG_SIZES.
int tokenmerge_bipartite(MEMORY(metric), int is_bf16, i64 B, i64 H, i64 N, i64 D, i64 sB, i64 sH, i64 sN, i64 r,
                         i64 prefix, MEMORY(keeps), MEMORY(srcs), MEMORY(dsts), MEMORY(space), int threads) {
  TAKE(metric);
  TAKE(keeps);
  TAKE(srcs);
  TAKE(dsts);
  TAKE(space);
  const i64 needed = tokenmerge_scratch(N, D, prefix);
  if (!is_size(B) || !is_size(H) || H < 1 || needed < 0 || r < 0 || r > (N - prefix) / 2 || threads < 1)
    return WRONG_SIZES;
  if (!holds(metric, B, sB, H, sH, N, sN, D, is_bf16 ? 2 : 4) || !holds(keeps, B, N - r, 8) ||
      !holds(srcs, B, r, 8) || !holds(dsts, B, r, 8) ||
      !holds(space, std::min<i64>(B, threads), needed, 8))
    return WRONG_SIZES;
  i64 *keep = (i64*)keeps.at, *src = (i64*)srcs.at, *dst = (i64*)dsts.at;
  float* scratch = (float*)space.at;
  const Sides s(N, D, prefix);
  const i64 longer = std::max(s.a, s.b), blocks = (longer + BLOCK - 1) / BLOCK;
  auto fill = [&](i64 image, i64 block, float* own) {
    const i64 begin = block * BLOCK, end = std::min(begin + BLOCK, longer);
    if (is_bf16)
      prepare((const bf16*)metric.at + image * sB, H, D, sH, sN, s, begin, end, own);
    else
      prepare((const float*)metric.at + image * sB, H, D, sH, sN, s, begin, end, own);
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
    return FINE;
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
  return FINE;
}

// x [B, N, C] and branch (or none: an address of 0) with strides per image and token, size [B, N] or none; out
// [B, M, C], new_size [B, M]. 0, WRONG_SIZES where nothing was touched, or WRONG_INDEX where the plan points outside;
// what lies in `out` then is no answer.
int tokenmerge_merge(MEMORY(x), i64 xB, i64 xN, MEMORY(branch), i64 yB, i64 yN, int is_bf16, MEMORY(sizes),
                     MEMORY(keep), MEMORY(src), MEMORY(dst), i64 B, i64 N, i64 M, i64 R, i64 C, MEMORY(out),
                     MEMORY(new_sizes), int threads) {
  TAKE(x);
  TAKE(branch);
  TAKE(sizes);
  TAKE(keep);
  TAKE(src);
  TAKE(dst);
  TAKE(out);
  TAKE(new_sizes);
  const i64 align = is_bf16 ? 2 : 4;
  for (i64 n : {B, N, M, R, C})
    if (!is_size(n)) return WRONG_SIZES;
  if (threads < 1 || !holds(x, B, xB, N, xN, 1, 0, C, align) || !holds(keep, B, M, 8) || !holds(src, B, R, 8) ||
      !holds(dst, B, R, 8) || !holds(out, B * M, C, align) || !holds(new_sizes, B, M, 4) ||
      (branch.at && !holds(branch, B, yB, N, yN, 1, 0, C, align)) || (sizes.at && !holds(sizes, B, N, 4)))
    return WRONG_SIZES;
  if (B && R && !M) return WRONG_INDEX;
  // all of an image's sources are looked through for every part of its rows: few parts where there are many images
  const i64 step = std::max<i64>(16, M / std::max<i64>(1, 4 * (i64)threads / std::max<i64>(1, B)));
  const i64 parts = (M + step - 1) / step;
  auto run = [&](auto type, i64 image, i64 begin, i64 end) {
    typedef decltype(type) T;
    return merge_rows((const T*)x.at + image * xB, xN, branch.at ? (const T*)branch.at + image * yB : nullptr, yN,
                      sizes.at ? (const float*)sizes.at + image * N : nullptr, (const i64*)keep.at + image * M,
                      (const i64*)src.at + image * R, (const i64*)dst.at + image * R, N, M, R, C, begin, end,
                      (T*)out.at + image * M * C, (float*)new_sizes.at + image * M);
  };
  int code = FINE;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : code) if (B * M * C > 16384)
  for (i64 task = 0; task < B * parts; task++) {
    const i64 image = task / parts, begin = task % parts * step, end = std::min(begin + step, M);
    code = std::max(code, is_bf16 ? run(bf16(), image, begin, end) : run(float(), image, begin, end));
  }
  return code;
}

}  // extern "C"
