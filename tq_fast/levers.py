"""What makes decoding cheaper without changing what it means; each part can be switched off.

Every lever is on by default. They are switched off to measure them (bench/test_levers.py) and to
test that they keep their promise: E0, the same tokens; E1, the same law (method of arXiv 2405.20495
at the same k, n and L).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Levers:
    """Speed levers of one decode.

    Attributes:
        merge_equal: sampled roll-outs that are still equal share one row of the forward pass: the
            n roll-outs of a candidate branch late (E0).
        reuse_greedy: the greedy roll-out of the chosen token serves again as that of its arg-max
            child (E0).
        score_once: a text that was scored at this or the last step is not scored again (E0).
        lazy_argmax: with a reward that is declared bounded, candidates that cannot win any more are
            not rolled out (E0: the noise of the choice is drawn first).
        refill_slots: with a fixed horizon, a finished prompt's place in the forest goes to the next
            prompt at once (E0). Prompts that roll out to the end stay together.
        share_prefixes: what a prompt has in common with another one in the forest is not encoded
            again (E0 up to rounding).
        graph_rollouts: on a CUDA device, each depth of the roll-outs is one CUDA graph, replayed
            (E0). Equal roll-outs part after the first depth then, and a greedy roll-out serves
            again only where it is known to its end.
        few_rows: linear and decoder layers on CPU run in kernels made for few rows (E0 up to
            rounding).
    """

    merge_equal: bool = True
    reuse_greedy: bool = True
    score_once: bool = True
    lazy_argmax: bool = True
    refill_slots: bool = True
    share_prefixes: bool = True
    graph_rollouts: bool = True
    few_rows: bool = True
