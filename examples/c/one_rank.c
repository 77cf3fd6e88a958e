/* A layer of one expert from C: y = relu(x w_up^T) w_down^T, with x = (1, 2) and unit matrices. */
#include <flashmoe/c_api.h>
#include <stdio.h>

static fm_tensor tensor(void* data, int32_t dtype, int32_t ndim, int64_t n0, int64_t n1,
                        int64_t n2) {
  fm_tensor t = {data, dtype, ndim, {n0, n1, n2}, {n1 * n2, n2, 1}};
  if (ndim == 2) t = (fm_tensor){data, dtype, ndim, {n0, n1, 0}, {n1, 1, 0}};
  return t;
}

int main(void) {
  float x[2] = {1, 2}, y[2] = {-1, -1}, identity[4] = {1, 0, 0, 1}, weights[1] = {1};
  int32_t ids[1] = {0};
  fm_layer layer = {.struct_size = sizeof(fm_layer), .dtype = FM_F32};
  layer.hidden = layer.intermediate = 2;
  layer.num_experts = layer.top_k = 1;
  layer.activation = FM_RELU;
  fm_forward_args args = {.struct_size = sizeof(fm_forward_args)};
  args.x = tensor(x, FM_F32, 2, 1, 2, 0);
  args.topk_ids = tensor(ids, FM_I32, 2, 1, 1, 0);
  args.topk_weights = tensor(weights, FM_F32, 2, 1, 1, 0);
  args.w_up = args.w_down = tensor(identity, FM_F32, 3, 1, 2, 2);
  args.y = tensor(y, FM_F32, 2, 1, 2, 0);

  fm_group group;
  if (fm_group_create_self(&group) != FM_OK || fm_forward(group, &layer, &args) != FM_OK) {
    printf("%s\n", fm_last_error());
    return 1;
  }
  fm_group_destroy(group);
  printf("flashmoe %s: y = (%g, %g)\n", fm_version(), y[0], y[1]);
  return y[0] == 1 && y[1] == 2 ? 0 : 1;
}
