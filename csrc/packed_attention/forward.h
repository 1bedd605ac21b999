// The forward pass of one task. Included once per instruction set.
//
// A key block is packed once for all queries of the task. Scores of a query block against it are a
// small product in L2; each row's softmax follows, then the product with the values. Where the keys
// need more than one block, running maxima and sums rescale what was summed before (Dao 2023,
// algorithm 1).

// Rows of a query block between key blocks: maximum and sum so far, and out before the division.
struct Running {
  float* maximum;
  float* sum;
  float* out;
};

template <typename Element>
CARILLON_INLINE Head<Element> head_of(const Rows& rows, int64_t token, int64_t head) {
  return {static_cast<const Element*>(rows.data) + token * rows.token_stride +
              head * rows.head_stride,
          rows.token_stride, rows.head_stride};
}

// Turns a row of scores into weights e^(scale * s - maximum), zeros from `visible` on up to
// `columns`. Returns the factor by which earlier sums and outs shrink.
template <bool kPairs>
CARILLON_INLINE float softmax_row(float* scores, int64_t visible, int64_t columns, float scale,
                                  float& maximum, float& total, float* weights) {
  const Floats factor = broadcast(scale);
  const Floats lowest = broadcast(-INFINITY);
  const Ints index = lanes();
  Floats top = lowest;
  for (int64_t j = 0; j < visible; j += kWidth) {
    const Floats score = load(scores + j) * factor;
    top = larger(choose(index < int32_t(visible - j), score, lowest), top);
  }
  const float before = maximum;
  maximum = std::max(before, largest(top));
  if (visible == 0) maximum = before;
  const Floats shift = broadcast(maximum == -INFINITY ? 0.0f : maximum);
  Floats sums{};
  for (int64_t j = 0; j < columns; j += kWidth) {
    Floats weight{};
    if (j < visible) {
      const Floats power = exponential(load(scores + j) * factor - shift);
      weight = choose(index < int32_t(visible - j), power, Floats{});
    }
    sums = sums + weight;
    if constexpr (kPairs) {
      store(reinterpret_cast<uint16_t*>(weights) + j, weight);
    } else {
      store(scores + j, weight);
    }
  }
  const float shrink = before == maximum ? 1.0f : std::exp(before - maximum);
  total = total * shrink + sum(sums);
  return shrink;
}

template <typename Element, bool kPairs>
void finish_rows(const Problem& problem, const Running& running, int64_t head, int64_t first_row,
                 int64_t num_rows, int64_t out_row) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t token = first_row + i;
    const float total = running.sum[i];
    auto* out = static_cast<Element*>(problem.out.data) + token * problem.out.token_stride +
                head * problem.out.head_stride;
    write_row(running.out + i * out_row, total == 0 ? 0.0f : 1.0f / total, problem.head_dim, out);
    problem.lse[head * problem.total_q + token] =
        total == 0 ? -INFINITY : running.maximum[i] + std::log(total);
  }
}

template <bool kPairs>
struct ForwardBuffers {
  int64_t out_row, score_row, max_keys;
  float *keys, *values, *queries, *scores, *weights, *maximum, *sum, *out;

  ForwardBuffers(Scratch& scratch, int64_t head_dim, int64_t block_keys, int64_t num_rows) {
    out_row = round_up(head_dim, kWidth);
    max_keys = block_keys;
    score_row = max_keys + 16;  // not a power of two, whose rows would share cache sets
    keys = scratch.take(units_of<kPairs>(head_dim) * max_keys);
    values = scratch.take(units_of<kPairs>(max_keys) * out_row);
    queries = scratch.take(kQueryBlock * units_of<kPairs>(head_dim));
    scores = scratch.take(kQueryBlock * score_row);
    weights = scratch.take(kPairs ? kQueryBlock * score_row / 2 : 0);
    maximum = scratch.take(num_rows);
    sum = scratch.take(num_rows);
    out = scratch.take(num_rows * out_row);
  }
};

// Floats that any task needs, of either element type.
inline int64_t forward_scratch(int64_t head_dim, int64_t max_keys) {
  const int64_t block = largest_key_block(max_keys, kForwardKeyBlock);
  Scratch floats(nullptr), pairs(nullptr);
  ForwardBuffers<false>(floats, head_dim, block, kForwardSpan);
  ForwardBuffers<CARILLON_PAIRS>(pairs, head_dim, block, kForwardSpan);
  return std::max(floats.used(), pairs.used());
}

// One query block against one key block whose packed keys and values are in `buffers`.
template <typename Element, bool kPairs>
void forward_block(const Problem& problem, const Task& task, int64_t head, int64_t row,
                   int64_t num_rows, int64_t first_key, int64_t num_keys,
                   const ForwardBuffers<kPairs>& buffers, const Running& running) {
  const int64_t query = task.first_query + row;
  const int64_t last = problem.visible(task.sequence, query + num_rows - 1);
  const int64_t seen = std::clamp<int64_t>(last - first_key, 0, num_keys);
  if (seen == 0) return;
  const int64_t units = units_of<kPairs>(problem.head_dim);
  const int64_t columns = round_up(seen, kWidth);
  const int64_t padded = round_up(num_keys, kWidth);
  const int64_t token = problem.starts_q[task.sequence] + query;
  pack_rows<Element, kPairs>(head_of<Element>(problem.q, token, head), num_rows, units,
                             buffers.queries);
  multiply<kPairs>({buffers.queries, units, 1}, {buffers.keys, units, padded}, num_rows, units,
                   columns, buffers.scores, buffers.score_row, false);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t visible =
        std::clamp<int64_t>(problem.visible(task.sequence, query + i) - first_key, 0, seen);
    const float shrink = softmax_row<kPairs>(
        buffers.scores + i * buffers.score_row, visible, columns, problem.scale,
        running.maximum[row + i], running.sum[row + i], buffers.weights + i * buffers.score_row / 2);
    if (first_key > 0 && shrink != 1.0f) {
      float* out = running.out + (row + i) * buffers.out_row;
      for (int64_t d = 0; d < buffers.out_row; ++d) out[d] *= shrink;
    }
  }
  const Left weights = kPairs ? Left{buffers.weights, buffers.score_row / 2, 1}
                              : Left{buffers.scores, buffers.score_row, 1};
  multiply<kPairs>(weights, {buffers.values, units_of<kPairs>(num_keys), buffers.out_row},
                   num_rows, units_of<kPairs>(seen), buffers.out_row,
                   running.out + row * buffers.out_row, buffers.out_row, first_key > 0);
}

template <typename Element, bool kPairs>
void forward(const Problem& problem, const Task& task, float* buffer) {
  const int64_t num_keys = problem.num_keys(task.sequence);
  const int64_t num_rows = task.num_queries;
  Scratch scratch(buffer);
  const ForwardBuffers<kPairs> buffers(scratch, problem.head_dim,
                                       key_block(num_keys, kForwardKeyBlock), num_rows);
  const int64_t units = units_of<kPairs>(problem.head_dim);
  const Running running{buffers.maximum, buffers.sum, buffers.out};
  const bool one_block = num_keys <= buffers.max_keys;
  for (int64_t g = 0; g < problem.group(); ++g) {
    const int64_t head = task.kv_head * problem.group() + g;
    fill(running.maximum, num_rows, -INFINITY);
    fill(running.sum, num_rows, 0.0f);
    fill(running.out, num_rows * buffers.out_row, 0.0f);
    for (int64_t first = 0; first < num_keys; first += buffers.max_keys) {
      const int64_t count = std::min(num_keys - first, buffers.max_keys);
      if (g == 0 || !one_block) {
        const int64_t token = problem.starts_k[task.sequence] + first;
        pack_transposed<Element, kPairs>(head_of<Element>(problem.k, token, task.kv_head), count,
                                         units, {buffers.keys, units, round_up(count, kWidth)});
        pack_steps<Element, kPairs>(head_of<Element>(problem.v, token, task.kv_head), count,
                                    problem.head_dim,
                                    {buffers.values, units_of<kPairs>(count), buffers.out_row});
      }
      for (int64_t row = 0; row < num_rows; row += kQueryBlock) {
        forward_block<Element, kPairs>(problem, task, head, row,
                                       std::min(num_rows - row, kQueryBlock), first, count,
                                       buffers, running);
      }
    }
    finish_rows<Element, kPairs>(problem, running, head,
                                 problem.starts_q[task.sequence] + task.first_query, num_rows,
                                 buffers.out_row);
  }
}
