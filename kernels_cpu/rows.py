"""Op rows and control cells: the integers through which Python and compiled code agree.

Owns: the fields of an op row, of the frame (one call), of the control cells, of the stream
descriptor and of a timeline's records. Must not know what runs on either side.

A program is an int64 array [n_ops, OP_FIELDS]. Fields 0-7 are the team's, the rest the kernel's.
"""

from __future__ import annotations

__all__ = [
    "CELL", "CONTROL_CELLS", "FRAME_FIELDS", "HINT_TOKENS", "OP_FIELDS", "ORDER_FIELDS",
    "STREAM_FIELDS",
]  # fmt: skip

CELL = 64  # bytes between two counters: one cache line each
OP_FIELDS = 64

# Fields of every row; the arguments of a kernel start at 8 (abi.ARG0).
FN, KIND, UNITS, CHUNK, FLAGS, TILE, WEIGHT, COUNTER = range(8)

# Kinds of rows.
CALL, MATMUL, GROUP, EXPERTS, HINT = range(5)

# Flags: units are per token; a barrier follows; the rows are those whose logits are asked for; the
# row serves a hint, and is left out of passes without hints.
PER_TOKEN, BARRIER, LOGITS, AHEAD = 1, 2, 4, 8

# Arguments of a MATMUL row (see matmul.py).
M_X, M_X_STRIDE, M_Y, M_Y_STRIDE, M_K, M_XI, M_YI, M_MODE, M_BIAS = range(8, 17)

# Arguments of a GROUP row: the layer and where its routing is read.
G_LAYER, G_IDS, G_TOP_K, G_N_EXPERTS = range(8, 12)

# Arguments of a HINT row, behind those of its kernel: the layer that may want what is routed.
H_LAYER, H_IDS, H_TOP_K, H_N_EXPERTS = range(32, 36)

# Arguments of an EXPERTS row: a table of experts and the bytes from one to the next (0: all are
# alike), rows in and out.
(
    E_N_EXPERTS, E_TABLE, E_TABLE_STRIDE,
    E_GATE_X, E_GATE_X_STRIDE, E_UP_X, E_UP_X_STRIDE, E_GATE, E_UP, E_FF_STRIDE,
    E_ACT, E_ACT_STRIDE, E_OUT, E_OUT_STRIDE, E_HIDDEN, E_FF, E_FF_TILES, E_HIDDEN_TILES,
    E_SWIGLU_FN, E_SWIGLU_OP, E_SWIGLU_UNITS,
) = range(8, 29)  # fmt: skip

# A row of that table: kernels, where up and down begin in a record.
X_GATE_FN, X_UP_FN, X_DOWN_FN, X_UP_OFFSET, X_DOWN_OFFSET = range(5)
X_FIELDS = 5

# Fields of the frame: one call of the team. The first two are known to the op kernels (abi.py).
# F_THREADS: how many of the team walk, the first ones; 0 is all.
F_N_TOKENS, F_POSITION, F_PASS, F_FIRST_LOGIT, F_N_LOGITS, F_HINTS, F_THREADS = range(7)
FRAME_FIELDS = 16

# Control cells, one cache line each: barrier, stop flag, time thread 0 waited for weights, groups
# of experts left; then walks ordered and ended, threads asleep and threads through with a walk.
(
    C_COUNT, C_GENERATION, C_STOP, C_STALL_NS, C_LEFT, C_ORDERED, C_ENDED, C_ASLEEP, C_THROUGH,
) = range(9)  # fmt: skip
CONTROL_CELLS = 9

# The order of a walk: addresses, and the number of rows (negative: the threads return).
O_FRAME, O_ROWS, O_N_ROWS, O_COUNTERS, O_STREAMS = range(5)
ORDER_FIELDS = 8

# Stream descriptor: addresses and pipes of the dense stream, then of the expert streamer; then the
# ring of records of a timeline, 0 when there is none (recording.py), and the board of hints.
(
    S_READY, S_ADDRESS, S_SLOT_OF, S_FREE_FD, S_FAILED,
    S_BOARD, S_SLOT_ADDRESS, S_LAST_USED, S_REQUEST_FD, S_EXPERT_FAILED,
    S_GROUPS, S_PAIR_TOKEN, S_PAIR_ID, S_WAVE, S_WAVE_PAIRS, S_HITS, S_MISSES, S_CLOCK,
    S_TIMELINE, S_HINTS,
) = range(20)  # fmt: skip
STREAM_FIELDS = 32

# The ring of a timeline: a header of one cache line (records begun so far, number of records less
# one), then records: row << T_THREAD_BITS | thread, and four times of `now_ns`: the thread came to
# the row, its weights were there, its units were done, it was through the barrier.
T_COUNT, T_MASK = range(2)
T_ROW, T_BEGIN, T_READY, T_DONE, T_THROUGH = range(5)
T_FIELDS = 5
T_THREAD_BITS = 16

# The board of the expert streamer: layer, number of groups, tokens of the pass, then expert, state
# and address of every group as three arrays of n_experts.
BOARD_LAYER, BOARD_GROUPS, BOARD_TOKENS, BOARD_ARRAYS = range(4)
WANTED, READY, DONE = 0, 1, 2

# The board of hints: the stamp that the layer will write when it comes, the layer, number of
# experts, then experts. Passes of more tokens use most experts anyway: they have no hints.
HINT_DUE, HINT_LAYER, HINT_COUNT, HINT_EXPERTS = range(4)
HINT_TOKENS = 8
HINT_MAX = 64
