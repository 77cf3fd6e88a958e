/* FlashMoE flat C ABI: one mixture-of-experts layer, forward and backward, over an expert-parallel
 * (EP) group.
 *
 * Every struct that a function takes starts with `struct_size`, its version: set it to sizeof(the
 * struct). Fields are only ever added at the end, so a caller built against an older header keeps
 * working: a missing field reads as zero. A struct that is larger than the library knows comes from
 * a newer header: FM_VERSION_MISMATCH. fm_tensor has no size of its own because it is a part of the
 * others: it never changes. Every function returns an fm_status; fm_last_error() then holds the
 * text for the calling thread. Nothing here prints, exits or throws.
 *
 * Words: T tokens of this rank, H hidden size, I expert intermediate size, E experts in all,
 * k experts per token, W ranks, E_loc = E / W experts held by a rank, G = 2 for a gated MLP,
 * else 1.
 */
#ifndef FLASHMOE_C_API_H_
#define FLASHMOE_C_API_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FM_API
#else
#define FM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fm_status {
  FM_OK = 0,
  FM_INVALID_VALUE =
      1,               /* a shape, stride, id or option that is not accepted (Python: ValueError) */
  FM_INVALID_TYPE = 2, /* a dtype or device that is not accepted (Python: TypeError) */
  FM_ROUTING = 3,      /* non-finite router logits or an id below -1 (Python: RoutingError) */
  FM_MISMATCH = 4,     /* ranks disagree, or a peer refused its call (Python: RankMismatchError) */
  FM_TIMEOUT = 5,      /* a bounded wait ran out, or the rank waited for is gone (Python:
                          WaitTimeoutError) */
  FM_ABORTED = 6,      /* the group was aborted, here or by a peer (Python: GroupAbortedError) */
  FM_OUT_OF_MEMORY = 7,
  FM_UNSUPPORTED = 8, /* valid, but not by this engine or build (Python: UnsupportedError) */
  FM_INTERNAL = 9,
  FM_VERSION_MISMATCH = 10 /* a struct_size that no version of this struct has had */
} fm_status;

typedef enum fm_dtype {
  FM_F64 = 0,
  FM_F32 = 1,
  FM_BF16 = 2,
  FM_F16 = 3,
  FM_I32 = 4,
  FM_I64 = 5
} fm_dtype;

typedef enum fm_activation {
  FM_SILU = 0,
  FM_GELU_ERF = 1,
  FM_GELU_TANH = 2,
  FM_RELU = 3,
  FM_RELU2 = 4, /* relu(x)^2 */
  FM_IDENTITY = 5
} fm_activation;

/* Order of the G*I rows of w_up. */
typedef enum fm_gate_layout {
  FM_GATE_CONCATENATED = 0, /* I gate rows, then I up rows */
  FM_GATE_INTERLEAVED = 1,  /* gate row i at 2i, up row i at 2i + 1 */
  FM_GATE_SEPARATE = 2      /* w_gate [E_loc, I, H] and w_up [E_loc, I, H] are two tensors */
} fm_gate_layout;

typedef enum fm_score {
  FM_SCORE_SOFTMAX = 0,      /* softmax over all experts, then top-k */
  FM_SCORE_TOPK_SOFTMAX = 1, /* top-k of the logits, then softmax over the chosen k */
  FM_SCORE_SIGMOID = 2,
  FM_SCORE_SQRT_SOFTPLUS = 3
} fm_score;

/* What the layer is. Plain data: copy it freely. */
typedef struct fm_layer {
  uint32_t struct_size;
  int32_t dtype; /* fm_dtype of x, w_up, w_down and their biases */
  int64_t hidden;
  int64_t intermediate;
  int64_t num_experts; /* E, over all ranks; a multiple of W */
  int64_t top_k;
  /* expert */
  int32_t activation; /* fm_activation */
  int32_t gated;      /* 1: act(gate) * up; 0: act(up) */
  int32_t gate_layout;
  int32_t weight_on_input; /* 1: the top-k weight multiplies x, not the expert's output (Llama 4) */
  double act_alpha;        /* silu only: x * sigmoid(alpha * x); 1 for the plain form */
  double act_limit;        /* > 0: gate = min(gate, limit), up = clamp(up, -limit, limit) */
  double up_offset;        /* added to the (clamped) up value before the product: 1 for gpt-oss */
  double capacity_factor;  /* 0: dropless; else ceil(c*T*k/E) slots of each (source rank, expert) */
  /* router (unused when ids come from outside) */
  int32_t score;       /* fm_score */
  int32_t renormalize; /* divide the chosen weights by their sum + 1e-20 */
  double scale;        /* multiplies the weights last */
  int64_t num_groups;  /* 0 or 1: no group limit */
  int64_t top_groups;  /* groups that stay eligible */
  int64_t group_top;   /* a group's score is the sum of its best group_top selection scores */
  int64_t layer_id; /* any number up to 2^53; ranks whose calls have different ones get FM_MISMATCH:
                       it tells layers of the same sizes apart */
} fm_layer;

/* A strided tensor. data NULL: absent. Strides in elements. Never changes. */
typedef struct fm_tensor {
  void* data;
  int32_t dtype;
  int32_t ndim;
  int64_t shape[3];
  int64_t stride[3];
} fm_tensor;

typedef enum fm_device_type {
  FM_DEVICE_HOST = 0,
  FM_DEVICE_CUDA = 1 /* a launch is queued on the stream; fm_forward does not wait for it */
} fm_device_type;

/* Operands of one forward. Absent tensors have data NULL. Weights may have any strides in which one
 * of the last two dimensions is contiguous: a transposed checkpoint is passed as a transposed view.
 * Either (topk_ids, topk_weights) are inputs, or w_router is given and they are outputs. */
typedef struct fm_forward_args {
  uint32_t struct_size;
  uint32_t flags;           /* 0 */
  fm_tensor x;              /* [T, H] dtype, rows contiguous */
  fm_tensor w_router;       /* [E, H] dtype or f32 (f64 for an f64 layer) */
  fm_tensor router_bias;    /* [E] as w_router */
  fm_tensor selection_bias; /* [E] f32 (f64): added to the scores for the choice only */
  fm_tensor topk_ids;       /* [T, k] i32 or i64; -1 and >= E: no expert */
  fm_tensor topk_weights;   /* [T, k] f32 or dtype (f64 for an f64 layer) */
  fm_tensor w_gate;         /* [E_loc, I, H], FM_GATE_SEPARATE only */
  fm_tensor w_up;           /* [E_loc, G*I, H] ([E_loc, I, H] when separate) */
  fm_tensor w_down;         /* [E_loc, H, I] */
  fm_tensor b_up;   /* [E_loc, G*I] in the row order of w_up (gate, then up when separate) */
  fm_tensor b_down; /* [E_loc, H] */
  fm_tensor y;      /* [T, H] out */
  fm_tensor logits; /* [T, E] f32 (f64) out, optional, with w_router only */
  fm_tensor tokens_per_expert; /* [E] i64 out, optional: slots this rank routed, drops included */
  fm_tensor dropped;           /* [1] i64 out, optional: slots of this rank over capacity */
  fm_tensor z;         /* [z_rows, G*I] dtype out, optional: pre-activations for the backward */
  int32_t device_type; /* fm_device_type: where the data of all tensors lies */
  int32_t device;      /* its index, 0 for the host */
  void* stream;        /* the cudaStream_t to launch on, NULL: the default stream; unused on host */
} fm_forward_args;

/* Operands of one backward. grad_x is always written; other outputs that are absent are not
 * computed. The gradients of the weights may be dtype or f32 (f64); with accumulate they are added
 * to, else overwritten. */
typedef struct fm_backward_args {
  uint32_t struct_size;
  uint32_t flags; /* fm_backward_flags */
  fm_tensor x;
  fm_tensor w_router;
  fm_tensor router_bias;
  fm_tensor selection_bias;
  fm_tensor topk_ids;     /* as the forward used or returned them */
  fm_tensor topk_weights; /* likewise */
  fm_tensor w_gate;
  fm_tensor w_up;
  fm_tensor w_down;
  fm_tensor b_up;
  fm_tensor b_down;
  fm_tensor logits;            /* [T, E], with w_router: what the forward returned */
  fm_tensor z;                 /* what the forward returned, or absent: recomputed */
  fm_tensor grad_y;            /* [T, H] dtype in, rows contiguous */
  fm_tensor grad_weights;      /* [T, k] in, optional: gradient arriving at the returned weights */
  fm_tensor grad_logits;       /* [T, E] in, optional: gradient arriving at the returned logits */
  fm_tensor grad_x;            /* [T, H] out */
  fm_tensor grad_topk_weights; /* [T, k] out, dtype of topk_weights, without w_router */
  fm_tensor grad_w_router;     /* [E, H] out, dtype of w_router; this rank's tokens only */
  fm_tensor grad_router_bias;  /* [E] out */
  fm_tensor grad_w_gate;       /* out, shapes of the weights, any strides they may have */
  fm_tensor grad_w_up;
  fm_tensor grad_w_down;
  fm_tensor grad_b_up;
  fm_tensor grad_b_down;
  int32_t device_type; /* these three as in fm_forward_args */
  int32_t device;
  void* stream;
} fm_backward_args;

typedef enum fm_backward_flags {
  FM_ACCUMULATE_W_GATE = 1, /* grad_w_gate += instead of = */
  FM_ACCUMULATE_W_UP = 2,
  FM_ACCUMULATE_W_DOWN = 4
} fm_backward_flags;

/* What the last launch of a group did on this rank; all 0 if its call failed, be it (on CUDA) with
 * what an earlier launch had left to report. A call that is refused for its arguments is no launch
 * on a rank alone or on CUDA. Times are wall clock of this rank; on CUDA, of the GPU: when its
 * first cluster went on from one phase to the next. These add up to `seconds`, although phases
 * overlap, but for push and return, which run beside the others; of a group whose graphs are
 * replayed, they are of the last replay. */
typedef struct fm_stats {
  uint32_t struct_size;
  uint32_t epoch;
  int64_t rows;            /* rows (slots) this rank's experts computed */
  int64_t rows_sent;       /* token rows sent to other ranks, deduplicated */
  int64_t rows_sent_plain; /* what they would be without deduplication: one row a slot */
  int64_t bytes_sent; /* payload bytes to other ranks in this launch: rows, partials, metadata */
  int64_t bytes_sent_plain; /* the same without deduplication in both directions */
  int64_t scratch_bytes;    /* total of the scratch region table */
  int64_t allocated_bytes; /* what the workspace holds (never less; equal after the first launch) */
  int64_t symmetric_bytes; /* memory of this rank that peers write, 0 for W = 1 */
  int64_t num_tasks;
  int64_t num_threads;
  double phase_seconds[8]; /* busy thread-seconds by fm_phase */
  double phase_flops[8];
  double seconds; /* wall time of the launch */
} fm_stats;

/* What fm_group_reserve makes room for. 0: no more than there is. */
typedef struct fm_capacity {
  uint32_t struct_size;
  uint32_t flags;     /* 0 */
  int64_t max_tokens; /* of any rank */
  int64_t hidden;     /* H of any layer, and so on */
  int64_t top_k;
  int64_t num_experts; /* E, over all ranks */
} fm_capacity;

typedef enum fm_phase {
  FM_PHASE_ROUTE = 0,
  FM_PHASE_PLAN = 1,
  FM_PHASE_PUSH = 2,
  FM_PHASE_UP = 3,     /* backward: activation gradients */
  FM_PHASE_DOWN = 4,   /* backward: input gradients */
  FM_PHASE_WEIGHT = 5, /* backward only: weight gradients */
  FM_PHASE_RETURN = 6,
  FM_PHASE_COMBINE = 7
} fm_phase;

typedef struct fm_group_s* fm_group;

/* One rank alone. Every fm_group may be used by one launch at a time. A second thread waits for its
 * turn on a group of one rank; on a larger one, where the ranks could serve the two in different
 * orders, it gets FM_UNSUPPORTED and the group is aborted. */
FM_API fm_status fm_group_create_self(fm_group* out);
/* W ranks of this process: out[0..world). On the CPU each has a thread of its own; on CUDA, where
 * launches do not wait, one thread may also call them in turn. Rank r has CUDA device r unless
 * fm_group_set says otherwise. */
FM_API fm_status fm_group_create_local(int32_t world, fm_group* out);
/* W processes of one machine over POSIX shared memory. `token` names the group: the same text on
 * every rank, never used before. Collective; bounded by FLASHMOE_TIMEOUT_S. */
FM_API fm_status fm_group_create_shm(const char* token, int32_t rank, int32_t world, fm_group* out);
/* Frees the group, whatever it returns: the failure of a CUDA launch that no call has reported. It
 * waits for the group's launches on CUDA; replays of captured graphs have to end before. */
FM_API fm_status fm_group_destroy(fm_group group);
FM_API fm_status fm_group_rank(fm_group group, int32_t* rank, int32_t* world);
/* Ends every wait of every rank of the group; its launches fail with FM_ABORTED from then on. */
FM_API fm_status fm_group_abort(fm_group group, const char* reason);
/* Takes part in the launch that the peers are in, as a rank that refuses it: they fail with
 * FM_MISMATCH and `reason`. For a caller that found an error before it could launch. */
FM_API fm_status fm_group_refuse(fm_group group, const char* reason);
/* key: "timeout_s" (0: no bound), "num_threads" (0: automatic), "max_sms" (most multiprocessors of
 * a CUDA launch, 0: all), "device" (CUDA device of a rank of fm_group_create_local, before the
 * group's first CUDA call), "epoch" (before the first launch, the same on all ranks), "jitter_us"
 * (tests: random delay before each task), "stop_in_phase" (tests: fm_phase + 1 at whose first task
 * the process of this rank stops itself by SIGSTOP, once) */
FM_API fm_status fm_group_set(fm_group group, const char* key, double value);
/* CUDA, several ranks: makes room for these calls in the memory that ranks share. A group's first
 * CUDA call makes that memory, for the largest call of any process, or for its own among ranks of
 * one process; a call beyond it is FM_INVALID_VALUE on its rank and aborts the group. Before the
 * first call the numbers are noted; after that the memory grows: collective among processes, with
 * no launch of the group on its way, and graphs that were captured before keep what they have. */
FM_API fm_status fm_group_reserve(fm_group group, const fm_capacity* capacity);
FM_API fm_status fm_group_stats(fm_group group, fm_stats* out);

/* On CUDA a launch that fails on the device (a wait that ran out, a router that gave NaN) is
 * reported by a later call on this group, by fm_group_stats or by fm_group_destroy, once. The last
 * two wait for the launch. */
FM_API fm_status fm_forward(fm_group group, const fm_layer* layer, const fm_forward_args* args);
FM_API fm_status fm_backward(fm_group group, const fm_layer* layer, const fm_backward_args* args);

/* Rows a `z` tensor must have for a launch of `tokens` tokens on one rank. Of several ranks, which
 * can keep z on CUDA alone, what comes to a rank depends on all ranks' routing: this is a quarter
 * more than an even share, any other number is accepted as well, and where more rows come than z
 * has the backward computes them again by itself. */
FM_API fm_status fm_z_rows(fm_group group, const fm_layer* layer, int64_t tokens, int64_t* rows);

/* How a forward of these operands would run (tiles, scratch, why not), a line for each fact;
 * launches nothing and reads no operand. *text is valid until the thread's next call of this
 * function. */
FM_API fm_status fm_explain(fm_group group, const fm_layer* layer, const fm_forward_args* args,
                            const char** text);

/* Measures the link from one CUDA device of this process to another, in about 20 ms: bytes per
 * second of a kernel's stores into the other's memory, and the seconds from a flag's store there to
 * its reader's seeing it. FM_UNSUPPORTED where the one cannot reach the other. */
FM_API fm_status fm_measure_link(int32_t device, int32_t peer, double* bytes_per_second,
                                 double* flag_seconds);

FM_API const char* fm_last_error(void);
FM_API const char* fm_version(void);
/* "cpu: oneDNN 2.6.3, AVX512_BF16 | cuda: none": what this build can do. */
FM_API const char* fm_build_info(void);

#ifdef __cplusplus
}
#endif
#endif /* FLASHMOE_C_API_H_ */
