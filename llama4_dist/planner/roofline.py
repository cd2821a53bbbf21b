"""The times of one decode step's parts, formula by formula; pure functions of numbers, symbols in docs/planner.md.

Each part takes the longer of reading its bytes and of computing its products, both at the rates after efficiency.
"""

from dataclasses import dataclass

from llama4_dist.dispatch.microbatches import LayerTimes, layer_s
from llama4_dist.planner import formats
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import Rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.multinomial import (
    SAMPLES,
    Slowest,
    estimate_fullest,
    estimated_slowest,
    slowest_host,
    spread,
)

ESTIMATE = 0  # samples: none
ACTIVATION_BYTES = 2  # of a number in a reduction and between stages: bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What runs: positions cached per sequence, and the popularity p_e of experts (uniform by default)."""

    context: int
    popularity: tuple[float, ...]
    pooled: bool = True  # groups reach a layer together, so that an expert reads its weights once for all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step computes in one group. Of a decode B rows at context ctx: B rows, B ctx_eff keys read and scored.

    Tokens of a prompt share the keys they read; `logit_rows` of the rows get logits. They are of so many `sequences`:
    only those of different ones can be in different steps at the same time.
    """

    rows: int
    sequences: int
    keys_read: float
    keys_scored: float
    logit_rows: int

    def part(self, number: int) -> "Work":
        """Return the largest of `number` parts of nearly equal size."""
        rows = -(-self.rows // number)
        share = rows / self.rows
        return Work(
            rows=rows,
            sequences=min(rows, self.sequences),
            keys_read=share * self.keys_read,
            keys_scored=share * self.keys_scored,
            logit_rows=min(rows, self.logit_rows),
        )


def decode_work(geometry: Geometry, rows: int, context: float) -> Work:
    """Return a token for each of so many sequences of that many cached positions."""
    keys = rows * geometry.keys_seen(context)
    return Work(rows=rows, sequences=rows, keys_read=keys, keys_scored=keys, logit_rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds of one MoE layer for one microbatch. B is the group's part of a batch, B_tot that of all groups."""

    attention_s: float  # T_attn, the reduction included
    shared_s: float  # T_sh
    expert_s: float  # T_E, of the slowest host
    expert_mean_s: float  # of the mean host: what expert GPUs are busy
    dispatch_s: float  # T_d
    combine_s: float  # T_c

    @property
    def reply_s(self) -> float:
        """R = T_d + T_E + T_c."""
        return self.dispatch_s + self.expert_s + self.combine_s

    @property
    def own_s(self) -> float:
        """T_A = T_attn + T_sh."""
        return self.attention_s + self.shared_s

    @property
    def microbatches_needed(self) -> float:
        """1 + R / T_A: from so many parts on dispatch is hidden, if T_E <= T_A."""
        return 1.0 + self.reply_s / self.own_s

    def layer_s(self, microbatches: int) -> float:
        """m = 1: T_attn + max(T_sh, R); else max(m T_A, m T_E, T_A + R)."""
        times = LayerTimes(
            attention_s=self.attention_s, shared_s=self.shared_s, reply_s=self.reply_s, expert_s=self.expert_s
        )
        return layer_s(times, microbatches)

    def exposed_s(self, microbatches: int) -> float:
        """What a layer takes beyond the attention side's own work."""
        return max(0.0, self.layer_s(microbatches) - microbatches * self.own_s)


def product_s(parameters: float, rows: float, weight_bytes: float, gpus: int, rates: Rates) -> float:
    """max(P b_w / (g BW), 2 B P / (g FL)): rows times a matrix of so many parameters over g GPUs."""
    return max(parameters * weight_bytes / (gpus * rates.memory), 2 * rows * parameters / (gpus * rates.flops))


def reduce_s(ranks: int, rows: float, width: int, rates: Rates) -> float:
    """T_allreduce(g, B H): a ring moves 2 (g-1)/g of the bytes through each GPU's link; nothing for one rank."""
    if ranks == 1:
        return 0.0
    moved = 2 * (ranks - 1) / ranks * rows * width * ACTIVATION_BYTES
    return rates.reduce_alpha_s + moved / rates.reduce_link


def attention_s(geometry: Geometry, layout: Layout, rates: Rates, work: Work) -> float:
    """T_attn = max((P_a b_w + B ctx_eff 2 n_kv d b_kv)/(T BW), (2 B P_a + 4 B ctx_eff n_q d)/(T FL)) + T_allreduce.

    Beyond one rank a KV head, each rank still reads a whole head: keys are divided by min(T, n_kv) only.
    """
    config, ranks, parameters = geometry.config, layout.ranks, geometry.attention_parameters
    kv_read = work.keys_read * 2 * config.num_kv_heads * config.head_dim * formats.kv_bytes(layout.kv_dtype)
    read = parameters * formats.weight_bytes(layout.dtype) / ranks + kv_read / min(ranks, config.num_kv_heads)
    flops = 2 * work.rows * parameters + 4 * work.keys_scored * config.num_heads * config.head_dim
    roof = max(read / rates.memory, flops / (ranks * rates.flops))
    return roof + reduce_s(ranks, work.rows, config.hidden_size, rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceCost:
    """Seconds that a slice of an expert takes on its host: max(read_s, rows x row_s)."""

    read_s: float
    row_s: float


def slice_cost(geometry: Geometry, layout: Layout, rates: Rates, *, reads: int = 1) -> SliceCost:
    """P_e b_w / (S g_e BW) to read the weights, and 2 P_e / (S g_e FL) for each row."""
    piece, gpus = geometry.expert_parameters / layout.slices, layout.gpus_per_host
    return SliceCost(
        read_s=reads * piece * formats.weight_bytes(layout.dtype) / (gpus * rates.memory),
        row_s=2 * piece / (gpus * rates.flops),
    )


def expert_load(
    geometry: Geometry, layout: Layout, rates: Rates, rows: int, traffic: Traffic, *, samples: int = SAMPLES
) -> Slowest:
    """T_E = E[max over hosts of the sum over its slices with rows of max(P_e b_w / (S g BW), 2 c P_e / (S g FL))].

    `rows` are those of all groups. Unpooled, the read is paid once per group. With `samples` ESTIMATE nothing is
    drawn.
    """
    cost = slice_cost(geometry, layout, rates, reads=1 if traffic.pooled else layout.groups)
    copies = rows * geometry.config.experts_per_token
    if samples == ESTIMATE:
        fullest = estimate_fullest(copies, traffic.popularity, layout.slices, layout.hosts)
        return estimated_slowest(fullest, read_s=cost.read_s, row_s=cost.row_s)
    placed = spread(traffic.popularity, layout.slices, layout.hosts)
    return slowest_host(copies, traffic.popularity, placed, read_s=cost.read_s, row_s=cost.row_s, samples=samples)


def transfer_s(row_bytes: float, sent: float, received: float, layout: Layout, rates: Rates) -> float:
    """alpha + max(B S D / (T BWn), B_e D / (g_e BWn)): the sender's links or the fullest host's, whichever is longer.

    Each rank sends its own part of the rows, so a group uses all its links; every slice of an expert gets the row.
    """
    slowest = max(sent * row_bytes / layout.ranks, received * row_bytes / layout.gpus_per_host)
    return rates.alpha_s + slowest / rates.link


def moe_terms(geometry: Geometry, layout: Layout, rates: Rates, work: Work, load: Slowest) -> Terms:
    """Return the terms of a layer for one group's work, with what its rows and the others' make of the hosts."""
    config, weight_bytes = geometry.config, formats.weight_bytes(layout.dtype)
    copies = work.rows * config.experts_per_token * layout.slices
    out_bytes = formats.dispatch_bytes(config.hidden_size, layout.wire)
    back_bytes = formats.combine_bytes(config.hidden_size, layout.wire)
    return Terms(
        attention_s=attention_s(geometry, layout, rates, work),
        shared_s=product_s(geometry.expert_parameters, work.rows, weight_bytes, layout.ranks, rates),
        expert_s=load.seconds,
        expert_mean_s=load.mean_seconds,
        dispatch_s=transfer_s(out_bytes, copies, load.rows, layout, rates),
        combine_s=transfer_s(back_bytes, copies, load.rows, layout, rates),
    )


def dense_layer_s(geometry: Geometry, layout: Layout, rates: Rates, work: Work) -> float:
    """T_dense_layer: m T_attn of a part, and a dense network for all rows, since nothing is away meanwhile.

    An engine that cuts this network too reads its weights m times.
    """
    weight_bytes, parts = formats.weight_bytes(layout.dtype), layout.microbatches
    own_s = product_s(geometry.dense_parameters, work.rows, weight_bytes, layout.ranks, rates)
    return parts * attention_s(geometry, layout, rates, work.part(parts)) + own_s


def head_s(geometry: Geometry, layout: Layout, rates: Rates, rows: float) -> float:
    """T_lmhead over the ranks of the last stage."""
    return product_s(geometry.head_parameters, rows, formats.weight_bytes(layout.dtype), layout.ranks, rates)


def hop_s(geometry: Geometry, layout: Layout, rates: Rates, rows: float) -> float:
    """Rows of one microbatch from a stage's rank to the next stage's: alpha + B H 2 / (T BWn)."""
    moved = rows * geometry.config.hidden_size * ACTIVATION_BYTES / layout.ranks
    return rates.alpha_s + moved / rates.stage_link


def ridge_rows(rates: Rates, weight_bytes: float) -> float:
    """Rows per expert at which reading its weights and computing take equally long: b_w FL / (2 BW)."""
    return weight_bytes * rates.flops / (2 * rates.memory)
