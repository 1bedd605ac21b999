// The backward pass of one task: a sequence and key head, with all queries that read it, so that no
// two tasks write one place and sums have one order. Included once per instruction set.
//
// Key blocks outside, query blocks inside (Dao 2023, algorithm 2): keys, values and their gradients
// of a block stay in L2 while queries pass by; the queries' gradients are summed in float32 scratch.

template <bool kPairs>
struct BackwardBuffers {
  int64_t width, score_row, max_keys;
  float *keys_columns, *values_columns, *keys_steps, *grad_k, *grad_v;
  float *queries, *grads, *queries_steps, *grads_steps;
  float *scores, *products, *weights_pairs, *products_pairs, *products_rows;
  float *delta, *grad_q;

  BackwardBuffers(Scratch& scratch, int64_t head_dim, int64_t num_queries, int64_t block_keys) {
    width = round_up(head_dim, kWidth);
    max_keys = block_keys;
    score_row = max_keys + 16;  // not a power of two, whose rows would share cache sets
    const int64_t units = units_of<kPairs>(head_dim);
    keys_columns = scratch.take(units * max_keys);
    values_columns = scratch.take(units * max_keys);
    keys_steps = scratch.take(units_of<kPairs>(max_keys) * width);
    grad_k = scratch.take(max_keys * width);
    grad_v = scratch.take(max_keys * width);
    queries = scratch.take(kQueryBlock * units);
    grads = scratch.take(kQueryBlock * units);
    queries_steps = scratch.take(units_of<kPairs>(kQueryBlock) * width);
    grads_steps = scratch.take(units_of<kPairs>(kQueryBlock) * width);
    scores = scratch.take(kQueryBlock * score_row);
    products = scratch.take(kQueryBlock * score_row);
    const int64_t pairs = kPairs ? kQueryBlock / 2 * score_row : 0;
    weights_pairs = scratch.take(pairs);
    products_pairs = scratch.take(pairs);
    products_rows = scratch.take(pairs);
    delta = scratch.take(kQueryBlock);
    grad_q = scratch.take(num_queries * width);
  }
};

// Floats that any task needs, of either element type; max_queries counts all heads of a group.
inline int64_t backward_scratch(int64_t head_dim, int64_t max_queries, int64_t max_keys) {
  const int64_t block = largest_key_block(max_keys, kBackwardKeyBlock);
  Scratch floats(nullptr), pairs(nullptr);
  BackwardBuffers<false>(floats, head_dim, max_queries, block);
  BackwardBuffers<CARILLON_PAIRS>(pairs, head_dim, max_queries, block);
  return std::max(floats.used(), pairs.used());
}

// rowsum(dO * out) - dlse: what a row's dP is lowered by before it is weighted.
template <typename Element>
void deltas(const Problem& problem, int64_t head, int64_t token, int64_t num_rows, float* delta) {
  const Head<Element> outs = head_of<Element>(problem.out, token, head);
  const Head<Element> grads = head_of<Element>(problem.grad_out, token, head);
  for (int64_t i = 0; i < num_rows; ++i) {
    const Element* out = outs.rows + i * outs.stride;
    const Element* grad = grads.rows + i * grads.stride;
    Floats sums{};
    for (int64_t d = 0; d < problem.head_dim; d += kWidth) {
      const int64_t count = problem.head_dim - d;
      outs.prefetch(i, d);
      sums = sums + load_part(out + d, count) * load_part(grad + d, count);
    }
    delta[i] = sum(sums);
    if (problem.grad_lse != nullptr) {
      delta[i] -= problem.grad_lse[head * problem.total_q + token + i];
    }
  }
}

// P = e^(scale * s - lse) and dS = P * (dP - delta) of a vector, zeros from `visible` on.
struct Weighted {
  Floats weight;
  Floats product;
};

CARILLON_INLINE Weighted weighted(const float* scores, const float* products, int64_t j,
                                  int64_t visible, float scale, float lse, float delta) {
  if (j >= visible) return {Floats{}, Floats{}};
  const Ints inside = lanes() < int32_t(visible - j);
  const Floats power = exponential(load(scores + j) * scale - lse);
  const Floats product = power * (load(products + j) - delta);
  return {choose(inside, power, Floats{}), choose(inside, product, Floats{})};
}

// Two rows of weights and products: in place as float32, or as pairs for the sums over queries and
// rows for the sum over keys. `count` is 1 where the block's last row stands alone.
template <bool kPairs>
CARILLON_INLINE void weigh_rows(const BackwardBuffers<kPairs>& buffers, int64_t row, int64_t count,
                                const int64_t (&visible)[2], const float* lse, float scale,
                                int64_t columns) {
  float* scores = buffers.scores + row * buffers.score_row;
  float* products = buffers.products + row * buffers.score_row;
  const int64_t next = count == 2 ? buffers.score_row : 0;
  const float second_lse = lse[count - 1];
  const float second_delta = buffers.delta[row + count - 1];
  for (int64_t j = 0; j < columns; j += kWidth) {
    const Weighted a =
        weighted(scores, products, j, visible[0], scale, lse[0], buffers.delta[row]);
    const Weighted b = weighted(scores + next, products + next, j, visible[1], scale, second_lse,
                                second_delta);
    if constexpr (kPairs) {
      const int64_t at = row / 2 * buffers.score_row + j;
      const Halves first = to_halves(a.product);
      const Halves second = to_halves(b.product);
      store(buffers.weights_pairs + at, pair(to_halves(a.weight), to_halves(b.weight)));
      store(buffers.products_pairs + at, pair(first, second));
      auto* to = reinterpret_cast<uint16_t*>(buffers.products_rows) + row * buffers.score_row + j;
      store(to, first);
      store(to + buffers.score_row, second);
    } else {
      store(scores + j, a.weight);
      store(products + j, a.product);
      if (count == 2) {
        store(scores + next + j, b.weight);
        store(products + next + j, b.product);
      }
    }
  }
}

// One query block against one key block; adds to grad_k, grad_v and these rows of grad_q.
template <typename Element, bool kPairs>
void backward_block(const Problem& problem, const Task& task, int64_t head, int64_t query,
                    int64_t num_rows, int64_t first_key, int64_t num_keys,
                    const BackwardBuffers<kPairs>& buffers) {
  const int64_t last = problem.visible(task.sequence, query + num_rows - 1);
  const int64_t seen = std::clamp<int64_t>(last - first_key, 0, num_keys);
  if (seen == 0) return;
  const int64_t token = problem.starts_q[task.sequence] + query;
  const int64_t units = units_of<kPairs>(problem.head_dim);
  const int64_t columns = round_up(seen, kWidth);
  const int64_t padded = round_up(num_keys, kWidth);
  const int64_t width = buffers.width;
  const int64_t score_row = buffers.score_row;
  const int64_t steps = units_of<kPairs>(num_rows);
  const Head<Element> q = head_of<Element>(problem.q, token, head);
  const Head<Element> grad = head_of<Element>(problem.grad_out, token, head);
  const Right queries_steps{buffers.queries_steps, steps, width};
  const Right grads_steps{buffers.grads_steps, steps, width};
  pack_rows<Element, kPairs>(q, num_rows, units, buffers.queries);
  pack_rows<Element, kPairs>(grad, num_rows, units, buffers.grads);
  pack_steps<Element, kPairs>(q, num_rows, problem.head_dim, queries_steps);
  pack_steps<Element, kPairs>(grad, num_rows, problem.head_dim, grads_steps);
  deltas<Element>(problem, head, token, num_rows, buffers.delta);

  multiply<kPairs>({buffers.queries, units, 1}, {buffers.keys_columns, units, padded}, num_rows,
                   units, columns, buffers.scores, score_row, false);
  multiply<kPairs>({buffers.grads, units, 1}, {buffers.values_columns, units, padded}, num_rows,
                   units, columns, buffers.products, score_row, false);
  const float* lse = problem.lse + head * problem.total_q + token;
  for (int64_t i = 0; i < num_rows; i += 2) {
    const int64_t count = std::min<int64_t>(num_rows - i, 2);
    int64_t visible[2] = {0, 0};
    for (int64_t r = 0; r < count; ++r) {
      visible[r] =
          std::clamp<int64_t>(problem.visible(task.sequence, query + i + r) - first_key, 0, seen);
    }
    weigh_rows<kPairs>(buffers, i, count, visible, lse + i, problem.scale, columns);
  }
  const Left weights = kPairs ? Left{buffers.weights_pairs, 1, score_row}
                              : Left{buffers.scores, 1, score_row};
  const Left products = kPairs ? Left{buffers.products_pairs, 1, score_row}
                               : Left{buffers.products, 1, score_row};
  const Left product_rows = kPairs ? Left{buffers.products_rows, score_row / 2, 1}
                                   : Left{buffers.products, score_row, 1};
  multiply<kPairs>(weights, grads_steps, seen, steps, width, buffers.grad_v, width, true);
  multiply<kPairs>(products, queries_steps, seen, steps, width, buffers.grad_k, width, true);
  multiply<kPairs>(product_rows, {buffers.keys_steps, units_of<kPairs>(num_keys), width}, num_rows,
                   units_of<kPairs>(seen), width,
                   buffers.grad_q + (head % problem.group() * task.num_queries + query) * width,
                   width, true);
}

// Packs a key block and clears the sums of its gradients.
template <typename Element, bool kPairs>
void load_keys(const Problem& problem, const Task& task, int64_t token, int64_t count,
               const BackwardBuffers<kPairs>& buffers) {
  const int64_t units = units_of<kPairs>(problem.head_dim);
  const int64_t padded = round_up(count, kWidth);
  const Head<Element> k = head_of<Element>(problem.k, token, task.kv_head);
  const Head<Element> v = head_of<Element>(problem.v, token, task.kv_head);
  pack_transposed<Element, kPairs>(k, count, units, {buffers.keys_columns, units, padded});
  pack_transposed<Element, kPairs>(v, count, units, {buffers.values_columns, units, padded});
  pack_steps<Element, kPairs>(k, count, problem.head_dim,
                              {buffers.keys_steps, units_of<kPairs>(count), buffers.width});
  fill(buffers.grad_k, count * buffers.width, 0.0f);
  fill(buffers.grad_v, count * buffers.width, 0.0f);
}

template <typename Element>
void write_rows(const float* from, int64_t width, float factor, int64_t head_dim, const Rows& to,
                int64_t token, int64_t head, int64_t count) {
  auto* rows = static_cast<Element*>(to.data) + token * to.token_stride + head * to.head_stride;
  for (int64_t i = 0; i < count; ++i) {
    write_row(from + i * width, factor, head_dim, rows + i * to.token_stride);
  }
}

template <typename Element, bool kPairs>
void backward(const Problem& problem, const Task& task, float* buffer) {
  const int64_t s = task.sequence;
  const int64_t num_keys = problem.num_keys(s);
  const int64_t num_queries = task.num_queries;
  const int64_t group = problem.group();
  Scratch scratch(buffer);
  const BackwardBuffers<kPairs> buffers(scratch, problem.head_dim, group * num_queries,
                                        key_block(num_keys, kBackwardKeyBlock));
  fill(buffers.grad_q, group * num_queries * buffers.width, 0.0f);
  for (int64_t first = 0; first < num_keys; first += buffers.max_keys) {
    const int64_t count = std::min(num_keys - first, buffers.max_keys);
    const int64_t token = problem.starts_k[s] + first;
    load_keys<Element, kPairs>(problem, task, token, count, buffers);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t query = 0; query < num_queries; query += kQueryBlock) {
        backward_block<Element, kPairs>(problem, task, task.kv_head * group + g, query,
                                        std::min(num_queries - query, kQueryBlock), first, count,
                                        buffers);
      }
    }
    write_rows<Element>(buffers.grad_k, buffers.width, problem.scale, problem.head_dim,
                        problem.grad_k, token, task.kv_head, count);
    write_rows<Element>(buffers.grad_v, buffers.width, 1.0f, problem.head_dim, problem.grad_v,
                        token, task.kv_head, count);
  }
  for (int64_t g = 0; g < group; ++g) {
    write_rows<Element>(buffers.grad_q + g * num_queries * buffers.width, buffers.width,
                        problem.scale, problem.head_dim, problem.grad_q, problem.starts_q[s],
                        task.kv_head * group + g, num_queries);
  }
}
