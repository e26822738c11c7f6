"""The Triton kernel of tree attention: rows of trees attend to pages of keys and values, each to its own ancestors.

It owns the kernel, the tables it reads, and its launch; the pages belong to ``tree_pages``. Importing it needs
Triton, which comes with PyTorch for GPUs. Flash attention's way: one program per *tile* (rows of one view) and head of
keys, pages one after the other, softmax on the go in float32.
"""

import torch
import triton
import triton.language as tl

PAGE = 64  # slots of a page
TILE_FIELDS = 5  # of the tables below
ROW_FIELDS = 6

# A tile: first entry of the row table, number of entries (0: nothing to do), first entry of the page table, slots below
# which no row needs a mask, end of the slots that any row attends to.
# An entry of the row table: row of the pass, slots of the prompt it attends to, first slot of its chain, its own slot,
# place of slot 0 in its chain's stretch of the mask of ancestors, end of the ancestors' slots.


def tile_rows(most, group, dtype):
    """Return the rows per tile where the fullest view has ``most`` rows and ``group`` query heads share one of keys.

    A tile has 16 queries (rows times heads) or, of larger views, as many as fit into a GPU's registers: 64, in float32,
    which has no tensor cores, 32.
    """
    padded = triton.next_power_of_2(group)
    large = 32 if dtype == torch.float32 else 64
    return max(1, (16 if most * padded <= 16 else large) // padded)


@triton.jit
def _read(pointers, inside, columns, end, WHOLE: tl.constexpr):
    if WHOLE:
        block = tl.load(pointers, mask=inside, other=0.0)
    else:  # what lies behind the end may belong to nobody: it must not reach the sums, not even times zero
        block = tl.load(pointers, mask=inside & (columns < end)[:, None], other=0.0)
    return block


@triton.jit
def _softmax_step(scores, value, summed, total, top):
    """Take a block's scores (M, PAGE), in units of log 2, and values (PAGE, D) into the running softmax."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    weights = tl.math.exp2(scores - base[:, None])
    shrink = tl.math.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    summed = summed * shrink[:, None]
    summed += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return summed, total, new_top


@triton.jit(do_not_specialize=["query_head", "query_row"])
def _tree_kernel(  # noqa: PLR0913
    query, keys, values, output, tiles, rows, pages, mask, scale, query_head, query_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    M: tl.constexpr, SLOTS: tl.constexpr, TILE_SIZE: tl.constexpr, ROW_SIZE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * TILE_SIZE
    first, count, page_table = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if count == 0:  # only fills up a table of fixed size
        return
    shared, end = tl.load(tile + 3).to(tl.int32), tl.load(tile + 4).to(tl.int32)

    place = tl.arange(0, M)
    member = place % GROUP_PADDED
    live = (place // GROUP_PADDED < count) & (member < GROUP)
    entry = rows + (first + place // GROUP_PADDED) * ROW_SIZE
    row = tl.load(entry, mask=live, other=0)
    visible = tl.load(entry + 1, mask=live, other=0).to(tl.int32)
    start = tl.load(entry + 2, mask=live, other=0).to(tl.int32)
    own = tl.load(entry + 3, mask=live, other=-1).to(tl.int32)
    ancestors = mask + tl.load(entry + 4, mask=live, other=0)
    ancestors_end = tl.load(entry + 5, mask=live, other=0).to(tl.int32)

    dims, slots = tl.arange(0, DIM_PADDED), tl.arange(0, SLOTS)
    query_heads = head * GROUP + member
    held = live[:, None] & (dims < DIM)[None, :]
    start_of = query + query_heads.to(tl.int64) * query_head + row * query_row
    queries = tl.load(start_of[:, None] + dims[None, :], mask=held, other=0.0)
    inside = (slots >= 0)[:, None] & (dims < DIM)[None, :]
    steps = slots[:, None] * (HEADS * DIM) + head * DIM + dims[None, :]  # (SLOTS, DIM_PADDED) within a page

    summed = tl.zeros((M, DIM_PADDED), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    for block in range(0, shared // SLOTS):
        page = tl.load(pages + page_table + block) * (SLOTS * HEADS * DIM)
        key = _read(keys + page + steps, inside, slots, end, True)
        value = _read(values + page + steps, inside, slots, end, True)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        summed, total, top = _softmax_step(scores, value, summed, total, top)
    for block in range(shared // SLOTS, (end + SLOTS - 1) // SLOTS):
        page = tl.load(pages + page_table + block) * (SLOTS * HEADS * DIM)
        columns = block * SLOTS + slots
        key = _read(keys + page + steps, inside, columns, end, False)
        value = _read(values + page + steps, inside, columns, end, False)
        in_tree = (columns[None, :] >= visible[:, None]) & (columns[None, :] < ancestors_end[:, None])
        allowed = tl.load(ancestors[:, None] + columns[None, :], mask=in_tree, other=0) != 0
        allowed = allowed | (columns[None, :] < visible[:, None])
        allowed = allowed | ((columns[None, :] >= start[:, None]) & (columns[None, :] <= own[:, None]))
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(allowed, scores, float("-inf"))
        summed, total, top = _softmax_step(scores, value, summed, total, top)
    result = summed / tl.where(total == 0, 1.0, total)[:, None]
    start_of = output + (row * (HEADS * GROUP) + query_heads) * DIM
    tl.store(start_of[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=held)


def attend(query, keys, values, output, tables, per_tile, scaling):  # noqa: PLR0913
    """Let the rows of the tables attend; fill their rows of ``output`` and no others.

    Args:
        query: (1, Hq, N, D), D laid out without gaps. output: (1, N, Hq, D) without gaps.
        keys, values: (slots, Hkv, D) without gaps.
        tables: tuple of int64 tiles (tiles, 5), rows (entries, 6), pages (any,), and uint8 mask (any,), see above.
        per_tile: most rows of a tile, from ``tile_rows``.
        scaling: factor on the products of queries and keys.
    """
    heads, dim = keys.shape[1:]
    group = query.shape[1] // heads
    padded = triton.next_power_of_2(group)
    tiles, rows, pages, mask = tables
    size, dim_padded = max(16, per_tile * padded), max(16, triton.next_power_of_2(dim))
    exact = query.dtype == torch.float32  # multiplies without tensor cores
    _tree_kernel[(len(tiles), heads)](
        query, keys, values, output, tiles, rows, pages, mask, scaling * 1.4426950408889634,
        query.stride(1), query.stride(2),
        HEADS=heads, GROUP=group, GROUP_PADDED=padded, DIM=dim, DIM_PADDED=dim_padded,
        M=size, SLOTS=PAGE, TILE_SIZE=TILE_FIELDS, ROW_SIZE=ROW_FIELDS,
        num_warps=8 if dim_padded > 128 or (exact and size > 16) else 4, num_stages=1 if exact or dim > 128 else 2,
    )  # fmt: skip
