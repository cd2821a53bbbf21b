"""The decode table that the formulae were published with, row by row, as printed: microseconds, milliseconds, GPUs.

Context 8192, fp8 weights and KV unless stated; 0.8 of memory, 0.6 of products, 0.8 of links; alpha 10 us; uniform
routing, the maximum over hosts; groups pooled per layer. Nothing here is measured: it was computed for an H200.
"""

from dataclasses import dataclass

TABLE = """
1xTP8+16x1 B=1          | behemoth |  1 8 16 1   1 1 nic    fp8  |   29   39  308   10   11  359 | 34.5 24 1 |
1xTP8+16x2 B=1          | behemoth |  1 8 16 2   1 1 nic    fp8  |   29   39  154   10   10  204 | 19.7 40 1 |
1xTP8+16x8 B=1          | behemoth |  1 8 16 8   1 1 nic    fp8  |   29   39   39   10   10   88 | 8.5 136 1 |
1xTP8+16x1 B=32         | behemoth |  1 8 16 1  32 1 nic    fp8  |   51   39  308   12   14  385 | 37.1 24 36 |
1xTP8+16x1 B=128        | behemoth |  1 8 16 1 128 1 nic    fp8  |  119   39  308   17   23  467 | 44.9 24 119 |
1xTP8+16x1 B=512 m=1    | behemoth |  1 8 16 1 512 1 nic    fp8  |  390  128  308   37   62  797 | 76.9 24 277 |
1xTP8+16x1 B=512 m=2    | behemoth |  1 8 16 1 512 2 nic    fp8  |  209   64  308   24   36  641 | 61.9 24 345 | 2.35
4xTP8+16x1 m=1          | behemoth |  4 8 16 1 512 1 nic    fp8  |  390  128  309   73  132  903 | 87 48 490 |
4xTP8+16x1 m=2          | behemoth |  4 8 16 1 512 2 nic    fp8  |  209   64  308   43   74  698 | 67.4 48 633 | 2.56
4xTP8+16x1 m=3          | behemoth |  4 8 16 1 512 3 nic    fp8  |  149   43  308   33   55  924 | 89.1 48 479 |
8xTP8+16x1 m=1          | behemoth |  8 8 16 1 512 1 nic    fp8  |  390  128  567  130  243 1331 | 128.1 80 400 |
8xTP8+16x1 m=2          | behemoth |  8 8 16 1 512 2 nic    fp8  |  209   64  309   73  132  786 | 75.9 80 675 | 2.88
8xTP8+16x2 m=2          | behemoth |  8 8 16 2 512 2 nic    fp8  |  209   64  155   41   71  546 | 52.8 96 809 | 1.98
8xTP2+16x4 B=32         | behemoth |  8 2 16 4  32 1 nic    fp8  |  157  154   77   17   23  311 | 30.3 80 106 |
8xTP4+16x4 B=64         | behemoth |  8 4 16 4  64 1 nic    fp8  |  126   77   77   17   23  243 | 23.5 96 227 |
bf16 4xTP8+16x2 m=1     | behemoth |  4 8 16 2 192 1 nic    bf16 |  287   96  308   35   35  665 | 64.1 64 187 |
bf16 4xTP8+16x2 m=2     | behemoth |  4 8 16 2 192 2 nic    bf16 |  167   77  308   24   24  616 | 59.4 64 202 | 2.45
scout 4A+4E B=1         | scout    |  4 1  4 1   1 1 nvlink fp8  |   21   33   60   10   10  101 | 5.1 8 98 |
scout 4A+4E nvlink      | scout    |  4 1  4 1 128 2 nvlink fp8  |  296   33  131   11   12  658 | 31.8 8 2011 | 1.5
scout 4A+4E nic         | scout    |  4 1  4 1 128 2 nic    fp8  |  296   33  131   20   29  658 | 31.8 8 2011 |
scout 6A+2E nvlink      | scout    |  6 1  2 1 128 2 nvlink fp8  |  296   33  262   13   16  658 | 31.8 8 3016 | 1.88
scout 6A+2E nic         | scout    |  6 1  2 1 128 2 nic    fp8  |  296   33  262   36   61  688 | 33.3 8 2882 | 2.09
maverick 4A+4E m=1      | maverick |  4 1  4 1 128 1 nvlink fp8  |  576   33 1048   12   14 1649 | 55.2 8 1159 |
maverick 4A+4E m=2      | maverick |  4 1  4 1 128 2 nvlink fp8  |  296   33  968   11   12 1937 | 62.5 8 1023 | 4.0
maverick 24A+8E nvlink  | maverick | 24 1  8 1 128 2 nvlink fp8  |  296   33  524   13   16 1049 | 41.2 32 2329 | 2.7
maverick 24A+8E nic     | maverick | 24 1  8 1 128 2 nic    fp8  |  296   33  524   38   64 1049 | 41.2 32 2329 | 2.9
maverick 48A+16E nvlink | maverick | 48 1 16 1 128 2 nvlink fp8  |  296   33  262   13   16  658 | 31.8 64 3016 | 1.89
maverick 48A+16E nic    | maverick | 48 1 16 1 128 2 nic    fp8  |  296   33  262   39   66  695 | 32.7 64 2933 | 2.11
"""
# name | model | groups, ranks, hosts, GPUs per host, batch of a group, m, link, format
#      | T_attn, T_sh, T_E, T_d, T_c, layer in us | TPOT in ms, GPUs, tokens/s and GPU | m needed, where printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table."""

    name: str
    model: str
    groups: int
    ranks: int
    hosts: int
    gpus_per_host: int
    batch: int
    m: int
    link: str
    dtype: str
    attention: float
    shared: float
    expert: float
    dispatch: float
    combine: float
    layer: float
    tpot_ms: float
    gpus: int
    rate: float
    needed: float | None


def _row(line: str) -> Row:
    name, model, layout, terms, results, needed = (part.strip() for part in line.split("|"))
    groups, ranks, hosts, gpus_per_host, batch, m, link, dtype = layout.split()
    attention, shared, expert, dispatch, combine, layer = map(float, terms.split())
    tpot_ms, gpus, rate = results.split()
    return Row(
        name=name,
        model=model,
        groups=int(groups),
        ranks=int(ranks),
        hosts=int(hosts),
        gpus_per_host=int(gpus_per_host),
        batch=int(batch),
        m=int(m),
        link=link,
        dtype=dtype,
        attention=attention,
        shared=shared,
        expert=expert,
        dispatch=dispatch,
        combine=combine,
        layer=layer,
        tpot_ms=float(tpot_ms),
        gpus=int(gpus),
        rate=float(rate),
        needed=float(needed) if needed else None,
    )


ROWS = tuple(map(_row, TABLE.strip().splitlines()))
