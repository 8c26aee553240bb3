// A DiTBlock (dit_block.py) on a CPU, forward and backward: one image at a time, so that a core's
// cache holds all of it.
//
// library.py compiles this for one network, and defines its sizes. Names follow dit_block.py; d_x
// is the gradient of x. An AdaLNBlock is a DiTBlock whose gates are 1.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int L = TOKENS, D = WIDTH, M = MLP_WIDTH;
constexpr int d = D / HEADS;  // width of a head
#ifdef __AVX512F__
// Floats in a vector register; see tile()
constexpr int REGISTER = 16, TILE_ROWS = 7, TILE_VECTORS = 4;
#else
constexpr int REGISTER = 8, TILE_ROWS = 6, TILE_VECTORS = 2;
#endif
// Floats in a vector; W divides d, D and M. Vectors wider than a register would be kept in memory:
// 7 times slower.
constexpr int W = d % REGISTER == 0 ? REGISTER : d % 8 == 0 ? 8 : 4;
constexpr int LP = (L + W - 1) / W * W;  // L, padded to whole vectors

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * W)));

vec& at(float* p) { return *reinterpret_cast<vec*>(p); }
const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }

// The parameters of a block, in the order in which __init__.py packs them; the weights transposed.
template <int IN, int OUT> struct Linear { float weight[OUT][IN], bias[OUT]; };
struct Parameters { Linear<D, 3 * D> qkv; Linear<D, D> proj; Linear<D, M> fc1; Linear<M, D> fc2; };
struct Transposed { float qkv[D][3 * D], proj[D][D], fc1[D][M], fc2[M][D]; };

struct Modulation {
    float shift_attn[D], scale_attn[D], gate_attn[D], shift_mlp[D], scale_mlp[D], gate_mlp[D];
};

typedef float Image[L][D];

// What the backward pass needs from the forward pass; it recomputes the rest.
struct Saved { float x[L][D], qkv[L][3 * D], heads[L][D], middle[L][D], hidden[L][M]; };

// weights[j][i]: of token j for token i, so that a vector holds the softmax of W tokens side by
// side. The columns from L on pad the last vector; no result depends on them.
struct Head { float q[d][LP], weights[L][LP], d_out[d][LP], d_weights[L][LP]; };

struct alignas(64) Scratch {
    Saved unsaved;
    Head head;
    float normal[L][D], modulated[L][D], branch[L][D], d_branch[L][D], d_qkv[L][3 * D];
    float activated[L][M], slope[L][M], inverse_std[L];
};
thread_local Scratch scratch;

// ---- Functions of vectors

// The sum of N floats, by halves.
template <int N> float sum_of(const float* x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        typedef float half __attribute__((vector_size(2 * N), aligned(4), may_alias));
        const half total =
            *reinterpret_cast<const half*>(x) + *reinterpret_cast<const half*>(x + N / 2);
        float sums[N / 2];
        std::memcpy(sums, &total, sizeof sums);
        return sum_of<N / 2>(sums);
    }
}

float sum(vec x) {
    float parts[W];
    std::memcpy(parts, &x, sizeof parts);
    return sum_of<W>(parts);
}

vec max(vec a, vec b) { return a > b ? a : b; }  // b if one of them is NaN

// e^x = 2^n e^r with an integer n and |r| <= ln(2) / 2; the polynomial and the two parts of ln(2)
// are those of Cephes' expf.
vec exp(vec x) {
    x = max(vec{} - 87.f, x);
    x = -max(vec{} - 87.f, -x);
    const vec shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: an integer, in the lowest bits
    const vec n = shifted - 12582912.f;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    ints bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

// ---- Matrix products, a tile of the result at a time in registers

// R rows from i and V vectors from j of the product below: their sums stay in registers, 28 of
// AVX-512's 32 or 12 of AVX2's 16, next to V vectors of B and one of A.
template <int R, int V, int K, class A, class Put>
inline void tile(A a, const float* b, int b_row, int i, int j, Put put) {
    vec sums[R][V] = {};
    for (int k = 0; k < K; k++) {
        vec row[V];
        for (int v = 0; v < V; v++) row[v] = at(b + k * b_row + j + v * W);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] += a(i + r, k) * row[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(i + r, j + v * W, sums[r][v]);
}

// V vectors of columns from j, in tiles of R rows, the last ones of R - 1.
template <int ROWS, int V, int K, class A, class Put>
inline void strip(A a, const float* b, int b_row, int j, Put put) {
    constexpr int TILES = (ROWS + TILE_ROWS - 1) / TILE_ROWS, R = (ROWS + TILES - 1) / TILES;
    constexpr int LARGE = R * (ROWS - TILES * (R - 1));  // rows in tiles of R
    for (int i = 0; i < LARGE; i += R) tile<R, V, K>(a, b, b_row, i, j, put);
    if constexpr (R > 1)
        for (int i = LARGE; i < ROWS; i += R - 1) tile<R - 1, V, K>(a, b, b_row, i, j, put);
}

// A B, with A(i, k) of ROWS x K and b[k * b_row + j] of K x COLUMNS: hands the vector at each (i,
// j) to put(i, j, vector).
template <int ROWS, int K, int COLUMNS, class A, class Put>
inline void product(A a, const float* b, int b_row, Put put) {
    constexpr int VECTORS = COLUMNS / W, STRIPS = (VECTORS + TILE_VECTORS - 1) / TILE_VECTORS;
    constexpr int V = (VECTORS + STRIPS - 1) / STRIPS, LAST = VECTORS % V;
    for (int j = 0; j + V * W <= COLUMNS; j += V * W) strip<ROWS, V, K>(a, b, b_row, j, put);
    if constexpr (LAST > 0) strip<ROWS, LAST, K>(a, b, b_row, COLUMNS - LAST * W, put);
}

// A: x, or its transpose, with `row` floats from one row of x to the next.
auto rows(const float* x, int row) { return [=](int i, int k) { return x[i * row + k]; }; }
auto columns(const float* x, int row) { return [=](int i, int k) { return x[k * row + i]; }; }
auto into(float* c, int row) {
    return [=](int i, int j, vec value) { at(c + i * row + j) = value; };
}

template <int IN, int OUT>
void linear(const float (*x)[IN], const float (*transposed)[OUT], const float* bias,
            float (*y)[OUT]) {
    product<L, IN, OUT>(rows(x[0], IN), transposed[0], OUT,
                        [=](int i, int j, vec value) { at(y[i] + j) = value + at(bias + j); });
}

// Adds to the layer's gradients, and writes that of x; d_x may be x itself.
template <int IN, int OUT>
void linear_backward(const float (*x)[IN], const Linear<IN, OUT>& layer, const float (*d_y)[OUT],
                     Linear<IN, OUT>& d_layer, float (*d_x)[IN]) {
    product<OUT, L, IN>(columns(d_y[0], OUT), x[0], IN,
                        [&](int i, int j, vec value) { at(d_layer.weight[i] + j) += value; });
    for (int i = 0; i < L; i++)
        for (int j = 0; j < OUT; j += W) at(d_layer.bias + j) += at(d_y[i] + j);
    product<L, OUT, IN>(rows(d_y[0], OUT), layer.weight[0], IN, into(d_x[0], IN));
}

// For x + gate * linear(h): adds to the layer's gradients, writes the gate's, and hands h's to put.
//
// linear(h) is not kept: with w and b the weight and bias of the layer, and G = d_y^T h, which d_w
// needs anyway,
//     d_gate[c] = sum_i d_y[i][c] (sum_j w[c][j] h[i][j] + b[c])
//               = sum_j w[c][j] G[c][j] + b[c] sum_i d_y[i][c]
//     d_w[c][j] = gate[c] G[c][j]
template <int IN, class Put>
void gated_linear_backward(const float (*h)[IN], const Linear<IN, D>& layer, const float* gate,
                           const float (*d_y)[D], Linear<IN, D>& d_layer, float* d_gate, Put put) {
    vec w_G[D] = {};
    product<D, L, IN>(columns(d_y[0], D), h[0], IN, [&](int c, int j, vec G) {
        at(d_layer.weight[c] + j) += gate[c] * G;
        w_G[c] += at(layer.weight[c] + j) * G;
    });
    for (int c = 0; c < D; c += W) {
        vec total{};
        for (int i = 0; i < L; i++) {
            total += at(d_y[i] + c);
            at(scratch.d_branch[i] + c) = at(gate + c) * at(d_y[i] + c);
        }
        at(d_layer.bias + c) += at(gate + c) * total;
        at(d_gate + c) = at(layer.bias + c) * total;
    }
    for (int c = 0; c < D; c++) d_gate[c] += sum(w_G[c]);
    product<L, D, IN>(rows(scratch.d_branch[0], D), layer.weight[0], IN, put);
}

template <int ROWS, int COLUMNS> void transpose(const float (*x)[COLUMNS], float (*y)[ROWS]) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) y[j][i] = x[i][j];
}

// ---- LayerNorm and modulation

// Writes normal = LayerNorm(x), 1 / std of each token, and y = normal * (1 + scale) + shift.
void norm_modulate(const float (*x)[D], const float* shift, const float* scale, float (*normal)[D],
                   float* inverse_std, float (*y)[D]) {
    for (int i = 0; i < L; i++) {
        vec total{}, squares{};
        for (int c = 0; c < D; c += W) total += at(x[i] + c);
        const float mean = sum(total) / D;
        for (int c = 0; c < D; c += W) {
            const vec centred = at(x[i] + c) - mean;
            squares += centred * centred;
        }
        inverse_std[i] = 1 / std::sqrt(sum(squares) / D + 1e-6f);
        for (int c = 0; c < D; c += W) {
            at(normal[i] + c) = (at(x[i] + c) - mean) * inverse_std[i];
            at(y[i] + c) = at(normal[i] + c) * (1 + at(scale + c)) + at(shift + c);
        }
    }
}

// Adds the gradient of x to d_x, and writes those of shift and scale.
void norm_modulate_backward(const float (*normal)[D], const float* inverse_std, const float* scale,
                            const float (*d_y)[D], float (*d_x)[D], float* d_shift,
                            float* d_scale) {
    vec shifts[D / W] = {}, scales[D / W] = {};
    for (int i = 0; i < L; i++) {
        vec total{}, along{};
        for (int c = 0; c < D; c += W) {
            const vec d_out = at(d_y[i] + c), n = at(normal[i] + c);
            const vec d_normal = d_out * (1 + at(scale + c));
            shifts[c / W] += d_out;
            scales[c / W] += d_out * n;
            total += d_normal;
            along += d_normal * n;
        }
        const float mean = sum(total) / D, mean_along = sum(along) / D;
        for (int c = 0; c < D; c += W) {
            const vec d_normal = at(d_y[i] + c) * (1 + at(scale + c));
            at(d_x[i] + c) += inverse_std[i] * (d_normal - mean - at(normal[i] + c) * mean_along);
        }
    }
    for (int c = 0; c < D; c += W) at(d_shift + c) = shifts[c / W], at(d_scale + c) = scales[c / W];
}

// x + gate * branch
void add_gated(const float (*x)[D], const float* gate, const float (*branch)[D], float (*y)[D]) {
    for (int i = 0; i < L; i++)
        for (int c = 0; c < D; c += W)
            at(y[i] + c) = at(x[i] + c) + at(gate + c) * at(branch[i] + c);
}

// ---- GELU: x/2 (1 + tanh u) = x sigmoid(2u), with 2u = S (x + CUBE x^3) and S = 2 sqrt(2 / pi)

constexpr float S = 1.5957691216f, CUBE = 0.044715f;

vec sigmoid_2u(vec x) { return 1 / (1 + exp(x * (-S - S * CUBE * x * x))); }

void gelu(const float (*x)[M], float (*y)[M]) {
    for (int i = 0; i < L; i++)
        for (int j = 0; j < M; j += W) at(y[i] + j) = at(x[i] + j) * sigmoid_2u(at(x[i] + j));
}

// slope: sigmoid(2u) + x sigmoid(2u) (1 - sigmoid(2u)) times the slope of 2u.
void gelu_and_slope(const float (*x)[M], float (*y)[M], float (*slope)[M]) {
    for (int i = 0; i < L; i++)
        for (int j = 0; j < M; j += W) {
            const vec v = at(x[i] + j), sigmoid = sigmoid_2u(v);
            at(y[i] + j) = v * sigmoid;
            at(slope[i] + j) = sigmoid + v * sigmoid * (1 - sigmoid) * (S + 3 * S * CUBE * v * v);
        }
}

// ---- Attention, a head at a time

// y = scale * x^T, padded with zeros. x: one head's columns, in rows of `row` floats.
void gather(const float* x, int row, float scale, float (*y)[LP]) {
    for (int i = 0; i < LP; i++)
        for (int c = 0; c < d; c++) y[c][i] = i < L ? scale * x[i * row + c] : 0;
}

const float SCALE = 1 / std::sqrt(float(d));

// h.weights[j][i]: the softmax over j of q_i k_j / sqrt(d).
void attend(const float* q, const float* k, Head& h) {
    gather(q, 3 * D, SCALE, h.q);
    product<L, d, LP>(rows(k, 3 * D), h.q[0], LP, into(h.weights[0], LP));
    for (int i = 0; i < LP; i += W) {
        vec most = at(h.weights[0] + i), total{};
        for (int j = 1; j < L; j++) most = max(most, at(h.weights[j] + i));
        for (int j = 0; j < L; j++)
            total += at(h.weights[j] + i) = exp(at(h.weights[j] + i) - most);
        const vec share = 1 / total;
        for (int j = 0; j < L; j++) at(h.weights[j] + i) *= share;
    }
}

void attention(const float (*qkv)[3 * D], float (*out)[D], Head& h) {
    for (int head = 0; head < HEADS; head++) {
        const float *q = qkv[0] + head * d, *k = q + D, *v = k + D;
        attend(q, k, h);
        product<L, L, d>(columns(h.weights[0], LP), v, 3 * D, into(out[0] + head * d, D));
    }
}

void attention_backward(const float (*qkv)[3 * D], const float (*d_out)[D], float (*d_qkv)[3 * D],
                        Head& h) {
    for (int head = 0; head < HEADS; head++) {
        const float *q = qkv[0] + head * d, *k = q + D, *v = k + D, *d_head = d_out[0] + head * d;
        float *d_q = d_qkv[0] + head * d, *d_k = d_q + D, *d_v = d_k + D;
        attend(q, k, h);
        product<L, L, d>(rows(h.weights[0], LP), d_head, D, into(d_v, 3 * D));
        gather(d_head, D, 1, h.d_out);
        product<L, d, LP>(rows(v, 3 * D), h.d_out[0], LP, into(h.d_weights[0], LP));
        for (int i = 0; i < LP; i += W) {  // from the weights to the products q_i k_j
            vec mean{};
            for (int j = 0; j < L; j++) mean += at(h.weights[j] + i) * at(h.d_weights[j] + i);
            for (int j = 0; j < L; j++) {
                vec& d_weight = at(h.d_weights[j] + i);
                d_weight = SCALE * at(h.weights[j] + i) * (d_weight - mean);
            }
        }
        product<L, L, d>(columns(h.d_weights[0], LP), k, 3 * D, into(d_q, 3 * D));
        product<L, L, d>(rows(h.d_weights[0], LP), q, 3 * D, into(d_k, 3 * D));
    }
}

// ---- The block

void forward(const Modulation& mod, const Parameters& w, const Transposed& wt, Image& out,
             Saved& s) {
    norm_modulate(s.x, mod.shift_attn, mod.scale_attn, scratch.normal, scratch.inverse_std,
                  scratch.modulated);
    linear(scratch.modulated, wt.qkv, w.qkv.bias, s.qkv);
    attention(s.qkv, s.heads, scratch.head);
    linear(s.heads, wt.proj, w.proj.bias, scratch.branch);
    add_gated(s.x, mod.gate_attn, scratch.branch, s.middle);
    norm_modulate(s.middle, mod.shift_mlp, mod.scale_mlp, scratch.normal, scratch.inverse_std,
                  scratch.modulated);
    linear(scratch.modulated, wt.fc1, w.fc1.bias, s.hidden);
    gelu(s.hidden, scratch.activated);
    linear(scratch.activated, wt.fc2, w.fc2.bias, scratch.branch);
    add_gated(s.middle, mod.gate_mlp, scratch.branch, out);
}

// d_x: on entry the gradient of the block's output, on return that of its input.
void backward(const Modulation& mod, const Parameters& w, const Saved& s, Image& d_x,
              Modulation& d_mod, Parameters& d_w) {
    gelu_and_slope(s.hidden, scratch.activated, scratch.slope);
    gated_linear_backward(scratch.activated, w.fc2, mod.gate_mlp, d_x, d_w.fc2, d_mod.gate_mlp,
                          [](int i, int j, vec value) { at(scratch.slope[i] + j) *= value; });
    // slope is now the gradient of hidden.
    norm_modulate(s.middle, mod.shift_mlp, mod.scale_mlp, scratch.normal, scratch.inverse_std,
                  scratch.modulated);
    linear_backward(scratch.modulated, w.fc1, scratch.slope, d_w.fc1, scratch.modulated);
    norm_modulate_backward(scratch.normal, scratch.inverse_std, mod.scale_mlp, scratch.modulated,
                           d_x, d_mod.shift_mlp, d_mod.scale_mlp);
    gated_linear_backward(s.heads, w.proj, mod.gate_attn, d_x, d_w.proj, d_mod.gate_attn,
                          into(scratch.branch[0], D));
    attention_backward(s.qkv, scratch.branch, scratch.d_qkv, scratch.head);
    norm_modulate(s.x, mod.shift_attn, mod.scale_attn, scratch.normal, scratch.inverse_std,
                  scratch.modulated);
    linear_backward(scratch.modulated, w.qkv, scratch.d_qkv, d_w.qkv, scratch.modulated);
    norm_modulate_backward(scratch.normal, scratch.inverse_std, mod.scale_attn, scratch.modulated,
                           d_x, d_mod.shift_attn, d_mod.scale_attn);
}

}  // namespace

extern "C" {

int64_t saved_floats() { return sizeof(Saved) / sizeof(float); }

void transposed(int64_t depth, const Parameters* w, Transposed* wt, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < depth; b++) {
        transpose<3 * D, D>(w[b].qkv.weight, wt[b].qkv);
        transpose<D, D>(w[b].proj.weight, wt[b].proj);
        transpose<M, D>(w[b].fc1.weight, wt[b].fc1);
        transpose<D, M>(w[b].fc2.weight, wt[b].fc2);
    }
}

// x, out: (N, L, D); mod: (N, depth, 6, D); saved: (depth, N, saved_floats()), or null when no
// backward pass will follow.
void blocks_forward(int64_t depth, int64_t N, const Image* x, const Modulation* mod,
                    const Parameters* w, const Transposed* wt, Image* out, Saved* saved,
                    int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t b = 0; b < depth; b++)
            for (int64_t n = N * thread / threads; n < N * (thread + 1) / threads; n++) {
                Saved& s = saved ? saved[b * N + n] : scratch.unsaved;
                std::memcpy(s.x, b ? out[n] : x[n], sizeof s.x);
                forward(mod[n * depth + b], w[b], wt[b], out[n], s);
            }
}

// d_x: (N, L, D), on entry the gradient of out, on return that of x; d_w: (threads, depth), zeros,
// to which each thread adds the gradients of its images.
void blocks_backward(int64_t depth, int64_t N, const Modulation* mod, const Parameters* w,
                     const Saved* saved, Image* d_x, Modulation* d_mod, Parameters* d_w,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t b = depth - 1; b >= 0; b--)
            for (int64_t n = N * thread / threads; n < N * (thread + 1) / threads; n++)
                backward(mod[n * depth + b], w[b], saved[b * N + n], d_x[n],
                         d_mod[n * depth + b], d_w[thread * depth + b]);
}

}
