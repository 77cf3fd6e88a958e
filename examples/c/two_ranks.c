/* Two processes that meet over shared memory. Rank r holds expert r, which multiplies by r + 2;
 * every token goes to both experts with weight 1/2, so y = 2.5 x. */
#include <flashmoe/c_api.h>
#include <math.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { kRanks = 2, kTokens = 3, kHidden = 4 };

static fm_tensor matrix(void* data, int32_t dtype, int64_t rows, int64_t cols) {
  return (fm_tensor){data, dtype, 2, {rows, cols, 0}, {cols, 1, 0}};
}

static int failed(int rank) {
  printf("rank %d: %s\n", rank, fm_last_error());
  return 1;
}

static int run_rank(int rank, const char* token) {
  float x[kTokens][kHidden], y[kTokens][kHidden], weights[kTokens][kRanks];
  float w_up[kHidden][kHidden] = {{0}}, w_down[kHidden][kHidden] = {{0}};
  int32_t ids[kTokens][kRanks];
  for (int t = 0; t < kTokens; ++t) {
    for (int e = 0; e < kRanks; ++e) {
      ids[t][e] = e;
      weights[t][e] = 0.5f;
    }
    for (int h = 0; h < kHidden; ++h) x[t][h] = (float)(1 + rank * 100 + t * 10 + h);
  }
  for (int h = 0; h < kHidden; ++h) {
    w_up[h][h] = 1;
    w_down[h][h] = (float)(rank + 2);
  }

  fm_layer layer = {.struct_size = sizeof(fm_layer), .dtype = FM_F32, .activation = FM_IDENTITY};
  layer.hidden = layer.intermediate = kHidden;
  layer.num_experts = layer.top_k = kRanks;
  fm_forward_args args = {.struct_size = sizeof(fm_forward_args)};
  args.x = matrix(x, FM_F32, kTokens, kHidden);
  args.y = matrix(y, FM_F32, kTokens, kHidden);
  args.topk_ids = matrix(ids, FM_I32, kTokens, kRanks);
  args.topk_weights = matrix(weights, FM_F32, kTokens, kRanks);
  /* [E_loc = 1, rows, columns] */
  args.w_up = (fm_tensor){w_up, FM_F32, 3, {1, kHidden, kHidden}, {kHidden * kHidden, kHidden, 1}};
  args.w_down = args.w_up;
  args.w_down.data = w_down;

  fm_group group;
  if (fm_group_create_shm(token, rank, kRanks, &group) != FM_OK) return failed(rank);
  if (fm_forward(group, &layer, &args) != FM_OK) return failed(rank);
  fm_group_destroy(group);

  float error = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHidden; ++h) error = fmaxf(error, fabsf(y[t][h] - 2.5f * x[t][h]));
  }
  printf("rank %d of %d: y = 2.5 x, off by %g\n", rank, kRanks, (double)error);
  return error == 0 ? 0 : 1;
}

int main(void) {
  char token[64]; /* the same on both ranks, and never used before */
  snprintf(token, sizeof(token), "example-%ld", (long)getpid());
  fflush(stdout);
  const pid_t child = fork(); /* before any call: threads do not survive a fork */
  if (child < 0) return 1;
  const int result = run_rank(child == 0 ? 1 : 0, token);
  if (child == 0) return result;
  int status = 1;
  waitpid(child, &status, 0);
  return result == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
}
