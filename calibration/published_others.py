"""Published results that are not predicted at all, each with its reason."""

from __future__ import annotations

from .published import Study

UNMATCHED = (
    (
        "ContiguousKV 6.16, 5.83, 3.85x; 16.33x fewer tokens; 2.6x at 10K",
        "skew of the requests and sparsity of attention are not stated; both decide the caches",
    ),
    (
        "ContiguousKV: read amplification of 12x at 25 % budget",
        "64-token chunks of random tokens can give at most 4x: something else is counted",
    ),
    (
        "IMPRESS p99 of 2.95 to 9.3 s, I/O share 51 to 98 %",
        "request order, hit rates and the engine's own overhead are not stated; OPT has no RoPE",
    ),
    (
        "CacheFlow v1 1.1 to 1.7x, v2 2.24 to 3.00x, utilisations, 1.59 / 0.96 / 0.67 s",
        "prompt lengths come from chat logs and are not given; v2's linear-attention models are"
        " not in the cost model",
    ),
    (
        "KVmix: memory 4.9x, throughput 5.32x",
        "peak memory of an eager library, not a time; which bar is whose is not in the text",
    ),
    ("HCache 1.27 to 5.73x", "restores from hidden states, which is no plan of ours"),
    (
        "Block-Attention: 50 / 330 / 691 / 3638 ms against 26 / 27 / 29 / 45 ms",
        "the GPU is not in the notes at hand",
    ),
    (
        "EPIC up to 8x TTFT and 7x throughput; Cache-Craft 1.6x; CacheSlide 1.21 to 4.3x",
        "best cases over data sets whose lengths and arrival rates are not given",
    ),
    (
        "Pensieve 1.14 to 3.0x, Bottlenecks kappa, KVPR -35.8 %, InferSave tokens/s",
        "throughput of whole servers or decode with off-loading, whose loads are not given",
    ),
    (
        "H20: 42 to 111 ms (GPU hit), 57 to 272 ms (CPU hit), 78 ms to 15.2 s (miss)",
        "a mixture of experts on a GPU without tables or sheet here",
    ),
)


def others() -> Study:
    """No points, only reasons."""
    return Study(
        name="others",
        paper="papers without a prediction",
        points=(),
        scalars=(),
        assumed=(),
        unmatched=UNMATCHED,
    )
