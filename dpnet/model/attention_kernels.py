"""The Triton kernels of `attention_triton.py`: 3x3 sums along diagonals, softmax, its gradient.

A *block* is a rectangle of queries with a border of one pixel. Its scores are `pixels x padded`: in
the padded keys one empty key is before each row of keys, so that the neighbours of a pixel are at a
fixed distance, and are 0 outside the maps.

A program walks down one diagonal: with each row of queries it takes the next row of keys. Three
rows of sums stay in registers, so each score is loaded for three of its nine sums only. A *task*
says which diagonal and which tile of columns.

Each program writes elements of its own, and sums over programs are taken later. So no result
depends on the order in which programs run.

Arguments that kernels share:
    products: Pixel products q . k, samples x pixels x padded.
    of_weights: Pixel products of the output's gradient and the values, samples x pixels x padded.
    row: The factor of a query, samples x pixels.
    column, bias: The factor and the offset of a key, samples x keys.
    tasks: A table of int32, tasks x FIELDS. The fields: key row minus query row; first and last
        query row of the walk; first query column and first key column of the tile; width of the
        level of keys; the level's first padded key and its first key; the tile's first partial sum,
        and the number of partial sums of a row of keys.
    pixels, width: Pixels of a block and of one of its rows, with the border.
    padded, keys: Keys of a sample, with and without the empty ones.
    slots: Partial sums of a query.
    rows_used, columns_used: Queries of the block that are inside the map. The others weigh nothing.
    QUERIES, KEYS: Columns of queries and of keys in a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(10)

# Names of whole numbers, for which no further kernels should be compiled.
NUMBERS = ["pixels", "width", "padded", "keys", "slots", "across", "rows_used", "columns_used"]
# Nor for these, which start anywhere in memory: they are parts of a batch.
PARTS = ["row", "column", "bias"]


@triton.jit
def _tile(tasks, right, padded, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return what a program works on.

    That is: first and last row of queries, the columns of queries and of keys, whether they exist,
    the width of the level, and of row 0 of the queries the offset of each column's score, padded
    and not. `right` is the last column of queries. Columns that do not exist repeat the last one.
    """
    task = tasks + tl.program_id(0) * FIELDS
    shift, first, last = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    x = tl.load(task + 3) + tl.arange(0, QUERIES)
    u = tl.load(task + 4) + tl.arange(0, KEYS)
    w = tl.load(task + 5)
    x_in, u_in = x <= right, u < w
    x, u = tl.minimum(x, right), tl.minimum(u, w - 1)
    at = x[:, None] * padded + (tl.load(task + 6) + shift * (w + 1) + u)[None, :]
    key = tl.load(task + 7) + shift * w + u
    slots_of_row = tl.load(task + 9)
    slot = tl.load(task + 8) + shift * slots_of_row
    return first, last, x, x_in, u_in, w, at, key, slot, slots_of_row


@triton.jit
def _along(scores, at, beside, inside, KIND: tl.constexpr):
    """Sum three neighbours along the diagonal, within one row of queries and one of keys."""
    left = tl.load(scores - beside + at, mask=inside, other=0.0).to(KIND)
    here = tl.load(scores + at, mask=inside, other=0.0).to(KIND)
    right = tl.load(scores + beside + at, mask=inside, other=0.0).to(KIND)
    return left + here + right


@triton.jit
def _along_shared(scores, at, beside, inside, divisors, KIND: tl.constexpr):
    """Do the same after dividing the scores of each query by its divisor, if that is not 0."""
    left = tl.load(scores - beside + at, mask=inside, other=0.0).to(KIND)
    here = tl.load(scores + at, mask=inside, other=0.0).to(KIND)
    right = tl.load(scores + beside + at, mask=inside, other=0.0).to(KIND)
    by_left = _inverse(tl.load(divisors - 1, mask=inside, other=0.0))[:, None]
    by_here = _inverse(tl.load(divisors, mask=inside, other=0.0))[:, None]
    by_right = _inverse(tl.load(divisors + 1, mask=inside, other=0.0))[:, None]
    return left * by_left + here * by_here + right * by_right


@triton.jit
def _inverse(x):
    return tl.where(x > 0, 1 / x, 0.0)


@triton.jit
def _exponentials(scores, r, c, b):
    """Return exp(logit). A cosine's logit is at most the sharpness, so no maximum is taken off."""
    return tl.exp(scores * (r[:, None] * c[None, :]) + b[None, :])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS)
def weigh(
    products,
    of_weights,
    row,
    column,
    bias,
    weights,
    sums,
    tasks,
    pixels,
    width,
    padded,
    keys,
    slots,
    rows_used,
    columns_used,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Write the sums over each tile of keys that softmax or its gradient needs.

    Args:
        weights: Without GRADIENT, exp(logit) is written, samples x pixels x padded.
        sums: Written, 1 or 2 x samples x slots x pixels: sums of exp(logit), and with GRADIENT
            those of exp(logit) times the gradient of the weight.
        GRADIENT: Read `of_weights`.
        products, of_weights, row, column, bias, tasks, pixels, width, padded, keys, slots,
        rows_used, columns_used, QUERIES, KEYS: See the module.
    """
    KIND: tl.constexpr = row.dtype.element_ty
    right, bottom = width - 2, pixels // width - 2
    first, last, x, x_in, u_in, w, at, key, slot, slots_of_row = _tile(
        tasks, right, padded, QUERIES, KEYS
    )
    sample = tl.program_id(1)
    down, beside = width * padded + w + 1, padded + 1
    at += sample * pixels * padded
    key += sample * keys
    y, end = tl.maximum(first, 1), tl.minimum(last, bottom)
    above = _along(products + (y - 1) * down, at, beside, y > first, KIND)
    middle = _along(products + y * down, at, beside, y <= last, KIND)
    if GRADIENT:
        above_g = _along(of_weights + (y - 1) * down, at, beside, y > first, KIND)
        middle_g = _along(of_weights + y * down, at, beside, y <= last, KIND)
    while y <= end:
        below = _along(products + (y + 1) * down, at, beside, y < last, KIND)
        r = tl.load(row + sample * pixels + y * width + x)
        c = tl.load(column + key + y * w)
        b = tl.load(bias + key + y * w, mask=u_in, other=float("-inf"))
        used = (x <= columns_used) & (y <= rows_used)
        e = tl.where(used[:, None], _exponentials(above + middle + below, r, c, b), 0.0)
        place = (sample * slots + slot + y * slots_of_row) * pixels + y * width + x
        tl.store(sums + place, tl.sum(e, axis=1), mask=x_in)
        if GRADIENT:
            below_g = _along(of_weights + (y + 1) * down, at, beside, y < last, KIND)
            by_gradient = tl.sum(e * (above_g + middle_g + below_g), axis=1)
            tl.store(sums + tl.num_programs(1) * slots * pixels + place, by_gradient, mask=x_in)
            above_g, middle_g = middle_g, below_g
        else:
            there = weights + y * down + at
            tl.store(there, e.to(weights.dtype.element_ty), mask=x_in[:, None] & u_in[None, :])
        above, middle = middle, below
        y += 1


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS)
def differentiate(
    products,
    of_weights,
    row,
    column,
    bias,
    totals,
    weights,
    of_scores,
    of_rows,
    of_columns,
    tasks,
    pixels,
    width,
    padded,
    keys,
    slots,
    across,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write the softmax weights and the gradients of scores, and partial sums for row and column.

    Args:
        totals: What `weigh` wrote with GRADIENT, summed over the slots, 2 x samples x pixels. It is
            0 for queries outside the map, and so are their weights.
        weights: Written, samples x pixels x padded.
        of_scores: Written, samples x pixels x padded.
        of_rows: Written, samples x slots x pixels.
        of_columns: Written, samples x (rows of queries x across) x keys.
        across: Tiles in a row of queries.
        products, of_weights, row, column, bias, tasks, pixels, width, padded, keys, slots, QUERIES,
        KEYS: See the module.
    """
    KIND: tl.constexpr = row.dtype.element_ty
    right, bottom = width - 2, pixels // width - 2
    first, last, x, x_in, u_in, w, at, key, slot, slots_of_row = _tile(
        tasks, right, padded, QUERIES, KEYS
    )
    sample = tl.program_id(1)
    down, beside = width * padded + w + 1, padded + 1
    at += sample * pixels * padded
    both_in = x_in[:, None] & u_in[None, :]
    tile = (tl.min(x, axis=0) - 1) // QUERIES
    y, end = tl.maximum(first, 1), tl.minimum(last, bottom)
    above = _along(products + (y - 1) * down, at, beside, y > first, KIND)
    middle = _along(products + y * down, at, beside, y <= last, KIND)
    above_g = _along(of_weights + (y - 1) * down, at, beside, y > first, KIND)
    middle_g = _along(of_weights + y * down, at, beside, y <= last, KIND)
    while y <= end:
        below = _along(products + (y + 1) * down, at, beside, y < last, KIND)
        below_g = _along(of_weights + (y + 1) * down, at, beside, y < last, KIND)
        scores = above + middle + below
        query = sample * pixels + y * width + x
        r = tl.load(row + query)
        c = tl.load(column + sample * keys + key + y * w)
        b = tl.load(bias + sample * keys + key + y * w, mask=u_in, other=float("-inf"))
        inverse = _inverse(tl.load(totals + query))
        mean = tl.load(totals + tl.num_programs(1) * pixels + query) * inverse
        weight = _exponentials(scores, r, c, b) * inverse[:, None]
        tl.store(weights + y * down + at, weight.to(weights.dtype.element_ty), mask=both_in)
        of_logits = weight * (above_g + middle_g + below_g - mean[:, None])
        by_score = of_logits * (r[:, None] * c[None, :])
        tl.store(of_scores + y * down + at, by_score.to(of_scores.dtype.element_ty), mask=both_in)
        by_factor = of_logits * scores
        place = (sample * slots + slot + y * slots_of_row) * pixels + y * width + x
        tl.store(of_rows + place, tl.sum(by_factor * c[None, :], axis=1), mask=x_in)
        by_row = tl.where(x_in[:, None], by_factor * r[:, None], 0.0)
        place = ((sample * bottom + y - 1) * across + tile) * keys + key + y * w
        tl.store(of_columns + place, tl.sum(by_row, axis=0), mask=u_in)
        above, middle = middle, below
        above_g, middle_g = middle_g, below_g
        y += 1


@triton.jit(do_not_specialize=NUMBERS)
def spread(
    patches,
    totals,
    scores,
    tasks,
    pixels,
    width,
    padded,
    keys,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Sum along the diagonals what pairs of patches weigh: the weights of pairs of pixels.

    Args:
        patches: Samples x pixels x padded, 0 on the border and on empty keys.
        totals: With SHARED, the divisor of each query, samples x pixels.
        scores: Written, samples x pixels x keys, without empty keys.
        SHARED: Divide the patches by `totals`.
        tasks, pixels, width, padded, keys, QUERIES, KEYS: See the module.
    """
    KIND: tl.constexpr = totals.dtype.element_ty
    first, last, x, x_in, u_in, w, at, key, _, _ = _tile(tasks, width - 1, padded, QUERIES, KEYS)
    sample = tl.program_id(1)
    down, beside = width * padded + w + 1, padded + 1
    at += sample * pixels * padded
    to = (sample * pixels + x)[:, None] * keys + key[None, :]
    divisors = totals + sample * pixels + x
    low, high = tl.maximum(first, 1), tl.minimum(last, pixels // width - 2)
    above = tl.zeros([QUERIES, KEYS], KIND)
    inside = (first >= low) & (first <= high)
    if SHARED:
        here = divisors + first * width
        middle = _along_shared(patches + first * down, at, beside, inside, here, KIND)
    else:
        middle = _along(patches + first * down, at, beside, inside, KIND)
    y = first
    while y <= last:
        inside = (y + 1 >= low) & (y + 1 <= high)
        if SHARED:
            there = divisors + (y + 1) * width
            below = _along_shared(patches + (y + 1) * down, at, beside, inside, there, KIND)
        else:
            below = _along(patches + (y + 1) * down, at, beside, inside, KIND)
        found = (above + middle + below).to(scores.dtype.element_ty)
        tl.store(scores + y * (width * keys + w) + to, found, mask=x_in[:, None] & u_in[None, :])
        above, middle = middle, below
        y += 1
