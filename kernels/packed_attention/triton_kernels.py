"""The Triton kernels of packed_attention; triton_impl.py launches them.

Every mask lets a query see a prefix of its sequence's keys (`_visible`), which never shrinks from
one query to the next: so a block of queries first meets keys that all of them see, without a mask,
then a few blocks with one. Softmax is in base 2. Tokens past a sequence's end are read as zeros and
not written. Products take the inputs' dtype, sums are float32.
Status: compiled for sm_90 and run in Triton's interpreter; not run on a GPU yet.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _span(starts, s, num_sequences, total, longest):
    """Begin and length of a sequence, kept inside the tensor, and whether they were given right."""
    given_begin = tl.load(starts + s).to(tl.int64)
    given_end = tl.load(starts + s + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(given_begin, 0), total)
    end = tl.minimum(tl.maximum(given_end, begin), total)
    length = tl.minimum(end - begin, longest).to(tl.int32)
    right = (begin == given_begin) & (given_end - given_begin == length)
    right = right & ((s > 0) | (given_begin == 0))
    right = right & ((s < num_sequences - 1) | (given_end == total))
    return begin, length, right


@triton.jit
def _sequence(
    cu_q, cu_k, prefixes, s, num_sequences, total_q, total_k, max_q, max_k, PREFIX: tl.constexpr
):
    """Begins and lengths of queries and keys, the prefix, and a term that is NaN for wrong ones."""
    begin_q, len_q, right_q = _span(cu_q, s, num_sequences, total_q, max_q)
    begin_k, len_k, right_k = _span(cu_k, s, num_sequences, total_k, max_k)
    right = right_q & right_k
    prefix = 0
    if PREFIX:
        given = tl.load(prefixes + s).to(tl.int64)
        right = right & (given >= 0) & (given <= len_k)
        prefix = tl.minimum(tl.maximum(given, 0), len_k).to(tl.int32)
    poison = tl.where(right, 0.0, float("nan"))
    return begin_q, len_q, begin_k, len_k, prefix, poison


@triton.jit
def _visible(query, len_q, len_k, prefix, CAUSAL: tl.constexpr):
    """How many keys, counted from the first, a query sees."""
    if CAUSAL:
        return tl.minimum(tl.maximum(query + (len_k - len_q + 1), prefix), len_k)
    return query * 0 + len_k


@triton.jit
def _load_rows(
    base, token, token_stride, rows, count, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] from `token` on; strides are in units of 8 elements, so loads are wide."""
    dims = tl.arange(0, BLOCK_D)
    at = base + (token + rows)[:, None] * (token_stride * 8) + dims[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        return tl.load(at, mask=(rows[:, None] < count) & (dims[None, :] < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(at, mask=rows[:, None] < count, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(at, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tl.load(at)


@triton.jit
def _dot_rows(
    a, a_begin, a_token, a_rows, a_count, b, b_begin, b_token, b_rows, b_count,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every row of a times every row of b, CHUNK values at a time: whole rows, with both parts that
    tf32x3 keeps of each value, would not fit in registers. The loop reads them again from cache."""
    products = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for first in range(0, HEAD_DIM, CHUNK):
        dims = first + tl.arange(0, CHUNK)
        inside = dims[None, :] < HEAD_DIM
        a_at = a + (a_begin + a_rows)[:, None] * (a_token * 8) + dims[None, :]
        b_at = b + (b_begin + b_rows)[:, None] * (b_token * 8) + dims[None, :]
        a_RC = tl.load(a_at, mask=(a_rows[:, None] < a_count) & inside, other=0.0)
        b_RC = tl.load(b_at, mask=(b_rows[:, None] < b_count) & inside, other=0.0)
        products = tl.dot(a_RC, tl.trans(b_RC), products, input_precision=PRECISION)
    return products


@triton.jit
def _store_rows(
    base, token, token_stride, rows, count, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    at = base + (token + rows)[:, None] * (token_stride * 8) + dims[None, :]
    inside = (rows[:, None] < count) & (dims[None, :] < HEAD_DIM)
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward_keys(
    acc, top, total, q_QD, q, begin_q, q_token, rows, len_q, k, v, begin_k, len_k, k_token, v_token,
    visible, first, last, scale_log2,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key blocks [first, last) of the online softmax: sums, maxima, and out before division."""
    for start in range(first, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        if CHUNK == BLOCK_D:
            k_KD = _load_rows(k, begin_k, k_token, keys, len_k, MASKED, HEAD_DIM, BLOCK_D)
            s_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision=PRECISION) * scale_log2
        else:
            s_QK = scale_log2 * _dot_rows(
                q, begin_q, q_token, rows, len_q, k, begin_k, k_token, keys, len_k,
                HEAD_DIM, CHUNK, PRECISION,
            )  # fmt: skip
        if MASKED:
            s_QK = tl.where(keys[None, :] < visible[:, None], s_QK, float("-inf"))
        new_top = tl.maximum(top, tl.max(s_QK, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p_QK = tl.exp2(s_QK - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p_QK, 1)
        v_KD = _load_rows(v, begin_k, v_token, keys, len_k, MASKED, HEAD_DIM, BLOCK_D)
        acc = acc * shrink[:, None]
        acc = tl.dot(p_QK.to(v_KD.dtype), v_KD, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def forward(
    q, k, v, out, lse, cu_q, cu_k, prefixes,
    num_sequences, total_q, total_k, max_q, max_k, num_heads, num_kv_heads,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, scale_log2,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (query blocks of each sequence, heads)."""
    blocks = tl.cdiv(max_q, BLOCK_Q)
    s = tl.program_id(0) // blocks
    head = tl.program_id(1)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    begin_q, len_q, begin_k, len_k, prefix, poison = _sequence(
        cu_q, cu_k, prefixes, s, num_sequences, total_q, total_k, max_q, max_k, PREFIX
    )
    if first_row >= len_q:
        return
    kv_head = head // (num_heads // num_kv_heads)
    k += kv_head.to(tl.int64) * (k_head * 8)
    v += kv_head.to(tl.int64) * (v_head * 8)
    rows = first_row + tl.arange(0, BLOCK_Q)
    q += head.to(tl.int64) * (q_head * 8)
    q_QD = rows
    if CHUNK == BLOCK_D:
        q_QD = _load_rows(q, begin_q, q_token, rows, len_q, True, HEAD_DIM, BLOCK_D)
    visible = _visible(rows, len_q, len_k, prefix, CAUSAL)
    seen_by_all = _visible(first_row, len_q, len_k, prefix, CAUSAL) // BLOCK_K * BLOCK_K
    seen_by_all = tl.maximum(seen_by_all, 0)
    seen_by_any = _visible(tl.minimum(first_row + BLOCK_Q, len_q) - 1, len_q, len_k, prefix, CAUSAL)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc, top, total = _forward_keys(
        acc, top, total, q_QD, q, begin_q, q_token, rows, len_q, k, v, begin_k, len_k, k_token,
        v_token, visible, 0, seen_by_all, scale_log2,
        False, HEAD_DIM, BLOCK_D, BLOCK_K, CHUNK, PRECISION,
    )  # fmt: skip
    acc, top, total = _forward_keys(
        acc, top, total, q_QD, q, begin_q, q_token, rows, len_q, k, v, begin_k, len_k, k_token,
        v_token, visible, seen_by_all, seen_by_any, scale_log2,
        True, HEAD_DIM, BLOCK_D, BLOCK_K, CHUNK, PRECISION,
    )  # fmt: skip
    seen = total != 0
    divisor = tl.where(seen, total, 1.0)
    acc = acc / divisor[:, None] + poison
    row_lse = tl.where(seen, (top + tl.log2(divisor)) * _LN_2, float("-inf")) + poison
    tl.store(lse + head.to(tl.int64) * total_q + begin_q + rows, row_lse, mask=rows < len_q)
    out += head.to(tl.int64) * HEAD_DIM
    _store_rows(out, begin_q, num_heads * (HEAD_DIM // 8), rows, len_q, acc, HEAD_DIM, BLOCK_D)


@triton.jit
def _dq_keys(
    dq, q_QD, grad_QD, lse_log2, delta, q, grad_out, begin_q, q_token, dense, rows, len_q,
    k, v, begin_k, len_k, k_token, v_token, visible, first, last, scale_log2,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_KD = _load_rows(k, begin_k, k_token, keys, len_k, MASKED, HEAD_DIM, BLOCK_D)
        if CHUNK == BLOCK_D:
            v_KD = _load_rows(v, begin_k, v_token, keys, len_k, MASKED, HEAD_DIM, BLOCK_D)
            s_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision=PRECISION) * scale_log2
        else:
            s_QK = scale_log2 * _dot_rows(
                q, begin_q, q_token, rows, len_q, k, begin_k, k_token, keys, len_k,
                HEAD_DIM, CHUNK, PRECISION,
            )  # fmt: skip
        p_QK = tl.exp2(s_QK - lse_log2[:, None])
        if MASKED:
            p_QK = tl.where(keys[None, :] < visible[:, None], p_QK, 0.0)
        if CHUNK == BLOCK_D:
            dp_QK = tl.dot(grad_QD, tl.trans(v_KD), input_precision=PRECISION)
        else:
            dp_QK = _dot_rows(
                grad_out, begin_q, dense, rows, len_q, v, begin_k, v_token, keys, len_k,
                HEAD_DIM, CHUNK, PRECISION,
            )  # fmt: skip
        ds_QK = p_QK * (dp_QK - delta[:, None])
        dq = tl.dot(ds_QK.to(k_KD.dtype), k_KD, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_queries(
    q, k, v, out, lse, grad_out, grad_lse, delta, dq, cu_q, cu_k, prefixes,
    num_sequences, total_q, total_k, max_q, max_k, num_heads, num_kv_heads,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, scale_log2,
    HAS_GRAD_LSE: tl.constexpr,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dO * out) - dlse for backward_keys. Programs as in forward."""
    blocks = tl.cdiv(max_q, BLOCK_Q)
    s = tl.program_id(0) // blocks
    head = tl.program_id(1)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    begin_q, len_q, begin_k, len_k, prefix, poison = _sequence(
        cu_q, cu_k, prefixes, s, num_sequences, total_q, total_k, max_q, max_k, PREFIX
    )
    if first_row >= len_q:
        return
    rows = first_row + tl.arange(0, BLOCK_Q)
    dense = num_heads * (HEAD_DIM // 8)
    q += head.to(tl.int64) * (q_head * 8)
    q_QD = rows
    if CHUNK == BLOCK_D:
        q_QD = _load_rows(q, begin_q, q_token, rows, len_q, True, HEAD_DIM, BLOCK_D)
    out += head.to(tl.int64) * HEAD_DIM
    grad_out += head.to(tl.int64) * HEAD_DIM
    out_QD = _load_rows(out, begin_q, dense, rows, len_q, True, HEAD_DIM, BLOCK_D)
    grad_QD = _load_rows(grad_out, begin_q, dense, rows, len_q, True, HEAD_DIM, BLOCK_D)
    at = head.to(tl.int64) * total_q + begin_q + rows
    row_delta = tl.sum(out_QD.to(tl.float32) * grad_QD.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + at, mask=rows < len_q, other=0.0)
    tl.store(delta + at, row_delta, mask=rows < len_q)
    lse_log2 = tl.load(lse + at, mask=rows < len_q, other=0.0) / _LN_2
    lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)

    kv_head = head // (num_heads // num_kv_heads)
    k += kv_head.to(tl.int64) * (k_head * 8)
    v += kv_head.to(tl.int64) * (v_head * 8)
    visible = _visible(rows, len_q, len_k, prefix, CAUSAL)
    seen_by_all = _visible(first_row, len_q, len_k, prefix, CAUSAL) // BLOCK_K * BLOCK_K
    seen_by_all = tl.maximum(seen_by_all, 0)
    seen_by_any = _visible(tl.minimum(first_row + BLOCK_Q, len_q) - 1, len_q, len_k, prefix, CAUSAL)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc = _dq_keys(
        acc, q_QD, grad_QD, lse_log2, row_delta, q, grad_out, begin_q, q_token, dense, rows, len_q,
        k, v, begin_k, len_k, k_token, v_token, visible, 0, seen_by_all, scale_log2,
        False, HEAD_DIM, BLOCK_D, BLOCK_K, CHUNK, PRECISION,
    )  # fmt: skip
    acc = _dq_keys(
        acc, q_QD, grad_QD, lse_log2, row_delta, q, grad_out, begin_q, q_token, dense, rows, len_q,
        k, v, begin_k, len_k, k_token, v_token, visible, seen_by_all, seen_by_any, scale_log2,
        True, HEAD_DIM, BLOCK_D, BLOCK_K, CHUNK, PRECISION,
    )  # fmt: skip
    dq += head.to(tl.int64) * HEAD_DIM
    _store_rows(dq, begin_q, dense, rows, len_q, acc * scale + poison, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkv_queries(
    dk, dv, k_KD, v_KD, k, v, begin_k, k_token, v_token, keys, q, grad_out, lse, delta, begin_q,
    len_q, len_k, prefix, q_token, dense, first_row, scale_log2,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query blocks from first_row on."""
    for start in range(first_row, len_q, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q_QD = _load_rows(q, begin_q, q_token, rows, len_q, True, HEAD_DIM, BLOCK_D)
        grad_QD = _load_rows(grad_out, begin_q, dense, rows, len_q, True, HEAD_DIM, BLOCK_D)
        lse_log2 = tl.load(lse + begin_q + rows, mask=rows < len_q, other=0.0) / _LN_2
        lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)
        row_delta = tl.load(delta + begin_q + rows, mask=rows < len_q, other=0.0)
        if CHUNK == BLOCK_D:
            s_KQ = tl.dot(k_KD, tl.trans(q_QD), input_precision=PRECISION) * scale_log2
        else:
            s_KQ = scale_log2 * _dot_rows(
                k, begin_k, k_token, keys, len_k, q, begin_q, q_token, rows, len_q,
                HEAD_DIM, CHUNK, PRECISION,
            )  # fmt: skip
        p_KQ = tl.exp2(s_KQ - lse_log2[None, :])
        if CAUSAL:
            visible = _visible(rows, len_q, len_k, prefix, CAUSAL)
            p_KQ = tl.where(keys[:, None] < visible[None, :], p_KQ, 0.0)
        dv = tl.dot(p_KQ.to(grad_QD.dtype), grad_QD, dv, input_precision=PRECISION)
        if CHUNK == BLOCK_D:
            dp_KQ = tl.dot(v_KD, tl.trans(grad_QD), input_precision=PRECISION)
        else:
            dp_KQ = _dot_rows(
                v, begin_k, v_token, keys, len_k, grad_out, begin_q, dense, rows, len_q,
                HEAD_DIM, CHUNK, PRECISION,
            )  # fmt: skip
        ds_KQ = p_KQ * (dp_KQ - row_delta[None, :])
        dk = tl.dot(ds_KQ.to(q_QD.dtype), q_QD, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, lse, grad_out, delta, dk, dv, cu_q, cu_k, prefixes,
    num_sequences, total_q, total_k, max_q, max_k, num_heads, num_kv_heads,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, scale_log2,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, over all query heads that read a key head. Programs: (key blocks of each sequence,
    key heads). Scores are transposed, so that the weights are a left operand in registers."""
    blocks = tl.cdiv(max_k, BLOCK_K)
    s = tl.program_id(0) // blocks
    kv_head = tl.program_id(1)
    first_key = (tl.program_id(0) % blocks) * BLOCK_K
    begin_q, len_q, begin_k, len_k, prefix, poison = _sequence(
        cu_q, cu_k, prefixes, s, num_sequences, total_q, total_k, max_q, max_k, PREFIX
    )
    if first_key >= len_k:
        return
    keys = first_key + tl.arange(0, BLOCK_K)
    k += kv_head.to(tl.int64) * (k_head * 8)
    v += kv_head.to(tl.int64) * (v_head * 8)
    k_KD = keys
    v_KD = keys
    if CHUNK == BLOCK_D:
        k_KD = _load_rows(k, begin_k, k_token, keys, len_k, True, HEAD_DIM, BLOCK_D)
        v_KD = _load_rows(v, begin_k, v_token, keys, len_k, True, HEAD_DIM, BLOCK_D)
    first_row = 0  # queries before it see none of these keys
    if CAUSAL:
        first_row = tl.maximum(first_key - (len_k - len_q), 0) // BLOCK_Q * BLOCK_Q
        if PREFIX:
            first_row = tl.where(prefix > first_key, 0, first_row)
    dense = num_heads * (HEAD_DIM // 8)
    dk_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    group = num_heads // num_kv_heads
    for g in range(0, group):
        head = (kv_head * group + g).to(tl.int64)
        q_of = q + head * (q_head * 8)
        grad_of = grad_out + head * HEAD_DIM
        lse_of = lse + head * total_q
        delta_of = delta + head * total_q
        dk_KD, dv_KD = _dkv_queries(
            dk_KD, dv_KD, k_KD, v_KD, k, v, begin_k, k_token, v_token, keys, q_of, grad_of, lse_of,
            delta_of, begin_q, len_q, len_k, prefix, q_token, dense, first_row, scale_log2,
            CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_Q, CHUNK, PRECISION,
        )  # fmt: skip
    dense_k = num_kv_heads * (HEAD_DIM // 8)
    dk += kv_head.to(tl.int64) * HEAD_DIM
    dv += kv_head.to(tl.int64) * HEAD_DIM
    _store_rows(dk, begin_k, dense_k, keys, len_k, dk_KD * scale + poison, HEAD_DIM, BLOCK_D)
    _store_rows(dv, begin_k, dense_k, keys, len_k, dv_KD + poison, HEAD_DIM, BLOCK_D)
